"""What a tracker receives about a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from mobius_train.files import read_lines
from mobius_train.media.clip_files import METADATA_NAME
from mobius_train.run_files import LOGS

Outcome = Literal["finished", "stopped", "failed"]
# Formats of samples that every tracker shows.
SHOWN = (".gif", ".png")


@dataclass(frozen=True)
class About:
    """What a run is.

    Attributes:
        folder: the run's output folder.
        recipe: the resolved recipe, by dotted name.
        recipe_text: the same as YAML.
        overview: the lines that the run prints at its start.
        first_step: steps that a resumed run has behind it.
    """

    folder: Path
    recipe: Mapping[str, Any]
    recipe_text: str
    overview: str
    first_step: int

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def logs(self) -> Path:
        """The folder for trackers that write files."""
        return self.folder / LOGS


class Sample(NamedTuple):
    """A picture of a validation, GIF or PNG; its name is unique within the validation."""

    name: str
    path: Path
    caption: str


class Tracker(Protocol):
    """Records a run in a tool. The constructor records what the run is; it and all methods may raise any error.

    Attributes:
        identity: names the tool's run, so that a resumed run goes on in it; empty if there is nothing to name.
    """

    identity: str

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record metrics by grouped name, see `grouped`."""

    def samples(self, step: int, samples: list[Sample]) -> None:
        """Record the pictures of a validation."""

    def close(self, outcome: Outcome) -> None:
        """Write what is buffered, and mark the run as over."""


def samples_of(paths: Iterable[Path]) -> list[Sample]:
    """The pictures among the files of a validation, each with its prompt from metadata.jsonl, if it has one."""
    paths = list(paths)
    captions: dict[str, str] = {}
    for path in paths:
        if path.name == METADATA_NAME:
            captions |= {Path(line["file_name"]).stem: line["text"] for line in read_lines(path)}
    shown = [path for path in paths if path.suffix in SHOWN]
    return [Sample(path.stem, path, captions.get(path.stem, path.stem.replace("_", " "))) for path in shown]
