"""A disk cache of latents and text embeddings.

A cache folder belongs to one identity (clips, decoding, the encoders' weights), which its identity.json records; a
different identity gets a different folder. The cache is built in parts of `PART` clips. Each part is written under a
temporary name and renamed, so an interrupted build resumes at the first missing part, and ranks do not wait for each
other within a part.
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
    """The folder of the cache with this identity."""
    return root / f"{name}-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]}"


def open_built(root: Path, name: str, identity: dict[str, str]) -> LatentCache:
    """Open the complete cache of this identity.

    Raises:
        MobiusError: there is none; states how the most similar cache differs.
    """
    folder = folder_of(root, name, identity)
    if folder.is_dir():
        return LatentCache(folder)
    parts = differing(root, name, identity)
    closest = f"the nearest one differs in: {', '.join(parts)}" if parts else "there is no cache"
    raise MobiusError(
        f"no latent cache in {root} matches the {name} clips: {closest}. Run tools/cache_latents.py with this recipe,"
        " or set data.cache_required=false to build the cache in the run"
    )


def differing(root: Path, name: str, identity: dict[str, str]) -> list[str]:
    """The parts of the identity that differ from the most similar cache in `root`; empty if there is no cache."""
    others = [_identity(path) for path in sorted(root.glob(f"{name}-*/{IDENTITY}"))]
    differences = ([part for part in identity if other.get(part) != identity[part]] for other in others)
    return min(differences, key=len, default=[])


def _identity(path: Path) -> dict[str, str]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise MobiusError(f"cannot read {path}: {error}; delete its folder") from error


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
    """Write the missing parts of one share; `encode(i)` returns clip i. Ranks must be synchronised afterwards."""
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
    """The tensors of clip `index` in its part. Conditions of caption k ≥ 1 have the suffix `.k`."""
    named = {"mean": clip.mean, "std": clip.std} | clip.conditions.tensors
    for caption, conditions in enumerate(clip.variants, start=1):
        named |= {f"{name}.{caption}": tensor for name, tensor in conditions.tensors.items()}
    return {f"{index}.{name}": tensor.cpu().contiguous() for name, tensor in named.items()}


class LatentCache:
    """A complete cache as a map-style data set of `EncodedClip`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.keys: list[str] = json.loads((folder / "keys.json").read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise MobiusError(f"the latent cache {folder} is incomplete: restart to build the rest") from error
        absent = [p for n in range(-(-len(self.keys) // PART)) if not (p := _part(folder, n)).exists()]
        if absent:
            raise MobiusError(
                f"the latent cache lacks {absent[0]} and {len(absent) - 1} more files: restart to build them"
            )

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def _open(self) -> dict[int, Any]:
        return {}

    @cached_property
    def _conditions(self) -> list[str]:
        """Names of the conditions, the same for all clips."""
        names = [name.removeprefix("0.") for name in self._part(0).keys() if name.startswith("0.")]  # noqa: SIM118
        return sorted(name for name in names if name not in ("mean", "std") and "." not in name)

    def _part(self, number: int) -> Any:
        if number not in self._open:
            self._open[number] = safe_open(_part(self.folder, number), framework="pt")
        return self._open[number]

    def __getitem__(self, index: int) -> EncodedClip:
        """Return clip `index` with its first caption."""
        return self.read(index, 0)

    def read(self, index: int, caption: int) -> EncodedClip:
        """Return clip `index` with caption number `caption`."""
        part, ending = self._part(index // PART), f".{caption}" if caption else ""
        mean, std = (part.get_tensor(f"{index}.{name}") for name in ("mean", "std"))
        conditions = {name: part.get_tensor(f"{index}.{name}{ending}") for name in self._conditions}
        return EncodedClip(self.keys[index], mean, std, Conditions(conditions))
