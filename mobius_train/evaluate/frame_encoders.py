"""Embeddings of single frames and of captions by frozen models: DINO and CLIP.

Legend: F frames, H, W pixels, D width of an embedding.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mobius_train.errors import MobiusError
from mobius_train.evaluate.frozen_model import load_frozen, load_local
from mobius_train.evaluate.resize import Resize

logger = logging.getLogger(__name__)

FRAMES_AT_ONCE = 32
DINO = ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit")
CLIP = ("clip", "clip_vision_model", "chinese_clip")


class FrameEncoder(ABC):
    """Embeddings of length 1 of the frames of a clip. The latest clip's are kept: several dimensions need them."""

    def __init__(self, resize: Resize, device: torch.device) -> None:
        self._resize, self.device = resize, device
        self._latest: tuple[Tensor, Tensor] | None = None

    def embed(self, frames: Tensor) -> Tensor:
        """Embed uint8 (F, 3, H, W) to (F, D) float32 on the CPU."""
        if self._latest is None or self._latest[0] is not frames:
            parts = [self.encode(self._resize(part.to(self.device))) for part in frames.split(FRAMES_AT_ONCE)]
            self._latest = frames, normalize(torch.cat(parts).float(), dim=-1).cpu()
        return self._latest[1]

    @abstractmethod
    def encode(self, pixels: Tensor) -> Tensor:
        """Embeddings (F, D) of normalised pixels."""


class DinoEncoder(FrameEncoder):
    """The class token of a vision transformer trained by DINO; VBench uses ViT-B/16 (facebook/dino-vitb16)."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.model = load_frozen("AutoModel", folder, DINO, device)
        super().__init__(_resize(folder, self.model.config.image_size, "bilinear", crop=False), device)
        # A clip that is not square has another number of patches; DINOv2 and later interpolate without being asked.
        self._options = {"interpolate_pos_encoding": True} if self.model.config.model_type == "vit" else {}

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        tokens: Tensor = self.model(pixel_values=pixels, **self._options).last_hidden_state
        return tokens[:, 0]


class ClipEncoder(FrameEncoder):
    """CLIP's image embedding. VBench uses ViT-B/32 for the background, ViT-L/14 for aesthetics."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.model = load_frozen("CLIPVisionModelWithProjection", folder, CLIP, device)
        super().__init__(_resize(folder, self.model.config.image_size, "bicubic", crop=True), device)

    @property
    def width(self) -> int:
        """D."""
        return int(self.model.config.projection_dim)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        embeddings: Tensor = self.model(pixel_values=pixels).image_embeds
        return embeddings


class CaptionEncoder:
    """CLIP's text embedding."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.model = load_frozen("CLIPTextModelWithProjection", folder, CLIP[:1], device)
        self.tokenizer = load_local("AutoTokenizer", folder)
        self.device = device

    @torch.no_grad()
    def embed(self, caption: str) -> Tensor:
        """The caption's embedding of length 1, (D,) float32 on the CPU; a truncated caption is logged."""
        most = self.model.config.max_position_embeddings
        tokens = self.tokenizer(caption, return_tensors="pt", verbose=False)["input_ids"]
        if tokens.shape[1] > most:
            logger.warning("a caption of %d tokens is truncated to CLIP's %d: %r", tokens.shape[1], most, caption)
            tokens = self.tokenizer(caption, return_tensors="pt", truncation=True, max_length=most)["input_ids"]
        return normalize(self.model(tokens.to(self.device)).text_embeds[0].float(), dim=-1).cpu()


def _resize(folder: Path, side: int, mode: str, crop: bool) -> Resize:
    processor = load_local("AutoImageProcessor", folder)
    if not isinstance(side, int):
        raise MobiusError(
            f"{folder}: image_size {side} of config.json is not one number: give a model of square images"
        )
    return Resize(side, "bicubic" if mode == "bicubic" else "bilinear", crop, processor.image_mean, processor.image_std)
