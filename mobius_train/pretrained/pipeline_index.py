"""The parts of a pipeline folder in diffusers' layout, by the file that lists them."""

from __future__ import annotations

from mobius_train.errors import MobiusError
from mobius_train.pretrained.model_files import CONFIG, read_json
from mobius_train.pretrained.model_names import local_folder
from mobius_train.pretrained.strict_load import find_model

INDEX = "model_index.json"


def named_parts(name_or_path: str) -> list[str]:
    """The parts of a pipeline: those that its index lists, or without one the subfolders with a configuration.

    Empty for a model of one part, and for what does not exist.

    Raises:
        MobiusError: the index is damaged.
    """
    folder = local_folder(name_or_path)
    if folder is None or not (folder / INDEX).is_file():
        try:
            # Downloads the index of a hub model.
            folder = find_model(name_or_path, "", INDEX).folder
        except MobiusError:
            return [] if folder is None else sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    index = read_json(folder / INDEX)
    # A part that the pipeline can do without, and does, is [null, null].
    return [name for name, value in index.items() if isinstance(value, list) and value and value[0] is not None]
