"""Attention backends: which is taken, that all compute the same, and that no batch is too large."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor
from unets import batch_for, serial_with_random_temporal_layers, tiny_unet

from mobius_train.errors import MobiusError
from mobius_train.models import ParallelUNet, attention
from mobius_train.models.attention import (
    AttentionBackend,
    KernelProcessor,
    TemporalProcessor,
    attention_layers,
    set_attention_backend,
)
from mobius_train.models.choose_attention import Machine, choose_attention
from mobius_train.models.unet.temporal import temporal_attention

A100, V100, CPU = (8, 0), (7, 0), None


@pytest.mark.parametrize(
    ("capability", "installed", "dtype", "head_dim", "temporal", "expected", "reason"),
    [
        (A100, True, torch.bfloat16, 64, True, "flash_attn", "GPU and dtype"),
        (A100, True, torch.float16, 256, False, "flash_attn", "GPU and dtype"),
        ((9, 0), True, torch.bfloat16, 64, False, "flash_attn", "GPU and dtype"),
        (A100, False, torch.bfloat16, 64, False, "sdpa", "not installed"),
        (A100, True, torch.float32, 64, False, "sdpa", "float32"),
        (A100, True, torch.bfloat16, 320, False, "sdpa", "these have 320"),
        (V100, True, torch.float16, 64, True, "sdpa", "this GPU has 7.0"),
        (CPU, True, torch.float32, 64, True, "sdpa", "CUDA GPU"),
        (CPU, False, torch.bfloat16, 64, False, "sdpa", "CUDA GPU"),
        (CPU, False, torch.bfloat16, 64, True, "eager", "bfloat16 on a CPU"),
    ],
)
def test_auto_takes_flash_attention_where_it_can_run(
    capability: tuple[int, int] | None,
    installed: bool,
    dtype: torch.dtype,
    head_dim: int,
    temporal: bool,
    expected: str,
    reason: str,
) -> None:
    choice = choose_attention("auto", Machine(capability, installed), dtype, head_dim, temporal)
    assert choice.backend == expected
    assert reason in choice.reason


@pytest.mark.parametrize(
    ("machine", "dtype", "head_dim", "reason"),
    [
        (Machine(CPU, True), torch.bfloat16, 64, "CUDA GPU"),
        (Machine(V100, True), torch.float16, 64, r"8\.0 .* this GPU has 7\.0"),
        (Machine(A100, False), torch.bfloat16, 64, r"mobius-train\[flash\]"),
        (Machine(A100, True), torch.float32, 64, "fp16 and bf16"),
        (Machine(A100, True), torch.bfloat16, 512, "at most 256"),
    ],
)
def test_flash_attention_that_cannot_run_is_refused_with_the_reason(
    machine: Machine, dtype: torch.dtype, head_dim: int, reason: str
) -> None:
    with pytest.raises(MobiusError, match=rf"attention_backend=flash_attn cannot run: .*{reason}"):
        choose_attention("flash_attn", machine, dtype, head_dim, False)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_a_backend_that_is_asked_for_is_taken(backend: AttentionBackend) -> None:
    assert choose_attention(backend, Machine(A100, True), torch.bfloat16, 64, True).backend == backend


def test_this_machine_is_described() -> None:
    machine = Machine.of(torch.device("cpu"))
    assert machine.capability is None
    assert machine.flash_attn in (True, False)


def test_backends_compute_the_same_forward_and_backward() -> None:
    torch.manual_seed(0)
    results: list[list[Any]] = []
    inputs = [torch.randn(6, 5, 3, 16) for _ in range(3)]
    for kernel in (attention.sdpa, attention.eager):
        leaves = [x.clone().requires_grad_() for x in inputs]
        output = kernel(*leaves)
        assert output.shape == (6, 5, 3, 16)
        output.square().sum().backward()
        results.append([output, *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(*results)
    # A scale that is left out is noticed.
    wrong = attention.eager(inputs[0] * 4, *inputs[1:])
    assert not torch.allclose(wrong, results[0][0], atol=1e-2)


def test_the_default_kernel_is_that_of_diffusers_to_the_last_bit() -> None:
    torch.manual_seed(0)
    layer = Attention(32, heads=2, dim_head=16, cross_attention_dim=24)
    hidden, text = torch.randn(3, 7, 32), torch.randn(3, 5, 24)
    expected = layer(hidden, text)
    assert isinstance(layer.processor, AttnProcessor2_0)
    layer.set_processor(KernelProcessor("sdpa"))
    assert torch.equal(layer(hidden, text), expected)
    layer.set_processor(KernelProcessor("eager"))
    torch.testing.assert_close(layer(hidden, text), expected)


def test_each_kind_of_layer_takes_its_own_backend() -> None:
    model = ParallelUNet.from_unet2d(tiny_unet("emoji"))
    untouched = copy.deepcopy(model.spatial)
    batch = batch_for(model.spatial)
    expected = model.predict(*batch.given())
    spatial, temporal = attention_layers(model, False), attention_layers(model, True)
    assert len(temporal) == 2 * (
        1 + sum(len(b.temp_attentions) for b in [*model.ring.down_blocks, model.ring.mid_block, *model.ring.up_blocks])
    )
    assert set(map(id, spatial)) == set(map(id, attention_layers(model.spatial, False)))

    set_attention_backend(model, "eager", temporal=True)
    assert {layer.processor.backend for layer in temporal} == {"eager"}
    assert {type(layer.processor) for layer in spatial} == {AttnProcessor2_0}
    torch.testing.assert_close(model.predict(*batch.given()), expected)

    set_attention_backend(model, "eager", temporal=False)
    assert {type(layer.processor) for layer in spatial} == {AttnProcessor}
    assert {type(layer.processor) for layer in temporal} == {TemporalProcessor}
    # Purity holds under the same backend.
    set_attention_backend(untouched, "eager", temporal=False)
    with torch.no_grad():
        pictures = batch.frames().by(untouched).unflatten(0, (2, -1)).transpose(1, 2)
        assert torch.equal(model.predict(*batch.given()), pictures)


def test_a_serial_model_has_both_kinds_too() -> None:
    model = serial_with_random_temporal_layers(tiny_unet("emoji"))
    batch = batch_for(model.unet)
    expected = model.predict(*batch.given())
    for temporal in (False, True):
        assert attention_layers(model, temporal)
        set_attention_backend(model, "eager", temporal)
    torch.testing.assert_close(model.predict(*batch.given()), expected)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_a_batch_beyond_what_kernels_take_goes_in_pieces(
    backend: AttentionBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer = temporal_attention(32, 4, norm_num_groups=4)
    set_attention_backend(layer, backend, temporal=True)
    # One clip with more positions than a kernel takes.
    x = torch.randn(3, 32, 5, 9)
    whole = layer(x, num_frames=3)
    batches: list[int] = []
    kernel = attention.KERNELS[backend]

    def noted(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batches.append(len(query))
        return kernel(query, key, value)

    monkeypatch.setitem(attention.KERNELS, backend, noted)
    monkeypatch.setattr(attention, "MAX_BATCH", 20)
    torch.testing.assert_close(layer(x, num_frames=3), whole)
    assert batches == [20, 20, 5] * 2


def test_more_positions_than_65535_at_once() -> None:
    layer = temporal_attention(4, 1, norm_num_groups=2)
    x = torch.randn(2, 4, 256, 257)
    with torch.no_grad():
        assert layer(x, num_frames=2).isfinite().all()
