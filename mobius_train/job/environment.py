"""Reading and setting of environment variables. No other module does either."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from mobius_train.errors import MobiusError

LOOPBACK = "127.0.0.1"
# How often a thread of GNU OpenMP looks for work before it sleeps. By default it looks for milliseconds: where another
# program has a core, threads then wait for each other: beside one such program, a forward and backward pass of the
# default recipe's model took 10.2 s on two cores instead of 0.35 s. With this number it took 0.97 s, and on a quiet
# machine no longer than by default.
SPINS = "5000"


@dataclass(frozen=True)
class Launch:
    """The position of this process in the job; `local` means within its node."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int


def prepare() -> Launch:
    """Detect this process's rank and set the variables of torch and DeepSpeed. Call it before importing them.

    Raises:
        MobiusError: the launcher's variables are incomplete or contradict each other.
    """
    launch = detect(os.environ)
    os.environ |= _needed(launch, os.environ)
    choose_accelerator(launch.world_size)
    return launch


def choose_accelerator(ranks: int = 1) -> None:
    """Set DS_ACCELERATOR on machines without a CUDA GPU, which silences DeepSpeed's warning.

    It is Apple's GPU (`mps`) for a job of one rank, unless the user has set `cpu`; else the CPU. Also limits the time
    that threads wait actively, unless the user has set that; OpenMP reads it when torch is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    from mobius_train.devices import best_device

    kind = best_device().type
    if kind == "mps" and (ranks > 1 or os.environ.get("DS_ACCELERATOR") == "cpu"):
        kind = "cpu"
    if kind != "cuda":
        os.environ["DS_ACCELERATOR"] = kind


def uses_mps() -> bool:
    """`choose_accelerator` has chosen Apple's GPU."""
    return os.environ.get("DS_ACCELERATOR") == "mps"


def be_deterministic() -> None:
    """Make torch bit-reproducible, on GPUs too. Call it before the first computation.

    Operations without a deterministic kernel raise RuntimeError with their name.
    """
    import torch

    # cuBLAS needs fixed workspaces (docs.nvidia.com/cuda/cublas, Results reproducibility).
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)


def detect(environment: Mapping[str, str]) -> Launch:
    """Detect this process's rank, as started by `deepspeed` or `torchrun`, by `srun`, or alone.

    Raises:
        MobiusError: the launcher's variables are incomplete or contradict each other.
    """
    if "RANK" in environment:
        rank, local_rank, world_size = _numbers(environment, "RANK", "LOCAL_RANK", "WORLD_SIZE")
        # torchrun sets LOCAL_WORLD_SIZE and deepspeed sets LOCAL_SIZE. Without either, all ranks are on one node.
        names = [name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in environment]
        local_world_size = _numbers(environment, names[0])[0] if names else world_size
        return _checked(Launch(rank, local_rank, world_size, local_world_size), "RANK, LOCAL_RANK and WORLD_SIZE")
    if "SLURM_STEP_ID" in environment or ("SLURM_PROCID" in environment and "SLURM_JOB_ID" not in environment):
        rank, local_rank, world_size = _numbers(environment, "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS")
        launch = Launch(rank, local_rank, world_size, _tasks_on_this_node(environment, world_size))
        return _checked(launch, "SLURM_PROCID, SLURM_LOCALID and SLURM_NTASKS")
    # A batch script's shell also has Slurm's variables, but is not a task of the job.
    if "SLURM_JOB_ID" in environment and environment.get("SLURM_NTASKS", "1") != "1":
        raise MobiusError(
            f"this Slurm job has {environment['SLURM_NTASKS']} tasks, but srun did not start this process:"
            " start it with `srun python mobius_train/main.py …`, or request one task"
        )
    return Launch(rank=0, local_rank=0, world_size=1, local_world_size=1)


def is_rank_zero() -> bool:
    """Return whether this process is rank 0, or belongs to no job."""
    return os.environ.get("RANK", "0") == "0"


def data_folders() -> list[str]:
    """Return the folders of programs' data, the user's own first, as freedesktop.org's base directories name them."""
    shared = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
    return [os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share"), *shared.split(":")]


def node_name() -> str:
    """Return the node's Slurm name, or its host name outside of Slurm. The two can differ."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def job_name() -> str:
    """Return the number of the Slurm job, which is the same after a requeue; an empty text outside of Slurm."""
    return os.environ.get("SLURM_JOB_ID", "")


def tracker_project(variable: str) -> str:
    """Return the project of a tracker, which its own variable names; default: mobius-train."""
    return os.environ.get(variable) or "mobius-train"


def mlflow_server() -> str | None:
    """Return the address of the user's MLflow server or store; None if there is none."""
    return os.environ.get("MLFLOW_TRACKING_URI") or None


def meeting_point(rank: int) -> tuple[str, int, bool, str]:
    """Return the host and port of the store, whether this rank serves it, and the launcher's attempt number.

    Under torchrun the agent serves the store, and keeps it when it restarts the ranks.
    """
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), rank == 0 and not of_agent, attempt


def nodes_by_rank() -> list[str]:
    """Return the node name of each rank of this Slurm step; [] where Slurm does not report it."""
    try:
        command = ["scontrol", "show", "hostnames", os.environ["SLURM_STEP_NODELIST"]]
        nodes = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.split()
        tasks = _tasks_per_node(os.environ["SLURM_STEP_TASKS_PER_NODE"])
    except (KeyError, OSError, subprocess.SubprocessError, MobiusError):
        return []
    return [node for node, count in zip(nodes, tasks, strict=False) for _ in range(count)]


def _needed(launch: Launch, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that torch.distributed and DeepSpeed need."""
    needed = {
        "RANK": str(launch.rank),
        "LOCAL_RANK": str(launch.local_rank),
        "WORLD_SIZE": str(launch.world_size),
        # On a CPU DeepSpeed would otherwise use the number of NUMA nodes.
        "LOCAL_SIZE": str(launch.local_world_size),
        # Tokenizers used before a fork would print a warning for every data worker.
        "TOKENIZERS_PARALLELISM": environment.get("TOKENIZERS_PARALLELISM", "false"),
    }
    if launch.world_size == 1:
        # `deepspeed` gives every job port 29500, which another job on this machine may use. torchrun makes the process
        # connect to the agent's store there.
        own_store = {"TORCHELASTIC_USE_AGENT_STORE": "False"}
        return needed | own_store | {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(_free_port())}
    if "MASTER_ADDR" in environment and "MASTER_PORT" in environment and "RANK" in environment:
        return needed
    if "MASTER_ADDR" not in environment and launch.local_world_size < launch.world_size:
        raise MobiusError(
            "MASTER_ADDR is not set, but the ranks are on several nodes: export the first node's name, in Slurm as"
            ' MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
        )
    if "MASTER_PORT" not in environment and "SLURM_JOB_ID" not in environment:
        raise MobiusError("MASTER_PORT is not set: export a free port of rank 0's node")
    # Jobs that share a node need different ports.
    port = str(20000 + int(environment.get("SLURM_JOB_ID", "0")) % 20000)
    return needed | {
        "MASTER_ADDR": environment.get("MASTER_ADDR", LOOPBACK),
        "MASTER_PORT": environment.get("MASTER_PORT", port),
    }


def _numbers(environment: Mapping[str, str], *names: str) -> list[int]:
    missing = [name for name in names if name not in environment]
    if missing:
        present = ", ".join(name for name in names if name in environment)
        raise MobiusError(
            f"{present} is set, but {', '.join(missing)} is not: start with deepspeed, torchrun or srun, or unset"
            f" {present}"
        )
    try:
        return [int(environment[name]) for name in names]
    except ValueError:
        values = ", ".join(f"{name}={environment[name]!r}" for name in names)
        raise MobiusError(f"{values}: these must be integers") from None


def _tasks_on_this_node(environment: Mapping[str, str], world_size: int) -> int:
    text = environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_TASKS_PER_NODE", str(world_size)))
    tasks = _tasks_per_node(text)
    node = int(environment.get("SLURM_NODEID", "0"))
    if node >= len(tasks):
        raise MobiusError(f"SLURM_NODEID={node} is not among Slurm's tasks per node, {text!r}")
    return tasks[node]


def _tasks_per_node(text: str) -> list[int]:
    """Parse Slurm's notation: `2(x3),1` is two tasks on each of three nodes, then one."""
    tasks: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise MobiusError(f"cannot parse Slurm's tasks per node: {text!r}")
        tasks += [int(match[1])] * int(match[2] or 1)
    return tasks


def _checked(launch: Launch, names: str) -> Launch:
    if not (
        0 <= launch.rank < launch.world_size and 0 <= launch.local_rank < launch.local_world_size <= launch.world_size
    ):
        raise MobiusError(
            f"{names} contradict each other: rank {launch.rank} of {launch.world_size},"
            f" on its node {launch.local_rank} of {launch.local_world_size}"
        )
    return launch


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        return int(listener.getsockname()[1])


def array_task(given: str | None) -> tuple[int, int]:
    """Return (i, n) for share i of n: from `i/n`, else from the Slurm job array, else (0, 1).

    Raises:
        MobiusError: the share is invalid.
    """
    if given is not None:
        match = re.fullmatch(r"(\d+)/(\d+)", given)
        if match is None or not int(match[1]) < int(match[2]):
            raise MobiusError(f"--task {given} is not valid: write I/N with I < N, such as 0/4 for the first of four")
        return int(match[1]), int(match[2])
    if "SLURM_ARRAY_TASK_ID" not in os.environ:
        return 0, 1
    names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX", "SLURM_ARRAY_TASK_COUNT")
    number, first, last, count = _numbers(os.environ, *names)
    if last - first + 1 != count:
        raise MobiusError(
            f"the job array skips numbers between {first} and {last}: submit it with --array=0-{count - 1}"
        )
    return number - first, count
