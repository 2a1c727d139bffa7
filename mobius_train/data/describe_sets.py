"""What is taken of each set of clips, in words: clips, windows, repetitions, frames and their rate."""

from __future__ import annotations

from collections import Counter

from mobius_train.data.clips import ClipDataset
from mobius_train.data.decode import frame_durations

MEASURED = 8  # clips of a set whose rate is read, spread evenly over it


def describe_sets(clips: ClipDataset) -> dict[str, str]:
    """A text for each set, by its number; for a single set by "frames".

    Raises:
        MobiusError: a clip is damaged or too large.
    """
    of_set: dict[int, list[int]] = {}
    for index, entry in enumerate(clips.entries):
        of_set.setdefault(entry.set, []).append(index)
    if len(clips.sets) == 1:
        # Random clips of a measurement have no files.
        return {"frames": _frames(clips, of_set[0])} if of_set else {}
    described = {}
    for number, (name, repeats) in enumerate(clips.sets):
        indices = of_set.get(number, [])
        times = f" x {repeats}" if repeats > 1 else ""
        frames = _frames(clips, indices) if indices else "left out"
        count = len({clips.entries[index].key for index in indices})
        described[f"set {number}"] = f"{name}: {count} clips{times}; {frames}"
    return described


def _frames(clips: ClipDataset, indices: list[int]) -> str:
    counts = Counter(_count(clips, index) for index in indices)
    frames = " or ".join(str(count) for count in sorted(counts))
    rate = _rate(clips, [index for index in indices if _count(clips, index) > 1])
    window = {
        "whole": "evenly over each clip",
        "start": "the first window of each clip",
        "random": "a random window of each clip",
        "all": f"{len(indices)} windows of {len({clips.entries[index].key for index in indices})} clips",
    }[clips.choice.window]
    return f"{frames} frame{'s' if max(counts) > 1 else ''}{rate}, {window}"


def _count(clips: ClipDataset, index: int) -> int:
    return clips.num_frames if clips.shapes is None else clips.shapes[index].num_frames


def _rate(clips: ClipDataset, indices: list[int]) -> str:
    """The rate of the frames that are taken, measured on some clips if the recipe does not tell it."""
    if not indices:
        return ""
    choice = clips.choice
    if choice.rate is not None:
        return f" at {choice.rate / choice.stride:g} fps"
    chosen = indices[:: -(-len(indices) // MEASURED)]
    rates = []
    for index in chosen:
        entry = clips.entries[index]
        durations = frame_durations(entry.read(), entry.suffix, entry.name)
        rates.append(choice.shown_rate(durations, _count(clips, index)))
    low, high = f"{min(rates):.3g}", f"{max(rates):.3g}"
    span = low if low == high else f"{low} to {high}"
    measured = f" ({len(chosen)} of {len(indices)} measured)" if len(chosen) < len(indices) else ""
    return f" at {span} fps{measured}"
