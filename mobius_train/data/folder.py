"""A folder of clips: a.gif with a.txt, or a metadata.jsonl or metadata.csv with file names and captions."""

from __future__ import annotations

import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mobius_train.data.captions import MAX_CAPTION_BYTES, Caption, caption_of, read_caption
from mobius_train.data.captions import SUFFIXES as CAPTIONS
from mobius_train.data.entry import Entry
from mobius_train.data.kinds import CLIP_SUFFIXES as CLIPS
from mobius_train.data.metadata import BadLine, metadata_records
from mobius_train.data.rank_zero import warn_once
from mobius_train.data.texts import is_regular, legible_name, read_small_file
from mobius_train.errors import MobiusError
from mobius_train.media.clip_files import METADATA_NAME

logger = logging.getLogger(__name__)

METADATA = (METADATA_NAME, "metadata.csv")


def read_folder(folder: Path, caption_language: str) -> list[Entry]:
    """The clips of a folder, its subfolders and linked folders, sorted by name; keys are paths without suffix.

    Clips whose paths differ only in the suffix are clips of their own, as in preparation, and have it in their keys. If
    there is a metadata file, exactly the clips it lists are used. Otherwise every clip needs a .txt or .json of its own
    name. A warning counts and names the files that are left out.

    Raises:
        MobiusError: there is no clip, a clip has no caption, or a metadata line names no clip of the folder.
    """
    metadata = [folder / name for name in METADATA if (folder / name).exists()]
    if len(metadata) > 1:
        raise MobiusError(f"{folder} has both {' and '.join(METADATA)}: keep only one")
    entries = _listed(folder, metadata[0], caption_language) if metadata else _paired(folder, caption_language)
    return sorted(_with_distinct_keys(folder, entries))


def _with_distinct_keys(folder: Path, entries: list[Entry]) -> list[Entry]:
    paths: dict[str, set[Path]] = defaultdict(set)
    for entry in entries:
        paths[entry.key].add(entry.path)
    shared = sorted(path for group in paths.values() if len(group) > 1 for path in group)
    if shared:
        text = f"{len(shared)} clips share a name and a caption; each is used"
        warn_once(logger, f"{folder}: {text} (the first is {legible_name(shared[0].name)})")
    return [
        entry._replace(key=f"{entry.key}-{entry.suffix[1:]}") if len(paths[entry.key]) > 1 else entry
        for entry in entries
    ]


def walk_files(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """Yield every file of a folder, its subfolders and linked folders, with the reason not to read it, if any.

    A linked folder is read once, after the folders themselves, so that cycles of links end.
    """
    seen: set[tuple[int, int]] = set()
    waiting = [folder]
    while waiting:
        top, links = waiting.pop(0), []
        unreadable: list[OSError] = []
        for place, folders, names in os.walk(top, onerror=unreadable.append):
            status = os.stat(place)
            if (status.st_dev, status.st_ino) in seen:
                folders.clear()
                if place == str(top):
                    yield Path(place), "linked folders that were already read"
                continue
            seen.add((status.st_dev, status.st_ino))
            folders.sort()
            links += [Path(place, name) for name in folders if os.path.islink(os.path.join(place, name))]
            for name in sorted(names):
                path = Path(place, name)
                if name.startswith("."):
                    yield path, "hidden files"
                else:
                    yield path, None if is_regular(path) else "broken links, pipes and devices"
        for error in unreadable:
            yield Path(error.filename), f"folders that cannot be read ({error.strerror})"
        waiting += links


def _warn_left_out(folder: Path, left_out: Iterable[tuple[Path, str]]) -> None:
    """Count and name the files that are not used, by reason."""
    by_reason: dict[str, list[Path]] = defaultdict(list)
    for path, reason in left_out:
        by_reason[reason].append(path)
    lists = []
    for reason, paths in by_reason.items():
        first = legible_name(str(paths[0].relative_to(folder)))
        lists.append(f"{len(paths)} {reason} ({first}{', …' if len(paths) > 1 else ''})")
    if lists:
        warn_once(logger, f"{folder}: left out are {'; '.join(lists)}")


def _entry(folder: Path, path: Path, captions: tuple[Caption, ...]) -> Entry:
    key = legible_name(path.relative_to(folder).with_suffix("").as_posix())
    return Entry(key, captions, path, 0, path.stat().st_size, path.suffix.lower(), legible_name(str(path)))


def _paired(folder: Path, language: str) -> list[Entry]:
    clips: list[Path] = []
    captions: dict[Path, list[Path]] = defaultdict(list)
    left_out: list[tuple[Path, str]] = []
    kinds: Counter[str] = Counter()
    for path, reason in walk_files(folder):
        suffix = path.suffix.lower()
        if reason is not None:
            left_out.append((path, reason))
            continue
        kinds[suffix or "without suffix"] += 1
        if suffix in CLIPS:
            clips.append(path)
        elif suffix in CAPTIONS:
            captions[path.with_suffix("")].append(path)
        else:
            left_out.append((path, f"{suffix} files" if suffix else "files without suffix"))
    if not clips:
        contents = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()) or "nothing"
        hint = f". For shards give a pattern: {folder}/*.tar" if ".tar" in kinds else ""
        raise MobiusError(f"{folder} contains no clips ({' '.join(CLIPS)}), only {contents}{hint}")
    bare = sorted(path for path in clips if path.with_suffix("") not in captions)
    if bare:
        first = legible_name(bare[0].with_suffix("").name)
        raise MobiusError(
            f"{len(bare)} of {len(clips)} clips in {folder} have no caption: add {first}.txt for"
            f" {first}{bare[0].suffix}, or a metadata.jsonl for the folder"
        )
    used = {path.with_suffix("") for path in clips}
    left_out += [(path, "captions without a clip") for stem in captions if stem not in used for path in captions[stem]]
    _warn_left_out(folder, left_out)
    return [_entry(folder, path, _caption(path, captions[path.with_suffix("")], language)) for path in clips]


def _caption(clip: Path, captions: list[Path], language: str) -> tuple[Caption, ...]:
    """The captions of a clip; .txt is preferred to .json, which often contains other data."""
    path = min(captions, key=lambda caption: CAPTIONS.index(caption.suffix.lower()))
    data = read_small_file(path, MAX_CAPTION_BYTES)
    return read_caption(data, path.suffix.lower(), legible_name(str(clip)), language)


def _listed(folder: Path, metadata: Path, language: str) -> list[Entry]:
    entries = [_listed_entry(folder, where, record, language) for where, record in metadata_records(metadata)]
    if not entries:
        raise MobiusError(f"{metadata} lists no clips: it is empty")
    listed = {path.with_suffix("") for path in (entry.path for entry in entries)}
    files = ((path, reason) for path, reason in walk_files(folder) if path.suffix.lower() in CLIPS)
    # A listed clip may lie in several formats.
    unlisted = ((path, reason) for path, reason in files if path.with_suffix("") not in listed)
    _warn_left_out(folder, ((path, reason or f"clips that {metadata.name} does not list") for path, reason in unlisted))
    return entries


def _listed_entry(folder: Path, where: str, record: Any, language: str) -> Entry:
    if isinstance(record, BadLine):
        raise MobiusError(f"{where} is {record.reason}")
    name = record.get("file_name") if isinstance(record, dict) else None
    if not isinstance(name, str) or not name:
        raise MobiusError(f'{where} has no "file_name"')
    legible = legible_name(name)
    path = folder / name
    if os.path.isabs(name) or os.path.normpath(name).startswith(".."):
        raise MobiusError(f"{where}: {legible} is outside the folder")
    if path.suffix.lower() not in CLIPS:
        raise MobiusError(f"{where}: {legible} is not a clip: supported are {', '.join(CLIPS)}")
    if not is_regular(path):
        raise MobiusError(f"{where}: there is no file {folder / legible}")
    return _entry(folder, path, caption_of(record, where, language))
