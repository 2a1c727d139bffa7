"""Strict loading of diffusers models from untrusted folders: nothing missing, nothing ignored, no code run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError

from mobius_train.assembly.load_scheduler import load_scheduler
from mobius_train.convert.conversion_report import Report
from mobius_train.convert.pickles import UNREADABLE
from mobius_train.encoders.text_encoder import load_text_encoder
from mobius_train.errors import MobiusError
from mobius_train.models.composite import Composite
from mobius_train.models.families import DEFAULT
from mobius_train.pipeline import TextToVideoPipeline

Model = TypeVar("Model", bound=torch.nn.Module)
Video = TypeVar("Video", bound=Composite)
PIPELINE = "model_index.json"
COMPONENTS = {"vae", "text_encoder", "tokenizer", "scheduler"}


def is_pipeline(folder: Path) -> bool:
    return (folder / PIPELINE).is_file()


def model_class(folder: Path) -> str:
    """The class name recorded in a model folder.

    Raises:
        MobiusError: there is no config.json with a class name.
    """
    path = folder / "config.json"
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["_class_name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MobiusError(
            f"{path} does not name the model's class ({error!r}): give a folder in diffusers format"
        ) from (error)


def load_model(kind: type[Model], folder: Path) -> Model:
    """Load a model of exactly this class in float32; the folder must contain exactly its weights.

    Raises:
        MobiusError: it is of another class, a weight is missing or unexpected, or a file is damaged.
    """
    saved_class = model_class(folder)
    if saved_class != kind.__name__:
        raise MobiusError(f"{folder} contains a {saved_class}, not a {kind.__name__}")
    loader: Any = kind
    try:
        model, info = loader.from_pretrained(
            folder, torch_dtype=torch.float32, low_cpu_mem_usage=False, local_files_only=True, output_loading_info=True
        )
    except (*UNREADABLE, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise MobiusError(
            f"cannot load the {saved_class} in {folder}: {reason}. Its weights are in {_files(folder)}"
        ) from (error)
    problems = [f"{name} is missing" for name in info["missing_keys"]]
    problems += [f"{name} is not a weight of this model" for name in info["unexpected_keys"]]
    problems += [f"{entry[0]} has another shape" for entry in info["mismatched_keys"]]
    if problems:
        raise MobiusError(
            f"{_files(folder)} and {folder / 'config.json'} do not match: {len(problems)} weights differ,"
            f" {'; '.join(problems[:5])}"
        )
    return model.eval().requires_grad_(False)


def load_video_model(kind: type[Video], folder: Path) -> Video:
    """Load a ParallelUNet or SerialUNet, each part with `load_model`."""
    saved_class = model_class(folder)
    if saved_class != kind.__name__:
        raise MobiusError(f"{folder} contains a {saved_class}, not a {kind.__name__}")
    parts: dict[str, Any] = {name: load_model(part, folder / name) for name, part in kind.parts.items()}
    return kind(**parts).eval().requires_grad_(False)


def load_components(folder: Path, text_encoder: str | None = None) -> dict[str, Any]:
    """Load autoencoder, text encoder, tokenizer and scheduler of a pipeline folder.

    Args:
        text_encoder: a folder or package:NAME that replaces the pipeline's text encoder.

    Raises:
        MobiusError: a component is missing or cannot be loaded.
    """
    vae = load_model(AutoencoderKL, folder / "vae")
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
    """
    TextToVideoPipeline(unet=model, **components, **settings).save_pretrained(folder)
    account_for_components(source, report)


def account_for_components(source: Path, report: Report) -> None:
    """Report the parts of a source pipeline other than the denoiser."""
    report.mapped += [(part, part) for part in sorted(COMPONENTS)]
    report.left_out += [(part, "not needed to make clips") for part in other_parts(source, COMPONENTS | {DEFAULT.part})]


def other_parts(folder: Path, taken: set[str]) -> list[str]:
    """The parts in a pipeline's index except those in `taken`."""
    try:
        index = json.loads((folder / PIPELINE).read_text(encoding="utf-8"))
        named = [name for name, value in index.items() if isinstance(value, list) and value[0] is not None]
    except (OSError, ValueError, AttributeError, IndexError) as error:
        raise MobiusError(f"{folder / PIPELINE} is not a pipeline index: {error!r}") from error
    return [name for name in named if name not in taken]


def _files(folder: Path) -> str:
    names = sorted(path.name for path in folder.glob("*") if path.suffix in (".safetensors", ".bin"))
    return ", ".join(str(folder / name) for name in names) or f"no file of {folder}"
