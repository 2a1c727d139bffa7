"""All frozen encoders, and the encoded batches of a task: encoded at every step, or read from a latent cache."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from mobius_train.conditions import SIZES, TEXT, Conditions
from mobius_train.data.batch import ClipBatch, EncodedBatch, EncodedClip
from mobius_train.data.clips import Clip
from mobius_train.data.loader import Collate, Samples
from mobius_train.encoders.image_encoder import ImageEncoder
from mobius_train.encoders.text_encoding import TextEncoding
from mobius_train.models import weights_hash
from mobius_train.sequence.group import SequenceGroup

HOST = torch.device("cpu")


@dataclass(frozen=True)
class Encoders:
    """The autoencoder and the text encoders of a run.

    Attributes:
        wanted: the names of the conditions that the backbone takes.
    """

    images: ImageEncoder
    text: TextEncoding
    wanted: frozenset[str] = frozenset({TEXT})

    def encode(self, clip: Clip, variants: Sequence[str] = ()) -> EncodedClip:
        """Encode one clip; the result is on the encoders' device.

        Args:
            variants: other captions of the clip.
        """
        mean, std = self.images.posterior(clip.frames)
        first, *others = (self._conditions(clip, caption) for caption in (clip.caption, *variants))
        return EncodedClip(clip.key, mean, std, first, tuple(others))

    def encode_batch(self, batch: ClipBatch, sequence: SequenceGroup | None = None) -> EncodedBatch:
        """Encode a batch clip by clip, so that the result is bit-identical to the cache.

        Args:
            sequence: ranks that have the same batch. Each encodes some of the frames of every clip, and some of the
                captions.
        """
        clips = [Clip(*clip) for clip in zip(batch.keys, batch.captions, batch.frames, strict=True)]
        conditions = self._shared_conditions(clips, sequence)
        images = (self.images.posterior(clip.frames, sequence) for clip in clips)
        encoded = [
            EncodedClip(clip.key, *image, given) for clip, image, given in zip(clips, images, conditions, strict=True)
        ]
        return EncodedBatch.collate(list(zip(batch.sample_index.tolist(), encoded, strict=True)))

    def _conditions(self, clip: Clip, caption: str) -> Conditions:
        return self._with_size(clip, self.text.encode(caption, where=clip.key))

    def _with_size(self, clip: Clip, text: Conditions) -> Conditions:
        height, width = clip.frames.shape[-2:]
        return text | Conditions.of_size(height, width, self.wanted).to(self.images.device)

    def _shared_conditions(self, clips: list[Clip], sequence: SequenceGroup | None) -> list[Conditions]:
        """The conditions of each clip's caption."""
        if sequence is None:
            return [self._conditions(clip, clip.caption) for clip in clips]
        # Clip i is encoded by rank i % P in round i // P. Sharded encoders need equal numbers of calls, so a rank
        # without a clip in the last round encodes the last one again.
        rounds = range(math.ceil(len(clips) / sequence.size))
        mine = [clips[min(number * sequence.size + sequence.rank, len(clips) - 1)] for number in rounds]
        text = Conditions.stack([self.text.encode(clip.caption, where=clip.key) for clip in mine])
        # (P, rounds, ...) to one row for each clip.
        whole = text.map(lambda tensor: sequence.gather(tensor).transpose(0, 1).flatten(0, 1))
        return [
            self._with_size(clip, Conditions({name: rows[i] for name, rows in whole.tensors.items()}))
            for i, clip in enumerate(clips)
        ]

    def without_caption(self) -> Conditions:
        """The conditions of the empty caption, used for guidance; without those that do not depend on a caption."""
        return self.text.encode("")

    def move(self, device: torch.device, images: bool = True, text: bool = True) -> None:
        """Move the autoencoder, if `images`, and the text encoders, if `text`, to a device."""
        if images:
            self.images.vae.to(device)
        if text:
            for encoder in self.text.encoders.values():
                encoder.model.to(device)

    def identity(self) -> dict[str, str]:
        """Everything except the clip on which a cached latent or embedding depends, by name."""
        return {
            "autoencoder": weights_hash(self.images.vae),
            "frames encoded at once": str(self.images.space.frames_at_once),
            **self.text.identity(),
            **({SIZES: "the clip's, not cropped"} if SIZES in self.wanted else {}),
            "torch": torch.__version__,
        }


class EncodedSource(Protocol):
    """Encoded batches of the training clips and of the held-out clips.

    Attributes:
        samples: the loader's input for each set of clips; None if the recipe has no such set.
        collate: builds the loader's batches.
    """

    samples: dict[str, Samples | None]
    collate: Collate

    def on_device(self, batch: ClipBatch | EncodedBatch) -> EncodedBatch:
        """Encode a batch of the loader if necessary, and move it to this rank's device."""

    @contextmanager
    def autoencoder_on_device(self) -> Iterator[None]:
        """Context for decoding samples, with the autoencoder on this rank's device."""


class Online:
    """The loader decodes clips, and the device encodes them at every step.

    Args:
        sequence: the ranks that get the same batches, and share the encoding of frames.
    """

    collate: Collate = ClipBatch.collate

    def __init__(
        self,
        samples: dict[str, Samples | None],
        encoders: Encoders,
        device: torch.device,
        sequence: SequenceGroup | None = None,
    ) -> None:
        self.samples, self._encoders, self._device, self._sequence = samples, encoders, device, sequence

    def on_device(self, batch: ClipBatch | EncodedBatch) -> EncodedBatch:
        # `mobius_train.measure` passes batches that are already encoded.
        if isinstance(batch, ClipBatch):
            return self._encoders.encode_batch(batch, self._sequence)
        return batch.to(self._device)

    @contextmanager
    def autoencoder_on_device(self) -> Iterator[None]:
        yield


class Cached:
    """Reads latents and conditions from a cache. The encoders stay in host memory, the autoencoder except for sampling.

    Args:
        keep_text: the text encoders will be saved. Otherwise their weights are dropped: nothing encodes text any more.
    """

    collate: Collate = EncodedBatch.collate

    def __init__(
        self, samples: dict[str, Samples | None], encoders: Encoders, device: torch.device, keep_text: bool
    ) -> None:
        self.samples, self._encoders, self._device = samples, encoders, device
        encoders.move(HOST, text=False)
        encoders.move(HOST if keep_text else torch.device("meta"), images=False)

    def on_device(self, batch: ClipBatch | EncodedBatch) -> EncodedBatch:
        assert isinstance(batch, EncodedBatch)
        return batch.to(self._device)

    @contextmanager
    def autoencoder_on_device(self) -> Iterator[None]:
        self._encoders.move(self._device, text=False)
        try:
            yield
        finally:
            self._encoders.move(HOST, text=False)
