"""One unit of work: one part of the inputs through the stages of one pass.

The result is a file of rows. It is published atomically after the part's frames or shards, so a part that a killed
process left unfinished is redone.
"""

from __future__ import annotations

import contextlib
import tarfile
from collections.abc import Iterable, Iterator
from functools import lru_cache, partial
from itertools import groupby
from pathlib import Path
from typing import Any

from webdataset import TarWriter

from mobius_train.data.captions import MAX_CAPTION_BYTES, read_captions
from mobius_train.data.entry import Entry
from mobius_train.data.texts import REPLACED, clean_text
from mobius_train.errors import MobiusError
from mobius_train.files import publish, publish_lines, read_lines
from mobius_train.prepare import frame_store
from mobius_train.prepare.candidate import Candidate, Drop, Dropped
from mobius_train.prepare.encode import STAGE as ENCODE
from mobius_train.prepare.encode import encode_sample, split_of
from mobius_train.prepare.listing import Inputs
from mobius_train.prepare.passes import Pass
from mobius_train.prepare.recipe import PrepareConfig
from mobius_train.prepare.sources.reference import STAGE as SOURCE
from mobius_train.prepare.sources.reference import Reference
from mobius_train.prepare.stages.stage import drop_clip

SPLITS = ("train", "heldout")


def rows_path(work: Path, number: int, part: int) -> Path:
    """The rows of a part after pass `number`; the file marks the part as done."""
    return work / f"pass-{number}" / f"part-{part:06d}.jsonl"


def decision_path(work: Path, number: int) -> Path:
    """The decision at the end of pass `number`."""
    return work / f"decision-{number}.jsonl"


def shard_name(split_name: str, part: int) -> str:
    """The shard's file name in the output folder."""
    return f"{split_name}-{part:06d}.tar"


def run_part(config: PrepareConfig, work: Path, inputs: Inputs, current: Pass, part: int) -> int:
    """Process a part unless it is done; return its number of inputs."""
    target = rows_path(work, current.number, part)
    if not target.exists():
        try:
            _make_part(config, work, inputs.part(part), current, part)
        except OSError:
            # Another task may have finished the part and removed its input frames.
            if not target.exists():
                raise
    return inputs.size(part)


def _make_part(config: PrepareConfig, work: Path, references: list[Reference], current: Pass, part: int) -> None:
    target = rows_path(work, current.number, part)
    clips = _through_stages(current, _groups(work, references, current.number, part))
    if current.decision is None:
        rows = _write_shards(config, part, clips)
    else:
        rows = _write_frames(target.with_suffix(".tar"), clips)
    publish_lines(target, rows)
    if current.number:
        rows_path(work, current.number - 1, part).with_suffix(".tar").unlink(missing_ok=True)


def _through_stages(current: Pass, groups: Iterable[list[Candidate]]) -> Iterator[Candidate]:
    for clips in groups:
        for stage in current.stages:
            try:
                clips = stage.apply(clips)
            except MobiusError:
                raise
            except Exception as error:
                error.add_note(f"in stage {stage.name}, at {clips[0].origin}")
                raise
        yield from clips


def _groups(work: Path, references: list[Reference], number: int, part: int) -> Iterator[list[Candidate]]:
    """Yield the clips of each input after the previous pass."""
    if number == 0:
        for index, reference in enumerate(references):
            yield [_first(reference, index)]
        return
    decided = _decided(decision_path(work, number - 1))
    before = rows_path(work, number - 1, part)
    frames = before.with_suffix(".tar")
    with tarfile.open(frames, "r:") as tar:
        packed = {member.name: member for member in tar}
        rows = enumerate(read_lines(before))
        for index, group in groupby(rows, key=lambda item: item[1]["number"]):
            clips = []
            for row_number, row in group:
                clip = Candidate.of_row(row)
                if clip.dropped is None:
                    clip.dropped = decided.get(clip.key)
                member = packed.get(f"{row_number:06d}.mkv")
                if clip.dropped is None and member is not None:
                    contents = tar.extractfile(member)
                    assert contents is not None
                    clip.frames = frame_store.unpack(contents.read())
                clip.place = references[index].entry()
                clips.append(clip)
            yield clips


@lru_cache(maxsize=1)
def _decided(path: Path) -> dict[str, Drop]:
    return {key: Drop(*why) for key, why in read_lines(path)}


def _first(reference: Reference, number: int) -> Candidate:
    clip = Candidate(reference.key, reference.origin, reference.group, number, labels=list(reference.labels))
    clip.dropped = reference.problem
    if clip.dropped is None:
        clip.place = reference.entry()
        try:
            clip.captions = _captions(reference)
            if any(REPLACED in words for words in clip.captions.values()):
                clip.notes.append(f"invalid UTF-8 in the caption: replaced by {REPLACED}")
        except Dropped as dropped:
            drop_clip(clip, SOURCE, dropped)
    return clip


def _captions(reference: Reference) -> dict[str, str]:
    """Captions by language. A caption without a language counts as English, the default of training."""
    caption = reference.caption
    if caption is None and reference.caption_at is not None:
        path, offset, size, suffix = reference.caption_at
        if size > MAX_CAPTION_BYTES:
            raise Dropped("bad caption", f"{size} bytes")
        entry = Entry(reference.key, (), Path(path), offset, size, suffix, path)
        try:
            caption = read_captions(entry.read_any(), suffix, reference.origin)
        except MobiusError as error:
            raise Dropped("bad caption", error) from error
    if caption is None:
        return {}
    if isinstance(caption, list):
        raise Dropped("several captions", "training reads a list of captions; preparation takes one for each language")
    captions = caption if isinstance(caption, dict) else {"en": caption}
    if not all(isinstance(words, str) and words.strip() for words in captions.values()) or not captions:
        raise Dropped("empty caption")
    return {clean_text(str(language)): clean_text(words.strip()) for language, words in captions.items()}


def _write_frames(path: Path, clips: Iterable[Candidate]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file, contextlib.closing(_tar(file)) as tar:
            for clip in clips:
                if clip.frames is not None:
                    tar.write({"__key__": f"{len(rows):06d}", "mkv": frame_store.pack(clip.frames)})
                rows.append(clip.row())

    publish(path, write)
    return rows


def _write_shards(config: PrepareConfig, part: int, clips: Iterable[Candidate]) -> list[dict[str, Any]]:
    """Write one shard for each split that has clips."""
    rows: list[dict[str, Any]] = []
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in SPLITS}
    for clip in clips:
        if clip.dropped is None:
            try:
                made = encode_sample(clip, config.output)
            except Dropped as dropped:
                drop_clip(clip, ENCODE, dropped)
            else:
                name = split_of(clip.group, config.output)
                samples[name].append(made)
                frames = clip.pixels
                clip.output = {
                    "shard": shard_name(name, part),
                    "num_frames": len(frames),
                    "width": frames.shape[2],
                    "height": frames.shape[1],
                    "bytes": len(made[config.output.format]),
                }
        clip.frames = None
        rows.append(clip.row())
    for name, of_split in samples.items():
        if of_split:
            publish(config.output_dir / shard_name(name, part), partial(_write_tar, of_split))
    return rows


def _write_tar(samples: list[dict[str, Any]], path: Path) -> None:
    with path.open("wb") as file, contextlib.closing(_tar(file)) as tar:
        for each in samples:
            tar.write(each)


def _tar(file: Any) -> TarWriter:
    """A tar writer with fixed time and owner, so that equal clips give equal bytes."""
    return TarWriter(file, mtime=0.0, user="", group="", encoder=False)
