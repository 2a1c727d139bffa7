"""The list of a run's inputs. It is made once, so later changes of the sources do not affect the run."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path

from mobius_train.bars import progress
from mobius_train.data.patterns import naming
from mobius_train.errors import MobiusError
from mobius_train.files import publish_folder, publish_lines, read_lines, temporary_folder
from mobius_train.prepare.candidate import Drop
from mobius_train.prepare.recipe import PrepareConfig, Source
from mobius_train.prepare.sources.reference import STAGE, Reference, make_keys_unique

NAME, OFFSETS, RECIPE = "inputs.jsonl", "offsets.jsonl", "recipe.yaml"
NO_CAPTION = "no caption"  # why an input of a source with `captions: required` is dropped


class Inputs:
    """References by part, read from the list one part at a time."""

    def __init__(self, work: Path, part_size: int) -> None:
        self.path, self.part_size = work / NAME, part_size
        [content] = read_lines(work / OFFSETS)
        self.count: int = content["count"]
        self.offsets: list[int] = content["offsets"]

    @property
    def parts(self) -> int:
        return len(self.offsets)

    def size(self, number: int) -> int:
        """The number of inputs in a part."""
        return min(self.part_size, self.count - number * self.part_size)

    def part(self, number: int) -> list[Reference]:
        """The references of one part."""
        with self.path.open("rb") as file:
            file.seek(self.offsets[number])
            lines = list(itertools.islice(file, self.part_size))
        return [Reference.of_json(json.loads(line)) for line in lines]


def open_inputs(config: PrepareConfig, work: Path) -> Inputs:
    """List the inputs, or open an existing list.

    Raises:
        MobiusError: a source is missing, or all sources are empty.
    """
    if not (work / OFFSETS).exists():
        _list(config, work)
    return Inputs(work, config.part_size)


def _list(config: PrepareConfig, work: Path) -> None:
    """Write the list. If several tasks do so at once, the first folder to be renamed is used."""
    with temporary_folder(work) as own:
        references: list[Reference] = []
        for number, source in enumerate(progress(config.sources, desc="listing", unit="source")):
            field = f"sources.{number}.{'packages' if source.kind == 'fluent_emoji' else 'path'}"
            with naming(field, f"set {field}=PATH to your files (docs/data.md)"):
                references += _with_captions(source, own, work)
        if not references:
            raise MobiusError(f"no inputs in {len(config.sources)} sources: all are empty")
        references = make_keys_unique(references)
        publish_lines(own / NAME, (r.to_json() for r in references), ascii_only=True)
        with (own / NAME).open("rb") as file:
            starts = itertools.accumulate((len(line) for line in file), initial=0)
            offsets = list(itertools.islice(starts, 0, len(references), config.part_size))
        publish_lines(own / OFFSETS, [{"count": len(references), "offsets": offsets}])
        (own / RECIPE).write_text(config.dump(), encoding="utf-8")
        try:
            publish_folder(own, work)
        except OSError:  # another task was first
            if not (work / OFFSETS).exists():
                raise


def _with_captions(source: Source, own: Path, work: Path) -> Iterator[Reference]:
    def final(path: str) -> str:
        """The absolute path after `own` has been renamed to `work`."""
        inside = path.startswith(f"{own}{os.sep}")
        return os.path.abspath(work / os.path.relpath(path, own) if inside else path)

    for reference in source.references(own):
        reference.path = final(reference.path)
        if reference.caption_at is not None:
            reference.caption_at = (final(reference.caption_at[0]), *reference.caption_at[1:])
        bare = reference.caption_at is None and reference.caption is None
        if bare and source.captions == "required" and reference.problem is None:
            reference.problem = Drop(STAGE, NO_CAPTION, "the source has captions: required")
        yield reference
