"""A rank that dies, hangs or fails ends the others soon, and is named by them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import clean_environment, free_port

WORKER = Path(__file__).parent / "heartbeat_worker.py"


def _start(how: str, who: int, ranks: int = 3) -> dict[int, subprocess.Popen[str]]:
    """Without a launcher, which would end the others by itself."""
    port = str(free_port())
    return {
        rank: subprocess.Popen(
            [sys.executable, str(WORKER), how, str(who)],
            env=clean_environment(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(ranks),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
                SLURMD_NODENAME=f"node{rank}",
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    }


@pytest.mark.distributed
@pytest.mark.parametrize(("how", "who"), [("die", 1), ("hang", 2), ("hang", 0), ("die", 0), ("fail", 1)])
def test_the_others_end_and_name_it(how: str, who: int) -> None:
    processes = _start(how, who)
    try:
        told = {rank: p.communicate(timeout=90)[0] for rank, p in processes.items() if rank != who}
        if how == "hang":
            processes[who].send_signal(signal.SIGCONT)
    finally:
        for process in processes.values():
            process.kill()
    for rank, text in told.items():
        assert processes[rank].returncode == 1, text
        assert f"rank {who} on node{who}" in text, text
        if how == "fail":
            assert "ValueError: no such luck" in text


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("how", "who", "ranks", "text"),
    [
        ("sleep", 1, 2, "no progress for 4 s (time_limits.batch) in step 7, loading a batch"),
        ("sleep", 0, 2, "no progress for 4 s (time_limits.batch) in step 7, loading a batch"),
        ("sleep", 0, 1, "no progress for 4 s (time_limits.batch) in step 7, loading a batch"),
        ("sleep beside", 1, 2, "no progress for 4 s (time_limits.save) in writing checkpoint-3"),
    ],
)
def test_a_rank_that_lives_but_makes_no_progress_ends_all_with_their_stacks(
    how: str, who: int, ranks: int, text: str
) -> None:
    started = time.monotonic()
    processes = _start(how, who, ranks)
    try:
        told = {rank: process.communicate(timeout=90)[0] for rank, process in processes.items()}
    finally:
        for process in processes.values():
            process.kill()
    assert time.monotonic() - started < 60
    for rank, output in told.items():
        assert processes[rank].returncode == 1, output
        assert f"rank {who} on node{who} stalled: {text}" in output, output
        # The stacks, with the lines where the ranks are.
        assert ("in asleep" if rank == who else "in barrier") in output, output
        assert rank == who or f"rank {rank} on node{rank}: step 7, in a collective" in output, output


@pytest.mark.distributed
@pytest.mark.parametrize("who", [0, 1])
def test_a_stop_before_the_first_step_on_one_rank_ends_all_with_the_code_of_a_stop(who: int) -> None:
    processes = _start("stop", who, ranks=2)
    try:
        told = {rank: process.communicate(timeout=90)[0] for rank, process in processes.items()}
    finally:
        for process in processes.values():
            process.kill()
    assert {process.returncode for process in processes.values()} == {os.EX_TEMPFAIL}, told
    assert f"rank {who} on node{who} was asked to stop" in told[1 - who]


@pytest.mark.distributed
def test_a_rank_that_does_not_come_is_named() -> None:
    processes = _start("absent", 0, ranks=2)
    processes[1].kill()
    try:
        text, _ = processes[0].communicate(timeout=90)
    finally:
        processes[0].kill()
    assert processes[0].returncode == 1
    assert "error: 1 of 2 ranks did not join within 3 s: rank 1" in text


@pytest.mark.distributed
def test_the_control_ranks_that_leave_at_different_times_end_well() -> None:
    for who in (0, 1):
        started = time.monotonic()
        processes = _start("leave late", who, ranks=2)
        for rank, process in processes.items():
            text, _ = process.communicate(timeout=90)
            assert process.returncode == 0, text
            assert f"rank {rank} is done" in text
        assert time.monotonic() - started > 6
