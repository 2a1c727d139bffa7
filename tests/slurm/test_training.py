"""slurm/train_parallel.sh, submitted unchanged to two nodes: whatever happens to it, its losses are a quiet run's."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from cluster import Cluster, wait_until
from launching import REPOSITORY
from recipes import metrics, recipe, write

from mobius_train.data.shards import verify_shards

pytestmark = pytest.mark.slurm

SCRIPT = "slurm/train_parallel.sh"
# Tiny models take some of these in a second, and Slurm needs seconds to react.
STEPS = 60


@pytest.fixture(scope="module")
def small(tiny_pipeline: Path, clips_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of tiny models."""
    folder = tmp_path_factory.mktemp("recipe")
    changes = {"max_train_steps": STEPS, "train_batch_size": 1, "checkpointing_steps": 10, "lr_scheduler": "cosine"}
    values = recipe(tiny_pipeline, clips_folder, folder / "unused", **changes, validation={"prompts": []})
    return write(folder / "recipe.yaml", values)


class Job:
    """A training in a folder, and what its log says."""

    def __init__(self, cluster: Cluster, folder: Path, small: Path, *overrides: str) -> None:
        self.cluster, self.output, self._log = cluster, folder / "out", folder / "log"
        folder.mkdir()
        arguments = ["--config", str(small)]
        arguments += [*overrides, f"output_dir={self.output}"]
        self.number = cluster.submit(
            "--nodes=2", f"--output={self._log}", SCRIPT, *arguments, PYTHON=sys.executable, HF_HUB_OFFLINE="1"
        )

    def log(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def steps(self) -> int:
        return len(self.losses())

    def losses(self) -> list[str]:
        """Of the steps that are done, to the last bit."""
        if not (self.output / "metrics.jsonl").exists():
            return []
        return [line["loss"].hex() for line in metrics(self.output) if "loss" in line]

    def train_until(self, step: int, starts: int = 1) -> None:
        told = f"start {starts},"
        wait_until(lambda: told in self.log() and self.steps() >= step, 240, lambda: self.log()[-4000:])

    def wait_for_requeue(self, restarts: int, seconds: float) -> None:
        # A signal for the tasks of the last start that Slurm could not deliver in time may hit the next one.
        def requeued() -> bool:
            return int(self.cluster.job(self.number)["Restarts"]) >= restarts

        wait_until(requeued, seconds, lambda: self.log()[-4000:])

    def complete(self) -> list[str]:
        state = self.cluster.wait_for(self.number, "COMPLETED", "FAILED", "CANCELLED", seconds=300)["JobState"]
        assert state == "COMPLETED", self.log()[-4000:]
        losses = self.losses()
        assert len(losses) == STEPS
        assert (self.output / "final").is_dir()
        return losses


def test_interrupted_in_every_way_a_run_ends_as_if_it_had_not_been(
    cluster: Cluster, tmp_path: Path, small: Path
) -> None:
    quiet = Job(cluster, tmp_path / "quiet", small)
    expected = quiet.complete()
    assert "nodes      2: n1 n2" in quiet.log()
    assert "preflight: 2 rank(s) on 2 node(s) agree" in quiet.log()
    assert len(set(expected)) == STEPS

    job = Job(cluster, tmp_path / "interrupted", small)
    job.train_until(2)
    _preempted(job)
    job.train_until(job.steps() + 2, starts=2)
    _out_of_time(job)
    job.train_until(job.steps() + 2, starts=3)
    _rank_killed(job)
    assert job.complete() == expected


def _preempted(job: Job) -> None:
    """By a job of a partition that goes before; the run saves the step that it is at, and Slurm requeues it."""
    other = job.cluster.submit("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    job.wait_for_requeue(1, seconds=90)
    job.cluster.wait_for(other, "COMPLETED")
    assert "stopped at step" in job.log()
    _stopped_and_saved(job)


def _out_of_time(job: Job) -> None:
    """What --signal=B:USR1@180 has Slurm send 180 s before the end; the script requeues itself."""
    job.cluster.run("scancel", "--batch", "--signal=USR1", job.number)
    job.wait_for_requeue(2, seconds=90)
    assert "exit code 75: the job is requeued" in job.log()
    _stopped_and_saved(job)


def _stopped_and_saved(job: Job) -> None:
    step = int((job.output / "stopped").read_text())
    assert (job.output / f"checkpoint-{step}" / "manifest.json").exists()
    assert not (job.output / "stop").exists()


def _rank_killed(job: Job) -> None:
    (pid,) = [pid for pid in job.cluster.tasks("n2") if b"main.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(pid, signal.SIGKILL)
    job.wait_for_requeue(3, seconds=60)
    assert "rank 1 on n2" in job.log() or "n2: task 1: Killed" in job.log()
    assert (job.output / "failures.jsonl").exists()


def test_a_lost_node_is_named_within_a_minute_and_the_job_goes_on_when_it_is_back(
    cluster: Cluster, tmp_path: Path, small: Path
) -> None:
    job = Job(cluster, tmp_path / "job", small, "max_train_steps=100000")
    job.train_until(2)
    _slurmd_killed(job)
    job.train_until(job.steps() + 2, starts=2)
    _power_cut(job)
    job.train_until(job.steps() + 1, starts=3)
    job.cluster.run("scancel", job.number)
    # What was cancelled is not requeued, although the script has requeued it before.
    restarts = cluster.wait_for(job.number, "CANCELLED", seconds=90)["Restarts"]
    time.sleep(5)
    assert cluster.job(job.number)["Restarts"] == restarts
    assert cluster.job(job.number)["JobState"] == "CANCELLED"


def _slurmd_killed(job: Job) -> None:
    """Ranks outlive their slurmd; when Slurm gives the node up, the warning that it sends is enough to save."""
    job.cluster.kill_daemon("n2")
    job.wait_for_requeue(1, seconds=60)
    assert "Node failure on n2" in job.log()
    wait_until((job.output / "stopped").exists, 30, lambda: job.log()[-4000:])
    _stopped_and_saved(job)
    job.cluster.start_node("n2")


def _power_cut(job: Job) -> None:
    killed = time.monotonic()
    job.cluster.kill_node("n2")
    wait_until(lambda: "from rank 1 on n2" in job.log(), 60, lambda: job.log()[-4000:])
    job.wait_for_requeue(2, seconds=60 - (time.monotonic() - killed))
    job.cluster.start_node("n2")


@pytest.mark.parametrize("begun", [True, False])
def test_what_fails_at_the_same_step_twice_or_before_the_first_stops(
    cluster: Cluster, tmp_path: Path, begun: bool
) -> None:
    """A training that always fails at step 5 stands in for a real one."""
    output = tmp_path / "out"
    trainer = tmp_path / "python"
    training = f"mkdir -p {output}; touch {output}/config.yaml; echo '{{\"step\": 5}}' > {output}/metrics.jsonl"
    others = f'if [[ $1 == tools/* ]]; then exec {sys.executable} "$@"; fi'
    trainer.write_text(f"#!/bin/bash\n{others}\n{training if begun else ''}\nexit 3\n")
    trainer.chmod(0o755)
    number = cluster.submit(
        f"--output={tmp_path / 'log'}", SCRIPT, f"output_dir={output}", PYTHON=str(trainer), PYTHONPATH=str(REPOSITORY)
    )
    job = cluster.wait_for(number, "FAILED", "COMPLETED", seconds=240)
    log = (tmp_path / "log").read_text()
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "3:0"), log
    assert job["Restarts"] == ("1" if begun else "0"), log
    assert ("failed after step 5 again" if begun else "did not start") in log


def test_slurm_asks_to_stop_before_the_time_limit_by_itself(cluster: Cluster, tmp_path: Path) -> None:
    """With 3 minutes at most, 180 s before the end is at once; what waits to be asked stands in for a training."""
    output, trainer = tmp_path / "out", tmp_path / "python"
    stopping = f"until rm {output}/stop; do sleep 0.1; done; touch {output}/stopped; exit 75"
    trainer.write_text(f"#!/bin/bash\nif [[ $SLURM_RESTART_COUNT == 1 ]]; then exit 0; fi\n{stopping} 2>/dev/null\n")
    trainer.chmod(0o755)
    log = tmp_path / "log"
    number = cluster.submit("--time=3", f"--output={log}", SCRIPT, f"output_dir={output}", PYTHON=str(trainer))
    job = cluster.wait_for(number, "COMPLETED", "FAILED", "TIMEOUT", seconds=240)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), log.read_text()
    assert "exit code 75: the job is requeued" in log.read_text()


def test_one_task_starts_for_each_gpu_with_its_share_of_the_cpus(cluster: Cluster, tmp_path: Path) -> None:
    trainer = tmp_path / "python"
    trainer.write_text(
        '#!/bin/bash\necho "$SLURM_PROCID/$SLURM_NTASKS on $SLURMD_NODENAME $SLURM_CPUS_PER_TASK $MASTER_ADDR"\n'
    )
    trainer.chmod(0o755)
    number = cluster.submit(
        "--nodes=2",
        "--gpus-per-node=2",
        "--cpus-per-gpu=2",
        f"--output={tmp_path / 'log'}",
        SCRIPT,
        PYTHON=str(trainer),
    )
    cluster.wait_for(number, "COMPLETED")
    lines = (tmp_path / "log").read_text().splitlines()
    told = sorted(line for line in lines if "/4 on" in line)
    assert told == [f"{rank}/4 on {'n1' if rank < 2 else 'n2'} 2 n1" for rank in range(4)], lines


def test_a_job_array_fills_the_cache_part_by_part(
    cluster: Cluster, tmp_path: Path, tiny_pipeline: Path, clips_folder: Path
) -> None:
    cache = tmp_path / "cache"
    values = recipe(tiny_pipeline, clips_folder, tmp_path / "out", data={"cache_dir": str(cache)})
    path = write(tmp_path / "recipe.yaml", values)
    for part, text in enumerate(_run_array(cluster, "slurm/cache_latents.sh", path)):
        assert f"{cache}: share {part + 1} of 2" in text
    assert all((folder / "keys.json").exists() and list(folder.glob("part-*")) for folder in cache.iterdir())


def test_a_job_array_makes_shards_of_a_folder(cluster: Cluster, tmp_path: Path, clips_folder: Path) -> None:
    values = {
        "sources": [{"kind": "metadata", "path": str(clips_folder / "metadata.jsonl")}],
        "stages": [{"name": "decode", "more_frames_than": 3}, {"name": "deduplicate", "perceptual": False}],
        "output_dir": str(tmp_path / "shards"),
        "part_size": 3,
    }
    path = write(tmp_path / "recipe.yaml", values)
    logs = _run_array(cluster, "slurm/prepare_data.sh", path)
    assert all("10 inputs, 10 clips, 10 kept" in text for text in logs), logs
    assert verify_shards(tmp_path / "shards") == 4


def _run_array(cluster: Cluster, script: str, config: Path) -> list[str]:
    """What two tasks print."""
    folder = config.parent
    log = f"--output={folder / '%a.log'}"
    number = cluster.submit("--array=0-1", log, script, "--config", str(config), PYTHON=sys.executable)
    wait_until(lambda: not cluster.run("squeue", "--noheader", f"--job={number}"), 120, lambda: str(os.listdir(folder)))
    return [(folder / f"{task}.log").read_text() for task in range(2)]
