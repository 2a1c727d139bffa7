"""Rings that are fused in front of the last up blocks keep the invariants, for the layers in front of the fusion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from autograd_memory import result_and_held
from kinds import DTYPES, EVEN, ODD
from learning import idle, loss, train
from torch import Tensor, nn
from unets import batch_for, tiny_unet

from mobius_train.errors import MobiusError
from mobius_train.measure.graph import leaves_of_graph
from mobius_train.measure.saved import saved_for_backward
from mobius_train.models import ParallelUNet, SerialUNet, build_denoiser
from mobius_train.models.recompute import LayerMemory
from mobius_train.models.unet.backbone import UNetBackbone, spatial_layer
from mobius_train.ring_shape import UNET_FIELDS, RingShape

# Each width, each depth, with temporal layers behind the fusion and without, on both kinds.
CASES = [
    ("sd2", RingShape(0.5, 2, tail_temporal_layers=True)),
    ("sd2", RingShape(0.0, 4, tail_temporal_layers=True)),
    ("sd2", RingShape(0.5, 2, trained_tail=True)),
    # At full width the ring's samplers start as the UNet's, and the tail has samplers of its own.
    ("sd2", RingShape(1.0, 2, trained_tail=True)),
    ("sd2", RingShape(0.0, 1, tail_temporal_layers=True, trained_tail=True)),
    # The last block has no attention.
    pytest.param("sdxl", RingShape(1.0, 1), marks=pytest.mark.slow),
    pytest.param("sdxl", RingShape(0.5, 3, tail_temporal_layers=True), marks=pytest.mark.slow),
]
shapes = pytest.mark.parametrize(("kind", "shape"), CASES, ids=str)


def fields(shape: RingShape) -> dict[str, Any]:
    return {name: getattr(shape, name) for name in UNET_FIELDS}


def built(kind: str, shape: RingShape) -> Any:
    return build_denoiser(tiny_unet(kind), "text-to-video", "parallel", fields(shape))


def randomised(model: Any) -> Any:
    """No fusion is the identity any more, and no temporal layer of the tail."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.ring.parameters():
            if not parameter.any() or parameter is getattr(getattr(model.ring, "fusion", None), "weight", None):
                nn.init.normal_(parameter, std=0.05)
    return model


@shapes
@torch.no_grad()
def test_a_new_model_predicts_what_the_2d_model_predicts(kind: str, shape: RingShape) -> None:
    unet = tiny_unet(kind)
    batch = batch_for(unet)
    expected = build_denoiser(unet, "text-to-image", "parallel").predict(*batch.given())
    assert torch.equal(ParallelUNet.from_unet2d(unet, **fields(shape)).predict(*batch.given()), expected)
    # The control: with trained layers it predicts something else.
    assert not torch.allclose(randomised(built(kind, shape)).predict(*batch.given()), expected, atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "size", "depth"),
    [("sd2", ODD, 1), ("sd2", EVEN, 2), ("sd2", ODD, 4), ("sdxl", EVEN, 1), ("sdxl", ODD, 3)],
)
@torch.no_grad()
def test_in_front_of_the_fusion_every_feature_is_that_of_the_2d_model(
    kind: str, size: tuple[int, int], depth: int
) -> None:
    unet = tiny_unet(kind)
    batch = batch_for(unet, size=size)
    entered: list[Tensor] = []
    first = unet.up_blocks[len(unet.up_blocks) - depth]
    handle = first.register_forward_pre_hook(
        lambda _, args, kwargs: entered.append(kwargs.get("hidden_states", args[0] if args else None)),
        with_kwargs=True,
    )
    expected = batch.frames().by(unet)
    handle.remove()

    backbone = UNetBackbone(unet)
    given = batch.frames()
    whole = list(backbone.features(*given))
    stream, tail = backbone.split(*given, depth)
    features = list(stream)
    assert torch.equal(features[-1].hidden, entered[0])
    for mine, theirs in zip(features[:-1], whole, strict=False):
        assert torch.equal(mine.hidden, theirs.hidden)
    behind = sum(len(shapes) for shapes in backbone.layout.up[len(unet.up_blocks) - depth :])
    assert len(features) - 1 + behind == len(whole)
    assert torch.equal(backbone.head(tail(features[-1].hidden, spatial_layer)), expected)


@shapes
def test_every_parameter_learns_and_the_graph_holds_no_frozen_one(kind: str, shape: RingShape) -> None:
    model = built(kind, shape)
    batch = batch_for(model.spatial, frames=4)
    assert idle(train(model, batch, steps=2)) == set()
    ring = set(map(id, model.ring.parameters()))
    assert {id(leaf) for leaf in leaves_of_graph(loss(model, batch))} == ring
    assert all(parameter.grad is None for parameter in model.spatial.parameters())


@shapes
def test_only_blocks_behind_the_fusion_save_tensors(kind: str, shape: RingShape) -> None:
    model = built(kind, shape)
    batch = batch_for(model.spatial)
    first = len(model.spatial.up_blocks) - shape.fusion_depth
    behind = {f"spatial.up_blocks.{number}" for number in range(first, len(model.spatial.up_blocks))}
    copies = {f"ring.tail.{number}" for number in range(shape.fusion_depth)}
    saved = saved_for_backward(lambda: loss(model, batch), {"": model})[1].tensors
    blocks = {name: count for name, count in saved.items() if name.startswith(("spatial.", "ring.tail."))}
    assert {".".join(name.split(".")[:3]) for name in blocks} == (copies if shape.trained_tail else behind)
    assert sum(blocks.values()) > 10
    frozen = {name for name, module in model.named_modules() if module in model.frozen_in_graph()}
    assert frozen == (set() if shape.trained_tail else behind)


@shapes
def test_recomputing_changes_the_memory_and_not_the_numbers(kind: str, shape: RingShape) -> None:
    model = randomised(built(kind, shape))
    batch = batch_for(model.spatial, frames=4)

    def step(memory: LayerMemory) -> tuple[int, dict[str, Tensor]]:
        """Bytes held for the backward pass, and the gradients by name."""
        model.set_memory(memory)
        model.zero_grad()
        prediction, held = result_and_held(lambda: model.predict(*batch.given()), model)
        prediction.square().mean().backward()
        return held, {name: p.grad.clone() for name, p in model.ring.named_parameters()}

    all_kept, expected = step(LayerMemory())
    for memory in (LayerMemory(gradient_checkpointing=True), LayerMemory(True, 0.5, recompute_activations=True)):
        held, gradients = step(memory)
        assert held < 0.75 * all_kept, memory
        for name in expected:
            torch.testing.assert_close(expected[name], gradients[name], rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_a_trained_tail_has_no_dropout() -> None:
    """The frozen blocks that it replaces have none, and recomputation would draw another mask."""
    unet = tiny_unet("sd2", dropout=0.5)
    batch = batch_for(unet)
    image_model: Any = build_denoiser(unet, "text-to-image", "parallel")
    expected = image_model.eval().predict(*batch.given())
    model = build_denoiser(unet, "text-to-video", "parallel", {"fusion_depth": 2, "trained_tail": True})
    assert model.trained.training
    assert torch.equal(model.predict(*batch.given()), expected)


@torch.no_grad()
def test_without_a_ring_it_is_the_serial_model_without_its_other_temporal_layers() -> None:
    model = randomised(built("sd2", RingShape(0.0, 4, tail_temporal_layers=True)))
    serial = SerialUNet.from_unet2d(model.spatial)
    names = serial.temporal.state_dict().keys() & model.ring.state_dict().keys()
    assert {name.split(".")[0] for name in names} == {"up_blocks"}
    serial.temporal.load_state_dict({name: model.ring.state_dict()[name] for name in names}, strict=False)
    # The head is the ring's own.
    for part in ("conv_norm_out", "conv_out"):
        getattr(serial.unet, part).load_state_dict(getattr(model.ring, part).state_dict())
    batch = batch_for(model.spatial)
    assert torch.equal(model.predict(*batch.given()), serial.predict(*batch.given()))


@DTYPES
def test_dtypes_of_the_branches_are_their_own(frozen: torch.dtype, trained: torch.dtype, autocast: bool) -> None:
    model = randomised(built("emoji", RingShape(0.5, 2, tail_temporal_layers=True)))
    batch = batch_for(model.spatial)
    exact = model.predict(*batch.given()).detach()
    model.spatial.to(frozen)
    model.ring.to(trained)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        prediction = model.predict(*batch.given())
    assert prediction.dtype == (torch.bfloat16 if autocast else trained)
    assert (prediction.float() - exact).norm() < 0.05 * exact.norm()
    prediction.float().square().mean().backward()
    assert all(parameter.grad.dtype == trained for parameter in model.ring.parameters())


def test_the_shape_is_saved_and_another_one_refused_by_name(tmp_path: Path) -> None:
    shape = RingShape(0.5, 2, tail_temporal_layers=True)
    ParallelUNet.from_unet2d(tiny_unet("sd2"), **fields(shape)).save_pretrained(tmp_path)
    loaded = ParallelUNet.from_pretrained(tmp_path)
    assert loaded.ring_shape == shape
    for given in ({}, {"fusion_depth": 2}, fields(shape)):
        build_denoiser(loaded, "text-to-video", "parallel", given)
    with pytest.raises(MobiusError, match=r"fusion_depth=1.*2"):
        build_denoiser(loaded, "text-to-video", "parallel", {"ring_width": 0.5, "fusion_depth": 1})
    with pytest.raises(MobiusError, match=r"tail_temporal_layers=False.*True"):
        build_denoiser(loaded, "text-to-video", "parallel", {"tail_temporal_layers": False})


def test_shapes_that_do_not_fit_are_refused_with_those_that_do() -> None:
    with pytest.raises(MobiusError, match=r"fusion_depth=5.*0, 1, 2, 3, 4"):
        ParallelUNet.from_unet2d(tiny_unet("sd2"), fusion_depth=5)
    with pytest.raises(MobiusError, match="fusion_depth"):
        ParallelUNet.from_unet2d(tiny_unet("sd2"), tail_temporal_layers=True)
    for width in (0.3, 1 / 64, 1e-9):
        with pytest.raises(MobiusError, match=rf"ring_width={width:g}.*Widths that fit: 2, .*0\.5"):
            ParallelUNet.from_unet2d(tiny_unet("sd2"), ring_width=width)
    with pytest.raises(MobiusError, match="ring_width=0"):
        ParallelUNet.from_unet2d(tiny_unet("sd2"), ring_width=0, fusion_depth=1)
