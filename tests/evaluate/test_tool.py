"""tools/evaluate.py in this process: the report, the page, and mistakes."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import save_clips, save_vae
from tiny_encoders import save_clip, save_dino, save_head, save_video_encoder

import mobius_train
from mobius_train.media.clip_files import write_clips

ROOT = Path(mobius_train.__file__).parents[1]
Tool = Callable[..., object]


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Tool:
    """The exit status of the script."""

    def start(*arguments: str | Path) -> object:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_info:
            runpy.run_path(str(ROOT / "tools" / "evaluate.py"), run_name="__main__")
        return exit_info.value.code

    return start


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_dino(folder / "dino")
    save_clip(folder / "clip")
    save_head(folder / "head.safetensors")
    save_video_encoder(folder / "video")
    save_vae(folder / "vae")
    return folder


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_pixels_alone(tool: Tool, clips_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report.json"
    assert tool("clips", clips_folder, "--only", "clip0[0-3]", "--out", out) == 0
    report = read(out)
    assert [clip["key"] for clip in report["clips"]] == ["clip00", "clip01", "clip02", "clip03"]
    assert [clip["caption"] for clip in report["clips"]][1] == "dog number 1"
    assert {clip["fps"] for clip in report["clips"]} == {10.0}
    order = report["dimensions"]["order"]
    assert (order["clips"], order["needs"]) == (4, None)
    assert order["value"] == pytest.approx(sum(clip["values"]["order"] for clip in report["clips"]) / 4)
    assert order["shuffled"] is not None
    missing = {name for name, result in report["dimensions"].items() if result["value"] is None}
    assert missing == {
        "motion_correlation", "subject_consistency", "background_consistency", "text_alignment", "aesthetic_quality"
    }  # fmt: skip
    assert all(report["dimensions"][name]["needs"] for name in missing)
    assert {result["value"] for result in report["distances"].values()} == {None}
    assert {result["value"] for result in report["vbench"].values()} == {None}
    printed = capsys.readouterr().out
    flicker = next(line for line in printed.splitlines() if line.startswith("temporal_flickering"))
    assert "dynamic_dis" in flicker
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/webp;base64,") == 4
    assert all(name in page for name in missing)
    assert "http" not in page.replace('lang="en"', "")


def test_everything(tool: Tool, clips_folder: Path, models: Path, tmp_path: Path) -> None:
    out, layout = tmp_path / "report.json", tmp_path / "vbench"
    evaluated = tmp_path / "evaluated"
    shutil.copytree(clips_folder, evaluated)
    lines = (evaluated / "metadata.jsonl").read_text().splitlines()
    (evaluated / "metadata.jsonl").write_text("\n".join([*lines[:7], lines[7].replace("dog", "<cat>")]))
    weights = ["--dino", models / "dino", "--clip", models / "clip", "--aesthetic", models / "head.safetensors"]
    sets = ["--reference", clips_folder, "--vae", models / "vae", "--video-encoder", models / "video"]
    assert tool("clips", evaluated, *weights, *sets, "--vbench", layout, "--out", out) == 0
    report = read(out)
    assert {name for name, result in report["dimensions"].items() if result["value"] is None} == set()
    correlation = report["dimensions"]["motion_correlation"]
    assert correlation["value"] == pytest.approx(1, abs=1e-4)
    assert (correlation["clips"], sum(correlation["unmeasured"].values())) == (7, 1)
    assert set(report["clips"][7]["unmeasured"]) == {"motion_correlation"}
    assert set(report["distances"]) == {"frechet_latents", "frechet_videomae"}
    for distance in report["distances"].values():
        assert (distance["clips"], distance["reference"]) == (8, 10)
        assert distance["value"] < distance["shuffled"]
        assert distance["halves"] > 0
    assert (tmp_path / "report.html").read_text().count("&lt;cat&gt; number 7") == 2

    videos = [{"video_path": f"x/{clip['vbench_file']}", "video_results": 0.25} for clip in report["clips"]]
    results = tmp_path / "results_eval_results.json"
    results.write_text(json.dumps({"imaging_quality": [0.25, videos]}))
    assert tool("merge", results, "--out", out) == 0
    merged = read(out)
    assert merged["vbench"]["imaging_quality"]["value"] == 0.25
    assert merged["clips"][3]["vbench"] == {"imaging_quality": 0.25}
    assert merged["dimensions"] == report["dimensions"]
    assert "vbench imaging_quality" in (tmp_path / "report.html").read_text()


def test_samples_are_evaluated_by_their_exact_prompts(tool: Tool, tmp_path: Path) -> None:
    frames = torch.randint(0, 256, (2, 4, 3, 16, 16), dtype=torch.uint8)
    write_clips(list(frames), ["a / b", "红心"], tmp_path / "samples")
    assert tool("clips", tmp_path / "samples", "--resolution", 16, "--out", tmp_path / "report.json") == 0
    clips = read(tmp_path / "report.json")["clips"]
    assert [(clip["caption"], clip["frames"], clip["width"]) for clip in clips] == [("a / b", 4, 16), ("红心", 4, 16)]
    assert {clip["fps"] for clip in clips} == {8.0}


def test_clips_drawn_from_a_model(tool: Tool, clips_folder: Path, tmp_path: Path) -> None:
    model = ROOT / "tests" / "files" / "written-by-0.1.0" / "parallel"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("dog number 1\ndog number 2\ndog number 3\na cat\n")
    out, drawn = tmp_path / "report.json", tmp_path / "drawn"
    arguments = ["--prompts-file", prompts, "--steps", "1", "--num-frames", "2", "--output", drawn, "--out", out]
    assert tool("model", model, *arguments, "--reference", clips_folder) == 0
    report = read(out)
    assert report["source"] == str(drawn)
    assert [clip["caption"] for clip in report["clips"]] == prompts.read_text().splitlines()
    assert report["dimensions"]["motion_correlation"]["clips"] == 3
    assert sum(report["dimensions"]["motion_correlation"]["unmeasured"].values()) == 1
    # Two frames have no middle one.
    assert report["dimensions"]["smoothness_dis"]["value"] is None
    assert report["distances"]["frechet_latents"]["clips"] == 4
    assert {path.suffix for path in drawn.iterdir()} == {".gif", ".mp4", ".png", ".jsonl"}
    arguments[-5] = "1"
    assert tool("model", model, *arguments, "--overwrite") == 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["CLIPS", "--only", "clip0*", "--only", "dog*"], "dog*"),
        (["STILLS"], "still.png"),
        (["missing"], "CLIPS: there is no file or folder missing; give"),
        (["CLIPS", "--reference", "missing"], "--reference: there is no file or folder missing; give"),
        (["CLIPS", "--vae", "MODELS/vae"], "--reference"),
        (["CLIPS", "--vae", "MODELS/vae", "--reference", "CLIPS", "--only", "clip00"], "frechet_latents"),
        (["CLIPS", "--video-encoder", "MODELS/dino", "--reference", "CLIPS"], "videomae"),
        (["CLIPS", "--dino", "MODELS/clip"], "dinov2"),
        (["CLIPS", "--out", "report.txt"], ".json"),
        (["CLIPS", "--vbench", "STILLS"], "not empty"),
        (["CLIPS", "--device", "abacus"], "abacus"),
    ],
)
def test_mistakes_write_nothing(
    tool: Tool,
    clips_folder: Path,
    models: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    named: str,
) -> None:
    stills = save_clips(tmp_path / "stills", 1)
    Image.new("RGB", (32, 32)).save(stills / "still.png")
    with (stills / "metadata.jsonl").open("a") as file:
        file.write('\n{"file_name": "still.png", "text": "a still"}')
    places = {"CLIPS": clips_folder, "STILLS": stills, "MODELS": models}
    filled = []
    for argument in arguments:
        first, slash, rest = argument.partition("/")
        filled.append(f"{places.get(first, first)}{slash}{rest}")
    out = [] if "--out" in filled else ["--out", tmp_path / "report.json"]
    assert tool("clips", *filled, *out) == 1
    error = capsys.readouterr().err
    assert "error: " in error
    assert named in error
    assert [path.name for path in tmp_path.iterdir()] == ["stills"]
