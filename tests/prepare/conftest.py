from __future__ import annotations

import pytest

for library in ("cv2", "scenedetect", "rapidocr", "imagehash"):
    pytest.importorskip(library, reason="the extra is not installed: pip install 'mobius-train[data]'")
