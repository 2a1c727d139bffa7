"""A map-style data set of clips with captions, from shards or a folder.

Access by index allows any number of ranks and workers to split the data set without loss or repetition, and a run to
resume at any position. Tar headers are read once, when the source is opened.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mobius_train.bars import DELAY, progress
from mobius_train.data.buckets import Shape, sort_into
from mobius_train.data.decode import DECODER, decode_clip, shape_of
from mobius_train.data.entry import Entry, hash_clips
from mobius_train.data.entry_list import EntryList
from mobius_train.data.folder import read_folder, read_list
from mobius_train.data.metadata import LISTS
from mobius_train.data.packed import Coded, Packed, repeated
from mobius_train.data.patterns import local_paths, refuse_address
from mobius_train.data.rank_zero import warn_on_rank_zero
from mobius_train.data.sets import NamedSet
from mobius_train.data.shards import read_shards
from mobius_train.data.texts import REPLACED
from mobius_train.data.windows import START, WHOLE, FrameChoice, window_places
from mobius_train.errors import MobiusError
from mobius_train.job.distributed import Distributed

logger = logging.getLogger(__name__)

# Bytes of a data set whose clips are hashed whole at each start, which takes a few seconds of a core.
HASHED_WHOLE = 2**30
# Bytes at each end of a clip that are hashed if the data set is larger.
HASHED_ENDS = 2**14
MAX_TURNS = 2**26  # their order is half a gigabyte


class Clip(NamedTuple):
    """frames: (F, 3, H, W) uint8."""

    key: str
    caption: str
    frames: Tensor

    def frame(self, number: int) -> Clip:
        """A clip with this single frame."""
        return self._replace(frames=self.frames[number : number + 1])


class ClipDataset(Dataset[Clip]):
    """Clips by index, in the order of `keys`. If all windows of a clip are taken, each window is a clip of its own.

    identity: equal for equal clips and captions that are read with equal settings: `fingerprint`, the decoder's version
    and the settings.
    choice: which frames of a clip are taken.
    sets: of which the clips are; see `Entry.set`.
    shapes, files: with buckets, the decoded shape of each clip and its shape in the file.
    places: of each clip's window; see `window_start`.
    caption_weights: for each clip with several captions, their weights, by clip index.

    Args:
        found: `fingerprint(entries)`, which reads every clip's file; computed here by default.
    """

    keys: Sequence[str]

    def __init__(
        self,
        entries: Iterable[Entry],
        *,
        num_frames: int,
        resolution: int,
        choice: FrameChoice = WHOLE,
        sets: Sequence[NamedSet] = (NamedSet(),),
        found: str | None = None,
    ) -> None:
        self.entries = entries if isinstance(entries, EntryList) else EntryList(entries)
        self.keys = self.entries.keys
        self.num_frames, self.resolution, self.choice, self.sets = num_frames, resolution, choice, tuple(sets)
        self.shapes: Coded[Shape] | None = None
        self.files: Coded[Shape] | None = None
        self.places: Coded[Fraction] | None = None
        self.identity = {
            "clips and captions": fingerprint(self.entries) if found is None else found,
            "decoder": DECODER,
            "num_frames": str(num_frames),
            "resolution": str(resolution),
            **choice.identity(),
        }

    @property
    def caption_weights(self) -> Mapping[int, tuple[float, ...]]:
        return _CaptionWeights(self.entries)

    @property
    def turns(self) -> Tensor | None:
        """(T,), the clips of an epoch, each as often as its set is repeated; None if each comes once.

        Raises:
            MobiusError: they are more than MAX_TURNS.
        """
        if all(one.repeats == 1 for one in self.sets):
            return None
        repeats = torch.tensor([one.repeats for one in self.sets])[torch.tensor(self.entries.sets)]
        if bool((repeats == 1).all()):
            return None
        total = int(repeats.sum())
        if total > MAX_TURNS:
            raise MobiusError(f"an epoch has {total} samples; the limit is {MAX_TURNS}: lower data.train's repeats")
        return torch.arange(len(repeats)).repeat_interleave(repeats)

    @property
    def epoch(self) -> int:
        """The number of samples of an epoch."""
        turns = self.turns
        return len(self) if turns is None else len(turns)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Clip:
        """Decode clip `index`; with its first caption.

        Raises:
            MobiusError: the clip is damaged, too large or too short.
        """
        return self.read(index, 0)

    def read(self, index: int, caption: int, place: Fraction | None = None) -> Clip:
        """Decode clip `index`; with caption number `caption`. Raises as `__getitem__`.

        Args:
            place: of a random window; default: the clip's own.
        """
        entry = self.entries[index]
        num_frames, size = self.num_frames, (self.resolution, self.resolution)
        if self.shapes is not None:
            num_frames, *sides = self.shapes[index]
            size = (sides[0], sides[1])
        if place is None:
            place = START if self.places is None else self.places[index]
        frames = decode_clip(
            entry.read(),
            entry.suffix,
            entry.name,
            num_frames=num_frames,
            resolution=size,
            choice=self.choice,
            place=place,
        )
        # With several windows the key is not the entry's.
        return Clip(self.keys[index], entry.captions[caption].text, frames)

    def captions(self, index: int) -> list[str]:
        """All captions of clip `index`."""
        return [caption.text for caption in self.entries[index].captions]

    def measure(self, share: int, shares: int) -> Coded[Shape]:
        """Shapes in the files of the clips of one share: clips share, share + shares, …

        Frames are counted at the rate and stride of `choice`. A shape comes from the shard's .json if it is there, and
        from the clip's headers otherwise.

        Raises:
            MobiusError: a clip is damaged or too large.
        """
        return Coded(self._measured(self.entries[index]) for index in range(share, len(self), shares))

    def _measured(self, entry: Entry) -> Shape:
        if entry.shape is None or self.choice.rate is not None:
            return shape_of(entry.read(), entry.suffix, entry.name, self.choice)
        return entry.shape._replace(num_frames=self.choice.available(entry.shape.num_frames))

    def in_buckets(self, buckets: Sequence[Shape], files: Sequence[Shape]) -> ClipDataset:
        """A copy that decodes each clip to the shape of its best bucket.

        Args:
            files: shape of each clip in its file.

        Raises:
            MobiusError: some clips have too few frames for every bucket.
        """
        clips = copy(self)
        clips.files = Coded.of(files)
        clips.shapes = sort_into(buckets, clips.files, lambda index: self.entries[index].name)
        digest = _joined_sha256(clips.shapes)
        clips.identity = {
            "clips and captions": self.identity["clips and captions"],
            "decoder": DECODER,
            "frames and size of each clip": digest,
            **self.choice.identity(),
        }
        return clips

    def in_windows(self, files: Sequence[Shape]) -> ClipDataset:
        """A copy in which each window is a clip of its own, if all windows are taken.

        Args:
            files: of `measure`.

        Raises:
            MobiusError: without buckets, some clips are shorter than a window.
        """
        counts = [self.num_frames] * len(files) if self.shapes is None else [shape.num_frames for shape in self.shapes]
        short = [index for index, file in enumerate(files) if file.num_frames < counts[index]]
        if short:
            first, what = short[0], f"{len(short)} of {len(files)} clips are"
            raise self.choice.too_short(self.entries[first].name, files[first].num_frames, counts[first], what)
        clips = copy(self)
        if self.choice.window != "all":
            return clips
        places = [
            window_places(file.num_frames, count, self.choice.most) for file, count in zip(files, counts, strict=True)
        ]
        of_clip = [index for index, found in enumerate(places) for _ in found]
        clips.places = Coded(place for found in places for place in found)
        clips.entries = self.entries.chosen(of_clip)
        clips.keys = Packed(
            f"{key}#{number}" if len(found) > 1 else key
            for key, found in zip(self.keys, places, strict=True)
            for number in range(len(found))
        )
        if self.shapes is not None:
            clips.shapes = Coded(self.shapes[index] for index in of_clip)
            clips.files = Coded(files[index] for index in of_clip)
        clips.identity = self.identity | {"windows of each clip": _joined_sha256(map(len, places))}
        return clips


class _CaptionWeights(Mapping[int, tuple[float, ...]]):
    """The weights of the captions of each clip that has several, by clip index."""

    def __init__(self, entries: EntryList) -> None:
        self._entries = entries

    def __getitem__(self, index: int) -> tuple[float, ...]:
        captions = self._entries[index].captions
        if len(captions) < 2:
            raise KeyError(index)
        return tuple(caption.weight for caption in captions)

    def __iter__(self) -> Iterator[int]:
        return iter(self._entries.with_several_captions)

    def __len__(self) -> int:
        return len(self._entries.with_several_captions)


def fingerprint(entries: Sequence[Entry]) -> str:
    """A hash of keys, captions, sizes and each clip's bytes, but of no paths or times.

    Of a data set larger than `HASHED_WHOLE` it takes both ends of each clip's bytes.

    Raises:
        MobiusError: a clip cannot be read, or is too large.
    """
    digest = hashlib.sha256()
    sizes = accumulate(entry.size for entry in entries)
    ends = HASHED_ENDS if any(size > HASHED_WHOLE for size in sizes) else None
    clips = hash_clips(entries, ends)
    for entry, content in progress(
        clips, desc="hashing clips", total=len(entries), unit="clip", delay=DELAY, leave=False
    ):
        captions = [caption.text.encode() for caption in entry.captions]
        for part in (entry.key.encode(), *captions, str(entry.size).encode(), content):
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _joined_sha256(values: Iterable[object]) -> str:
    """The hash of the values as text, with spaces between them."""
    digest = hashlib.sha256()
    for number, value in enumerate(values):
        digest.update(f"{' ' if number else ''}{value}".encode())
    return digest.hexdigest()


def open_clips(
    source: str | Sequence[Path], *, num_frames: int, resolution: int, caption_language: str = "en"
) -> ClipDataset:
    """Open the clips of one source; see `find_clips`.

    Args:
        num_frames: frames taken at even spacing from each clip; 1 takes the first frame.
        resolution: width and height of the frames in pixels.
        caption_language: language of the captions that are given by language.

    Raises:
        MobiusError: the source is missing, not a local path, empty, damaged or incomplete.
    """
    if num_frames < 1 or resolution < 1:
        raise MobiusError(f"num_frames={num_frames} and resolution={resolution} must be 1 or more")
    return ClipDataset(find_clips(source, caption_language), num_frames=num_frames, resolution=resolution)


def find_clips(
    source: str | Sequence[Path],
    caption_language: str,
    folder_captions: bool = False,
    distributed: Distributed | None = None,
) -> EntryList:
    """The clips of a folder or a list, or of shards given as a path, glob, braces (`train-{000000..000003}.tar`).

    Args:
        folder_captions: see `read_folder`.
        distributed: see `read_shards`.

    Raises:
        MobiusError: the source is missing, not a local path, empty, damaged or incomplete.
    """
    if folder_captions and not (isinstance(source, str) and os.path.isdir(source)):
        raise MobiusError(f"folder_captions takes the names of folders, but {source} is none: remove it")
    if not isinstance(source, str):
        entries = read_shards(source, caption_language, distributed)
    else:
        refuse_address(source)
        if os.path.isdir(source):
            entries = EntryList(read_folder(Path(source), caption_language, folder_captions))
        elif source.lower().endswith(LISTS) and os.path.exists(source):
            entries = EntryList(read_list(Path(source), caption_language))
        else:
            entries = read_shards(local_paths(source), caption_language, distributed)
    repaired = [entry.name for entry in entries if any(REPLACED in caption.text for caption in entry.captions)]
    if repaired:
        text = f"{len(repaired)} clips have captions with invalid UTF-8, which is replaced by {REPLACED}"
        warn_on_rank_zero(logger, f"{text}; the first is {repaired[0]}")
    if again := repeated(entries.keys):
        location = source if isinstance(source, str) else source[0].parent
        places = ", ".join(entry.name for entry in entries if entry.key == again[0])
        raise MobiusError(f"{len(again)} keys occur more than once in {location}: the first is {again[0]}, in {places}")
    return entries


def describe_source(source: str) -> str:
    """Describe a source by its file names and sizes; equal files give equal text on every machine.

    Raises:
        MobiusError: the source is missing or not a local path.
    """
    refuse_address(source)
    paths = sorted(Path(source).iterdir()) if os.path.isdir(source) else local_paths(source)
    # A folder may hold a million clips, so only the sizes of shards and lists are read.
    sizes = [path.stat().st_size if path.suffix in (".tar", *LISTS) else 0 for path in paths]
    digest = hashlib.sha256(repr([(path.name, size) for path, size in zip(paths, sizes, strict=True)]).encode())
    return f"{len(paths)} files ({digest.hexdigest()[:8]})"
