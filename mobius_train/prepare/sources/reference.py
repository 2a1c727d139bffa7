"""References to clips before decoding, and the pairing of clips with captions."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mobius_train.data.captions import SUFFIXES as CAPTIONS
from mobius_train.data.entry import Entry
from mobius_train.data.kinds import CLIP_SUFFIXES
from mobius_train.data.texts import legible_name
from mobius_train.prepare.candidate import Drop

STAGE = "source"
MAX_KEY = 150  # characters; a file name has at most 255 bytes


class Member(NamedTuple):
    """A file, or a member of an archive, as `size` bytes at `offset` of the file `path`.

    name: its path in the folder or archive. problem: the reason not to read it.
    """

    name: str
    path: Path
    offset: int
    size: int
    problem: Drop | None = None

    @property
    def suffix(self) -> str:
        return Path(self.name).suffix.lower()


@dataclass
class Reference:
    """One input: a potential clip, or a file that cannot be one for the reason in `problem`."""

    key: str
    origin: str
    path: str = ""
    offset: int = 0
    size: int = 0
    caption_at: tuple[str, int, int, str] | None = None  # path, offset, size, suffix
    caption: Any = None  # text, or text by language, if the source provides it
    labels: list[str] = field(default_factory=list)
    group: str = ""
    problem: Drop | None = None

    def entry(self) -> Entry:
        """The location of the clip's bytes."""
        path = Path(self.path)
        return Entry(self.key, (), path, self.offset, self.size, path.suffix, self.origin)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of_json(cls, content: dict[str, Any]) -> Reference:
        at, problem = content.pop("caption_at"), content.pop("problem")
        return cls(**content, caption_at=at and tuple(at), problem=problem and Drop(*problem))


def safe_key(name: str) -> str:
    """A key of letters, digits, `_` and single `-`. Shards split names at dots and slashes; `--` precedes a shot."""
    return re.sub(r"-+", "-", re.sub(r"[^A-Za-z0-9_-]+", "_", legible_name(name)))[:MAX_KEY].strip("_-") or "clip"


def refused_input(name: str, origin: str, reason: str, detail: str = "") -> Reference:
    """A reference to an input that is not a clip."""
    return Reference(safe_key(name), origin, problem=Drop(STAGE, reason, detail))


def pair_captions(members: Iterable[Member], place: str, shards: bool = False, listed: bool = False) -> list[Reference]:
    """Pair each clip with the caption of the same name; all other members become references with a problem.

    Args:
        place: the prefix of member names in `origin`.
        shards: split names at the first dot, as webdataset does, instead of the last.
        listed: do not look for captions; they come from a list.
    """
    references: list[Reference] = []
    names: dict[str, Member] = {}
    groups: dict[str, list[Member]] = defaultdict(list)
    for member in members:
        origin = f"{place}{legible_name(member.name)}"
        if member.problem is not None:
            references.append(Reference(safe_key(member.name), origin, problem=member.problem))
        elif member.name in names:
            references.append(
                refused_input(member.name, origin, "duplicate key", "the archive contains this name twice")
            )
        else:
            names[member.name] = member
            groups[_stem(member.name, shards)].append(member)
    for stem, inside in groups.items():
        clips = [member for member in inside if member.suffix in CLIP_SUFFIXES]
        captions = sorted((m for m in inside if m.suffix in CAPTIONS), key=lambda m: CAPTIONS.index(m.suffix))
        for member in inside:
            origin = f"{place}{legible_name(member.name)}"
            if member in clips:
                if shards and len(clips) > 1:
                    references.append(
                        refused_input(member.name, origin, "duplicate key", f"{len(clips)} clips with this key")
                    )
                    continue
                key = stem if len(clips) == 1 else f"{stem}-{member.suffix[1:]}"
                at = captions[0] if captions and not listed else None
                place_of_caption = at and (str(at.path), at.offset, at.size, at.suffix)
                references.append(
                    Reference(safe_key(key), origin, str(member.path), member.offset, member.size, place_of_caption)
                )
            elif member.suffix not in CAPTIONS:
                references.append(
                    refused_input(member.name, origin, "no clip", f"its suffix is {member.suffix or 'absent'}")
                )
            elif not clips:
                references.append(refused_input(member.name, origin, "missing member", "a caption without a clip"))
    return references


def _stem(name: str, shards: bool) -> str:
    path = Path(name)
    return str(path.with_name(path.name.partition(".")[0])) if shards and path.name else str(path.with_suffix(""))


def make_keys_unique(references: list[Reference]) -> list[Reference]:
    """Make the keys unique: repeated keys get a number, in the order of the references.

    Args:
        references: in an order that depends only on the input.
    """
    seen: Counter[str] = Counter()
    taken = {reference.key for reference in references}
    for reference in references:
        key = reference.key
        seen[key] += 1
        if seen[key] > 1:
            number = seen[key]
            while (candidate := f"{key}-{number}") in taken:
                number += 1
            seen[key] = number
            taken.add(candidate)
            reference.key = candidate
        reference.group = reference.group or reference.key
    return references
