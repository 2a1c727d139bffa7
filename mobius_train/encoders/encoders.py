"""Both frozen encoders: clips to latent posteriors and text embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mobius_train.conditions import Conditions
from mobius_train.data.batch import ClipBatch, EncodedBatch, EncodedClip
from mobius_train.data.clips import Clip
from mobius_train.encoders.image_encoder import ImageEncoder
from mobius_train.encoders.text_encoder import TextEncoder, masks_padding
from mobius_train.models import weights_hash


@dataclass(frozen=True)
class Encoders:
    """The autoencoder and the text encoder of a run."""

    images: ImageEncoder
    text: TextEncoder

    def encode(self, clip: Clip, variants: Sequence[str] = ()) -> EncodedClip:
        """Encode one clip; the result is on the encoders' device.

        Args:
            variants: other captions of the clip.
        """
        mean, std = self.images.posterior(clip.frames)
        first, *others = (self.text.encode(caption, where=clip.key) for caption in (clip.caption, *variants))
        return EncodedClip(clip.key, mean, std, first, tuple(others))

    def encode_batch(self, batch: ClipBatch) -> EncodedBatch:
        """Encode a batch clip by clip, so that the result is bit-identical to the cache."""
        clips = zip(batch.keys, batch.captions, batch.frames, strict=True)
        encoded = [self.encode(Clip(*clip)) for clip in clips]
        return EncodedBatch.collate(list(zip(batch.sample_index.tolist(), encoded, strict=True)))

    def without_caption(self) -> Conditions:
        """The conditions of the empty caption, used for guidance."""
        return self.text.encode("")

    def move(self, device: torch.device, text: bool = True) -> None:
        """Move the autoencoder and, if `text`, the text encoder to a device."""
        self.images.vae.to(device)
        if text:
            self.text.model.to(device)

    def identity(self) -> dict[str, str]:
        """Everything except the clip on which a cached latent or embedding depends, by name."""
        return {
            "autoencoder": weights_hash(self.images.vae),
            "frames encoded at once": str(self.images.space.frames_at_once),
            "text encoder": weights_hash(self.text.model),
            "text tokens": str(self.text.max_tokens),
            "padding masked": str(masks_padding(self.text.model)),
            "torch": torch.__version__,
        }
