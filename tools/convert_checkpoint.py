"""Convert models and checkpoints. Each command verifies its output and reports everything that it omits."""

from __future__ import annotations

import _environment  # noqa: F401

# isort: split
import argparse
from pathlib import Path

from mobius_train.checkpoint.format import EMA, MODEL
from mobius_train.cli import parse_options, run


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser(
        "from-image-model", help="a diffusers folder of an image model → a new text-to-video pipeline"
    )
    command.add_argument("--mode", choices=("parallel", "serial"), default="parallel", help="default: %(default)s")
    command.add_argument("--num-frames", type=int, default=8, help="frames per clip (default: %(default)s)")
    command.add_argument("--seed", type=int, default=0, help="seed of the new layers (default: %(default)s)")
    _add_shape(command)
    command.add_argument("--ring-every", type=int, help="transformers: see the recipe's field")
    command.add_argument("--context-latents", type=int, help="transformers: see the recipe's field")
    _add_paths(command, "pipeline folder", "pipeline folder", text_encoder=True)

    command = commands.add_parser(
        "serial-to-parallel", help="a UNet3DConditionModel (ModelScope) or SerialUNet → a ring with its weights"
    )
    command.add_argument("--seed", type=int, default=0, help="seed of the ring's other layers (default: %(default)s)")
    _add_shape(command)
    _add_paths(command, "model or pipeline folder", "folder of the same kind", text_encoder=True)

    command = commands.add_parser("parallel-to-serial", help="a ParallelUNet → a UNet3DConditionModel with its weights")
    _add_paths(command, "model or pipeline folder", "folder of the same kind", text_encoder=True)

    command = commands.add_parser("consolidate", help="a sharded checkpoint → one safetensors file")
    command.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="default: %(default)s")
    command.add_argument("--weights", default=MODEL, help="model or ema (default: %(default)s)")
    command.add_argument("--tag", help="checkpoint in a folder with several (default: the one named by latest)")
    command.add_argument("--max-shard-size", default="5GB", help="maximum size of a file (default: %(default)s)")
    _add_paths(command, "a run's, DeepSpeed's or FSDP's checkpoint", "NAME.safetensors")

    command = commands.add_parser("to-diffusers", help="the result of a run → a pipeline folder for diffusers")
    command.add_argument("--config", type=Path, help="config.yaml of the run, instead of the checkpoint's own")
    command.add_argument("--weights", choices=(MODEL, EMA), help="weights of a checkpoint (default: ema if present)")
    _add_paths(command, "a run's folder, its final/, a checkpoint, or consolidated weights", "pipeline folder")

    command = commands.add_parser("to-motion", help="the result of a run → its trained part alone, in float16")
    command.add_argument("--base", help="image model and autoencoder; default: the recipe's. ./… is beside the output")
    _add_paths(command, "a run's folder or its final/", "folder", text_encoder=True)

    command = commands.add_parser("from-single-file", help="a Stable Diffusion .safetensors or .ckpt → a pipeline")
    command.add_argument("--config", type=Path, required=True, help="local pipeline folder of the same family")
    _add_paths(command, "the file", "pipeline folder")

    command = commands.add_parser("from-vchitect", help="the released transformer of Vchitect-2.0 → a SerialSD3")
    _add_paths(command, "transformer or pipeline folder", "model folder")

    command = commands.add_parser("to-vchitect", help="a SerialSD3 → a transformer for the released Vchitect-2.0 code")
    _add_paths(command, "model or pipeline folder", "transformer folder")
    return parser


def _add_paths(command: argparse.ArgumentParser, source: str, output: str, text_encoder: bool = False) -> None:
    command.add_argument("source", type=Path, help=source)
    command.add_argument("output", type=Path, help=output)
    if text_encoder:
        command.add_argument("--text-encoder", help="folder or package:NAME, instead of the pipeline's own")


def _add_shape(command: argparse.ArgumentParser) -> None:
    """Options for the fields that rings of all models have."""
    command.add_argument("--ring-width", type=float, help="see the recipe's field (docs/recipe_fields.md)")
    command.add_argument("--fusion-depth", type=int, help="see the recipe's field")
    command.add_argument("--tail-temporal-layers", action="store_true", default=None, help="see the recipe's field")
    command.add_argument("--trained-tail", action="store_true", default=None, help="see the recipe's field")


def main() -> None:
    arguments = parse_options(make_parser(), commands=True)
    # These import torch and diffusers, which takes seconds.
    from mobius_train.job.quiet import quiet_libraries

    # transformers warns while it is imported.
    quiet_libraries()
    from mobius_train.convert.choose_conversion import convert

    print("\n".join(convert(arguments).lines()))


if __name__ == "__main__":
    run(main)
