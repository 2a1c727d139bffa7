"""Components that make diffusers' own pipelines condition and sample like ours."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from mobius_train.convert.conversion_report import Report
from mobius_train.diffusion.sampler import sampling_scheduler
from mobius_train.encoders.text_encoder import TextEncoder, masks_padding
from mobius_train.errors import MobiusError
from mobius_train.pipeline import INDEX
from mobius_train.pretrained.model_files import read_json


def stock_components(components: dict[str, Any], max_text_tokens: int | None, report: Report) -> dict[str, Any]:
    """Return vae, text_encoder, tokenizer and scheduler with settings for diffusers, which are noted in the report.

    Our pipeline derives the masking of padding from the kind of encoder and has its own setting for the length of
    captions; diffusers reads both from the components.

    Raises:
        MobiusError: the model was trained with flow matching.
    """
    if isinstance(components["scheduler"], FlowMatchEulerDiscreteScheduler):
        raise MobiusError(
            "the model was trained with flow matching, which diffusers' TextToVideoSDPipeline does not sample: convert"
            " the model's folder instead of the pipeline"
        )
    text_encoder = components["text_encoder"]
    tokens = TextEncoder(text_encoder, components["tokenizer"], torch.device("cpu"), max_text_tokens).max_tokens
    tokenizer = copy.deepcopy(components["tokenizer"])
    tokenizer.model_max_length = tokens
    text_encoder.config.use_attention_mask = masks_padding(text_encoder)
    report.notes.append(
        f"text_encoder/config.json has use_attention_mask={str(masks_padding(text_encoder)).lower()}, and the tokenizer"
        f" has a maximum of {tokens} tokens, as in our pipeline"
    )
    return {
        "vae": components["vae"],
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "scheduler": sampling_scheduler(components["scheduler"]),
    }


def text_tokens_of(folder: Path) -> int | None:
    """The length of captions in the index of our pipeline; None for other pipelines."""
    return read_json(folder / INDEX).get("max_text_tokens")
