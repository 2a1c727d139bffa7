"""The recipe's memory and speed options reach the model, or are refused where the device has no use for them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import token_models
import torch
from diffusers import UNet2DConditionModel
from tiny import KINDS
from torch.nn.utils import parametrize
from unets import batch_for

from mobius_train.assembly.options import (
    apply_attention_backend,
    apply_memory_options,
    check_device,
    set_memory_format,
    store_frozen_weights,
    without_gpu_options,
)
from mobius_train.config import RunConfig
from mobius_train.dtypes import Dtypes
from mobius_train.errors import MobiusError
from mobius_train.models import build_denoiser, weights_hash
from mobius_train.models.backbone import own_frames
from mobius_train.models.choose_attention import Machine
from mobius_train.sequence.split import Split

CPU = torch.device("cpu")


def config(**changes: Any) -> RunConfig:
    return RunConfig.model_validate({"data": {"train": "x"}, "output_dir": "y", "max_train_steps": 1} | changes)


def model(mode: Any = "parallel", **ring: Any) -> Any:
    unet = UNet2DConditionModel(sample_size=8, **KINDS["emoji"])
    return build_denoiser(unet, "text-to-video", mode, ring)


def test_offloading_is_refused_on_a_cpu_before_anything_is_loaded() -> None:
    with pytest.raises(MobiusError, match=r"activation_offload=0\.2 .* on cpu.*: set activation_offload=0"):
        check_device(config(activation_offload=0.2), CPU)
    check_device(config(activation_offload=0.2), torch.device("cuda"))
    check_device(config(), CPU)


def test_a_frozen_branch_in_bf16_is_refused_on_a_gpu_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    with pytest.raises(MobiusError, match=r"frozen_dtype=bf16.*Tesla V100.*fp16 or fp32"):
        check_device(config(frozen_dtype="bf16"), torch.device("cuda"))
    check_device(config(frozen_dtype="fp16"), torch.device("cuda"))
    check_device(config(frozen_dtype="bf16"), CPU)


def test_the_frozen_branch_follows_the_mixed_precision_unless_told_otherwise() -> None:
    assert Dtypes.of(config(mixed_precision="bf16")).frozen == torch.bfloat16
    assert Dtypes.of(config()).frozen == torch.float32
    assert Dtypes.of(config(frozen_dtype="fp16")).frozen == torch.float16
    assert Dtypes.of(config(frozen_dtype="fp32", mixed_precision="bf16")).frozen == torch.float32


def test_the_ring_gets_its_treatments() -> None:
    parallel = model()
    apply_memory_options(parallel, config(gradient_checkpointing=True, activation_offload=0.34))
    layers = len(parallel.ring.treatments) - 2
    assert parallel.ring.treatments.count("offload") == round(0.34 * layers)
    assert parallel.ring.treatments.count("recompute") == 2 + layers - round(0.34 * layers)
    apply_memory_options(parallel, config())
    assert set(parallel.ring.treatments) == {"keep"}


def test_compilation_is_of_the_layers_of_the_ring() -> None:
    parallel = model()
    apply_memory_options(parallel, config(compile=True))
    compiled = {name for name, module in parallel.named_modules() if module._compiled_call_impl is not None}
    assert compiled
    assert all(name.startswith("ring.") for name in compiled)
    assert {name.split(".")[-2] for name in compiled} == {"ring", "temp_convs", "temp_attentions"}


@pytest.mark.parametrize("depth", [0, 1])
def test_compilation_of_the_frozen_branch_is_of_its_layers_in_front_of_the_fusion(depth: int) -> None:
    shape = {"fusion_depth": depth, "tail_temporal_layers": depth > 0}
    parallel = model(**shape)
    names = set(parallel.state_dict())
    digest = weights_hash(parallel)
    apply_memory_options(parallel, config(frozen_compile=True, **shape), "aot_eager")
    compiled = {name for name, module in parallel.named_modules() if module._compiled_call_impl is not None}
    assert all(name.startswith("spatial.") for name in compiled)
    kinds = {name.split(".")[-2] for name in compiled}
    assert kinds == {"resnets", "attentions", "downsamplers", "upsamplers"}
    last = f"spatial.up_blocks.{len(parallel.spatial.up_blocks) - 1}."
    assert any(name.startswith(last) for name in compiled) == (depth == 0)
    assert (set(parallel.state_dict()), weights_hash(parallel)) == (names, digest)
    assert all(module._compiled_call_impl is None for module in copy.deepcopy(parallel).modules())


def test_a_compiled_frozen_branch_gives_the_same_prediction() -> None:
    parallel = model(fusion_depth=2, tail_temporal_layers=True)
    batch = batch_for(parallel.spatial)
    expected = parallel.predict(*batch.given())
    apply_memory_options(parallel, config(frozen_compile=True), "eager")
    prediction = parallel.predict(*batch.given())
    torch.testing.assert_close(prediction, expected)
    prediction.square().mean().backward()
    assert all(p.grad is not None for p in parallel.ring.parameters())


TAIL = {"fusion_depth": 2, "tail_temporal_layers": True, "ring_width": 0.0}


@pytest.mark.parametrize("kind", ["unet", "sd3", "pixart"])
def test_frozen_weights_of_eight_bits_are_those_in_front_of_the_fusion(kind: str) -> None:
    parallel = model(**TAIL) if kind == "unet" else token_models.parallel_of(token_models.tiny_model(kind))
    batch = (batch_for if kind == "unet" else token_models.batch_for)(parallel.spatial)
    given = batch.given()
    with torch.no_grad():
        expected = parallel.predict(*given)
    store_frozen_weights(parallel, config())
    assert not any(parametrize.is_parametrized(module) for module in parallel.modules())
    whole = sum(p.nbytes for p in parallel.spatial.parameters())
    store_frozen_weights(parallel, config(frozen_int8=True))
    stored = [module for module in parallel.modules() if parametrize.is_parametrized(module)]
    behind = {inner for block in parallel.frozen_in_graph() for inner in block.modules()}
    assert stored
    assert not behind.intersection(stored)
    assert not set(parallel.ring.modules()).intersection(stored)
    assert sum(p.nbytes for p in parallel.spatial.parameters()) < whole
    prediction = parallel.predict(*given)
    # Other weights by one percent, so another prediction, but a near one.
    difference = (prediction - expected).norm() / expected.norm()
    assert 0 < difference < 0.05
    prediction.square().mean().backward()
    assert all(p.grad is not None for p in parallel.ring.parameters())
    apply_memory_options(parallel, config(frozen_compile=True), "eager")
    torch.testing.assert_close(parallel.predict(*given), prediction)


def test_feature_maps_in_channels_last_order_change_rounding_alone() -> None:
    parallel = model()
    batch = batch_for(parallel.spatial)
    digest = weights_hash(parallel)
    with torch.no_grad():
        expected = parallel.predict(*batch.given())
        set_memory_format(parallel, config())
        assert torch.equal(parallel.predict(*batch.given()), expected)
        set_memory_format(parallel, config(frozen_channels_last=True))
        feature = list(parallel.backbone.features(*own_frames(Split(None, 0), *batch.given())))[1]
        assert feature.convolution.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(parallel.predict(*batch.given()), expected)
    # So a checkpoint resumes with and without it.
    assert weights_hash(parallel) == digest
    assert parallel.ring.fusion.weight.is_contiguous()


def test_channels_last_order_is_refused_where_there_are_no_feature_maps() -> None:
    transformer = token_models.parallel_of(token_models.tiny_model("sd3"))
    with pytest.raises(MobiusError, match=r"frozen_channels_last.*SD3Transformer2DModel"):
        set_memory_format(transformer, config(frozen_channels_last=True))


@pytest.mark.parametrize("name", ["frozen_channels_last", "frozen_cuda_graphs"])
def test_options_of_a_cuda_gpu_are_refused_elsewhere(name: str) -> None:
    wanted = config(frozen_compile=True, **{name: True})
    with pytest.raises(MobiusError, match=rf"{name}=true is for a CUDA GPU.*on cpu"):
        check_device(wanted, CPU)
    check_device(wanted, torch.device("cuda"))
    check_device(without_gpu_options(wanted), CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", [{}, {"frozen_cuda_graphs": True}, {"frozen_channels_last": True}], ids=str)
def test_a_frozen_branch_for_speed_on_a_gpu(options: dict[str, bool]) -> None:
    parallel = model(fusion_depth=1, tail_temporal_layers=True).to("cuda")
    shapes = [batch_for(parallel.spatial, size=size).given() for size in ((8, 8), (16, 8))]
    shapes = [(a.cuda(), b.cuda(), c.to(torch.device("cuda"))) for a, b, c in shapes]
    expected = [parallel.predict(*given).detach() for given in shapes]
    wanted = config(frozen_compile=True, **options)
    set_memory_format(parallel, wanted)
    apply_memory_options(parallel, wanted)
    # A graph is recorded at the second call; features outlive the calls of later layers and of other shapes.
    for _ in range(4):
        predictions = [parallel.predict(*given) for given in shapes]
        for prediction, theirs in zip(predictions, expected, strict=True):
            torch.testing.assert_close(prediction, theirs, rtol=1e-2, atol=1e-2)
            prediction.square().mean().backward()


@pytest.mark.parametrize("mode", ["parallel", "serial"])
def test_what_attention_takes_is_said_with_the_reason(mode: str) -> None:
    lines = apply_attention_backend(model(mode), config(mode=mode, mixed_precision="bf16"), Machine(None, False))
    assert [line.partition(",")[0] for line in lines] == ["spatial attention: sdpa", "temporal attention: eager"]
    assert "CUDA GPU" in lines[0]


def test_each_branch_is_chosen_for_in_its_own_dtype() -> None:
    mixed = config(frozen_dtype="bf16")
    lines = apply_attention_backend(model(), mixed, Machine((9, 0), True))
    assert lines[0].startswith("spatial attention: flash_attn")
    assert lines[1].startswith("temporal attention: sdpa, no flash-attn: ")
    assert "float32" in lines[1]
    with pytest.raises(MobiusError, match="not float32"):
        apply_attention_backend(
            model(), config(frozen_dtype="bf16", attention_backend="flash_attn"), Machine((9, 0), True)
        )
