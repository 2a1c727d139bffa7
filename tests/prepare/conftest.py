from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
for library in ("cv2", "scenedetect", "rapidocr", "imagehash"):
    pytest.importorskip(library, reason="the extra is not installed: pip install 'mobius-train[data]'")
