"""A real Slurm of four nodes on this machine, from Debian's packages slurm-wlm and munge.

All nodes are this machine under names of their own, n1 to n4. These resolve inside a mount namespace with an /etc/hosts
of its own, which needs root. Jobs go to n1 and n2 unless they name the partition `calm`, whose nodes n3 and n4 no
preemption reaches.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from launching import REPOSITORY, clean_environment, free_port

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "squeue", "unshare")
NODES = ("n1", "n2", "n3", "n4")
IN_NAMESPACE = (
    "unshare",
    "--mount",
    "--propagation",
    "private",
    "sh",
    "-c",
    'mount --bind "$0" /etc/hosts && exec "$@"',
)
RESOURCES = "CPUs=8 RealMemory=4000 Gres=gpu:2"
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
# A requeued job starts when its credentials have expired, by default after 120 s. By then Slurm must have ended the
# last start: a signal that arrives later hits the next one. So it kills soon (KillWait), and waits long for a busy
# node's answer (MessageTimeout) instead of sending the signal again.
AuthInfo=socket={folder}/munge.socket,cred_expire=8
KillWait=3
MessageTimeout=60
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
# Both nodes are one machine, which has other cores than they say.
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
# Seconds without an answer after which a node is down.
SlurmdTimeout=30
SchedulerParameters=bf_interval=2,sched_min_interval=100000,batch_sched_delay=0
# Jobs take their port from their number: clusters side by side number them differently.
FirstJobId={first_job}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=low Nodes=n1,n2 Default=YES PriorityTier=1 GraceTime=60 MaxTime=60
PartitionName=high Nodes=n1,n2 PriorityTier=2 PreemptMode=OFF MaxTime=60
PartitionName=calm Nodes=n3,n4 PreemptMode=OFF MaxTime=60
"""


def why_not() -> str | None:
    """Why no cluster can be started here."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=_path()) is None]
    if missing:
        return f"{', '.join(missing)} not installed: apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "the daemons of Slurm want root"
    namespace = subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False)
    return None if namespace.returncode == 0 else "no mount namespaces here"


class Cluster:
    """slurmctld and one slurmd for each node, in a folder; a context, which ends with all of them gone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._environment = {**clean_environment(), "PATH": _path(), "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def run(self, *command: str, **variables: str) -> str:
        """What a command of a user prints."""
        environment = {**self._environment, **variables}
        result = subprocess.run(
            command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
        )
        assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout.strip()

    def submit(self, *arguments: str, **variables: str) -> str:
        """sbatch, in the repository; returns the number of the job."""
        return self.run("sbatch", "--parsable", *arguments, **variables)

    def job(self, number: str) -> dict[str, str]:
        """What Slurm says of a job: JobState, Restarts, ExitCode, …"""
        words = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, number: str, *states: str, seconds: float = 120) -> dict[str, str]:
        """Until a job is in one of these states."""
        wait_until(lambda: self.job(number)["JobState"] in states, seconds, lambda: f"{states}: {self.job(number)}")
        return self.job(number)

    def start_nodes(self, *nodes: str) -> None:
        for node in nodes:
            self._daemon(node, *IN_NAMESPACE, str(self.folder / "hosts"), "slurmd", "-D", "-N", node)
        working = {"idle", "allocated", "mixed"}
        wait_until(lambda: set() < self._states(nodes) <= working, 60, lambda: f"{nodes}: {self._states(nodes)}")

    def kill_daemon(self, node: str) -> None:
        """kill -9 of a slurmd; its jobs go on."""
        daemon = self._daemons.pop(node)
        daemon.kill()
        daemon.wait()

    def kill_node(self, node: str) -> None:
        """A power cut: the slurmd, and everything that it has started."""
        root = self._daemons[node].pid
        for pid in (*_descendants(root), *_of_node(self.folder / "slurm.conf", node)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.kill_daemon(node)

    def tasks(self, node: str, program: str) -> list[int]:
        """The processes that jobs have on a node and whose command line contains `program`."""
        found = []
        for pid in _of_node(self.folder / "slurm.conf", node):
            with contextlib.suppress(OSError):
                if program.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
        return found

    def log(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def _start(self) -> None:
        folder = self.folder
        (folder / "state").mkdir()
        host = socket.gethostname()
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} {RESOURCES}" for node in NODES
        )
        configuration = CONFIGURATION.format(
            host=host, port=free_port(), folder=folder, first_job=random.randrange(1, 10**6), nodes=nodes
        )
        (folder / "slurm.conf").write_text(configuration)
        # GPUs that are none: Slurm counts these files, and no job opens them.
        for number in range(2):
            (folder / f"gpu{number}").touch()
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-1]\n")
        (folder / "hosts").write_text(f"127.0.0.1 localhost {host} {' '.join(NODES)}\n")
        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(random.randbytes(128))
        files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={folder}/munge.{suffix}" for option, suffix in files.items()]
        # --force: the folder is a temporary one, to which others may have access.
        self._daemon("munged", "munged", "--foreground", "--force", "--num-threads=2", *options)
        wait_until((folder / "munge.socket").exists, 20, lambda: self.log("munged"))
        self._daemon("slurmctld", *IN_NAMESPACE, str(folder / "hosts"), "slurmctld", "-D")
        wait_until(self._answers, 30, lambda: self.log("slurmctld"))
        self.start_nodes(*NODES)

    def _stop(self) -> None:
        if "slurmctld" in self._daemons:
            with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
                self.run("scancel", "--user=root")
                self.run("scancel", "--signal=KILL", "--full", "--user=root")
                wait_until(lambda: self.run("squeue", "--noheader") == "", 20, lambda: "jobs are left")
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
        for daemon in self._daemons.values():
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
        # What a killed slurmd has left.
        for pid, (_, variables) in _processes().items():
            if variables.get("SLURM_CONF") == str(self.folder / "slurm.conf"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _daemon(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                command, env=self._environment, stdout=out, stderr=out, stdin=subprocess.DEVNULL
            )

    def _answers(self) -> bool:
        with contextlib.suppress(AssertionError):
            return "is UP" in self.run("scontrol", "ping")
        return False

    def _states(self, nodes: Sequence[str]) -> set[str]:
        return set(self.run("sinfo", "--noheader", "--nodes", ",".join(nodes), "--format=%T").split())


def wait_until(true: Callable[[], bool], seconds: float, message: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds} s: {message()}"
        time.sleep(0.5)


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def _descendants(root: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for pid, (parent, _) in _processes().items():
        children.setdefault(parent, []).append(pid)
    found, todo = [], [root]
    while todo:
        found += (below := children.get(todo.pop(), []))
        todo += below
    return found


def _of_node(conf: Path, node: str) -> list[int]:
    """What a node's steps run, and the slurmstepd above them, which have left their slurmd."""
    tasks, stewards = [], set()
    for pid, (parent, variables) in _processes().items():
        if variables.get("SLURMD_NODENAME") == node and variables.get("SLURM_CONF") == str(conf):
            tasks.append(pid)
            with contextlib.suppress(OSError):
                if Path(f"/proc/{parent}/cmdline").read_bytes().startswith(b"slurmstepd"):
                    stewards.add(parent)
    return [*stewards, *tasks]


def _processes() -> dict[int, tuple[int, Mapping[str, str]]]:
    """Parent and variables by process."""
    found: dict[int, tuple[int, Mapping[str, str]]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            entries = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            found[int(folder.name)] = parent, dict(e.split("=", 1) for e in entries if "=" in e)
    return found
