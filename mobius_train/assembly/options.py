"""Apply the recipe's memory and speed options to a built model; the model's code does not read the recipe."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from mobius_train.config import RunConfig
from mobius_train.dtypes import Dtypes
from mobius_train.errors import MobiusError
from mobius_train.models import Denoiser
from mobius_train.models.attention import attention_layers, set_attention_backend
from mobius_train.models.choose_attention import Machine, choose_attention
from mobius_train.models.compiling import compile_layers
from mobius_train.models.recompute import LayerMemory


def apply_memory_options(denoiser: Denoiser, config: RunConfig, compiler: str = "inductor") -> None:
    """Set how trained layers store activations for the backward pass, and compile them if the recipe requires it.

    Args:
        compiler: backend of torch.compile; aot_eager saves the same tensors as inductor, and runs on fake tensors.
    """
    denoiser.set_memory(
        LayerMemory(
            gradient_checkpointing=config.gradient_checkpointing,
            gradient_checkpointing_kept=config.gradient_checkpointing_kept,
            recompute_activations=config.recompute_activations,
            activation_offload=config.activation_offload,
        )
    )
    if config.compile:
        compile_layers(denoiser.layers_to_compile(), config.activation_memory_budget, compiler)


def without_gpu_options(config: RunConfig) -> RunConfig:
    """The recipe without the options that depend on the run's GPUs and do not change weights."""
    return config.model_copy(update={"activation_offload": 0.0, "compile": False, "attention_backend": "sdpa"})


def check_device(config: RunConfig, device: torch.device) -> None:
    """Reject options that have no benefit on the device.

    Raises:
        MobiusError: the message names the option.
    """
    if config.activation_offload and device.type != "cuda":
        raise MobiusError(
            f"activation_offload={config.activation_offload} moves tensors from a GPU to host memory, but this run is"
            f" on {device.type}, where they are already in host memory: set activation_offload=0"
        )
    # torch would emulate it without any gain.
    if config.frozen_dtype == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise MobiusError(
            f"frozen_dtype=bf16 is not supported by {torch.cuda.get_device_name(device)}: use fp16 or fp32"
        )


def apply_attention_backend(denoiser: Denoiser, config: RunConfig, machine: Machine) -> list[str]:
    """Choose the kernels of spatial and temporal attention.

    Returns:
        One line for each, with the kernel and the reason.

    Raises:
        MobiusError: flash_attn is requested and cannot run.
    """
    model, dtypes, lines = cast(nn.Module, denoiser), Dtypes.of(config), []
    for temporal in (False, True):
        layers = attention_layers(model, temporal)
        if not layers:
            continue
        frozen = denoiser.frozen is not None and not temporal
        dtype = dtypes.frozen if frozen else dtypes.trained
        head_dim = max(layer.inner_dim // layer.heads for layer in layers)
        choice = choose_attention(config.attention_backend, machine, dtype, head_dim, temporal)
        set_attention_backend(model, choice.backend, temporal)
        lines.append(f"{'temporal' if temporal else 'spatial'} attention: {choice.backend}, {choice.reason}")
    return lines
