"""What command-line entries share: how a mistake is told, the choice of an engine, that no output is written over."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from mobius_train.errors import MobiusError, Stopped

REPOSITORY = Path(__file__).resolve().parent.parent


def run(main: Callable[[], object]) -> NoReturn:
    """Run an entry point and exit: 0 when it returns, 75 if it was stopped, 1 with the message alone on a MobiusError.

    Any other exception keeps its traceback, and exits non-zero too.
    """
    sys.exit(_exit_code(main))


def run_rank(main: Callable[[], object]) -> NoReturn:
    """As `run`, for a process that joins a job.

    It leaves without the interpreter's shutdown: DeepSpeed keeps references to process groups, so that gloo's threads
    outlive them, and one that lets go of a tensor during the shutdown aborts the process after all its work is done.
    """
    code = _exit_code(main)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _exit_code(main: Callable[[], object]) -> int:
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        main()
    except MobiusError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Stopped:
        return os.EX_TEMPFAIL
    return 0


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """--engine and --deepspeed, which `deepspeed_json` reads."""
    parser.add_argument("--engine", choices=("deepspeed", "fsdp"), default="deepspeed", help="what shards and steps")
    parser.add_argument("--deepspeed", type=Path, help="DeepSpeed JSON, by default ds_configs/zero2.json")


def deepspeed_json(arguments: argparse.Namespace) -> Path | None:
    """The DeepSpeed JSON; None for the other engine.

    Raises:
        MobiusError: one was given to the other engine.
    """
    if arguments.engine == "deepspeed":
        return arguments.deepspeed or REPOSITORY / "ds_configs" / "zero2.json"
    if arguments.deepspeed is not None:
        raise MobiusError(
            f"--deepspeed {arguments.deepspeed} is for --engine deepspeed, and --engine is {arguments.engine}:"
            " remove one of them; FSDP has its settings in the recipe, fsdp.sharding and others"
        )
    return None
