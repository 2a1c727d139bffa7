"""Conversion of a text-to-image model to an initial model for text-to-video training."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Literal, cast

import torch

from mobius_train.assembly.load_model import load_image_or_video_model
from mobius_train.convert import compare
from mobius_train.convert.components import load_components, save_video_pipeline
from mobius_train.convert.conversion_report import Report
from mobius_train.encoders.masked_text import pipeline_tokens
from mobius_train.errors import MobiusError
from mobius_train.files import finished_folder
from mobius_train.models import build_denoiser, weights_hash
from mobius_train.models.composite import Composite
from mobius_train.models.families import as_denoiser, family_of, is_video_model
from mobius_train.ring_shape import PAPER, RingShape


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
        source: a diffusers pipeline folder of a supported image model.
        destination: a pipeline folder in the format of a run's final/.
        mode: "parallel" adds a ring in parallel to the image model, "serial" adds temporal layers inside it.
        text_encoder: a folder or package:NAME that replaces the source's text encoder.
        num_frames: default number of frames of a sampled clip.
        seed: seed of the new layers.
        shape: the ring's; only with mode "parallel".

    Raises:
        MobiusError: a part is missing, damaged or unsupported, or the written model predicts something else.
    """
    report = Report(source, destination)
    with finished_folder(destination) as folder:
        image_model = load_image_or_video_model(None, str(source))
        if is_video_model(image_model):
            raise MobiusError(f"{source} is a text-to-video model already: train it, or give a text-to-image model")
        as_denoiser(image_model)  # raises if it cannot be a backbone
        components = load_components(source, text_encoder)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = cast(Composite, build_denoiser(image_model, "text-to-video", mode, asdict(shape)))
        kind, part = type(model), family_of(type(image_model).__name__).part
        report.mapped.append((f"{part}, {len(image_model.state_dict())} tensors", f"unet/{kind.image_part}"))
        settings = {"num_frames": num_frames, "max_text_tokens": pipeline_tokens(text_encoder or str(source))}
        save_video_pipeline(model, components, source, folder, report, **settings)

        written = kind.from_pretrained(folder / "unet").eval()
        kept = getattr(written, kind.image_part)
        (new,) = (getattr(written, name) for name in kind.parts if name != kind.image_part)
        report.made.append(
            (f"{len(new.state_dict())} tensors of the {type(new).__name__}", f"initialised, seed {seed}")
        )
        same = weights_hash(kept) == weights_hash(image_model)
        report.require(same, "the image model's weights read back have the source's hash")
        apart = compare.distance(compare.prediction(written), compare.prediction(image_model))
        report.require(
            apart <= compare.TOLERANCE,
            f"the model read back predicts the image model's output on every frame (difference {apart:.1e})",
        )
        report.raise_problems()
    return report
