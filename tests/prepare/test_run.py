"""The output follows from recipe and inputs alone: not from workers, tasks, or when a process was killed."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import RLock
from typing import Any

import made
import pytest
import torch
import yaml
from launching import python
from made import PrepareConfig
from tqdm import tqdm

from mobius_train.data.clips import open_clips
from mobius_train.data.shards import verify_shards
from mobius_train.errors import MobiusError
from mobius_train.files import publish_lines
from mobius_train.job.environment import array_task
from mobius_train.prepare.candidate import Candidate
from mobius_train.prepare.listing import open_inputs
from mobius_train.prepare.part import decision_path, rows_path, run_part
from mobius_train.prepare.passes import passes
from mobius_train.prepare.preparation import ALL, Share, prepare_data
from mobius_train.recipe_files import load_as

TOOL = Path(__file__).parents[2] / "tools" / "prepare_data.py"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.heap(tmp_path_factory.mktemp("inputs") / "heap", 20)


def _recipe(inputs: Path, output: Path) -> PrepareConfig:
    split = {"heldout": 0.2}
    return made.recipe(output, {"kind": "folder", "path": str(inputs)}, part_size=3, output=split)


@pytest.fixture(scope="module")
def alone(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("alone") / "out"
    prepare_data(_recipe(inputs, output))
    return output


def _files(output: Path) -> set[str]:
    return {str(path.relative_to(output)) for path in output.rglob("*")}


def _start(config: PrepareConfig, workers: int = 1, task: Share = ALL) -> BaseProcess:
    """A preparation in a session of its own, so that nothing outlives a kill; forked: it has imported everything."""

    def work() -> None:
        os.setsid()
        torch.set_num_threads(1)  # threads do not survive a fork
        tqdm.set_lock(RLock())  # its own is shared by all forks, and would stay locked by one that is killed
        prepare_data(config, workers, task)

    process = get_context("fork").Process(target=work)
    process.start()
    return process


def test_the_trainer_reads_what_was_prepared(alone: Path) -> None:
    assert verify_shards(alone) == len(list(alone.glob("*.tar")))
    train, heldout = (open_clips(f"{alone}/{name}-*.tar", num_frames=5, resolution=16) for name in ("train", "heldout"))
    assert len(train) + len(heldout) == 20
    assert train[0].frames.shape == (5, 3, 16, 16)
    assert train[0].caption.startswith("a square, the ")


def test_the_trainer_reads_prepared_videos(inputs: Path, alone: Path, tmp_path: Path) -> None:
    """H.264 is lossy: its frames are near those of the WebP, and nearer than those of the next clip."""
    config = _recipe(inputs, tmp_path / "out")
    prepare_data(config.model_copy(update={"output": config.output.model_copy(update={"format": "mp4"})}))
    assert {row["output"]["shard"] for row in made.rows(tmp_path / "out")} == {
        path.name for path in alone.glob("*.tar")
    }
    pictures, videos = (
        open_clips(f"{folder}/train-*.tar", num_frames=5, resolution=16) for folder in (alone, tmp_path / "out")
    )
    assert {entry.suffix for entry in videos.entries} == {".mp4"}
    assert videos.keys == pictures.keys

    def difference(video: int, picture: int) -> float:
        return (videos[video].frames.float() - pictures[picture].frames.float()).abs().mean().item()

    assert max(difference(index, index) for index in range(5)) < 8 < min(difference(i, i + 1) for i in range(5))


@pytest.mark.distributed
def test_two_workers_make_the_same_bytes(inputs: Path, alone: Path, tmp_path: Path) -> None:
    prepare_data(_recipe(inputs, tmp_path / "out"), workers=2)
    assert made.result(tmp_path / "out") == made.result(alone)
    assert _files(tmp_path / "out") == _files(alone)


@pytest.mark.distributed
def test_tasks_of_an_array_make_the_same_bytes(inputs: Path, alone: Path, tmp_path: Path) -> None:
    tasks = [_start(_recipe(inputs, tmp_path / "out"), task=Share(number, 3)) for number in range(3)]
    for task in tasks:
        task.join()
    assert [task.exitcode for task in tasks] == [0, 0, 0]
    assert made.result(tmp_path / "out") == made.result(alone)
    assert _files(tmp_path / "out") == _files(alone)


def test_a_task_makes_up_for_others_that_never_ran(inputs: Path, alone: Path, tmp_path: Path) -> None:
    config = _recipe(inputs, tmp_path / "out")
    prepare_data(config, task=Share(1, 3))
    assert made.result(tmp_path / "out") == made.result(alone)
    prepare_data(config, task=Share(0, 3))
    assert _files(tmp_path / "out") == _files(alone)


@pytest.mark.parametrize("number", [0, 1])
def test_a_part_that_another_task_has_made_meanwhile_is_taken(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The other one is done with it while this one is at its frames; without it, the loss of the frames is an error."""
    config = _recipe(inputs, tmp_path / "out")
    work = tmp_path / "out" / "work"
    listed = open_inputs(config, work)
    first, last = passes(config)
    run_part(config, work, listed, first, 0)
    publish_lines(decision_path(work, 0), [])

    def robbed(*arguments: Any) -> Iterator[list[Candidate]]:
        if number:
            publish_lines(rows_path(work, 1, 0), [])
        raise FileNotFoundError
        yield

    monkeypatch.setattr("mobius_train.prepare.part._groups", robbed)
    if number:
        assert run_part(config, work, listed, last, 0) == 3
    else:
        with pytest.raises(FileNotFoundError):
            run_part(config, work, listed, last, 0)


def test_what_a_kill_after_the_end_has_left_is_removed(inputs: Path, alone: Path, tmp_path: Path) -> None:
    config = _recipe(inputs, tmp_path / "out")
    prepare_data(config)
    for name in ("work/pass-1/part-000000.jsonl", ".tmp-far-1-work/inputs.jsonl", "report/.tmp-far-1-kept.png"):
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text("")
    prepare_data(config)
    assert _files(tmp_path / "out") == _files(alone)


def test_another_seed_is_another_split(inputs: Path, alone: Path, tmp_path: Path) -> None:
    """Negative control: the comparison sees a difference."""
    config = made.recipe(
        tmp_path / "out", {"kind": "folder", "path": str(inputs)}, part_size=3, output={"heldout": 0.5}
    )
    prepare_data(config)
    assert made.result(tmp_path / "out") != made.result(alone)


@pytest.mark.distributed
def test_kills_at_any_time_neither_lose_nor_repeat(inputs: Path, alone: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    config = _recipe(inputs, output)
    draw = random.Random(0)
    killed = 0
    while not (output / "index.json").exists():
        process = _start(config, 1 + killed % 2)
        before = set(output.rglob("*"))
        # Time runs from the first thing that this process has written.
        while process.is_alive() and set(output.rglob("*")) <= before:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.1))
        if killed < 10 and process.is_alive():
            assert process.pid is not None
            os.killpg(process.pid, signal.SIGKILL)
            killed += 1
            process.join()
        else:
            process.join()
            assert process.exitcode == 0
    assert killed > 2
    prepare_data(config)  # the last kill may have come behind the end
    assert made.result(output) == made.result(alone)
    assert _files(output) == _files(alone)


def test_an_output_folder_belongs_to_one_recipe(inputs: Path, tmp_path: Path) -> None:
    config = _recipe(inputs, tmp_path / "out")
    prepare_data(config)
    other = config.model_copy(update={"part_size": 4})
    with pytest.raises(MobiusError, match=r"recipe.yaml.*'part_size: 4'.*output_dir"):
        prepare_data(other)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("!")
    with pytest.raises(MobiusError, match=r"contains thesis.txt"):
        prepare_data(_recipe(inputs, tmp_path / "mine"))


def test_a_finished_output_is_left_alone(inputs: Path, alone: Path) -> None:
    times = {path: path.stat().st_mtime_ns for path in alone.rglob("*")}
    prepare_data(_recipe(inputs, alone))
    assert times == {path: path.stat().st_mtime_ns for path in alone.rglob("*")}


@pytest.mark.distributed
def test_the_tool_tells_counts_and_mistakes(inputs: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(_recipe(inputs, tmp_path / "out").dump())
    done = python(TOOL, "--config", recipe)
    assert done.returncode == 0, done.stderr
    assert "# 20 inputs, 20 clips, 20 kept" in done.stdout
    assert "input/s" in done.stderr
    broken = yaml.safe_load(recipe.read_text())
    broken["stages"][1]["max_shares"] = 1
    recipe.write_text(yaml.safe_dump(broken))
    done = python(TOOL, "--config", recipe)
    assert done.returncode == 1
    assert "max_shares: no such key" in done.stderr


def test_an_override_reaches_into_the_lists_of_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "data.yaml"
    path.write_text("sources: [{kind: folder, path: a}]\nstages: [{name: decode}]\noutput_dir: out\n")
    config: Any = load_as(PrepareConfig, path, ["sources.0.path=b", "stages.0.fps=8"])
    assert str(config.sources[0].path) == "b"
    assert config.stages[0].fps == 8
    for override in ("sources.1.path=b", "sources.x.path=b"):
        with pytest.raises(MobiusError, match=override):
            load_as(PrepareConfig, path, [override])


@pytest.mark.parametrize(
    ("variables", "given", "share"),
    [
        ({}, None, (0, 1)),
        ({}, "1/4", (1, 4)),
        ({"TASK_ID": "7", "TASK_MIN": "5", "TASK_MAX": "8", "TASK_COUNT": "4"}, None, (2, 4)),
    ],
)
def test_shares_of_a_slurm_array(monkeypatch: pytest.MonkeyPatch, variables: dict, given: str, share: tuple) -> None:
    for name in ("TASK_ID", "TASK_MIN", "TASK_MAX", "TASK_COUNT"):
        monkeypatch.delenv(f"SLURM_ARRAY_{name}", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_ARRAY_{name}", value)
    assert array_task(given) == share


def test_a_share_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MobiusError, match="--task 4/4"):
        array_task("4/4")
    for name, value in {"TASK_ID": "4", "TASK_MIN": "0", "TASK_MAX": "8", "TASK_COUNT": "3"}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_{name}", value)
    with pytest.raises(MobiusError, match="--array=0-2"):
        array_task(None)


@pytest.mark.parametrize(
    "path", sorted((TOOL.parents[1] / "configs" / "data").glob("*.yaml")), ids=lambda path: path.stem
)
def test_the_recipes_of_the_repository_are_valid(path: Path) -> None:
    assert load_as(PrepareConfig, path).stages[0].name == "decode"
