from __future__ import annotations

import pytest
import torch
from diffusers.models.resnet import TemporalConvLayer
from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel
from torch import nn

from mobius_train.models.unet.temporal import FrameConv, TemporalAttention, TemporalConv, temporal_attention


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_frame_convolution_is_the_plain_conv3d(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    conv = FrameConv(8, 12).to(dtype)
    plain = nn.Conv3d(8, 12, (3, 1, 1), padding=(1, 0, 0)).to(dtype)
    plain.load_state_dict(conv.state_dict())
    # Not contiguous, as the layer gets it.
    x = torch.randn(2, 5, 8, 4, 3, dtype=dtype).transpose(1, 2)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    outputs = [conv(inputs[0]), plain(inputs[1])]
    for output in outputs:
        output.square().sum().backward()

    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    torch.testing.assert_close(conv.weight.grad, plain.weight.grad)
    assert conv.bias is not None
    assert plain.bias is not None
    torch.testing.assert_close(conv.bias.grad, plain.bias.grad)


def test_temporal_convolution_is_the_layer_of_diffusers() -> None:
    torch.manual_seed(0)
    mine, theirs = TemporalConv(16, 16, norm_num_groups=4), TemporalConvLayer(16, norm_num_groups=4)
    assert mine.conv4[-1].weight.abs().sum() > 0
    assert theirs.conv4[-1].weight.abs().sum() == 0
    theirs.load_state_dict(mine.state_dict())
    x = torch.randn(6, 16, 4, 5)
    torch.testing.assert_close(mine(x, num_frames=3), theirs(x, num_frames=3))


def test_projection_in_front_changes_the_channels() -> None:
    conv = TemporalConv(24, 16, norm_num_groups=4)
    assert conv(torch.randn(6, 24, 4, 5), num_frames=3).shape == (6, 16, 4, 5)
    names = {name for name, _ in conv.named_parameters() if name.startswith("projection")}
    assert names == {f"projection.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    assert TemporalConv(16, 16, norm_num_groups=4).projection is None


@pytest.mark.parametrize("block", [TemporalConv(24, 16, 4), TemporalConv(16, 16, 4), temporal_attention(16, 2, 4)])
def test_blocks_mix_the_frames_of_a_clip_and_never_clips(block: nn.Module) -> None:
    channels = 24 if getattr(block, "projection", None) else 16
    torch.manual_seed(0)
    clips = torch.randn(2, 3, channels, 4, 5)
    changed = clips.clone()
    changed[0, 2] += 1
    before, after = (block(x.flatten(0, 1), num_frames=3).unflatten(0, (2, 3)) for x in (clips, changed))
    assert not torch.equal(before[0, 1], after[0, 1])
    assert torch.equal(before[1], after[1])


def test_attention_is_the_model_of_diffusers() -> None:
    torch.manual_seed(0)
    mine = temporal_attention(32, 4, norm_num_groups=4)
    theirs = TransformerTemporalModel(4, 8, in_channels=32, norm_num_groups=4, cross_attention_dim=77)
    theirs.load_state_dict(mine.state_dict())
    x = torch.randn(6, 32, 4, 5)
    assert torch.equal(mine(x, num_frames=3), theirs(x, num_frames=3).sample)


@pytest.mark.parametrize("block", [TemporalConv(16, 16, 4), temporal_attention(16, 2, 4)])
def test_zeroed_blocks_are_the_identity_and_others_are_not(block: TemporalConv | TemporalAttention) -> None:
    x = torch.randn(6, 16, 4, 5)
    assert not torch.equal(block(x, num_frames=3), x)
    block.zero_output()
    assert torch.equal(block(x, num_frames=3), x)
