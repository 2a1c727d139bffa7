"""The sections of the run configuration, and what all sections have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator


class Section(BaseModel):
    """A section of the configuration. It is immutable and rejects unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _of_words(cls, values: Any) -> Any:
        """Accept a single text for a list of texts: report_to=tensorboard."""
        if not isinstance(values, dict):
            return values
        listed = {name for name, field in cls.model_fields.items() if _is_list_of_texts(field.annotation)}
        return {name: (one,) if name in listed and isinstance(one, str) else one for name, one in values.items()}


def _is_list_of_texts(annotation: Any) -> bool:
    if get_origin(annotation) is tuple:
        element = get_args(annotation)[0]
        return element is str or get_origin(element) is Literal
    return any(_is_list_of_texts(one) for one in get_args(annotation))


def _with_switches(value: Any) -> Any:
    """Turn the words yes, no, on and off into switches, in values whose type is not known here."""
    if isinstance(value, dict):
        return {name: _with_switches(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_with_switches(inner) for inner in value]
    return SWITCHES.get(value.lower(), value) if isinstance(value, str) else value


SWITCHES = {"yes": True, "on": True, "no": False, "off": False}
# The configuration of a model, which the model's class checks.
Configuration = Annotated[dict[str, Any], BeforeValidator(_with_switches)]


class BucketConfig(Section):
    """A combination of frame count and size for training."""

    num_frames: int = Field(
        ge=1, description="frames per clip; 1: images, and the first frame of clips that fit no other bucket"
    )
    width: int = Field(ge=8, description="width in pixels")
    height: int = Field(ge=8, description="height in pixels")
    share: float | None = Field(
        None, gt=0, le=1, description="share of the batches; default: proportional to the number of clips"
    )


class ClipSet(Section):
    """A set of clips."""

    path: str = Field(description="folder or list of clips, or webdataset shards as a path, URL, glob or brace pattern")
    repeats: int = Field(1, ge=0, description="how often each clip comes in an epoch; 0: the set is left out")
    caption_prefix: str = Field("", description="trigger words in front of every caption, followed by a space")
    folder_captions: bool = Field(
        False, description="the caption of a clip that has none is the name of its folder, as in class folders"
    )
    subset: tuple[str, ...] | None = Field(
        None, min_length=1, description="use only the clips with these captions or keys; default: all clips"
    )


def _as_sets(value: Any) -> Any:
    """Accept a path for a set, and a set for a list of one."""
    if isinstance(value, str | dict | ClipSet):
        value = [value]
    if isinstance(value, list | tuple):
        return tuple({"path": one} if isinstance(one, str) else one for one in value)
    return value


def _as_written(sets: tuple[ClipSet, ...]) -> str | list[dict[str, Any]]:
    """A path alone as a text, as older versions wrote it."""
    if len(sets) == 1 and sets[0] == ClipSet(path=sets[0].path):
        return sets[0].path
    return [one.model_dump(mode="json", exclude_defaults=True) for one in sets]


Sets = Annotated[
    tuple[ClipSet, ...],
    BeforeValidator(_as_sets, json_schema_input_type=str | ClipSet | list[str | ClipSet]),
    PlainSerializer(_as_written),
]


class DataConfig(Section):
    """The training clips, and the frames, size and caption used of each."""

    train: Sets = Field(
        description="a set of clips: its path, or a section; several sets: a list of these. A path is of a folder or"
        " list of clips, or of webdataset shards, also as URL, glob or brace pattern"
    )
    subset: tuple[str, ...] | None = Field(
        None, min_length=1, description="train only on the clips with these captions or keys; default: all clips"
    )
    validation: Sets | None = Field(None, description="held-out clips, named like train; default: no held-out loss")
    download_dir: Path | None = Field(None, description="folder for downloaded shards; each URL is downloaded once")
    resolution: int = Field(256, ge=8, description="height and width in pixels")
    num_frames: int = Field(8, ge=1, description="frames per clip, evenly spaced; 1: the first frame")
    buckets: tuple[BucketConfig, ...] | None = Field(
        None, min_length=1, description="sizes that replace num_frames and resolution; each clip uses the best fit"
    )
    frame_rate: float | None = Field(
        None, gt=0, le=60, description="frames per second of the frames that are taken; default: those of the file"
    )
    frame_stride: int | None = Field(None, ge=1, description="take every so many frames; default: 1")
    frame_window: Literal["start", "random", "all"] | None = Field(
        None,
        description="part of a clip that num_frames frames are taken from: its first, a random one each time, or all"
        " that do not overlap; default: start with frame_rate or frame_stride, else the whole clip, evenly",
    )
    max_windows: int | None = Field(
        None, ge=1, description="frame_window=all: windows of a clip, at most, evenly spread over it; default: no limit"
    )
    random_frame: bool = Field(False, description="image stages: use a random one of a clip's num_frames each time")
    caption_language: str = Field("en", description="key of the caption in multilingual captions")
    cache_dir: Path | None = Field(None, description="folder for latents and text embeddings, which are computed once")
    cache_required: bool = Field(False, description="fail if cache_dir has no matching cache (tools/cache_latents.py)")
    dataloader_num_workers: int = Field(0, ge=0, description="data loading processes per rank; 0: none")

    @model_validator(mode="before")
    @classmethod
    def _of_version_0_1_0(cls, values: Any) -> Any:
        """Accept `allow_shell_commands: false`, which version 0.1.0 wrote to config.yaml."""
        if isinstance(values, dict) and values.get("allow_shell_commands") is False:
            return {name: value for name, value in values.items() if name != "allow_shell_commands"}
        return values

    @model_validator(mode="after")
    def _buckets_differ(self) -> DataConfig:
        shapes = [(bucket.num_frames, bucket.width, bucket.height) for bucket in self.buckets or ()]
        for shape in shapes:
            if shapes.count(shape) > 1:
                raise ValueError(f"two buckets have the size {'x'.join(map(str, shape))}: remove one")
        if self.buckets and self.random_frame:
            raise ValueError(
                "random_frame does not work with buckets: use buckets with num_frames=1 instead, or remove the buckets"
            )
        return self

    @model_validator(mode="after")
    def _sets_fit(self) -> DataConfig:
        for name, sets in (("train", self.train), ("validation", self.validation)):
            if sets is not None and not any(one.repeats for one in sets):
                raise ValueError(f"{name} has no set, or only sets with repeats=0: add a set, or raise repeats")
        if any(one.repeats > 1 for one in self.validation or ()):
            raise ValueError("repeats have no effect in validation, whose loss takes each clip once: remove them")
        if self.subset is not None and (len(self.train) > 1 or self.train[0].subset is not None):
            raise ValueError("subset is of a single set, but train has sections: give these a subset each instead")
        return self

    @model_validator(mode="after")
    def _windows_fit(self) -> DataConfig:
        if self.max_windows is not None and self.frame_window != "all":
            raise ValueError(f"max_windows={self.max_windows} has no effect without frame_window=all: set it")
        if self.frame_window == "random" and self.cache_dir is not None:
            raise ValueError(
                "frame_window=random takes other frames of a clip each time, but cache_dir keeps the same: use"
                " frame_window=all, which caches every window, or remove cache_dir"
            )
        return self


class ObjectiveConfig(Section):
    """The training loss."""

    prediction_type: Literal["epsilon", "v_prediction"] | None = Field(
        None, description="prediction target; default: that of the pretrained scheduler"
    )
    snr_gamma: float | None = Field(None, gt=0, description="gamma of min-SNR weighting (arXiv 2303.09556); usually 5")
    timestep_sampling: Literal["uniform", "later", "logit_normal"] = Field(
        "uniform", description="density of the training timesteps; later: more of the noisy ones, which decide motion"
    )
    timestep_bias_portion: float = Field(
        0.5, gt=0, lt=1, description="timestep_sampling=later: share of the timesteps that is drawn more often"
    )
    timestep_bias_multiplier: float = Field(
        3.0, gt=1, description="timestep_sampling=later: how many times as often as the other timesteps"
    )
    logit_mean: float = Field(0.0, description="timestep_sampling=logit_normal: above 0 draws more noisy timesteps")
    logit_std: float = Field(1.0, gt=0, description="timestep_sampling=logit_normal: width of the density")
    flow_shift: float | None = Field(
        None, gt=0, description="flow matching: above 1 draws more noisy timesteps; default: the scheduler's shift"
    )
    noise_offset: float = Field(0.0, ge=0, description="scale of additional noise that is constant within a channel")
    frame_noise_correlation: float = Field(
        0.0, ge=0, le=1, description="share of the noise variance that is common to all frames of a clip"
    )
    caption_dropout: float = Field(0.1, ge=0, le=1, description="probability of an empty caption, for guidance")
    rescale_betas_zero_snr: bool = Field(False, description="rescale betas to zero terminal SNR (arXiv 2305.08891)")
    kl_weight: float = Field(1e-4, ge=0, description="stage autoencoder: weight of the KL term")


class ValidationConfig(Section):
    """The held-out loss and the samples, computed every `validation_steps` and at the end."""

    prompts: tuple[str, ...] = Field((), description="captions of the samples; none: no samples")
    negative_prompt: str = Field("", description="what guidance leads away from")
    num_inference_steps: int = Field(30, ge=1, description="denoising steps of a sample")
    guidance_scale: float = Field(7.5, ge=1, description="classifier-free guidance of the samples; 1: none")
    seed: int = Field(0, description="seed of the samples' noise")
    max_clips: int = Field(64, ge=1, description="maximum number of held-out clips for the loss")
    timestep_quantiles: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field(
        (0.1, 0.3, 0.5, 0.7, 0.9),
        min_length=1,
        description="timesteps of the held-out loss, as fractions of the schedule",
    )


class FsdpConfig(Section):
    """Sharding of the trained module with `--engine fsdp`."""

    sharding: Literal["full", "hybrid"] = Field("full", description="shard over all ranks, or within groups")
    shard_size: int | None = Field(None, ge=2, description="hybrid: ranks per group; default: ranks per node")
    cpu_offload: bool = Field(False, description="keep weights, gradients and optimizer states in host memory")
    reshard_after_forward: bool = Field(True, description="free a layer's weights between forward and backward pass")
    initial_scale_power: int = Field(16, ge=0, le=32, description="fp16: log2 of the initial loss scale")


class TimeLimits(Section):
    """Seconds after which a rank that makes no progress ends the job, with the stacks of all ranks."""

    start: float = Field(7200, gt=0, description="checks, loading of models and data, resuming")
    clip: float = Field(900, gt=0, description="encoding of one clip for data.cache_dir")
    batch: float = Field(900, gt=0, description="the loader's next batch")
    step: float = Field(1800, gt=0, description="forward and backward pass and optimizer step, with compilation")
    validation: float = Field(7200, gt=0, description="held-out loss and samples")
    save: float = Field(1800, gt=0, description="writing of one checkpoint")
    export: float = Field(3600, gt=0, description="writing of final/")
