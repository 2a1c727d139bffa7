"""The parts of a pipeline folder other than the denoiser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from mobius_train.assembly.load_scheduler import load_scheduler
from mobius_train.convert.conversion_report import Report
from mobius_train.encoders.fit import check_latents, check_text
from mobius_train.encoders.load_text_encoding import load_text_encoding, make_text_encoding
from mobius_train.encoders.text_encoding import components_of
from mobius_train.models.families import as_denoiser, parts
from mobius_train.pipeline import TextToVideoPipeline
from mobius_train.pretrained.pipeline_index import INDEX, named_parts
from mobius_train.pretrained.strict_load import load_diffusers


def is_pipeline(folder: Path) -> bool:
    return (folder / INDEX).is_file()


def load_components(folder: Path, text_encoder: str | None = None) -> dict[str, Any]:
    """Load autoencoder, text encoders, tokenizers and scheduler of a pipeline folder.

    Args:
        text_encoder: a folder or package:NAME that replaces the pipeline's text encoders.

    Raises:
        MobiusError: a component is missing or cannot be loaded.
    """
    vae = load_diffusers(AutoencoderKL, folder / "vae")
    text = load_text_encoding(text_encoder or str(folder), torch.device("cpu"))
    return {"vae": vae, **components_of(text), "scheduler": load_scheduler(None, str(folder))}


def save_video_pipeline(
    model: torch.nn.Module, components: dict[str, Any], source: Path, folder: Path, report: Report, **settings: Any
) -> None:
    """Write a TextToVideoPipeline with this video model, and report the source's parts.

    Args:
        components: result of `load_components`.
        settings: see TextToVideoPipeline.

    Raises:
        MobiusError: the model and the components do not fit each other.
    """
    denoiser = as_denoiser(model)
    check_latents(denoiser, components["vae"].config)
    text = make_text_encoding(components, torch.device("cpu"), wanted=denoiser.backbone.condition_widths)
    check_text(denoiser, text, str(source))
    TextToVideoPipeline(unet=model, **components, **settings).save_pretrained(folder)
    account_for_components(source, set(components), report)


def account_for_components(source: Path, components: set[str], report: Report) -> None:
    """Report the parts of a source pipeline other than the denoiser; `components` are those that are kept."""
    report.mapped += [(part, part) for part in sorted(components)]
    others = [part for part in named_parts(str(source)) if part not in components and part not in parts()]
    report.left_out += [(part, "not needed to make clips") for part in others]
