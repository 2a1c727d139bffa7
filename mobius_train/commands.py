"""The commands that a package installs: `mobius-train`, `mobius-sample` and so on.

`mobius-train` is main.py; the others are the scripts in tools/, which a wheel contains in mobius_train/share/.
"""

# PYTHON_ARGCOMPLETE_OK: shells that complete all commands look for this word.

from __future__ import annotations

import mobius_train.installation  # noqa: F401

# isort: split
import argparse
import runpy
import shutil
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from mobius_train.cli import parse_options, run
from mobius_train.errors import MobiusError
from mobius_train.shared_files import REPOSITORY

SCRIPTS = {
    "mobius-audit": "audit_graph",
    "mobius-cache": "cache_latents",
    "mobius-compare": "compare_preferences",
    "mobius-convert": "convert_checkpoint",
    "mobius-evaluate": "evaluate",
    "mobius-inspect": "inspect_checkpoint",
    "mobius-measure": "measure_memory",
    "mobius-plan": "plan_memory",
    "mobius-prepare": "prepare_data",
    "mobius-push": "push_to_hub",
    "mobius-sample": "sample",
}
# What `mobius-files` copies: the files that people edit.
FILES = ("configs", "ds_configs", "slurm", "tools")
# The folder of the Slurm scripts' output. Slurm does not make it, and a job without it fails at once.
SLURM_LOGS = "logs"


def main() -> None:
    """Run the command by whose name this process was started."""
    name = Path(sys.argv[0]).stem
    if name == "mobius-train":
        runpy.run_module("mobius_train.main", run_name="__main__")
    elif name == "mobius-files":
        run(_copy_files)
    else:
        _run_tool(REPOSITORY / "tools" / f"{SCRIPTS[name]}.py")


def load_tool(script: Path) -> Any:
    """The module of a script of tools/, imported as `python tools/NAME.py` would."""
    sys.path.insert(0, str(script.parent))
    spec = spec_from_file_location(script.stem, script)
    assert spec is not None
    assert spec.loader is not None
    tool: Any = module_from_spec(spec)
    sys.modules[script.stem] = tool
    spec.loader.exec_module(tool)
    return tool


def _run_tool(script: Path) -> None:
    tool = load_tool(script)
    # Those that join a job, or have data workers, have imported run_rank.
    getattr(tool, "run_rank", run)(tool.main)


def make_parser() -> argparse.ArgumentParser:
    """The options of mobius-files."""
    parser = argparse.ArgumentParser(
        prog="mobius-files", description=f"Copy {', '.join(FILES)} into a folder, to edit."
    )
    parser.add_argument("folder", type=Path, help="folder that has none of them yet; made if there is none")
    return parser


def _copy_files() -> None:
    """Copy recipes, DeepSpeed configurations, Slurm scripts and tools into a folder, and make the folder of their logs.

    Raises:
        MobiusError: the folder has one of them already, or cannot be written.
    """
    folder = parse_options(make_parser()).folder
    existing = [str(folder / name) for name in FILES if (folder / name).exists()]
    if existing:
        raise MobiusError(f"{', '.join(existing)} exist already, and are not overwritten: choose another folder")
    try:
        for name in FILES:
            shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / SLURM_LOGS).mkdir(exist_ok=True)
    except OSError as error:
        raise MobiusError(f"cannot write {folder}: {error}") from error
    print(*(folder / name for name in FILES), sep="\n")
