"""stages.json: which stages are finished, with the recipe that trained each and the hashes of its final/.

Rank 0 alone reads and writes it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from mobius_train.checkpoint.changes import differing, recipe_fields
from mobius_train.checkpoint.folders import checkpoints
from mobius_train.checkpoint.format import read_json
from mobius_train.config_sections import Section
from mobius_train.errors import MobiusError
from mobius_train.files import replace_file, sha256
from mobius_train.recipe_files import validated
from mobius_train.run_files import FINAL, RECIPE
from mobius_train.stages.begun import FILE
from mobius_train.stages.recipe import OptimizerState, StageRecipe, Stages, StartFrom


class Entry(Section):
    """A stage that has begun.

    Attributes:
        recipe: the merged recipe; of a running stage, that of its first start.
        final: SHA-256 of each file in the stage's final/, by its path in it; None while the stage runs.
    """

    name: str
    status: Literal["running", "finished"]
    recipe: dict[str, Any]
    start_from: StartFrom | None
    optimizer_state: OptimizerState
    final: dict[str, str] | None

    def changes(self, stage: StageRecipe) -> list[str]:
        """A text for each field of the stage that was another when it was recorded."""
        now = entry_of(stage)
        return differing(_fields(self), _fields(now))


class _Contents(Section):
    format: Literal[1]
    stages: tuple[Entry, ...]


class Record:
    """The record of a training in stages.

    Args:
        output_dir: the folder that has the stages' folders.

    Raises:
        MobiusError: the file cannot be read, or the folder is that of a single run.
    """

    def __init__(self, output_dir: Path) -> None:
        self._folder = output_dir
        self._entries: list[Entry] = []
        path = output_dir / FILE
        if path.exists():
            contents = validated(_Contents, read_json(path), str(path))
            self._entries = list(contents.stages)
        elif (output_dir / RECIPE).exists():
            raise MobiusError(f"{output_dir} is the folder of a single run: choose another output_dir for stages")

    def finished(self, stages: Stages) -> int:
        """Return how many stages are finished, after a check that neither they nor their final/ were changed.

        A finished stage whose folder was removed is not finished any more.

        Raises:
            MobiusError: the message names the stage, the fields or files, and what to do.
        """
        for place, entry in enumerate(self._entries):
            number = place + 1
            if place >= len(stages.recipes) or stages.recipes[place].name != entry.name:
                raise MobiusError(
                    f"{self._folder / FILE}: stage number {number} is {entry.name}, which the file of the stages does"
                    f" not have there. Put it back, or choose another output_dir"
                )
            stage = stages.recipes[place]
            if entry.status == "running":
                self._check_start(entry, stage)
                return place
            if not (self._folder / stage.folder).exists():
                self._forget(place, stages)
                return place
            self._check_finished(entry, stage, stages)
        return len(self._entries)

    def begin(self, stage: StageRecipe) -> None:
        """Record that a stage runs. The recipe of its first start is kept once it has a checkpoint.

        Raises:
            MobiusError: the record cannot be written.
        """
        begun = len(self._entries) >= stage.number
        if not (begun and checkpoints(self._folder / stage.folder)):
            self._put(stage.number, entry_of(stage))

    def finish(self, stage: StageRecipe) -> None:
        """Record that a stage is finished.

        Raises:
            MobiusError: the stage's final/ cannot be read, or the record cannot be written.
        """
        final = _hashes(self._folder / stage.folder / FINAL)
        self._put(stage.number, entry_of(stage).model_copy(update={"status": "finished", "final": final}))

    def changes(self, stage: StageRecipe) -> list[str]:
        """What is other in a stage than in the record of its first start."""
        return self._entries[stage.number - 1].changes(stage) if len(self._entries) >= stage.number else []

    def _put(self, number: int, entry: Entry) -> None:
        self._entries[number - 1 :] = [entry]
        text = _Contents(format=1, stages=tuple(self._entries)).model_dump_json(indent=1)
        try:
            replace_file(self._folder / FILE, text + "\n")
        except OSError as error:
            raise MobiusError(f"cannot write {self._folder / FILE}: {error.strerror or error}: free space") from error

    def _check_start(self, entry: Entry, stage: StageRecipe) -> None:
        """Refuse another start for a stage that has started; other fields are compared when it resumes."""
        if not checkpoints(self._folder / stage.folder):
            return
        for name in ("start_from", "optimizer_state"):
            was, now = getattr(entry, name), getattr(stage, name)
            if was != now:
                raise MobiusError(
                    f"{stage} has started already, with {name}={was}, but now has {name}={now}: restore it, or remove"
                    f" {self._folder / stage.folder} to start the stage anew"
                )

    def _check_finished(self, entry: Entry, stage: StageRecipe, stages: Stages) -> None:
        folders = [self._folder / later.folder for later in stages.recipes[stage.number - 1 :]]
        again = (
            f"or remove {', '.join(str(path) for path in folders if path.exists())} to train from this stage on anew"
        )
        changes = entry.changes(stage)
        if changes:
            raise MobiusError(
                f"{stage} is finished, but was changed since: {'; '.join(changes)}. Restore it (a change for later"
                f" stages belongs into these stages), {again}"
            )
        final = self._folder / stage.folder / FINAL
        found, before = _hashes(final), entry.final or {}
        other = [name for name in before | found if before.get(name) != found.get(name)]
        if other:
            shown = ", ".join(other[:5]) + (f" and {len(other) - 5} more" if len(other) > 5 else "")
            raise MobiusError(
                f"{stage} is finished, but files in {final} were changed since: {shown}. Restore them, {again}"
            )

    def _forget(self, place: int, stages: Stages) -> None:
        left = [self._folder / stage.folder for stage in stages.recipes[place:]]
        left = [folder for folder in left if folder.exists()]
        if left:
            raise MobiusError(
                f"{stages.recipes[place]} has no folder, but later stages have one. To train anew from this"
                f" stage on, remove {', '.join(map(str, left))} too; to keep them, restore"
                f" {self._folder / stages.recipes[place].folder}"
            )
        del self._entries[place:]


def entry_of(stage: StageRecipe) -> Entry:
    """The entry of a stage that runs."""
    return Entry(
        name=stage.name,
        status="running",
        recipe=stage.config.model_dump(mode="json"),
        start_from=stage.start_from,
        optimizer_state=stage.optimizer_state,
        final=None,
    )


def _fields(entry: Entry) -> dict[str, Any]:
    fields = recipe_fields(entry.recipe)
    # Of the last stage alone, which is another one after a stage is added. It changes no weight.
    del fields["hub_model_id"]
    return fields | {"start_from": entry.start_from, "optimizer_state": entry.optimizer_state}


def _hashes(folder: Path) -> dict[str, str]:
    try:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): sha256(path) for path in files}
    except OSError as error:
        raise MobiusError(f"{error.filename or folder}: {error.strerror or error}") from error
