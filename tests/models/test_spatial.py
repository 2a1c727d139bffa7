"""Invariant 1: the spatial branch computes what the untouched UNet2DConditionModel computes on each frame."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from kinds import each_kind_in_one_size, two_kinds
from torch import Tensor, nn
from unets import Batch, Frames, batch_for, serial_with_random_temporal_layers, tiny_unet

from mobius_train.models import ParallelUNet
from mobius_train.models.backbone import Feature, without_graph
from mobius_train.models.unet.backbone import UNetBackbone, Walk, output_head


def layer_outputs(unet: UNet2DConditionModel, run: Callable[[], object]) -> list[Tensor]:
    """What conv_in, every resnet and every spatial attention of `unet` give in `run`, in order."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: object, output: object) -> None:
        assert isinstance(output, Tensor | tuple)
        outputs.append((output if isinstance(output, Tensor) else output[0]).detach().clone())

    blocks = [*unet.down_blocks, *unet.up_blocks, *([unet.mid_block] if unet.mid_block else [])]
    modules = [unet.conv_in]
    for block in blocks:
        modules += [*block.resnets, *getattr(block, "attentions", ())]
    hooks = [module.register_forward_hook(keep) for module in modules]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    assert len(outputs) == len(modules)
    return outputs


def stream(unet: UNet2DConditionModel, frames: Frames) -> list[Tensor]:
    features = without_graph(UNetBackbone(unet).features(*frames))
    return [tensor for feature in features for tensor in feature if tensor is not None]


def same_bits(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


@each_kind_in_one_size
def test_features_are_those_of_the_untouched_forward_bit_for_bit(
    unet: UNet2DConditionModel, size: tuple[int, int]
) -> None:
    untouched = copy.deepcopy(unet)
    frames = batch_for(unet, size=size).frames()
    reference = layer_outputs(untouched, lambda: frames.by(untouched))

    spatial = ParallelUNet.from_unet2d(unet).spatial
    assert same_bits(stream(spatial, frames), reference)


def test_each_frame_alone_gives_the_untouched_forward_bit_for_bit(unet: UNet2DConditionModel) -> None:
    untouched = copy.deepcopy(unet)
    spatial = ParallelUNet.from_unet2d(unet).spatial
    frames = batch_for(unet, frames=2).frames()
    together = stream(spatial, frames)
    for n in range(len(frames.pictures)):
        alone = layer_outputs(untouched, partial(frames.at(n).by, untouched))
        assert same_bits(stream(spatial, frames.at(n)), alone)
        # Kernels may sum in another order for another batch size, so across sizes only nearly.
        for batched, single in zip(together, alone, strict=True):
            torch.testing.assert_close(batched[n : n + 1], single, rtol=1e-4, atol=1e-4)


def change_other_frames(batch: Batch, kept: int) -> Batch:
    sample = torch.randn_like(batch.sample)
    sample[:, :, kept] = batch.sample[:, :, kept]
    return batch._replace(sample=sample)


def test_a_frame_does_not_depend_on_the_others(unet: UNet2DConditionModel) -> None:
    batch = batch_for(unet)
    frames, kept = batch.sample.shape[2], 1
    before = stream(unet, batch.frames())
    after = stream(unet, change_other_frames(batch, kept).frames())
    assert same_bits([h[kept::frames] for h in before], [h[kept::frames] for h in after])
    assert not same_bits(before, after)


@two_kinds
def test_in_a_serial_model_a_frame_depends_on_the_others(unet: UNet2DConditionModel) -> None:
    serial = serial_with_random_temporal_layers(unet)
    batch = batch_for(unet)
    frames, kept = batch.sample.shape[2], 1
    changed = change_other_frames(batch, kept)
    before = layer_outputs(serial.unet, lambda: batch.by(serial))
    after = layer_outputs(serial.unet, lambda: changed.by(serial))
    assert torch.equal(before[0][kept::frames], after[0][kept::frames])  # conv_in, before all temporal layers
    for hidden, other in zip(before[1:], after[1:], strict=True):
        assert not torch.equal(hidden[kept::frames], other[kept::frames])


@pytest.mark.parametrize("timestep", [7, 7.0, torch.tensor(7), torch.tensor([7])])
def test_timesteps_as_diffusers_takes_them(timestep: Any) -> None:
    unet = tiny_unet("emoji")
    frames = batch_for(unet).frames()._replace(timestep=timestep)
    with torch.no_grad():
        *_, last = Walk(unet, *frames).features()
        assert torch.equal(output_head(unet, last.hidden), frames.by(unet))


@pytest.mark.parametrize(
    "changes",
    [
        {"center_input_sample": True},
        {"mid_block_type": None},
        {"time_embedding_act_fn": "silu"},
        {"time_embedding_type": "fourier"},
        {"layers_per_block": (1, 3, 2), "attention_head_dim": (2, 3, 4)},
        {"downsample_padding": 0},
        {"resnet_time_scale_shift": "scale_shift"},
        {"only_cross_attention": True},
        {"transformer_layers_per_block": 2},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_unusual_backbones_are_walked_as_diffusers_does(changes: dict) -> None:
    unet = tiny_unet("emoji", **changes)
    batch = batch_for(unet)
    with torch.no_grad():
        *_, last = Walk(unet, *batch.frames()).features()
        assert torch.equal(output_head(unet, last.hidden), batch.frames().by(unet))
        assert batch.by(ParallelUNet.from_unet2d(unet)).shape == batch.sample.shape


def test_taking_features_leaves_gradients_on_for_the_taker() -> None:
    unet = tiny_unet("emoji")
    for feature in without_graph(UNetBackbone(unet).features(*batch_for(unet).frames())):
        assert torch.is_grad_enabled()
        assert isinstance(feature, Feature)
        assert not feature.hidden.requires_grad
        assert feature.hidden.grad_fn is None
