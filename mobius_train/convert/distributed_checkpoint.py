"""Full weights from a torch.distributed.checkpoint folder, as FSDP training writes it.

Its `.metadata` is a pickle, and torch's reader runs any code in it. The unpickler here can only create the types of
metadata. The tensor files are read with torch's own reader, which accepts only tensors.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.serialization import _get_layout

from mobius_train.convert.lazy_weights import Weights
from mobius_train.errors import MobiusError
from mobius_train.pretrained.pickles import UNREADABLE, RestrictedUnpickler, unreadable_file

METADATA = ".metadata"
ALLOWED: dict[str, Any] = {
    **{
        f"torch.distributed.checkpoint.metadata.{kind.__name__}": kind
        for kind in (
            metadata.Metadata,
            metadata.MetadataIndex,
            metadata.TensorStorageMetadata,
            metadata.BytesStorageMetadata,
            metadata.ChunkStorageMetadata,
            metadata.TensorProperties,
            metadata.StorageMeta,
            metadata._MEM_FORMAT_ENCODING,
        )
    },
    "torch.distributed.checkpoint.filesystem._StorageInfo": filesystem._StorageInfo,
    "torch.serialization._get_layout": _get_layout,
    "torch.Size": torch.Size,
    "collections.OrderedDict": dict,
    # The original path of the checkpoint.
    **{
        f"{module}.{name}Path": PurePosixPath
        for module in ("pathlib", "pathlib._local")
        for name in ("Posix", "Windows")
    },
    **{str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)},
}


@dataclass(frozen=True)
class DistributedWeights:
    """The tensors of one entry of the saved state, and a list of its other contents."""

    weights: Weights
    entry: str
    left_out: list[tuple[str, str]]


def open_distributed(folder: Path, entry: str) -> DistributedWeights:
    """Open a folder with a `.metadata` file.

    Args:
        entry: the entry of the saved dictionary that contains the weights; ignored if the dictionary is the weights.

    Raises:
        MobiusError: a file is missing, damaged or contains code (names the file); or there is no such entry.
    """
    reader = _Reader(folder)
    described = reader.read_metadata()
    paths: dict[str, Any] = described.planner_data or {}
    names: dict[str, str] = {}
    others: Counter[str] = Counter()
    nested = any(len(paths.get(name, (name,))) > 1 for name in described.state_dict_metadata)
    for name in described.state_dict_metadata:
        top, *rest = paths.get(name, (name,))
        if nested and top != entry:
            others[str(top)] += 1
        else:
            names[name] = ".".join(map(str, rest)) if nested else name
    if not names:
        contents = ", ".join(sorted(others)) or "nothing"
        raise MobiusError(f"{folder} contains {contents}, but no {entry!r}: select the weights with --weights")
    left_out = [(f"{top} ({count} entries)", f"not the weights, which are in {entry}") for top, count in others.items()]
    tensors = {}
    for name, short in names.items():
        about = described.state_dict_metadata[name]
        if isinstance(about, metadata.TensorStorageMetadata):
            tensors[name] = torch.empty(about.size, dtype=about.properties.dtype, device="meta")
        else:
            left_out.append((short, "pickled bytes instead of a tensor"))
    if not tensors:
        raise MobiusError(f"{folder} contains no tensors in {entry!r}: select the weights with --weights")

    def read() -> Iterator[tuple[str, Tensor]]:
        for name, meta in tensors.items():
            yield names[name], reader.tensor(name, meta)

    return DistributedWeights(Weights({names[name]: meta for name, meta in tensors.items()}, read), entry, left_out)


class _Reader(FileSystemReader):
    """torch's reader with an unpickler that only creates metadata types."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._folder = folder
        self._metadata = self._unpickle()

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        return self._metadata

    def tensor(self, name: str, meta: Tensor) -> Tensor:
        """Assemble one tensor from the ranks' shards."""
        try:
            whole = torch.empty_like(meta, device="cpu")
            with warnings.catch_warnings():
                # It warns that there is no process group, which is intended here.
                warnings.simplefilter("ignore")
                dcp.load({name: whole}, storage_reader=self, no_dist=True)
        except (*UNREADABLE, dcp.CheckpointException) as error:
            files = sorted({info.relative_path for index, info in self.storage_data.items() if index.fqn == name})
            places = ", ".join(str(self._folder / file) for file in files)
            cause = error.failures[0][0] if isinstance(error, dcp.CheckpointException) else error
            raise unreadable_file(Path(places), cause) from error
        return whole

    def _unpickle(self) -> metadata.Metadata:
        path = self._folder / METADATA
        try:
            with path.open("rb") as file:
                loaded = RestrictedUnpickler(file, ALLOWED).load()
            if not isinstance(loaded, metadata.Metadata):
                raise ValueError("it does not describe a checkpoint")
            storage = dict(loaded.storage_data)
            for info in storage.values():
                if (
                    Path(info.relative_path).name != info.relative_path
                    or not (self._folder / info.relative_path).is_file()
                ):
                    raise ValueError(f"it names {info.relative_path!r}, which is not a file in its folder")
                if getattr(info, "transform_descriptors", None):
                    raise ValueError("its tensors were written with storage extensions, which are not supported")
        except UNREADABLE as error:
            raise unreadable_file(path, error) from error
        if loaded.storage_meta is None:
            loaded.storage_meta = metadata.StorageMeta()
        return loaded
