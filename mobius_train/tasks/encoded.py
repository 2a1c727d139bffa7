"""Sources of a task's encoded batches: the encoders at every step, or a latent cache."""

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
        samples: the loader's input for each set of clips; None if the recipe has no such set.
        collate: builds the loader's batches.
    """

    samples: dict[str, Samples | None]
    collate: Collate

    def on_device(self, batch: ClipBatch | EncodedBatch) -> EncodedBatch:
        """Encode a batch of the loader if necessary, and move it to this rank's device."""

    @contextmanager
    def encoders_on_device(self) -> Iterator[None]:
        """Context for sampling, with the encoders on this rank's device."""


class Online:
    """The loader decodes clips, and the device encodes them at every step."""

    collate: Collate = ClipBatch.collate

    def __init__(self, samples: dict[str, Samples | None], encoders: Encoders, device: torch.device) -> None:
        self.samples, self._encoders, self._device = samples, encoders, device

    def on_device(self, batch: ClipBatch | EncodedBatch) -> EncodedBatch:
        # `mobius_train.measure` passes batches that are already encoded.
        return self._encoders.encode_batch(batch) if isinstance(batch, ClipBatch) else batch.to(self._device)

    @contextmanager
    def encoders_on_device(self) -> Iterator[None]:
        yield


class Cached:
    """Reads latents and conditions from a cache. The encoders stay in host memory except for sampling.

    Args:
        move_text: move the text encoder too; a sharded one stays on the device.
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
