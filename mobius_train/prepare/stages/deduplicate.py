"""Exact and perceptual deduplication over all clips.

The perceptual hash is imagehash's phash, 64 bits of a frame's lowest frequencies, of `looks` frames. Two clips look the
same if at most `max_distance` bits of each frame's hash differ. To avoid comparing all pairs, hashes are split into
d + 1 bands: if at most d bits differ, at least one band is equal, and a table finds clips with an equal band.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import imagehash
import numpy as np
from PIL import Image
from pydantic import Field

from mobius_train.prepare.candidate import Candidate, Drop
from mobius_train.prepare.stages.stage import GlobalStage

BITS = 64


class Deduplicate(GlobalStage):
    """Keeps the first of all clips that have the same pixels or look the same."""

    name: Literal["deduplicate"]
    perceptual: bool = True
    max_distance: int = Field(2, ge=0, le=15, description="differing bits of 64 in each frame's hash")
    looks: int = Field(3, ge=1, description="number of compared frames, evenly spaced")
    colour: float = Field(4.0, ge=0, description="largest difference of mean colours, of 255, to look the same")

    def measure(self, clip: Candidate) -> None:
        frames = clip.pixels
        digest = hashlib.sha256(repr(frames.shape).encode() + np.ascontiguousarray(frames).tobytes())
        clip.scores[self.name] = {"pixels": digest.hexdigest()[:32]}
        if self.perceptual:
            chosen = [frames[(2 * number + 1) * len(frames) // (2 * self.looks)] for number in range(self.looks)]
            hashes = [str(imagehash.phash(Image.fromarray(frame))) for frame in chosen]
            colours = [[round(float(value), 1) for value in frame.mean(axis=(0, 1))] for frame in chosen]
            clip.scores[self.name] |= {"looks": hashes, "colours": colours}

    def decide(self, rows: Iterable[dict[str, Any]]) -> dict[str, Drop]:
        exact: dict[str, str] = {}
        similar = _Similar(self.max_distance, self.colour)
        dropped: dict[str, Drop] = {}
        for row in rows:
            key, score = row["key"], row["scores"][self.name]
            first = exact.setdefault(score["pixels"], key)
            if first != key:
                dropped[key] = Drop(self.name, "duplicate", f"of {first}")
            elif self.perceptual:
                like = similar.find_or_add(key, score["looks"], score["colours"])
                if like is not None:
                    dropped[key] = Drop(self.name, "looks the same", f"as {like}")
        return dropped


class _Similar:
    """A table of clips that finds a clip by a hash with a few differing bits."""

    def __init__(self, max_distance: int, colour: float) -> None:
        self.max_distance, self.colour = max_distance, colour
        self.seen: list[tuple[str, list[int], np.ndarray[Any, Any]]] = []
        self.bands: dict[tuple[int, int], list[int]] = defaultdict(list)

    def find_or_add(self, key: str, looks: list[str], colours: list[list[float]]) -> str | None:
        """Return the first clip that looks the same; if there is none, add this clip and return None."""
        hashes, means = [int(look, 16) for look in looks], np.array(colours)
        candidates = sorted({number for band in self._bands_of(hashes[0]) for number in self.bands[band]})
        for number in candidates:
            other, other_hashes, other_means = self.seen[number]
            near = all((a ^ b).bit_count() <= self.max_distance for a, b in zip(hashes, other_hashes, strict=True))
            if near and float(np.abs(means - other_means).max()) <= self.colour:
                return other
        for band in self._bands_of(hashes[0]):
            self.bands[band].append(len(self.seen))
        self.seen.append((key, hashes, means))
        return None

    def _bands_of(self, value: int) -> Iterator[tuple[int, int]]:
        count = self.max_distance + 1
        for number in range(count):
            low, high = number * BITS // count, (number + 1) * BITS // count
            yield number, value >> low & ((1 << (high - low)) - 1)
