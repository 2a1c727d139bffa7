"""Conditions besides the text reach the UNet by diffusers' names, unrounded, or are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from unets import batch_for, in_diffusers, tiny_unet

from mobius_train.conditions import Conditions
from mobius_train.errors import MobiusError
from mobius_train.models import ImageUNet, ParallelUNet, SerialUNet
from mobius_train.models.added_conditions import added_cond_kwargs, given_conditions

MODELS = [ParallelUNet.from_unet2d, SerialUNet.from_unet2d, ImageUNet]
models = pytest.mark.parametrize("model", MODELS, ids=["parallel", "serial", "image"])
Make = Callable[[UNet2DConditionModel], Any]


def test_the_call_signature_names_the_conditions_and_back() -> None:
    conditions = batch_for(tiny_unet("sdxl")).conditions
    assert added_cond_kwargs(conditions) == in_diffusers(conditions)
    assert given_conditions(conditions["text"], in_diffusers(conditions)).tensors == conditions.tensors
    assert added_cond_kwargs(Conditions.of_text(conditions["text"])) == {}
    with pytest.raises(MobiusError, match=r"'image_embeds'.*'text_embeds' and 'time_ids'"):
        given_conditions(conditions["text"], in_diffusers(conditions) | {"image_embeds": conditions["text"]})


@models
@torch.no_grad()
def test_every_model_reads_pooled_text_and_sizes(model: Make) -> None:
    unet = tiny_unet("sdxl")
    batch = batch_for(unet)
    expected = batch.frames().by(unet).unflatten(0, (2, 3)).transpose(1, 2)
    made = model(unet)
    assert torch.equal(batch.by(made), expected)
    assert torch.equal(made.predict(*batch.given()), expected)
    for name in ("pooled", "sizes"):
        other = Conditions(batch.conditions.tensors | {name: batch.conditions[name] + 1})
        assert not torch.allclose(made.predict(batch.sample, batch.timestep, other), expected, atol=1e-5), name


@models
def test_missing_or_misshapen_conditions_are_refused_by_name(model: Make) -> None:
    made = model(tiny_unet("sdxl"))
    sample, timestep, conditions = batch_for(made.image_model).given()
    tensors = conditions.tensors
    for wrong, named in (
        ({"text": tensors["text"]}, r"(?s)pooled \(text_embeds .*missing.*sizes \(time_ids .*missing"),
        (tensors | {"pooled": torch.zeros(2, 21)}, r"pooled.*\(2, 21\), not \(2, 20\)"),
        (tensors | {"sizes": tensors["sizes"][:, :5]}, r"sizes.*\(2, 5\), not \(2, 6\)"),
        (tensors | {"text": tensors["text"][..., :40]}, r"text.*\(2, 5, 40\), not \(2, 5, 48\)"),
        (tensors | {"sizes": tensors["sizes"].bfloat16()}, r"sizes.*bfloat16.*integers"),
    ):
        with pytest.raises(MobiusError, match=named):
            made.predict(sample, timestep, Conditions(wrong))
    # The control.
    made.predict(sample, timestep, conditions)


@models
@torch.no_grad()
def test_sizes_are_not_rounded_in_bfloat16(model: Make) -> None:
    unet = tiny_unet("sdxl").bfloat16()
    made = model(unet).to(torch.bfloat16)
    batch = batch_for(unet)
    seen: list[torch.Tensor] = []
    handle = unet.add_time_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    made.predict(batch.sample, batch.timestep, batch.conditions.to(dtype=torch.bfloat16))
    handle.remove()
    assert torch.equal(seen[0].view(-1, 6)[::3].double(), batch.conditions["sizes"].double())
    assert 1023 in seen[0]


def test_in_mode_full_the_embedding_learns_and_in_mode_serial_it_does_not() -> None:
    for full in (True, False):
        model = SerialUNet.from_unet2d(tiny_unet("sdxl"))
        model.unet.requires_grad_(full)
        batch_for(model.unet).by(model).square().mean().backward()
        embedding: nn.Module = model.unet.add_embedding
        assert all((p.grad is not None and bool(p.grad.any())) == full for p in embedding.parameters())
