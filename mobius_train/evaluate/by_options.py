"""The work of tools/evaluate.py, by its options: open the clips, load the models that they name, measure and write."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch

from mobius_train.data.patterns import naming
from mobius_train.devices import usable_device
from mobius_train.errors import MobiusError
from mobius_train.evaluate.choose_dimensions import ModelPaths, choose_dimensions
from mobius_train.evaluate.clips import Clips, EvaluatedClip
from mobius_train.evaluate.evaluation import Evaluation, check_sets, check_shapes
from mobius_train.evaluate.page import write_page
from mobius_train.evaluate.reference import Reference
from mobius_train.evaluate.report import DistanceResult, Report, read_report
from mobius_train.evaluate.set_features import PooledLatents, SetFeatures, VideoEncoder
from mobius_train.evaluate.vbench_layout import VBenchLayout
from mobius_train.evaluate.vbench_scores import merge_results, unmeasured
from mobius_train.files import check_output_folder, check_writable, finished_folder

CLIPS_ARE = "give a folder of clips with captions, or shards (docs/data.md)"


class Setup(NamedTuple):
    """What an evaluation needs besides its clips."""

    evaluation: Evaluation
    reference: Reference | None
    set_features: list[SetFeatures]


def set_up(arguments: argparse.Namespace, device: torch.device, own: list[SetFeatures]) -> Setup:
    """Open the reference and load all models.

    Args:
        own: features that the evaluated model brings.

    Raises:
        MobiusError: an output cannot be written, or clips or models do not load.
    """
    if arguments.out.suffix != ".json":
        raise MobiusError(f"--out {arguments.out} must end in .json; the page gets the same name with .html")
    check_writable(arguments.out, file=True)
    if arguments.vbench is not None:
        check_output_folder(arguments.vbench)
        check_writable(arguments.vbench)
    reference = None
    if arguments.reference is not None:
        with naming("--reference", CLIPS_ARE):
            reference = Reference(Clips(arguments.reference))
    paths = ModelPaths(arguments.dino, arguments.clip, arguments.aesthetic, arguments.aesthetic_clip)
    chosen = choose_dimensions(paths, reference is not None, device)
    set_features: list[SetFeatures] = list(own)
    if arguments.vae is not None:
        set_features = [PooledLatents.load(arguments.vae, device)]
    if arguments.video_encoder is not None:
        set_features.append(VideoEncoder(arguments.video_encoder, device))
    return Setup(Evaluation(chosen, reference, set_features), reference, set_features)


def evaluate_clips(arguments: argparse.Namespace) -> Report:
    """The command `clips`.

    Raises:
        MobiusError: clips or models do not load, or do not fit together.
    """
    with naming("CLIPS", CLIPS_ARE):
        clips = Clips(arguments.clips, arguments.only, arguments.resolution)
    clips.refuse_stills()
    setup = set_up(arguments, usable_device(arguments.device), [])
    check_shapes(setup.set_features, clips.shapes, clips.source)
    check_sets(setup.set_features, clips.shapes[0].num_frames, len(clips), clips.source, setup.reference)
    return evaluate(arguments, setup, clips, clips, copies=arguments.resolution is None)


def evaluate(
    arguments: argparse.Namespace, setup: Setup, files: Clips, clips: Iterable[EvaluatedClip], copies: bool
) -> Report:
    """Measure the clips and write report and page.

    Args:
        files: the same clips as files.
        copies: VBench's layout takes MP4 files as they are.

    Raises:
        MobiusError: a clip cannot be measured.
    """
    evaluation, reference, set_features = setup
    with ExitStack() as stack:
        layout = None
        if arguments.vbench is not None:
            layout = VBenchLayout(stack.enter_context(finished_folder(arguments.vbench)), arguments.vbench)
        names: dict[str, str] = {}
        evaluation.measure(_laid_out(clips, files, layout, names, copies), len(files))
        if layout is not None:
            layout.finish()
    for result in evaluation.clips:
        result.vbench_file = names.get(result.key)
    num_frames = evaluation.clips[0].frames
    usable = 0 if reference is None else len(reference.long_enough(num_frames))
    report = Report(
        source=files.source,
        only=getattr(arguments, "only", []),
        resolution=getattr(arguments, "resolution", None),
        reference=arguments.reference,
        reference_clips=0 if reference is None else len(reference.clips),
        reference_too_short=0 if reference is None else len(reference.clips) - usable,
        dimensions=evaluation.dimensions(),
        distances=_missing_distances(set_features) | evaluation.distances(),
        vbench=unmeasured(),
        clips=evaluation.clips,
    )
    _write(report, files, arguments.out)
    return report


def _laid_out(
    clips: Iterable[EvaluatedClip], files: Clips, layout: VBenchLayout | None, names: dict[str, str], copies: bool
) -> Iterator[EvaluatedClip]:
    """The clips, each added to VBench's layout under a name that goes to `names` by key."""
    for clip, entry in zip(clips, files.entries, strict=True):
        if layout is not None:
            own = entry.read() if copies and entry.suffix == ".mp4" else None
            names[clip.key] = layout.add(clip, own)
        yield clip


def _missing_distances(set_features: list[SetFeatures]) -> dict[str, DistanceResult]:
    names = {features.name for features in set_features}
    needs = {
        PooledLatents.name: "--reference CLIPS and --vae FOLDER",
        "frechet_video_encoder": "--reference CLIPS and --video-encoder FOLDER, after which the distance is named",
    }
    if names - {PooledLatents.name}:
        del needs["frechet_video_encoder"]
    return {name: DistanceResult(needs=text) for name, text in needs.items() if name not in names}


def merge_scores(arguments: argparse.Namespace) -> Report:
    """The command `merge`.

    Raises:
        MobiusError: the report or the results cannot be read, or are not of the same clips.
    """
    report = read_report(arguments.out)
    clips = Clips(report.source, report.only, report.resolution)
    merge_results(report, arguments.results)
    _write(report, clips, arguments.out)
    return report


def _write(report: Report, clips: Clips, path: Path) -> None:
    report.write(path)
    write_page(report, clips, path.with_suffix(".html"))
