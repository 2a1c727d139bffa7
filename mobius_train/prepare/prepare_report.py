"""The report of a preparation: counts and reasons by stage, histograms of scores, pictures of clips."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mobius_train.evenly import evenly
from mobius_train.files import publish, read_lines
from mobius_train.media.contact_sheet import contact_sheet
from mobius_train.prepare.candidate import Candidate, Dropped, Frames
from mobius_train.prepare.encode import STAGE as ENCODE
from mobius_train.prepare.listing import Inputs
from mobius_train.prepare.recipe import PrepareConfig
from mobius_train.prepare.sources.reference import STAGE as SOURCE
from mobius_train.prepare.stages.decode import Decode

FOLDER = "report"
BINS, BAR = 12, 40
SHEET_CLIPS = 12
SHEET_FRAMES = 4
NAMED = 10  # inputs listed for each reason


@dataclass
class Counts:
    """clips: number after cutting shots. dropped: by stage and reason. examples: the first origins for each reason.

    notes: number of each corrected oddity. noted: the first origins for each note.
    """

    stages: list[str]
    clips: int = 0
    joined: int = 0  # shots that were joined to the previous one
    kept: int = 0
    dropped: dict[str, dict[str, int]] = field(default_factory=dict)
    examples: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)
    noted: dict[str, list[str]] = field(default_factory=dict)
    outputs: Counter[str] = field(default_factory=Counter)
    scores: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)  # kept, dropped

    def summary(self) -> str:
        """Reasons and counts in one line."""
        return ", ".join(f"{why} ({stage}) {n}" for stage, whys in self.dropped.items() for why, n in whys.items())


def count(config: PrepareConfig, rows: Iterable[dict[str, Any]]) -> Counts:
    """Count the rows of an index."""
    counts = Counts([SOURCE, *(stage.name for stage in config.stages), ENCODE])
    reasons: dict[str, Counter[str]] = {stage: Counter() for stage in counts.stages}
    for row in rows:
        counts.clips += 1
        counts.joined += row["scores"].get("stitch", {}).get("joined", 1) - 1
        for note in row["notes"]:
            kind = note.partition(":")[0]
            counts.notes[kind] += 1
            _name(counts.noted.setdefault(kind, []), row, note.partition(": ")[2])
        if row["kept"]:
            counts.kept += 1
            output = row["output"]
            counts.outputs[f"{output['width']}x{output['height']}, {output['num_frames']} frames"] += 1
        else:
            reasons[row["stage"]][row["reason"]] += 1
            _name(counts.examples.setdefault((row["stage"], row["reason"]), []), row, row["detail"])
        for name, value in _numbers(row):
            counts.scores.setdefault(name, ([], []))[not row["kept"]].append(value)
    counts.dropped = {stage: dict(whys.most_common()) for stage, whys in reasons.items() if whys}
    return counts


def _name(examples: list[str], row: dict[str, Any], detail: str) -> None:
    if len(examples) < NAMED:
        examples.append(row["origin"] + (f": {detail}" if detail else ""))


def _numbers(row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    if row["start"] is not None:
        yield "seconds", row["end"] - row["start"]
    for stage, scores in row["scores"].items():
        for name, value in scores.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                yield f"{stage}.{name}", float(value)


def write(config: PrepareConfig, counts: Counts, inputs: Inputs, rows: Path) -> None:
    """Write report.md and contact sheets to the folder `report` of the output.

    A few clips dropped by each stage are decoded from their sources again for the pictures.
    """
    folder = config.output_dir / FOLDER
    text = "\n".join([*_table(counts, inputs.count), *_reasons(counts), *_outputs(counts), *_histograms(counts)])
    publish(folder / "report.md", lambda path: path.write_text(text + "\n", encoding="utf-8"))
    [decode] = [stage for stage in config.stages if isinstance(stage, Decode)]
    for name, chosen in _chosen(counts, rows).items():
        pictures = [(row, frames) for row in chosen if (frames := _frames(decode, inputs, row)) is not None]
        if pictures:
            clips = [torch.from_numpy(frames).permute(0, 3, 1, 2) for _, frames in pictures]
            captions = [_caption(row) for row, _ in pictures]
            publish(folder / f"{name}.png", partial(contact_sheet, clips, captions))


def _table(counts: Counts, inputs: int) -> Iterator[str]:
    yield f"# {inputs} inputs, {counts.clips} clips, {counts.kept} kept\n"
    yield "| stage | clips before | dropped | why |"
    yield "|---|---:|---:|---|"
    left = inputs
    changes = {"shots": counts.clips + counts.joined - inputs, "stitch": -counts.joined}
    for stage in counts.stages:
        whys = counts.dropped.get(stage, {})
        words = [f"{why} {n}" for why, n in whys.items()]
        if change := changes.get(stage, 0):
            words.append(f"{abs(change)} clips {'more, cut' if change > 0 else 'fewer, joined'}")
        dropped = sum(whys.values())
        yield f"| {stage} | {left} | {dropped} | {', '.join(words)} |"
        left += change - dropped
    yield f"| kept | {left} | | |"


def _reasons(counts: Counts) -> Iterator[str]:
    yield "\n## Dropped clips\n\nThe first for each reason; index.jsonl lists all.\n"
    for (stage, reason), examples in sorted(counts.examples.items()):
        yield f"- {stage}, {reason} ({counts.dropped[stage][reason]}):"
        yield from (f"  - `{example}`" for example in examples)
    if counts.notes:
        yield "\n## Corrected oddities\n"
        for note, number in sorted(counts.notes.items()):
            yield f"- {note} ({number}):"
            yield from (f"  - `{example}`" for example in counts.noted[note])


def _outputs(counts: Counts) -> Iterator[str]:
    yield "\n## Buckets\n"
    yield from (f"- {size}: {n} clips" for size, n in sorted(counts.outputs.items()))


def _histograms(counts: Counts) -> Iterator[str]:
    """Histograms of clips by score, # for kept and . for dropped."""
    yield "\n## Scores\n\n`#` kept, `.` dropped.\n\n```"
    for name, (kept, dropped) in sorted(counts.scores.items()):
        values = kept + dropped
        low, high = min(values), max(values)
        yield f"{name}: {len(values)} clips, {low:g} to {high:g}, mean {sum(values) / len(values):g}"
        numbers = high - low < BINS and all(value == int(value) for value in values)
        width, number_of_bins = (1.0, int(high - low) + 1) if numbers else ((high - low) / BINS or 1.0, BINS)
        last = number_of_bins - 1
        bins = [Counter(min(last, int((value - low) / width)) for value in side) for side in (kept, dropped)]
        most = max(bins[0][number] + bins[1][number] for number in range(number_of_bins))
        for number in range(number_of_bins if high > low else 1):
            parts = [round(BAR * side[number] / most) for side in bins]
            bar = "#" * parts[0] + "." * parts[1]
            yield f"  {low + number * width:10.4g} {bar:{BAR + 1}} {bins[0][number]} + {bins[1][number]}"
        yield ""
    yield "```"


def _chosen(counts: Counts, rows: Path) -> dict[str, list[dict[str, Any]]]:
    """A selection of kept clips and of clips dropped by each stage, evenly spaced over the index."""
    totals = {"kept": counts.kept} | {f"dropped-{stage}": sum(whys.values()) for stage, whys in counts.dropped.items()}
    seen: Counter[str] = Counter()
    chosen: dict[str, list[dict[str, Any]]] = {name: [] for name in totals}
    for row in read_lines(rows):
        name = "kept" if row["kept"] else f"dropped-{row['stage']}"
        step = max(1, totals[name] // SHEET_CLIPS)
        if seen[name] % step == 0 and len(chosen[name]) < SHEET_CLIPS:
            chosen[name].append(row)
        seen[name] += 1
    return chosen


def _frames(decode: Decode, inputs: Inputs, row: dict[str, Any]) -> Frames | None:
    """Up to SHEET_FRAMES frames (F, H, W, 3) of a clip, decoded from its source; None if it cannot be decoded."""
    reference = inputs.part(row["part"])[row["number"]]
    if reference.problem is not None:
        return None
    clip = Candidate.of_row({name: value for name, value in row.items() if name != "part"})
    clip.place = reference.entry()
    begin, end = clip.start, clip.end
    try:
        decode.model_copy(update={"more_frames_than": 0}).process(clip)
    except Dropped:
        return None
    frames = clip.pixels
    if begin is not None and end is not None:
        first, last = round(begin * (clip.fps or 1)), round(end * (clip.fps or 1))
        frames = frames[first : max(first + 1, last)]
    return frames[evenly(range(len(frames)), SHEET_FRAMES)]


def _caption(row: dict[str, Any]) -> str:
    words = row["captions"].get("en") or next(iter(row["captions"].values()), row["key"])
    return words if row["kept"] else f"{words}: {row['reason']} {row['detail']}"
