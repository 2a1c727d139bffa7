"""The peak memory of a consolidation, in a process of its own, which this file is too.

    consolidation_memory.py <source> <output>

It prints how many bytes the process grew.
"""

from __future__ import annotations

import sys
from pathlib import Path

from mobius_train.convert.consolidate import consolidate_checkpoint


def peak_over_output(source: Path, output: Path) -> float:
    """How many times the size of the written file the process grew."""
    # Of the tests' process alone.
    from launching import python

    result = python(__file__, source, output)
    assert result.returncode == 0, result.stderr
    return int(result.stdout.split()[-1]) / output.stat().st_size


def _status(key: str) -> int:
    """Bytes, from a line of the kernel's table of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if key in line)


if __name__ == "__main__":
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    consolidate_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]))
    print(_status("VmHWM") - before)
