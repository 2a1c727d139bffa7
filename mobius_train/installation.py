"""Every command imports this module first. An import that fails then ends it with the remedy, not a traceback.

It needs no other package, and no other module of this one.
"""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType, TracebackType

PACKAGE, DISTRIBUTION = "mobius_train", "mobius-train"
ROOT = Path(__file__).resolve().parent.parent
_REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(?:\[[^\]]*\])?(?:>=(?P<least>[\d.]+))?")

if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(f"error: mobius-train needs Python 3.11 or newer, and {sys.executable} is {sys.version.split()[0]}")


def explain(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an uncaught exception: a failed import in one line with the remedy, others with their traceback."""
    lacking = unmet_requirements()
    cause = failed_import(error, lacking)
    if cause is None:
        sys.__excepthook__(kind, error, trace)
        return
    if isinstance(cause, ModuleNotFoundError) and cause.name is not None:
        text = f"the Python package {cause.name} is missing in {sys.executable}"
    else:
        lines = str(cause).strip().splitlines() or [""]
        text = f"a Python package of {sys.executable} cannot be imported: {type(cause).__name__}: {lines[0].strip()}"
    if lacking:
        text += f". Of what {DISTRIBUTION} needs, it lacks {', '.join(lacking)}"
    print(f"error: {text}. {remedy()}", file=sys.stderr)


def failed_import(error: BaseException, lacking: list[str]) -> BaseException | None:
    """The failed import of another package that raised this error; None if another fault did.

    Args:
        lacking: `unmet_requirements`. If there are any, a name that a module lacks comes from them.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ImportError):
            # A module of this package that is missing is a fault of this package.
            return None if (cause.name or "").partition(".")[0] == PACKAGE else cause
        cause = cause.__cause__
    if isinstance(error, AttributeError) and isinstance(error.obj, ModuleType):
        # A folder without the package's files is still a module, without any name.
        empty = error.obj.__spec__ is not None and error.obj.__spec__.origin is None
        return error if (lacking or empty) and error.obj.__name__.partition(".")[0] != PACKAGE else None
    return error if isinstance(error, Exception) and _raised_by_another_module(error.__traceback__) else None


def _raised_by_another_module(trace: TracebackType | None) -> bool:
    """The code at the top level of another package's module raised it, such as a library that cannot be opened."""
    modules: list[str | None] = []  # the function of each frame; None: of this project
    while trace is not None:
        code = trace.tb_frame.f_code
        place = Path(code.co_filename).resolve()
        modules.append(
            None if any(place.is_relative_to(ROOT / folder) for folder in (PACKAGE, "tools")) else code.co_name
        )
        trace = trace.tb_next
    last = max((number for number, name in enumerate(modules) if name is None), default=0)
    return "<module>" in modules[last + 1 :]


def unmet_requirements() -> list[str]:
    """What this package requires and this Python lacks, without the extras: `torch>=2.11`."""
    found = []
    for requirement in _requirements():
        wanted, _, condition = requirement.partition(";")
        match = _REQUIREMENT.match(wanted)
        if "extra" in condition or match is None:
            continue
        try:
            version = metadata.version(match["name"])
        except metadata.PackageNotFoundError:
            found.append(wanted.strip())
            continue
        if match["least"] and _numbers(version) < _numbers(match["least"]):
            found.append(f"{wanted.strip()} (it has {version})")
    return found


def _requirements() -> list[str]:
    """Of the installed distribution, else of the checkout."""
    try:
        return metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        import tomllib  # of Python 3.11

        path = ROOT / "pyproject.toml"
        return tomllib.loads(path.read_text(encoding="utf-8"))["project"]["dependencies"] if path.is_file() else []


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version.partition("+")[0])]


def remedy() -> str:
    """How to get an environment that has everything."""
    if not (ROOT / "pyproject.toml").is_file():
        pip = f"{sys.executable} -m pip install"
        return (
            f"Install what it lacks: {pip} {DISTRIBUTION}, or what is damaged: {pip} --force-reinstall --no-deps NAME"
        )
    environment = ROOT / ".venv"
    complete = f"{sys.executable} -m pip install -c constraints.txt -e '.[emoji,test]' in {ROOT}"
    if Path(sys.prefix).resolve() == environment.resolve():
        return f"Complete this environment: {complete}"
    return (
        f"Enter the environment that `make setup` prepares: . {environment}/bin/activate, or install there: {complete}"
    )


sys.excepthook = explain
