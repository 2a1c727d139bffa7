"""What each tracker records of a run, read from what its real client has written to disk; and trackers that fail."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import metrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb_log import configuration, history

from mobius_train.errors import MobiusError, Stopped
from mobius_train.media.clip_files import write_clips
from mobius_train.metrics.trackers import followers, open_trackers
from mobius_train.metrics.trackers.followers import Followers
from mobius_train.metrics.trackers.groups import grouped
from mobius_train.metrics.trackers.open_trackers import check_trackers, open_followers
from mobius_train.metrics.trackers.tracker import About, Outcome, Sample, Tracker
from mobius_train.run_files import TRACKER_RUNS

RECIPE = {"seed": 3, "data.num_frames": 4, "validation.prompts": ["a dog, running"], "negative_prompt": ""}
STEP = {"loss": 0.5, "memory_gb": 1.5, "memory_planned_gb": 2.0}
VALIDATION = {
    "heldout_loss": 0.25,
    "heldout_loss/0.9": 0.125,
    "weight_change/all": 0.1,
    "motion_correlation/samples": 0.7,
}
NAMES = {
    "train/loss": 0.5,
    "memory/memory_gb": 1.5,
    "memory/memory_planned_gb": 2.0,
    "heldout/loss": 0.25,
    "heldout_loss/0.9": 0.125,
    "weight_change/all": 0.1,
    "motion/motion_correlation/samples": 0.7,
}
needs_wandb = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
needs_mlflow = pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow is not installed")


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    for name in ("WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)


def about(folder: Path, first_step: int = 0) -> About:
    return About(folder / "my-run", RECIPE, "seed: 3\n", "model  a ring", first_step)


def record(name: str, folder: Path, first_step: int = 0) -> Path:
    """Let a tracker follow a step and a validation; returns the GIF that it was shown."""
    (folder / "my-run").mkdir(exist_ok=True)
    clip = torch.stack([torch.full((3, 8, 8), 20 * number, dtype=torch.uint8) for number in range(4)])
    paths = write_clips([clip], ["a dog, running"], folder / "samples", formats=("gif", "mp4"))
    with open_followers([name], about(folder, first_step)) as opened:
        opened.scalars(first_step + 1, STEP)
        opened.scalars(first_step + 1, VALIDATION)
        opened.samples(first_step + 1, paths)
    return folder / "samples" / "00-a-dog-running.gif"


def test_names_are_grouped() -> None:
    assert grouped(STEP | VALIDATION) == NAMES


def test_tensorboard_has_scalars_clips_and_recipe(tmp_path: Path) -> None:
    gif = record("tensorboard", tmp_path)
    read = EventAccumulator(str(tmp_path / "my-run" / "logs"), {"images": 0, "scalars": 0, "tensors": 0}).Reload()
    for name, value in NAMES.items():
        assert [(event.step, event.value) for event in read.Scalars(name)] == [(1, pytest.approx(value))]
    assert read.Tags()["images"] == ["samples/00-a-dog-running"]
    [image] = read.Images("samples/00-a-dog-running")
    # An animation, as it is on disk.
    assert (image.step, image.encoded_image_string) == (1, gif.read_bytes())
    [text] = read.Tensors("recipe/text_summary")
    assert text.tensor_proto.string_val == [b"    seed: 3"]
    assert not (tmp_path / "my-run" / TRACKER_RUNS).exists()


@needs_wandb
@pytest.mark.distributed
def test_wandb_has_scalars_clips_and_recipe_and_goes_on_in_its_run(tmp_path: Path) -> None:
    gif = record("wandb", tmp_path)
    [first] = (tmp_path / "my-run" / "logs" / "wandb").glob("offline-run-*")
    rows = history(first)
    values = {name: value for row in rows for name, value in row.items() if not name.startswith("_")}
    clip = values.pop("samples/00-a-dog-running")
    assert values == {"step": 1, **NAMES}
    assert clip["_type"] == "video-file"
    assert clip["caption"] == "a dog, running"
    assert (first / "files" / clip["path"]).read_bytes() == gif.read_bytes()
    found = configuration(first)
    assert {name: found[name] for name in RECIPE} == RECIPE

    identity = json.loads((tmp_path / "my-run" / TRACKER_RUNS).read_text())["wandb"]
    assert first.name.endswith(f"-{identity}")
    record("wandb", tmp_path, first_step=5)
    assert json.loads((tmp_path / "my-run" / TRACKER_RUNS).read_text()) == {"wandb": identity}
    others = set((tmp_path / "my-run" / "logs" / "wandb").glob("offline-run-*"))
    assert all(folder.name.endswith(f"-{identity}") for folder in others)
    # The control: another new run has another identity.
    record("wandb", tmp_path)
    assert json.loads((tmp_path / "my-run" / TRACKER_RUNS).read_text())["wandb"] != identity


@needs_mlflow
@pytest.mark.slow
def test_mlflow_has_scalars_clips_and_recipe_and_goes_on_in_its_run(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    gif = record("mlflow", tmp_path)
    logs = tmp_path / "my-run" / "logs"
    client = MlflowClient(f"sqlite:///{logs / 'mlflow.db'}")
    identity = json.loads((tmp_path / "my-run" / TRACKER_RUNS).read_text())["mlflow"]
    found = client.get_run(identity)
    assert found.data.metrics == pytest.approx(NAMES)
    assert found.data.params == {name: json.dumps(value) for name, value in RECIPE.items()}
    assert (found.info.run_name, found.info.status) == ("my-run", "FINISHED")
    [copied] = logs.glob("mlflow/**/samples/step-1/*.gif")
    assert copied.read_bytes() == gif.read_bytes()
    [text] = logs.glob("mlflow/**/config.yaml")
    assert text.read_text() == "seed: 3\n"

    record("mlflow", tmp_path, first_step=5)
    assert json.loads((tmp_path / "my-run" / TRACKER_RUNS).read_text()) == {"mlflow": identity}
    assert [point.step for point in client.get_metric_history(identity, "train/loss")] == [1, 6]
    # The control: another new run is another one there, and so is that of a server without the run.
    record("mlflow", tmp_path)
    other = json.loads((tmp_path / "my-run" / TRACKER_RUNS).read_text())["mlflow"]
    assert other != identity
    (tmp_path / "my-run" / TRACKER_RUNS).write_text(json.dumps({"mlflow": "0" * 32}))
    record("mlflow", tmp_path, first_step=5)
    assert len(client.search_runs([found.info.experiment_id])) == 3


class Broken:
    """A tracker that fails at a step."""

    identity = ""

    def __init__(self, step: int = 2, error: BaseException | None = None) -> None:
        self.steps: list[int] = []
        self.closed: list[Outcome] = []
        self._step, self._error = step, error or ConnectionError("no route to the server")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if step == self._step:
            raise self._error
        self.steps.append(step)

    def samples(self, step: int, samples: list[Sample]) -> None:
        pass

    def close(self, outcome: Outcome) -> None:
        self.closed.append(outcome)


@pytest.mark.parametrize("error", [None, SystemExit(1), OSError(28, "No space left on device")])
def test_a_tracker_that_fails_is_given_up_once_and_the_others_go_on(
    error: BaseException | None, caplog: pytest.LogCaptureFixture
) -> None:
    broken, sound = Broken(2, error), Broken(step=-1)
    with Followers({"wandb": broken, "mlflow": sound}) as opened:
        for step in range(1, 5):
            opened.scalars(step, {"loss": math.nan})
    assert broken.steps == [1]
    assert (sound.steps, sound.closed) == ([1, 2, 3, 4], ["finished"])
    [line] = caplog.records
    assert line.levelno == logging.ERROR
    assert line.getMessage().startswith(f"report_to=wandb: {type(broken._error).__name__}: ")


def test_a_tracker_is_told_how_the_run_ended() -> None:
    for error, outcome in ((Stopped(), "stopped"), (MobiusError("no"), "failed")):
        tracker = Broken(step=-1)
        with pytest.raises(type(error)), Followers({"wandb": tracker}):
            raise error
        assert tracker.closed == [outcome]


def test_no_run_waits_for_a_tracker_that_hangs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answer = threading.Event()

    class Hangs(Broken):
        def scalars(self, step: int, values: Mapping[str, float]) -> None:
            answer.wait(30)

    monkeypatch.setattr(followers, "END", 0.05)
    with Followers({"mlflow": Hangs()}) as opened:
        for step in range(1, 4):
            opened.scalars(step, {"loss": 1.0})
    answer.set()
    [line] = caplog.messages
    assert "did not take the last" in line
    caplog.clear()
    answer.clear()
    monkeypatch.setattr(followers, "WAITING", 2)
    with Followers({"mlflow": Hangs()}) as opened:
        for step in range(1, 9):
            opened.scalars(step, {"loss": 1.0})
    answer.set()
    [line] = caplog.messages
    assert "2 records behind" in line


def test_a_client_that_is_missing_or_does_not_open_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    check_trackers(["tensorboard"])
    monkeypatch.setattr(open_trackers, "find_spec", lambda name: None)
    with pytest.raises(MobiusError, match=r"report_to=mlflow.*mobius-train\[mlflow\]"):
        check_trackers(["mlflow"])

    def refuses(_: About, __: str | None) -> Tracker:
        raise PermissionError("not logged in")

    monkeypatch.setitem(open_trackers.TRACKERS, "wandb", refuses)
    with pytest.raises(MobiusError, match="report_to=wandb: it cannot be opened: PermissionError: not logged in"):
        open_followers(["wandb"], about(tmp_path))
    # A run that is resumed is not lost for it.
    with open_followers(["wandb"], about(tmp_path, first_step=3)) as opened:
        opened.scalars(4, STEP)
    [line] = caplog.messages
    assert "not logged in" in line


@pytest.mark.slow
def test_a_run_shows_its_trackers_what_metrics_jsonl_has(run: Any) -> None:
    folder = run(max_train_steps=2, report_to="tensorboard")
    read = EventAccumulator(str(folder / "logs"), {"images": 0, "scalars": 0, "tensors": 0}).Reload()
    lines = [grouped({name: value for name, value in line.items() if name != "step"}) for line in metrics(folder)]
    assert set(read.Tags()["scalars"]) == {name for line in lines for name in line}
    assert {"heldout/loss", "heldout_loss/0.5", "weight_change/all", "motion/motion_correlation/samples"} <= set(
        read.Tags()["scalars"]
    )
    assert [event.value for event in read.Scalars("train/loss")] == pytest.approx(
        [line["train/loss"] for line in lines if "train/loss" in line]
    )
    assert {"samples/comparison", "samples/00-dog-number-3"} <= set(read.Tags()["images"])
    [text] = read.Tensors("recipe/text_summary")
    assert b"max_train_steps: 2" in text.tensor_proto.string_val[0]
