"""Every recipe in configs/data runs to its end, and training reads what it wrote."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import cv2
import made
import numpy as np
import pytest

from mobius_train.data.clips import open_clips
from mobius_train.prepare.preparation import prepare_data
from mobius_train.prepare.recipe import PrepareConfig
from mobius_train.recipe_files import load_as

RECIPES = sorted((Path(__file__).parents[2] / "configs" / "data").glob("*.yaml"))
NAMES = ["1f600", "1f436", "2764-fe0f", "1f680", "1f98a"]


def _moving(seed: int) -> np.ndarray:
    """(20, 256, 320, 3): a smooth picture that moves by 3 pixels a frame; it passes all filters."""
    coarse = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    picture = cv2.resize(coarse, (320, 256), interpolation=cv2.INTER_CUBIC)
    return np.stack([np.roll(picture, 3 * number, axis=1) for number in range(20)])


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The overrides that give five clips to each kind of source."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "clips").mkdir()
    with tarfile.open(folder / "package.tgz", "w:gz") as tar:
        for number, name in enumerate(NAMES):
            clip = _moving(number)
            (folder / "clips" / f"{name}.mp4").write_bytes(made.video(clip))
            (folder / "clips" / f"{name}.txt").write_text("colours that move")
            data = made.animation(clip[:, ::4, ::4])
            member = tarfile.TarInfo(f"package/assets/{name}.webp")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return {"folder": f"sources.0.path={folder}/clips", "fluent_emoji": f"sources.0.packages={folder}/package.tgz"}


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_a_shipped_recipe_runs_to_its_end(path: Path, sources: dict[str, str], tmp_path: Path) -> None:
    kind = load_as(PrepareConfig, path, []).sources[0].kind
    config = load_as(PrepareConfig, path, [sources[kind], f"output_dir={tmp_path}/out", "output.heldout=0"])
    prepare_data(config)
    assert [row["reason"] for row in made.rows(tmp_path / "out")] == [None] * 5
    clips = open_clips(f"{tmp_path}/out/train-*.tar", num_frames=4, resolution=32)
    assert len(clips) == 5
    assert [entry.suffix for entry in clips.entries] == [f".{config.output.format}"] * 5
    assert clips[4].frames.float().std() > 10


@pytest.mark.parametrize("how", ["even", "head"])
def test_mp4_shards_hold_the_prepared_frames(tmp_path: Path, how: str) -> None:
    folder = made.heap(tmp_path / "heap", 2)
    stages = [{"name": "decode"}, {"name": "choose_frames", "count": 5, "how": how}]
    output = {"format": "mp4", "crf": 0}
    source = {"kind": "folder", "path": str(folder)}
    prepare_data(made.recipe(tmp_path / "out", source, stages=stages, output=output))
    clips = open_clips(f"{tmp_path}/out/train-*.tar", num_frames=5, resolution=32)
    assert clips.measure(0, 1) == [(5, 32, 32)] * 2
    original = made.moving(seed=1)[[0, 1, 3, 4, 6] if how == "even" else slice(5)]
    difference = np.abs(clips[1].frames.permute(0, 2, 3, 1).numpy().astype(int) - original)
    assert difference.mean() < 4
