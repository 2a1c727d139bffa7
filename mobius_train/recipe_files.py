"""Reading of recipes: YAML files, `key=value` overrides, and errors that name each wrong field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from mobius_train.errors import MobiusError, did_you_mean, without_secrets
from mobius_train.files import read_small
from mobius_train.shared_files import found_anywhere
from mobius_train.yaml_files import parse_yaml

# Letters of a wrong value in an error.
MOST_SHOWN = 200

Recipe = TypeVar("Recipe", bound=BaseModel)


def load_as(kind: type[Recipe], path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe of this kind and apply `key=value` overrides.

    Raises:
        MobiusError: the file is missing or not a YAML mapping, a key is unknown, or a value is invalid.
    """
    values = read_recipe(path)
    for override in overrides:
        apply_override(values, override)
    return validated(kind, values, f"the configuration ({path}{_listed(overrides)})")


def read_recipe(path: Path) -> dict[str, Any]:
    """Return the values of a recipe's file, without validation, with paths of embedded files as they are found.

    Raises:
        MobiusError: the file is missing or not a YAML mapping.
    """
    try:
        values = parse_yaml(read_small(path).decode("utf-8-sig"))
    except OSError as error:
        raise MobiusError(f"cannot read the recipe {path}: {error.strerror}") from error
    except ValueError as error:
        raise MobiusError(f"the recipe {path} cannot be read as YAML: {error}") from error
    if not isinstance(values, dict):
        raise MobiusError(f"the recipe {path} must be a mapping of keys to values")
    return {name: found_anywhere(value) for name, value in values.items()}


def validated(kind: type[Recipe], values: dict[str, Any], what: str) -> Recipe:
    """Return the values as a recipe of this kind.

    Args:
        what: name of the values in an error.

    Raises:
        MobiusError: a key is unknown or a value is invalid; the message lists all of them.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = "\n".join(f"  - {_explain(problem, kind)}" for problem in error.errors())
        raise MobiusError(f"{what} is invalid:\n{problems}") from error


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set a field of a recipe's values.

    Args:
        override: `key=value`; the key is dotted, the value YAML.

    Raises:
        MobiusError: it is not of this form, or a part of the key is not a section.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise MobiusError(without_secrets(f"override {override!r} is not of the form key=value, such as seed=1"))
    *sections, name = key.split(".")
    target: Any = values
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise MobiusError(without_secrets(f"override {override!r}: the value is not valid YAML: {error}")) from error
    try:
        for section in sections:
            target = target[_place(target, section)] if isinstance(target, list) else target.setdefault(section, {})
        target[_place(target, name)] = value
    except (AttributeError, TypeError, ValueError, IndexError) as error:
        raise MobiusError(without_secrets(f"override {override!r}: the recipe has no such field")) from error


def by_dotted_name(values: Mapping[str, Any], section: str = "") -> dict[str, Any]:
    """Return the values of a recipe by dotted name: those of a section have its name in front.

    Args:
        section: the name in front of all, with a dot at its end.
    """
    named: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            named |= by_dotted_name(value, f"{section}{name}.")
        else:
            named[f"{section}{name}"] = value
    return named


def _place(target: Any, name: str) -> Any:
    """Return a section's key as it is, or a list's index as a number."""
    return int(name) if isinstance(target, list) else name


def _listed(overrides: Sequence[str]) -> str:
    return without_secrets(f" with {' '.join(overrides)}") if overrides else ""


def _explain(problem: Any, kind: type[BaseModel]) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"{where}: no such key" + did_you_mean(str(problem["loc"][-1]), _fields(kind, problem["loc"][:-1]))
    message = problem["msg"].removeprefix("Value error, ")
    got = repr(problem["input"])
    got = got if len(got) <= MOST_SHOWN else f"{got[:MOST_SHOWN]}…"
    return without_secrets(f"{where}: {message} (got {got})") if where else message


def _fields(kind: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """Return the field names at this location; [] inside a list of discriminated unions.

    The location does not identify the member of the union.
    """
    section: Any = kind
    for part in location:
        if part not in getattr(section, "model_fields", {}):
            return []
        annotation = section.model_fields[part].annotation
        section = next((a for a in (annotation, *get_args(annotation)) if isinstance(a, type)), annotation)
    return list(getattr(section, "model_fields", []))
