"""Components that make diffusers' own pipelines condition and sample like ours."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from mobius_train.convert.conversion_report import Report
from mobius_train.diffusion.sampler import sampling_scheduler
from mobius_train.encoders.load_text_encoding import make_text_encoding
from mobius_train.encoders.masked_text import pipeline_tokens
from mobius_train.encoders.text_encoder import PART, masks_padding, tokenizer_part
from mobius_train.errors import MobiusError


def stock_components(
    components: Mapping[str, Any],
    max_text_tokens: int | None,
    report: Report,
    wanted: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Return vae, text encoders, tokenizers and scheduler with settings for diffusers, which are noted in the report.

    Our pipeline derives the masking of padding from the kind of encoder and has its own setting for the length of
    captions; diffusers reads both from the components.

    Args:
        wanted: see `make_text_encoding`.
    """
    encoders = make_text_encoding(components, torch.device("cpu"), max_text_tokens, wanted).encoders
    stock = {"vae": components["vae"], "scheduler": sampling_scheduler(components["scheduler"])}
    for part, encoder in encoders.items():
        tokenizer = copy.deepcopy(encoder.tokenizer)
        tokenizer.model_max_length = encoder.max_tokens
        stock |= {part: encoder.model, tokenizer_part(part): tokenizer}
        report.notes.append(f"{tokenizer_part(part)} has a maximum of {encoder.max_tokens} tokens, as in our pipeline")
    if list(encoders) == [PART]:
        masked = masks_padding(encoders[PART].model)
        encoders[PART].model.config.use_attention_mask = masked
        report.notes.append(f"{PART}/config.json has use_attention_mask={str(masked).lower()}, as in our pipeline")
    return stock


def check_ddpm(components: Mapping[str, Any], kind: type[Any]) -> None:
    """Reject a scheduler with which a pipeline class of diffusers cannot sample.

    Raises:
        MobiusError: the model was trained with flow matching.
    """
    if isinstance(components["scheduler"], FlowMatchEulerDiscreteScheduler):
        raise MobiusError(
            f"the model was trained with flow matching, which diffusers' {kind.__name__} does not sample: convert the"
            " model's folder instead of the pipeline"
        )


def check_one_text_encoder(components: Mapping[str, Any], kind: type[Any]) -> None:
    """
    Raises:
        MobiusError: there are several text encoders.
    """
    if components.get("text_encoder_2") is not None:
        raise MobiusError(
            f"the model has several text encoders, but diffusers' {kind.__name__} has one: convert the model's folder"
            " instead of the pipeline"
        )


def text_tokens_of(folder: Path) -> int | None:
    """The length of captions of our pipeline; None for most other pipelines."""
    return pipeline_tokens(str(folder))
