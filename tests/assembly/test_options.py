"""The recipe's memory and speed options reach the model, or are refused where the device has no use for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from tiny import KINDS

from mobius_train.assembly.options import apply_attention_backend, apply_memory_options, check_device
from mobius_train.config import RunConfig
from mobius_train.dtypes import Dtypes
from mobius_train.errors import MobiusError
from mobius_train.models import build_denoiser
from mobius_train.models.choose_attention import Machine

CPU = torch.device("cpu")


def config(**changes: Any) -> RunConfig:
    return RunConfig.model_validate({"data": {"train": "x"}, "output_dir": "y", "max_train_steps": 1} | changes)


def model(mode: Any = "parallel") -> Any:
    unet = UNet2DConditionModel(sample_size=8, **KINDS["emoji"])
    return build_denoiser(unet, "text-to-video", mode)


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
