"""Model names: local folders, names on the hub, and `package:NAME`, a Python package that contains a model folder."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.constants import is_offline_mode
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from mobius_train.errors import MobiusError

PACKAGE = "package:"


def check_local(name_or_path: str) -> None:
    """Reject a missing local path before the hub is queried for it.

    Raises:
        MobiusError: the name is not of the form `name` or `owner/name`, and there is no such folder.
    """
    path = Path(name_or_path)
    if path.is_file():
        raise MobiusError(f"{name_or_path} is a file: give the folder of a model in diffusers layout")
    if not path.exists() and (path.is_absolute() or name_or_path[:1] in (".", "~") or len(path.parts) > 2):
        raise MobiusError(f"there is no model folder {name_or_path}: check the path")


def local_folder(name_or_path: str | Path) -> Path | None:
    """The folder of a model on this machine: a local folder, or a hub model's in the cache; None if there is none."""
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    try:
        return Path(snapshot_download(str(name_or_path), local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def absent(name: str, reason: str = "") -> MobiusError:
    """The error for a model that is neither a local folder nor in the hub's cache.

    Args:
        reason: why it was not downloaded, if downloads are on.
    """
    why = "downloads are off (HF_HUB_OFFLINE=1)" if is_offline_mode() else f"the download failed: {reason}"
    return MobiusError(
        f"the model {name!r} is not on this machine, and {why}. Download it once with `hf download {name}`, or give"
        " the path of a local folder"
    )


def resolve_package(name_or_path: str) -> str:
    """The model folder in the Python package that `package:NAME` names; other names are returned unchanged.

    The package is not imported.

    Raises:
        MobiusError: the package's name is dotted or relative, it is not installed, or it contains no model folder.
    """
    if not name_or_path.startswith(PACKAGE):
        return name_or_path
    package = name_or_path.removeprefix(PACKAGE)
    # Python would import the parents of a dotted name, and look up a relative one beside this module.
    if not package.isidentifier():
        raise MobiusError(f"{name_or_path}: {package!r} is not the name of a package: give one without dots or slashes")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise MobiusError(f"{name_or_path}: the Python package {package} is not installed")
    configs = sorted(Path(spec.origin).parent.glob("**/config.json"), key=lambda path: len(path.parts))
    if spec.submodule_search_locations is None or not configs:
        raise MobiusError(f"{name_or_path}: the Python package {package} contains no model folder")
    return str(configs[0].parent)
