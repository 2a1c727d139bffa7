"""Conversion of a single .safetensors or .ckpt file of the Stable Diffusion family to a diffusers pipeline folder.

diffusers' loader silently drops tensors that it does not use. This module therefore compares the values of all tensors
in the file with those of all written tensors, in both directions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.loaders.single_file_utils import SingleFileComponentError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mobius_train.convert import compare
from mobius_train.convert.components import is_pipeline
from mobius_train.convert.conversion_report import Report
from mobius_train.errors import MobiusError
from mobius_train.files import finished_folder
from mobius_train.models import weights_hash
from mobius_train.pretrained.pickles import UNREADABLE, load_tensors, unreadable_file
from mobius_train.pretrained.pipeline_index import named_parts

MODELS = ("unet", "vae", "text_encoder")
# Prefixes of the UNet's and the autoencoder's weights, all of which must be converted.
REQUIRED = ("model.diffusion_model.", "first_stage_model.")
REASONS = {
    "model_ema.": "averaged weights: the non-averaged ones are used, as in diffusers",
    "cond_stage_model.": "diffusers' text encoder has no such tensor (positions, or layers that it omits)",
}


def from_single_file(source: Path, config: Path, destination: Path) -> Report:
    """Write the models of a file as a pipeline folder, with the configuration of another pipeline.

    Args:
        source: a .safetensors file, or a .ckpt that contains only tensors.
        config: a local pipeline folder of the same family. Its configurations, tokenizer and scheduler are used, its
            weights are not.
        destination: folder of the StableDiffusionPipeline.

    Raises:
        MobiusError: the file is damaged or contains code, the configuration is of another family, or a tensor of the
            UNet or the autoencoder was not converted.
    """
    if not is_pipeline(config):
        raise MobiusError(
            f"{config} contains no model_index.json: without network access diffusers needs a local pipeline folder of"
            " the same family (configurations and tokenizer; the weights may be missing). Give one with --config"
        )
    if "text_encoder_2" in named_parts(str(config)):
        raise MobiusError(
            f"{config} has several text encoders: only files of Stable Diffusion 1.x and 2.x can be converted here. For"
            " XL and 3 use diffusers' from_single_file"
        )
    report = Report(source, destination)
    with finished_folder(destination) as folder:
        in_file = {name: _fingerprints(name, tensor) for name, tensor in _read(source)}
        pipeline = _load(source, config)
        # With accelerate, diffusers leaves weights that the file lacks without values.
        for part in MODELS:
            lacking = [name for name, tensor in getattr(pipeline, part).state_dict().items() if tensor.is_meta]
            report.problems += [f"{part}: {name} is not from the file" for name in lacking]
        report.raise_problems()
        pipeline.save_pretrained(folder)
        written = DiffusionPipeline.from_pretrained(str(folder), local_files_only=True)

        models = {name: getattr(written, name) for name in MODELS}
        placed = {_digest(t) for m in models.values() for t in m.state_dict().values()}
        known = {digest for digests in in_file.values() for digest in digests}
        for name, model in models.items():
            unknown = [n for n, t in model.state_dict().items() if _digest(t) not in known]
            report.problems += [f"{name}: {tensor} is not from the file" for tensor in unknown]
            report.mapped.append((f"{len(model.state_dict())} tensors of the {name}", name))
            same = weights_hash(model) == weights_hash(getattr(pipeline, name))
            report.require(same, f"the {name} read back has the hash of the loaded one")
        for name, digests in in_file.items():
            if not placed.issuperset(digests):
                _left_out(name, report)
        report.made.append(("tokenizer, scheduler", f"from {config}"))
        apart = compare.distance(*(compare.prediction(p.unet) for p in (written, pipeline)))
        report.require(
            apart <= compare.TOLERANCE, f"the UNet read back predicts the output of the file's (difference {apart:.1e})"
        )
        report.raise_problems()
    return report


def _load(source: Path, config: Path) -> Any:
    diffusers.utils.logging.set_verbosity_error()
    try:
        return StableDiffusionPipeline.from_single_file(
            str(source),
            config=str(config),
            local_files_only=True,
            torch_dtype=torch.float32,
            safety_checker=None,
            feature_extractor=None,
        )
    except (*UNREADABLE, SingleFileComponentError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise MobiusError(
            f"diffusers cannot create the models of {config} from {source}: {reason}. Use --config with a configuration"
            " of the same family (Stable Diffusion 1.x and 2.x differ)"
        ) from error


def _read(source: Path) -> Iterator[tuple[str, Tensor]]:
    if source.suffix == ".safetensors":
        try:
            with safe_open(source, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    yield name, file.get_tensor(name)
        except (*UNREADABLE, SafetensorError) as error:
            raise unreadable_file(source, error) from error
        return
    state = load_tensors(source)
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if not isinstance(state, dict):
        raise MobiusError(f"{source} does not contain a dictionary of tensors")
    for name, tensor in state.items():
        if isinstance(tensor, Tensor):
            yield str(name), tensor


def _fingerprints(name: str, tensor: Tensor) -> set[str]:
    """Digests of a tensor in the form that diffusers stores: unchanged, or a fused projection split in three."""
    if name.endswith(("in_proj_weight", "in_proj_bias")):
        return {_digest(part) for part in tensor.chunk(3)}
    return {_digest(tensor)}


def _digest(tensor: Tensor) -> str:
    """Digest of the values without the shape, since 1x1 convolutions become linear layers."""
    values = tensor.float() if tensor.is_floating_point() else tensor
    return hashlib.sha256(values.contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def _left_out(name: str, report: Report) -> None:
    if name.startswith(REQUIRED):
        report.problems.append(f"{name} is in the file but was not converted")
        return
    reason = next(
        (why for prefix, why in REASONS.items() if name.startswith(prefix)), "not a weight of a pipeline's model"
    )
    report.left_out.append((name, reason))
