"""Rings of other widths keep the invariants of the paper's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from learning import idle, loss, train
from unets import batch_for, tiny_unet

from mobius_train.errors import MobiusError
from mobius_train.measure.graph import leaves_of_graph
from mobius_train.models import ParallelUNet, build_denoiser
from mobius_train.models.recompute import LayerMemory
from mobius_train.models.unet.layers import ring_groups, scaled_layout
from mobius_train.models.unet.ring import Ring
from mobius_train.ring_shape import RingShape

widths = pytest.mark.parametrize(("kind", "width"), [("sd2", 0.5), pytest.param("sdxl", 2.0, marks=pytest.mark.slow)])


@widths
def test_a_new_model_predicts_what_the_2d_model_predicts(kind: str, width: float) -> None:
    unet = tiny_unet(kind)
    batch = batch_for(unet)
    with torch.no_grad():
        expected = build_denoiser(unet, "text-to-image", "parallel").predict(*batch.given())
        prediction = ParallelUNet.from_unet2d(unet, width).predict(*batch.given())
    torch.testing.assert_close(prediction, expected)


@widths
def test_every_parameter_learns_and_the_graph_holds_nothing_else(kind: str, width: float) -> None:
    model: Any = build_denoiser(tiny_unet(kind), "text-to-video", "parallel", {"ring_width": width})
    assert model.ring_shape.ring_width == width
    batch = batch_for(model.spatial, frames=4)
    assert idle(train(model, batch, steps=2)) == set()
    ring = set(map(id, model.ring.parameters()))
    assert {id(leaf) for leaf in leaves_of_graph(loss(model, batch))} <= ring


def test_a_frozen_branch_of_a_narrower_dtype() -> None:
    model: Any = build_denoiser(tiny_unet("sd2"), "text-to-video", "parallel", {"ring_width": 0.5})
    batch = batch_for(model.spatial)
    expected = model.predict(*batch.given())
    model.spatial.to(torch.bfloat16)
    torch.testing.assert_close(model.predict(*batch.given()), expected, rtol=0.1, atol=0.05)


def test_recomputing_gives_the_same_gradients() -> None:
    gradients: list[dict[str, Any]] = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model: Any = build_denoiser(tiny_unet("sd2"), "text-to-video", "parallel", {"ring_width": 0.5})
        model.set_memory(LayerMemory(gradient_checkpointing=recompute))
        torch.manual_seed(1)
        gradients.append(dict(train(model, batch_for(model.spatial, frames=4), steps=1)))
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_half_the_width_has_about_a_quarter_of_the_weights() -> None:
    def size(width: float) -> int:
        return sum(p.numel() for p in Ring.from_unet2d(tiny_unet("emoji"), RingShape(width)).parameters())

    assert 0.2 < size(0.5) / size(1.0) < 0.45


def test_width_1_is_the_ring_of_before() -> None:
    unet = tiny_unet("sd2")
    names = ParallelUNet.from_unet2d(unet).ring.state_dict().keys()
    assert not [name for name in names if name.startswith("entries")]
    copied = [name for name in unet.state_dict() if "samplers." in name]
    assert copied
    assert set(copied) <= set(names)


def test_the_width_is_saved_and_another_one_refused(tmp_path: Path) -> None:
    ParallelUNet.from_unet2d(tiny_unet("sd2"), 0.5).save_pretrained(tmp_path)
    loaded = ParallelUNet.from_pretrained(tmp_path)
    assert loaded.ring_shape.ring_width == 0.5
    build_denoiser(loaded, "text-to-video", "parallel")
    build_denoiser(loaded, "text-to-video", "parallel", {"ring_width": 0.5})
    with pytest.raises(MobiusError, match=r"ring_width=1.*0\.5"):
        build_denoiser(loaded, "text-to-video", "parallel", {"ring_width": 1.0})


@pytest.mark.parametrize("width", [0.3, 0.01])
def test_a_width_that_does_not_fit_is_refused_by_name(width: float) -> None:
    with pytest.raises(MobiusError, match=f"ring_width={width:g}"):
        ParallelUNet.from_unet2d(tiny_unet("sd2"), width)


def test_stable_diffusion_2_fits_a_half_and_a_quarter() -> None:
    config = {
        **tiny_unet("sd2").config,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "block_out_channels": (320, 640, 1280, 1280),
        "attention_head_dim": (5, 10, 20, 20),
    }
    for width, groups in ((1, 32), (0.5, 16), (0.25, 8)):
        assert ring_groups(config, width) == groups
        channels = [layer.channels for layer in scaled_layout(config, width).layers()]
        assert channels[0] == 320 * width
        assert all(number % groups == 0 for number in channels)
    with pytest.raises(MobiusError, match=r"ring_width=0\.2.*1, .*0\.5, 0\.25"):
        scaled_layout(config, 0.2)


def test_models_without_a_ring_have_no_width() -> None:
    serial: Any = build_denoiser(tiny_unet("sd2"), "text-to-video", "serial", {"ring_width": 0.5})
    again: Any = build_denoiser(serial, "text-to-video", "serial", {"ring_width": 0.5})
    assert again is serial
