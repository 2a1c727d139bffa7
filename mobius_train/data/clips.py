"""A map-style data set of clips with captions, from shards or a folder.

Access by index allows any number of ranks and workers to split the data set without loss or repetition, and a run to
resume at any position. Tar headers are read once, when the source is opened.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from torch.utils.data import Dataset

from mobius_train.data.buckets import Shape, sort_into
from mobius_train.data.decode import DECODER, check_bytes, decode_clip, shape_of
from mobius_train.data.entry import Entry
from mobius_train.data.folder import read_folder
from mobius_train.data.patterns import local_paths, refuse_address
from mobius_train.data.rank_zero import warn_once
from mobius_train.data.shards import read_shards
from mobius_train.data.texts import REPLACED
from mobius_train.errors import MobiusError

logger = logging.getLogger(__name__)

FINGERPRINT_SPAN = 2**14  # bytes at each end of a clip


class Clip(NamedTuple):
    """frames: (F, 3, H, W) uint8."""

    key: str
    caption: str
    frames: Tensor

    def frame(self, number: int) -> Clip:
        """A clip with this single frame."""
        return self._replace(frames=self.frames[number : number + 1])


class ClipDataset(Dataset[Clip]):
    """Clips by index, in the order of `keys`.

    identity: equal for equal clips and captions that are read with equal settings. Its hash covers keys, captions,
    sizes and both ends of each clip's bytes and the decoder's version, but no paths or times.
    shapes, files: with buckets, the decoded shape of each clip and its shape in the file.
    caption_weights: for each clip with several captions, their weights, by clip index.
    """

    def __init__(self, entries: Sequence[Entry], *, num_frames: int, resolution: int) -> None:
        self.entries = list(entries)
        self.keys = [entry.key for entry in self.entries]
        self.num_frames, self.resolution = num_frames, resolution
        self.shapes: list[Shape] | None = None
        self.files: list[Shape] | None = None
        self.caption_weights = {
            index: tuple(caption.weight for caption in entry.captions)
            for index, entry in enumerate(self.entries)
            if len(entry.captions) > 1
        }
        digest = hashlib.sha256()
        for entry in self.entries:
            check_bytes(entry.size, entry.suffix, entry.name)
            ends = entry.read(FINGERPRINT_SPAN), entry.read_end(FINGERPRINT_SPAN)
            captions = [caption.text.encode() for caption in entry.captions]
            for part in (entry.key.encode(), *captions, str(entry.size).encode(), *ends):
                digest.update(len(part).to_bytes(8, "little") + part)
        self.identity = {
            "clips and captions": digest.hexdigest(),
            "decoder": DECODER,
            "num_frames": str(num_frames),
            "resolution": str(resolution),
        }

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Clip:
        """Decode clip `index`; with its first caption.

        Raises:
            MobiusError: the clip is damaged, too large or too short.
        """
        return self.read(index, 0)

    def read(self, index: int, caption: int) -> Clip:
        """Decode clip `index`; with caption number `caption`. Raises as `__getitem__`."""
        entry = self.entries[index]
        num_frames, size = self.num_frames, (self.resolution, self.resolution)
        if self.shapes is not None:
            num_frames, *sides = self.shapes[index]
            size = (sides[0], sides[1])
        frames = decode_clip(entry.read(), entry.suffix, entry.name, num_frames=num_frames, resolution=size)
        return Clip(entry.key, entry.captions[caption].text, frames)

    def captions(self, index: int) -> list[str]:
        """All captions of clip `index`."""
        return [caption.text for caption in self.entries[index].captions]

    def measure(self, share: int, shares: int) -> list[Shape]:
        """Shapes in the files of the clips of one share: clips share, share + shares, …

        A shape comes from the shard's .json if it is there, and from the clip's headers otherwise.

        Raises:
            MobiusError: a clip is damaged or too large.
        """
        return [
            entry.shape or shape_of(entry.read(), entry.suffix, entry.name) for entry in self.entries[share::shares]
        ]

    def first(self, count: int) -> ClipDataset:
        """The first `count` clips, or all if there are fewer."""
        return self._of(self.entries[:count])

    def _of(self, entries: Sequence[Entry]) -> ClipDataset:
        return ClipDataset(entries, num_frames=self.num_frames, resolution=self.resolution)

    def subset(self, names: Sequence[str]) -> ClipDataset:
        """The clips that have one of the names as their key or as one of their captions, in the same order.

        Raises:
            MobiusError: a name belongs to no clip.
        """
        found: set[str] = set()
        entries = []
        for entry in self.entries:
            matches = {entry.key, *(caption.text for caption in entry.captions)}.intersection(names)
            if matches:
                found |= matches
                entries.append(entry)
        for name in names:
            if name not in found:
                known = {caption.text for entry in self.entries for caption in entry.captions} | set(self.keys)
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise MobiusError(f"data.subset: no clip has the caption or the key {name!r}{hint}")
        return self._of(entries)

    def in_buckets(self, buckets: Sequence[Shape], files: list[Shape]) -> ClipDataset:
        """A copy that decodes each clip to the shape of its best bucket.

        Args:
            files: shape of each clip in its file.

        Raises:
            MobiusError: some clips have too few frames for every bucket.
        """
        clips = copy(self)
        clips.files = files
        clips.shapes = sort_into(buckets, files, lambda index: self.entries[index].name)
        digest = hashlib.sha256(" ".join(map(str, clips.shapes)).encode())
        clips.identity = {
            "clips and captions": self.identity["clips and captions"],
            "decoder": DECODER,
            "frames and size of each clip": digest.hexdigest(),
        }
        return clips


def open_clips(
    source: str | Sequence[Path], *, num_frames: int, resolution: int, caption_language: str = "en"
) -> ClipDataset:
    """Open the clips of a folder, or of shards given as a path, glob, braces (`train-{000000..000003}.tar`) or a list.

    Args:
        num_frames: frames taken at even spacing from each clip; 1 takes the first frame.
        resolution: width and height of the frames in pixels.
        caption_language: language of the captions that are given by language.

    Raises:
        MobiusError: the source is missing, not a local path, empty, damaged or incomplete.
    """
    if num_frames < 1 or resolution < 1:
        raise MobiusError(f"num_frames={num_frames} and resolution={resolution} must be 1 or more")
    if not isinstance(source, str):
        entries = read_shards(source, caption_language)
    else:
        refuse_address(source)
        if os.path.isdir(source):
            entries = read_folder(Path(source), caption_language)
        else:
            entries = read_shards(local_paths(source), caption_language)
    repaired = [entry.name for entry in entries if any(REPLACED in caption.text for caption in entry.captions)]
    if repaired:
        text = f"{len(repaired)} clips have captions with invalid UTF-8, which is replaced by {REPLACED}"
        warn_once(logger, f"{text}; the first is {repaired[0]}")
    repeated = [key for key, count in Counter(entry.key for entry in entries).items() if count > 1]
    if repeated:
        location = source if isinstance(source, str) else source[0].parent
        places = ", ".join(entry.name for entry in entries if entry.key == repeated[0])
        raise MobiusError(
            f"{len(repeated)} keys occur more than once in {location}: the first is {repeated[0]}, in {places}"
        )
    return ClipDataset(entries, num_frames=num_frames, resolution=resolution)


def describe_source(source: str) -> str:
    """Describe a source by its file names and sizes; equal files give equal text on every machine.

    Raises:
        MobiusError: the source is missing or not a local path.
    """
    refuse_address(source)
    paths = sorted(Path(source).iterdir()) if os.path.isdir(source) else local_paths(source)
    # A folder may hold a million clips, so only the sizes of shards are read.
    sizes = [path.stat().st_size if path.suffix == ".tar" else 0 for path in paths]
    digest = hashlib.sha256(repr([(path.name, size) for path, size in zip(paths, sizes, strict=True)]).encode())
    return f"{len(paths)} files ({digest.hexdigest()[:8]})"
