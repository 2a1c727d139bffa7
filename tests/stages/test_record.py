"""A finished stage that was changed is refused by name; what may change is accepted."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from mobius_train.config_sections import ClipSet
from mobius_train.errors import MobiusError
from mobius_train.job.failures import record
from mobius_train.stages.begun import begun_folder
from mobius_train.stages.recipe import Stages, read_stages
from mobius_train.stages.record import Record

BASE = {"data": {"train": "clips"}, "output_dir": "unused", "learning_rate": 1e-3}
NAMES = ("one", "two", "three")


@pytest.fixture
def stages(tmp_path: Path) -> Stages:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
    entries = [{"name": name, "max_train_steps": 1} for name in NAMES]
    (tmp_path / "stages.yaml").write_text(yaml.safe_dump({"base": "base.yaml", "stages": entries}))
    return read_stages(tmp_path / "stages.yaml", [f"output_dir={tmp_path / 'out'}"])


def _with(stages: Stages, number: int, beside: dict[str, Any] | None = None, **fields: Any) -> Stages:
    """The stages with other fields in one of them."""
    one = stages.recipes[number - 1]
    one = replace(one, config=one.config.model_copy(update=fields), **beside or {})
    return replace(stages, recipes=(*stages.recipes[: number - 1], one, *stages.recipes[number:]))


def _trained(stages: Stages, finished: int) -> Path:
    """A folder of which so many stages are finished, and the next one runs and has a checkpoint."""
    out = stages.output_dir
    for stage in stages.recipes[: finished + 1]:
        (out / stage.folder / "final").mkdir(parents=True)
        (out / stage.folder / "final" / "weights").write_text(stage.name)
        (out / stage.folder / "config.yaml").touch()
        (out / stage.folder / "checkpoint-1").mkdir()
        Record(out).begin(stage)
        if stage.number <= finished:
            Record(out).finish(stage)
    return out


def test_a_training_that_was_not_changed_goes_on_where_it_was(stages: Stages) -> None:
    assert Record(stages.output_dir).finished(stages) == 0
    for finished in range(4):
        shutil.rmtree(stages.output_dir, ignore_errors=True)
        out = _trained(stages, finished)
        assert Record(out).finished(stages) == finished
        assert [one["status"] for one in json.loads((out / "stages.json").read_text())["stages"]] == (
            ["finished"] * finished + ["running"] * (finished < 3)
        )


def test_a_stage_can_be_added_to_a_finished_training_that_was_pushed(stages: Stages) -> None:
    """Only the last stage is pushed, which then is another one."""
    pushed = _with(replace(stages, recipes=stages.recipes[:2]), 2, hub_model_id="me/model")
    _trained(pushed, 2)
    assert Record(stages.output_dir).finished(_with(stages, 3, hub_model_id="me/model")) == 2
    # The control.
    with pytest.raises(MobiusError, match="use_ema"):
        Record(stages.output_dir).finished(_with(stages, 2, use_ema=True))


def test_a_change_of_a_finished_stage_is_refused_by_field_with_the_remedy(stages: Stages) -> None:
    out = _trained(stages, 2)
    refused = {
        "learning_rate was 0.001, now 0.5": _with(stages, 1, learning_rate=0.5),
        "max_train_steps was 1, now 9": _with(stages, 2, max_train_steps=9),
        "data.train was clips, now other": _with(
            stages, 2, data=stages.recipes[1].config.data.model_copy(update={"train": (ClipSet(path="other"),)})
        ),
        "start_from was weights, now average": _with(stages, 2, {"start_from": "average"}),
        "optimizer_state was fresh, now kept": _with(stages, 2, {"optimizer_state": "kept"}),
    }
    for message, changed in refused.items():
        with pytest.raises(MobiusError) as error:
            Record(out).finished(changed)
        assert message in str(error.value)
        assert str(error.value).startswith("stage one " if "learning_rate" in message else "stage two ")
        assert str(out / "2-two") in str(error.value)  # what to remove
    # Later stages may change, and so may the place.
    assert Record(out).finished(_with(stages, 3, learning_rate=0.5)) == 2
    assert Record(out).finished(_with(stages, 1, output_dir=Path("moved"))) == 2


def test_an_edited_final_is_refused_by_file(stages: Stages) -> None:
    out = _trained(stages, 2)
    weights = out / "1-one" / "final" / "weights"
    for edit in (lambda: weights.write_text("other"), weights.unlink, lambda: (weights.parent / "more").touch()):
        weights.write_text("one")
        edit()
        with pytest.raises(
            MobiusError, match=r"stage one .*1-one/final .*(weights|more).*remove .*1-one.*2-two.*3-three"
        ):
            Record(out).finished(stages)
        (weights.parent / "more").unlink(missing_ok=True)
    weights.write_text("one")
    assert Record(out).finished(stages) == 2  # the control


def test_a_removed_stage_is_trained_again_but_not_below_later_ones(stages: Stages) -> None:
    out = _trained(stages, 2)
    shutil.rmtree(out / "2-two")
    with pytest.raises(MobiusError, match=r"stage two .*remove .*3-three"):
        Record(out).finished(stages)
    shutil.rmtree(out / "3-three")
    changed = _with(stages, 2, learning_rate=0.5)
    assert Record(out).finished(changed) == 1
    Record(out).begin(changed.recipes[1])
    assert [one["name"] for one in json.loads((out / "stages.json").read_text())["stages"]] == ["one", "two"]
    assert Record(out).changes(changed.recipes[1]) == []


def test_the_running_stage_keeps_its_first_recipe_once_it_has_a_checkpoint(stages: Stages) -> None:
    out = _trained(stages, 1)
    changed = _with(stages, 2, learning_rate=0.5)
    assert Record(out).finished(changed) == 1  # a resume accepts it
    Record(out).begin(changed.recipes[1])
    assert Record(out).changes(changed.recipes[1]) == ["learning_rate was 0.001, now 0.5"]
    with pytest.raises(MobiusError, match=r"stage two .*start_from=weights.*start_from=average.*2-two"):
        Record(out).finished(_with(stages, 2, {"start_from": "average"}))
    shutil.rmtree(out / "2-two" / "checkpoint-1")
    other = _with(stages, 2, {"start_from": "average"}, learning_rate=0.5)
    assert Record(out).finished(other) == 1
    Record(out).begin(other.recipes[1])
    assert Record(out).changes(other.recipes[1]) == []


def test_stages_that_were_removed_or_renamed_are_refused(stages: Stages) -> None:
    out = _trained(stages, 2)
    renamed = replace(stages.recipes[0], name="first")
    for changed in (stages.recipes[1:], (renamed, *stages.recipes[1:]), stages.recipes[:1]):
        with pytest.raises(MobiusError, match=r"stages\.json.*(one|two).*output_dir"):
            Record(out).finished(replace(stages, recipes=changed))
    # More stages may follow.
    assert Record(out).finished(replace(stages, recipes=(*stages.recipes, replace(renamed, number=4)))) == 2


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 2, "stages": []}', '{"format": 1, "stages": [{"name": "x"}]}'])
def test_a_damaged_record_is_named(stages: Stages, text: str) -> None:
    stages.output_dir.mkdir()
    (stages.output_dir / "stages.json").write_text(text)
    with pytest.raises(MobiusError, match=r"stages\.json"):
        Record(stages.output_dir)


def test_the_folder_of_a_single_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    with pytest.raises(MobiusError, match="output_dir"):
        Record(tmp_path)


def test_a_failure_is_recorded_in_the_stage_that_has_begun(stages: Stages) -> None:
    out = _trained(stages, 1)
    assert begun_folder(out) == out / "2-two"
    (out / "2-two" / "metrics.jsonl").write_text('{"step": 3}\n')
    assert record(begun_folder(out), 137, "job", out) == 3
    with pytest.raises(MobiusError, match=rf"2-two failed after step 3 .*output_dir={out}$"):
        record(begun_folder(out), 137, "job", out)
    (out / "2-two" / "config.yaml").unlink()
    assert begun_folder(out) == out / "1-one"
    (out / "stages.json").unlink()
    assert begun_folder(out) == out
