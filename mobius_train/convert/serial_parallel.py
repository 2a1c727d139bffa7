"""Conversion of temporal weights between a serial text-to-video model and a parallel one.

Both have TC, TA and transformer_in with the same names and shapes, so these weights are copied unchanged. The models
still compute different outputs, because they connect the layers differently.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import TextToVideoSDPipeline, UNet3DConditionModel
from torch import nn

from mobius_train.convert import compare
from mobius_train.convert.components import account_for_components, is_pipeline, load_components, save_video_pipeline
from mobius_train.convert.conversion_report import Report
from mobius_train.convert.stock_pipeline import check_ddpm, check_one_text_encoder, stock_components, text_tokens_of
from mobius_train.convert.unet3d import to_unet3d
from mobius_train.errors import MobiusError
from mobius_train.files import finished_folder
from mobius_train.models import ParallelUNet, SerialUNet
from mobius_train.pretrained.model_files import class_name
from mobius_train.pretrained.strict_load import load_diffusers
from mobius_train.ring_shape import PAPER, UNET_FIELDS, RingShape

OTHER_TOPOLOGY = (
    "the weights are the same, but the predictions are not: in a serial model the output of each temporal layer passes"
    " through the next spatial layer, in a parallel model it does not. On fixed inputs the predictions differ by {:.0%}"
    " of the largest value; train the result before you evaluate it"
)


def serial_to_parallel(
    source: Path,
    destination: Path,
    text_encoder: str | None = None,
    seed: int = 0,
    shape: RingShape = PAPER,
) -> Report:
    """Convert a serial model to a parallel one: its temporal weights become those of the ring and of the tail.

    The ring of another width than 1 has none of these weights, and neither have blocks without temporal layers. The
    report lists what is left out.

    Args:
        source: folder of a diffusers UNet3DConditionModel (ModelScope's) or SerialUNet, or of its pipeline.
        destination: folder of the ParallelUNet, or of its pipeline.
        text_encoder: replaces the pipeline's text encoder.
        seed: seed of the ring's layers that do not come from the serial model.
        shape: the ring's.

    Raises:
        MobiusError: the source is damaged or of another kind, the shape does not fit it, or no weight fits the ring.
    """
    report = Report(source, destination)
    with finished_folder(destination) as folder:
        serial = load_serial(_unet_folder(source))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            parallel = ParallelUNet.from_unet2d(serial.unet, **shape.taken_by("UNet", UNET_FIELDS))
        own, temporal = parallel.ring.state_dict(), serial.temporal.state_dict()
        carried = {name: t for name, t in temporal.items() if name in own and own[name].shape == t.shape}
        parallel.ring.load_state_dict(carried, strict=False)
        report.require(bool(carried), "some temporal weights fit the ring")
        report.raise_problems()
        report.left_out += [
            (f"{count} temporal tensors of {block}", f"the ring of {shape} has no such layer")
            for block, count in Counter(_block_of(name) for name in temporal if name not in carried).items()
        ]
        _save(parallel, source, folder, text_encoder, report)

        written = ParallelUNet.from_pretrained(_unet_folder(folder)).eval()
        report.mapped.append((f"{len(carried)} temporal tensors", "ring"))
        report.mapped.append((f"{len(serial.unet.state_dict())} tensors of the 2D layers", "spatial"))
        report.made += [
            (f"{count} ring tensors, {kind}", ORIGINS[kind]) for kind, count in _ring_only(parallel, carried).items()
        ]
        _same(report, "temporal", written.ring, serial.temporal, list(carried))
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
        MobiusError: the source is damaged or of another kind, its ring has another shape than the paper's, or
            diffusers' class cannot represent it.
    """
    report = Report(source, destination)
    with finished_folder(destination) as folder:
        parallel = ParallelUNet.from_pretrained(_unet_folder(source)).eval()
        if parallel.ring_shape != PAPER:
            raise MobiusError(
                f"the ring in {source} has {parallel.ring_shape}, but a serial model has a temporal layer of the UNet's"
                f" width in every block: only rings of {PAPER} can be converted"
            )
        names = SerialUNet.from_unet2d(parallel.spatial).temporal.state_dict().keys()
        ring = parallel.ring.state_dict()
        unet3d = to_unet3d(parallel.spatial, {name: ring[name] for name in names})
        _save(unet3d, source, folder, text_encoder, report)

        written = load_diffusers(UNet3DConditionModel, _unet_folder(folder))
        report.mapped.append((f"{len(names)} temporal tensors of the ring", "temporal layers"))
        report.mapped.append((f"{len(parallel.spatial.state_dict())} tensors of the spatial UNet", "2D layers"))
        report.left_out += [
            (f"{count} ring tensors, {kind}", "serial models have no separate layer for this")
            for kind, count in _ring_only(parallel, names).items()
        ]
        serial = SerialUNet.from_unet3d(written)
        _same(report, "temporal", serial.temporal, parallel.ring, names)
        same = compare.distance(compare.prediction(serial.unet), compare.prediction(parallel.spatial))
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
    kind = class_name(folder)
    if kind == UNet3DConditionModel.__name__:
        return SerialUNet.from_unet3d(load_diffusers(UNet3DConditionModel, folder))
    if kind == SerialUNet.__name__:
        return SerialUNet.from_pretrained(folder).eval()
    raise MobiusError(f"{folder} contains a {kind}: a serial model is a UNet3DConditionModel or a SerialUNet")


ORIGINS = {
    "samplers": "copies of the 2D UNet's",
    "output head": "copies of the 2D UNet's",
    "trained tail": "copies of the 2D UNet's",
    "fusion": "the identity on the spatial branch: an untrained ring does not change the output",
    "projections where TC changes channels": "initialised at random",
    "entries from another width": "initialised at random",
    "temporal layers of another width": "initialised at random",
}


def _kind_of(name: str) -> str:
    if name.startswith("tail."):
        return "trained tail"
    if "samplers." in name:
        return "samplers"
    if name.startswith("fusion."):
        return "fusion"
    if name.startswith("entries."):
        return "entries from another width"
    if ".projection." in name:
        return "projections where TC changes channels"
    if "temp_" in name or name.startswith("transformer_in."):
        return "temporal layers of another width"
    return "output head"


def _block_of(name: str) -> str:
    """The block of a temporal layer's tensor: transformer_in, down_blocks.0, …"""
    first, second, *_ = name.split(".")
    return f"{first}.{second}" if second.isdigit() else first


def _ring_only(parallel: ParallelUNet, shared: Iterable[str]) -> Counter[str]:
    shared = set(shared)
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
        check_ddpm(components, TextToVideoSDPipeline)
        check_one_text_encoder(components, TextToVideoSDPipeline)
        stock = stock_components(components, text_tokens_of(source), report)
        TextToVideoSDPipeline(unet=model, **stock).save_pretrained(folder)
        account_for_components(source, set(stock), report)
    else:
        tokens = text_tokens_of(source)
        save_video_pipeline(model, components, source, folder, report, max_text_tokens=tokens)
