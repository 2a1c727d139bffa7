"""The differences between a resumed run and the run that wrote the checkpoint."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from pydantic import ValidationError

from mobius_train.checkpoint.read import Checkpoint
from mobius_train.checkpoint.saver import Identity
from mobius_train.config import RunConfig
from mobius_train.engine.contents import Contents
from mobius_train.recipe_files import by_dotted_name
from mobius_train.yaml_files import parse_yaml

# Fields that say how to resume, and where the run is.
OWN = (
    "resume_from_checkpoint",
    "resume_with_changed_data",
    "resume_with_changed_batch",
    "resume_with_changed_precision",
    "resume_with_changed_learning_rate",
    "output_dir",
)
NOTHING = "not set"


def changes(checkpoint: Checkpoint, contents: Contents, identity: Identity, world_size: int) -> list[str]:
    """Return a line for each field of the recipe, the engine and the versions that differs from the checkpoint's.

    Raises:
        MobiusError: the checkpoint's recipe cannot be read.
    """
    state = checkpoint.state
    before = recipe_fields(checkpoint.config) | {
        "engine": state.contents.engine,
        "ZeRO stage": state.contents.zero_stage,
        "ranks": state.world_size,
    }
    now = recipe_fields(parse_yaml(identity.config)) | {
        "engine": contents.engine,
        "ZeRO stage": contents.zero_stage,
        "ranks": world_size,
    }
    before |= {f"version of {name}": version for name, version in state.versions.items()}
    now |= {f"version of {name}": version for name, version in identity.versions.items()}
    return [f"other than before: {change}" for change in differing(before, now)]


def differing(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return a text for each name whose value differs."""
    return [
        f"{name} was {before.get(name, NOTHING)!s}, now {now.get(name, NOTHING)!s}"
        for name in before | now
        if before.get(name, NOTHING) != now.get(name, NOTHING)
    ]


def recipe_fields(values: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a recipe by dotted name, except OWN.

    Fields that an older version did not have get their defaults.
    """
    # The fields of another version are compared as they are.
    with suppress(ValidationError, RecursionError):
        values = RunConfig.model_validate(values).model_dump(mode="json")
    return {name: value for name, value in by_dotted_name(values).items() if name not in OWN}
