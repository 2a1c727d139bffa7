"""A rank that dies, hangs or fails ends the others soon, and is named by them."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import clean_environment, free_port
from preloaded import Process, start_script

WORKER = Path(__file__).parent / "heartbeat_worker.py"

pytestmark = pytest.mark.distributed


class Job:
    """A job whose rank `who` does something; without a launcher, which would end the others by itself."""

    def __init__(self, folder: Path, how: str, who: int, ranks: int) -> None:
        self.name, self.how, self.who = f"{how}, {who} of {ranks}", how, who
        port = str(free_port())
        self.outputs = [folder / f"{self.name}-{rank}.txt" for rank in range(ranks)]
        self.processes: list[Process] = [
            start_script(
                [str(WORKER), how, str(who)],
                clean_environment(
                    RANK=str(rank),
                    LOCAL_RANK=str(rank),
                    WORLD_SIZE=str(ranks),
                    MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=port,
                    SLURMD_NODENAME=f"node{rank}",
                ),
                output,
            )
            for rank, output in enumerate(self.outputs)
        ]

    def end(self, rank: int) -> tuple[int, str]:
        """The exit status of a rank, and what it printed."""
        self.processes[rank].join(90)
        code, text = self.processes[rank].exitcode, self.outputs[rank].read_text()
        assert code is not None, f"rank {rank} of {self.name} lives: {text}"
        return code, f"rank {rank} of {self.name}: {text}"

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[list[Job]]:
    """Jobs that run side by side; what still lives is killed at the end."""
    started: list[Job] = []
    yield started
    for job in started:
        job.kill()


def test_the_others_end_and_name_it(jobs: list[Job], tmp_path: Path) -> None:
    for how, who in (("die", 1), ("hang", 2), ("hang", 0), ("die", 0), ("fail", 1)):
        jobs.append(Job(tmp_path, how, who, ranks=3))
    for job in jobs:
        for rank in {0, 1, 2} - {job.who}:
            code, text = job.end(rank)
            assert code == 1, text
            assert f"rank {job.who} on node{job.who}" in text
            assert job.how != "fail" or "ValueError: no such luck" in text, text


BATCH = "no progress for 4 s (time_limits.batch) in step 7, loading a batch"
SAVE = "no progress for 4 s (time_limits.save) in writing checkpoint-3"
STEP = "waits there, with no progress for 8 s (time_limits.step) in step 7, in a collective"


def test_a_rank_that_lives_but_makes_no_progress_ends_all_with_their_stacks(jobs: list[Job], tmp_path: Path) -> None:
    started = time.monotonic()
    cases = (("sleep", 1, 2, BATCH), ("sleep", 0, 2, BATCH), ("sleep", 0, 1, BATCH), ("sleep beside", 1, 2, SAVE))
    jobs += [Job(tmp_path, how, who, ranks) for how, who, ranks, _ in cases]
    for job, (_, who, ranks, said) in zip(jobs, cases, strict=True):
        for rank in range(ranks):
            code, text = job.end(rank)
            assert code == 1, text
            assert f"rank {who} on node{who} stalled: {said}" in text
            # The stacks, with the lines where the ranks are.
            assert ("in asleep" if rank == who else "in barrier") in text
            assert rank == who or f"rank {rank} on node{rank}: step 7, in a collective" in text
    assert time.monotonic() - started < 60


def test_the_rank_that_others_wait_for_is_named_though_their_limit_ends_first(jobs: list[Job], tmp_path: Path) -> None:
    jobs += [Job(tmp_path, "sleep in the same phase", who, ranks=3) for who in (0, 2)]
    for job in jobs:
        for rank in range(3):
            code, text = job.end(rank)
            assert code == 1, text
            assert re.search(rf"error: (rank {rank} ends: )?rank {job.who} on node{job.who} stalled: rank \d on", text)
            assert STEP in text, text
            assert ("in asleep" if rank == job.who else "in barrier") in text


def test_a_stop_before_the_first_step_on_one_rank_ends_all_with_the_code_of_a_stop(
    jobs: list[Job], tmp_path: Path
) -> None:
    jobs += [Job(tmp_path, "stop", who, ranks=2) for who in (0, 1)]
    for job in jobs:
        ends = [job.end(rank) for rank in (0, 1)]
        assert [code for code, _ in ends] == [os.EX_TEMPFAIL] * 2, ends
        assert f"rank {job.who} on node{job.who} was asked to stop" in ends[1 - job.who][1]


def test_a_rank_that_does_not_come_is_named(jobs: list[Job], tmp_path: Path) -> None:
    jobs.append(Job(tmp_path, "absent", 0, ranks=2))
    jobs[0].processes[1].kill()
    code, text = jobs[0].end(0)
    assert code == 1
    assert "error: 1 of 2 ranks did not join within 3 s: rank 1" in text


def test_the_control_ranks_that_leave_at_different_times_end_well(jobs: list[Job], tmp_path: Path) -> None:
    started = time.monotonic()
    jobs += [Job(tmp_path, "leave late", who, ranks=2) for who in (0, 1)]
    for job in jobs:
        for rank in (0, 1):
            code, text = job.end(rank)
            assert code == 0, text
            assert f"rank {rank} is done" in text
    assert time.monotonic() - started > 6
