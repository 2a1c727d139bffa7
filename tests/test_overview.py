"""The first lines of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from recipes import DEEP, DS_CONFIGS, recipe, write

from mobius_train.config import load
from mobius_train.engine.ds_config import read_ds_json
from mobius_train.engine.spread import Spread
from mobius_train.job.distributed import Distributed
from mobius_train.overview import overview


def lines(
    tmp_path: Path, distributed: Distributed, done: int = 0, planned: int | None = None, **changes: Any
) -> dict[str, str]:
    config = load(write(tmp_path / "recipe.yaml", recipe(tmp_path, tmp_path, tmp_path, **changes)))
    spread = Spread.over(1, "deepspeed", read_ds_json(DS_CONFIGS / "zero3.json"))
    model = {"model": "a ring"}
    text = overview(config, spread.describe(config), distributed, Path("runs/one"), model, 16, done, planned)
    return dict(line.split(maxsplit=1) for line in text.splitlines())


def test_steps_are_counted_in_epochs(process_group: None, tmp_path: Path) -> None:
    distributed = Distributed(Spread.over(1).launch)
    found = lines(tmp_path, distributed, max_train_steps=20, train_batch_size=2, gradient_accumulation_steps=4)
    assert list(found) == ["run", "model", "device", "engine", "steps", "tracker"]
    assert found["steps"] == "20 of 8 samples: 10 epochs"
    assert found["engine"] == "DeepSpeed, ZeRO-3"
    assert found["device"].startswith("1 x CPU")
    assert found["device"].endswith("float32")
    assert found["tracker"] == "tensorboard --logdir runs/one/logs"
    assert lines(tmp_path, distributed, done=3, max_train_steps=20)["steps"].startswith("3 done of 20")


def test_planned_memory_is_listed_where_there_is_a_plan(process_group: None, tmp_path: Path) -> None:
    distributed = Distributed(Spread.over(1).launch)
    assert lines(tmp_path, distributed, planned=5_310_000_000)["memory"].startswith("5.31 GB planned")
    assert "memory" not in lines(tmp_path, distributed)


@pytest.mark.slow
def test_a_run_starts_with_what_it_is_and_ends_with_what_to_do(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(max_train_steps=1, **DEEP)
    printed = capsys.readouterr().out
    assert "parallel (ring_width=0.5, fusion_depth=1, tail_temporal_layers=true): UNet2DConditionModel of" in printed
    assert "10 clips, 4 held out; 4 x 32 px; latents encoded at each step" in printed
    assert " trained, " in printed
    assert f"python tools/sample.py {folder / 'final'} --prompt 'dog number 3'" in printed
