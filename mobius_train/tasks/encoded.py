"""Where a task's encoded batches come from: the encoders at every step, or a latent cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from mobius_train.data.batch import ClipBatch, EncodedBatch
from mobius_train.data.loader import Collate, Samples
from mobius_train.encoders.encoders import Encoders


class EncodedSource(Protocol):
    """Encoded batches of the training clips and of the held-out clips.

    Attributes:
        samples: what the loader reads, by the name of the set of clips; None where the recipe has no such clips.
        collate: makes the loader's batches.
    """

    samples: dict[str, Samples | None]
    collate: Collate

    def on_device(self, batch: ClipBatch | EncodedBatch) -> EncodedBatch:
        """A batch of the loader, encoded, on this rank's device."""

    @contextmanager
    def encoders_on_device(self) -> Iterator[None]:
        """For sampling: the encoders are on this rank's device inside."""


class Online:
    """Clips are decoded by the loader and encoded on the device at every step."""

    collate: Collate = ClipBatch.collate

    def __init__(self, samples: dict[str, Samples | None], encoders: Encoders, device: torch.device) -> None:
        self.samples, self._encoders, self._device = samples, encoders, device

    def on_device(self, batch: ClipBatch | EncodedBatch) -> EncodedBatch:
        # The measurement encodes batches ahead.
        return self._encoders.encode_batch(batch) if isinstance(batch, ClipBatch) else batch.to(self._device)

    @contextmanager
    def encoders_on_device(self) -> Iterator[None]:
        yield


class Cached:
    """Latents and conditions are read from a cache. The encoders wait in host memory, and are on the device to sample.

    Args:
        move_text: whether the text encoder moves too; one that is sharded over ranks stays.
    """

    collate: Collate = EncodedBatch.collate

    def __init__(
        self, samples: dict[str, Samples | None], encoders: Encoders, device: torch.device, move_text: bool
    ) -> None:
        self.samples, self._encoders, self._device, self._move_text = samples, encoders, device, move_text
        self._leave()

    def on_device(self, batch: ClipBatch | EncodedBatch) -> EncodedBatch:
        assert isinstance(batch, EncodedBatch)
        return batch.to(self._device)

    @contextmanager
    def encoders_on_device(self) -> Iterator[None]:
        self._encoders.move(self._device, text=self._move_text)
        try:
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        self._encoders.move(torch.device("cpu"), text=self._move_text)
