"""Python scripts in processes of their own that start in a moment.

Importing torch, DeepSpeed and diffusers takes 9 s of a core for each process. Here a fork server imports them once, and
each process is a fork of it that runs a script as `python script` would: with its own arguments, environment, output
files and exit status. Where there is a GPU, each process is a new Python: the imports start CUDA, and a fork cannot
start it again.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Protocol

import torch

# What takes the time. A name that cannot be imported is skipped by multiprocessing.
HEAVY = [
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.utils.tensorboard",
    "deepspeed",
    # Imported by the first engine: torch's compiler, through its decorators.
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "transformers",
    "diffusers",
    "diffusers.models.transformers",
    "diffusers.pipelines.pipeline_utils",
    "pydantic",
    "yaml",
    "av",
    # The encoders' classes, which transformers imports at their first use.
    "transformers.models.clip.modeling_clip",
    "transformers.models.t5.modeling_t5",
    "mobius_train.run",
    "mobius_train.preflight",
]

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(HEAVY)


class Process(Protocol):
    """What multiprocessing's processes and those of a new Python have in common."""

    @property
    def pid(self) -> int | None: ...

    @property
    def exitcode(self) -> int | None:
        """The exit status, -N after signal N; None while it runs."""

    def is_alive(self) -> bool: ...

    def join(self, timeout: float | None = None) -> None: ...

    def terminate(self) -> None: ...

    def kill(self) -> None: ...


class NewPython:
    """A script in a new Python; the arguments are those of `start_script`."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], out: Path, err: Path, session: bool
    ) -> None:
        with out.open("ab") as output, err.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, *command], env=environment, stdout=output, stderr=errors, start_new_session=session
            )
        self.pid, self.terminate, self.kill = self._process.pid, self._process.terminate, self._process.kill

    @property
    def exitcode(self) -> int | None:
        return self._process.poll()

    def is_alive(self) -> bool:
        return self.exitcode is None

    def join(self, timeout: float | None = None) -> None:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)


def start_script(
    command: Sequence[str],
    environment: Mapping[str, str],
    out: Path,
    err: Path | None = None,
    session: bool = False,
) -> Process:
    """Start a script in a process of its own.

    Args:
        command: script and arguments.
        environment: all variables of the process.
        out: where it appends what it prints.
        err: where it appends errors; `out` without it.
        session: in a session of its own.
    """
    err = out if err is None else err
    if torch.cuda.is_available():
        return NewPython(command, environment, out, err, session)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    process = _context.Process(target=_run, args=(list(command), dict(environment), str(out), str(err), session))
    process.start()
    return process


def run_scripts(
    commands: Sequence[Sequence[str]], environments: Sequence[Mapping[str, str]], timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run scripts side by side, as the ranks of a job.

    When one fails, the others get SIGTERM, and SIGKILL 30 s later.

    Args:
        commands: script and arguments of each process.
        environments: all variables of each process.
        timeout: seconds until all are killed.

    Returns:
        The exit status of the first that failed, and what all of them wrote.

    Raises:
        subprocess.TimeoutExpired: they ran longer.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = Path(folder) / "stdout", Path(folder) / "stderr"
        processes = [
            start_script(command, environment, *outputs)
            for command, environment in zip(commands, environments, strict=True)
        ]
        try:
            status = _wait(processes, time.monotonic() + timeout)
        finally:
            for process in processes:
                process.kill()
        out, err = (path.read_text(errors="replace") if path.exists() else "" for path in outputs)
    if status is None:
        raise subprocess.TimeoutExpired(list(commands[0]), timeout, out, err)
    return subprocess.CompletedProcess(list(commands[0]), status, out, err)


class Popen:
    """As subprocess.Popen for `[sys.executable, script, *arguments]`, each process in a session of its own."""

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str], stdout: IO[str], **_: object) -> None:
        self._process = start_script(command[1:], env, Path(stdout.name), session=True)

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a script", timeout or 0)
        return self._process.exitcode


def _wait(processes: Sequence[Process], deadline: float) -> int | None:
    """The first exit status that is not 0, or 0; None at the deadline."""
    failed = 0
    while any(process.is_alive() for process in processes):
        if time.monotonic() > deadline:
            return failed or None
        time.sleep(0.02)
        codes = [process.exitcode for process in processes if process.exitcode]
        if codes and not failed:
            failed = codes[0]
            deadline = min(deadline, time.monotonic() + 30)
            for process in processes:
                process.terminate()
    return failed or next((process.exitcode for process in processes if process.exitcode), 0)


def _run(command: list[str], environment: dict[str, str], out: str, err: str, session: bool) -> None:
    """In the new process: run the script as `__main__`."""
    if session:
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for path, descriptor in ((out, 1), (err, 2)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    script = command[0]
    given = [folder for folder in environment.get("PYTHONPATH", "").split(os.pathsep) if folder]
    # Of the parent's path only what the interpreter itself has put there.
    own = [folder for folder in sys.path if folder.startswith((sys.prefix, sys.base_prefix))]
    sys.path[:] = [str(Path(script).parent), *given, *own]
    sys.argv = list(command)
    for name in [name for name in sys.modules if name.split(".")[0] in ("preloaded", "launching", "recipes")]:
        del sys.modules[name]
    gc.freeze()  # What was imported stays; walking it takes the garbage collector half a second.
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", "1")))
    runpy.run_path(script, run_name="__main__")
