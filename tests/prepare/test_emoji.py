from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from clip_files import animation, numbers, pictures
from PIL import Image

from mobius_train.data.clips import open_clips
from mobius_train.data.headers import read_header
from mobius_train.data.shards import verify
from mobius_train.errors import MobiusError
from mobius_train.prepare.emoji import names as emoji
from mobius_train.prepare.emoji.shards import Options, encode_webp, prepare

TONES = sorted(emoji.SKIN_TONES)
BASES = ["1f44b", "1f44d", "1f600", "1f436", "2764-fe0f", "1f680"]
ALL = [*BASES, *(f"{base}-{tone}" for base in BASES[:2] for tone in TONES)]
TOOL = Path(__file__).parents[2] / "tools" / "prepare_emoji.py"


def straddling(splits: dict[str, list[str]]) -> set[str]:
    """Emoji that have variants on both sides."""
    train, heldout = ({emoji.family(key) for key in splits[split]} for split in ("train", "heldout"))
    return train & heldout


def package(folder: Path, keys: list[str], frames: int = 10) -> Path:
    (folder / "assets").mkdir(parents=True)
    (folder / "package.json").write_text('{"name": "@test/emoji", "version": "1.2.3"}')
    for key in keys:
        (folder / "assets" / f"{key}.webp").write_bytes(animation(frames))
    return folder


def keys_of(folder: Path) -> dict[str, list[str]]:
    splits: dict[str, list[str]] = {}
    for split in ("train", "heldout"):
        splits[split] = open_clips(f"{folder}/{split}-*.tar", num_frames=1, resolution=16).keys
    return splits


def test_families_gather_the_skin_tones() -> None:
    assert {emoji.family(key) for key in ("1f44b", "1f44b-1f3fb", "1f44b-1f3ff")} == {"1f44b"}
    assert emoji.family("2764-fe0f") == "2764"
    assert emoji.family("1f469-1f3fb-200d-1f91d-200d-1f468-1f3fd") == emoji.family("1f46b")
    assert emoji.family("1f468-200d-1f373") != emoji.family("1f469-200d-1f373")


def test_the_split_follows_the_seed_and_leaves_something() -> None:
    keys = [f"{0x1F600 + number:x}" for number in range(40)]
    chosen = emoji.heldout_families(keys, 8, seed=0)
    assert len(chosen) == 8
    assert chosen == emoji.heldout_families(keys[::-1], 8, seed=0)
    assert chosen != emoji.heldout_families(keys, 8, seed=1)
    assert emoji.heldout_families(keys, 0, seed=0) == set()
    with pytest.raises(MobiusError, match="none would be left"):
        emoji.heldout_families(keys, 40, seed=0)


def test_names() -> None:
    assert emoji.names("1f600") == {"en": "grinning face", "zh": "嘿嘿"}
    assert emoji.names("1f3f4-e0067_e0062_e0065_e006e_e0067")["en"] == "England"  # type: ignore[index]
    assert emoji.names("44b") is None
    assert emoji.names("readme") is None


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders 16/ and 8/ of all variants, with one damaged and one nameless file among them."""
    folder = tmp_path_factory.mktemp("emoji")
    source = package(folder / "package", ALL)
    (source / "assets" / "1f98a.webp").write_bytes(animation(10)[:200])
    (source / "assets" / "nonsense.webp").write_bytes(animation(10))
    prepare([source], folder / "out", Options((16, 8), 4, "all", heldout=2, seed=0, processes=2))
    return folder / "out"


@pytest.mark.distributed
def test_prepared_shards_hold_the_frames_and_the_record(prepared: Path) -> None:
    assert sorted(path.name for path in prepared.iterdir()) == ["16", "8"]
    clips = open_clips(f"{prepared}/16/*.tar", num_frames=4, resolution=16)
    assert sorted(clips.keys) == sorted(ALL)
    assert all(numbers(clip.frames) == [0, 2, 5, 7] for clip in clips)
    assert open_clips(f"{prepared}/8/*.tar", num_frames=4, resolution=8)[0].frames.shape == (4, 3, 8, 8)
    with tarfile.open(prepared / "16" / "train-000000.tar") as tar:
        name = tar.getnames()[0]
        record = json.load(tar.extractfile(name))  # type: ignore[arg-type]
    key = name.removesuffix(".json")
    assert record["caption"] == emoji.names(key)
    assert record["num_frames"] == 4
    assert record["animated"] is True
    assert record["fps"] == 10.0  # four frames of a loop of 10 x 40 ms
    assert record["source"] == f"@test/emoji@1.2.3/assets/{key}.webp"
    assert record["codepoints"].startswith("U+")


@pytest.mark.distributed
def test_the_index_counts_and_names_what_was_left_out(prepared: Path) -> None:
    index = json.loads((prepared / "16" / "index.json").read_text(encoding="utf-8"))
    assert index["unnamed"] == ["nonsense"]
    assert list(index["unreadable"]) == ["1f98a"]
    counts = index["counts"]
    assert (counts["files"], counts["unreadable"], counts["unnamed"]) == (len(ALL) + 2, 1, 1)
    assert counts["train"] + counts["heldout"] == len(ALL)
    assert verify(prepared / "16") == 2
    assert index["sources"] == ["@test/emoji@1.2.3"]


@pytest.mark.distributed
def test_no_emoji_is_on_both_sides(prepared: Path) -> None:
    splits = keys_of(prepared / "16")
    assert straddling(splits) == set()
    assert len({emoji.family(key) for key in splits["heldout"]}) == 2
    # The negative control: a split by file, as in common use, puts variants on both sides.
    by_file = {"train": sorted(ALL)[::2], "heldout": sorted(ALL)[1::2]}
    assert straddling(by_file) == {"1f44b", "1f44d"}


@pytest.mark.distributed
def test_the_same_input_gives_the_same_bytes_from_a_tgz_too(tmp_path: Path) -> None:
    source = package(tmp_path / "package", BASES)
    with tarfile.open(tmp_path / "package.tgz", "w:gz") as tar:
        tar.add(source, "package")
    options = Options((16,), 4, heldout=2, processes=2)
    one = prepare([source], tmp_path / "one", options)[16]["shards"]
    assert one == prepare([tmp_path / "package.tgz"], tmp_path / "two", options)[16]["shards"]
    assert (tmp_path / "one/16/index.json").read_bytes() == (tmp_path / "two/16/index.json").read_bytes()


def test_merged_frames_are_put_apart_again() -> None:
    still = Image.new("RGB", (16, 16), "red")
    frames = [still, still.copy(), *pictures(2), still.copy(), still.copy()]
    buffer = io.BytesIO()
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:], duration=100)
    assert read_header(buffer.getvalue(), 2**20).num_frames < 6  # what the encoder does by itself
    data = encode_webp(frames, 100)
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 6  # type: ignore[attr-defined]
        for number, frame in enumerate(frames):
            image.seek(number)
            pixel, wanted = image.convert("RGB").getpixel((8, 8)), frame.getpixel((8, 8))
            assert max(abs(a - b) for a, b in zip(pixel, wanted, strict=True)) < 8  # type: ignore[arg-type]


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.distributed
def test_the_tool_refuses_overwrites_when_asked_and_leaves_no_halves(tmp_path: Path) -> None:
    source = package(tmp_path / "package", BASES[:3])
    out = tmp_path / "out"
    arguments = ("--packages", source, "--output", out, "--num-frames", "4", "--heldout", "1", "--resolution", "16")
    (out / "16").mkdir(parents=True)
    (out / "16" / "mine.txt").write_text("mine")
    (out / "LICENSE").write_text("kept")
    refused = run(*arguments)
    assert refused.returncode == 1
    assert "--overwrite" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert (out / "16" / "mine.txt").exists()

    empty = run(*arguments, "--subset", "static", "--overwrite")
    assert empty.returncode == 1
    assert "no train clip: of 3 files 0 are static" in empty.stderr
    assert (out / "16" / "mine.txt").exists()

    done = run(*arguments, "--overwrite")
    assert done.returncode == 0, done.stderr
    assert "'train': 2, 'heldout': 1" in done.stdout
    assert sorted(path.name for path in (out / "16").iterdir()) == [
        "heldout-000000.tar",
        "index.json",
        "train-000000.tar",
    ]
    assert sorted(path.name for path in out.iterdir()) == ["16", "LICENSE"]


def test_bad_packages_are_named(tmp_path: Path) -> None:
    options = Options((16,), 4, heldout=1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.tgz").write_bytes(b"no archive")
    twice = package(tmp_path / "package", BASES[:2])
    for packages, match in (
        ([tmp_path / "absent.tgz"], "there is no package .*absent.tgz"),
        ([tmp_path / "empty"], "empty holds no .webp"),
        ([tmp_path / "bad.tgz"], "bad.tgz cannot be unpacked"),
        ([twice, twice], "name one package once"),
    ):
        with pytest.raises(MobiusError, match=match):
            prepare(packages, tmp_path / "out", options)
        assert not (tmp_path / "out").exists()


def test_without_npm_the_error_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MobiusError, match="npm is not installed"):
        emoji.fetch(tmp_path / "cache")
