"""Which process of which job this is, by the variables of each launcher."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launching import clean_environment, python

from mobius_train.errors import MobiusError
from mobius_train.job import environment
from mobius_train.job.environment import SPINS, Launch, detect


@pytest.mark.parametrize(
    ("variables", "launch"),
    [
        ({}, Launch(0, 0, 1, 1)),
        ({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, Launch(3, 1, 4, 2)),
        ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_SIZE": "2"}, Launch(1, 1, 2, 2)),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, Launch(0, 0, 2, 2)),
        ({"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NTASKS": "2"}, Launch(1, 1, 2, 2)),
        # torchrun inside a Slurm job.
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "SLURM_PROCID": "5"}, Launch(0, 0, 1, 1)),
        # A batch script's shell with one task, without srun.
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, Launch(0, 0, 1, 1)),
    ],
)
def test_a_launcher_is_recognised(variables: dict[str, str], launch: Launch) -> None:
    assert detect(variables) == launch


def test_slurm_tasks_per_node_need_not_be_even() -> None:
    slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "7", "SLURM_STEP_TASKS_PER_NODE": "2(x3),1"}
    second = slurm | {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}
    assert detect(second) == Launch(3, 1, 7, 2)
    last = slurm | {"SLURM_PROCID": "6", "SLURM_LOCALID": "0", "SLURM_NODEID": "3"}
    assert detect(last) == Launch(6, 0, 7, 1)
    with pytest.raises(MobiusError, match="SLURM_NODEID=4"):
        detect(last | {"SLURM_NODEID": "4"})


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0"}, "LOCAL_RANK, WORLD_SIZE"),
        ({"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, r"RANK.*\b2 of 2\b"),
        ({"RANK": "0", "LOCAL_RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, "3 of 2"),
        ({"RANK": "zero", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "zero"),
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, "SLURM_NTASKS"),
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, r"\b4 .*srun"),
    ],
)
def test_a_contradiction_is_refused(variables: dict[str, str], message: str) -> None:
    with pytest.raises(MobiusError, match=message):
        detect(variables)


SHOW = """
import os
from mobius_train.job import environment
from mobius_train.errors import MobiusError
try:
    environment.prepare()
    print(*[os.environ[n] for n in ("RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")])
except MobiusError as error:
    print(error)
"""


Prepared = Callable[..., str]


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    """What SHOW prints in a process with these variables of a launcher."""
    (tmp_path / "show.py").write_text(SHOW)

    def run(**variables: Any) -> str:
        result = python(tmp_path / "show.py", **variables)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    return run


@pytest.mark.distributed
def test_a_single_process_meets_itself(prepared: Prepared) -> None:
    # Even where a cluster's profile names another master.
    rank, world_size, local_size, address, port = prepared(MASTER_ADDR="elsewhere", MASTER_PORT="1").split()
    assert (rank, world_size, local_size, address) == ("0", "1", "1", "127.0.0.1")
    assert int(port) > 1024


@pytest.mark.distributed
def test_a_single_rank_of_a_launcher_does_too(prepared: Prepared) -> None:
    launcher = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    assert prepared(**launcher).split()[-1] != "29500"


@pytest.mark.distributed
def test_srun_on_several_nodes_wants_to_know_the_first(prepared: Prepared) -> None:
    several = {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "1",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    }
    assert "scontrol show hostnames" in prepared(**several)
    assert prepared(**several, MASTER_ADDR="n1").split() == ["1", "2", "1", "n1", "20007"]


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, SPINS), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_how_long_threads_wait_actively_is_limited_unless_the_user_decides(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], spins: str | None
) -> None:
    monkeypatch.setattr(os, "environ", dict(given))
    environment.choose_accelerator()
    assert os.environ.get("GOMP_SPINCOUNT") == spins


@pytest.mark.distributed
def test_openmp_reads_the_limit() -> None:
    code = "from mobius_train.job import environment; environment.prepare()"
    values = clean_environment(OMP_DISPLAY_ENV="VERBOSE")
    values.pop("GOMP_SPINCOUNT", None)
    result = subprocess.run([sys.executable, "-c", code], env=values, capture_output=True, text=True, check=True)
    if "GOMP_SPINCOUNT" not in result.stderr:
        pytest.skip("this torch does not use GNU OpenMP")
    assert f"GOMP_SPINCOUNT = '{SPINS}'" in result.stderr
