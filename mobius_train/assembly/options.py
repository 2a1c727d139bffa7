"""The recipe's memory and speed options, put into a model that is built; nothing in the model's code asks for them."""

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
    """What trained layers keep for the backward pass, and whether they are compiled.

    Args:
        compiler: backend of torch.compile; aot_eager saves what inductor does, and runs on fake tensors.
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


def check_device(config: RunConfig, device: torch.device) -> None:
    """Refuse options that are of no use on the device.

    Raises:
        MobiusError: names the option.
    """
    if config.activation_offload and device.type == "cpu":
        raise MobiusError(
            f"activation_offload={config.activation_offload} moves tensors from a GPU to host memory, but this run is"
            f" on {device.type}, where they lie in host memory already: set activation_offload=0"
        )
    # torch would emulate it, at no gain.
    if config.frozen_dtype == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise MobiusError(
            f"frozen_dtype=bf16, which {torch.cuda.get_device_name(device)} cannot compute in: use fp16 or fp32"
        )


def apply_attention_backend(denoiser: Denoiser, config: RunConfig, machine: Machine) -> list[str]:
    """Choose the kernels of spatial and temporal attention.

    Returns:
        A line for each, which says what was taken and why.

    Raises:
        MobiusError: flash_attn is asked for and cannot run.
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
