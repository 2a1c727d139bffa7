"""The run configuration: typed and validated, without unknown keys, and stored in the run's folder.

A configuration is a YAML file plus `key=value` overrides (`data.num_frames=16`, values parsed as YAML).
Field names follow the Hugging Face training scripts.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from mobius_train.config_sections import (
    Configuration,
    DataConfig,
    FsdpConfig,
    ObjectiveConfig,
    Section,
    TimeLimits,
    ValidationConfig,
)
from mobius_train.errors import MobiusError, without_secrets
from mobius_train.recipe_files import load_as, validated
from mobius_train.ring_shape import RingShape, ring_fields
from mobius_train.yaml_files import dump_yaml

Stage = Literal["autoencoder", "text-to-image", "text-to-video"]
Mode = Literal["parallel", "serial", "full"]
LearningRateSchedule = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
]
# Fields that apply only to models with a ring.
RING_OPTIONS = (
    "gradient_checkpointing_kept",
    "recompute_activations",
    "activation_offload",
    "compile",
    "activation_memory_budget",
    "frozen_dtype",
    "frozen_int8",
    "frozen_channels_last",
    "frozen_compile",
    "frozen_cuda_graphs",
    "frozen_ahead",
)


class RunConfig(Section):
    """A training run. Every field can be overridden on the command line as `key=value`."""

    stage: Stage = Field(
        "text-to-video", description="what is trained: an autoencoder, an image model, or temporal layers"
    )
    mode: Mode = Field("parallel", description="text-to-video: train the ring, serial temporal layers, or all weights")

    ring_width: float | None = Field(
        None,
        ge=0,
        description="the ring's channels over the backbone's; 0: no ring; default: 1, as in the paper. Other modes"
        " ignore this field and the next five",
    )
    fusion_depth: int | None = Field(
        None,
        ge=0,
        description="number of the backbone's last blocks behind the fusion; default: 0, as in the paper",
    )
    tail_temporal_layers: bool | None = Field(
        None, description="temporal layers inside the blocks behind the fusion; default: false, as in the paper"
    )
    trained_tail: bool | None = Field(
        None, description="train copies of the blocks behind the fusion too; default: false, as in the paper"
    )
    ring_every: int | None = Field(
        None,
        ge=1,
        description="transformers: a layer of the ring behind every so many blocks; default: 2. 1: behind every block",
    )
    context_latents: int | None = Field(
        None, ge=0, description="transformers: learned tokens beside the text that the ring attends to; default: 0"
    )

    pretrained_model_name_or_path: str | None = Field(
        None, description="model folder or hub name in diffusers layout: unet/, vae/, scheduler/, text encoder"
    )
    init_from: Path | None = Field(
        None,
        description="final/, checkpoint-<n> or folder of another run, or motion weights: the trained weights that a new"
        " run starts from; its optimizer and steps are new",
    )
    vae_name_or_path: str | None = Field(None, description="autoencoder to use instead of the pretrained model's")
    text_encoder_name_or_path: str | None = Field(
        None,
        description="text encoder to use instead: folder, hub name, or package:NAME for one in a Python package",
    )
    max_text_tokens: int | None = Field(
        None,
        ge=1,
        description="tokens per caption; default: the tokenizer's maximum. Stable Diffusion 3: those of T5; default:"
        " 256. A pipeline of PixArt or of a run: its own number",
    )
    text_encoder_dtype: Literal["fp32", "bf16"] = Field(
        "fp32", description="dtype of the text encoders; T5 of Stable Diffusion 3 takes 19 GB in fp32"
    )
    use_t5: bool | None = Field(
        None,
        description="Stable Diffusion 3: encode captions with T5 (text_encoder_3) too, or with zeros in its place;"
        " default: T5 if the model has it",
    )
    unet_config: Configuration | None = Field(
        None,
        description="configuration of a new image model: of a UNet2DConditionModel, or with _class_name of another",
    )
    vae_config: Configuration | None = Field(None, description="configuration of a new AutoencoderKL")
    scheduler_config: Configuration | None = Field(
        None,
        description="configuration of a DDPMScheduler, or with _class_name of a FlowMatchEulerDiscreteScheduler;"
        " default: the pretrained scheduler",
    )

    data: DataConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    validation: ValidationConfig = ValidationConfig()

    output_dir: Path = Field(description="folder of the run; {time} in it becomes the time of the start")
    seed: int = Field(0, description="seed of new weights, noise, timesteps and the order of the data")
    deterministic: bool = Field(False, description="bit-identical results on every run, on GPUs too, but slower")
    max_train_steps: int | None = Field(None, ge=1, description="optimizer steps; or set num_train_epochs")
    num_train_epochs: float | None = Field(
        None, gt=0, description="passes over the training clips, in place of max_train_steps; the steps are rounded up"
    )
    train_batch_size: int = Field(1, ge=1, description="clips per micro-batch and rank")
    gradient_accumulation_steps: int = Field(1, ge=1, description="micro-batches per optimizer step")
    global_batch_size: int | None = Field(
        None, ge=1, description="if set, must equal batch size x accumulation x ranks / sequence_parallel_size"
    )
    sequence_parallel_size: int = Field(
        1, ge=1, description="ranks that share every clip: the frozen branch by frames, the ring by positions"
    )
    sequence_overlap: bool = Field(
        True, description="exchange the next layer's features while the ring computes; one more is in memory"
    )
    sequence_across_nodes: bool = Field(
        False, description="allow ranks of several nodes to share a clip, over the network between them"
    )
    gradient_checkpointing: bool = Field(False, description="recompute the trained layers in the backward pass")
    gradient_checkpointing_kept: float = Field(
        0.0, ge=0, lt=1, description="share of the ring's layers that are not recomputed, cheapest first"
    )
    recompute_activations: bool = Field(
        False, description="recompute norms and activation functions of ring layers that are not recomputed as a whole"
    )
    activation_offload: float = Field(
        0.0, ge=0, le=1, description="share of the ring's layers whose saved tensors are moved to host memory (CUDA)"
    )
    compile: bool = Field(False, description="compile the ring's layers with torch.compile")
    activation_memory_budget: float | None = Field(
        None, ge=0, le=1, description="with compile: share of the saved tensors to keep; 0 recomputes all"
    )
    attention_backend: Literal["auto", "sdpa", "flash_attn", "eager"] = Field(
        "auto", description="auto: flash-attn if installed and supported, else the fastest measured backend"
    )
    frozen_dtype: Literal["fp32", "bf16", "fp16"] | None = Field(
        None, description="dtype of the frozen branch in mode parallel; default: as mixed_precision"
    )
    frozen_int8: bool = Field(
        False,
        description="store the weights of the frozen layers in front of the fusion in 8 bits, with a scale for each"
        " channel; changes them by one percent",
    )
    frozen_channels_last: bool = Field(
        False,
        description="keep the frozen UNet's feature maps in channels_last order (CUDA)",
    )
    frozen_compile: bool = Field(
        False, description="compile the frozen layers in front of the fusion with torch.compile, apart from the ring's"
    )
    frozen_cuda_graphs: bool = Field(
        False, description="with frozen_compile: launch each of these layers as one CUDA graph for each shape"
    )
    frozen_ahead: bool = Field(
        False,
        description="run the next micro-batch's frozen branch on a CUDA stream of its own, while the ring computes; its"
        " features are in memory",
    )
    mixed_precision: Literal["no", "fp16", "bf16"] = Field(
        "no", description="dtype of the trained branch while it computes; no: float32"
    )
    fsdp: FsdpConfig = FsdpConfig()
    shard_frozen: bool = Field(
        False, description="shard the frozen backbone and the text encoders over all ranks, gathering layer by layer"
    )
    optimizer: Literal["adamw", "adamw_8bit"] = Field("adamw", description="adamw_8bit requires bitsandbytes and a GPU")
    learning_rate: float = Field(1e-4, gt=0, description="of AdamW, at the schedule's highest point")
    scale_lr: bool = Field(False, description="multiply learning_rate by the samples of a step")
    lr_scheduler: LearningRateSchedule = Field(
        "constant", description="schedule of the learning rate; those of diffusers. constant has no warm-up"
    )
    lr_warmup_steps: int = Field(0, ge=0, description="steps in which the learning rate rises from 0")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW: decay of the gradients' mean")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW: decay of the squared gradients' mean")
    adam_weight_decay: float = Field(1e-2, ge=0, description="AdamW: weight decay")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW: added to the denominator")
    max_grad_norm: float = Field(1.0, ge=0, description="gradient norm to clip at; 0: no clipping")
    use_ema: bool = Field(False, description="keep a moving average of the trained weights; samples and final/ use it")
    ema_decay: float = Field(0.9999, gt=0, lt=1, description="decay of the moving average after its warm-up")
    max_skipped_steps: int = Field(10, ge=1, description="end the run after this many consecutive non-finite steps")

    checkpointing_steps: int | None = Field(
        None, ge=1, description="steps between checkpoints; default: only one at the end"
    )
    checkpoints_total_limit: int | None = Field(None, ge=1, description="newest checkpoints to keep; default: all")
    checkpoints_keep_every: int | None = Field(
        None, ge=1, description="always keep checkpoints at multiples of this many steps, beyond the limit"
    )
    resume_from_checkpoint: str | None = Field(
        None,
        description="latest, checkpoint-<n>, or auto: latest if there is one, else a new run; or the path of any run or"
        " checkpoint, which goes on in a new output_dir",
    )
    resume_with_changed_data: bool = Field(
        False, description="resume although the clips, the seed or the order of the samples are not the checkpoint's"
    )
    resume_with_changed_batch: bool = Field(
        False, description="resume with another number of samples per step; steps no longer mean what they did"
    )
    resume_with_changed_precision: bool = Field(
        False, description="resume with another mixed_precision or frozen_dtype; rounding and loss scale begin anew"
    )
    resume_with_changed_learning_rate: bool = Field(
        False, description="resume with another learning rate or schedule, which holds from this step on"
    )
    validation_steps: int | None = Field(None, ge=1, description="default: only before and after training")
    time_limits: TimeLimits = TimeLimits()
    report_to: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = Field(
        ("tensorboard",), description="trackers beside metrics.jsonl, one word or a list; []: none"
    )
    hub_model_id: str | None = Field(
        None, description="OWNER/NAME on the Hugging Face hub, where final/ is pushed; default: it is not pushed"
    )
    hub_private_repo: bool = Field(True, description="make a new repository on the hub private")
    license: str | None = Field(
        None, description="licence in the model's card, by its identifier on the hub (apache-2.0); default: not stated"
    )
    check_memory: bool = Field(
        True, description="plan the memory of a GPU; with several, refuse to start if it exceeds the free memory of one"
    )

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.stage != "text-to-video" and self.mode != "parallel":
            raise ValueError(f"mode={self.mode!r} requires stage=text-to-video, but stage is {self.stage!r}")
        if self.stage == "text-to-video" and self.data.num_frames < 2:
            raise ValueError("stage text-to-video requires data.num_frames of 2 or more")
        if self.data.random_frame and self.stage == "text-to-video":
            raise ValueError("data.random_frame selects single images, but stage is text-to-video: turn it off")
        frames = [bucket.num_frames for bucket in self.data.buckets or ()]
        if frames and self.stage == "text-to-video" and max(frames) < 2:
            raise ValueError("stage text-to-video requires a bucket in data.buckets with num_frames of 2 or more")
        if frames and self.stage == "text-to-image" and max(frames) > 1:
            raise ValueError("stage text-to-image trains on single frames: all data.buckets must have num_frames=1")
        if self.stage == "text-to-image" and not frames and not self.data.random_frame and self.data.num_frames != 1:
            raise ValueError("stage text-to-image requires data.num_frames=1 (first frames) or data.random_frame=true")
        if self.stage == "autoencoder" and self.shard_frozen:
            raise ValueError("shard_frozen=true shards frozen models, but stage autoencoder has none")
        if self.stage == "autoencoder" and self.data.cache_dir is not None:
            raise ValueError("data.cache_dir caches latents, but stage autoencoder trains the autoencoder: remove it")
        if self.stage == "autoencoder" and self.init_from is not None:
            raise ValueError(
                "init_from gives weights to a denoiser, but stage is 'autoencoder': set pretrained_model_name_or_path"
                " to the final/ instead"
            )
        if self.data.cache_required and self.data.cache_dir is None:
            raise ValueError("data.cache_required=true requires data.cache_dir: set it")
        if (self.max_train_steps is None) == (self.num_train_epochs is None):
            raise ValueError(
                "the length of the run must be set once: set max_train_steps or num_train_epochs, and the other to null"
            )
        if self.max_train_steps is not None and self.lr_warmup_steps >= self.max_train_steps:
            raise ValueError(
                f"lr_warmup_steps={self.lr_warmup_steps} must be less than max_train_steps={self.max_train_steps}"
            )
        return self

    @model_validator(mode="after")
    def _autoencoder_is_named_once(self) -> RunConfig:
        if self.stage == "autoencoder" and self.vae_name_or_path is not None:
            raise ValueError(
                "vae_name_or_path is of the other stages: an autoencoder is trained from vae_config, or from"
                " pretrained_model_name_or_path"
            )
        return self

    @model_validator(mode="after")
    def _memory_options_fit(self) -> RunConfig:
        for name in RING_OPTIONS:
            parallel = self.stage == "text-to-video" and self.mode == "parallel"
            if getattr(self, name) != RunConfig.model_fields[name].default and not parallel:
                raise ValueError(
                    f"{name} requires stage text-to-video with mode parallel, but these are {self.stage!r} and"
                    f" {self.mode!r}: remove it"
                )
        kept, offloaded = self.gradient_checkpointing_kept, self.activation_offload
        if kept and not self.gradient_checkpointing:
            raise ValueError(
                f"gradient_checkpointing_kept={kept} has no effect without gradient_checkpointing: set it to true"
            )
        if self.gradient_checkpointing and kept + offloaded > 1:
            raise ValueError(
                f"gradient_checkpointing_kept={kept} and activation_offload={offloaded} are shares of the same layers"
                " and add up to more than 1: lower one"
            )
        if self.activation_memory_budget is not None and not self.compile:
            raise ValueError(
                "activation_memory_budget requires compile=true: set it, or use recompute_activations instead"
            )
        if self.compile and self.recompute_activations:
            raise ValueError(
                "recompute_activations and compile both select the tensors that a layer saves: with compile=true, use"
                " activation_memory_budget instead"
            )
        if self.frozen_cuda_graphs and not self.frozen_compile:
            raise ValueError("frozen_cuda_graphs requires frozen_compile=true: set it")
        if self.frozen_cuda_graphs and self.frozen_ahead:
            raise ValueError(
                "frozen_cuda_graphs and frozen_ahead: a graph has one set of buffers, but samples and held-out losses"
                " run it while a micro-batch is ahead: turn one off"
            )
        for name in ("frozen_compile", "frozen_ahead", "frozen_int8"):
            if getattr(self, name) and self.shard_frozen:
                raise ValueError(f"{name} requires a frozen branch that is whole on each rank: set shard_frozen=false")
        spared = not self.gradient_checkpointing or kept
        for name in ("recompute_activations", "activation_memory_budget"):
            if getattr(self, name) not in (None, False) and not spared:
                raise ValueError(
                    f"{name} has no effect, because gradient_checkpointing recomputes all layers: turn one off, or"
                    " exempt some layers with gradient_checkpointing_kept"
                )
        return self

    @model_validator(mode="after")
    def _sequence_fits(self) -> RunConfig:
        size = self.sequence_parallel_size
        if size == 1:
            return self
        if self.stage != "text-to-video":
            raise ValueError(
                f"sequence_parallel_size={size} shares the frames of a clip between ranks, but stage is"
                f" {self.stage!r}: set it to 1"
            )
        if self.frozen_ahead:
            raise ValueError(
                f"sequence_parallel_size={size} shares the memory of a clip, and frozen_ahead=true holds a second one:"
                " turn one off"
            )
        if self.compile:
            raise ValueError(
                f"sequence_parallel_size={size} exchanges statistics inside of the ring's layers, and compile=true"
                " cannot compile across exchanges: turn one off"
            )
        fewest = min([bucket.num_frames for bucket in self.data.buckets or ()] or [self.data.num_frames])
        # Not of the batch: the last held-out batch and a sample can be a single clip.
        if fewest < size:
            raise ValueError(
                f"sequence_parallel_size={size}, but a clip has only {fewest} frame(s): each rank needs a frame"
            )
        return self

    @model_validator(mode="after")
    def _ring_fits(self) -> RunConfig:
        try:
            RingShape(**self.ring_fields())
        except MobiusError as error:
            raise ValueError(str(error)) from error
        return self

    def ring_fields(self) -> dict[str, Any]:
        """The fields of RingShape that the recipe sets."""
        return ring_fields(dict(self))

    @property
    def steps(self) -> int:
        """Optimizer steps of the run; known once `with_steps` has counted the clips."""
        assert self.max_train_steps is not None
        return self.max_train_steps

    def with_steps(self, clips: int, ranks: int, step: int = 0, samples_seen: int = 0) -> RunConfig:
        """Return the recipe with max_train_steps in place of num_train_epochs.

        Args:
            clips: number of training clips.
            step, samples_seen: what a resumed run has behind it, perhaps in steps of another size.

        Raises:
            MobiusError: these are too few steps for the recipe.
        """
        if self.num_train_epochs is None:
            return self
        samples = max(0, self.num_train_epochs * clips - samples_seen)
        steps = step + math.ceil(samples / self.samples_per_step(ranks))
        values = self.model_dump() | {"max_train_steps": steps, "num_train_epochs": None}
        return validated(RunConfig, values, f"num_train_epochs={self.num_train_epochs:g} of {clips} clips")

    def samples_per_step(self, ranks: int) -> int:
        """Return the global batch size: samples per optimizer step over all ranks."""
        return self.train_batch_size * self.gradient_accumulation_steps * (ranks // self.sequence_parallel_size)

    def dump(self) -> str:
        """Return the resolved configuration as YAML, which `load` can read."""
        return dump_yaml(self.model_dump(mode="json"))

    def public_values(self) -> dict[str, Any]:
        """Return all values as in `dump`, without the credentials in addresses, for pages that others read."""
        public: dict[str, Any] = _public(self.model_dump(mode="json"))
        return public


def _public(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _public(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_public(inner) for inner in value]
    return without_secrets(value) if isinstance(value, str) else value


def load(path: Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a training recipe; see `load_as`."""
    return load_as(RunConfig, path, overrides)
