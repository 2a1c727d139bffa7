"""Fluent Emoji: which files there are, what they are called, and which are held out.

The animations are on the npm registry as @lobehub/fluent-emoji-anim-1 … -4; a file's name is the code point
sequence of its emoji (`1f44b-1f3fb.webp`). Their names come from the PyPI package `emoji`.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from mobius_train.errors import MobiusError

VERSION = "1.0.0"
# The .tgz of each package by sha256.
PACKAGES = {
    "@lobehub/fluent-emoji-anim-1": "4c03ac178c1eabf2e2a16dd498f3cc2b92dc30ec3466ae38fdc497d4774c99ea",
    "@lobehub/fluent-emoji-anim-2": "e431da8172e394036c330faa77648d6fbbae1fd3b0be95637c4497c9075019c0",
    "@lobehub/fluent-emoji-anim-3": "3624d0c34c819c1794b74ccf6ae9034adff7c4cb6318dd2a645145f0196feb43",
    "@lobehub/fluent-emoji-anim-4": "3d4c08f1e321f70808ef4996aba0ab575a9d97b6c56ffffc92cf6161a7836aa3",
}
LANGUAGES = ("en", "zh")
SUBSETS = ("animated-base", "animated", "static", "all")
SKIN_TONES = frozenset(("1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"))
END_OF_TAG = "\U000e007f"  # closes the code of a region; the file names leave it out
EMOJI_STYLE = "fe0f"  # asks for the coloured picture; says nothing of which emoji it is
# Emoji of two people are one code point without skin tones and a joined sequence with them.
JOINED = {
    "1f469-200d-1f91d-200d-1f469": "1f46d",  # women holding hands
    "1f469-200d-1f91d-200d-1f468": "1f46b",  # woman and man holding hands
    "1f468-200d-1f91d-200d-1f468": "1f46c",  # men holding hands
    "1faf1-200d-1faf2": "1f91d",  # handshake
    "1f9d1-200d-2764-200d-1f48b-200d-1f9d1": "1f48f",  # kiss
    "1f9d1-200d-2764-200d-1f9d1": "1f491",  # couple with heart
}


class EmojiFile(NamedTuple):
    """key: the file's name without ending. source: where it comes from, for the record."""

    key: str
    path: Path
    source: str


def code_points(key: str) -> list[str]:
    """In hexadecimal; three flags (England, Scotland, Wales) join some of theirs by underscores."""
    return re.split("[-_]", key)


def has_skin_tone(key: str) -> bool:
    return not SKIN_TONES.isdisjoint(key.split("-"))


def family(key: str) -> str:
    """What all skin-tone variants of an emoji have in common: '1f44b-1f3fb' and '1f44b' are both '1f44b'."""
    left = "-".join(part for part in key.split("-") if part != EMOJI_STYLE and part not in SKIN_TONES)
    return JOINED.get(left, left)


def heldout_families(keys: Sequence[str], count: int, seed: int) -> set[str]:
    """The `count` families that no training shard may hold, chosen by sha256 of seed and family.

    Raises:
        MobiusError: nothing would be left to train on.
    """
    families = {family(key) for key in keys}
    if not 0 <= count < len(families):
        raise MobiusError(f"cannot hold out {count} of {len(families)} emoji: none would be left to train on")
    return set(sorted(families, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).hexdigest())[:count])


def names(key: str) -> dict[str, str] | None:
    """Plain words by language, such as {"en": "grinning face", "zh": "笑脸"}; None for what has no name."""
    try:
        sign = "".join(chr(int(part, 16)) for part in code_points(key) if part != EMOJI_STYLE)
    except (ValueError, OverflowError):  # a file name that is no code point sequence
        return None
    found = _names().get(sign) or _names().get(sign + END_OF_TAG)
    return dict(found) if found else None


@lru_cache(maxsize=1)
def _names() -> dict[str, dict[str, str]]:
    try:
        import emoji
    except ImportError as error:
        raise MobiusError("the names of the emoji need the package emoji: pip install 'mobius-train[emoji]'") from error
    emoji.config.load_language(list(LANGUAGES))
    return {
        sign.replace(chr(int(EMOJI_STYLE, 16)), ""): {
            language: entry[language].strip(":").replace("_", " ") for language in LANGUAGES
        }
        for sign, entry in emoji.EMOJI_DATA.items()
        if all(language in entry for language in LANGUAGES)
    }


def fetch(cache: Path) -> list[Path]:
    """The four packages as .tgz in `cache`, downloaded by npm where they are not there yet.

    Raises:
        MobiusError: npm is absent or fails, or what it brought is not the package known here.
    """
    archives = [cache / f"{name[1:].replace('/', '-')}-{VERSION}.tgz" for name in PACKAGES]
    for name, archive in zip(PACKAGES, archives, strict=True):
        if archive.exists():
            continue
        npm = shutil.which("npm")
        if npm is None:
            raise MobiusError(
                f"npm is not installed, and {archive} is not there: install npm, or download {name}@{VERSION}"
                " elsewhere and name its .tgz or its folder with --packages"
            )
        partial = cache / "downloading"
        partial.mkdir(parents=True, exist_ok=True)
        command = [npm, "pack", f"{name}@{VERSION}", "--pack-destination", str(partial)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode or not (partial / archive.name).exists():
            raise MobiusError(f"npm pack {name}@{VERSION} failed: {result.stderr.strip() or result.stdout.strip()}")
        with open(partial / archive.name, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != PACKAGES[name]:
            raise MobiusError(f"{partial / archive.name} has the sha256 {found}, not {PACKAGES[name]}: not used")
        (partial / archive.name).replace(archive)
    return archives


def find_files(packages: Sequence[Path], unpacked: Path) -> list[EmojiFile]:
    """The WebP files of all packages by key; those of a .tgz are unpacked into the folder `unpacked`.

    Raises:
        MobiusError: a package is missing, damaged or without a WebP file, or two hold the same emoji.
    """
    found: dict[str, EmojiFile] = {}
    for number, package in enumerate(packages):
        folder = package if package.is_dir() else _unpack(package, unpacked / str(number))
        title = _title(folder)
        paths = sorted(folder.rglob("*.webp"))
        if not paths:
            raise MobiusError(f"{package} holds no .webp file: is it one of {', '.join(PACKAGES)}?")
        for path in paths:
            if path.stem in found:
                raise MobiusError(f"{path.name} is in {found[path.stem].source} and in {title}: name one package once")
            found[path.stem] = EmojiFile(path.stem, path, f"{title}/assets/{path.name}")
    return [found[key] for key in sorted(found)]


def _title(folder: Path) -> str:
    described = sorted(folder.rglob("package.json"))
    if not described:
        return folder.name
    try:
        package = json.loads(described[0].read_text(encoding="utf-8"))
        return f"{package['name']}@{package['version']}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MobiusError(f"{described[0]} does not name a package and its version: fetch it again") from error


def _unpack(archive: Path, folder: Path) -> Path:
    """The .webp files and package.json of a .tgz, by last name alone, so that none lands elsewhere."""
    if not archive.is_file():
        raise MobiusError(f"there is no package {archive}: give the .tgz that npm pack made, or its unpacked folder")
    folder.mkdir(parents=True)
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                name = Path(member.name).name
                stream = tar.extractfile(member) if member.isreg() else None
                if stream is not None and (name.endswith(".webp") or name == "package.json"):
                    with open(folder / name, "wb") as target:
                        shutil.copyfileobj(stream, target)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise MobiusError(f"{archive} cannot be unpacked ({error}): delete it and fetch it again") from error
    return folder
