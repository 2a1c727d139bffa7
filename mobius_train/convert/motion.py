"""A run's motion weights as a folder that can be handed on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from mobius_train.checkpoint.format import CONFIG
from mobius_train.config import load
from mobius_train.convert.conversion_report import Report
from mobius_train.errors import MobiusError
from mobius_train.files import finished_folder
from mobius_train.model_card import CARD, SAMPLES
from mobius_train.models.motion_weights import MOTION, read_description, write_motion
from mobius_train.pipeline import MOTION_SETTINGS, TextToVideoPipeline, load_pipeline
from mobius_train.run_files import FINAL


def to_motion(source: Path, destination: Path, base: str | None = None, text_encoder: str | None = None) -> Report:
    """Write the motion weights of a run's result in float16, with its recipe and model card.

    Args:
        source: a run's folder, or its final/.
        base, text_encoder: where the image model, the autoencoder and the text encoders are; by default those of the
            run's recipe. A path that begins with a dot is relative to the destination.

    Raises:
        MobiusError: see `write_motion`; or the written weights sample other latents.
    """
    pipeline = load_pipeline(source, "cpu")
    recipe = next((path for path in (source / CONFIG, source.parent / CONFIG) if path.is_file()), None)
    config = None if recipe is None else load(recipe)
    if base is None:
        if config is None:
            raise MobiusError(f"{source} has no {CONFIG} beside it that names its base: give --base")
        base = config.pretrained_model_name_or_path
        if base is None:
            raise MobiusError(f"{recipe} has no pretrained_model_name_or_path: give --base")
    if config is not None:
        text_encoder = text_encoder or config.text_encoder_name_or_path
    report = Report(source, destination)
    with finished_folder(destination) as folder:
        # A relative base is found from the destination's place, which is beside the unfinished folder.
        settings = {name: pipeline.config[name] for name in MOTION_SETTINGS}
        write_motion(pipeline.unet.float(), folder, base, text_encoder, pipeline.scheduler, settings)
        final = source / FINAL if (source / FINAL).is_dir() else source
        for path in (final / CARD, final / SAMPLES, recipe):
            if path is not None and path.is_file():
                shutil.copyfile(path, folder / path.name)
                report.mapped.append((path.name, path.name))
        report.mapped.append((f"unet ({type(pipeline.unet).__name__}), its trained part, in float16", MOTION))
        report.left_out.append(("image model, autoencoder, text encoders", f"those of {base} are used"))
        written = load_pipeline(folder, "cpu")
        report.require(_alike(written.vae, pipeline.vae), f"the autoencoder of {base} is that of the run")
        _check(report, pipeline, written)
        report.raise_problems()
    return report


def describe_motion(folder: Path) -> dict[str, Any]:
    """`kind`, `problems`, and what the motion weights of a folder name, as JSON values; empty if it has none.

    No tensor is loaded.
    """
    path = folder / MOTION
    if not path.is_file():
        return {}
    found: dict[str, Any] = {"kind": "motion weights"}
    try:
        description = read_description(path)
    except MobiusError as error:
        return found | {"problems": [str(error)]}
    return found | description.model_dump(include={"model", "base", "base_sha256", "text_encoder", "settings"})


def _alike(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """The models have the same weights, up to bfloat16."""
    weights, others = one.state_dict(), other.state_dict()
    return weights.keys() == others.keys() and all(
        tensor.shape == others[name].shape and torch.allclose(tensor.float(), others[name].float(), 1e-2, 1e-3)
        for name, tensor in weights.items()
    )


def _check(report: Report, pipeline: TextToVideoPipeline, written: TextToVideoPipeline) -> None:
    """Compare sampled latents; float16 weights differ by rounding."""
    sampled = []
    for one in (pipeline, written):
        one.set_progress_bar_config(disable=True)
        sampled.append(one("a prompt", num_inference_steps=2, output_type="latent", seed=0).frames)
    apart = float((sampled[0] - sampled[1]).abs().max() / sampled[0].abs().max().clamp(min=torch.finfo().tiny))
    report.require(apart < 2e-2, f"the written weights sample the same latents, up to float16 (difference {apart:.1e})")
