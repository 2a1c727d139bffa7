"""Which conversion a command of tools/convert_checkpoint.py starts."""

from __future__ import annotations

import argparse

from mobius_train.checkpoint.format import MANIFEST
from mobius_train.config import load
from mobius_train.convert.consolidate import consolidate_checkpoint
from mobius_train.convert.conversion_report import Report
from mobius_train.convert.image_model import from_image_model
from mobius_train.convert.motion import to_motion
from mobius_train.convert.serial_parallel import parallel_to_serial, serial_to_parallel
from mobius_train.convert.single_file import from_single_file
from mobius_train.convert.to_diffusers import checkpoint_to_diffusers, to_diffusers, write_pipeline
from mobius_train.convert.trained_weights import open_safetensors, pipeline_of
from mobius_train.convert.vchitect import from_vchitect, to_vchitect
from mobius_train.dtypes import DTYPES
from mobius_train.errors import MobiusError
from mobius_train.ring_shape import RingShape, ring_fields


def convert(arguments: argparse.Namespace) -> Report:
    """Run the command of tools/convert_checkpoint.py that these options name.

    Raises:
        MobiusError: the options contradict each other, or see the conversion.
    """
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
            if arguments.weights is not None:
                raise MobiusError(f"{source} contains one set of weights: remove --weights, which is of a checkpoint")
            return write_pipeline(pipeline_of(load(arguments.config), open_safetensors(source)), source, output)
        case "to-diffusers" if (source / MANIFEST).is_file():
            return checkpoint_to_diffusers(source, output, arguments.weights, arguments.config)
        case "to-diffusers":
            if arguments.weights is not None or arguments.config is not None:
                raise MobiusError(
                    f"{source} is no checkpoint: remove --weights and --config, or give its folder checkpoint-<n>"
                )
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


def _shape(arguments: argparse.Namespace) -> RingShape:
    given = ring_fields(vars(arguments))
    if given and getattr(arguments, "mode", "parallel") != "parallel":
        raise MobiusError(f"--mode {arguments.mode} has no ring: remove {', '.join(given)}")
    return RingShape(**given)
