"""The part of a recipe that an engine needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MixedPrecision = Literal["no", "fp16", "bf16"]
OptimizerName = Literal["adamw", "adamw_8bit"]


@dataclass(frozen=True)
class EngineSettings:
    """Named as in the Hugging Face training scripts.

    Attributes:
        micro_batch_size: samples of one forward pass on one rank.
        max_grad_norm: 0 means no clipping.
        ema_decay: of the trained weights' moving average, reached after a warm-up.
    """

    micro_batch_size: int
    gradient_accumulation_steps: int
    mixed_precision: MixedPrecision
    optimizer: OptimizerName
    learning_rate: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    adam_weight_decay: float
    max_grad_norm: float
    seed: int
    use_ema: bool
    ema_decay: float


@dataclass(frozen=True)
class FsdpSettings:
    """How FSDP shards.

    Attributes:
        sharding: over all ranks, or over groups of ranks that hold the same.
        shard_size: ranks of a group, under hybrid; None: those of a node.
        cpu_offload: shards, their gradients and the optimizer's states stay in host memory.
        reshard_after_forward: let go of gathered weights behind the forward pass, and gather them again for backward.
        initial_scale_power: under fp16 losses are scaled by 2 to this at first.
    """

    sharding: Literal["full", "hybrid"] = "full"
    shard_size: int | None = None
    cpu_offload: bool = False
    reshard_after_forward: bool = True
    initial_scale_power: int = 16
