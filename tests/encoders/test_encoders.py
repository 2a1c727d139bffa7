"""Where the encoders are: with a latent cache, the autoencoder is on the device for sampling alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest
import torch
from recipes import Run, recipe, write
from torch import Tensor

from mobius_train.assembly.parts import load_parts
from mobius_train.assembly.weights import Pretrained
from mobius_train.conditions import MASK, SIZES, TEXT, Conditions
from mobius_train.config import RunConfig, load
from mobius_train.data.batch import ClipBatch, EncodedBatch
from mobius_train.encoders.encoders import Cached, Encoders, Online
from mobius_train.encoders.image_encoder import ImageEncoder, Posterior
from mobius_train.encoders.text_encoder import TextEncoder
from mobius_train.encoders.text_encoding import TextEncoding
from mobius_train.sequence.group import SequenceGroup
from mobius_train.tasks.denoising import DiffusionTask

CPU = torch.device("cpu")


class Moved:
    """Records where the encoders are put."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[str] = []

        def move(_: Encoders, device: torch.device, images: bool = True, text: bool = True) -> None:
            moved = [name for name, chosen in (("images", images), ("text", text)) if chosen]
            self.seen.append(f"{' and '.join(moved)} to {device}")

        monkeypatch.setattr(Encoders, "move", move)


def test_a_cached_source_takes_the_autoencoder_off_the_device_after_every_use(monkeypatch: pytest.MonkeyPatch) -> None:
    moved, encoders = Moved(monkeypatch), Encoders.__new__(Encoders)
    source = Cached({}, encoders, torch.device("cuda"), keep_text=True)
    assert moved.seen == ["images to cpu", "text to cpu"]
    for _ in range(2):
        with source.autoencoder_on_device():
            assert moved.seen[-1] == "images to cuda"
    with pytest.raises(OSError, match="disk"), source.autoencoder_on_device():
        raise OSError("disk full")
    assert moved.seen[2:] == ["images to cuda", "images to cpu"] * 3


def test_a_rank_that_saves_no_model_drops_the_text_encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = Moved(monkeypatch)
    Cached({}, Encoders.__new__(Encoders), torch.device("cuda"), keep_text=False)
    assert moved.seen == ["images to cpu", "text to meta"]


@pytest.mark.slow
def test_a_run_with_a_cache_has_them_on_the_device_only_while_it_validates(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = Moved(monkeypatch)
    steps: list[int] = []
    loss = DiffusionTask.loss

    def counted(*arguments: object) -> torch.Tensor:
        # An even number of moves: it has left as often as it came, and both encoders left once before.
        steps.append(len(moved.seen))
        return loss(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(DiffusionTask, "loss", counted)
    short: dict[str, Any] = {"validation": {"num_inference_steps": 1, "max_clips": 1}, "validation_steps": 1}
    run("cached", data={"cache_dir": str(tmp_path / "cache")}, max_train_steps=2, **short)
    # The first validation, of step 0, draws no samples.
    assert steps == [2, 4]
    assert len(moved.seen) == 6

    moved.seen.clear()
    run("online", max_train_steps=1, **short)
    assert moved.seen == []


@pytest.mark.slow
def test_prompts_are_encoded_once_in_a_run(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str]] = []
    encode = TextEncoder.encode

    def counted(encoder: TextEncoder, caption: str, where: str = "") -> Conditions:
        seen.append((caption, where))
        return encode(encoder, caption, where)

    monkeypatch.setattr(TextEncoder, "encode", counted)
    prompts = ["dog number 1", "a ghost"]
    wanted = {"num_inference_steps": 1, "max_clips": 1, "prompts": prompts, "negative_prompt": "blurred"}
    run("cached", data={"cache_dir": str(tmp_path / "cache")}, max_train_steps=2, validation=wanted, validation_steps=1)
    # Clips are encoded for the cache, and the empty caption for guidance in training.
    assert [caption for caption, where in seen if not where] == ["", *prompts, "blurred"]
    seen.clear()
    run("without guidance", max_train_steps=1, validation=wanted | {"guidance_scale": 1.0})
    assert [caption for caption, where in seen if not where] == ["", *prompts]


@pytest.mark.parametrize("cache", [None, "any", "full"])
def test_with_a_full_cache_text_is_encoded_in_host_memory(
    tiny_pipeline: Path, clips_folder: Path, tmp_path: Path, cache: str | None
) -> None:
    values = recipe(tiny_pipeline, clips_folder, tmp_path / "out")
    if cache:
        values["data"] |= {"cache_dir": "c", "cache_required": cache == "full"}
    given: list[torch.device] = []

    class Watched(Pretrained):
        def text_encoding(self, config: RunConfig, device: torch.device, wanted: Mapping[str, int]) -> TextEncoding:
            given.append(device)
            return super().text_encoding(config, torch.device("cpu"), wanted)

    # Stands for a GPU.
    load_parts(load(write(tmp_path / "recipe.yaml", values)), Watched(), torch.device("mps"))
    assert given == [torch.device("cpu" if cache == "full" else "mps")]


def test_an_online_source_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = Moved(monkeypatch)
    source = Online({}, Encoders.__new__(Encoders), torch.device("cuda"))
    with source.autoencoder_on_device():
        pass
    assert moved.seen == []


class Group(SequenceGroup):
    """One rank of a group; the other ranks' tensors are known from a run before."""

    def __init__(self, rank: int, gathered: list[list[Tensor]]) -> None:
        super().__init__(rank, len(gathered))
        self._gathered, self._calls_here = gathered, 0

    def _gather(self, tensor: Tensor) -> Tensor:
        number, self._calls_here = self._calls_here, self._calls_here + 1
        own = self._gathered[self.rank]
        if len(own) == number:
            own.append(tensor)
        return torch.stack([tensors[number] if len(tensors) > number else tensor for tensors in self._gathered])

    def _exchange(self, *_: Any) -> Any:
        raise AssertionError

    def _reduce(self, tensor: Tensor) -> Tensor:
        raise AssertionError


class Text:
    """Encodes a caption as its length."""

    def __init__(self) -> None:
        self.encoded: list[str] = []

    def encode(self, caption: str, where: str = "") -> Conditions:
        self.encoded.append(caption)
        mask = torch.tensor([len(caption) > 1, True])
        return Conditions({TEXT: torch.full((2, 3), float(len(caption))), MASK: mask})


class Images:
    device = torch.device("cpu")

    def posterior(self, frames: Tensor, sequence: SequenceGroup | None = None) -> Posterior:
        return Posterior(frames.float(), frames.float())


@pytest.mark.parametrize("clips", [1, 2, 5])
def test_ranks_of_a_group_share_the_captions_of_a_batch(clips: int) -> None:
    captions = ["a" * (number + 1) for number in range(clips)]
    frames = torch.zeros(clips, 1, 3, 8, 16, dtype=torch.uint8)
    batch = ClipBatch(torch.arange(clips), [str(number) for number in range(clips)], captions, frames)

    def encode(group: SequenceGroup | None) -> tuple[EncodedBatch, list[str]]:
        text = Text()
        encoders = Encoders(Images(), text, frozenset({TEXT, MASK, SIZES}))  # type: ignore[arg-type]
        return encoders.encode_batch(batch, group), text.encoded

    alone, _ = encode(None)
    gathered: list[list[Tensor]] = [[], [], []]
    for rank in range(3):
        encode(Group(rank, gathered))
    seen: set[str] = set()
    for rank in range(3):
        shared, encoded = encode(Group(rank, gathered))
        assert len(encoded) == -(-clips // 3)  # as often on every rank
        seen |= set(encoded)
        assert shared.conditions.tensors.keys() == {TEXT, MASK, SIZES}
        for name, tensor in alone.conditions.tensors.items():
            assert torch.equal(shared.conditions[name], tensor)
            assert shared.conditions[name].dtype == tensor.dtype
    assert seen == set(captions)


@pytest.mark.parametrize(("side", "sizes"), [(64, [8, 3]), (256, [4, 4, 3]), (512, [1] * 11), (1024, [1] * 11)])
def test_large_frames_are_decoded_a_few_at_once(side: int, sizes: list[int]) -> None:
    seen: list[int] = []

    class Decoder(torch.nn.Module):
        config: ClassVar = {"latent_channels": 4, "block_out_channels": [1] * 4, "scaling_factor": 1.0}
        device = CPU

        def decode(self, latents: Tensor) -> SimpleNamespace:
            seen.append(len(latents))
            height, width = (8 * size for size in latents.shape[-2:])
            return SimpleNamespace(sample=torch.zeros(len(latents), 3, height, width))

    images = ImageEncoder(cast(Any, Decoder()), CPU)
    frames = images.decode(torch.zeros(1, 4, 11, side // 8, side // 8))
    assert frames.shape == (1, 11, 3, side, side)
    assert seen == sizes
