"""Fluent Emoji from its npm packages, with the names of the emoji as captions."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Literal

from pydantic import Field

from mobius_train.config_sections import Section
from mobius_train.data.kinds import CLIP_SUFFIXES
from mobius_train.errors import MobiusError
from mobius_train.files import sha256
from mobius_train.prepare.candidate import Drop
from mobius_train.prepare.emoji import names as emoji
from mobius_train.prepare.sources import archives
from mobius_train.prepare.sources.reference import STAGE, Reference

CACHE = Path("~/.cache/mobius-train/fluent-emoji")
VERSION = "1.0.0"
# sha256 of each package's .tgz.
PACKAGES = {
    "@lobehub/fluent-emoji-anim-1": "4c03ac178c1eabf2e2a16dd498f3cc2b92dc30ec3466ae38fdc497d4774c99ea",
    "@lobehub/fluent-emoji-anim-2": "e431da8172e394036c330faa77648d6fbbae1fd3b0be95637c4497c9075019c0",
    "@lobehub/fluent-emoji-anim-3": "3624d0c34c819c1794b74ccf6ae9034adff7c4cb6318dd2a645145f0196feb43",
    "@lobehub/fluent-emoji-anim-4": "3d4c08f1e321f70808ef4996aba0ab575a9d97b6c56ffffc92cf6161a7836aa3",
}


class FluentEmoji(Section):
    """The Fluent Emoji packages.

    All skin tones of an emoji form one group. They come after the emoji without a skin tone, so that deduplication
    keeps the latter.
    """

    kind: Literal["fluent_emoji"]
    packages: str | None = Field(None, description="path, glob or braces of the .tgz files; null: fetched with npm")
    cache: Path = Field(CACHE, description="folder for fetched packages")
    skin_tones: bool = Field(True, description="false: emoji with a skin tone are dropped")
    captions: Literal["required"] = "required"

    def references(self, work: Path) -> list[Reference]:
        """
        Raises:
            MobiusError: a package is missing, or cannot be fetched.
        """
        paths = archives.paths_of(self.packages) if self.packages else fetch_packages(self.cache.expanduser())
        references = [self._named(reference) for path in paths for reference in archives.references(path, work, 2**32)]
        return sorted(references, key=lambda reference: (emoji.has_skin_tone(reference.key), reference.key))

    def _named(self, reference: Reference) -> Reference:
        name = Path(reference.origin)
        if reference.problem is None and name.suffix in CLIP_SUFFIXES:
            reference.key, reference.group = name.stem, emoji.family(name.stem)
            reference.labels = [reference.group]
            reference.caption = emoji.names(name.stem)
            if reference.caption is None:
                reference.problem = Drop(STAGE, "no name", "not in the package emoji")
            elif emoji.has_skin_tone(name.stem) and not self.skin_tones:
                reference.problem = Drop(STAGE, "skin tone", "the source has skin_tones: false")
        return reference


def fetch_packages(cache: Path) -> list[Path]:
    """Download missing packages to `cache` with npm; return the paths of all four .tgz files.

    Raises:
        MobiusError: npm is missing or fails, or a downloaded package has an unexpected sha256.
    """
    paths = [cache / f"{name[1:].replace('/', '-')}-{VERSION}.tgz" for name in PACKAGES]
    for name, archive in zip(PACKAGES, paths, strict=True):
        if archive.exists():
            continue
        npm = shutil.which("npm")
        if npm is None:
            raise MobiusError(
                f"npm is not installed and {archive} is missing: install npm, or download {name}@{VERSION} on another"
                " machine and set the source's `packages` to all four .tgz files"
            )
        partial = cache / "downloading"
        partial.mkdir(parents=True, exist_ok=True)
        command = [npm, "pack", f"{name}@{VERSION}", "--pack-destination", str(partial)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode or not (partial / archive.name).exists():
            raise MobiusError(f"npm pack {name}@{VERSION} failed: {result.stderr.strip() or result.stdout.strip()}")
        digest = sha256(partial / archive.name)
        if digest != PACKAGES[name]:
            raise MobiusError(f"{partial / archive.name} has sha256 {digest}, expected {PACKAGES[name]}: not used")
        (partial / archive.name).replace(archive)
    return paths
