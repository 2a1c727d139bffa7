"""Models that a recipe names by folder or hub id, loaded once in each worker."""

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

VISION = ("AutoImageProcessor", "CLIPVisionModelWithProjection")
REWRITING = ("AutoTokenizer", "AutoModelForSeq2SeqLM")


def check(model: str, *kinds: str) -> None:
    """Load it as these transformers classes, before anything is done. Forked workers share what is loaded.

    Raises:
        MobiusError: no such folder, and no such model that the hub or its cache has; or files of it are missing.
    """
    for kind in kinds:
        try:
            read(kind, model)
        except Exception as error:  # missing and damaged files have no class of their own
            raise MobiusError(f"the model {model} cannot be found or read as {kind}: {error}") from error


def device() -> torch.device:
    """A GPU where there is one; workers, whose numbers follow each other, take them in turn."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", os.getpid() % torch.cuda.device_count())


def load(kind: str, model: str) -> Any:
    """A transformers class by name from this model: a processor, or weights that are ready to run."""
    loaded = read(kind, model)
    return loaded.to(device()) if isinstance(loaded, torch.nn.Module) else loaded


@cache
def read(kind: str, model: str) -> Any:
    """As `load`, but on the CPU: a process that has touched a GPU must not fork."""
    loaded = getattr(transformers, kind).from_pretrained(model)
    return loaded.eval() if isinstance(loaded, torch.nn.Module) else loaded


def images(frames: Frames, count: int) -> list[Image.Image]:
    """`count` pictures, or all if there are fewer, from the middles of equal parts of the clip."""
    count = min(count, len(frames))
    return [Image.fromarray(frames[(2 * number + 1) * len(frames) // (2 * count)]) for number in range(count)]


@torch.no_grad()
def embeddings(model: str, pictures: list[Image.Image]) -> Tensor:
    """CLIP's image embeddings of length 1: (N, D)."""
    processor, vision = (load(kind, model) for kind in VISION)
    inputs = processor(images=pictures, return_tensors="pt").to(device())
    features = vision(**inputs).image_embeds
    return torch.nn.functional.normalize(features.float(), dim=-1).cpu()


@torch.no_grad()
def rewrite(model: str, text: str, max_new_tokens: int, **options: Any) -> str:
    """What a sequence-to-sequence model makes of a text, greedily, so that it is the same each time."""
    tokenizer, writer = (load(kind, model) for kind in REWRITING)
    inputs = tokenizer([text], return_tensors="pt", truncation=True).to(device())
    written = writer.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, **options)
    return str(tokenizer.batch_decode(written, skip_special_tokens=True)[0]).strip()
