"""The samples of a validation beside the data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image, ImageSequence
from torch import Tensor

from mobius_train.data.clips import ClipDataset, open_clips
from mobius_train.tasks.show_clips import show_clips


@pytest.fixture
def train(clips_folder: Path) -> ClipDataset:
    return open_clips(str(clips_folder), num_frames=4, resolution=32)


def flicker(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_the_data_itself_has_correlation_one_and_flicker_none(train: ClipDataset, tmp_path: Path) -> None:
    prompts = [train.captions(index)[0] for index in (0, 3)]
    data = [train[index].frames for index in (0, 3)]
    figures = show_clips(prompts, data, [flicker(4, 3, 32, 32)] * 2, train, tmp_path).figures
    assert figures["motion_correlation/clips"] == 2
    assert figures["motion_correlation/samples"] == pytest.approx(1)
    assert abs(figures["motion_correlation/before"]) < 0.1
    assert figures["neighbour_ratio/samples"] == figures["neighbour_ratio/data"] < 0.95
    assert figures["neighbour_ratio/before"] == pytest.approx(1, abs=0.05)


def test_prompts_without_a_training_clip_have_no_correlation(train: ClipDataset, tmp_path: Path) -> None:
    shown = show_clips(["nothing of the kind"], [flicker(4, 3, 32, 32)], None, train, tmp_path)
    assert not [name for name in shown.figures if name.startswith("motion_correlation")]
    # Clips of the training data, which are compared instead.
    assert shown.figures["frame_difference/data"] > 0
    assert all(path.is_file() for path in shown.paths)


def test_the_comparison_has_a_row_for_each_source(train: ClipDataset, tmp_path: Path) -> None:
    prompts = [train.captions(index)[0] for index in range(3)]
    clips = [flicker(4, 3, 32, 32)] * 3
    heights = []
    for name, before in (("two", None), ("three", clips)):
        show_clips(prompts, clips, before, train, tmp_path / name)
        with Image.open(tmp_path / name / "comparison.gif") as picture:
            assert len(ImageSequence.all_frames(picture)) == 4
            heights.append(picture.height)
    row = 96 + 6
    assert heights[1] - heights[0] == row
