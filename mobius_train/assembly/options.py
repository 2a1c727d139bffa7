"""The recipe's memory and speed options, put into a model that is built; nothing in the model's code asks for them."""

from __future__ import annotations

from typing import Any

import torch

from mobius_train.config import RunConfig
from mobius_train.errors import MobiusError
from mobius_train.models import Denoiser, ParallelUNet
from mobius_train.models.attention import attention_layers, set_attention_backend
from mobius_train.models.choose_attention import Machine, choose_attention
from mobius_train.models.compiling import compile_layers
from mobius_train.models.recompute import RingMemory

DTYPES = {"no": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def frozen_dtype(config: RunConfig) -> torch.dtype:
    """Of the frozen branch."""
    return DTYPES[config.frozen_dtype or config.mixed_precision]


def apply_memory_options(denoiser: Denoiser, config: RunConfig, compiler: str = "inductor") -> None:
    """What the ring's layers keep for the backward pass, and whether they are compiled.

    Args:
        compiler: backend of torch.compile; aot_eager saves what inductor does, and runs on fake tensors.
    """
    if not isinstance(denoiser, ParallelUNet):
        return
    denoiser.ring.set_memory(
        RingMemory(
            gradient_checkpointing=config.gradient_checkpointing,
            gradient_checkpointing_kept=config.gradient_checkpointing_kept,
            recompute_activations=config.recompute_activations,
            activation_offload=config.activation_offload,
        )
    )
    if config.compile:
        compile_layers(denoiser.ring, config.activation_memory_budget, compiler)


def check_device(config: RunConfig, device: torch.device) -> None:
    """Refuse options that are of no use on the device.

    Raises:
        MobiusError: names the option.
    """
    if config.activation_offload and device.type != "cuda":
        raise MobiusError(
            f"activation_offload={config.activation_offload} moves tensors from a GPU to host memory, but this run is"
            f" on {device.type}, where they lie in host memory already: set activation_offload=0"
        )
    # torch would emulate it, at no gain.
    if config.frozen_dtype == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise MobiusError(
            f"frozen_dtype=bf16, which {torch.cuda.get_device_name(device)} cannot compute in: use fp16 or fp32"
        )


def apply_attention_backend(denoiser: Any, config: RunConfig, machine: Machine) -> list[str]:
    """Choose the kernels of spatial and temporal attention.

    Returns:
        A line for each, which says what was taken and why.

    Raises:
        MobiusError: flash_attn is asked for and cannot run.
    """
    lines = []
    for temporal in (False, True):
        layers = attention_layers(denoiser, temporal)
        if not layers:
            continue
        frozen = isinstance(denoiser, ParallelUNet) and not temporal
        dtype = frozen_dtype(config) if frozen else DTYPES[config.mixed_precision]
        head_dim = max(layer.inner_dim // layer.heads for layer in layers)
        choice = choose_attention(config.attention_backend, machine, dtype, head_dim, temporal)
        set_attention_backend(denoiser, choice.backend, temporal)
        lines.append(f"{'temporal' if temporal else 'spatial'} attention: {choice.backend}, {choice.reason}")
    return lines
