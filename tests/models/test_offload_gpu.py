"""On a GPU: offloaded tensors really leave it, and the gradients are the same; attention at any batch size."""

from __future__ import annotations

import pytest
import torch
from diffusers.utils.import_utils import is_flash_attn_available
from torch import nn
from unets import Batch, batch_for, tiny_unet

from mobius_train.models import ParallelUNet, attention
from mobius_train.models.attention import AttentionBackend
from mobius_train.models.recompute import LayerMemory
from mobius_train.models.unet.temporal import temporal_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def model_and_batch() -> tuple[ParallelUNet, Batch]:
    model = ParallelUNet.from_unet2d(tiny_unet("sd2"))
    nn.init.normal_(model.ring.fusion.weight)
    batch = batch_for(model.spatial, frames=8, size=(32, 32))
    return model.to("cuda"), Batch(
        batch.sample.cuda(), batch.timestep.cuda(), batch.conditions.to(torch.device("cuda"))
    )


def step(model: ParallelUNet, batch: Batch) -> tuple[int, int, list[torch.Tensor]]:
    """Bytes that the forward pass leaves on the GPU and in host memory, and the gradients."""
    model.zero_grad()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    loss = model.predict(*batch.given()).square().mean()
    torch.cuda.synchronize()
    # Blocks that a copy was reading are freed at the next allocation.
    torch.empty(1, device="cuda")
    held, host = torch.cuda.memory_allocated() - before, model.ring.host_bytes
    loss.backward()
    return held, host, [p.grad.clone() for p in model.ring.parameters() if p.grad is not None]


@pytest.mark.parametrize("memory", [LayerMemory(activation_offload=1.0), LayerMemory(True, activation_offload=0.4)])
def test_offloaded_tensors_leave_the_gpu_and_come_back_the_same(memory: LayerMemory) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    model, batch = model_and_batch()
    step(model, batch)
    kept, _, expected = step(model, batch)
    model.ring.set_memory(memory)
    for _ in range(3):
        held, host, gradients = step(model, batch)
        assert host > 0
        assert held < 0.7 * kept
        for mine, theirs in zip(gradients, expected, strict=True):
            torch.testing.assert_close(mine, theirs)
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", ["sdpa", "eager", "flash_attn"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_more_positions_than_65535_forward_and_backward(backend: AttentionBackend, dtype: torch.dtype) -> None:
    if backend == "flash_attn" and not (is_flash_attn_available() and torch.cuda.get_device_capability() >= (8, 0)):
        pytest.skip("needs flash-attn and a GPU that it runs on")
    layer = temporal_attention(32, 1, norm_num_groups=4).to("cuda", dtype)
    attention.set_attention_backend(layer, backend, temporal=True)
    x = torch.randn(8, 32, 260, 260, device="cuda", dtype=dtype, requires_grad=True)
    layer(x, num_frames=8).float().square().mean().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
