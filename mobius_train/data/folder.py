"""Clips as files: a folder of a.gif with a.txt, or a list with file names and captions, alone or in the folder."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mobius_train.data.captions import MAX_CAPTION_BYTES, Caption, caption_of, read_caption
from mobius_train.data.captions import SUFFIXES as CAPTIONS
from mobius_train.data.entry import Entry
from mobius_train.data.kinds import CLIP_SUFFIXES as CLIPS
from mobius_train.data.metadata import LISTS, BadLine, file_name_of, metadata_records
from mobius_train.data.rank_zero import warn_on_rank_zero
from mobius_train.data.texts import clean_text, is_regular, legible_name, read_small_file
from mobius_train.errors import MobiusError
from mobius_train.media.clip_files import METADATA_NAME

logger = logging.getLogger(__name__)

METADATA = (METADATA_NAME, "metadata.csv")
# Other programs write files of these names for other purposes, so they only serve clips that have no caption.
LATER_METADATA = tuple(f"metadata{suffix}" for suffix in LISTS)


def read_folder(folder: Path, caption_language: str, folder_captions: bool = False) -> list[Entry]:
    """The clips of a folder, its subfolders and linked folders, sorted by name; keys are paths without suffix.

    Clips whose paths differ only in the suffix are clips of their own, as in preparation, and have it in their keys. If
    there is a metadata.jsonl or .csv, exactly the clips it lists are used. Otherwise the caption of a clip is in a .txt
    or .json of its own name, or in the nearest metadata file of the folders above it; a clip that this does not list is
    left out. A warning counts and names the files that are left out.

    Args:
        folder_captions: the caption of a clip that has none is the name of its folder, with spaces for _ and -.

    Raises:
        MobiusError: there is no clip, a clip has no caption, or a metadata line names no clip of the folder.
    """
    metadata = _only_one(folder, METADATA)
    if metadata is not None:
        entries = _listed(folder, metadata, caption_language)
    else:
        entries = _paired(folder, caption_language, folder_captions)
    return sorted(_with_distinct_keys(folder, entries))


def read_list(metadata: Path, caption_language: str) -> list[Entry]:
    """The clips of a list (.jsonl, .csv, .json or .parquet), whose file names are relative to its folder.

    Raises:
        MobiusError: it is empty or damaged, a line names no clip, or a clip has no caption.
    """
    return sorted(_with_distinct_keys(metadata.parent, _of_list(metadata.parent, metadata, caption_language)))


def _only_one(folder: Path, names: Sequence[str]) -> Path | None:
    """The metadata file of a folder.

    Raises:
        MobiusError: there is more than one.
    """
    found = [folder / name for name in names if (folder / name).exists()]
    if len(found) > 1:
        raise MobiusError(f"{folder} has both {' and '.join(path.name for path in found)}: keep only one")
    return found[0] if found else None


def _with_distinct_keys(folder: Path, entries: list[Entry]) -> list[Entry]:
    paths: dict[str, set[Path]] = defaultdict(set)
    for entry in entries:
        paths[entry.key].add(entry.path)
    shared = sorted(path for group in paths.values() if len(group) > 1 for path in group)
    if shared:
        text = f"{len(shared)} clips share a name and a caption; each is used"
        warn_on_rank_zero(logger, f"{folder}: {text} (the first is {legible_name(shared[0].name)})")
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
        warn_on_rank_zero(logger, f"{folder}: left out are {'; '.join(lists)}")


def _entry(folder: Path, path: Path, captions: tuple[Caption, ...]) -> Entry:
    key = legible_name(path.relative_to(folder).with_suffix("").as_posix())
    return Entry(key, captions, path, 0, path.stat().st_size, path.suffix.lower(), legible_name(str(path)))


def _paired(folder: Path, language: str, folder_captions: bool) -> list[Entry]:
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
        if not kinds:
            raise MobiusError(f"{folder} is empty: it must contain clips ({' '.join(CLIPS)})")
        contents = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        hint = f". For shards give a pattern: {folder}/*.tar" if ".tar" in kinds else ""
        raise MobiusError(f"{folder} contains no clips ({' '.join(CLIPS)}), only {contents}{hint}")
    own = [path for path in clips if path.with_suffix("") in captions]
    bare = sorted(path for path in clips if path.with_suffix("") not in captions)
    entries = [_entry(folder, path, _caption(path, captions[path.with_suffix("")], language)) for path in own]
    lists = _lists_above(folder, bare)
    listed: dict[str, list[Entry]] = defaultdict(list)
    for metadata in sorted(set(lists.values())):
        for entry in _of_list(folder, metadata, language):
            listed[os.path.normpath(entry.path)].append(entry)
    entries += [entry for path in bare for entry in listed.get(os.path.normpath(path), [])]
    bare = [path for path in bare if os.path.normpath(path) not in listed]
    if folder_captions:
        entries += [_entry(folder, path, (Caption(_folder_name(path)),)) for path in bare]
    elif alone := [path for path in bare if path.parent not in lists]:
        first = legible_name(alone[0].with_suffix("").name)
        raise MobiusError(
            f"{len(alone)} of {len(clips)} clips in {folder} have no caption: add {first}.txt for"
            f" {first}{alone[0].suffix}, or a metadata.jsonl for the folder; folder_captions=true of a set takes the"
            " names of the clips' folders"
        )
    else:
        left_out += [(path, f"clips that {lists[path.parent].name} does not list") for path in bare]
    if not entries:
        raise MobiusError(f"{folder}: {next(iter(lists.values()))} lists none of its {len(clips)} clips")
    used = {path.with_suffix("") for path in (*clips, *lists.values())}
    left_out += [(path, "captions without a clip") for stem in captions if stem not in used for path in captions[stem]]
    read = set(lists.values())
    _warn_left_out(folder, ((path, reason) for path, reason in left_out if path not in read))
    return entries


def _lists_above(folder: Path, clips: Sequence[Path]) -> dict[Path, Path]:
    """The nearest metadata file of each clip's folder, inside of `folder`, by the clip's folder."""
    found: dict[Path, Path] = {}
    for place in {path.parent for path in clips}:
        inside = place.relative_to(folder)
        for above in (inside, *inside.parents) if inside.parts else (inside,):
            metadata = _only_one(folder / above, LATER_METADATA)
            if metadata is not None:
                found[place] = metadata
                break
    return found


def _folder_name(clip: Path) -> str:
    """The name of a clip's folder in words."""
    # The recipe's folder can be ".".
    name = clip.parent.name or clip.parent.resolve().name
    return clean_text(re.sub(r"[\s_-]+", " ", name).strip()) or name


def _caption(clip: Path, captions: list[Path], language: str) -> tuple[Caption, ...]:
    """The captions of a clip; .txt is preferred to .json, which often contains other data."""
    path = min(captions, key=lambda caption: CAPTIONS.index(caption.suffix.lower()))
    data = read_small_file(path, MAX_CAPTION_BYTES)
    return read_caption(data, path.suffix.lower(), legible_name(str(clip)), language)


def _listed(folder: Path, metadata: Path, language: str) -> list[Entry]:
    entries = _of_list(folder, metadata, language)
    listed = {path.with_suffix("") for path in (entry.path for entry in entries)}
    files = ((path, reason) for path, reason in walk_files(folder) if path.suffix.lower() in CLIPS)
    # A listed clip may lie in several formats.
    unlisted = ((path, reason) for path, reason in files if path.with_suffix("") not in listed)
    _warn_left_out(folder, ((path, reason or f"clips that {metadata.name} does not list") for path, reason in unlisted))
    return entries


def _of_list(folder: Path, metadata: Path, language: str) -> list[Entry]:
    """The clips of a list; keys are relative to `folder`."""
    entries = [_listed_entry(folder, metadata, where, record, language) for where, record in metadata_records(metadata)]
    if not entries:
        raise MobiusError(f"{metadata} lists no clips: it is empty")
    return entries


def _listed_entry(folder: Path, metadata: Path, where: str, record: Any, language: str) -> Entry:
    if isinstance(record, BadLine):
        raise MobiusError(f"{where} is {record.reason}")
    try:
        name = file_name_of(record)
    except ValueError as error:
        raise MobiusError(f"{where} {error}") from error
    legible = legible_name(name)
    path = metadata.parent / name
    if os.path.isabs(name) or os.path.normpath(name).startswith(".."):
        raise MobiusError(f"{where}: {legible} is outside the folder")
    if path.suffix.lower() not in CLIPS:
        raise MobiusError(f"{where}: {legible} is not a clip: supported are {', '.join(CLIPS)}")
    if not is_regular(path):
        raise MobiusError(f"{where}: there is no file {metadata.parent / legible}")
    return _entry(folder, path, caption_of(record, where, language))
