"""The files of a model folder, checked without loading a tensor: which there are, and whether each is what it says."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mobius_train.errors import MobiusError
from mobius_train.files import decode_json, open_regular, read_small
from mobius_train.pretrained.pickles import UNREADABLE, load_tensors, unreadable_file

# Names of weight files, in the order in which diffusers and transformers look for them.
WEIGHTS = (
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "diffusion_pytorch_model.bin",
    "pytorch_model.bin",
)
CONFIG = "config.json"
# Suffixes of the files that libraries read whole, and their limit: the largest vocabularies have 40 MB.
TEXTS = (".json", ".txt", ".jinja", ".model")
MAX_TEXT_BYTES = 2**28
# A file that git-lfs puts in place of a large one.
POINTER = b"version https://git-lfs.github.com/spec/"


def read_json(path: Path) -> dict[str, Any]:
    """Read a model's JSON file.

    Raises:
        MobiusError: the file is missing, is not UTF-8 or JSON, or does not contain a mapping; names the file.
    """
    try:
        content = read_small(path)
        if content.startswith(POINTER):
            raise _pointer(path)
        values = decode_json(content)
    except OSError as error:
        raise MobiusError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        kind = "UTF-8" if isinstance(error, UnicodeDecodeError) else "JSON"
        raise MobiusError(f"{path} is not {kind}: {error}. It is damaged, or of another kind") from error
    if not isinstance(values, dict):
        raise MobiusError(f"{path} is not a model's configuration: it contains no names with values")
    return values


def class_name(folder: Path, config_name: str = CONFIG) -> str:
    """The class that a diffusers folder names in its configuration.

    Raises:
        MobiusError: there is no configuration with a class name.
    """
    name = read_json(folder / config_name).get("_class_name")
    if not isinstance(name, str):
        raise MobiusError(f"{folder / config_name} has no _class_name: give a folder in diffusers layout")
    return name


def check_text_files(folder: Path) -> None:
    """Check the files of a folder that libraries read whole as text, such as a tokenizer's.

    Raises:
        MobiusError: one of them is no file but a pipe or a device, or is larger than any vocabulary.
    """
    for path in sorted(folder.glob("*")):
        if path.suffix in TEXTS and path.exists() and not path.is_dir():
            try:
                with open_regular(path) as file:
                    size = os.fstat(file.fileno()).st_size
            except OSError as error:
                raise MobiusError(f"cannot read {path}: {error.strerror}") from error
            if size > MAX_TEXT_BYTES:
                raise MobiusError(f"{path} has {size} bytes, the limit is {MAX_TEXT_BYTES}: copy or download it again")


def check_weight_files(folder: Path, variant: str | None) -> list[Path]:
    """Check the headers of the files that contain a model's weights, and return the files.

    Args:
        variant: such as fp16 in diffusion_pytorch_model.fp16.safetensors; None: the files without one.

    Raises:
        MobiusError: there are none, a file is missing, damaged or contains code, or an index and its files do not
            match; names the file.
    """
    index, files = _find_weights(folder, variant)
    if not files:
        raise MobiusError(f"{folder} contains no weights: it has none of {', '.join(WEIGHTS)}")
    found = {path: tensor_names(path) for path in files}
    if index is None:
        return files
    for path, names in found.items():
        listed = {name for name, place in read_json(index)["weight_map"].items() if place == path.name}
        if listed != names:
            name = min(listed ^ names)
            raise MobiusError(
                f"{index} and {path} do not match: {name} is only in the "
                + ("index" if name in listed else "file")
                + ". Copy or download the model again"
            )
    return files


def _find_weights(folder: Path, variant: str | None = None) -> tuple[Path | None, list[Path]]:
    """The index, if the weights are in several files, and the files."""
    for name in WEIGHTS:
        stem, suffix = name.split(".")
        path = folder / (name if variant is None else f"{stem}.{variant}.{suffix}")
        index = folder / f"{stem}.{suffix}.index{'' if variant is None else f'.{variant}'}.json"
        if index.is_file():
            return index, indexed_files(index)
        if path.is_file():
            return None, [path]
    return None, []


def only_variant(folder: Path) -> str | None:
    """The variant of a folder that has only weights of one variant, such as fp16; None for other folders."""
    if _find_weights(folder)[1]:
        return None
    stems = "|".join(dict.fromkeys(name.split(".")[0] for name in WEIGHTS))
    plain = re.compile(rf"(?:{stems})\.(\w+)\.(?:safetensors|bin)")
    indexed = re.compile(rf"(?:{stems})\.(?:safetensors|bin)\.index\.(\w+)\.json")
    names = [path.name for path in folder.glob("*") if path.is_file()]
    found = {match[1] for name in names if (match := plain.fullmatch(name) or indexed.fullmatch(name))}
    return found.pop() if len(found) == 1 else None


def tensor_names(path: Path) -> set[str]:
    """The names of a file's tensors.

    Raises:
        MobiusError: the file is a git-lfs pointer, empty, damaged or truncated, or contains code; names the file.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(POINTER)) == POINTER:
                raise _pointer(path)
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as opened:
                return set(opened.keys())
    except (*UNREADABLE, SafetensorError) as error:
        raise unreadable_file(path, error) from error
    state = load_tensors(path)
    if not isinstance(state, dict):
        raise MobiusError(f"{path} does not contain a dictionary of tensors")
    return {str(name) for name in state}


def indexed_files(index: Path) -> list[Path]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise MobiusError(f"{index} has no weight_map from weights to files: it is damaged, or of another kind")
    names = sorted(set(places.values()))
    for name in names:
        # A name with a path could lead out of the folder.
        if Path(name).name != name or not (index.parent / name).is_file():
            raise MobiusError(f"{index} names {name!r}, but there is no such file in {index.parent}: copy it again")
    return [index.parent / name for name in names]


def _pointer(path: Path) -> MobiusError:
    return MobiusError(
        f"{path} is a git-lfs pointer in place of the file itself: fetch it with `git lfs pull` in its folder, or"
        " download the model with `hf download`"
    )
