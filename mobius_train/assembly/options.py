"""Apply the recipe's memory and speed options to a built model; the model's code does not read the recipe."""

from __future__ import annotations

from typing import cast

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from mobius_train.config import RunConfig
from mobius_train.dtypes import Dtypes
from mobius_train.errors import MobiusError
from mobius_train.models import Denoiser
from mobius_train.models.attention import attention_layers, set_attention_backend
from mobius_train.models.choose_attention import Machine, choose_attention
from mobius_train.models.compiling import compile_layers
from mobius_train.models.int8 import store_in_int8
from mobius_train.models.recompute import LayerMemory

# Switches that depend on the run's GPUs and do not change weights.
FOR_GPUS = ("compile", "frozen_channels_last", "frozen_compile", "frozen_cuda_graphs", "frozen_ahead")


def apply_memory_options(denoiser: Denoiser, config: RunConfig, compiler: str = "inductor") -> None:
    """Set how trained layers store activations for the backward pass, and compile the layers that the recipe names.

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
    shapes = len(config.data.buckets or (None,))
    if config.compile:
        compile_layers(denoiser.layers_to_compile(), config.activation_memory_budget, compiler, shapes)
    if config.frozen_compile:
        layers, graphs = layers_without_graph(denoiser), config.frozen_cuda_graphs
        compile_layers(layers, None, compiler, shapes, cuda_graphs=graphs)


def layers_without_graph(denoiser: Denoiser) -> list[nn.Module]:
    """The frozen layers in front of the fusion, which run without an autograd graph in every call."""
    behind = {inner for block in denoiser.frozen_in_graph() for inner in block.modules()}
    return [module for unit in denoiser.backbone.units() for module in unit if module not in behind]


def store_frozen_weights(denoiser: Denoiser, config: RunConfig) -> None:
    """Store the frozen weights as the recipe says, once nothing needs the original ones any more."""
    if config.frozen_int8:
        store_in_int8(layers_without_graph(denoiser))


def set_memory_format(denoiser: Denoiser, config: RunConfig) -> None:
    """Set the order of the frozen branch's weights in memory, which its feature maps follow.

    Raises:
        MobiusError: the frozen branch has no feature maps.
    """
    if not config.frozen_channels_last:
        return
    frozen = cast(nn.Module, denoiser.frozen)
    if not isinstance(frozen, UNet2DConditionModel):
        raise MobiusError(
            f"frozen_channels_last is for feature maps, but a {type(frozen).__name__} computes on tokens: set it to"
            " false"
        )
    frozen.to(memory_format=torch.channels_last)


def without_gpu_options(config: RunConfig) -> RunConfig:
    """The recipe without the options that depend on the run's GPUs and do not change weights."""
    return config.model_copy(
        update={**dict.fromkeys(FOR_GPUS, False), "activation_offload": 0.0, "attention_backend": "sdpa"}
    )


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
    for name in ("frozen_channels_last", "frozen_cuda_graphs"):
        # On a CPU the backward pass of torch's group norm crashes on some feature maps in this order (torch 2.13).
        if getattr(config, name) and device.type not in ("cuda", "meta"):
            raise MobiusError(f"{name}=true is for a CUDA GPU, but this run is on {device.type}: set {name}=false")
    # torch would emulate it without any gain.
    for name, others in (("frozen_dtype", "fp16 or fp32"), ("text_encoder_dtype", "fp32")):
        if getattr(config, name) == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
            raise MobiusError(f"{name}=bf16 is not supported by {torch.cuda.get_device_name(device)}: use {others}")


def apply_attention_backend(denoiser: Denoiser, config: RunConfig, machine: Machine) -> list[str]:
    """Choose the kernels of spatial and temporal attention.

    Returns:
        One line for each, with the kernel and the reason.

    Raises:
        MobiusError: flash_attn is requested and cannot run.
    """
    dtypes, lines = Dtypes.of(config), []
    trained = denoiser.trained
    parts = [("spatial", trained, dtypes.trained, False), ("temporal", trained, dtypes.trained, True)]
    if denoiser.frozen is not None:
        parts[:1] = [
            ("spatial", denoiser.frozen, dtypes.frozen, False),
            ("trained spatial", trained, dtypes.trained, False),
        ]
    for name, model, dtype, temporal in parts:
        layers = attention_layers(model, temporal)
        if not layers:
            continue
        head_dim = max(layer.inner_dim // layer.heads for layer in layers)
        choice = choose_attention(config.attention_backend, machine, dtype, head_dim, temporal)
        set_attention_backend(model, choice.backend, temporal)
        lines.append(f"{name} attention: {choice.backend}, {choice.reason}")
    return lines
