"""What an attacker, a broken disk or a mistake puts in the place of a file."""

from __future__ import annotations

import base64
import os
import pickle
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch


class Planted:
    """Its pickle makes a file when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(3 * 2**30)


def _write(text: str, path: Path) -> None:
    path.write_text(text)


def _cut(content: bytes, share: float) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content[: int(len(content) * share)])


def replacements(content: bytes, marker: Path) -> dict[str, Callable[[Path], object]]:
    """What takes a file's place, by name; each is called with the file's path, at which there is nothing.

    Args:
        content: of the file.
        marker: the file that executed code makes.
    """
    chance = random.Random(len(content))
    payload = pickle.dumps(Planted(marker))
    middle = len(content) // 2
    texts = {
        "nested JSON": '{"a":' * 100_000,
        "nested list": "[" * 100_000,
        "integer of 5000 digits": '{"step": ' + "9" * 5000 + ', "world_size": ' + "9" * 5000 + "}",
        "NaN and Infinity": '{"step": NaN, "world_size": Infinity, "files": {"a": -Infinity}}',
        "lone surrogate": '{"step": "\\ud800", "caption": "\\ud800", "text": "\\ud800"}',
        "list for an object": "[1, 2, 3]",
        "null": "null",
        "alias bomb": "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9) if n else 'x'}]\n" for n in range(12)),
        "YAML that runs a command": f"!!python/object/apply:os.system ['touch {marker}']",
        "git-lfs pointer": "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 12345\n",
        "web page": "<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "billion of ranks": '{"step": 2, "world_size": 1000000000, "files": {}}',
    }
    return {
        "empty": lambda path: path.write_bytes(b""),
        "first half": _cut(content, 0.5),
        "without its end": _cut(content, 0.99),
        "zeros": lambda path: path.write_bytes(bytes(len(content))),
        "zeros in the middle": lambda path: path.write_bytes(content[:middle] + bytes(64) + content[middle + 64 :]),
        "noise": lambda path: path.write_bytes(chance.randbytes(4096)),
        "pickle": lambda path: path.write_bytes(payload),
        "pickle in base64": lambda path: path.write_bytes(base64.b64encode(payload)),
        "torch file": lambda path: torch.save({"state_dict": Planted(marker)}, path),
        "twice": lambda path: path.write_bytes(content + content),
        "3 GB of zeros": _sparse,
        "pipe": lambda path: os.mkfifo(path),
        "endless device": lambda path: path.symlink_to("/dev/zero"),
        "link to itself": lambda path: path.symlink_to(path.name),
        "folder": lambda path: path.mkdir(),
        "safetensors header of 2^60 bytes": lambda path: path.write_bytes((2**60).to_bytes(8, "little") + b"{}"),
        **{name: partial(_write, text) for name, text in texts.items()},
    }
