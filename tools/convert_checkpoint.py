"""Convert models and checkpoints. Each command verifies its output and reports everything that it omits."""

from __future__ import annotations

import _environment  # noqa: F401

# isort: split
import argparse
from pathlib import Path

from mobius_train.checkpoint.format import MANIFEST
from mobius_train.cli import run
from mobius_train.config import load
from mobius_train.convert.consolidate import consolidate_checkpoint
from mobius_train.convert.conversion_report import Report
from mobius_train.convert.image_model import from_image_model
from mobius_train.convert.motion import to_motion
from mobius_train.convert.run_checkpoint import EMA, MODEL
from mobius_train.convert.serial_parallel import parallel_to_serial, serial_to_parallel
from mobius_train.convert.single_file import from_single_file
from mobius_train.convert.to_diffusers import checkpoint_to_diffusers, to_diffusers, write_pipeline
from mobius_train.convert.trained_weights import open_safetensors, pipeline_of
from mobius_train.convert.vchitect import from_vchitect, to_vchitect
from mobius_train.dtypes import DTYPES
from mobius_train.errors import MobiusError
from mobius_train.job.quiet import quiet_libraries
from mobius_train.ring_shape import RING_FIELDS, RingShape


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser(
        "from-image-model", help="a diffusers folder of Stable Diffusion 1.x or 2.x → a new text-to-video pipeline"
    )
    command.add_argument("--mode", choices=("parallel", "serial"), default="parallel", help="default: %(default)s")
    command.add_argument("--num-frames", type=int, default=8, help="frames per clip (default: %(default)s)")
    command.add_argument("--seed", type=int, default=0, help="seed of the new layers (default: %(default)s)")
    _add_shape(command)
    command.add_argument("--ring-every", type=int, help="transformers: see the recipe's field; so too the next")
    command.add_argument("--context-latents", type=int)
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
    return parser.parse_args()


def _add_paths(command: argparse.ArgumentParser, source: str, output: str, text_encoder: bool = False) -> None:
    command.add_argument("source", type=Path, help=source)
    command.add_argument("output", type=Path, help=output)
    if text_encoder:
        command.add_argument("--text-encoder", help="folder or package:NAME, instead of the pipeline's own")


def _add_shape(command: argparse.ArgumentParser) -> None:
    """Options for the fields that rings of all models have."""
    command.add_argument("--ring-width", type=float, help="see the recipe's field; so too the next two")
    command.add_argument("--fusion-depth", type=int)
    command.add_argument("--tail-temporal-layers", action="store_true", default=None)


def _shape(arguments: argparse.Namespace) -> RingShape:
    options = {name: getattr(arguments, name, None) for name in RING_FIELDS}
    given = {name: value for name, value in options.items() if value is not None}
    if given and getattr(arguments, "mode", "parallel") != "parallel":
        raise MobiusError(f"--mode {arguments.mode} has no ring: remove {', '.join(given)}")
    return RingShape(**given)


def convert(arguments: argparse.Namespace) -> Report:
    source, output = arguments.source, arguments.output
    match arguments.command:
        case "from-image-model":
            mode, text_encoder, shape = arguments.mode, arguments.text_encoder, _shape(arguments)
            return from_image_model(source, output, mode, text_encoder, arguments.num_frames, arguments.seed, shape)
        case "serial-to-parallel":
            return serial_to_parallel(source, output, arguments.text_encoder, arguments.seed, _shape(arguments))
        case "parallel-to-serial":
            return parallel_to_serial(source, output, arguments.text_encoder)
        case "to-diffusers" if source.name.endswith((".safetensors", ".safetensors.index.json")):
            if arguments.config is None:
                raise MobiusError(f"{source} contains only weights: add --config with the config.yaml of their run")
            return write_pipeline(pipeline_of(load(arguments.config), open_safetensors(source)), source, output)
        case "to-diffusers" if (source / MANIFEST).is_file():
            return checkpoint_to_diffusers(source, output, arguments.weights, arguments.config)
        case "to-diffusers":
            return to_diffusers(source, output)
        case "to-motion":
            return to_motion(source, output, arguments.base, arguments.text_encoder)
        case "from-single-file":
            return from_single_file(source, arguments.config, output)
        case "from-vchitect":
            return from_vchitect(source, output)
        case "to-vchitect":
            return to_vchitect(source, output)
        case _:
            dtype = DTYPES[arguments.dtype]
            return consolidate_checkpoint(
                source, output, dtype, arguments.weights, arguments.tag, arguments.max_shard_size
            )


def main() -> None:
    quiet_libraries()
    print("\n".join(convert(parse()).lines()))


if __name__ == "__main__":
    run(main)
