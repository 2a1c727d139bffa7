"""Strict loading of models of diffusers and transformers: every weight is accounted for, and no code of a folder runs.

Both libraries fill weights that a file lacks with random or uninitialised numbers, and say so only in a log.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download
from huggingface_hub.constants import is_offline_mode
from huggingface_hub.errors import EntryNotFoundError
from torch import nn

from mobius_train.errors import MobiusError
from mobius_train.pretrained.model_files import CONFIG, check_text_files, check_weight_files, only_variant, read_json
from mobius_train.pretrained.model_names import absent, check_local, local_folder

logger = logging.getLogger(__name__)

# The only weights of a transformers model that may be missing: nothing here uses poolers, and many files have none.
MAY_BE_MISSING = re.compile(r"(.*\.)?pooler\..*")
# The only weights of a model's own modules that may be unexpected: a buffer 0, 1, 2, … that older versions saved.
MAY_BE_LEFT_OVER = re.compile(r"(.*\.)?position_ids")
SHOWN = 5


@dataclass(frozen=True)
class Place:
    """The place of a model.

    Attributes:
        name: a folder or a hub name, and
        subfolder: a part of it or "": what a library's from_pretrained takes.
        folder: the same place on this machine. It has the configuration; of a hub model perhaps nothing else yet.
        is_hub: the name is a hub name.
    """

    name: str
    subfolder: str
    folder: Path
    is_hub: bool


def find_model(name_or_path: str | Path, part: str = "", config_name: str = CONFIG) -> Place:
    """Find a model: the part of a pipeline if there is one of this name, else the folder itself.

    Args:
        name_or_path: a Path is a local folder; a text may also be a hub name.
        config_name: the file that a model has, such as scheduler_config.json.

    Raises:
        MobiusError: there is no such folder or hub model, it does not contain the part, or the configuration is
            damaged.
    """
    name = str(name_or_path)
    if isinstance(name_or_path, Path) and not name_or_path.exists():
        raise MobiusError(f"there is no model folder {name}: check the path")
    check_local(name)
    folder, is_hub = local_folder(name), not Path(name).is_dir()
    choices = list(dict.fromkeys((part, "")))
    for subfolder in choices:
        if folder is not None and (folder / subfolder / config_name).is_file():
            read_json(folder / subfolder / config_name)
            return Place(name, subfolder, folder / subfolder, is_hub)
    if is_hub and not is_offline_mode():
        return _download_config(name, choices, config_name)
    if folder is None:
        raise absent(name)
    wanted = " nor ".join(str(Path(subfolder, config_name)) for subfolder in choices)
    found = f"the copy of {name} in the hub's cache, {folder}," if is_hub else str(folder)
    raise MobiusError(
        f"no {part or 'model'} in {name}: {found} has no {wanted}. "
        + (f"Complete it with `hf download {name}`" if is_hub else "Give a folder or hub name in diffusers layout")
    )


def _download_config(name: str, choices: list[str], config_name: str) -> Place:
    reason = ""
    for subfolder in choices:
        try:
            path = hf_hub_download(name, config_name, subfolder=subfolder or None)
        except EntryNotFoundError as error:
            reason = _first_line(error)
            continue
        except Exception as error:  # the network's errors have no common class
            raise absent(name, _first_line(error)) from error
        return Place(name, subfolder, Path(path).parent, is_hub=True)
    raise absent(name, reason)


def load_diffusers(
    kind: type[Any], name_or_path: str | Path, part: str = "", also_named: Sequence[str] = (), **options: Any
) -> Any:
    """Load a model of exactly this class; its files must contain exactly its weights.

    Args:
        kind: a class of diffusers.
        part: see `find_model`.
        also_named: further names that the configuration may give the class.
        options: of from_pretrained. By default the model is in float32, whatever dtype its files have.

    Raises:
        MobiusError: the model is missing or of another class, a weight is missing, unexpected or has another shape, or
            a file is damaged; names the file.
    """
    place = find_model(name_or_path, part)
    saved = read_json(place.folder / CONFIG).get("_class_name", kind.__name__)
    if saved not in (kind.__name__, *also_named):
        raise MobiusError(f"{place.folder} contains a {saved}, not a {kind.__name__}")
    # With accelerate, diffusers would by default leave weights that a file lacks without values.
    options = {"torch_dtype": torch.float32, "low_cpu_mem_usage": False} | options
    return _load_weights(kind, place, options, _diffusers_problems)


def load_transformers(kind: type[Any], place: Place, **options: Any) -> Any:
    """Load a transformers model; every weight of the class must be in the files, except MAY_BE_MISSING.

    The files may contain more: other towers, or the heads of other tasks. Layers that the configuration does not have
    are refused.

    Raises:
        MobiusError: as `load_diffusers`; or the model needs code of its folder.
    """
    return _load_weights(kind, place, options | {"trust_remote_code": False}, _transformers_problems)


def load_object(kind: type[Any], place: Place, **options: Any) -> Any:
    """Load something without weights: a scheduler, a configuration, a tokenizer or a processor.

    Raises:
        MobiusError: its files are missing or damaged, or it needs code of its folder.
    """
    if kind.__module__.startswith(transformers.__name__):
        options = options | {"trust_remote_code": False}
    check_text_files(place.folder)
    try:
        return kind.from_pretrained(place.name, subfolder=place.subfolder, **options)
    except Exception as error:  # damaged and hostile files raise all kinds of errors
        raise _not_loaded(kind, place, error) from error


def _load_weights(kind: type[Any], place: Place, options: dict[str, Any], problems_of: Any) -> Any:
    if not place.is_hub or is_offline_mode():
        variant = only_variant(place.folder) if options.get("variant") is None else None
        if variant is not None:
            logger.warning("%s has only %s weights: these are loaded", place.folder, variant)
            options = options | {"variant": variant}
        check_weight_files(place.folder, options.get("variant"))
    try:
        model, info = kind.from_pretrained(
            place.name,
            subfolder=place.subfolder,
            output_loading_info=True,
            # Weights of another shape are then in the report, instead of in an error of the library.
            ignore_mismatched_sizes=True,
            **options,
        )
    except Exception as error:  # damaged and hostile files raise all kinds of errors
        raise _not_loaded(kind, place, error) from error
    # A download can have brought another revision than that in the cache before.
    folder = place.folder if not place.is_hub else Path(local_folder(place.name) or "", place.subfolder)
    files = check_weight_files(folder, options.get("variant"))
    problems = problems_of(model, info)
    if problems:
        more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise MobiusError(
            f"{', '.join(map(str, files))} and {folder / CONFIG} do not match: {'; '.join(problems[:SHOWN])}"
            f"{more}. Copy or download the model again"
        )
    return model


def _diffusers_problems(model: nn.Module, info: dict[str, Any]) -> list[str]:
    return _listed(info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])


def _transformers_problems(model: nn.Module, info: dict[str, Any]) -> list[str]:
    missing = [name for name in info["missing_keys"] if not MAY_BE_MISSING.fullmatch(name)]
    modules = {name for name, _ in model.named_children()}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    unexpected = [
        name
        for name in info["unexpected_keys"]
        if name.removeprefix(prefix).split(".")[0] in modules and not MAY_BE_LEFT_OVER.fullmatch(name)
    ]
    return _listed(missing, unexpected, info["mismatched_keys"])


def _listed(missing: Iterable[str], unexpected: Iterable[str], mismatched: Iterable[Any]) -> list[str]:
    problems = [f"{name} is missing" for name in sorted(missing)]
    problems += [f"{name} is not a weight of this model" for name in sorted(unexpected)]
    return problems + [
        f"{name} has the shape {tuple(found)} in the file, {tuple(expected)} in the model"
        for name, found, expected in sorted(mismatched, key=str)
    ]


def _not_loaded(kind: type[Any], place: Place, error: Exception) -> MobiusError:
    if isinstance(error, MobiusError):
        return error
    if is_offline_mode() is False and place.is_hub:
        reason = f"{_first_line(error)}. Check the network, or download it with `hf download {place.name}`"
    elif "trust_remote_code" in str(error) or "custom code" in str(error):
        reason = "it needs Python code of that folder (auto_map in its configuration), which is never run"
    else:
        reason = f"{_first_line(error)}. A file is missing, damaged, or of another kind"
    return MobiusError(f"cannot load a {kind.__name__} from {place.folder}: {reason}")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()[:300]}" if lines else type(error).__name__
