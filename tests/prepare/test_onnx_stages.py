"""RAFT and LaMa from .onnx files: tiny models with their inputs and outputs, whose answers are known."""

from __future__ import annotations

from pathlib import Path

import cv2
import made
import numpy as np
import onnx_models
import pytest

from mobius_train.errors import MobiusError
from mobius_train.prepare.preparation import prepare_data
from mobius_train.prepare.stages.dynamics import Dynamics
from mobius_train.prepare.stages.text import Text


def _raft(path: Path, size: tuple[int, int]) -> Path:
    """ "Flow" right is the next frame's red minus this one's, flow down the blue's; a coarse output comes before it."""
    weights = np.zeros((2, 3, 1, 1))
    weights[0, 0], weights[1, 2] = 1, 1
    picture = (1, 3, *size)
    return onnx_models.write(
        path,
        {"0": picture, "1": picture},
        {"coarse": (1, 2, 1, 1), "flow": (1, 2, *size)},
        [("Sub", ["1", "0"], "change"), ("Conv", ["change", "w"], "flow"), ("GlobalAveragePool", ["flow"], "coarse")],
        {"w": weights},
    )


def _lama(path: Path, size: tuple[int, int] = (64, 64)) -> Path:
    """Grey 100 wherever the mask is, the picture elsewhere."""
    weights = {"full": np.array([255.0]), "grey": np.array([100.0]), "one": np.array([1.0])}
    return onnx_models.write(
        path,
        {"image": (1, 3, *size), "mask": (1, 1, *size)},
        {"painted": (1, 3, *size)},
        [
            ("Sub", ["one", "mask"], "rest"),
            ("Mul", ["image", "full"], "bright"),
            ("Mul", ["bright", "rest"], "kept"),
            ("Mul", ["mask", "grey"], "hole"),
            ("Add", ["kept", "hole"], "painted"),
        ],
        weights,
    )


@pytest.mark.parametrize("size", [(48, 96), (32, 32)])
def test_rafts_flow_is_scaled_to_the_width_of_the_score(tmp_path: Path, size: tuple[int, int]) -> None:
    frames = np.zeros((3, 64, 64, 3), np.uint8)
    frames[1, ..., 0], frames[2, ..., 0] = 9, 18
    [clip] = Dynamics(name="dynamics", raft=_raft(tmp_path / "raft.onnx", size)).apply([made.clip(frames, fps=10)])
    # 9 of the model's pixels a frame, at 10 frames a second, on 128 pixels
    assert clip.scores["dynamics"]["degree"] == pytest.approx(9 * 10 * 128 / size[1])


def test_lama_paints_over_the_text_and_nothing_else(tmp_path: Path) -> None:
    picture = np.full((128, 256, 3), 255, np.uint8)
    cv2.putText(picture, "HELLO WORLD", (10, 75), cv2.FONT_HERSHEY_SIMPLEX, 1.1, (0, 0, 0), 3)
    stage = Text(name="text", action="remove", lama=_lama(tmp_path / "lama.onnx"))
    [clip] = stage.apply([made.clip(np.repeat(picture[None], 3, axis=0))])
    assert clip.notes == ["text removed"]
    changed = (clip.pixels[0] != picture).any(axis=-1)
    assert 0.1 < changed.mean() < 0.5
    assert (clip.pixels[0][picture[..., 0] == 0] == 100).mean() > 0.9
    assert (clip.pixels[0][:20] == 255).all()


@pytest.mark.parametrize(("stage", "field"), [("dynamics", "raft"), ("text", "lama")])
def test_a_model_file_that_does_not_serve_is_told_before_anything_is_done(
    tmp_path: Path, stage: str, field: str
) -> None:
    source = {"kind": "folder", "path": str(made.heap(tmp_path / "heap", 1))}
    (tmp_path / "text.onnx").write_text("no model")
    one = onnx_models.write(tmp_path / "one.onnx", {"a": (1,)}, {"b": (1,)}, [("Neg", ["a"], "b")], {})
    for path, problem in (
        (tmp_path / "absent.onnx", "absent.onnx"),
        (tmp_path / "text.onnx", "text.onnx"),
        (one, r" 1 inputs \(a\).* 2"),
    ):
        stages = [{"name": "decode"}, {"name": stage, field: str(path)}]
        with pytest.raises(MobiusError, match=problem):
            prepare_data(made.recipe(tmp_path / "out", source, stages=stages))
    assert not (tmp_path / "out").exists()
