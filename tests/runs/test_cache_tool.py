"""Latents cached by the tool: training on them equals training without, and a cache that doesn't fit is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from launching import REPOSITORY, launch
from recipes import Run, losses, recipe, write

from mobius_train.errors import MobiusError

TOOL = REPOSITORY / "tools" / "cache_latents.py"

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.mark.distributed
def test_a_cache_made_by_an_array_on_two_ranks_each_trains_as_online_encoding(
    run: Run, tiny_pipeline: Path, clips_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data: dict[str, Any] = {"cache_dir": str(tmp_path / "cache")}
    path = write(tmp_path / "recipe.yaml", recipe(tiny_pipeline, clips_folder, tmp_path / "none", data=data))
    for task in range(2):
        array = {"TASK_ID": task, "TASK_MIN": 0, "TASK_MAX": 1, "TASK_COUNT": 2}
        variables: dict[str, Any] = {f"SLURM_ARRAY_{name}": str(value) for name, value in array.items()}
        made = launch(2, TOOL, "--config", str(path), HF_HUB_OFFLINE="1", **variables)
        assert made.returncode == 0, made.stderr
        assert f"{tmp_path / 'cache'}: share {task + 1} of 2" in made.stdout
    assert not (tmp_path / "none").exists()

    required = data | {"cache_required": True}
    short: dict[str, Any] = {"max_train_steps": 2, "validation": {"prompts": []}}
    capfd.readouterr()
    assert losses(run("cached", data=required, **short)) == losses(run("online", **short))
    assert "fits" not in capfd.readouterr().out
    run("another", data=data, max_text_tokens=6, **short | {"max_train_steps": 1})
    assert "the nearest differs in text tokens\n" in capfd.readouterr().out
    run("again", data=data, **short | {"max_train_steps": 1})
    assert "fits" not in capfd.readouterr().out
    with pytest.raises(MobiusError, match=r"cache.*\bnum_frames\b"):
        run("frames", data=required | {"num_frames": 2})
    with pytest.raises(MobiusError, match=r"cache.*\btext tokens\b"):
        run("tokens", dry=True, data=required, max_text_tokens=5)
    run("dry", dry=True, data=required)
    with pytest.raises(MobiusError, match="/empty"):
        run("empty", data={"cache_dir": str(tmp_path / "empty"), "cache_required": True})
