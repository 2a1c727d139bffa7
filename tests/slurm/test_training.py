"""The scripts of slurm/, submitted unchanged: whatever happens to a training, its losses are an undisturbed one's.

Most of a job's time goes by in waiting for Slurm, so jobs run side by side: `beside` starts those that do not train,
each with a thread that does to it what is to be done. In them, lines of bash stand in for a training.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster, wait_until
from launching import REPOSITORY, launch
from paused_training import LAST_START, PAUSE_AFTER
from recipes import metrics, recipe, write

from mobius_train.data.shards import verify_shards

pytestmark = pytest.mark.slurm

SCRIPT = "slurm/train_parallel.sh"
# Each start takes two steps and then waits; a stop takes one more.
STEPS = 10
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
# Nodes of other jobs than the training, so that nothing that happens to n1, n2 and n4 reaches these jobs.
CALM = ("--partition=calm", "--nodelist=n3")


def _python(folder: Path, training: str) -> str:
    """For PYTHON: a program that runs these lines in place of the training, and tools as they are."""
    path = folder / "python"
    path.write_text(f'#!/bin/bash\nif [[ $1 == tools/* ]]; then exec {sys.executable} "$@"; fi\n{training}\n')
    path.chmod(0o755)
    return str(path)


class Job:
    """A training, or what stands in for it, in a folder, and what its log says."""

    def __init__(
        self, cluster: Cluster, folder: Path, options: tuple[str, ...], training: str, *arguments: str
    ) -> None:
        self.cluster, self.output, self._log = cluster, folder / "out", folder / "log"
        given = (f"--output={self._log}", SCRIPT, *arguments, f"output_dir={self.output}")
        self.number = cluster.submit(*options, *given, PYTHON=_python(folder, training), HF_HUB_OFFLINE="1")

    def log(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def losses(self) -> list[str]:
        """Of the steps that are done, to the last bit."""
        return _losses(self.output) if (self.output / "metrics.jsonl").exists() else []

    def train_until(self, step: int, start: int) -> None:
        told = f"start {start},"
        wait_until(lambda: told in self.log() and len(self.losses()) >= step, 240, lambda: self.log()[-4000:])

    def wait_for_requeue(self, restarts: int, seconds: float) -> None:
        # A signal for the tasks of the last start that Slurm could not deliver in time may hit the next one.
        def requeued() -> bool:
            return int(self.cluster.job(self.number)["Restarts"]) >= restarts

        wait_until(requeued, seconds, lambda: self.log()[-4000:])

    def wait_for_end(self, state: str = "COMPLETED") -> dict[str, str]:
        job = self.cluster.wait_for(self.number, *ENDED, seconds=300)
        assert job["JobState"] == state, self.log()[-4000:]
        return job


def _losses(output: Path) -> list[str]:
    return [line["loss"].hex() for line in metrics(output) if "loss" in line]


def test_one_task_starts_for_each_gpu_with_its_share_of_the_cpus(cluster: Cluster, tmp_path: Path) -> None:
    asked = ("--partition=calm", "--nodes=2", "--gpus-per-node=2", "--cpus-per-gpu=2")
    told = 'echo "$SLURM_PROCID/$SLURM_NTASKS on $SLURMD_NODENAME $SLURM_CPUS_PER_TASK $MASTER_ADDR"'
    job = Job(cluster, tmp_path, asked, told)
    job.wait_for_end()
    lines = sorted(line for line in job.log().splitlines() if "/4 on" in line)
    assert lines == [f"{rank}/4 on {'n3' if rank < 2 else 'n4'} 2 n3" for rank in range(4)], job.log()


def test_interrupted_in_every_way_a_training_ends_as_if_it_had_not_been(
    cluster: Cluster, beside: object, tiny_pipeline: Path, clips_folder: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"max_train_steps": STEPS, "train_batch_size": 1, "lr_scheduler": "cosine"}
    # Both nodes share each clip.
    changes |= {"sequence_parallel_size": 2, "sequence_across_nodes": True}
    values = recipe(tiny_pipeline, clips_folder, tmp_path / "undisturbed", **changes, validation={"prompts": []})
    path = str(write(tmp_path / "recipe.yaml", values))
    training = f'shift; exec {sys.executable} {Path(__file__).with_name("paused_training.py")} "$@"'
    job = Job(cluster, tmp_path, ("--nodes=2",), training, "--config", path)

    job.train_until(PAUSE_AFTER, start=1)
    assert "nodes      2: n1 n2" in job.log()
    assert "preflight: 2 rank(s) on 2 node(s) agree" in job.log()
    _preempted(job)
    job.train_until(3 + PAUSE_AFTER, start=2)
    _out_of_time(job)
    job.train_until(6 + PAUSE_AFTER, start=3)
    killed = time.monotonic()
    cluster.kill_node("n2")
    # While the other node waits for a sign of life: the same training without Slurm.
    alone = launch(2, REPOSITORY / "mobius_train" / "main.py", "--config", path, HF_HUB_OFFLINE="1")
    assert alone.returncode == 0, alone.stderr[-3000:]
    _requeued_without(job, "rank 1 on n2", killed)
    cluster.start_nodes("n2")
    job.wait_for_end()

    # The steps after the last checkpoint went down with the node, and were taken again.
    assert re.findall(r"resumed from \S+-(\d+)", job.log()) == ["3", "6", "6"]
    assert f"start {LAST_START}," in job.log()
    assert (job.output / "final").is_dir()
    expected = _losses(tmp_path / "undisturbed")
    assert len(set(expected)) == STEPS
    assert job.losses() == expected


def _preempted(job: Job) -> None:
    """By a job of a partition that goes before; the run saves the step that it is at, and Slurm requeues it."""
    other = job.cluster.submit("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    job.wait_for_requeue(1, seconds=90)
    job.cluster.wait_for(other, "COMPLETED")
    assert "stopped at step 3" in job.log()
    _stopped_and_saved(job, 3)


def _out_of_time(job: Job) -> None:
    """What --signal=B:USR1@180 has Slurm send 180 s before the end; the script requeues itself."""
    job.cluster.run("scancel", "--batch", "--signal=USR1", job.number)
    job.wait_for_requeue(2, seconds=90)
    assert "exit code 75: the job is requeued" in job.log()
    _stopped_and_saved(job, 6)


def _stopped_and_saved(job: Job, step: int) -> None:
    assert int((job.output / "stopped").read_text()) == step
    assert (job.output / f"checkpoint-{step}" / "manifest.json").exists()
    assert not (job.output / "stop").exists()


def _requeued_without(job: Job, lost: str, since: float) -> None:
    """The other rank names the lost one and ends, and the job is requeued, within a minute."""
    wait_until(lambda: f"from {lost}" in job.log(), 60 - (time.monotonic() - since), lambda: job.log()[-4000:])
    job.wait_for_requeue(3, seconds=60 - (time.monotonic() - since))


def a_killed_rank_and_a_killed_slurmd_requeue_the_job(cluster: Cluster, folder: Path, clips: Path) -> None:
    output = folder / "out"
    # The first start is killed; the second marks a stop at Slurm's warning, as a training does; the third ends well.
    job = Job(
        cluster,
        folder,
        ("--partition=calm", "--nodes=2"),
        f"""mkdir -p {output}; touch {output}/config.yaml
if [[ $SLURM_RESTART_COUNT == 2 ]]; then exit 0; fi
if [[ $SLURM_RESTART_COUNT != 1 ]]; then exec sleep 600; fi
trap 'warned=yes' TERM
until [[ $warned || -e {output}/stopped ]]; do sleep 0.1; done
touch {output}/stopped
exit 75""",
    )

    wait_until(lambda: len(cluster.tasks("n4", "sleep")) == 1, 60, job.log)
    os.kill(cluster.tasks("n4", "sleep")[0], signal.SIGKILL)
    job.wait_for_requeue(1, seconds=60)
    assert "n4: task 1: Killed" in job.log()
    assert (output / "failures.jsonl").exists()

    wait_until(lambda: "start 2," in job.log() and bool(cluster.tasks("n4", "python")), 90, job.log)
    cluster.kill_daemon("n4")
    # Ranks outlive their slurmd; when Slurm gives the node up, it warns those that it reaches.
    time.sleep(2)
    assert cluster.tasks("n4", "python")
    assert not (output / "stopped").exists()
    job.wait_for_requeue(2, seconds=60)
    assert "Node failure on n4" in job.log()
    wait_until((output / "stopped").exists, 30, job.log)
    cluster.start_nodes("n4")
    assert job.wait_for_end()["Restarts"] == "2"


def what_fails_at_the_same_step_twice_stops(cluster: Cluster, folder: Path, clips: Path) -> None:
    output = folder / "out"
    begun = f"mkdir -p {output}; touch {output}/config.yaml; echo '{{\"step\": 5}}' > {output}/metrics.jsonl"
    _fails(Job(cluster, folder, CALM, f"{begun}; exit 3"), "1", "failed after step 5 again")


def what_fails_before_it_has_begun_stops(cluster: Cluster, folder: Path, clips: Path) -> None:
    _fails(Job(cluster, folder, CALM, "exit 3"), "0", "did not start")


def _fails(job: Job, restarts: str, text: str) -> None:
    found = job.wait_for_end("FAILED")
    assert (found["Restarts"], found["ExitCode"]) == (restarts, "3:0"), job.log()
    assert text in job.log()


def slurm_asks_to_stop_before_the_time_limit_and_what_is_cancelled_stays_so(
    cluster: Cluster, folder: Path, clips: Path
) -> None:
    """With 3 minutes at most, 180 s before the end is at once; both starts stop as a training does."""
    stop = folder / "out" / "stop"
    lines = f"until [[ $warned ]] || rm {stop}; do sleep 0.1; done 2>/dev/null; touch {stop}ped; exit 75"
    job = Job(cluster, folder, (*CALM, "--time=3"), f"trap 'warned=yes' TERM; {lines}")
    job.wait_for_requeue(1, seconds=120)
    assert "exit code 75: the job is requeued" in job.log()
    wait_until(lambda: "start 2," in job.log(), 90, job.log)
    cluster.run("scancel", job.number)
    # What was cancelled is not requeued, although the script has requeued it before.
    assert job.wait_for_end("CANCELLED")["Restarts"] == "1"
    time.sleep(5)
    found = cluster.job(job.number)
    assert (found["JobState"], found["Restarts"]) == ("CANCELLED", "1")
    assert job.log().count("the job is requeued") == 1


def a_job_array_shares_the_latent_cache(cluster: Cluster, folder: Path, clips: Path) -> None:
    """The script gives each task its number and the arguments; tests/runs/test_cache_tool.py has what the tool does."""
    told = folder / "python"
    told.write_text('#!/bin/bash\necho "$SLURM_ARRAY_TASK_ID of $SLURM_ARRAY_TASK_COUNT: $*"\n')
    told.chmod(0o755)
    logs = _run_array(cluster, folder, "slurm/cache_latents.sh", str(told))
    expected = f"tools/cache_latents.py --config {folder / 'recipe.yaml'}"
    assert [text.strip() for text in logs] == [f"{task} of 2: {expected}" for task in range(2)]


def a_job_array_makes_shards_of_a_folder(cluster: Cluster, folder: Path, clips: Path) -> None:
    values = {
        "sources": [{"kind": "metadata", "path": str(clips / "metadata.jsonl")}],
        "stages": [{"name": "decode", "more_frames_than": 3}, {"name": "deduplicate", "perceptual": False}],
        "output_dir": str(folder / "shards"),
        "part_size": 3,
    }
    write(folder / "recipe.yaml", values)
    logs = _run_array(cluster, folder, "slurm/prepare_data.sh", sys.executable)
    assert all("10 inputs, 10 clips, 10 kept" in text for text in logs), logs
    assert verify_shards(folder / "shards") == 4


def _run_array(cluster: Cluster, folder: Path, script: str, python: str) -> list[str]:
    """What two tasks print."""
    options = (*CALM, "--array=0-1", f"--output={folder / '%a.log'}")
    number = cluster.submit(*options, script, "--config", str(folder / "recipe.yaml"), PYTHON=python)
    wait_until(lambda: not cluster.run("squeue", "--noheader", f"--job={number}"), 120, lambda: str(os.listdir(folder)))
    return [(folder / f"{task}.log").read_text() for task in range(2)]


Story = Callable[[Cluster, Path, Path], None]
STORIES: list[Story] = [
    a_killed_rank_and_a_killed_slurmd_requeue_the_job,
    what_fails_at_the_same_step_twice_stops,
    what_fails_before_it_has_begun_stops,
    slurm_asks_to_stop_before_the_time_limit_and_what_is_cancelled_stays_so,
    a_job_array_shares_the_latent_cache,
    a_job_array_makes_shards_of_a_folder,
]


@pytest.fixture(scope="module")
def beside(
    cluster: Cluster, clips_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Story, Future[None]]]:
    """All stories, begun."""
    with ThreadPoolExecutor(len(STORIES)) as pool:
        yield {story: pool.submit(story, cluster, tmp_path_factory.mktemp("job"), clips_folder) for story in STORIES}


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.__name__)
def test_beside_the_training(story: Story, beside: dict[Story, Future[None]]) -> None:
    beside[story].result()
