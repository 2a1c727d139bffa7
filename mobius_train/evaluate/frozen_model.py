"""Loading of a frozen model from a local folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from mobius_train.errors import MobiusError
from mobius_train.pretrained.strict_load import find_model, load_object, load_transformers


def load_frozen(kind: str, folder: Path, accepted: tuple[str, ...], device: torch.device) -> Any:
    """Load a transformers class by name, in float32 and evaluation mode. Nothing is downloaded.

    Args:
        accepted: values of config.json's model_type that fit.

    Raises:
        MobiusError: the folder is missing, contains another kind of model, or lacks weights.
    """
    place = find_model(folder)
    model_type = load_object(transformers.AutoConfig, place).model_type
    if model_type not in accepted:
        raise MobiusError(f"{folder} contains a {model_type}, which does not fit: give one of {', '.join(accepted)}")
    model = load_transformers(getattr(transformers, kind), place, dtype=torch.float32)
    return model.requires_grad_(False).eval().to(device)


def load_local(kind: str, folder: Path) -> Any:
    """Load a tokenizer or an image processor by its class name.

    Raises:
        MobiusError: its files are missing or damaged.
    """
    return load_object(getattr(transformers, kind), find_model(folder))
