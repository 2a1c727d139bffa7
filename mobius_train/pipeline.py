"""The trained text-to-video models as a diffusers pipeline.

Do not move this module: converted folders contain a pipeline.py that imports TextToVideoPipeline from
`mobius_train.pipeline`.

Legend: B prompts, C latent channels, F frames, h, w latent size, H, W pixels; L text tokens, D their width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mobius_train.bars import progress
from mobius_train.conditions import Conditions
from mobius_train.devices import usable_device
from mobius_train.diffusion.sampler import (
    denoise_latents,
    guided_prediction,
    initial_noise,
    is_flow,
    prompt_generator,
    sampling_scheduler,
)
from mobius_train.encoders.fit import check_latents, check_side, check_text
from mobius_train.encoders.image_encoder import ImageEncoder, LatentSpace
from mobius_train.encoders.load_text_encoding import load_text_encoding, make_text_encoding
from mobius_train.encoders.text_encoding import TextEncoding, components_of
from mobius_train.errors import MobiusError
from mobius_train.models.families import as_denoiser, family_of, is_video_model, video_models
from mobius_train.models.motion_weights import MOTION, place_of, read_motion
from mobius_train.pretrained.model_files import class_name, read_json
from mobius_train.pretrained.pipeline_index import INDEX
from mobius_train.pretrained.strict_load import find_model, load_diffusers, load_object
from mobius_train.run_files import FINAL

SCHEDULER = DDIMScheduler.config_name
OUTPUT_TYPES = ("np", "pil", "pt", "uint8", "latent")


@dataclass
class TextToVideoPipelineOutput(BaseOutput):
    """frames, by output_type: np (B, F, H, W, 3) in [0, 1]; pt (B, F, 3, H, W) in [0, 1]; pil, a list of B
    lists of F images; uint8 (B, F, 3, H, W); latent (B, C, F, h, w)."""

    frames: Tensor | np.ndarray | list[list[Image.Image]]


def convert_frames(frames: Tensor, output_type: str) -> Any:
    """Convert uint8 (B, F, 3, H, W) to the output_type, see TextToVideoPipelineOutput."""
    if output_type == "uint8":
        return frames
    if output_type == "pt":
        return frames.float() / 255
    channels_last = frames.movedim(2, -1).contiguous().numpy()
    if output_type == "np":
        return channels_last.astype(np.float32) / 255
    return [[Image.fromarray(frame) for frame in clip] for clip in channels_last]


@dataclass(frozen=True)
class EncodedPrompts:
    """The conditions of prompts, and of the negative prompt for classifier-free guidance."""

    prompts: Sequence[Conditions]
    negative: Conditions | None

    @classmethod
    def of(cls, text: TextEncoding, prompts: Sequence[str], negative: str | None) -> EncodedPrompts:
        """
        Args:
            negative: None without guidance.
        """
        return cls(list(map(text.encode, prompts)), None if negative is None else text.encode(negative))

    @property
    def device(self) -> torch.device:
        return next(iter(self.prompts[0].tensors.values())).device

    def to(self, device: torch.device) -> EncodedPrompts:
        """On another device."""
        negative = None if self.negative is None else self.negative.to(device)
        return EncodedPrompts([prompt.to(device) for prompt in self.prompts], negative)


# What motion weights may name.
MOTION_SCHEDULERS: dict[str, Any] = {kind.__name__: kind for kind in (DDIMScheduler, FlowMatchEulerDiscreteScheduler)}
MOTION_SETTINGS = ("max_text_tokens", "num_frames", "resolution", "guidance_scale", "frame_noise_correlation")


class TextToVideoPipeline(DiffusionPipeline):
    """Samples clips from prompts. Saving and loading work as for any diffusers pipeline.

    Args:
        unet: a video model (ParallelUNet, SerialUNet, or those of a transformer), or an image model for stills. It has
            this name for every kind of model.
        scheduler: a diffusers scheduler with the trained noise schedule; see `sampling_scheduler`.
        text_encoder_2, tokenizer_2: the second text encoder of Stable Diffusion XL and 3.
        text_encoder_3, tokenizer_3: T5 of Stable Diffusion 3, which can do without.
        max_text_tokens: number of tokens that prompts are padded and truncated to, as captions in training.
        num_frames: default number of frames per clip.
        resolution: default height and width in pixels; None uses the UNet's sample_size, which may be a pair.
        guidance_scale: default guidance scale.
        frame_noise_correlation: correlation of the initial noise between frames, as in training.
    """

    _optional_components: ClassVar = ["text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"]

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        unet: nn.Module,
        scheduler: SchedulerMixin,
        max_text_tokens: int | None = None,
        num_frames: int = 8,
        resolution: int | None = None,
        guidance_scale: float = 7.5,
        frame_noise_correlation: float = 0.0,
        text_encoder_2: PreTrainedModel | None = None,
        tokenizer_2: PreTrainedTokenizerBase | None = None,
        text_encoder_3: PreTrainedModel | None = None,
        tokenizer_3: PreTrainedTokenizerBase | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            text_encoder_3=text_encoder_3,
            tokenizer_3=tokenizer_3,
            unet=unet,
            scheduler=sampling_scheduler(scheduler),
        )
        self.register_to_config(
            max_text_tokens=max_text_tokens,
            num_frames=num_frames,
            resolution=resolution,
            guidance_scale=guidance_scale,
            frame_noise_correlation=frame_noise_correlation,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> TextToVideoPipeline:
        """Load a folder that `save_pretrained` wrote; options as for DiffusionPipeline.from_pretrained.

        The parts are in float32, and every weight of theirs must be in the files.

        Raises:
            MobiusError: a part is missing, damaged or of another kind; names the file.
        """
        folder = Path(pretrained_model_name_or_path)
        settings = read_json(folder / INDEX)
        schedule = find_model(folder, "scheduler", SCHEDULER)
        kind = class_name(folder / "unet")
        video_model: Any = video_models().get(kind)
        if video_model is None:
            unet = load_diffusers(family_of(kind).image_model, folder / "unet")
        else:
            unet = video_model.from_pretrained(folder / "unet")
        denoiser, vae = as_denoiser(unet), load_diffusers(AutoencoderKL, folder / "vae")
        check_latents(denoiser, vae.config)
        wanted = denoiser.backbone.condition_widths
        text = load_text_encoding(str(folder), torch.device("cpu"), settings.get("max_text_tokens"), wanted)
        check_text(denoiser, text, str(folder))
        parts: dict[str, Any] = {
            "vae": vae,
            **components_of(text),
            "unet": unet,
            "scheduler": load_object(
                FlowMatchEulerDiscreteScheduler if is_flow(read_json(schedule.folder / SCHEDULER)) else DDIMScheduler,
                schedule,
            ),
        }
        dtype = options.pop("torch_dtype", None)
        try:
            loaded: TextToVideoPipeline = super().from_pretrained(str(folder), **(parts | options))
        except Exception as error:  # a damaged index raises all kinds of errors
            raise MobiusError(f"cannot load the pipeline of {folder / INDEX}: {error}") from error
        return loaded if dtype is None else loaded.to(dtype)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        negative_prompt: str = "",
        seed: int = 0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        conditions: EncodedPrompts | None = None,
    ) -> Any:
        """Sample one clip per prompt.

        Prompts are sampled one after the other. A clip is therefore bit-identical alone or among others, and memory is
        that of one clip. The global random state is neither used nor changed.

        Args:
            height, width: pixels, multiples of the autoencoder's downsampling factor.
            guidance_scale: scale of classifier-free guidance; at 1 or less the model runs on the prompt only.
            guidance_rescale: see `guided_prediction`.
            seed: determines, together with the prompt, the clip's initial noise.
            generator: replaces the seed, as in diffusers: one for all prompts in turn, or one per prompt.
            latents: the initial noise, (B, C, F, h, w).
            output_type: "np", "pil", "pt", "uint8" or "latent".
            conditions: of the prompts, encoded before; the text encoders are not used. The pipeline computes on their
                device.

        Returns:
            TextToVideoPipelineOutput, or a tuple of only its frames if return_dict is false.

        Raises:
            MobiusError: an argument is invalid.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise MobiusError("prompt is empty: give at least one")
        if output_type not in OUTPUT_TYPES:
            raise MobiusError(f"output_type={output_type!r} must be one of {', '.join(OUTPUT_TYPES)}")
        scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        noises = self._initial_noise(prompts, num_frames, height, width, seed, generator, latents)
        if conditions is None:
            text = self._text_encoding(self._execution_device)
            conditions = EncodedPrompts.of(text, prompts, negative_prompt if scale > 1 else None)
        device, unconditional = conditions.device, conditions.negative

        clips: list[Tensor] = []
        with evaluating(self.unet), self.progress_bar(total=len(prompts) * num_inference_steps) as bar:
            for noise, condition in zip(noises, conditions.prompts, strict=True):
                size = self._size_of(noise).to(device)
                without = None if unconditional is None else unconditional | size
                predict = self._guided_prediction(condition | size, without, scale, guidance_rescale)
                clips.append(
                    denoise_latents(self.scheduler, predict, noise.to(device), num_inference_steps, bar.update)
                )

        if output_type == "latent":
            frames: Any = torch.cat(clips)
        else:
            images = ImageEncoder(self.vae, device)
            sequence = as_denoiser(self.unet).sequence
            frames = convert_frames(torch.cat([images.decode(clip, sequence) for clip in clips]), output_type)
        return TextToVideoPipelineOutput(frames) if return_dict else (frames,)

    def progress_bar(self, iterable: Iterable[Any] | None = None, total: int | None = None) -> Any:
        """diffusers' bar, with the options of `set_progress_bar_config`; in a file, lines. See `bars.progress`."""
        options = {"desc": "sampling", "unit": "step"} | getattr(self, "_progress_bar_config", {})
        return progress(iterable, total=total, **options)

    def spatial_only(self) -> TextToVideoPipeline:
        """Return a pipeline of only the frozen spatial branch, which samples stills. It shares all weights.

        A still starts from the noise of the first frame of the clip with the same prompt and seed.

        Raises:
            MobiusError: the model has no separate spatial branch (serial).
        """
        unet = as_denoiser(self.unet).frozen if is_video_model(self.unet) else self.unet
        if unet is None:
            raise MobiusError(
                f"{type(self.unet).__name__} has no separate spatial branch, unlike parallel models."
                " Sample with num_frames=1, or from the text-to-image model that training started from"
            )
        return self._with_model(unet, num_frames=1)

    def image_clips(self, prompts: Sequence[str], seed: int, num_inference_steps: int, **options: Any) -> Tensor:
        """Sample clips with the image model alone, frame by frame, from the noise that `__call__` starts from.

        As long as the image model is frozen, these are the clips of a video model without training.

        Args:
            options: further ones of `__call__`.

        Returns:
            (B, F, 3, H, W) uint8.
        """
        images = self._with_model(as_denoiser(self.unet).image_model, num_frames=1)
        noise = torch.cat(self._initial_noise(list(prompts), None, None, None, seed, None, None))
        clips: Tensor = images(
            prompts, num_inference_steps=num_inference_steps, latents=noise, output_type="uint8", **options
        ).frames
        return clips

    def _with_model(self, model: nn.Module, num_frames: int) -> TextToVideoPipeline:
        """Return a pipeline that samples with another model. It shares all weights and the progress bar's settings."""
        pipeline = TextToVideoPipeline(
            **(self.components | {"unet": model}),
            max_text_tokens=self.config.max_text_tokens,
            num_frames=num_frames,
            resolution=self.config.resolution,
            guidance_scale=self.config.guidance_scale,
            frame_noise_correlation=self.config.frame_noise_correlation,
        )
        pipeline.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
        return pipeline

    def _initial_noise(
        self,
        prompts: list[str],
        num_frames: int | None,
        height: int | None,
        width: int | None,
        seed: int,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        latents: Tensor | None,
    ) -> list[Tensor]:
        """Return the initial noise of each prompt, (1, C, F, h, w), on its generator's device."""
        if latents is not None:
            if latents.ndim != 5 or len(latents) != len(prompts):
                raise MobiusError(
                    f"latents must have shape (B, C, F, h, w) with B={len(prompts)}, got {tuple(latents.shape)}"
                )
            return list(latents.split(1))
        frames = self.config.num_frames if num_frames is None else num_frames
        if frames < 1:
            raise MobiusError(f"num_frames={frames} must be 1 or more")
        if not is_video_model(self.unet) and frames != 1:
            raise MobiusError(f"num_frames={frames}, but a text-to-image model samples only stills: set num_frames=1")
        channels = as_denoiser(self.unet).backbone.latent_channels
        shape = (channels, frames, self._latent_size(height, 0), self._latent_size(width, 1))
        if generator is None:
            generators = [prompt_generator(seed, prompt) for prompt in prompts]
        elif isinstance(generator, torch.Generator):
            generators = [generator] * len(prompts)
        else:
            generators = list(generator)
        if len(generators) != len(prompts):
            raise MobiusError(f"{len(generators)} generators for {len(prompts)} prompts: give one per prompt, or one")
        correlation = self.config.frame_noise_correlation
        return [initial_noise(shape, source, correlation) for source in generators]

    def _text_encoding(self, device: torch.device) -> TextEncoding:
        wanted = as_denoiser(self.unet).backbone.condition_widths
        return make_text_encoding(self.components, device, self.config.max_text_tokens, wanted)

    def _size_of(self, latents: Tensor) -> Conditions:
        """The conditions of a clip's size that the model takes, for latents (B, C, F, h, w)."""
        reduction = LatentSpace.of(self.vae.config).reduction
        height, width = (reduction * size for size in latents.shape[-2:])
        return Conditions.of_size(height, width, as_denoiser(self.unet).backbone.condition_widths)

    def _latent_size(self, pixels: int | None, axis: int) -> int:
        """The latent size for pixels, by default the model's own; axis 0 is the height, 1 the width."""
        factor = LatentSpace.of(self.vae.config).reduction
        if pixels is None:
            pixels = self.config.resolution
        if pixels is None:
            size = self.unet.config.sample_size
            if size is None:
                raise MobiusError("the model has no size of its own (sample_size is null): set height and width")
            return int(size if isinstance(size, int) else size[axis])
        check_side(("height", "width")[axis], pixels, as_denoiser(self.unet).image_model, self.vae.config)
        return int(pixels) // factor

    def _guided_prediction(
        self, condition: Conditions, unconditional: Conditions | None, scale: float, rescale: float
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """Return (noisy latents (1, C, F, h, w), timestep) → prediction, for the conditions of one clip."""
        model = as_denoiser(self.unet)
        if unconditional is None:
            return partial(model.predict, conditions=condition.unsqueeze())
        conditions = Conditions.stack([unconditional, condition])

        def predict(sample: Tensor, timestep: Tensor) -> Tensor:
            both = model.predict(torch.cat([sample, sample]), timestep, conditions)
            without, conditional = both.float().chunk(2)
            return guided_prediction(without, conditional, scale, rescale)

        return predict


def load_pipeline(folder: Path | str, device: torch.device | str | None) -> TextToVideoPipeline:
    """Load the pipeline of a run's folder (its final/), of a pipeline folder, or of motion weights.

    Raises:
        MobiusError: the folder has no pipeline, loading fails, or the device is not available.
    """
    device, folder = usable_device(device), Path(folder)
    if (folder / MOTION).is_file():
        return _with_motion(folder).to(device)
    found = next((path for path in (folder / FINAL, folder) if (path / INDEX).is_file()), None)
    if found is None:
        raise MobiusError(
            f"no model in {folder}: "
            + ("neither it nor its final/ contains model_index.json" if folder.is_dir() else "there is no such folder")
            + ". Give the output_dir of a finished run, or a folder written by TextToVideoPipeline.save_pretrained"
        )
    kind = class_name(found, INDEX)
    if kind != TextToVideoPipeline.__name__:
        raise MobiusError(f"{found} contains a {kind}, not a {TextToVideoPipeline.__name__}")
    return TextToVideoPipeline.from_pretrained(found).to(device)


def _with_motion(folder: Path) -> TextToVideoPipeline:
    """The pipeline of motion weights and of what they refer to, in float32.

    Raises:
        MobiusError: see `read_motion`; or the autoencoder or a text encoder is missing.
    """
    model, description = read_motion(folder)
    scheduler = MOTION_SCHEDULERS.get(str(description.scheduler.get("_class_name")))
    if scheduler is None or set(description.settings) - set(MOTION_SETTINGS):
        raise MobiusError(f"{folder / MOTION} has a sampler or settings that this version does not know")
    base, wanted = place_of(description.base, folder), as_denoiser(model).backbone.condition_widths
    text_place = base if description.text_encoder is None else place_of(description.text_encoder, folder)
    text = load_text_encoding(str(text_place), torch.device("cpu"), description.settings.get("max_text_tokens"), wanted)
    return TextToVideoPipeline(
        vae=load_diffusers(AutoencoderKL, base, "vae"),
        **components_of(text),
        unet=model,
        scheduler=scheduler.from_config(description.scheduler),
        **description.settings,
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode, which disables dropout, and restore every module's own mode at the end."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
