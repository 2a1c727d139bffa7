from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import made
import pytest
from clip_files import animation, pictures
from PIL import Image

from mobius_train.data.clips import open_clips
from mobius_train.data.headers import read_header
from mobius_train.data.limits import Limits
from mobius_train.errors import MobiusError
from mobius_train.prepare.emoji import names as emoji
from mobius_train.prepare.emoji.source import fetch_packages
from mobius_train.prepare.encode import split_of
from mobius_train.prepare.preparation import prepare_data
from mobius_train.prepare.recipe import OutputConfig, PrepareConfig
from mobius_train.prepare.webp import encode_webp
from mobius_train.recipe_files import load_as

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "configs" / "data" / "emoji_base.yaml"
TONES = sorted(emoji.SKIN_TONES)
BASES = ["1f44b", "1f44d", "1f600", "1f436", "2764-fe0f", "1f680"]
ALL = [*BASES, *(f"{base}-{tone}" for base in BASES[:2] for tone in TONES)]


def straddling(splits: dict[str, list[str]]) -> set[str]:
    """Emoji that have variants on both sides."""
    train, heldout = ({emoji.family(key) for key in splits[name]} for name in ("train", "heldout"))
    return train & heldout


def keys_of(folder: Path) -> dict[str, list[str]]:
    return {
        name: list(open_clips(f"{folder}/{name}-*.tar", num_frames=1, resolution=16).keys)
        for name in ("train", "heldout")
    }


def test_families_gather_the_skin_tones() -> None:
    assert {emoji.family(key) for key in ("1f44b", "1f44b-1f3fb", "1f44b-1f3ff")} == {"1f44b"}
    assert emoji.family("2764-fe0f") == "2764"
    assert emoji.family("1f469-1f3fb-200d-1f91d-200d-1f468-1f3fd") == emoji.family("1f46b")
    assert emoji.family("1f468-200d-1f373") != emoji.family("1f469-200d-1f373")


def test_names() -> None:
    assert emoji.names("1f600") == {"en": "grinning face", "zh": "嘿嘿"}
    assert emoji.names("1f3f4-e0067_e0062_e0065_e006e_e0067")["en"] == "England"  # type: ignore[index]
    assert emoji.names("44b") is None
    assert emoji.names("readme") is None


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .tgz of all variants, with a still, a damaged and a nameless file among them."""
    path = tmp_path_factory.mktemp("emoji") / "package.tgz"
    files = {"package.json": b"{}"} | {
        f"assets/{key}.webp": made.animation(made.moving(16, seed=number)) for number, key in enumerate(ALL)
    }
    files |= {
        "assets/1f98a.webp": animation(16)[:200],
        "assets/1f98b.webp": animation(1),
        "assets/nonsense.webp": animation(16),
    }
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def _prepare(package: Path, output: Path, *overrides: str) -> Path:
    config = load_as(
        PrepareConfig,
        RECIPE,
        [f"sources.0.packages={package}", f"output_dir={output}", "stages.2.sizes=[[16, 16]]", *overrides],
    )
    prepare_data(config)
    return output


def test_the_recipe_makes_clips_with_both_captions(package: Path, tmp_path: Path) -> None:
    output = _prepare(package, tmp_path / "out", "output.heldout=0")
    clips = open_clips(f"{output}/train-*.tar", num_frames=8, resolution=16)
    assert sorted(clips.keys) == sorted(BASES)
    reasons = {row["key"]: (row["stage"], row["reason"]) for row in made.rows(output) if not row["kept"]}
    assert reasons.pop("1f98a") == ("decode", "damaged")
    assert reasons.pop("1f98b") == ("decode", "still")
    assert reasons.pop("nonsense") == ("source", "no name")
    assert {key for key, why in reasons.items() if why == ("source", "skin tone")} == set(ALL) - set(BASES)
    with tarfile.open(output / "train-000000.tar") as tar:
        record = json.load(tar.extractfile("1f600.json"))  # type: ignore[arg-type]
    assert record["caption"] == emoji.names("1f600")
    assert (record["num_frames"], record["width"], record["height"]) == (8, 16, 16)
    assert record["fps"] == 12.5  # 8 frames of a loop of 16 x 40 ms
    assert record["source"].endswith("package.tgz!package/assets/1f600.webp")


def test_no_emoji_is_on_both_sides(package: Path, tmp_path: Path) -> None:
    output = _prepare(package, tmp_path / "out", "sources.0.skin_tones=true", "output.heldout=0.5")
    splits = keys_of(output)
    assert sorted(splits["train"] + splits["heldout"]) == sorted(ALL)
    assert straddling(splits) == set()
    # The negative control: a split by file, as in common use, puts variants on both sides.
    by_file = {"train": sorted(ALL)[::2], "heldout": sorted(ALL)[1::2]}
    assert straddling(by_file) == {"1f44b", "1f44d"}


def test_the_recipe_holds_out_the_emoji_of_the_embedded_shards() -> None:
    """Otherwise the embedded backbone would have been trained on clips that a new set holds out."""
    embedded = keys_of(ROOT / "assets" / "fluent-emoji" / "64")
    assert [len(keys) for keys in embedded.values()] == [670, 64]

    def differing(output: OutputConfig) -> int:
        return sum(split_of(emoji.family(key), output) != name for name, keys in embedded.items() for key in keys)

    recipe = load_as(PrepareConfig, RECIPE, [])
    assert differing(recipe.output) == 0
    # The negative control: another seed holds out others.
    assert differing(OutputConfig(heldout=recipe.output.heldout, seed=1)) > 64


def test_merged_frames_are_put_apart_again() -> None:
    still = Image.new("RGB", (16, 16), "red")
    frames = [still, still.copy(), *pictures(2), still.copy(), still.copy()]
    buffer = io.BytesIO()
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:], duration=100)
    assert read_header(buffer.getvalue(), Limits()).num_frames < 6  # what the encoder does by itself
    data = encode_webp(frames, 100, 92)
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 6  # type: ignore[attr-defined]
        for number, frame in enumerate(frames):
            image.seek(number)
            pixel, wanted = image.convert("RGB").getpixel((8, 8)), frame.getpixel((8, 8))
            assert max(abs(a - b) for a, b in zip(pixel, wanted, strict=True)) < 8  # type: ignore[arg-type]


def test_packages_that_are_missing_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MobiusError, match=r"sources\.0\.packages: there is no .*absent\.tgz"):
        _prepare(tmp_path / "absent.tgz", tmp_path / "out")
    assert not (tmp_path / "out" / "index.json").exists()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MobiusError, match="npm is not installed"):
        fetch_packages(tmp_path / "cache")
