"""Conversion of temporal weights between a serial text-to-video model and a parallel one.

Both have TC, TA and transformer_in with the same names and shapes, so these weights are copied unchanged. The models
still compute different outputs, because they connect the layers differently.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from diffusers import TextToVideoSDPipeline, UNet3DConditionModel
from torch import nn

from mobius_train.convert import compare
from mobius_train.convert.conversion_report import Report
from mobius_train.convert.stock_pipeline import stock_components, text_tokens_of
from mobius_train.convert.strict_load import (
    account_for_components,
    is_pipeline,
    load_components,
    load_model,
    load_video_model,
    model_class,
    save_video_pipeline,
)
from mobius_train.convert.unet3d import to_unet3d
from mobius_train.errors import MobiusError
from mobius_train.files import finished_folder
from mobius_train.models import ParallelUNet, SerialUNet

OTHER_TOPOLOGY = (
    "the weights are the same, but the predictions are not: in a serial model the output of each temporal layer passes"
    " through the next spatial layer, in a parallel model it does not. On fixed inputs the predictions differ by {:.0%}"
    " of the largest value; train the result before you evaluate it"
)


def serial_to_parallel(source: Path, destination: Path, text_encoder: str | None = None, seed: int = 0) -> Report:
    """Convert a serial model to a parallel one: its temporal weights become those of the ring.

    Args:
        source: folder of a diffusers UNet3DConditionModel (ModelScope's) or SerialUNet, or of its pipeline.
        destination: folder of the ParallelUNet, or of its pipeline.
        text_encoder: replaces the pipeline's text encoder.
        seed: seed of the ring's layers that a serial model does not have.

    Raises:
        MobiusError: the source is damaged or of another kind, or one of its weights has no counterpart in the ring.
    """
    report = Report(source, destination)
    with finished_folder(destination) as folder:
        serial = load_serial(_unet_folder(source))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            parallel = ParallelUNet.from_unet2d(serial.unet)
        temporal = serial.temporal.state_dict()
        unexpected = parallel.ring.load_state_dict(temporal, strict=False).unexpected_keys
        report.problems += [f"{name} has no counterpart in the ring" for name in unexpected]
        report.raise_problems()
        _save(parallel, source, folder, text_encoder, report)

        written = load_video_model(ParallelUNet, _unet_folder(folder))
        report.mapped.append((f"{len(temporal)} temporal tensors", "ring"))
        report.mapped.append((f"{len(serial.unet.state_dict())} tensors of the 2D layers", "spatial"))
        report.made += [
            (f"{count} ring tensors, {kind}", ORIGINS[kind]) for kind, count in _ring_only(parallel, serial).items()
        ]
        _same(report, "temporal", written.ring, serial.temporal)
        _same(report, "2D", written.spatial, serial.unet)
        apart = compare.distance(compare.prediction(written), compare.prediction(serial))
        report.notes.append(OTHER_TOPOLOGY.format(apart))
        report.raise_problems()
    return report


def parallel_to_serial(source: Path, destination: Path, text_encoder: str | None = None) -> Report:
    """Convert a parallel model to a serial one, diffusers' UNet3DConditionModel.

    Args:
        source: folder of a ParallelUNet, or of its pipeline, such as a run's final/.
        destination: folder of the UNet3DConditionModel, or of the TextToVideoSDPipeline.
        text_encoder: replaces the pipeline's text encoder.

    Raises:
        MobiusError: the source is damaged or of another kind, its ring has another width than 1, or diffusers' class
            cannot represent it.
    """
    report = Report(source, destination)
    with finished_folder(destination) as folder:
        parallel = load_video_model(ParallelUNet, _unet_folder(source))
        if parallel.ring_width != 1:
            raise MobiusError(
                f"the ring in {source} has width {parallel.ring_width:g}, but the temporal layers of a serial model"
                " have the channels of the UNet: only rings of width 1 can be converted"
            )
        names = SerialUNet.from_unet2d(parallel.spatial).temporal.state_dict().keys()
        ring = parallel.ring.state_dict()
        unet3d = to_unet3d(parallel.spatial, {name: ring[name] for name in names})
        _save(unet3d, source, folder, text_encoder, report)

        written = load_model(UNet3DConditionModel, _unet_folder(folder))
        report.mapped.append((f"{len(names)} temporal tensors of the ring", "temporal layers"))
        report.mapped.append((f"{len(parallel.spatial.state_dict())} tensors of the spatial UNet", "2D layers"))
        report.left_out += [
            (f"{count} ring tensors, {kind}", "serial models have no separate layer for this")
            for kind, count in _ring_only(parallel, names).items()
        ]
        serial = SerialUNet.from_unet3d(written)
        _same(report, "temporal", serial.temporal, parallel.ring, names)
        same = compare.distance(
            compare.prediction_of_stills(serial.unet), compare.prediction_of_stills(parallel.spatial)
        )
        report.require(
            same <= compare.TOLERANCE, f"its 2D layers predict the spatial UNet's output (difference {same:.1e})"
        )
        apart = compare.distance(compare.prediction(written), compare.prediction(parallel))
        report.notes.append(OTHER_TOPOLOGY.format(apart))
        report.raise_problems()
    return report


def load_serial(folder: Path) -> SerialUNet:
    """Load a serial model, diffusers' or ours.

    Raises:
        MobiusError: the folder contains another model, or is damaged.
    """
    kind = model_class(folder)
    if kind == UNet3DConditionModel.__name__:
        return SerialUNet.from_unet3d(load_model(UNet3DConditionModel, folder))
    if kind == SerialUNet.__name__:
        return load_video_model(SerialUNet, folder)
    raise MobiusError(f"{folder} contains a {kind}: a serial model is a UNet3DConditionModel or a SerialUNet")


ORIGINS = {
    "samplers": "copies of the 2D UNet's",
    "output head": "copies of the 2D UNet's",
    "fusion": "the identity on the spatial branch: an untrained ring does not change the output",
    "projections where TC changes channels": "initialised at random",
}


def _kind_of(name: str) -> str:
    if "samplers." in name:
        return "samplers"
    if name.startswith("fusion."):
        return "fusion"
    if ".projection." in name:
        return "projections where TC changes channels"
    return "output head"


def _ring_only(parallel: ParallelUNet, serial: Any) -> Counter[str]:
    shared = serial.temporal.state_dict().keys() if isinstance(serial, SerialUNet) else serial
    return Counter(_kind_of(name) for name in parallel.ring.state_dict() if name not in shared)


def _same(report: Report, what: str, written: nn.Module, source: nn.Module, names: Any = None) -> None:
    names = list(source.state_dict() if names is None else names)
    one, other = compare.hash_of(written, names), compare.hash_of(source, names)
    report.require(one == other, f"the {what} weights read back have the source's hash, {other[:12]}…")


def _unet_folder(folder: Path) -> Path:
    return folder / "unet" if is_pipeline(folder) else folder


def _save(model: Any, source: Path, folder: Path, text_encoder: str | None, report: Report) -> None:
    """Write the model, or a pipeline with the model if the source is a pipeline."""
    if not is_pipeline(source):
        model.save_pretrained(folder)
        return
    components = load_components(source, text_encoder)
    if isinstance(model, UNet3DConditionModel):
        stock = stock_components(components, text_tokens_of(source), report)
        TextToVideoSDPipeline(unet=model, **stock).save_pretrained(folder)
        account_for_components(source, report)
    else:
        tokens = text_tokens_of(source)
        save_video_pipeline(model, components, source, folder, report, max_text_tokens=tokens)
