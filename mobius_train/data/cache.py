"""A disk cache of latents and text embeddings.

A cache folder belongs to one identity (clips, decoding, the encoders' weights), which its identity.json records; a
different identity gets a different folder. The cache is built in parts of `PART` clips. Each part is written under a
temporary name and renamed, so an interrupted build resumes at the first missing part, and ranks do not wait for each
other within a part.

A part holds a hash of its tensors, of its number and of the identity. Each start reads all parts once, divided among
the ranks, and encodes again what is damaged.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mobius_train.bars import progress
from mobius_train.conditions import Conditions
from mobius_train.data.batch import EncodedClip
from mobius_train.errors import MobiusError
from mobius_train.files import (
    json_pieces,
    open_regular,
    publish,
    read_small_json,
    remove_any,
    remove_killed,
    replace_file,
    sha256,
)

logger = logging.getLogger(__name__)

PART = 64
# Parts that a process keeps open. Each is a memory map and tens of kilobytes of header; Linux allows 65530 maps.
OPEN = 1024
IDENTITY, KEYS = "identity.json", "keys.json"
# The name of the hash in a part's metadata.
SHA256 = "sha256"

Identity = dict[str, str]


def folder_of(root: Path, name: str, identity: Identity) -> Path:
    """The folder of the cache with this identity."""
    return root / f"{name}-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]}"


def open_built(
    root: Path, name: str, identity: Identity, keys: Sequence[str], share: int = 0, shares: int = 1
) -> LatentCache:
    """Open the complete cache of this identity, after a check of one share of its parts.

    Raises:
        MobiusError: there is none, with the difference from the most similar cache; or a part is damaged.
    """
    folder = folder_of(root, name, identity)
    remedy = "Run tools/cache_latents.py with this recipe, or set data.cache_required=false"
    if folder.is_dir():
        if damaged := check_parts(folder, keys, identity, share, shares):
            listed = "\n".join(f"  - {part_path(folder, number)}: {problem}" for number, problem in damaged.items())
            raise MobiusError(f"{len(damaged)} parts of the latent cache are damaged. {remedy}:\n{listed}")
        return open_checked(root, name, identity, keys)
    parts = differing(root, name, identity)
    closest = f"the nearest one differs in: {', '.join(parts)}" if parts else "there is no cache"
    raise MobiusError(
        f"no latent cache in {root} matches the {name} clips: {closest}. {remedy} to build the cache in the run"
    )


def open_checked(root: Path, name: str, identity: Identity, keys: Sequence[str]) -> LatentCache:
    """Open the complete cache of this identity, whose parts have been checked.

    Raises:
        MobiusError: it is incomplete, or of other clips.
    """
    return LatentCache(folder_of(root, name, identity), keys)


def differing(root: Path, name: str, identity: Identity) -> list[str]:
    """The parts of the identity that differ from the most similar cache in `root`; empty if there is no cache."""
    others = [_read_identity(path) for path in sorted(root.glob(f"{name}-*/{IDENTITY}"))]
    differences = ([part for part in identity if other.get(part) != identity[part]] for other in others)
    return min(differences, key=len, default=[])


def _read_identity(path: Path) -> dict[str, Any]:
    """The identity in a file; empty if it is missing or damaged."""
    try:
        values = read_small_json(path)
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def part_path(folder: Path, number: int) -> Path:
    """The file of a part."""
    return folder / f"part-{number:06d}.safetensors"


def check_parts(
    folder: Path, keys: Sequence[str], identity: Identity, share: int = 0, shares: int = 1, name: str = "clips"
) -> dict[int, str]:
    """Return the parts of one share that must be encoded, with the reason, which is empty for a part not yet built."""
    started, size, found = time.perf_counter(), 0, {}
    numbers = range(share, -(-len(keys) // PART), shares)
    for number in numbers:
        path = part_path(folder, number)
        problem = _problem(path, number, identity)
        if problem is not None:
            found[number] = problem
        else:
            size += path.stat().st_size
    if share == 0 and len(found) < len(numbers):
        of_rank = f" of this rank's {len(numbers)}" if shares > 1 else ""
        good, seconds = len(numbers) - len(found), time.perf_counter() - started
        print(
            f"latent cache of the {name}: {good} parts{of_rank} are as they were written"
            f" ({size / 1e9:.2f} GB, {seconds:.1f} s)",
            flush=True,
        )
    return found


def _problem(path: Path, number: int, identity: Identity) -> str | None:
    """Return what is wrong with a part, an empty text if there is none of this name; None for a good part."""
    try:
        # A pipe or a device would block safe_open.
        open_regular(path).close()
        with safe_open(path, framework="pt") as file:
            expected = (file.metadata() or {}).get(SHA256)
            if expected is None:
                return "no hash: an older version wrote it"
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except FileNotFoundError:
        return ""
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        return str(error)
    return None if _hash(tensors, number, identity) == expected else "its content does not match its hash"


def _hash(tensors: dict[str, Tensor], number: int, identity: Identity) -> str:
    digest = hashlib.sha256(json.dumps([identity, number], sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def build(
    folder: Path,
    keys: Sequence[str],
    encode: Callable[[int], EncodedClip],
    *,
    share: int = 0,
    shares: int = 1,
    name: str = "clips",
    identity: Identity | None = None,
) -> None:
    """Write the missing and damaged parts of one share; `encode(i)` returns clip i.

    Ranks must be synchronised afterwards.

    Raises:
        MobiusError: a file cannot be written.
    """
    identity = identity or {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_killed(folder)
        missing = check_parts(folder, keys, identity, share, shares, name)
        for number, problem in missing.items():
            if problem:
                logger.warning("%s: %s; its clips are encoded again", part_path(folder, number), problem)
        with progress(
            total=sum(min(PART, len(keys) - number * PART) for number in missing),
            desc=f"encoding {name}",
            unit="clip",
            disable=share != 0 or not missing,
        ) as bar:
            for number in missing:
                tensors: dict[str, Tensor] = {}
                for index in range(number * PART, min((number + 1) * PART, len(keys))):
                    tensors |= _tensors_of(index, encode(index))
                    bar.update()
                path = part_path(folder, number)
                if path.is_dir():
                    remove_any(path)
                publish(path, partial(_save, tensors, {SHA256: _hash(tensors, number, identity)}))
        if share == 0:
            replace_file(folder / IDENTITY, json.dumps(identity, indent=1) + "\n")
            publish(folder / KEYS, partial(_write_keys, keys))
    except OSError as error:
        where = error.filename or folder
        raise MobiusError(
            f"cannot write the latent cache {where}: {error.strerror or error}: free space, or change data.cache_dir"
        ) from error


def _write_keys(keys: Sequence[str], path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json_pieces(keys))


def _lists(path: Path, keys: Sequence[str]) -> bool:
    """The file lists exactly these keys. Neither list is in memory as a whole: there can be millions."""
    expected, size = hashlib.sha256(), 0
    for text in json_pieces(keys):
        piece = text.encode()
        expected.update(piece)
        size += len(piece)
    try:
        # A damaged file can be of any size.
        return path.stat().st_size == size and sha256(path) == expected.hexdigest()
    except OSError:
        return False


def _save(tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:  # a full disk
        raise OSError(0, str(error), str(path)) from error


def _tensors_of(index: int, clip: EncodedClip) -> dict[str, Tensor]:
    """The tensors of clip `index` in its part. Conditions of caption k ≥ 1 have the suffix `.k`."""
    named = {"mean": clip.mean, "std": clip.std} | clip.conditions.tensors
    for caption, conditions in enumerate(clip.variants, start=1):
        named |= {f"{name}.{caption}": tensor for name, tensor in conditions.tensors.items()}
    return {f"{index}.{name}": tensor.cpu().contiguous() for name, tensor in named.items()}


class LatentCache:
    """A complete cache as a map-style data set of `EncodedClip`.

    Args:
        keys: of its clips.

    Raises:
        MobiusError: it is incomplete, or of other clips.
    """

    def __init__(self, folder: Path, keys: Sequence[str]) -> None:
        self.folder, self.keys = folder, keys
        if not _lists(folder / KEYS, keys):
            raise MobiusError(
                f"{folder / KEYS} is missing, damaged or does not list the {len(keys)} clips: restart with"
                " data.cache_required=false to build the rest"
            )
        absent = [p for n in range(-(-len(self.keys) // PART)) if not (p := part_path(folder, n)).exists()]
        if absent:
            raise MobiusError(
                f"the latent cache lacks {absent[0]} and {len(absent) - 1} more files: restart to build them"
            )

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def _conditions(self) -> list[str]:
        """Names of the conditions, the same for all clips."""
        names = [name.removeprefix("0.") for name in self._part(0).keys() if name.startswith("0.")]  # noqa: SIM118
        return sorted(name for name in names if name not in ("mean", "std") and "." not in name)

    @cached_property
    def _part(self) -> Callable[[int], Any]:
        """Opens a part by its number; made in the process that reads, since no open file can be pickled."""
        return lru_cache(OPEN)(lambda number: safe_open(part_path(self.folder, number), framework="pt"))

    def __getitem__(self, index: int) -> EncodedClip:
        """Return clip `index` with its first caption."""
        return self.read(index, 0)

    def read(self, index: int, caption: int, place: Fraction | None = None) -> EncodedClip:
        """Return clip `index` with caption number `caption`.

        Args:
            place: None; a recipe with random windows has no cache.

        Raises:
            MobiusError: the part has been removed or damaged since the start.
        """
        assert place is None
        try:
            part, ending = self._part(index // PART), f".{caption}" if caption else ""
            mean, std = (part.get_tensor(f"{index}.{name}") for name in ("mean", "std"))
            conditions = {name: part.get_tensor(f"{index}.{name}{ending}") for name in self._conditions}
        except (OSError, SafetensorError) as error:
            raise MobiusError(f"{part_path(self.folder, index // PART)}: {error}: restart to build it again") from error
        return EncodedClip(self.keys[index], mean, std, Conditions(conditions))
