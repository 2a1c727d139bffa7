"""Sources of the tensors of a recipe's models."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from diffusers import AutoencoderKL, SchedulerMixin
from torch import nn
from transformers import AutoConfig, AutoModel, BatchEncoding

from mobius_train.assembly.load_model import load_image_or_video_model, load_part
from mobius_train.assembly.load_scheduler import load_scheduler
from mobius_train.assembly.model_configs import ModelConfigs
from mobius_train.config import RunConfig
from mobius_train.encoders.clip_towers import T5_TOKENS
from mobius_train.encoders.load_text_encoding import load_text_encoding, make_text_encoding
from mobius_train.encoders.masked_text import pipeline_tokens
from mobius_train.encoders.text_encoder import text_model_class, tokenizer_part
from mobius_train.encoders.text_encoding import TextEncoding
from mobius_train.errors import MobiusError
from mobius_train.models import Denoiser
from mobius_train.models.families import DEFAULT, family_of

# Stable Diffusion's schedule, used if that of the pretrained model is not known.
SCHEDULER = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}


class WeightSource(Protocol):
    """Loads or creates the parts of a recipe, in float32."""

    def scheduler(self, config: RunConfig) -> SchedulerMixin: ...

    def image_or_video_model(self, config: RunConfig) -> nn.Module:
        """The run's initial model: an image model, or a video model of this project."""

    def autoencoder(self, config: RunConfig) -> AutoencoderKL: ...

    def text_encoding(self, config: RunConfig, device: torch.device, wanted: Mapping[str, int]) -> TextEncoding:
        """The recipe's text encoders.

        Args:
            wanted: the backbone's `condition_widths`.
        """

    def making_layers(self) -> AbstractContextManager[Any]:
        """Context in which the recipe's new layers are created: the ring or the temporal layers."""

    def fill(self, denoiser: Denoiser) -> None:
        """Load further weights into the complete model; called after the cast to its dtypes."""


class Pretrained:
    """The recipe's pretrained models, with new layers initialised from the recipe's seed."""

    def scheduler(self, config: RunConfig) -> SchedulerMixin:
        return load_scheduler(config.scheduler_config, config.pretrained_model_name_or_path)

    def image_or_video_model(self, config: RunConfig) -> nn.Module:
        return load_image_or_video_model(config.unet_config, config.pretrained_model_name_or_path)

    def autoencoder(self, config: RunConfig) -> AutoencoderKL:
        if config.stage == "autoencoder":
            return load_part(AutoencoderKL, "vae", config.vae_config, config.pretrained_model_name_or_path)
        source = config.vae_name_or_path or config.pretrained_model_name_or_path
        return load_part(AutoencoderKL, "vae", None, source)

    def text_encoding(self, config: RunConfig, device: torch.device, wanted: Mapping[str, int]) -> TextEncoding:
        return load_text_encoding(text_source(config), device, config.max_text_tokens, wanted, config.use_t5)

    def making_layers(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def fill(self, denoiser: Denoiser) -> None:
        pass


class Random:
    """New models from the recipe's configurations, without weights, hub or tokenizer.

    Memory and speed equal those of the real models; losses are meaningless.

    Args:
        device: the device that draws the weights. A billion random numbers take seconds on a GPU and a minute on a
            CPU. The meta device provides only shapes and dtypes.
    """

    def __init__(self, configs: ModelConfigs, device: torch.device) -> None:
        self._configs, self._device = configs, device

    def scheduler(self, config: RunConfig) -> SchedulerMixin:
        return load_scheduler(self._configs.scheduler or SCHEDULER, None)

    def image_or_video_model(self, config: RunConfig) -> nn.Module:
        values = self._configs.image_model
        assert values is not None
        family = family_of(values["_class_name"], values) if "_class_name" in values else DEFAULT
        with self._device:
            made: Any = family.image_model
            image_model: nn.Module = made.from_config(values)
            if self._configs.ring is None:
                return image_model
            parallel: Any = family.parallel
            ring = parallel.parts["ring"].from_config(self._configs.ring)
            video_model: nn.Module = parallel(spatial=image_model, ring=ring)
            return video_model

    def autoencoder(self, config: RunConfig) -> AutoencoderKL:
        with self._device:
            return AutoencoderKL.from_config(self._configs.vae)

    def text_encoding(self, config: RunConfig, device: torch.device, wanted: Mapping[str, int]) -> TextEncoding:
        components: dict[str, Any] = {}
        for part, values in self._configs.text_encoders.items():
            with self._device:
                components[part] = _new_text_model(values)
            components[tokenizer_part(part)] = RandomTokens(components[part].config)
        tokens = config.max_text_tokens or pipeline_tokens(text_source(config))
        return make_text_encoding(components, device, tokens, wanted)

    def making_layers(self) -> AbstractContextManager[Any]:
        return self._device

    def fill(self, denoiser: Denoiser) -> None:
        pass


def text_source(config: RunConfig) -> str:
    """The folder or name of the recipe's text encoders.

    Raises:
        MobiusError: the recipe has no text encoder.
    """
    source = config.text_encoder_name_or_path or config.pretrained_model_name_or_path
    if source is None:
        raise MobiusError("no text encoder: set text_encoder_name_or_path")
    return source


def _new_text_model(config: dict[str, Any]) -> Any:
    values = dict(config)
    # In a model with two towers, use only the text tower.
    if values.get("model_type") in ("clip", "chinese_clip"):
        values = values["text_config"] | {"model_type": f"{values['model_type']}_text_model"}
    kind = values.pop("model_type")
    configuration = AutoConfig.for_model(kind, **values)
    made = text_model_class(configuration)
    return AutoModel.from_config(configuration) if made is AutoModel else made(configuration)


class RandomTokens:
    """Replaces a tokenizer with random tokens; for every caption, all tokens except the last are text."""

    is_fast = False

    def __init__(self, config: Any) -> None:
        # T5's positions are relative.
        self.model_max_length = int(getattr(config, "max_position_embeddings", T5_TOKENS))
        self._vocabulary = int(config.vocab_size)

    def __call__(self, caption: str, max_length: int, **_: Any) -> BatchEncoding:
        tokens = torch.randint(self._vocabulary, (1, max_length), device="cpu")
        mask = torch.ones(1, max_length, dtype=torch.long, device="cpu")
        mask[:, -1] = 0
        return BatchEncoding({"input_ids": tokens, "attention_mask": mask})
