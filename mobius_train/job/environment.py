"""The one place where environment variables are read, and set for the libraries that read them."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from mobius_train.errors import MobiusError

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Launch:
    """This process among those of the job; `local` means on this node."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int


def prepare() -> Launch:
    """Find out which process this is, and set what torch and DeepSpeed look for; call it before importing them.

    Raises:
        MobiusError: the launcher's variables are incomplete or contradict each other.
    """
    launch = detect(os.environ)
    os.environ |= _needed(launch, os.environ)
    choose_accelerator()
    return launch


def choose_accelerator() -> None:
    """Tell DeepSpeed of a machine without GPU, of which it warns when it finds out by itself."""
    import torch

    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"


def be_deterministic() -> None:
    """Have torch compute the same bits each time, on GPUs too; call it before the first computation.

    An operation that has no such kernel raises RuntimeError, naming itself.
    """
    import torch

    # cuBLAS needs workspaces of its own for that (docs.nvidia.com/cuda/cublas, Results reproducibility).
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)


def detect(environment: Mapping[str, str]) -> Launch:
    """Which process of which job: started by `deepspeed` or `torchrun`, by `srun`, or alone.

    Raises:
        MobiusError: the launcher's variables are incomplete or contradict each other.
    """
    if "RANK" in environment:
        rank, local_rank, world_size = _numbers(environment, "RANK", "LOCAL_RANK", "WORLD_SIZE")
        # torchrun says LOCAL_WORLD_SIZE and deepspeed LOCAL_SIZE; by hand, one node is meant.
        names = [name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in environment]
        local_world_size = _numbers(environment, names[0])[0] if names else world_size
        return _checked(Launch(rank, local_rank, world_size, local_world_size), "RANK, LOCAL_RANK and WORLD_SIZE")
    if "SLURM_STEP_ID" in environment or ("SLURM_PROCID" in environment and "SLURM_JOB_ID" not in environment):
        rank, local_rank, world_size = _numbers(environment, "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS")
        launch = Launch(rank, local_rank, world_size, _tasks_on_this_node(environment, world_size))
        return _checked(launch, "SLURM_PROCID, SLURM_LOCALID and SLURM_NTASKS")
    # The shell of a batch script has Slurm's variables too, but it is not one of the job's tasks.
    if "SLURM_JOB_ID" in environment and environment.get("SLURM_NTASKS", "1") != "1":
        raise MobiusError(
            f"this Slurm job has {environment['SLURM_NTASKS']} tasks, but srun did not start this process:"
            " start it as `srun python mobius_train/main.py …`, or ask for one task"
        )
    return Launch(rank=0, local_rank=0, world_size=1, local_world_size=1)


def node_name() -> str:
    """This node's name: Slurm's, if it has one, which need not be the machine's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def meeting_point(rank: int) -> tuple[str, int, bool, str]:
    """Host and port where the ranks meet, whether this rank opens it, and which attempt of a launcher this is.

    torchrun's agent has opened it already, and keeps it when it starts the ranks again.
    """
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), rank == 0 and not of_agent, attempt


def nodes_by_rank() -> list[str]:
    """Which node each rank of this Slurm step is on, by rank; [] where Slurm does not say."""
    try:
        command = ["scontrol", "show", "hostnames", os.environ["SLURM_STEP_NODELIST"]]
        nodes = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.split()
        tasks = _tasks_per_node(os.environ["SLURM_STEP_TASKS_PER_NODE"])
    except (KeyError, OSError, subprocess.SubprocessError, MobiusError):
        return []
    return [node for node, count in zip(nodes, tasks, strict=False) for _ in range(count)]


def _needed(launch: Launch, environment: Mapping[str, str]) -> dict[str, str]:
    """The variables for torch.distributed and DeepSpeed."""
    needed = {
        "RANK": str(launch.rank),
        "LOCAL_RANK": str(launch.local_rank),
        "WORLD_SIZE": str(launch.world_size),
        # On a CPU DeepSpeed would take the number of NUMA nodes for the number of ranks.
        "LOCAL_SIZE": str(launch.local_world_size),
        # Tokenizers that have run in the parent would warn of every data worker.
        "TOKENIZERS_PARALLELISM": environment.get("TOKENIZERS_PARALLELISM", "false"),
    }
    if launch.world_size == 1:
        # `deepspeed` gives every job port 29500, which another one on this machine may have. torchrun would have
        # the process ask a store of its own there.
        own_store = {"TORCHELASTIC_USE_AGENT_STORE": "False"}
        return needed | own_store | {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(_free_port())}
    if "MASTER_ADDR" in environment and "MASTER_PORT" in environment and "RANK" in environment:
        return needed
    if "MASTER_ADDR" not in environment and launch.local_world_size < launch.world_size:
        raise MobiusError(
            "MASTER_ADDR is not set, and the ranks are on several nodes: export the first one's name, in a Slurm script"
            ' by MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
        )
    if "MASTER_PORT" not in environment and "SLURM_JOB_ID" not in environment:
        raise MobiusError("MASTER_PORT is not set: export a port that is free on the node of rank 0")
    # Jobs that share a node get ports of their own.
    port = str(20000 + int(environment.get("SLURM_JOB_ID", "0")) % 20000)
    return needed | {
        "MASTER_ADDR": environment.get("MASTER_ADDR", LOOPBACK),
        "MASTER_PORT": environment.get("MASTER_PORT", port),
    }


def _numbers(environment: Mapping[str, str], *names: str) -> list[int]:
    missing = [name for name in names if name not in environment]
    if missing:
        there = ", ".join(name for name in names if name in environment)
        raise MobiusError(
            f"{there} set but {', '.join(missing)} not: start through deepspeed, torchrun or srun, or unset it"
        )
    try:
        return [int(environment[name]) for name in names]
    except ValueError:
        values = ", ".join(f"{name}={environment[name]!r}" for name in names)
        raise MobiusError(f"{values}: these must be whole numbers") from None


def _tasks_on_this_node(environment: Mapping[str, str], world_size: int) -> int:
    text = environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_TASKS_PER_NODE", str(world_size)))
    tasks = _tasks_per_node(text)
    node = int(environment.get("SLURM_NODEID", "0"))
    if node >= len(tasks):
        raise MobiusError(f"SLURM_NODEID={node}, but Slurm's tasks per node are {text!r}")
    return tasks[node]


def _tasks_per_node(text: str) -> list[int]:
    """Slurm writes them as `2(x3),1`: two on each of three nodes, then one."""
    tasks: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise MobiusError(f"cannot read Slurm's tasks per node: {text!r}")
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
    """(i, n): this process is share i of n, from `i/n` or, with None, from a Slurm job array; alone it is (0, 1).

    Raises:
        MobiusError: no such share.
    """
    if given is not None:
        match = re.fullmatch(r"(\d+)/(\d+)", given)
        if match is None or not int(match[1]) < int(match[2]):
            raise MobiusError(f"--task {given} is no share: write 0/4 for the first of four")
        return int(match[1]), int(match[2])
    if "SLURM_ARRAY_TASK_ID" not in os.environ:
        return 0, 1
    names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX", "SLURM_ARRAY_TASK_COUNT")
    number, first, last, count = _numbers(os.environ, *names)
    if last - first + 1 != count:
        raise MobiusError(
            f"the job array leaves numbers out between {first} and {last}: submit it as --array=0-{count - 1}"
        )
    return number - first, count
