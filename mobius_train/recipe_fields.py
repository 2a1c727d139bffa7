"""All fields of a recipe as text, as a page, as a JSON schema, and as what a shell completes."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args, get_origin

from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from mobius_train.config import RunConfig

WIDTH = 118
PAGE = """\
# The fields of a recipe

    python mobius_train/main.py --fields    # the same as text
    python mobius_train/main.py --schema    # the JSON schema, for editors

A field of a section has the section's name in front, in overrides as here: `data.num_frames=16`. Of a list of sections
the number is part of the name: `data.buckets.0.width=512`. `null` stands for the default that the meaning names.

"""


class Described(NamedTuple):
    """A field of a recipe.

    Attributes:
        name: with the names of its sections, as overrides take it.
        default: as in YAML; "required" if there is none.
    """

    name: str
    kind: str
    default: str
    meaning: str


def fields(section: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[Described]:
    """Every field in the recipe's order, those of sections with the section's name in front."""
    for name, field in section.model_fields.items():
        inner = _section(field.annotation)
        if inner is not None:
            # One of a list is numbered.
            of_list = get_origin(field.annotation) is not None
            if _also_text(field.annotation, field.metadata):
                kind = "text, section, or list of these"
                yield Described(prefix + name, kind, _default(field), field.description or "")
            yield from fields(inner, f"{prefix}{name}.{'0.' if of_list else ''}")
        else:
            yield Described(prefix + name, _kind(field), _default(field), field.description or "")


def as_text() -> str:
    """A line for each field, and its meaning below it."""
    lines = []
    for field in fields():
        lines.append(f"{field.name}: {field.kind} = {field.default}")
        lines += textwrap.wrap(field.meaning, WIDTH, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def as_page() -> str:
    """docs/recipe_fields.md, in Markdown."""
    return PAGE + as_table() + "\n"


def as_table() -> str:
    """The rows of the page."""
    rows = ["| field | type | default | meaning |", "|---|---|---|---|"]
    for field in fields():
        kind, meaning = (text.replace("|", "\\|") for text in (field.kind, field.meaning))
        rows.append(f"| `{field.name}` | {kind} | `{field.default}` | {meaning} |")
    return "\n".join(rows)


def as_schema() -> str:
    """The JSON schema, with which editors complete and check a recipe."""
    return json.dumps(RunConfig.model_json_schema(), indent=1)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add the overrides of the recipe's fields, with their names and choices for shells that complete them."""
    overrides: Any = parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="override a field of the recipe"
    )
    overrides.completer = lambda prefix, **_: completions(prefix)


def completions(prefix: str) -> list[str]:
    """How an override that begins with this text can go on: a field's name, or its choices."""
    name, sign, _ = prefix.partition("=")
    if not sign:
        return [f"{field.name}=" for field in fields() if field.name.startswith(prefix)]
    kinds = next((field.kind for field in fields() if field.name == name), "")
    choices = ["true", "false"] if kinds == "switch" else kinds.split(" | ") if " | " in kinds else []
    return [whole for choice in choices if (whole := f"{name}={choice}").startswith(prefix)]


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section in a field's type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for one in get_args(annotation) if (found := _section(one)) is not None), None)


def _also_text(annotation: Any, metadata: Sequence[Any] = ()) -> bool:
    """A text is accepted for a list of sections."""
    if any(isinstance(one, BeforeValidator) for one in metadata):
        return True
    return any(_also_text(one, getattr(one, "__metadata__", ())) for one in get_args(annotation))


def _kind(field: FieldInfo) -> str:
    """The type in words, with the limits of numbers."""
    limits = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    bounds = [
        f"{sign} {getattr(one, name):g}"
        for one in field.metadata
        for name, sign in limits.items()
        if hasattr(one, name)
    ]
    return ", ".join([_words(field.annotation), *bounds])


def _words(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " | ".join(map(str, get_args(annotation)))
    if get_origin(annotation) is tuple:
        return f"list of {_words(get_args(annotation)[0])}"
    if get_origin(annotation) is dict:
        return "section"
    parts = [one for one in get_args(annotation) if one is not type(None)]
    if parts:
        return _words(parts[0])
    return {"int": "integer", "float": "number", "str": "text", "bool": "switch", "Path": "path"}[annotation.__name__]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.default
    return json.dumps(list(default) if isinstance(default, tuple) else default, ensure_ascii=False)
