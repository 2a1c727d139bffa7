"""Models given by folder or hub id, loaded once per worker."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor

from mobius_train.errors import MobiusError
from mobius_train.prepare.candidate import Frames
from mobius_train.pretrained.strict_load import find_model, load_object, load_transformers

VISION = ("AutoImageProcessor", "CLIPVisionModelWithProjection")
REWRITING = ("AutoTokenizer", "AutoModelForSeq2SeqLM")


def check(model: str, *kinds: str) -> None:
    """Load the model with these transformers classes before the work starts. Forked workers share it.

    Raises:
        MobiusError: the model is not a folder and not on the hub or in its cache, or some of its files are missing.
    """
    for kind in kinds:
        try:
            read(kind, model)
        except MobiusError as error:
            raise MobiusError(f"the model {model} cannot be found or loaded as {kind}: {error}") from error


def device() -> torch.device:
    """A CUDA GPU if available, else the CPU: forked workers cannot use an Apple GPU.

    Workers have consecutive process ids and are spread over the GPUs.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", os.getpid() % torch.cuda.device_count())


def load(kind: str, model: str) -> Any:
    """Load a transformers class by name: a processor, or a model on the worker's device."""
    loaded = read(kind, model)
    return loaded.to(device()) if isinstance(loaded, torch.nn.Module) else loaded


@cache
def read(kind: str, model: str) -> Any:
    """As `load`, but on the CPU: a process that has used a GPU must not fork."""
    load_kind = load_transformers if "Model" in kind else load_object
    return load_kind(getattr(transformers, kind), find_model(model))


def images(frames: Frames, count: int) -> list[Image.Image]:
    """Up to `count` pictures, from the middles of equal segments of the clip."""
    count = min(count, len(frames))
    return [Image.fromarray(frames[(2 * number + 1) * len(frames) // (2 * count)]) for number in range(count)]


@torch.no_grad()
def embeddings(model: str, pictures: list[Image.Image]) -> Tensor:
    """CLIP's image embeddings (N, D), normalised to length 1."""
    processor, vision = (load(kind, model) for kind in VISION)
    inputs = processor(images=pictures, return_tensors="pt").to(device())
    features = vision(**inputs).image_embeds
    return torch.nn.functional.normalize(features.float(), dim=-1).cpu()


@torch.no_grad()
def rewrite(model: str, text: str, max_new_tokens: int, **options: Any) -> str:
    """Rewrite a text with a sequence-to-sequence model; greedy decoding makes the result deterministic."""
    tokenizer, writer = (load(kind, model) for kind in REWRITING)
    inputs = tokenizer([text], return_tensors="pt", truncation=True).to(device())
    written = writer.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, **options)
    return str(tokenizer.batch_decode(written, skip_special_tokens=True)[0]).strip()
