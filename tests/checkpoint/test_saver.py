"""Saving beside the training: what is in place when, what stays, and what a full disk costs."""

from __future__ import annotations

import logging
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from made_checkpoints import IDENTITY, Numbers, make
from safetensors.torch import load_file

from mobius_train.checkpoint.read import open_checkpoint
from mobius_train.checkpoint.resume import find, resume
from mobius_train.checkpoint.saver import Retention, Saver
from mobius_train.checkpoint.shard import PinnedCopy
from mobius_train.checkpoint.verify import problems
from mobius_train.job.distributed import Distributed


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_training_goes_on_while_it_is_written_and_what_is_written_is_the_state_at_the_save(
    tmp_path: Path, alone: Distributed, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, gate, write = Numbers(3), threading.Event(), PinnedCopy.write
    monkeypatch.setattr(PinnedCopy, "write", lambda *arguments: gate.wait(10) and write(*arguments))
    with Saver(tmp_path, engine, IDENTITY, Retention(), alone) as saver:
        saver.save({"step": 3})
        for tensor in engine.state.values():
            tensor.zero_()
        saver.poll()
        assert "checkpoint-3" not in _names(tmp_path)
        gate.set()
    assert _names(tmp_path) == ["checkpoint-3", "latest"]
    assert (tmp_path / "latest").read_text() == "checkpoint-3\n"
    fresh = Numbers()
    saved = find(tmp_path, "latest", alone)
    assert saved is not None
    assert resume(saved, fresh, IDENTITY, alone) == {"step": 3}
    assert fresh.step == 3
    assert all(torch.equal(fresh.state[name], tensor) for name, tensor in Numbers(3).state.items())


def test_polling_alone_puts_it_in_place(tmp_path: Path, alone: Distributed) -> None:
    with Saver(tmp_path, Numbers(1), IDENTITY, Retention(), alone) as saver:
        saver.save({"step": 1})
        for _ in range(2000):
            saver.poll()
            threading.Event().wait(0.002)
            if (tmp_path / "latest").exists():
                break
        assert problems(tmp_path / "checkpoint-1") == []


def test_the_file_of_a_rank_is_what_safetensors_writes_and_reads(tmp_path: Path, alone: Distributed) -> None:
    with Saver(tmp_path, Numbers(2), IDENTITY, Retention(), alone) as saver:
        saver.save({"step": 2})
    tensors = load_file(tmp_path / "checkpoint-2" / "rank-00000-of-00001.safetensors")
    assert all(torch.equal(tensors[name], tensor) for name, tensor in Numbers(2).state.items())


def test_whole_weights_are_read_one_at_a_time_from_any_number_of_ranks(tmp_path: Path) -> None:
    for ranks in (1, 2, 3, 9):
        checkpoint = open_checkpoint(make(tmp_path / str(ranks), 4, ranks))
        for averaged, kind in ((False, "weights"), (True, "average")):
            wholes = dict(checkpoint.weights(averaged))
            assert {name: list(tensor.shape) for name, tensor in wholes.items()} == {"ring.a": [5, 3], "ring.b": [7]}
            for name, tensor in wholes.items():
                assert torch.equal(tensor.flatten(), Numbers(4).state[f"{kind}/{name}"])


def test_the_newest_stay_and_those_to_keep_for_ever(tmp_path: Path, alone: Distributed) -> None:
    with Saver(tmp_path, Numbers(), IDENTITY, Retention(total_limit=2, keep_every=4), alone) as saver:
        for step in range(1, 12):
            saver.save({"step": step})
    assert _names(tmp_path) == ["checkpoint-10", "checkpoint-11", "checkpoint-4", "checkpoint-8", "latest"]


def test_a_save_in_place_of_an_older_one_of_the_same_step(tmp_path: Path, alone: Distributed) -> None:
    for engine in (Numbers(1), Numbers(2)):
        with Saver(tmp_path, engine, IDENTITY, Retention(), alone) as saver:
            saver.save({"step": 5})
    assert (
        dict(open_checkpoint(tmp_path / "checkpoint-5").weights())["ring.b"][0] == Numbers(2).state["weights/ring.b"][0]
    )
    assert _names(tmp_path) == ["checkpoint-5", "latest"]


def test_what_a_kill_left_unfinished_is_removed_at_the_next_start(tmp_path: Path, alone: Distributed) -> None:
    (tmp_path / ".checkpoint-7.tmp").mkdir()
    with Saver(tmp_path, Numbers(), IDENTITY, Retention(), alone):
        assert _names(tmp_path) == []


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing more than so many bytes to a file fails, as on a full disk, in the middle of it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


# Of the 21 kB of random states nothing fits, of the manifest and pointer neither.
@pytest.mark.parametrize("size", [0, 100, 5_000])
def test_a_full_disk_costs_the_save_and_nothing_else(
    size: int, tmp_path: Path, alone: Distributed, caplog: pytest.LogCaptureFixture
) -> None:
    with Saver(tmp_path, Numbers(), IDENTITY, Retention(total_limit=1), alone) as saver:
        saver.save({"step": 1})
        saver.wait()
        with largest_file(size), caplog.at_level(logging.ERROR):
            saver.save({"step": 2})
            saver.wait()
        assert "checkpoint-2 was not saved" in caplog.text
        assert "rank 0" in caplog.text
        assert _names(tmp_path) == ["checkpoint-1", "latest"]
        assert problems(tmp_path / "checkpoint-1") == []
        saver.save({"step": 3})
    assert _names(tmp_path) == ["checkpoint-3", "latest"]


@pytest.mark.parametrize("failing", ["write_file", "folders.publish"])
def test_a_manifest_that_cannot_be_written_publishes_nothing(
    failing: str, tmp_path: Path, alone: Distributed, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with Saver(tmp_path, Numbers(), IDENTITY, Retention(total_limit=1), alone) as saver:
        saver.save({"step": 1})
        saver.wait()
        with monkeypatch.context() as patch:

            def full(*arguments: object) -> None:
                raise OSError(28, "No space left on device")

            patch.setattr(f"mobius_train.checkpoint.saver.{failing}", full)
            saver.save({"step": 2})
            saver.wait()
        assert "No space left on device" in caplog.text
        assert _names(tmp_path) == ["checkpoint-1", "latest"]
        assert find(tmp_path, "latest", alone) == tmp_path / "checkpoint-1"


def test_after_an_error_of_the_training_a_save_on_its_way_is_finished(tmp_path: Path, alone: Distributed) -> None:
    def train() -> None:
        with Saver(tmp_path, Numbers(), IDENTITY, Retention(), alone) as saver:
            saver.save({"step": 6})
            raise RuntimeError("of training")

    with pytest.raises(RuntimeError, match="of training"):
        train()
    assert problems(tmp_path / "checkpoint-6") == []


def test_checkpoints_beyond_the_one_that_was_resumed_from_go_first(tmp_path: Path, alone: Distributed) -> None:
    for step in (4, 6, 8):
        make(tmp_path, step)
    (tmp_path / "checkpoint-8" / "state.json").write_text("")
    with Saver(tmp_path, Numbers(), IDENTITY, Retention(total_limit=2), alone) as saver:
        saver.save({"step": 7})
    assert _names(tmp_path) == ["checkpoint-6", "checkpoint-7", "latest"]
