"""Sampling from the command line: options, prompts and the pipeline call, shared by the tools that draw clips."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mobius_train.errors import MobiusError
from mobius_train.files import check_output_folder, check_writable, read_small
from mobius_train.media.formats import check_fps

# The options are shown and checked without torch and diffusers, whose imports take seconds.
if TYPE_CHECKING:
    from torch import Tensor

    from mobius_train.pipeline import TextToVideoPipeline


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `read_prompts` and `sample_clips` read, the output folder and the device."""
    parser.add_argument("model", type=Path, help="a run's output_dir or its final/, or a pipeline folder")
    parser.add_argument("--prompt", action="append", default=[], help="text prompt; repeatable")
    parser.add_argument("--prompts-file", type=Path, help="text file with one prompt per line")
    parser.add_argument("--output", type=Path, required=True, help="output folder of the clips")
    parser.add_argument("--overwrite", action="store_true", help="allow an output folder that is not empty")
    parser.add_argument("--num-frames", type=int, help="frames per clip; default: the model's")
    parser.add_argument("--height", type=int, help="pixels; default: the model's")
    parser.add_argument("--width", type=int, help="pixels; default: the model's")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps (default: %(default)s)")
    parser.add_argument("--guidance-scale", type=float, help="of classifier-free guidance; default: the model's")
    parser.add_argument("--guidance-rescale", type=float, default=0.0, help="0.7 is recommended with zero terminal SNR")
    parser.add_argument("--negative-prompt", default="", help="what the clips should not show (default: nothing)")
    parser.add_argument("--seed", type=int, default=0, help="of the initial noise (default: %(default)s)")
    parser.add_argument("--fps", type=float, default=8.0, help="frame rate of the files (default: %(default)s)")
    add_device_option(parser)


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """Add --device, for `usable_device`."""
    parser.add_argument("--device", help="cuda, cuda:1, mps or cpu; default: a GPU if there is one")


def read_prompts(arguments: argparse.Namespace) -> list[str]:
    """The prompts of --prompt, then those of --prompts-file.

    Raises:
        MobiusError: there are none, or the file cannot be read.
    """
    prompts = list(arguments.prompt)
    if arguments.prompts_file is not None:
        try:
            # Some editors begin a file with a byte-order mark, which is in the middle of files that were joined. A
            # prompt can contain U+2028, where splitlines would split it.
            text = read_small(arguments.prompts_file).decode("utf-8").replace("\ufeff", "")
            lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise MobiusError(f"cannot read the prompts of {arguments.prompts_file}: {error}") from error
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise MobiusError("no prompts: give --prompt or a --prompts-file with one prompt per line")
    return prompts


def check_sampling(arguments: argparse.Namespace) -> None:
    """Check everything that can be checked before a model is loaded: the output folder and the options of the files.

    Raises:
        MobiusError: an option is invalid, or the output folder is not empty or cannot be written.
    """
    check_fps(arguments.fps)
    for name in ("num_frames", "height", "width", "steps"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise MobiusError(f"--{name.replace('_', '-')} {value} must be 1 or more")
    check_writable(arguments.output)
    check_output_folder(arguments.output, arguments.overwrite)


def sample_clips(pipeline: TextToVideoPipeline, prompts: list[str], arguments: argparse.Namespace) -> Tensor:
    """Sample one clip per prompt: (B, F, 3, H, W) uint8. Raises as the pipeline."""
    clips: Tensor = pipeline(
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
    return clips
