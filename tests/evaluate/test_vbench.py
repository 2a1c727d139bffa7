from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mobius_train.errors import MobiusError
from mobius_train.evaluate.clips import EvaluatedClip
from mobius_train.evaluate.report import ClipResult, Report
from mobius_train.evaluate.vbench_layout import VBenchLayout
from mobius_train.evaluate.vbench_scores import SCALES, merge_results, total, unmeasured


def report(*files: str) -> Report:
    clips = [
        ClipResult(key=file, caption="a dog", frames=4, width=8, height=8, fps=8, vbench_file=file) for file in files
    ]
    return Report(source="clips", dimensions={}, distances={}, vbench=unmeasured(), clips=clips)


def write_results(path: Path, results: object) -> Path:
    path.write_text(json.dumps(results))
    return path


def test_the_layout_names_files_after_their_prompts(tmp_path: Path) -> None:
    frames = torch.zeros(3, 3, 16, 16, dtype=torch.uint8)
    prompts = ["a dog", "a dog", "either/or", "长" * 200]
    layout = VBenchLayout(tmp_path, tmp_path)
    names = [layout.add(EvaluatedClip(str(n), prompt, frames, 8.0)) for n, prompt in enumerate(prompts)]
    layout.finish()
    assert names[:3] == ["a dog-0.mp4", "a dog-1.mp4", "either-or-0.mp4"]
    assert {path.name for path in (tmp_path / "videos").iterdir()} == set(names)
    # Prompts that are not exact in a file name are exact in the list.
    assert json.loads((tmp_path / "prompts.json").read_text()) == dict(zip(names, prompts, strict=True))
    info = json.loads((tmp_path / "full_info.json").read_text())
    assert [entry["prompt_en"] for entry in info] == prompts
    assert all(Path(path).is_file() for entry in info for path in entry["video_list"])
    assert "dynamic_degree" in info[0]["dimension"]


def test_an_mp4_is_copied(tmp_path: Path) -> None:
    frames = torch.zeros(3, 3, 16, 16, dtype=torch.uint8)
    name = VBenchLayout(tmp_path, tmp_path).add(EvaluatedClip("0", "a dog", frames, 8.0), b"as it is")
    assert (tmp_path / "videos" / name).read_bytes() == b"as it is"


def test_results_are_merged_for_the_set_and_for_each_clip(tmp_path: Path) -> None:
    merged = report("a-0.mp4", "b-0.mp4")
    videos = [{"video_path": f"/there/{name}-0.mp4", "video_results": name == "a"} for name in "ab"]
    paths = [
        write_results(tmp_path / "1.json", {"dynamic_degree": [0.5, videos]}),
        write_results(tmp_path / "2.json", {"imaging_quality": [0.0, []]}),
    ]
    merge_results(merged, paths)
    assert merged.vbench["dynamic_degree"].value == 0.5
    assert [clip.vbench for clip in merged.clips] == [{"dynamic_degree": 1.0}, {"dynamic_degree": 0.0}]
    # A measured 0 is a value; what was not measured has none.
    assert merged.vbench["imaging_quality"].value == 0
    assert merged.vbench["scene"].value is None
    assert merged.vbench["scene"].needs
    assert merged.vbench_total is None


def test_the_total_needs_all_dimensions() -> None:
    best = {name: scale.highest for name, scale in SCALES.items()}
    assert len(SCALES) == 16
    assert total(best) == pytest.approx(1)
    # Half of the dynamic degree: 0.25 of a weight of 6.5 of the quality, which is 4 of 5 parts.
    assert total(best | {"dynamic_degree": 0.5}) == pytest.approx(1 - 0.25 / 6.5 * 4 / 5)
    assert total(best | {"scene": None}) is None
    assert total({name: value for name, value in best.items() if name != "scene"}) is None


@pytest.mark.parametrize(
    ("results", "named"),
    [
        ({"beauty": [1, []]}, "beauty"),
        ({"scene": [0.5, [{"video_path": "c-0.mp4", "video_results": 1}]]}, "c-0.mp4"),
        ({"scene": ["NaN", []]}, "eval_results"),
        ({"scene": 0.5}, "eval_results"),
        ([1], "eval_results"),
        ({}, "no dimension"),
    ],
)
def test_other_files_are_no_results(tmp_path: Path, results: object, named: str) -> None:
    with pytest.raises(MobiusError, match=named):
        merge_results(report("a-0.mp4"), [write_results(tmp_path / "results.json", results)])


def test_a_report_without_the_layout_takes_no_results(tmp_path: Path) -> None:
    bare = report("a-0.mp4")
    bare.clips[0].vbench_file = None
    with pytest.raises(MobiusError, match="--vbench"):
        merge_results(bare, [write_results(tmp_path / "results.json", {"scene": [1, []]})])
