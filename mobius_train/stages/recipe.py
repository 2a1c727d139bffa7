"""The file of the stages: a base recipe, and for each stage the fields that differ from it.

base: sd21.yaml
output_dir: runs/staged
stages:
  - name: short
    max_train_steps: 10000
    data: {num_frames: 8}
  - name: long
    max_train_steps: 5000
    data: {num_frames: 16}
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from mobius_train.config import RunConfig
from mobius_train.config_sections import Section
from mobius_train.errors import MobiusError, without_secrets
from mobius_train.recipe_files import apply_override, read_recipe, validated

StartFrom = Literal["weights", "average"]
OptimizerState = Literal["fresh", "kept"]
# First part of an override of one stage: stages.NAME.FIELD=VALUE.
OF_A_STAGE = "stages."
# Fields that belong to all stages together.
COMMON = ("output_dir", "resume_from_checkpoint", "init_from", "hub_model_id")
# Fields of which every stage has its own.
LENGTH = ("max_train_steps", "num_train_epochs")


class StagesFile(Section):
    """The file's own keys."""

    base: Path = Field(description="the base recipe, relative to this file")
    output_dir: Path | None = Field(None, description="folder of all stages; default: that of the base recipe")
    stages: tuple[dict[str, Any], ...] = Field(min_length=1, description="fields of each stage, in order")


class StageFields(Section):
    """The keys of a stage that are not fields of a recipe."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=64, description="part of the stage's folder name"
    )
    start_from: StartFrom | None = Field(
        None,
        description="weights of the stage before, or their moving average; default: average if that stage has use_ema",
    )
    optimizer_state: OptimizerState = Field(
        "fresh", description="kept: Adam's moments and step count of the stage before"
    )


@dataclass(frozen=True)
class StageRecipe:
    """One stage.

    Attributes:
        number: from 1.
        config: the merged recipe. Its model is that of the base recipe; `start.py` has what a stage starts from.
        start_from: None for the first stage.
    """

    number: int
    name: str
    config: RunConfig
    start_from: StartFrom | None
    optimizer_state: OptimizerState

    @property
    def folder(self) -> str:
        """Name of the stage's folder."""
        return f"{self.number}-{self.name}"

    def __str__(self) -> str:
        return f"stage {self.name}"


@dataclass(frozen=True)
class Stages:
    """All stages of a training, in order.

    Attributes:
        output_dir: the folder that has the stages' folders.
    """

    output_dir: Path
    recipes: tuple[StageRecipe, ...]


def read_stages(path: Path, overrides: Sequence[str] = ()) -> Stages:
    """Read a file of stages with its base recipe, and check every stage.

    A stage is the base recipe with the stage's fields: mappings are merged, all else is replaced. The base recipe's
    length does not count. The seed of stage k is the recipe's seed + k, so that no noise is drawn twice.

    Args:
        overrides: `key=value` changes the base recipe, `stages.NAME.key=value` one stage.

    Raises:
        MobiusError: a file cannot be read, a key is unknown, a value is invalid, or an override has no effect.
    """
    file = validated(StagesFile, read_recipe(path), f"the stages ({path})")
    base = read_recipe(path.parent / file.base)
    if file.output_dir is not None:
        base["output_dir"] = str(file.output_dir)
    # A YAML alias (*name) makes stages share their values.
    parts = [copy.deepcopy(part) for part in file.stages]
    _override(base, parts, overrides)
    recipes: list[StageRecipe] = []
    problems = []
    for number, part in enumerate(parts, start=1):
        try:
            recipes.append(_stage(number, part, base, path))
        except MobiusError as error:
            problems.append(str(error))
    if not problems:
        problems = _contradictions(recipes)
    if problems:
        raise MobiusError("\n".join(problems))
    return Stages(recipes[0].config.output_dir.parent, tuple(_with_starts(recipes)))


def _override(base: dict[str, Any], parts: list[dict[str, Any]], overrides: Sequence[str]) -> None:
    for override in overrides:
        key, _, value = override.partition("=")
        if not override.startswith(OF_A_STAGE):
            apply_override(base, override)
            if all(_sets(part, key.split(".")) for part in parts):
                raise MobiusError(
                    without_secrets(
                        f"override {override!r} has no effect, because every stage sets {key} itself: use"
                        f" {OF_A_STAGE}NAME.{key}=…"
                    )
                )
            continue
        name, _, field = key.removeprefix(OF_A_STAGE).partition(".")
        named = [part for part in parts if part.get("name") == name]
        if not named or not field:
            names = ", ".join(str(part.get("name")) for part in parts)
            raise MobiusError(
                without_secrets(f"override {override!r}: name a stage and a field, {OF_A_STAGE}NAME.FIELD=…; the")
                + f" stages are {names}"
            )
        for part in named:
            apply_override(part, f"{field}={value}")


def _sets(part: Any, key: list[str]) -> bool:
    """Whether a stage's values replace those of the base at this key."""
    if key[0] in LENGTH:
        return True
    for name in key:
        if not isinstance(part, dict):
            return True
        if name not in part:
            return False
        part = part[name]
    return True


def _stage(number: int, part: dict[str, Any], base: dict[str, Any], path: Path) -> StageRecipe:
    own = {key: part[key] for key in StageFields.model_fields if key in part}
    fields = validated(StageFields, own, f"stage {number} ({path})")
    what = f"stage {fields.name} ({path})"
    values = {key: value for key, value in part.items() if key not in own}
    for key in COMMON:
        if key in values:
            raise MobiusError(f"{what}: {key} belongs to all stages: remove it from the stage")
    if not any(key in values for key in LENGTH):
        raise MobiusError(
            f"{what} has no max_train_steps or num_train_epochs: add one to the stage; the base recipe's counts for no"
            " stage"
        )
    below = {key: value for key, value in base.items() if key not in LENGTH}
    config = validated(RunConfig, _merged(below, values), what)
    if config.stage == "autoencoder":
        raise MobiusError(
            f"{what}: the autoencoder is not trained in stages. Train it in a run of its own, and name that run's"
            " final/ in vae_name_or_path"
        )
    if "{time}" in str(config.output_dir):
        raise MobiusError(
            f"{what}: output_dir={config.output_dir} is a new folder at each start, but stages go on in the same one:"
            " set output_dir in the file of the stages or on the command line"
        )
    if config.resume_from_checkpoint not in (None, "auto"):
        raise MobiusError(
            f"{what}: resume_from_checkpoint={config.resume_from_checkpoint}, but stages go on by themselves: remove it"
        )
    changes = {
        "output_dir": config.output_dir / f"{number}-{fields.name}",
        "resume_from_checkpoint": "auto",
        "seed": config.seed + number,
    }
    return StageRecipe(
        number, fields.name, config.model_copy(update=changes), fields.start_from, fields.optimizer_state
    )


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(below.get(key), dict)
        merged[key] = _merged(below[key], value) if both else value
    return merged


def _contradictions(recipes: list[StageRecipe]) -> list[str]:
    problems = []
    names = [recipe.name for recipe in recipes]
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            problems.append(f"two stages have the name {name}: rename one")
    first = recipes[0]
    if first.start_from is not None or first.optimizer_state != "fresh":
        problems.append(f"{first}: start_from and optimizer_state mean the stage before, but this is the first: remove")
    for before, stage in pairwise(recipes):
        if stage.start_from == "average" and not before.config.use_ema:
            problems.append(f"{stage}: start_from=average, but {before} has use_ema=false: set it, or use weights")
    return problems


def _with_starts(recipes: list[StageRecipe]) -> list[StageRecipe]:
    """Fill in the defaults of start_from, and leave what belongs to one end of the training to the stage at it."""
    recipes = [_without(stage, "hub_model_id") for stage in recipes[:-1]] + recipes[-1:]
    recipes = recipes[:1] + [_without(stage, "init_from") for stage in recipes[1:]]
    filled = recipes[:1]
    for before, stage in pairwise(recipes):
        default: StartFrom = "average" if before.config.use_ema else "weights"
        filled.append(replace(stage, start_from=stage.start_from or default))
    return filled


def _without(stage: StageRecipe, field: str) -> StageRecipe:
    return replace(stage, config=stage.config.model_copy(update={field: None}))
