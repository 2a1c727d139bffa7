"""report.html of a run: everything that its folder shows, in one file without a server."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mobius_train.errors import MobiusError
from mobius_train.evenly import evenly
from mobius_train.files import read_lines, read_small, replace_file
from mobius_train.run_files import FINAL, METRICS, OVERVIEW, PAGE, RECIPE, SAMPLES
from mobius_train.run_page.curves import drawings

# Steps whose samples are on the page: the newest, and others spread evenly.
STEPS = 6
# Bytes of one picture on the page; larger ones are named only.
PICTURE = 8 * 2**20


class Picture(NamedTuple):
    """A file of samples; `data` is None if it is too large for the page."""

    name: str
    data: str | None


class Samples(NamedTuple):
    step: int
    pictures: list[Picture]


def write_run_page(folder: Path) -> Path:
    """Write the page of a run from the files in its folder, and return its path.

    Raises:
        MobiusError: the folder has no metrics.
        OSError: the page cannot be written.
    """
    lines: list[dict[str, Any]] = []
    # A killed run or a full disk leaves the last line incomplete.
    with suppress(ValueError, OSError):
        for line in read_lines(folder / METRICS):
            lines.append(line)
    if not lines:
        raise MobiusError(f"{folder} has no metrics.jsonl, so it is not the folder of a run")
    samples = _samples(folder / SAMPLES)
    comparison = None
    if samples:
        comparison = _picture(folder / SAMPLES / f"step-{samples[0].step}" / "comparison.gif")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("page.html.jinja").render(
        name=folder.resolve().name,
        folder=str(folder),
        step=lines[-1]["step"],
        facts=list(_facts(folder)),
        drawings=drawings(lines),
        comparison=comparison,
        samples=samples,
        recipe=_text(folder / RECIPE),
        finished=(folder / FINAL).is_dir(),
    )
    path = folder / PAGE
    replace_file(path, page)
    return path


def _facts(folder: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of the overview that the run printed at its start."""
    for line in (_text(folder / OVERVIEW) or "").splitlines():
        name, _, text = line.partition(" ")
        if text:
            yield name, text.strip()


def _samples(folder: Path) -> list[Samples]:
    """The samples of at most `STEPS` steps, the newest first."""
    steps = sorted(int(found[1]) for path in folder.glob("step-*") if (found := re.fullmatch(r"step-(\d+)", path.name)))
    return [Samples(step, list(_pictures(folder / f"step-{step}"))) for step in evenly(steps[::-1], STEPS)]


def _pictures(folder: Path) -> Iterator[Picture]:
    """The samples of a step: files whose names begin with their prompt's number, or an autoencoder's pictures."""
    for path in sorted((*folder.glob("[0-9]*.gif"), *folder.glob("[0-9]*.png"), *folder.glob("reconstructions.png"))):
        picture = _picture(path)
        if picture is not None:
            yield picture


def _picture(path: Path) -> Picture | None:
    if not path.is_file():
        return None
    if path.stat().st_size > PICTURE:
        return Picture(str(path), None)
    data = base64.b64encode(path.read_bytes()).decode()
    prompt = path.stem.partition("-")[2] or path.stem
    return Picture(prompt.replace("-", " "), f"data:image/{path.suffix[1:]};base64,{data}")


def _text(path: Path) -> str | None:
    try:
        return read_small(path).decode(errors="replace")
    except OSError:
        return None
