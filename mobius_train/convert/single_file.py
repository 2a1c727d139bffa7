"""From a single .safetensors or .ckpt file of the Stable Diffusion family to a diffusers pipeline folder.

diffusers' own loader does it, and drops without a word what it has no use for. So the account is made here: every
tensor of the file is looked for, by its values, among those that were written, and the other way round.
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
from mobius_train.convert.conversion_report import Report
from mobius_train.convert.parts import is_pipeline
from mobius_train.convert.pickles import UNREADABLE, load_tensors, unreadable
from mobius_train.errors import MobiusError
from mobius_train.files import finished_folder
from mobius_train.models import weights_hash

MODELS = ("unet", "vae", "text_encoder")
# Every tensor under these is a weight of the UNet and of the autoencoder.
REQUIRED = ("model.diffusion_model.", "first_stage_model.")
REASONS = {
    "model_ema.": "averaged weights: the file's plain ones were taken, as diffusers does",
    "cond_stage_model.": "the text encoder of diffusers has no such tensor (positions, or layers that it leaves out)",
}


def from_single_file(source: Path, config: Path, destination: Path) -> Report:
    """Write the models of one file as a pipeline folder, with the configurations of another.

    Args:
        source: a .safetensors file, or a .ckpt that holds nothing but tensors.
        config: a local pipeline folder of the same family, for its configurations, tokenizer and scheduler; its
            weights are not used.
        destination: a StableDiffusionPipeline's folder.

    Raises:
        MobiusError: the file is damaged or asks for code, the configuration is of another family, or a tensor of
            the UNet or the autoencoder did not arrive.
    """
    if not is_pipeline(config):
        raise MobiusError(
            f"{config} holds no model_index.json: without a network diffusers needs a local pipeline folder of the same"
            " family (its configurations and tokenizer; the weights may be missing). Give one by --config"
        )
    report = Report(source, destination)
    with finished_folder(destination) as folder:
        in_file = {name: _fingerprints(name, tensor) for name, tensor in _read(source)}
        pipeline = _load(source, config)
        pipeline.save_pretrained(folder)
        written = DiffusionPipeline.from_pretrained(str(folder), local_files_only=True)

        models = {name: getattr(written, name) for name in MODELS}
        placed = {_digest(t) for m in models.values() for t in m.state_dict().values()}
        known = {digest for digests in in_file.values() for digest in digests}
        for name, model in models.items():
            strange = [n for n, t in model.state_dict().items() if _digest(t) not in known]
            report.problems += [f"{name}: {tensor} is not from the file" for tensor in strange]
            report.mapped.append((f"{len(model.state_dict())} tensors of the {name}", name))
            same = weights_hash(model) == weights_hash(getattr(pipeline, name))
            report.require(same, f"the {name} read back has the hash of the one that was loaded")
        for name, digests in in_file.items():
            if not placed.issuperset(digests):
                _left_out(name, report)
        report.made.append(("tokenizer, scheduler", f"those of {config}"))
        apart = compare.distance(*(compare.prediction_of_stills(p.unet) for p in (written, pipeline)))
        report.require(
            apart <= compare.TOLERANCE, f"the UNet read back predicts what the file's does (apart {apart:.1e})"
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
            f"diffusers cannot make the models of {config} from {source}: {reason}. Give the configuration of the"
            " same family (Stable Diffusion 1.x and 2.x differ) by --config"
        ) from error


def _read(source: Path) -> Iterator[tuple[str, Tensor]]:
    if source.suffix == ".safetensors":
        try:
            with safe_open(source, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    yield name, file.get_tensor(name)
        except (*UNREADABLE, SafetensorError) as error:
            raise unreadable(source, error) from error
        return
    state = load_tensors(source)
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if not isinstance(state, dict):
        raise MobiusError(f"{source} holds no dictionary of tensors")
    for name, tensor in state.items():
        if isinstance(tensor, Tensor):
            yield str(name), tensor


def _fingerprints(name: str, tensor: Tensor) -> set[str]:
    """Digests of a tensor as diffusers may store it: as it is, or a fused projection in its three parts."""
    if name.endswith(("in_proj_weight", "in_proj_bias")):
        return {_digest(part) for part in tensor.chunk(3)}
    return {_digest(tensor)}


def _digest(tensor: Tensor) -> str:
    """Of the values, whatever the shape: 1x1 convolutions become linear layers."""
    values = tensor.float() if tensor.is_floating_point() else tensor
    return hashlib.sha256(values.contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def _left_out(name: str, report: Report) -> None:
    if name.startswith(REQUIRED):
        report.problems.append(f"{name} is in the file and arrived nowhere")
        return
    reason = next(
        (why for prefix, why in REASONS.items() if name.startswith(prefix)), "no weight of a pipeline's model"
    )
    report.left_out.append((name, reason))
