"""Starting a script on several gloo ranks, as a user's launcher does."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

from preloaded import run_scripts

REPOSITORY = Path(__file__).resolve().parents[2]
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


def clean_environment(**changes: str) -> dict[str, str]:
    """This process's environment without what a launcher or an earlier test has left in it."""
    kept = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES and not k.startswith("SLURM_")}
    folders = [str(REPOSITORY), str(REPOSITORY / "tests" / "helpers"), *filter(None, [kept.get("PYTHONPATH")])]
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(folders)} | changes


def free_port() -> int:
    """A port that nothing listens on; DeepSpeed's launcher takes 29500 whether it is free or not."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def launch(
    ranks: int, script: Path, *arguments: str, timeout: int = 300, **changes: str
) -> subprocess.CompletedProcess[str]:
    """Run a script on gloo ranks, with the variables that torchrun sets. `recipes.start` has the real launchers."""
    variables = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environments = [
        clean_environment(**variables, RANK=str(rank), LOCAL_RANK=str(rank), **changes) for rank in range(ranks)
    ]
    return run_scripts([[str(script), *arguments]] * ranks, environments, timeout)


def python(
    script: Path | str, *arguments: object, timeout: int = 300, **changes: str
) -> subprocess.CompletedProcess[str]:
    """Run a script of the repository in a process of its own, as `python script arguments`."""
    return run_scripts([[str(REPOSITORY / script), *map(str, arguments)]], [clean_environment(**changes)], timeout)


def convert(*arguments: object) -> subprocess.CompletedProcess[str]:
    """tools/convert_checkpoint.py, as a person types it."""
    return python("tools/convert_checkpoint.py", *arguments, HF_HUB_OFFLINE="1")
