"""Measure clips: motion and its order, consistency, agreement with captions, distance to real clips.

Writes a report as JSON, and as an HTML page beside it. A figure that was not measured is named, with what it needs.
"""

from __future__ import annotations

import _environment  # noqa: F401

# isort: split
import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mobius_train.cli import parse_options, run
from mobius_train.errors import MobiusError
from mobius_train.sampling import add_device_option, add_sampling_options, check_sampling, read_prompts, sample_clips

if TYPE_CHECKING:
    from mobius_train.evaluate.report import Report


def make_parser() -> argparse.ArgumentParser:
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
    return parser


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


def evaluate_model(arguments: argparse.Namespace) -> Report:
    """The command `model`: draw clips, write them and measure them."""
    prompts = read_prompts(arguments)
    check_sampling(arguments)
    from mobius_train.devices import usable_device
    from mobius_train.evaluate.by_options import evaluate, set_up
    from mobius_train.evaluate.clips import Clips, EvaluatedClip
    from mobius_train.evaluate.evaluation import check_sets
    from mobius_train.evaluate.set_features import PooledLatents, SetFeatures
    from mobius_train.media.clip_files import file_names, write_clips
    from mobius_train.pipeline import load_pipeline

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


def main() -> None:
    arguments = parse_options(make_parser(), commands=True)
    # These import torch and diffusers, which takes seconds.
    from mobius_train.evaluate.by_options import evaluate_clips, merge_scores
    from mobius_train.evaluate.summary import as_text
    from mobius_train.job.quiet import quiet_libraries

    quiet_libraries()
    command = {"clips": evaluate_clips, "model": evaluate_model, "merge": merge_scores}[arguments.command]
    report = command(arguments)
    print(as_text(report))
    print(f"report: {arguments.out}\npage:   {arguments.out.with_suffix('.html')}")


if __name__ == "__main__":
    run(main)
