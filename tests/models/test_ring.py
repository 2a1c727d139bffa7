"""Invariant 3: the graph holds nothing of the spatial branch, and all of the ring learns."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from autograd_memory import held_for_backward, result_and_held, watched
from diffusers import UNet2DConditionModel, UNet3DConditionModel
from learning import idle, loss, train
from torch import nn
from unets import CONFIGS, Batch, batch_for, serial_with_random_temporal_layers, tiny_unet

from mobius_train.config import Mode
from mobius_train.measure.graph import leaves_of_graph
from mobius_train.measure.saved import saved_for_backward
from mobius_train.models import ParallelUNet, build_denoiser
from mobius_train.models.backbone import Feature, fold_conditions, fold_frames, without_graph
from mobius_train.models.recompute import LayerMemory
from mobius_train.storages import StorageFollower, module_storages


def features_of(model: ParallelUNet, batch: Batch) -> Iterator[Feature]:
    folded = fold_conditions(batch.timestep, batch.conditions, batch.sample.shape[2])
    return without_graph(model.backbone.features(fold_frames(batch.sample), *folded))


def test_after_two_steps_every_parameter_of_the_ring_learns(unet: UNet2DConditionModel) -> None:
    model: Any = build_denoiser(unet, "text-to-video", "parallel")
    gradients = train(model, batch_for(unet, frames=4), steps=2)
    assert len(gradients) == len(list(model.ring.parameters()))
    assert idle(gradients) == set()
    assert all(parameter.grad is None for parameter in model.spatial.parameters())


def test_at_the_first_step_only_fusion_and_head_learn() -> None:
    # The control of the test above: its check finds parameters that do not learn.
    model: Any = build_denoiser(tiny_unet("sd2"), "text-to-video", "parallel")
    gradients = train(model, batch_for(model.spatial), steps=0)
    learning = gradients.keys() - idle(gradients)
    assert learning == {n for n in gradients if n.startswith(("fusion.", "conv_norm_out.", "conv_out."))}


@pytest.mark.parametrize("gradient_checkpointing", [False, True], ids=["kept", "recomputed"])
def test_the_graph_holds_no_spatial_parameter(unet: UNet2DConditionModel, gradient_checkpointing: bool) -> None:
    model: Any = build_denoiser(unet, "text-to-video", "parallel")
    model.set_memory(LayerMemory(gradient_checkpointing))
    batch = batch_for(unet)
    value, saved = saved_for_backward(lambda: loss(model, batch), {"": model})
    assert [name for name in saved.tensors if name.startswith("spatial.")] == []
    ring = set(map(id, model.ring.parameters()))
    leaves = leaves_of_graph(value)
    assert leaves
    assert all(id(leaf) in ring for leaf in leaves)


@pytest.mark.parametrize("mode", ["serial", "full"])
def test_the_graph_of_a_serial_model_holds_spatial_parameters(mode: Mode) -> None:
    model: Any = build_denoiser(tiny_unet("sd2"), "text-to-video", mode)
    batch = batch_for(model.unet)
    value, saved = saved_for_backward(lambda: loss(model, batch), {"": model})
    assert sum(count for name, count in saved.tensors.items() if name.startswith("unet.")) > 100
    spatial = set(map(id, model.unet.parameters()))
    in_graph = [leaf for leaf in leaves_of_graph(value) if id(leaf) in spatial]
    assert bool(in_graph) == (mode == "full")


def outliving(model: ParallelUNet, batch: Batch) -> tuple[set[int], set[int]]:
    """What the spatial branch computed and still lives after the forward pass; and its features as taken."""
    live = StorageFollower()
    taken: set[int] = set()

    def noted(features: Iterator[Feature]) -> Iterator[Feature]:
        for feature in features:
            taken.update(tensor.untyped_storage()._cdata for tensor in feature if tensor is not None)
            yield feature
            del feature

    output = model.ring(noted(watched(features_of(model, batch), live)), num_frames=batch.sample.shape[2])
    alive = {storage._cdata for storage, _ in live.alive()} - module_storages(model.spatial)
    output.sum().backward()
    return alive, taken


def test_nothing_that_the_spatial_branch_computed_outlives_the_forward_pass(
    unet: UNet2DConditionModel,
) -> None:
    model: Any = build_denoiser(unet, "text-to-video", "parallel")
    assert outliving(model, batch_for(unet))[0] == set()


def test_recomputing_keeps_features_and_nothing_else(unet: UNet2DConditionModel) -> None:
    model: Any = build_denoiser(unet, "text-to-video", "parallel")
    model.set_memory(LayerMemory(True))
    alive, taken = outliving(model, batch_for(unet))
    assert alive
    assert alive <= taken
    # SA(SC(h)) is not among them, but for that of the last layer, which the head takes.
    layers = sum(len(block.temp_convs) for block in (*model.ring.down_blocks, *model.ring.up_blocks)) + 2
    head = model.ring.layers()[-1].heads is not None
    assert len(alive) == 1 + layers + head


def most_alive(features: Iterator[Feature], consume: Callable[[Iterator[Feature]], object]) -> int:
    """How many SC(h), of layers with attention, live at once."""
    references: list[weakref.ref] = []
    most = 0

    def counted() -> Iterator[Feature]:
        nonlocal most
        for feature in features:
            if feature.attention is not None:
                references.append(weakref.ref(feature.convolution))
            most = max(most, sum(reference() is not None for reference in references))
            yield feature
            del feature

    consume(counted())
    assert len(references) > 5
    return most


def test_features_are_freed_in_lockstep() -> None:
    model = ParallelUNet.from_unet2d(tiny_unet("emoji"))
    batch = batch_for(model.spatial)
    assert most_alive(features_of(model, batch), lambda features: model.ring(features, num_frames=3)) == 1
    # Taking all features first keeps them all.
    assert most_alive(features_of(model, batch), lambda features: model.ring(list(features), num_frames=3)) > 5


def test_recomputing_changes_the_memory_and_not_the_numbers(unet: UNet2DConditionModel) -> None:
    batch = batch_for(unet, size=(18, 10))
    model = ParallelUNet.from_unet2d(unet)
    nn.init.normal_(model.ring.fusion.weight)
    held, gradients, outputs = [], [], []
    for recompute in (False, True):
        model.ring.gradient_checkpointing = recompute
        output, kept = result_and_held(lambda: model.predict(*batch.given()), model)
        outputs.append(output)
        held.append(kept)
        model.zero_grad()
        output.square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.ring.parameters()])
    assert held[1] < 0.2 * held[0]
    assert torch.equal(*outputs)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_diffusers_switch_for_gradient_checkpointing_works() -> None:
    model = ParallelUNet.from_unet2d(tiny_unet("emoji"))
    batch = batch_for(model.spatial)
    kept = held_for_backward(lambda: model.predict(*batch.given()), model)
    model.enable_gradient_checkpointing()
    assert held_for_backward(lambda: model.predict(*batch.given()), model) < 0.2 * kept
    model.disable_gradient_checkpointing()
    assert held_for_backward(lambda: model.predict(*batch.given()), model) == kept


def test_serial_holds_more_for_the_backward_pass(unet: UNet2DConditionModel) -> None:
    batch = batch_for(unet)

    def held(model: Any) -> int:
        return held_for_backward(lambda: model.predict(*batch.given()), model)

    serial = build_denoiser(copy.deepcopy(unet), "text-to-video", "serial")
    parallel = build_denoiser(unet, "text-to-video", "parallel")
    assert held(parallel) < 0.85 * held(serial)


def test_temporal_weights_have_the_names_and_shapes_of_the_3d_unet() -> None:
    config = CONFIGS["sd2"]
    unet3d = UNet3DConditionModel(
        block_out_channels=config["block_out_channels"],
        norm_num_groups=config["norm_num_groups"],
        layers_per_block=config["layers_per_block"],
        cross_attention_dim=config["cross_attention_dim"],
        attention_head_dim=32,
    )
    ring = {name: p.shape for name, p in ParallelUNet.from_unet2d(tiny_unet("sd2")).ring.named_parameters()}
    theirs = {
        name: parameter.shape
        for name, parameter in unet3d.named_parameters()
        if name.startswith(("transformer_in.", "conv_norm_out.", "conv_out."))
        or any(part in name for part in ("temp_convs.", "temp_attentions.", "samplers."))
    }
    own = {name for name in ring if ".projection." in name or name.startswith("fusion.")}
    assert {name: shape for name, shape in ring.items() if name not in own} == theirs


def test_ring_starts_with_ordinary_layers_and_copies_of_the_samplers(unet: UNet2DConditionModel) -> None:
    ring = ParallelUNet.from_unet2d(unet).ring
    spatial = unet.state_dict()
    copied = [n for n in ring.state_dict() if "samplers." in n or n.startswith(("conv_norm_out", "conv_out"))]
    assert len(copied) > 8
    for name in copied:
        assert torch.equal(ring.get_parameter(name), spatial[name])
        assert ring.get_parameter(name).data_ptr() != spatial[name].data_ptr()
    for name, parameter in ring.named_parameters():
        if name not in copied and parameter.ndim > 1:
            assert parameter.any(), name


def test_the_ring_mixes_frames_and_the_spatial_branch_does_not() -> None:
    model = ParallelUNet.from_unet2d(tiny_unet("emoji")).eval()
    nn.init.normal_(model.ring.fusion.weight)
    batch = batch_for(model.spatial)
    changed = batch.sample.clone()
    changed[:, :, 2] += 1
    before, after = batch.by(model), batch._replace(sample=changed).by(model)
    assert not torch.allclose(before[:, :, 0], after[:, :, 0])
    serial = serial_with_random_temporal_layers(tiny_unet("emoji"))
    assert not torch.allclose(batch.by(serial)[:, :, 0], batch._replace(sample=changed).by(serial)[:, :, 0])
