"""What is taken of each set of clips, in words: clips, windows, repetitions, frames and their rate."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mobius_train.data.clips import ClipDataset
from mobius_train.data.decode import frame_durations

Indices = NDArray[np.int64]

WINDOWS = {
    "whole": "evenly over each clip",
    "start": "the first window of each clip",
    "random": "a random window of each clip",
}
MEASURED = 8  # clips of a set whose rate is read, spread evenly over it


def describe_sets(clips: ClipDataset) -> dict[str, str]:
    """A text for each set, by its number; for a single set by "frames".

    Raises:
        MobiusError: a clip is damaged or too large.
    """
    sets = clips.entries.sets
    if len(clips.sets) == 1:
        # Random clips of a measurement have no files.
        return {"frames": _frames(clips, np.arange(len(sets)))} if len(sets) else {}
    described = {}
    for number, (name, repeats) in enumerate(clips.sets):
        indices = np.flatnonzero(sets == number)
        times = f" x {repeats}" if repeats > 1 else ""
        frames = _frames(clips, indices) if len(indices) else "left out"
        described[f"set {number}"] = f"{name}: {_files(clips, indices)} clips{times}; {frames}"
    return described


def _frames(clips: ClipDataset, indices: Indices) -> str:
    counts = _counts(clips, indices)
    frames = " or ".join(map(str, np.unique(counts)))
    rate = _rate(clips, indices[counts > 1])
    if clips.choice.window == "all":
        window = f"{len(indices)} windows of {_files(clips, indices)} clips"
    else:
        window = WINDOWS[clips.choice.window]
    return f"{frames} frame{'s' if max(counts) > 1 else ''}{rate}, {window}"


def _files(clips: ClipDataset, indices: Indices) -> int:
    """The clips that the windows are of."""
    if clips.places is None:
        return len(indices)
    return len({clips.entries.keys[index] for index in indices.tolist()})


def _counts(clips: ClipDataset, indices: Indices) -> Indices:
    """The frames of each."""
    if clips.shapes is None:
        return np.full(len(indices), clips.num_frames)
    return np.array([shape.num_frames for shape in clips.shapes.values])[clips.shapes.codes[indices]]


def _rate(clips: ClipDataset, indices: Indices) -> str:
    """The rate of the frames that are taken, measured on some clips if the recipe does not tell it."""
    if not len(indices):
        return ""
    choice = clips.choice
    if choice.rate is not None:
        return f" at {choice.rate / choice.stride:g} fps"
    chosen = indices[:: -(-len(indices) // MEASURED)]
    rates = []
    for index, count in zip(chosen.tolist(), _counts(clips, chosen).tolist(), strict=True):
        entry = clips.entries[index]
        durations = frame_durations(entry.read(), entry.suffix, entry.name)
        rates.append(choice.shown_rate(durations, count))
    low, high = f"{min(rates):.3g}", f"{max(rates):.3g}"
    span = low if low == high else f"{low} to {high}"
    measured = f" ({len(chosen)} of {len(indices)} measured)" if len(chosen) < len(indices) else ""
    return f" at {span} fps{measured}"
