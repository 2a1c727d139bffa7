"""The peak memory of a consolidation, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from launching import clean_environment

MEASURE = """
import sys
from pathlib import Path
from mobius_train.convert.consolidate import consolidate_checkpoint

def status(key):
    return next(int(l.split()[1]) * 1024 for l in Path("/proc/self/status").read_text().splitlines() if key in l)

before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
consolidate_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]))
print(status("VmHWM") - before)
"""


def peak_over_output(source: Path, output: Path) -> float:
    """How many times the size of the written file the process grew."""
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(source), str(output)],
        capture_output=True,
        text=True,
        check=True,
        env=clean_environment(),
    )
    return int(result.stdout.split()[-1]) / output.stat().st_size
