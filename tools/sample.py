"""Sample clips from a trained model and write a GIF, an MP4 and a contact sheet per prompt."""

from __future__ import annotations

import _environment  # noqa: F401

# isort: split
import argparse

from mobius_train.cli import parse_options, run
from mobius_train.media.formats import FORMATS
from mobius_train.sampling import add_sampling_options, check_sampling, read_prompts, sample_clips


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add_sampling_options(parser)
    parser.add_argument(
        "--formats",
        nargs="+",
        choices=FORMATS,
        default=list(FORMATS),
        help="files to write; png: a contact sheet (default: all)",
    )
    parser.add_argument("--spatial-only", action="store_true", help="sample stills from the frozen spatial branch only")
    return parser


def main() -> None:
    arguments = parse_options(make_parser())
    prompts = read_prompts(arguments)
    check_sampling(arguments)
    # These import torch and diffusers, which takes seconds.
    from mobius_train.job.quiet import quiet_libraries
    from mobius_train.media.clip_files import write_clips
    from mobius_train.metrics.motion import frame_difference
    from mobius_train.pipeline import load_pipeline

    quiet_libraries()
    pipeline = load_pipeline(arguments.model, arguments.device)
    if arguments.spatial_only:
        pipeline = pipeline.spatial_only()
    clips = sample_clips(pipeline, prompts, arguments)
    for path in write_clips(list(clips), prompts, arguments.output, arguments.formats, arguments.fps):
        print(path)
    if clips.shape[1] > 1:
        differences = [frame_difference(clip) for clip in clips]
        for prompt, difference in zip(prompts, differences, strict=True):
            print(f"mean absolute frame difference {difference:6.2f} of 255: {prompt}")
        print(f"mean absolute frame difference {sum(differences) / len(differences):6.2f} of 255 over all clips")


if __name__ == "__main__":
    run(main)
