"""The ring beside Stable Diffusion 3 medium: 1 clip of 16 frames, 512 px, bf16, fake tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from autograd_memory import Step, held_for_backward, step
from diffusers import SD3Transformer2DModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mobius_train.conditions import POOLED, TEXT, Conditions
from mobius_train.models import build_denoiser
from mobius_train.models.recompute import LayerMemory
from mobius_train.plan.trace import Recorder

pytestmark = pytest.mark.slow

GIB = 2**30


@pytest.fixture(scope="module", autouse=True)
def _fake_bf16() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    try:
        with FakeTensorMode():
            yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def model() -> Any:
    """With the ring of the default shape."""
    transformer = SD3Transformer2DModel(
        num_layers=24,
        num_attention_heads=24,
        attention_head_dim=64,
        caption_projection_dim=1536,
        pos_embed_max_size=192,
    )
    return build_denoiser(transformer, "text-to-video", "parallel")


def given() -> tuple[Any, Any, Conditions]:
    conditions = Conditions({TEXT: torch.randn(1, 333, 4096), POOLED: torch.randn(1, 2048)})
    return torch.randn(1, 16, 16, 64, 64), torch.zeros(1), conditions


def measured(model: Any, memory: LayerMemory) -> tuple[Step, float, float]:
    """A step, and TFLOP of its forward and backward pass, with attention."""
    recorder = Recorder()

    def forward() -> Tensor:
        output: Tensor = model.predict(*given())
        recorder.mark("forward")
        return output

    model.set_memory(memory)
    with recorder:
        found = step(forward, model)
    flops = recorder.trace().flops
    return found, flops["forward"] / 1e12, flops["backward"] / 1e12


@pytest.fixture(scope="module")
def kept(model: Any) -> tuple[Step, float, float]:
    return measured(model, LayerMemory())


def test_weights_memory_and_work_of_the_default_ring(model: Any, kept: tuple[Step, float, float]) -> None:
    assert sum(p.numel() for p in model.spatial.parameters()) / 1e6 == pytest.approx(2028, abs=1)
    assert sum(p.numel() for p in model.ring.parameters()) / 1e6 == pytest.approx(390, abs=1)
    whole, *flops = kept
    assert whole.saved.total / GIB == pytest.approx(13.22, rel=0.01)
    assert flops == [pytest.approx(44.5, rel=0.01), pytest.approx(21.7, rel=0.02)]
    recomputed, *flops = measured(model, LayerMemory(gradient_checkpointing=True))
    assert recomputed.saved.total / GIB == pytest.approx(0.668, rel=0.01)
    assert flops == [pytest.approx(44.5, rel=0.01), pytest.approx(32.5, rel=0.02)]
    model.set_memory(LayerMemory(recompute_activations=True))
    held = held_for_backward(lambda: model.predict(*given()), model)
    assert held / GIB == pytest.approx(8.11, rel=0.01)


def test_the_graph_has_no_frozen_part(model: Any, kept: tuple[Step, float, float]) -> None:
    whole = kept[0]
    assert whole.output.shape == (1, 16, 16, 64, 64)
    assert "spatial" not in whole.branches()
    assert {id(leaf) for leaf in whole.leaves} == set(map(id, model.ring.parameters()))
