"""Starting a script on several gloo ranks, as a user's launcher does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


def clean_environment(**changes: str) -> dict[str, str]:
    """This process's environment without what a launcher or an earlier test has left in it."""
    kept = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES and not k.startswith("SLURM_")}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests' / 'helpers'}"} | changes


def free_port() -> int:
    """A port that nothing listens on; DeepSpeed's launcher takes 29500 whether it is free or not."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def launch(
    ranks: int, script: Path, *arguments: str, timeout: int = 300, **changes: str
) -> subprocess.CompletedProcess[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    # Port 0: torchrun takes a free one.
    command = [*torchrun, "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", str(script), *arguments]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=clean_environment(**changes),
        check=False,
    )


def convert(*arguments: object) -> subprocess.CompletedProcess[str]:
    """tools/convert_checkpoint.py, as a person types it."""
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "tools" / "convert_checkpoint.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=clean_environment(HF_HUB_OFFLINE="1"),
    )
