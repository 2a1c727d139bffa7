"""Loading of a frozen model from a local folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from mobius_train.errors import MobiusError


def load_frozen(kind: str, folder: Path, accepted: tuple[str, ...], device: torch.device) -> Any:
    """Load a transformers class by name, in float32 and evaluation mode. Nothing is downloaded.

    Args:
        accepted: values of config.json's model_type that fit.

    Raises:
        MobiusError: the folder is missing, contains another kind of model, or lacks weights.
    """
    if not (folder / "config.json").is_file():
        raise MobiusError(f"no model in {folder}: there is no {folder / 'config.json'}. Give a folder of transformers")
    try:
        model_type = transformers.AutoConfig.from_pretrained(folder, local_files_only=True).model_type
        if model_type not in accepted:
            raise MobiusError(
                f"{folder} contains a {model_type}, which does not fit: give one of {', '.join(accepted)}"
            )
        model, info = getattr(transformers, kind).from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise MobiusError(f"cannot load the model in {folder}: {str(error).splitlines()[0]}") from error
    # Poolers are not used, and not every checkpoint has one.
    missing = sorted(name for name in info["missing_keys"] if "pooler" not in name)
    if missing:
        raise MobiusError(f"{folder} lacks {len(missing)} weights of its config.json; the first is {missing[0]}")
    return model.requires_grad_(False).eval().to(device)


def load_local(kind: str, folder: Path) -> Any:
    """Load a tokenizer or an image processor by its class name.

    Raises:
        MobiusError: its files are missing or damaged.
    """
    try:
        return getattr(transformers, kind).from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise MobiusError(f"cannot load {kind} from {folder}: {str(error).splitlines()[0]}") from error
