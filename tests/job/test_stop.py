"""A stop that is asked for ends a run after a checkpoint, from which it goes on as if it had not been."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from leaving_worker import Numbers
from recipes import Run, losses

import mobius_train.run
from mobius_train.data.loader import training_batches
from mobius_train.errors import Interrupted, MobiusError, Stopped
from mobius_train.job.stop import SIGNALS, Stop
from mobius_train.trainer import Trainer


@pytest.mark.slow
def test_a_touched_file_stops_a_run_which_then_resumes_by_itself(run: Run, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "resume_from_checkpoint": "auto",
        "max_train_steps": 3,
        "validation": {"prompts": []},
        "data": {"validation": None},
    }
    whole = losses(run("whole", **options))
    output, step_of_trainer = tmp_path / "out", Trainer._step

    def asked(trainer: Trainer, batches: Any) -> dict[str, float]:
        (output / "stop").touch()
        return step_of_trainer(trainer, batches)

    for step in (1, 2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "_step", asked)
            with pytest.raises(Stopped):
                run(**options)
        assert (output / "stopped").read_text() == f"{step}\n"
        assert (output / "latest").read_text() == f"checkpoint-{step}\n"
        assert not (output / "stop").exists()
    run(**options)
    assert not (output / "stopped").exists()
    assert [loss.hex() for loss in losses(output)] == [loss.hex() for loss in whole]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "when"),
    [(how, "build_task") for how in ("file", "SIGUSR1", "SIGINT")]
    + [(how, "choose_engine") for how in ("file", "SIGTERM")],
)
def test_before_the_first_step_a_request_ends_the_run_at_once(
    how: str, when: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, started = tmp_path / "out", time.monotonic()
    # Jobs in the background of a script ignore it.
    handler = signal.getsignal(signal.SIGINT)

    def slow() -> None:
        if how == "file":
            output.mkdir(exist_ok=True)
            (output / "stop").touch()
        else:
            os.kill(os.getpid(), signal.Signals[how])
        if (how, when) != ("file", "choose_engine"):
            time.sleep(60)

    before = getattr(mobius_train.run, when)

    def slowed(*arguments: Any) -> Any:
        slow()
        return before(*arguments)

    monkeypatch.setattr(mobius_train.run, when, slowed)
    with pytest.raises(Interrupted):
        run(resume_from_checkpoint="auto", max_train_steps=1)
    assert time.monotonic() - started < 30
    if output.exists():
        assert [path.name for path in output.iterdir()] == ["stopped"]
        assert (output / "stopped").read_text() == "0\n"
    else:
        assert when == "choose_engine"  # before the folder is known
    assert signal.getsignal(signal.SIGINT) is handler
    if (how, when) == ("file", "build_task"):
        monkeypatch.setattr(mobius_train.run, when, before)
        assert len(losses(run(resume_from_checkpoint="auto", max_train_steps=1, validation={"prompts": []}))) == 1


@pytest.mark.slow
def test_auto_is_not_content_with_damaged_checkpoints_alone(run: Run, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "resume_from_checkpoint": "auto",
        "validation": {"prompts": []},
        "checkpointing_steps": 1,
        "max_train_steps": 1,
    }
    output = run(**options)
    (output / "checkpoint-1" / "state.json").write_text("{}")
    with pytest.raises(MobiusError, match=r"checkpoint-1/state\.json"):
        run(**options)


@pytest.mark.distributed
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_sets_a_flag_and_only_of_the_process_that_listens(number: signal.Signals) -> None:
    stop = Stop()
    with stop.listening(), pytest.raises(Interrupted):
        os.kill(os.getpid(), number)
    stop = Stop()
    with stop.listening():
        stop.defer()
        child = multiprocessing.get_context("fork").Process(target=_signal_itself, args=(number, stop))
        child.start()
        child.join()
        # It outlives the signal, too.
        assert child.exitcode == 0
        assert not stop.asked()
        os.kill(os.getpid(), number)
        assert stop.asked()
    assert signal.getsignal(number) == signal.SIG_DFL


def test_the_second_ctrl_c_ends_the_process() -> None:
    stop = Stop()
    with stop.listening():
        stop.defer()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def _signal_itself(number: signal.Signals, stop: Stop) -> None:
    os.kill(os.getpid(), number)
    os._exit(1 if stop.asked() else 0)


@pytest.mark.distributed
def test_a_data_worker_outlives_the_signals_of_a_step() -> None:
    batches = training_batches(
        Numbers(), list, batch_size=1, seed=0, rank=0, world_size=1, samples_seen=0, num_workers=1
    )
    first = next(batches)
    (worker,) = multiprocessing.active_children()
    for number in (*SIGNALS, signal.SIGINT):
        assert worker.pid is not None
        os.kill(worker.pid, number)
    # More than were fetched ahead.
    following = [next(batches) for _ in range(8)]
    assert first not in following
    assert worker.is_alive()
