"""Models that a recipe names by folder or hub id, loaded once in each worker."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor

from mobius_train.errors import MobiusError
from mobius_train.prepare.clip import Frames


def check(model: str) -> None:
    """
    Raises:
        MobiusError: no such folder, and no such model that the hub or its cache has.
    """
    try:
        transformers.AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise MobiusError(f"the model {model} cannot be found or read: {error}") from error


def device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@lru_cache(maxsize=8)
def load(kind: str, model: str) -> Any:
    """A transformers class by name from this model: a processor, or weights that are ready to run."""
    loaded = getattr(transformers, kind).from_pretrained(model)
    return loaded.to(device()).eval() if isinstance(loaded, torch.nn.Module) else loaded


def images(frames: Frames, count: int) -> list[Image.Image]:
    """`count` pictures, or all if there are fewer, from the middles of equal parts of the clip."""
    count = min(count, len(frames))
    return [Image.fromarray(frames[(2 * number + 1) * len(frames) // (2 * count)]) for number in range(count)]


@torch.no_grad()
def embeddings(model: str, pictures: list[Image.Image]) -> Tensor:
    """CLIP's image embeddings of length 1: (N, D)."""
    inputs = load("AutoImageProcessor", model)(images=pictures, return_tensors="pt").to(device())
    features = load("CLIPVisionModelWithProjection", model)(**inputs).image_embeds
    return torch.nn.functional.normalize(features.float(), dim=-1).cpu()


@torch.no_grad()
def rewrite(model: str, text: str, max_new_tokens: int, **options: Any) -> str:
    """What a sequence-to-sequence model makes of a text, greedily, so that it is the same each time."""
    tokenizer = load("AutoTokenizer", model)
    inputs = tokenizer([text], return_tensors="pt", truncation=True).to(device())
    written = load("AutoModelForSeq2SeqLM", model).generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, **options
    )
    return str(tokenizer.batch_decode(written, skip_special_tokens=True)[0]).strip()
