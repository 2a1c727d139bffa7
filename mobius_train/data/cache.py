"""Latents and text embeddings, computed once and read back.

A cache folder belongs to an identity (clips, decoding, the encoders' weights): another one is another folder, and an
identity.json inside says what each part of it was. It is built in parts of `PART` clips, each written under a
temporary name and renamed, so that an interrupted build goes on where it stopped and ranks never wait for each other
inside a part.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from mobius_train.conditions import Conditions
from mobius_train.data.batch import EncodedClip
from mobius_train.errors import MobiusError
from mobius_train.files import publish, remove_killed, replace_file

PART = 64
IDENTITY = "identity.json"


def folder_of(root: Path, name: str, identity: dict[str, str]) -> Path:
    """Where the cache of this identity lies."""
    return root / f"{name}-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]}"


def open_built(root: Path, name: str, identity: dict[str, str]) -> LatentCache:
    """The whole cache of this identity, built before.

    Raises:
        MobiusError: there is none, and what the nearest one differs in.
    """
    folder = folder_of(root, name, identity)
    if folder.is_dir():
        return LatentCache(folder)
    parts = differing(root, name, identity)
    found = f"the nearest one differs in: {', '.join(parts)}" if parts else "none is there"
    raise MobiusError(
        f"no latent cache of the {name} clips fits in {root}: {found}. Make one by tools/cache_latents.py with the same"
        " recipe, or let the run make it by data.cache_required=false"
    )


def differing(root: Path, name: str, identity: dict[str, str]) -> list[str]:
    """The parts of the identity in which the nearest of the caches there differs; none where no other one is."""
    others = [_identity(path) for path in sorted(root.glob(f"{name}-*/{IDENTITY}"))]
    found = ([part for part in identity if other.get(part) != identity[part]] for other in others)
    return min(found, key=len, default=[])


def _identity(path: Path) -> dict[str, str]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise MobiusError(f"{path} cannot be read: {error}; delete its folder") from error


def _part(folder: Path, number: int) -> Path:
    return folder / f"part-{number:06d}.safetensors"


def build(
    folder: Path,
    keys: list[str],
    encode: Callable[[int], EncodedClip],
    *,
    share: int = 0,
    shares: int = 1,
    name: str = "clips",
    identity: dict[str, str] | None = None,
) -> None:
    """Write one share's missing parts; `encode(i)` gives clip i. No communication: place a barrier after it."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_killed(folder)
    starts = range(0, len(keys), PART)
    missing = [
        (number, start)
        for number, start in enumerate(starts)
        if number % shares == share and not _part(folder, number).exists()
    ]
    with tqdm(
        total=sum(min(PART, len(keys) - start) for _, start in missing),
        desc=f"encoding {name}",
        unit="clip",
        disable=share != 0 or not missing,
    ) as bar:
        for number, start in missing:
            tensors: dict[str, Tensor] = {}
            for index in range(start, min(start + PART, len(keys))):
                tensors |= _tensors_of(index, encode(index))
                bar.update()
            publish(_part(folder, number), partial(save_file, tensors))
    if share == 0:
        replace_file(folder / IDENTITY, json.dumps(identity or {}, indent=1) + "\n")
        replace_file(folder / "keys.json", json.dumps(keys))


def _tensors_of(index: int, clip: EncodedClip) -> dict[str, Tensor]:
    """What a part holds of clip `index`: a condition of its caption number k, from 1, has `.k` after its name."""
    named = {"mean": clip.mean, "std": clip.std} | clip.conditions.tensors
    for caption, conditions in enumerate(clip.variants, start=1):
        named |= {f"{name}.{caption}": tensor for name, tensor in conditions.tensors.items()}
    return {f"{index}.{name}": tensor.cpu().contiguous() for name, tensor in named.items()}


class LatentCache:
    """A built cache as a map-style data set of `EncodedClip`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.keys: list[str] = json.loads((folder / "keys.json").read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise MobiusError(f"{folder} is no complete latent cache: start again to build the rest") from error
        absent = [p for n in range(-(-len(self.keys) // PART)) if not (p := _part(folder, n)).exists()]
        if absent:
            raise MobiusError(
                f"the latent cache misses {absent[0]} and {len(absent) - 1} more: start again to build them"
            )

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def _open(self) -> dict[int, Any]:
        return {}

    @cached_property
    def _conditions(self) -> list[str]:
        """Names of the conditions, which all clips have."""
        names = [name.removeprefix("0.") for name in self._part(0).keys() if name.startswith("0.")]  # noqa: SIM118
        return sorted(name for name in names if name not in ("mean", "std") and "." not in name)

    def _part(self, number: int) -> Any:
        if number not in self._open:
            self._open[number] = safe_open(_part(self.folder, number), framework="pt")
        return self._open[number]

    def __getitem__(self, index: int) -> EncodedClip:
        """Clip `index` with its first caption."""
        return self.read(index, 0)

    def read(self, index: int, caption: int) -> EncodedClip:
        """Clip `index` with its caption of that number."""
        part, ending = self._part(index // PART), f".{caption}" if caption else ""
        mean, std = (part.get_tensor(f"{index}.{name}") for name in ("mean", "std"))
        conditions = {name: part.get_tensor(f"{index}.{name}{ending}") for name in self._conditions}
        return EncodedClip(self.keys[index], mean, std, Conditions(conditions))
