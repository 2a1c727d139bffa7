"""What the client of Weights & Biases has written to disk without a network, read from its transaction log.

The log is LevelDB's (https://github.com/google/leveldb/blob/main/doc/log_format.md) behind a header of 7 bytes.
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, HEADER, CHUNK = 2**15, 7, struct.Struct("<IHB")
# Seconds for the last records.
PATIENCE = 20


def history(folder: Path) -> list[dict[str, Any]]:
    """The rows that the run in this folder has logged; a clip is a mapping."""
    rows: list[dict[str, Any]] = []
    for record in _records(folder):
        if record.HasField("history"):
            rows.append({})
            for item in record.history.item:
                *outer, name = item.nested_key or [item.key]
                target = rows[-1]
                for one in outer:
                    target = target.setdefault(one, {})
                target[name] = json.loads(item.value_json)
    return rows


def configuration(folder: Path) -> dict[str, Any]:
    """The configuration with which the run in this folder began."""
    runs = [record.run for record in _records(folder) if record.HasField("run")]
    return {item.key: json.loads(item.value_json) for item in runs[0].config.update}


def _records(folder: Path) -> list[Any]:
    """The records of a run that has ended. W&B's own process writes the last ones after `finish` has returned."""
    from wandb.proto import wandb_internal_pb2

    [path] = folder.glob("*.wandb")
    deadline = time.monotonic() + PATIENCE
    while True:
        records = [wandb_internal_pb2.Record.FromString(content) for content in _contents(path.read_bytes())]
        if any(record.HasField("exit") for record in records) or time.monotonic() > deadline:
            return records
        time.sleep(0.05)


def _contents(data: bytes) -> Iterator[bytes]:
    assert data[:4] in (b"", b":W&B")
    place, parts = HEADER, b""
    while place + CHUNK.size <= len(data):
        # No chunk begins in the last bytes of a block.
        left = BLOCK - place % BLOCK
        if left < CHUNK.size:
            place += left
            continue
        _, size, kind = CHUNK.unpack_from(data, place)
        place += CHUNK.size
        if place + size > len(data):
            return
        parts += data[place : place + size]
        place += size
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""
