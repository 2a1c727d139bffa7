"""Latents cached by the tool: training on them equals training without, and a cache that doesn't fit is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import REPOSITORY, launch
from recipes import Run, losses, recipe, write

from mobius_train.errors import MobiusError

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.mark.distributed
def test_a_cache_made_on_two_ranks_trains_as_online_encoding(
    run: Run, tiny_pipeline: Path, clips_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = {"cache_dir": str(tmp_path / "cache")}
    path = write(tmp_path / "recipe.yaml", recipe(tiny_pipeline, clips_folder, tmp_path / "none", data=data))
    made = launch(2, REPOSITORY / "tools" / "cache_latents.py", "--config", str(path), HF_HUB_OFFLINE="1")
    assert made.returncode == 0, made.stderr
    assert not (tmp_path / "none").exists()

    required = data | {"cache_required": True}
    capfd.readouterr()
    assert losses(run("cached", data=required)) == losses(run("online"))
    assert "fits" not in capfd.readouterr().out
    run("another", data=data, max_text_tokens=6)
    assert "the nearest differs in text tokens\n" in capfd.readouterr().out
    run("again", data=data)
    assert "fits" not in capfd.readouterr().out
    with pytest.raises(MobiusError, match=r"the nearest one differs in: num_frames\."):
        run("frames", data=required | {"num_frames": 2})
    with pytest.raises(MobiusError, match=r"the nearest one differs in: text tokens\."):
        run("tokens", data=required, max_text_tokens=5)
    with pytest.raises(MobiusError, match=r"there is no cache"):
        run("empty", data={"cache_dir": str(tmp_path / "empty"), "cache_required": True})
