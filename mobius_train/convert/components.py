"""The parts of a pipeline folder other than the denoiser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from mobius_train.assembly.load_scheduler import load_scheduler
from mobius_train.convert.conversion_report import Report
from mobius_train.encoders.fit import check_fit
from mobius_train.encoders.text_encoder import TextEncoder, load_text_encoder
from mobius_train.errors import MobiusError
from mobius_train.models.families import DEFAULT, as_denoiser
from mobius_train.pipeline import INDEX, TextToVideoPipeline
from mobius_train.pretrained.model_files import read_json
from mobius_train.pretrained.strict_load import load_diffusers

COMPONENTS = {"vae", "text_encoder", "tokenizer", "scheduler"}


def is_pipeline(folder: Path) -> bool:
    return (folder / INDEX).is_file()


def load_components(folder: Path, text_encoder: str | None = None) -> dict[str, Any]:
    """Load autoencoder, text encoder, tokenizer and scheduler of a pipeline folder.

    Args:
        text_encoder: a folder or package:NAME that replaces the pipeline's text encoder.

    Raises:
        MobiusError: a component is missing or cannot be loaded.
    """
    vae = load_diffusers(AutoencoderKL, folder / "vae")
    text = load_text_encoder(text_encoder or str(folder), torch.device("cpu"))
    scheduler = load_scheduler(None, str(folder))
    return {"vae": vae, "text_encoder": text.model, "tokenizer": text.tokenizer, "scheduler": scheduler}


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
    text = TextEncoder(components["text_encoder"], components["tokenizer"], torch.device("cpu"))
    check_fit(as_denoiser(model), components["vae"].config, text, str(source))
    TextToVideoPipeline(unet=model, **components, **settings).save_pretrained(folder)
    account_for_components(source, report)


def account_for_components(source: Path, report: Report) -> None:
    """Report the parts of a source pipeline other than the denoiser."""
    report.mapped += [(part, part) for part in sorted(COMPONENTS)]
    report.left_out += [(part, "not needed to make clips") for part in other_parts(source, COMPONENTS | {DEFAULT.part})]


def other_parts(folder: Path, taken: set[str]) -> list[str]:
    """The parts in a pipeline's index except those in `taken`."""
    try:
        index = read_json(folder / INDEX)
        named = [name for name, value in index.items() if isinstance(value, list) and value[0] is not None]
    except IndexError as error:
        raise MobiusError(f"{folder / INDEX} is not a pipeline index: {error!r}") from error
    return [name for name in named if name not in taken]
