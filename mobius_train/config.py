"""The run configuration: typed, validated, unknown keys refused, written beside the run.

A configuration is a YAML file plus `key=value` overrides (`data.num_frames=16`, values parsed as YAML).
Field names follow the Hugging Face training scripts.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mobius_train.errors import MobiusError

Stage = Literal["autoencoder", "text-to-image", "text-to-video"]
Mode = Literal["parallel", "serial", "full"]
LearningRateSchedule = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
]
# Fields that only a model with a ring has a use for.
RING_OPTIONS = (
    "gradient_checkpointing_kept",
    "recompute_activations",
    "activation_offload",
    "compile",
    "activation_memory_budget",
    "frozen_dtype",
)


class Section(BaseModel):
    """A part of the configuration: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


Recipe = TypeVar("Recipe", bound=Section)


class BucketConfig(Section):
    """A number of frames and a size that clips are trained at."""

    num_frames: int = Field(ge=1, description="1: for pictures, and the first frame of clips that fit no other")
    width: int = Field(ge=8, description="pixels")
    height: int = Field(ge=8, description="pixels")
    share: float | None = Field(None, gt=0, le=1, description="of the batches; none: by its number of clips")


class DataConfig(Section):
    """Where clips come from and what is taken from each of them."""

    train: str = Field(description="folder of clips, or webdataset shards as a path, glob or brace pattern")
    validation: str | None = Field(None, description="held-out clips; none: no held-out loss")
    download_dir: Path | None = Field(None, description="folder for shards named by URL, each of which is fetched once")
    resolution: int = Field(256, ge=8, description="pixels, height and width")
    num_frames: int = Field(8, ge=1, description="frames evenly over the clip; 1: its first frame")
    buckets: tuple[BucketConfig, ...] | None = Field(
        None, min_length=1, description="each clip is trained in the one that fits it, not at num_frames and resolution"
    )
    random_frame: bool = Field(False, description="stages on images: any of a clip's num_frames, drawn anew")
    caption_language: str = Field("en", description="key of a multilingual caption")
    cache_dir: Path | None = Field(None, description="latents and text embeddings are computed once, here")
    cache_required: bool = Field(False, description="train on a cache that is there (tools/cache_latents.py), or fail")
    dataloader_num_workers: int = Field(0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _of_version_0_1_0(cls, values: Any) -> Any:
        """Its runs wrote allow_shell_commands: false into their config.yaml, which must stay readable."""
        if isinstance(values, dict) and values.get("allow_shell_commands") is False:
            return {name: value for name, value in values.items() if name != "allow_shell_commands"}
        return values

    @model_validator(mode="after")
    def _buckets_differ(self) -> DataConfig:
        shapes = [(bucket.num_frames, bucket.width, bucket.height) for bucket in self.buckets or ()]
        for shape in shapes:
            if shapes.count(shape) > 1:
                raise ValueError(f"two buckets are {'x'.join(map(str, shape))}: keep one")
        if self.buckets and self.random_frame:
            raise ValueError("random_frame draws from clips of one num_frames: use buckets of num_frames=1, or none")
        return self


class ObjectiveConfig(Section):
    """What the loss is."""

    prediction_type: Literal["epsilon", "v_prediction"] | None = Field(
        None, description="none: what the pretrained scheduler says"
    )
    snr_gamma: float | None = Field(None, gt=0, description="min-SNR weighting (arXiv 2303.09556); 5 is usual")
    noise_offset: float = Field(0.0, ge=0, description="per-channel constant noise added, scaled by this")
    frame_noise_correlation: float = Field(
        0.0, ge=0, le=1, description="share of the noise's variance that a clip's frames have in common"
    )
    caption_dropout: float = Field(0.1, ge=0, le=1, description="probability that a caption is emptied, for guidance")
    rescale_betas_zero_snr: bool = Field(False, description="zero terminal SNR (arXiv 2305.08891)")
    kl_weight: float = Field(1e-4, ge=0, description="autoencoder: weight of the KL term")


class ValidationConfig(Section):
    """The held-out loss and the samples that are made every `validation_steps` and at the end."""

    prompts: tuple[str, ...] = ()
    negative_prompt: str = ""
    num_inference_steps: int = Field(30, ge=1)
    guidance_scale: float = Field(7.5, ge=1)
    seed: int = 0
    max_clips: int = Field(64, ge=1, description="held-out clips that the loss is measured on")
    timestep_quantiles: tuple[float, ...] = Field(
        (0.1, 0.3, 0.5, 0.7, 0.9), description="timesteps of the held-out loss, as shares of the schedule"
    )


class FsdpConfig(Section):
    """How `--engine fsdp` shards what is trained."""

    sharding: Literal["full", "hybrid"] = Field("full", description="over all ranks, or within groups of them")
    shard_size: int | None = Field(None, ge=2, description="ranks of a group under hybrid; none: those of a node")
    cpu_offload: bool = Field(False, description="weights, gradients and optimizer states in host memory")
    reshard_after_forward: bool = Field(True, description="gather a layer's weights again for the backward pass")
    initial_scale_power: int = Field(16, ge=0, le=32, description="fp16: losses are scaled by 2 to this at first")


class RunConfig(Section):
    """One training run. Every field can be overridden on the command line as `key=value`."""

    stage: Stage = "text-to-video"
    mode: Mode = Field("parallel", description="of text-to-video: the ring, serial layers, or all weights")

    pretrained_model_name_or_path: str | None = Field(
        None, description="folder or hub name in diffusers layout: unet/, vae/, scheduler/ (and text encoder)"
    )
    vae_name_or_path: str | None = Field(None, description="another autoencoder")
    text_encoder_name_or_path: str | None = Field(
        None,
        description="another text encoder: folder, hub name, or package:NAME for one inside a Python package",
    )
    max_text_tokens: int | None = Field(None, ge=1, description="none: the tokenizer's own maximum")
    unet_config: dict[str, Any] | None = Field(None, description="train a new UNet2DConditionModel like this")
    vae_config: dict[str, Any] | None = Field(None, description="train a new AutoencoderKL like this")
    scheduler_config: dict[str, Any] | None = Field(
        None, description="DDPMScheduler of a new model; none: the pretrained one's"
    )

    data: DataConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    validation: ValidationConfig = ValidationConfig()

    output_dir: Path
    seed: int = 0
    deterministic: bool = Field(False, description="the same bits on every run on GPUs too, at some cost in speed")
    max_train_steps: int = Field(ge=1, description="optimizer steps")
    train_batch_size: int = Field(1, ge=1, description="clips of a micro-batch on one GPU")
    gradient_accumulation_steps: int = Field(1, ge=1)
    global_batch_size: int | None = Field(
        None, ge=1, description="when given, must equal batch size x accumulation x ranks"
    )
    gradient_checkpointing: bool = Field(False, description="recompute the trained layers in the backward pass")
    gradient_checkpointing_kept: float = Field(
        0.0, ge=0, lt=1, description="share of the ring's layers that gradient_checkpointing spares, the cheapest first"
    )
    recompute_activations: bool = Field(
        False, description="where the ring's layers are not recomputed, recompute their norms and activations alone"
    )
    activation_offload: float = Field(
        0.0, ge=0, le=1, description="share of the ring's layers whose saved tensors wait in host memory (CUDA)"
    )
    compile: bool = Field(False, description="torch.compile the ring's layers")
    activation_memory_budget: float | None = Field(
        None, ge=0, le=1, description="with compile: share of what its layers would save; 0 recomputes all"
    )
    attention_backend: Literal["auto", "sdpa", "flash_attn", "eager"] = Field(
        "auto", description="auto: flash-attn where it is installed and can run, else what was measured fastest"
    )
    frozen_dtype: Literal["fp32", "bf16", "fp16"] | None = Field(
        None, description="of the frozen branch of mode parallel; none: as mixed_precision"
    )
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    fsdp: FsdpConfig = FsdpConfig()
    shard_frozen: bool = Field(
        False, description="frozen UNet and text encoder sharded over all ranks, gathered layer by layer"
    )
    optimizer: Literal["adamw", "adamw_8bit"] = Field("adamw", description="adamw_8bit: of bitsandbytes, on GPUs")
    learning_rate: float = Field(1e-4, gt=0)
    scale_lr: bool = Field(False, description="times accumulation x batch x ranks")
    lr_scheduler: LearningRateSchedule = "constant"
    lr_warmup_steps: int = Field(0, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_weight_decay: float = Field(1e-2, ge=0)
    adam_epsilon: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, ge=0, description="0: no clipping")
    use_ema: bool = False
    ema_decay: float = Field(0.9999, gt=0, lt=1)
    max_skipped_steps: int = Field(10, ge=1, description="stop after so many non-finite steps in a row")

    checkpointing_steps: int | None = Field(None, ge=1)
    checkpoints_total_limit: int | None = Field(None, ge=1, description="keep the newest; none: all")
    checkpoints_keep_every: int | None = Field(
        None, ge=1, description="checkpoints at multiples of so many steps are kept for ever, beyond the limit"
    )
    resume_from_checkpoint: str | None = Field(
        None, description="latest, checkpoint-<n>, or auto: latest if there is any"
    )
    validation_steps: int | None = Field(None, ge=1, description="none: before and after only")
    report_to: tuple[Literal["tensorboard"], ...] = ("tensorboard",)
    check_memory: bool = Field(
        True, description="on several GPUs, refuse to start where the memory planned exceeds what one has free"
    )

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.stage != "text-to-video" and self.mode != "parallel":
            raise ValueError(f"mode {self.mode!r} belongs to stage text-to-video, but stage is {self.stage!r}")
        if self.stage == "text-to-video" and self.data.num_frames < 2:
            raise ValueError("stage text-to-video needs data.num_frames of 2 or more")
        if self.data.random_frame and self.stage == "text-to-video":
            raise ValueError("data.random_frame makes single images, but stage is 'text-to-video'")
        frames = [bucket.num_frames for bucket in self.data.buckets or ()]
        if frames and self.stage == "text-to-video" and max(frames) < 2:
            raise ValueError("stage text-to-video needs one of data.buckets with num_frames of 2 or more")
        if frames and self.stage == "text-to-image" and max(frames) > 1:
            raise ValueError("stage text-to-image trains on single frames: data.buckets must all have num_frames=1")
        if self.stage == "text-to-image" and not frames and not self.data.random_frame and self.data.num_frames != 1:
            raise ValueError("stage text-to-image needs data.num_frames=1 (first frames) or data.random_frame=true")
        if self.stage == "autoencoder" and self.shard_frozen:
            raise ValueError("shard_frozen shards frozen models, and stage autoencoder has none")
        if self.stage == "autoencoder" and self.data.cache_dir is not None:
            raise ValueError("data.cache_dir caches what the autoencoder computes: stage autoencoder trains it")
        if self.data.cache_required and self.data.cache_dir is None:
            raise ValueError("data.cache_required wants a data.cache_dir")
        if self.lr_warmup_steps >= self.max_train_steps:
            raise ValueError(
                f"lr_warmup_steps={self.lr_warmup_steps} leaves nothing of max_train_steps={self.max_train_steps}"
            )
        return self

    @model_validator(mode="after")
    def _memory_options_fit(self) -> RunConfig:
        for name in RING_OPTIONS:
            parallel = self.stage == "text-to-video" and self.mode == "parallel"
            if getattr(self, name) != RunConfig.model_fields[name].default and not parallel:
                raise ValueError(
                    f"{name} belongs to stage text-to-video with mode parallel, but these are {self.stage!r} and"
                    f" {self.mode!r}: leave it out"
                )
        kept, offloaded = self.gradient_checkpointing_kept, self.activation_offload
        if kept and not self.gradient_checkpointing:
            raise ValueError(
                f"gradient_checkpointing_kept={kept} spares layers of gradient_checkpointing, which is off: turn it on"
            )
        if self.gradient_checkpointing and kept + offloaded > 1:
            raise ValueError(
                f"gradient_checkpointing_kept={kept} and activation_offload={offloaded} are shares of the same layers,"
                " and make more than 1 together: lower one"
            )
        if self.activation_memory_budget is not None and not self.compile:
            raise ValueError(
                "activation_memory_budget is the compiler's: set compile=true, or use recompute_activations without it"
            )
        if self.compile and self.recompute_activations:
            raise ValueError(
                "recompute_activations and compile both choose what a layer saves: with compile, use"
                " activation_memory_budget"
            )
        spared = not self.gradient_checkpointing or kept
        for name in ("recompute_activations", "activation_memory_budget"):
            if getattr(self, name) not in (None, False) and not spared:
                raise ValueError(
                    f"{name} is of no use where gradient_checkpointing recomputes whole layers: turn one off, or spare"
                    " some layers with gradient_checkpointing_kept"
                )
        return self

    def samples_per_step(self, ranks: int) -> int:
        """Samples of one optimizer step over so many ranks: the global batch size."""
        return self.train_batch_size * self.gradient_accumulation_steps * ranks

    def dump(self) -> str:
        """The resolved configuration as YAML that `load` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load(path: Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a training recipe, as `load_as` does."""
    return load_as(RunConfig, path, overrides)


def load_as(kind: type[Recipe], path: Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe of this kind and apply `key=value` overrides.

    Raises:
        MobiusError: the file is missing or no YAML mapping, a key is unknown, a value does not fit.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MobiusError(f"cannot read the recipe {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MobiusError(f"the recipe {path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise MobiusError(f"the recipe {path} must be a mapping of keys to values")
    for override in overrides:
        _apply(values, override)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = "\n".join(f"  - {_explain(problem, kind)}" for problem in error.errors())
        raise MobiusError(f"the configuration ({path}{_listed(overrides)}) is not valid:\n{problems}") from error


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise MobiusError(f"cannot read the override {override!r}: write key=value, for example seed=1")
    *sections, name = key.split(".")
    target: Any = values
    try:
        for section in sections:
            target = target[_place(target, section)] if isinstance(target, list) else target.setdefault(section, {})
        # YAML 1.1 reads 1e-4 as a string; people mean the number.
        value = yaml.safe_load(text)
        target[_place(target, name)] = _number(value) if isinstance(value, str) else value
    except yaml.YAMLError as error:
        raise MobiusError(f"override {override!r}: the value is not YAML") from error
    except (AttributeError, TypeError, ValueError, IndexError) as error:
        raise MobiusError(f"override {override!r}: the recipe has no such place") from error


def _place(target: Any, name: str) -> Any:
    """A key of a section, or the number of a list's item."""
    return int(name) if isinstance(target, list) else name


def _number(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def _listed(overrides: list[str] | tuple[str, ...]) -> str:
    return f" with {' '.join(overrides)}" if overrides else ""


def _explain(problem: Any, kind: type[Section]) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(problem["loc"][-1]), _fields(kind, problem["loc"][:-1]), n=1)
        return f"{where}: no such key" + (f"; did you mean {near[0]}?" if near else "")
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {message} (got {problem['input']!r})" if where else message


def _fields(kind: type[Section], location: tuple[Any, ...]) -> list[str]:
    """Field names of the section there; in a list of tagged sections the tag is followed by none, and [] is told."""
    section: Any = kind
    for part in location:
        if part not in getattr(section, "model_fields", {}):
            return []
        annotation = section.model_fields[part].annotation
        section = next((a for a in (annotation, *get_args(annotation)) if isinstance(a, type)), annotation)
    return list(getattr(section, "model_fields", []))
