"""Supported keys of a DeepSpeed JSON, and the ZeRO stages at which they have an effect."""

from __future__ import annotations

TOP_LEVEL = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16",
    "fp16",
    "optimizer",
    "zero_optimization",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
)
BF16 = ("enabled", "check_grad_overflow")
FP16 = (
    "enabled",
    "loss_scale",
    "initial_scale_power",
    "loss_scale_window",
    "hysteresis",
    "consecutive_hysteresis",
    "min_loss_scale",
)
OPTIMIZER = ("type", "params")
ADAMW = ("lr", "betas", "eps", "weight_decay", "torch_adam")
OFFLOAD = ("device", "pin_memory")

# Keys of zero_optimization, and the stages at which they have an effect.
ZERO: dict[str, tuple[int, ...]] = {
    "stage": (0, 1, 2, 3),
    "reduce_bucket_size": (1, 2, 3),
    "allgather_bucket_size": (1, 2),
    "allgather_partitions": (1, 2),
    "round_robin_gradients": (1, 2),
    "ignore_unused_parameters": (1, 2),
    "reduce_scatter": (1, 2, 3),
    "overlap_comm": (1, 2, 3),
    "contiguous_gradients": (1, 2, 3),
    "offload_optimizer": (1, 2, 3),
    "offload_param": (3,),
    "sub_group_size": (3,),
    "stage3_prefetch_bucket_size": (3,),
    "stage3_param_persistence_threshold": (3,),
    "stage3_max_live_parameters": (3,),
    "stage3_max_reuse_distance": (3,),
    "stage3_module_granularity_threshold": (3,),
}
BUCKETS = ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size")

# Replacements for common keys that are not supported.
REMEDIES = {
    "scheduler": "remove it and use the recipe's lr_scheduler and lr_warmup_steps",
    "activation_checkpointing": "use the recipe's gradient_checkpointing",
    "tensorboard": "use the recipe's report_to",
    "amp": "use the recipe's mixed_precision",
    "zero_optimization.cpu_offload": "use zero_optimization.offload_optimizer",
    "zero_optimization.compute_grad_norm": "remove it, the guard against non-finite gradients needs it",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "remove it, final/ always has the full weights",
}
