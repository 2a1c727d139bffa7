"""Both frozen encoders together: clips in, latents' posteriors and text embeddings out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mobius_train.data.batch import ClipBatch, EncodedBatch, EncodedClip
from mobius_train.data.clips import Clip
from mobius_train.encoders.image_encoder import SLICE, ImageEncoder
from mobius_train.encoders.text_encoder import TextEncoder, masks_padding
from mobius_train.models import weights_hash


@dataclass(frozen=True)
class Encoders:
    """The autoencoder and the text encoder of a run."""

    images: ImageEncoder
    text: TextEncoder

    def encode(self, clip: Clip, variants: Sequence[str] = ()) -> EncodedClip:
        """One clip, on the CPU, as a cache stores it.

        Args:
            variants: further captions of it.
        """
        mean, std = self.images.posterior(clip.frames)
        text, *others = (self.text.encode(caption, where=clip.key).cpu() for caption in (clip.caption, *variants))
        return EncodedClip(clip.key, mean.cpu(), std.cpu(), text, tuple(others))

    def encode_batch(self, batch: ClipBatch) -> EncodedBatch:
        """A batch, clip by clip: the same bits as the cache."""
        clips = [
            self.encode(Clip(key, caption, frames))
            for key, caption, frames in zip(batch.keys, batch.captions, batch.frames, strict=True)
        ]
        return EncodedBatch.collate(list(zip(batch.sample_index.tolist(), clips, strict=True)))

    def empty_text(self) -> Tensor:
        """(L, D): the embedding of the empty caption, for guidance."""
        return self.text.encode("")

    def identity(self) -> dict[str, str]:
        """What a cached latent or embedding depends on, besides the clip, by name."""
        return {
            "autoencoder": weights_hash(self.images.vae),
            "frames encoded at once": str(SLICE),
            "text encoder": weights_hash(self.text.model),
            "text tokens": str(self.text.max_tokens),
            "padding masked": str(masks_padding(self.text.model)),
            "torch": torch.__version__,
        }
