"""Which stage of a training has begun last, from its folders alone."""

from __future__ import annotations

import re
from pathlib import Path

FILE = "stages.json"
_FOLDER = re.compile(r"(\d+)-.+")


def begun_folder(output_dir: Path) -> Path:
    """Return the folder of the last stage that has begun, or `output_dir` itself if it has no stages."""
    if not (output_dir / FILE).is_file():
        return output_dir
    begun = [(_number(path.parent), path.parent) for path in output_dir.glob("*/config.yaml")]
    return max((one for one in begun if one[0]), default=(0, output_dir))[1]


def _number(folder: Path) -> int:
    found = _FOLDER.fullmatch(folder.name)
    return int(found[1]) if found else 0
