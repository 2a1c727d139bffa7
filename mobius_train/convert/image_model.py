"""Conversion of a text-to-image model to an initial model for text-to-video training."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel

from mobius_train.convert import compare
from mobius_train.convert.components import load_components, save_video_pipeline
from mobius_train.convert.conversion_report import Report
from mobius_train.files import finished_folder
from mobius_train.models import ParallelUNet, SerialUNet, weights_hash
from mobius_train.models.families import as_denoiser
from mobius_train.pretrained.strict_load import load_diffusers
from mobius_train.ring_shape import PAPER, UNET_FIELDS, RingShape


def from_image_model(
    source: Path,
    destination: Path,
    mode: Literal["parallel", "serial"],
    text_encoder: str | None = None,
    num_frames: int = 8,
    seed: int = 0,
    shape: RingShape = PAPER,
) -> Report:
    """Write a text-to-video pipeline whose frames equal the images of the source.

    Args:
        source: a diffusers pipeline folder, Stable Diffusion 1.x or 2.x.
        destination: a pipeline folder in the format of a run's final/.
        mode: "parallel" adds a ring in parallel to the UNet, "serial" adds temporal layers inside it.
        text_encoder: a folder or package:NAME that replaces the source's text encoder.
        num_frames: default number of frames of a sampled clip.
        seed: seed of the new layers.
        shape: the ring's; only with mode "parallel".

    Raises:
        MobiusError: a part is missing, damaged or unsupported, or the written model predicts something else.
    """
    report = Report(source, destination)
    with finished_folder(destination) as folder:
        unet = load_diffusers(UNet2DConditionModel, source / "unet")
        as_denoiser(unet)  # raises if it cannot be a backbone
        components = load_components(source, text_encoder)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            kind: Any = ParallelUNet if mode == "parallel" else SerialUNet
            model = kind.from_unet2d(unet, **(shape.taken_by("UNet", UNET_FIELDS) if mode == "parallel" else {}))
        report.mapped.append((f"unet, {len(unet.state_dict())} tensors", f"unet/{kind.image_part}"))
        save_video_pipeline(model, components, source, folder, report, num_frames=num_frames)

        written = kind.from_pretrained(folder / "unet").eval()
        kept = written.image_model
        (new,) = (getattr(written, name) for name in kind.parts if name != kind.image_part)
        report.made.append(
            (f"{len(new.state_dict())} tensors of the {type(new).__name__}", f"initialised, seed {seed}")
        )
        report.require(weights_hash(kept) == weights_hash(unet), "the 2D weights read back have the source's hash")
        apart = compare.distance(compare.prediction(written), compare.prediction_of_stills(unet))
        report.require(
            apart <= compare.TOLERANCE,
            f"the model read back predicts the 2D UNet's output on every frame (difference {apart:.1e})",
        )
        report.raise_problems()
    return report
