"""Sample clips from a trained model and write a GIF, an MP4 and a contact sheet per prompt."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from mobius_train.cli import run
from mobius_train.errors import MobiusError
from mobius_train.files import check_output_folder
from mobius_train.job.quiet import quiet_libraries
from mobius_train.media.clip_files import FORMATS, write_clips
from mobius_train.metrics.motion import frame_difference
from mobius_train.pipeline import load_pipeline


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="a run's output_dir or its final/, or a pipeline folder")
    parser.add_argument("--prompt", action="append", default=[], help="text prompt; repeatable")
    parser.add_argument("--prompts-file", type=Path, help="text file with one prompt per line")
    parser.add_argument("--output", type=Path, required=True, help="output folder")
    parser.add_argument("--overwrite", action="store_true", help="allow an output folder that is not empty")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), help="png: a contact sheet")
    parser.add_argument("--num-frames", type=int, help="frames per clip; default: the model's")
    parser.add_argument("--height", type=int, help="pixels; default: the model's")
    parser.add_argument("--width", type=int, help="pixels; default: the model's")
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps (default: %(default)s)")
    parser.add_argument("--guidance-scale", type=float, help="default: the model's")
    parser.add_argument("--guidance-rescale", type=float, default=0.0, help="0.7 is recommended with zero terminal SNR")
    parser.add_argument("--negative-prompt", default="")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fps", type=float, default=8.0, help="frame rate of the files (default: %(default)s)")
    parser.add_argument("--spatial-only", action="store_true", help="sample stills from the frozen spatial branch only")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def read_prompts(arguments: argparse.Namespace) -> list[str]:
    prompts = list(arguments.prompt)
    if arguments.prompts_file is not None:
        try:
            lines = arguments.prompts_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise MobiusError(f"cannot read the prompts of {arguments.prompts_file}: {error}") from error
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise MobiusError("no prompts: give --prompt or a --prompts-file with one prompt per line")
    return prompts


def main() -> None:
    arguments = parse()
    prompts = read_prompts(arguments)
    check_output_folder(arguments.output, arguments.overwrite)
    quiet_libraries()
    pipeline = load_pipeline(arguments.model, arguments.device)
    if arguments.spatial_only:
        pipeline = pipeline.spatial_only()
    clips = pipeline(
        prompts,
        num_frames=arguments.num_frames,
        height=arguments.height,
        width=arguments.width,
        num_inference_steps=arguments.steps,
        guidance_scale=arguments.guidance_scale,
        guidance_rescale=arguments.guidance_rescale,
        negative_prompt=arguments.negative_prompt,
        seed=arguments.seed,
        output_type="uint8",
    ).frames
    for path in write_clips(clips, prompts, arguments.output, arguments.formats, arguments.fps):
        print(path)
    if clips.shape[1] > 1:
        differences = [frame_difference(clip) for clip in clips]
        for prompt, difference in zip(prompts, differences, strict=True):
            print(f"mean absolute frame difference {difference:6.2f} of 255: {prompt}")
        print(f"mean absolute frame difference {sum(differences) / len(differences):6.2f} of 255 over all clips")


if __name__ == "__main__":
    run(main)
