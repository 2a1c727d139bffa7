"""The ring beside Stable Diffusion 3 medium: 1 clip of 16 frames, 512 px, bf16, fake tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from autograd_memory import held_for_backward
from diffusers import SD3Transformer2DModel
from torch._subclasses.fake_tensor import FakeTensorMode

from mobius_train.conditions import POOLED, TEXT, Conditions
from mobius_train.measure.graph import leaves_of_graph
from mobius_train.measure.saved import saved_for_backward
from mobius_train.models import build_denoiser
from mobius_train.models.recompute import LayerMemory
from mobius_train.plan.trace import Recorder

pytestmark = pytest.mark.slow

GIB = 2**30


@pytest.fixture(autouse=True)
def _fake_bf16() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    try:
        with FakeTensorMode():
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def build(**shape: Any) -> Any:
    transformer = SD3Transformer2DModel(
        num_layers=24,
        num_attention_heads=24,
        attention_head_dim=64,
        caption_projection_dim=1536,
        pos_embed_max_size=192,
    )
    return build_denoiser(transformer, "text-to-video", "parallel", shape)


def given() -> tuple[Any, Any, Conditions]:
    conditions = Conditions({TEXT: torch.randn(1, 333, 4096), POOLED: torch.randn(1, 2048)})
    return torch.randn(1, 16, 16, 64, 64), torch.zeros(1), conditions


def held(model: Any, memory: LayerMemory) -> float:
    model.set_memory(memory)
    return held_for_backward(lambda: model.predict(*given()), model) / GIB


def teraflops(model: Any, memory: LayerMemory) -> tuple[float, float]:
    """Of a forward and a backward pass."""
    model.set_memory(memory)
    recorder = Recorder()
    with recorder:
        output = model.predict(*given())
        recorder.mark("forward")
        output.sum().backward()
    flops = recorder.trace().flops
    return flops["forward"] / 1e12, flops["backward"] / 1e12


def test_weights_memory_and_work_of_the_default_ring() -> None:
    model = build()
    assert sum(p.numel() for p in model.spatial.parameters()) / 1e6 == pytest.approx(2028, abs=1)
    assert sum(p.numel() for p in model.ring.parameters()) / 1e6 == pytest.approx(390, abs=1)
    assert held(model, LayerMemory()) == pytest.approx(13.22, rel=0.01)
    assert held(model, LayerMemory(recompute_activations=True)) == pytest.approx(8.11, rel=0.01)
    assert held(model, LayerMemory(gradient_checkpointing=True)) == pytest.approx(0.668, rel=0.01)
    assert teraflops(model, LayerMemory()) == (pytest.approx(44.5, rel=0.01), pytest.approx(21.7, rel=0.02))
    assert teraflops(model, LayerMemory(True)) == (pytest.approx(44.5, rel=0.01), pytest.approx(32.5, rel=0.02))


def test_the_graph_has_no_frozen_part() -> None:
    model = build(ring_every=4)
    output, saved = saved_for_backward(lambda: model.predict(*given()), {"": model})
    assert output.shape == (1, 16, 16, 64, 64)
    assert not any(name.startswith("spatial") for name in saved.tensors)
    assert {id(leaf) for leaf in leaves_of_graph(output)} == set(map(id, model.ring.parameters()))
