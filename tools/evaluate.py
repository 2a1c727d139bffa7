"""Measure clips: motion and its order, consistency, agreement with captions, distance to real clips.

Writes a report as JSON, and as an HTML page beside it. A figure that was not measured is named, with what it needs.
"""

from __future__ import annotations

import _environment  # noqa: F401

# isort: split
import argparse
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch

from mobius_train.cli import run
from mobius_train.errors import MobiusError
from mobius_train.evaluate.choose_dimensions import ModelPaths, choose_dimensions
from mobius_train.evaluate.clips import Clips, EvaluatedClip
from mobius_train.evaluate.evaluation import Evaluation, check_sets, check_shapes
from mobius_train.evaluate.page import write_page
from mobius_train.evaluate.reference import Reference
from mobius_train.evaluate.report import DistanceResult, Report, read_report
from mobius_train.evaluate.set_features import PooledLatents, SetFeatures, VideoEncoder
from mobius_train.evaluate.summary import as_text
from mobius_train.evaluate.vbench_layout import VBenchLayout
from mobius_train.evaluate.vbench_scores import merge_results, unmeasured
from mobius_train.files import check_output_folder, check_writable, finished_folder
from mobius_train.job.quiet import quiet_libraries
from mobius_train.media.clip_files import file_names, write_clips
from mobius_train.pipeline import load_pipeline, usable_device
from mobius_train.sampling import add_device_option, add_sampling_options, check_sampling, read_prompts, sample_clips


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser("clips", help="clips of a folder (of tools/sample.py, for example) or of shards")
    command.add_argument("clips", help="a folder with captions, or shards as a path, glob or braces: docs/data.md")
    command.add_argument("--only", action="append", default=[], metavar="PATTERN", help="keys to evaluate; repeatable")
    command.add_argument("--resolution", type=int, help="crop and scale to this square; default: each clip's own size")
    add_device_option(command)
    _add_evaluation_options(command)

    command = commands.add_parser("model", help="clips drawn from a model, which are also written to --output")
    add_sampling_options(command)
    _add_evaluation_options(command)

    command = commands.add_parser("merge", help="add the official VBench tool's results to a report and its page")
    command.add_argument("results", type=Path, nargs="+", help="*_eval_results.json of VBench")
    command.add_argument("--out", type=Path, required=True, metavar="report.json", help="the report to extend")
    return parser.parse_args()


def _add_evaluation_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", type=Path, required=True, metavar="report.json", help="with report.html beside it")
    command.add_argument("--reference", metavar="CLIPS", help="real clips, as CLIPS: for distances and equal captions")
    command.add_argument("--dino", type=Path, metavar="FOLDER", help="DINO in transformers' layout")
    command.add_argument("--clip", type=Path, metavar="FOLDER", help="CLIP in transformers' layout")
    command.add_argument("--aesthetic", type=Path, metavar="FILE", help="LAION's linear head")
    command.add_argument("--aesthetic-clip", type=Path, metavar="FOLDER", help="the head's CLIP; default: --clip")
    command.add_argument(
        "--video-encoder", type=Path, metavar="FOLDER", help="VideoMAE, ViViT, TimeSformer or V-JEPA 2"
    )
    command.add_argument("--vae", type=Path, metavar="FOLDER", help="AutoencoderKL for a distance of latents")
    command.add_argument("--vbench", type=Path, metavar="FOLDER", help="also write the clips for the official VBench")


class Setup(NamedTuple):
    """What an evaluation needs besides its clips."""

    evaluation: Evaluation
    reference: Reference | None
    set_features: list[SetFeatures]


def set_up(arguments: argparse.Namespace, device: torch.device, own: list[SetFeatures]) -> Setup:
    """Open the reference and load all models. own: features that the evaluated model brings."""
    if arguments.out.suffix != ".json":
        raise MobiusError(f"--out {arguments.out} must end in .json; the page gets the same name with .html")
    check_writable(arguments.out, file=True)
    if arguments.vbench is not None:
        check_output_folder(arguments.vbench)
        check_writable(arguments.vbench)
    reference = None if arguments.reference is None else Reference(Clips(arguments.reference))
    paths = ModelPaths(arguments.dino, arguments.clip, arguments.aesthetic, arguments.aesthetic_clip)
    chosen = choose_dimensions(paths, reference is not None, device)
    set_features: list[SetFeatures] = list(own)
    if arguments.vae is not None:
        set_features = [PooledLatents.load(arguments.vae, device)]
    if arguments.video_encoder is not None:
        set_features.append(VideoEncoder(arguments.video_encoder, device))
    return Setup(Evaluation(chosen, reference, set_features), reference, set_features)


def evaluate_clips(arguments: argparse.Namespace) -> Report:
    clips = Clips(arguments.clips, arguments.only, arguments.resolution)
    clips.refuse_stills()
    setup = set_up(arguments, usable_device(arguments.device), [])
    check_shapes(setup.set_features, clips.shapes, clips.source)
    check_sets(setup.set_features, clips.shapes[0].num_frames, len(clips), clips.source, setup.reference)
    return evaluate(arguments, setup, clips, clips, copies=arguments.resolution is None)


def evaluate_model(arguments: argparse.Namespace) -> Report:
    prompts = read_prompts(arguments)
    check_sampling(arguments)
    pipeline = load_pipeline(arguments.model, arguments.device)
    num_frames = arguments.num_frames or pipeline.config.num_frames
    if num_frames < 2:
        raise MobiusError(
            f"{arguments.model} samples stills: motion and consistency are defined for two frames or more"
        )
    device = usable_device(arguments.device)
    own: list[SetFeatures] = [] if arguments.reference is None else [PooledLatents(pipeline.vae, device)]
    setup = set_up(arguments, device, own)
    check_sets(setup.set_features, num_frames, len(prompts), "the list of prompts", setup.reference)
    frames = sample_clips(pipeline, prompts, arguments)
    write_clips(list(frames), prompts, arguments.output, fps=arguments.fps)
    drawn = [
        EvaluatedClip(name, prompt.strip(), clip, arguments.fps)
        for name, prompt, clip in zip(file_names(prompts), prompts, frames, strict=True)
    ]
    return evaluate(arguments, setup, Clips(str(arguments.output)), drawn, copies=True)


def evaluate(
    arguments: argparse.Namespace, setup: Setup, files: Clips, clips: Iterable[EvaluatedClip], copies: bool
) -> Report:
    """Measure the clips and write report and page.

    Args:
        files: the same clips as files.
        copies: VBench's layout takes MP4 files as they are.
    """
    evaluation, reference, set_features = setup
    with ExitStack() as stack:
        layout = None
        if arguments.vbench is not None:
            layout = VBenchLayout(stack.enter_context(finished_folder(arguments.vbench)), arguments.vbench)
        names: dict[str, str] = {}
        evaluation.measure(laid_out(clips, files, layout, names, copies), len(files))
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
        distances=missing_distances(set_features) | evaluation.distances(),
        vbench=unmeasured(),
        clips=evaluation.clips,
    )
    write(report, files, arguments.out)
    return report


def laid_out(
    clips: Iterable[EvaluatedClip], files: Clips, layout: VBenchLayout | None, names: dict[str, str], copies: bool
) -> Iterator[EvaluatedClip]:
    """The clips, each added to VBench's layout under a name that goes to `names` by key."""
    for clip, entry in zip(clips, files.entries, strict=True):
        if layout is not None:
            own = entry.read() if copies and entry.suffix == ".mp4" else None
            names[clip.key] = layout.add(clip, own)
        yield clip


def missing_distances(set_features: list[SetFeatures]) -> dict[str, DistanceResult]:
    names = {features.name for features in set_features}
    needs = {
        PooledLatents.name: "--reference CLIPS and --vae FOLDER",
        "frechet_video_encoder": "--reference CLIPS and --video-encoder FOLDER, after which the distance is named",
    }
    if names - {PooledLatents.name}:
        del needs["frechet_video_encoder"]
    return {name: DistanceResult(needs=text) for name, text in needs.items() if name not in names}


def merge(arguments: argparse.Namespace) -> Report:
    report = read_report(arguments.out)
    clips = Clips(report.source, report.only, report.resolution)
    merge_results(report, arguments.results)
    write(report, clips, arguments.out)
    return report


def write(report: Report, clips: Clips, path: Path) -> None:
    report.write(path)
    write_page(report, clips, path.with_suffix(".html"))


def main() -> None:
    arguments = parse()
    quiet_libraries()
    command = {"clips": evaluate_clips, "model": evaluate_model, "merge": merge}[arguments.command]
    report = command(arguments)
    print(as_text(report))
    print(f"report: {arguments.out}\npage:   {arguments.out.with_suffix('.html')}")


if __name__ == "__main__":
    run(main)
