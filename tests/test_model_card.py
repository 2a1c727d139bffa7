"""The model card of a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from recipes import recipe, write

from mobius_train import model_card
from mobius_train.config import load
from mobius_train.model_card import write_model_card

FIGURES = {"motion_correlation/samples": 0.61234}


def card(tmp_path: Path, paths: list[Path], **changes: Any) -> tuple[dict[str, Any], str]:
    """Its metadata and its text."""
    config = load(write(tmp_path / "recipe.yaml", recipe(tmp_path, tmp_path, tmp_path / "my-run", **changes)))
    folder = tmp_path / "final"
    folder.mkdir()
    write_model_card(folder, config, {"data": "16 clips"}, FIGURES, paths)
    _, metadata, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(metadata), text


def test_it_states_what_the_model_is(tmp_path: Path) -> None:
    comparison = tmp_path / "comparison.gif"
    comparison.write_bytes(b"GIF")
    metadata, text = card(tmp_path, [comparison], pretrained_model_name_or_path="someone/model")
    assert metadata == {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-video",
        "license": "other",
        "license_name": "not-stated",
        "base_model": "someone/model",
        "tags": ["mobius-train", "text-to-video"],
    }
    assert (tmp_path / "final" / "samples.gif").read_bytes() == b"GIF"
    assert "(samples.gif)" in text
    assert "# my-run" in text
    assert "- data: 16 clips" in text
    assert "| motion_correlation/samples | 0.6123 |" in text
    recipe_text = text.partition("```yaml\n")[2].partition("```")[0]
    assert yaml.safe_load(recipe_text)["max_train_steps"] == 4
    # Not where it was trained.
    assert "output_dir" not in recipe_text


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["00-a-dog.gif", "contact_sheet.png", "comparison.gif"], "samples.gif"),
        (["00-a-dog.png", "contact_sheet.png"], "samples.png"),
        (["reconstructions.png"], "samples.png"),
        (["00-a-dog.png"], None),
    ],
)
def test_samples_of_every_stage_are_shown(tmp_path: Path, names: list[str], shown: str | None) -> None:
    for name in names:
        (tmp_path / name).write_text(name)
    _, text = card(tmp_path, [tmp_path / name for name in names])
    copied = [path.name for path in (tmp_path / "final").iterdir() if path.name != "README.md"]
    assert copied == ([] if shown is None else [shown])
    assert (f"]({shown})" in text) == (shown is not None)
    if shown is not None:
        assert (tmp_path / "final" / shown).read_text() == names[-1]


def test_a_licence_is_stated_and_no_credential_is(tmp_path: Path) -> None:
    url = "https://me:secret@example.org/{0..3}.tar?token=hidden"
    metadata, text = card(tmp_path, [], license="apache-2.0", data={"train": url, "download_dir": str(tmp_path)})
    assert metadata["license"] == "apache-2.0"
    assert "license_name" not in metadata
    assert "Not stated" not in text
    assert "train: https://example.org/{0..3}.tar" in text
    assert "secret" not in text
    assert "hidden" not in text


def test_a_folder_is_no_base_model_and_large_samples_stay_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_card, "MOST", 2)
    comparison = tmp_path / "comparison.gif"
    comparison.write_bytes(b"GIF")
    metadata, text = card(tmp_path, [comparison])
    assert "base_model" not in metadata
    assert "samples.gif" not in text
    assert not (tmp_path / "final" / "samples.gif").exists()
