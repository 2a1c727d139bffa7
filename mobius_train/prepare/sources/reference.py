"""A clip's place before anything of it is decoded, and the pairing of clips with their captions."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mobius_train.data.captions import SUFFIXES as CAPTIONS
from mobius_train.data.entry import Entry
from mobius_train.prepare.candidate import Drop

STAGE = "source"
# What files of each kind are named by; videos are called by FFmpeg's name of their demuxer.
ENDINGS = {
    "gif": (".gif",),
    "webp": (".webp",),
    "png": (".png", ".apng"),
    "jpeg": (".jpg", ".jpeg"),
    "mov": (".mp4", ".m4v", ".mov"),
    "matroska": (".webm", ".mkv"),
    "avi": (".avi",),
}
CLIPS = tuple(ending for endings in ENDINGS.values() for ending in endings)
MAX_KEY = 150  # characters: file names have 255 bytes at most


class Member(NamedTuple):
    """A file, or a member of an archive, as `size` bytes at `offset` of the file `path`.

    name: its path in the folder or archive. problem: why it must not be read.
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
    """One input: a clip to be, or something that can't be one and says why in `problem`."""

    key: str
    origin: str
    path: str = ""
    offset: int = 0
    size: int = 0
    caption_at: tuple[str, int, int, str] | None = None  # path, offset, size, suffix
    caption: Any = None  # words, or words by language, that the source knows itself
    labels: list[str] = field(default_factory=list)
    group: str = ""
    problem: Drop | None = None

    def entry(self) -> Entry:
        """Where the clip's bytes are."""
        path = Path(self.path)
        return Entry(self.key, (), path, self.offset, self.size, path.suffix, self.origin)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of_json(cls, content: dict[str, Any]) -> Reference:
        at, problem = content.pop("caption_at"), content.pop("problem")
        return cls(**content, caption_at=at and tuple(at), problem=problem and Drop(*problem))


def legible(text: str) -> str:
    """A name as it can be shown and written: bytes that are no UTF-8 as escapes, control characters as well."""
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(repr(c)[1:-1] if unicodedata.category(c) == "Cc" else c for c in text)


def safe_key(name: str) -> str:
    """Of letters, digits, `_` and single `-`: shards split names at dots and slashes, and `--` parts a clip's shots."""
    return re.sub(r"-+", "-", re.sub(r"[^A-Za-z0-9_-]+", "_", legible(name)))[:MAX_KEY].strip("_-") or "clip"


def refuse(name: str, origin: str, reason: str, detail: str = "") -> Reference:
    """An input that is no clip."""
    return Reference(safe_key(name), origin, problem=Drop(STAGE, reason, detail))


def pair(members: Iterable[Member], place: str, shards: bool = False, listed: bool = False) -> list[Reference]:
    """Each clip with the caption of its name; every other member becomes a reference with a problem.

    Args:
        place: what stands before the members' names to tell where they are.
        shards: names are split at the first dot, as webdataset does, and not at the last.
        listed: captions come from elsewhere.
    """
    found: list[Reference] = []
    names: dict[str, Member] = {}
    groups: dict[str, list[Member]] = defaultdict(list)
    for member in members:
        origin = f"{place}{legible(member.name)}"
        if member.problem is not None:
            found.append(Reference(safe_key(member.name), origin, problem=member.problem))
        elif member.name in names:
            found.append(refuse(member.name, origin, "duplicate key", "the archive holds this name twice"))
        else:
            names[member.name] = member
            groups[_stem(member.name, shards)].append(member)
    for stem, inside in groups.items():
        clips = [member for member in inside if member.suffix in CLIPS]
        captions = sorted((m for m in inside if m.suffix in CAPTIONS), key=lambda m: CAPTIONS.index(m.suffix))
        for member in inside:
            origin = f"{place}{legible(member.name)}"
            if member in clips:
                if shards and len(clips) > 1:
                    found.append(refuse(member.name, origin, "duplicate key", f"{len(clips)} clips of one key"))
                    continue
                key = stem if len(clips) == 1 else f"{stem}-{member.suffix[1:]}"
                at = captions[0] if captions and not listed else None
                place_of_caption = at and (str(at.path), at.offset, at.size, at.suffix)
                found.append(
                    Reference(safe_key(key), origin, str(member.path), member.offset, member.size, place_of_caption)
                )
            elif member.suffix not in CAPTIONS:
                found.append(refuse(member.name, origin, "no clip", f"its ending is {member.suffix or 'absent'}"))
            elif not clips:
                found.append(refuse(member.name, origin, "missing member", "a caption without a clip"))
    return found


def _stem(name: str, shards: bool) -> str:
    path = Path(name)
    return str(path.with_name(path.name.partition(".")[0])) if shards and path.name else str(path.with_suffix(""))


def unique(references: list[Reference]) -> list[Reference]:
    """The same references with keys that differ: where names become alike, their order tells them apart.

    Args:
        references: in an order that follows from the input alone.
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
