"""Each dimension against a formula written another way, and what it must not measure."""

from __future__ import annotations

import logging
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tiny_encoders import WIDTH, save_clip, save_dino, save_head
from torch.nn.functional import cosine_similarity

from mobius_train.errors import MobiusError
from mobius_train.evaluate.choose_dimensions import ModelPaths, choose_dimensions
from mobius_train.evaluate.clips import Clips, EvaluatedClip
from mobius_train.evaluate.consistency import consistency
from mobius_train.evaluate.dimension import Dimension, Unmeasured
from mobius_train.evaluate.flow import DynamicDis, SmoothnessDis, SpeedDis
from mobius_train.evaluate.frame_encoders import CaptionEncoder
from mobius_train.evaluate.motion import MotionCorrelation, Order, TemporalFlickering
from mobius_train.evaluate.shuffle import shuffled
from mobius_train.metrics.motion import frame_order

CPU = torch.device("cpu")
EMOJI = Path(__file__).resolve().parents[2] / "assets" / "fluent-emoji" / "64"


def moving(step: int, count: int = 8, size: int = 64, fps: float = 8.0) -> EvaluatedClip:
    """Smooth random texture that moves `step` pixels a frame."""
    noise = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    texture = torch.nn.functional.avg_pool2d(noise, 5, stride=1, padding=2)[0]
    texture = ((texture - texture.min()) / (texture.max() - texture.min()) * 255).to(torch.uint8)
    frames = torch.stack([texture.roll(step * number, -1) for number in range(count)])
    return EvaluatedClip("moving", "a dog", frames, fps)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dino/, clip/, head.safetensors."""
    folder = tmp_path_factory.mktemp("encoders")
    save_dino(folder / "dino")
    save_clip(folder / "clip")
    save_head(folder / "head.safetensors")
    return folder


@pytest.fixture(scope="module")
def dimensions(models: Path) -> dict[str, Dimension]:
    paths = ModelPaths(models / "dino", models / "clip", models / "head.safetensors")
    return {dimension.name: dimension for dimension in choose_dimensions(paths, True, CPU).dimensions}


def test_flicker_is_vbenchs_formula() -> None:
    clip = moving(3)
    frames = clip.frames.numpy().astype(np.float32)
    changes = [np.abs(after - before).mean() for before, after in pairwise(frames)]
    assert TemporalFlickering().measure(clip) == pytest.approx((255 - np.mean(changes)) / 255, abs=1e-6)


def test_a_still_is_best_in_flicker_and_smoothness_and_does_not_move() -> None:
    still = moving(0)
    assert TemporalFlickering().measure(still) == 1
    assert SmoothnessDis().measure(still) == pytest.approx(1, abs=1e-3)
    assert DynamicDis().measure(still) == 0
    assert DynamicDis().measure(moving(3)) == 1
    with pytest.raises(Unmeasured):
        Order().measure(still)


def test_the_dynamic_degree_counts_fast_pairs_at_8_frames_a_second() -> None:
    # The threshold is 1.5 pixels a frame at 64 pixels.
    assert DynamicDis().measure(moving(1)) == 0
    assert DynamicDis().measure(moving(1, count=16, fps=24.0)) == 1
    with pytest.raises(Unmeasured):
        DynamicDis().measure(moving(1, count=3, fps=24.0))


def test_speed_does_not_depend_on_the_frame_rate() -> None:
    slow, fast = SpeedDis().measure(moving(3, fps=8.0)), SpeedDis().measure(moving(1, fps=24.0))
    assert slow == pytest.approx(3 * 8 / 64, rel=0.4)
    assert slow == pytest.approx(fast, rel=0.4)


def test_steady_motion_is_smoother_than_its_shuffled_frames() -> None:
    clip = moving(2)
    mixed = clip._replace(frames=shuffled(clip.frames, clip.key))
    assert SmoothnessDis().measure(clip) > SmoothnessDis().measure(mixed) + 0.01
    with pytest.raises(Unmeasured):
        SmoothnessDis().measure(moving(2, count=2))


def test_the_reference_clip_has_the_same_motion() -> None:
    clip = moving(2)
    assert MotionCorrelation().measure(clip._replace(reference=clip.frames)) == pytest.approx(1, abs=1e-4)
    assert MotionCorrelation().measure(clip._replace(reference=clip.frames.flip(0))) < 0.5
    with pytest.raises(Unmeasured):
        MotionCorrelation().measure(clip)


def test_shuffled_frames_are_the_same_frames_in_another_order() -> None:
    frames = torch.arange(6)
    assert all(not torch.equal(shuffled(frames, str(key)), frames) for key in range(50))
    assert shuffled(frames, "a").sort().values.tolist() == frames.tolist()
    assert torch.equal(shuffled(frames, "a"), shuffled(frames, "a"))
    assert len({tuple(shuffled(frames, str(key)).tolist()) for key in range(50)}) > 25


@pytest.mark.parametrize("width", [40, 56])
def test_subject_consistency_is_vbenchs_formula(dimensions: dict[str, Dimension], models: Path, width: int) -> None:
    """Square and wide frames, one at a time, resized by VBench's rule: the shorter side to the model's."""
    clip = moving(3, size=56)
    clip = clip._replace(frames=clip.frames[:, :, :40, :width])
    model = transformers.AutoModel.from_pretrained(models / "dino").eval()
    processor = transformers.AutoImageProcessor.from_pretrained(models / "dino")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    scores, features = [], []
    for frame in clip.frames:
        pixels = torch.nn.functional.interpolate(
            frame[None].float(), (32, int(32 * width / 40)), mode="bilinear", align_corners=False
        )
        with torch.no_grad():
            tokens = model((pixels / 255 - mean) / std, interpolate_pos_encoding=True).last_hidden_state
        features.append(tokens[:, 0])
        if len(features) > 1:
            pair = [max(0.0, cosine_similarity(features[-1], other).item()) for other in (features[-2], features[0])]
            scores.append(sum(pair) / 2)
    value = dimensions["subject_consistency"].measure(clip)
    assert value == pytest.approx(sum(scores) / len(scores), abs=1e-5)
    assert value < 0.999


def test_opposite_embeddings_count_as_0() -> None:
    embeddings = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    assert consistency(embeddings) == 0
    assert consistency(embeddings.abs()) == pytest.approx((1 + 1 + 0 + 0) / 4)


def test_clips_dimensions_are_those_of_transformers_clip(dimensions: dict[str, Dimension], models: Path) -> None:
    clip = moving(3, size=32)
    model = transformers.CLIPModel.from_pretrained(models / "clip").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(models / "clip")
    processor = transformers.AutoImageProcessor.from_pretrained(models / "clip")
    pixels = processor(images=list(clip.frames), do_resize=False, return_tensors="pt")
    with torch.no_grad():
        out = model(**pixels, **tokenizer(clip.caption, return_tensors="pt"))
    assert dimensions["text_alignment"].measure(clip) == pytest.approx(
        float((out.image_embeds @ out.text_embeds[0]).mean()), abs=1e-5
    )
    assert dimensions["background_consistency"].measure(clip) == pytest.approx(consistency(out.image_embeds), abs=1e-5)
    from safetensors.torch import load_file

    head = load_file(models / "head.safetensors")
    expected = (out.image_embeds @ head["weight"][0] + head["bias"]).mean() / 10
    assert dimensions["aesthetic_quality"].measure(clip) == pytest.approx(float(expected), abs=1e-5)


def test_what_has_no_weights_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mobius_train.evaluate.choose_dimensions.find_spec", lambda name: None)
    chosen = choose_dimensions(ModelPaths(), False, CPU)
    assert [dimension.name for dimension in chosen.dimensions] == ["order", "temporal_flickering"]
    assert set(chosen.needs) == {
        "dynamic_dis", "speed_dis", "smoothness_dis", "motion_correlation", "subject_consistency",
        "background_consistency", "text_alignment", "aesthetic_quality",
    }  # fmt: skip
    assert "mobius-train[data]" in chosen.needs["dynamic_dis"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dino": "clip"}, "dinov2"),
        ({"clip": "dino"}, "chinese_clip"),
        ({"dino": "missing"}, "missing"),
        ({"aesthetic": "head.safetensors"}, "--aesthetic-clip"),
        ({"aesthetic_clip": "clip"}, "--aesthetic"),
        ({"clip": "clip", "aesthetic": "wide.safetensors"}, str(WIDTH + 1)),
    ],
)
def test_encoders_that_do_not_fit_are_refused(models: Path, changes: dict[str, str], named: str) -> None:
    save_head(models / "wide.safetensors", WIDTH + 1)
    with pytest.raises(MobiusError, match=named):
        choose_dimensions(ModelPaths(**{name: models / path for name, path in changes.items()}), False, CPU)


def test_a_truncated_caption_is_logged(models: Path, caplog: pytest.LogCaptureFixture) -> None:
    captions = CaptionEncoder(models / "clip", CPU)
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        captions.embed("a dog")
        assert caplog.records == []
        captions.embed("dog " * 30)
    assert len(caplog.records) == 1


def test_real_clips_have_order_and_their_shuffled_frames_have_none() -> None:
    clips = Clips(str(EMOJI / "train-000000.tar"))
    orders, smoothness = [], []
    for clip in clips:
        mixed = shuffled(clip.frames, clip.key)
        orders.append((frame_order(clip.frames) or 1.0, frame_order(mixed) or 1.0))
        if len(orders) % 8 == 0:
            smoothness.append((SmoothnessDis().measure(clip), SmoothnessDis().measure(clip._replace(frames=mixed))))
    assert sum(order < 1 for order, _ in orders) / len(orders) >= 0.8
    assert sum(order < other for order, other in orders) / len(orders) >= 0.75
    own, other = np.mean(orders, axis=0)
    assert own < 0.8
    assert other == pytest.approx(1, abs=0.1)
    own, other = np.mean(smoothness, axis=0)
    assert own > other
