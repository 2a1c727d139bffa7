"""The list of a recipe's fields."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from launching import REPOSITORY, clean_environment
from recipes import RECIPES

from mobius_train.config import RunConfig, load
from mobius_train.recipe_fields import as_page, as_schema, as_text, completions, fields


def test_every_field_has_a_meaning_and_a_type() -> None:
    found = {field.name: field for field in fields()}
    assert [name for name, field in found.items() if not field.meaning or not field.kind] == []
    assert found["data.num_frames"].kind == "integer, >= 1"
    assert found["data.train"].default == "required"
    assert found["data.train"].kind == "text, section, or list of these"
    assert (found["data.validation"].default, found["data.train.0.repeats"].kind) == ("null", "integer, >= 0")
    assert found["mixed_precision"].kind == "no | fp16 | bf16"
    assert found["validation.prompts"].kind == "list of text"
    assert found["data.buckets.0.share"].kind == "number, > 0, <= 1"
    # Nothing of the recipe is left out.
    assert {name.partition(".")[0] for name in found} == set(RunConfig.model_fields)


def test_the_page_is_of_this_version() -> None:
    page = (REPOSITORY / "docs" / "recipe_fields.md").read_text(encoding="utf-8")
    assert page == as_page(), "write it again: python mobius_train/main.py --fields markdown > docs/recipe_fields.md"


def test_the_schema_knows_the_fields_of_all_recipes() -> None:
    schema = json.loads(as_schema())
    assert set(schema["properties"]) == set(RunConfig.model_fields)
    assert schema["additionalProperties"] is False
    kinds = schema["$defs"]["DataConfig"]["properties"]["train"]["anyOf"]
    assert [one.get("type", "section") for one in kinds] == ["string", "section", "array"]
    for path in RECIPES:
        assert set(load(path).model_dump()) == set(schema["properties"])


@pytest.mark.distributed
def test_the_command_prints_them() -> None:
    for option, expected in (("--fields", as_text()), ("--schema", as_schema())):
        command = [sys.executable, str(REPOSITORY / "mobius_train" / "main.py"), option]
        printed = subprocess.run(command, capture_output=True, text=True, check=True, env=clean_environment())
        assert printed.stdout == expected + "\n"


def test_a_shell_completes_names_and_choices() -> None:
    assert completions("mixed_pr") == ["mixed_precision="]
    assert completions("data.num_fr") == ["data.num_frames="]
    assert completions("mixed_precision=") == ["mixed_precision=no", "mixed_precision=fp16", "mixed_precision=bf16"]
    assert completions("use_ema=t") == ["use_ema=true"]
    # The control: no field, and no choices.
    assert completions("nothing") == completions("learning_rate=") == completions("nothing=") == []
