"""Shared parts of the command-line entry points: exit codes, error output, parsing, engine options."""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from mobius_train.bars import AboveBars
from mobius_train.errors import MobiusError, Stopped
from mobius_train.shared_files import ZERO2


def run(main: Callable[[], object]) -> NoReturn:
    """Run an entry point and exit: 0 on return, 75 if stopped, 1 with only the message on a MobiusError.

    Any other exception prints its traceback and exits non-zero.
    """
    sys.exit(_exit_code(main))


def run_rank(main: Callable[[], object]) -> NoReturn:
    """As `run`, for a process that joins a job, or that has data workers. 130 after Ctrl-C.

    It skips the interpreter's shutdown. DeepSpeed keeps references to process groups, so gloo's threads stay alive, and
    a thread that frees a tensor during the shutdown aborts the process after all work is done.
    """
    try:
        code = _exit_code(main)
    except SystemExit as request:  # of argparse
        code = request.code if isinstance(request.code, int) else int(request.code is not None)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 128 + signal.SIGINT
    except BaseException:
        # Before anything else: data workers ignore SIGTERM, and the interpreter would wait for them for ever.
        sys.excepthook(*sys.exc_info())
        _end_workers()
        code = 1
    _end_workers()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _exit_code(main: Callable[[], object]) -> int:
    logging.basicConfig(format="%(levelname)s: %(message)s", handlers=[AboveBars()])
    try:
        main()
    except MobiusError as error:
        print(f"error: {error}", file=sys.stderr)
        _end_workers()
        return 1
    except Stopped:
        return os.EX_TEMPFAIL
    return 0


def _end_workers() -> None:
    """Kill data workers. After an error, a loader would wait 5 s for each one that is busy."""
    for worker in multiprocessing.active_children():
        worker.kill()


def parse_options(parser: argparse.ArgumentParser, commands: bool = False) -> argparse.Namespace:
    """Parse the command line; or complete it, if a shell asks for that and argcomplete is installed.

    Args:
        commands: the parser has commands. Without them overrides can be before, between and after the options.
    """
    with suppress(ModuleNotFoundError):
        import argcomplete

        argcomplete.autocomplete(parser)
    return parser.parse_args() if commands else parser.parse_intermixed_args()


def add_engine_options(
    parser: argparse.ArgumentParser,
    engines: Sequence[str] = ("deepspeed", "fsdp"),
    meaning: str = "training engine (default: %(default)s)",
) -> None:
    """Add --engine and --deepspeed, which `deepspeed_json` reads."""
    parser.add_argument("--engine", choices=engines, default="deepspeed", help=meaning)
    parser.add_argument("--deepspeed", type=Path, help="DeepSpeed JSON (default: ds_configs/zero2.json)")


def add_deepspeed_option(parser: argparse.ArgumentParser) -> None:
    """Add --deepspeed to a command that has no other engine."""
    parser.add_argument("--deepspeed", type=Path, default=ZERO2, help="DeepSpeed JSON (default: ds_configs/zero2.json)")


def deepspeed_json(arguments: argparse.Namespace) -> Path | None:
    """Return the path of the DeepSpeed JSON; None for other engines.

    Raises:
        MobiusError: --deepspeed was given with another engine.
    """
    if arguments.engine == "deepspeed":
        return arguments.deepspeed or ZERO2
    if arguments.deepspeed is not None:
        raise MobiusError(
            f"--deepspeed {arguments.deepspeed} is for --engine deepspeed, but --engine is {arguments.engine}: remove"
            " one of them. The recipe's fsdp section has the settings of FSDP"
        )
    return None
