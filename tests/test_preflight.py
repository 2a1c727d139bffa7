"""The preflight names the node that differs; ranks that are alike pass in seconds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launching import REPOSITORY, clean_environment, free_port
from recipes import recipe, start, write

from mobius_train.preflight import Facts, differences

NODES = ["n1", "n1", "n2", "n3"]
SAME = Facts({"torch": "2.13.0", "commit": "abc"}, 1000.0, "")


def test_ranks_that_are_alike_have_no_differences() -> None:
    assert differences([SAME] * 4, NODES) == []


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (SAME._replace(alike={"torch": "2.11.0", "commit": "abc"}), "rank 2 on n2: torch is 2.11.0, elsewhere 2.13.0"),
        (SAME._replace(alike={"torch": "2.13.0", "commit": "abc-dirty"}), "rank 2 on n2: commit is abc-dirty"),
        (SAME._replace(clock=1090.0), "rank 2 on n2: its clock is +90 s from the others'"),
        (SAME._replace(complaint="there is no folder /data"), "rank 2 on n2: there is no folder /data"),
    ],
)
def test_the_odd_one_is_named(odd: Facts, message: str) -> None:
    (problem,) = differences([SAME, SAME, odd, SAME], NODES)
    assert problem.startswith(message)


@pytest.mark.distributed
def test_ranks_that_are_alike_pass_and_leave_nothing(tiny_pipeline: Path, clips_folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "recipe.yaml", recipe(tiny_pipeline, clips_folder, tmp_path / "out"))
    result = start(path, "--preflight", ranks=2, launcher="torchrun")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "preflight: 2 rank(s) on 1 node(s) agree" in result.stdout
    assert "all-reduce of 8 MiB right" in result.stdout
    assert os.listdir(tmp_path) == ["recipe.yaml"]


@pytest.mark.distributed
def test_a_node_without_the_data_and_without_the_shared_folder_is_named(
    tiny_pipeline: Path, clips_folder: Path, tmp_path: Path
) -> None:
    """Relative paths, and ranks that start in different folders: to them these are other disks."""
    values = recipe(tiny_pipeline, clips_folder, Path("runs", "out"), data={"train": "./clips"})
    path, port = write(tmp_path / "recipe.yaml", values), str(free_port())
    processes = []
    for rank, node in enumerate(("n1", "n2")):
        (tmp_path / node / "runs").mkdir(parents=True)
        if node == "n1":
            shutil.copytree(clips_folder, tmp_path / node / "clips")
        ranks = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
        variables = ranks | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "SLURMD_NODENAME": node}
        processes.append(
            subprocess.Popen(
                [sys.executable, str(REPOSITORY / "mobius_train" / "main.py"), "--config", str(path)],
                env=clean_environment(**variables),
                cwd=tmp_path / node,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    told = [process.communicate(timeout=180)[0] for process in processes]
    assert [process.returncode for process in processes] == [1, 1], told
    assert "rank 1 on n2: data.train: there is no file or folder ./clips; set data.train=PATH" in told[0]
    assert "rank 1 on n2: cannot write to rank 0's" in told[0]
    assert "rank 0 on n1" not in told[0]
    # Found before any model was loaded, and nothing is left.
    assert sorted(path.name for path in (tmp_path / "n1").rglob("*") if "preflight" in path.name) == []
