"""Fluent Emoji from its npm packages, with the names of the emoji as captions."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from mobius_train.config import Section
from mobius_train.prepare.candidate import Drop
from mobius_train.prepare.emoji import names as emoji
from mobius_train.prepare.sources import archives
from mobius_train.prepare.sources.reference import CLIPS, STAGE, Reference

CACHE = Path("~/.cache/mobius-train/fluent-emoji")


class FluentEmoji(Section):
    """packages: the .tgz files of npm; without them they are fetched into `cache`.

    Skin tones of an emoji are one group, and come after the emoji without one, which deduplication so prefers.
    """

    kind: Literal["fluent_emoji"]
    packages: str | None = None
    cache: Path = CACHE
    captions: Literal["required"] = "required"

    def references(self, work: Path) -> list[Reference]:
        """
        Raises:
            MobiusError: a package is missing, or cannot be fetched.
        """
        paths = archives.expand(self.packages) if self.packages else emoji.fetch(self.cache.expanduser())
        found = [_named(reference) for path in paths for reference in archives.references(path, work, 2**32)]
        return sorted(found, key=lambda reference: (emoji.has_skin_tone(reference.key), reference.key))


def _named(reference: Reference) -> Reference:
    name = Path(reference.origin)
    if reference.problem is None and name.suffix in CLIPS:
        reference.key, reference.group = name.stem, emoji.family(name.stem)
        reference.labels = [reference.group]
        reference.caption = emoji.names(name.stem)
        if reference.caption is None:
            reference.problem = Drop(STAGE, "no name", "the package emoji does not know it")
    return reference
