"""Text in the picture, by OCR: clips that show it are dropped, or it is painted over.

The rule is Mobius's: a text counts with a score above 0.4 and 4 letters or more; a frame has text if such texts cover
more than 2% of it; a clip if more than one of its frames has.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mobius_train.prepare.clip import Clip, Dropped, Frames
from mobius_train.prepare.stages.stage import ClipStage

Mask = NDArray[np.uint8]  # (H, W), 255 where there is text


@lru_cache(maxsize=4)
def _reader(side: int, score: float) -> Any:
    """RapidOCR, whose Chinese and English models are part of its wheel; one thread, for parts run side by side."""
    from rapidocr import RapidOCR

    logging.getLogger("RapidOCR").setLevel(logging.ERROR)
    threads = "EngineConfig.onnxruntime"
    return RapidOCR(
        params={
            "Global.log_level": "error",
            "Global.use_cls": False,
            "Global.text_score": score,
            "Det.limit_type": "max",
            "Det.limit_side_len": side,
            f"{threads}.intra_op_num_threads": 1,
            f"{threads}.inter_op_num_threads": 1,
        }
    )


class Text(ClipStage):
    """`action` says what becomes of clips with text: dropped, cleaned by inpainting, or only scored."""

    name: Literal["text"]
    action: Literal["drop", "remove", "score"] = "drop"
    score: float = Field(0.4, ge=0, le=1, description="of a text that counts, at least")
    length: int = Field(4, ge=1, description="letters of a text that counts, at least")
    area: float = Field(0.02, ge=0, le=1, description="a frame has text if more than this share of it is")
    frames: int = Field(1, ge=0, description="a clip has text if more frames than this have")
    look_at: int = Field(4, ge=1, description="frames that are read, evenly chosen; removing text reads all")
    side: int = Field(320, ge=32, description="pixels that longer frames are scaled down to for detection")
    grow: int = Field(3, ge=0, description="pixels around a text that are painted over with it")

    def process(self, clip: Clip) -> None:
        frames = clip.pixels
        count = min(self.look_at, len(frames))
        masks = [self._mask(frames[number * len(frames) // count]) for number in range(count)]
        shares = [float((mask > 0).mean()) for mask in masks]
        with_text = sum(share > self.area for share in shares)
        clip.scores[self.name] = {"frames": with_text, "area": round(max(shares), 4)}
        if with_text <= self.frames or self.action == "score":
            return
        if self.action == "drop":
            raise Dropped("text", f"{max(shares):.1%} of a frame, in {with_text} of {count}")
        clip.frames = np.stack([self._removed(frame) for frame in frames])
        clip.notes.append("text removed")

    def _mask(self, frame: Frames) -> Mask:
        mask = np.zeros(frame.shape[:2], np.uint8)
        found = _reader(self.side, self.score)(np.ascontiguousarray(frame[:, :, ::-1]))
        if found.boxes is None or found.txts is None:
            return mask
        for box, text, score in zip(found.boxes, found.txts, found.scores, strict=True):
            if score >= self.score and len(text.strip()) >= self.length:
                cv2.fillPoly(mask, [np.round(np.asarray(box)).astype(np.int32)], 255)
        return mask

    def _removed(self, frame: Frames) -> Frames:
        mask = self._mask(frame)
        if not mask.any():
            return frame
        if self.grow:
            mask = cv2.dilate(mask, np.ones((2 * self.grow + 1,) * 2, np.uint8)).astype(np.uint8)
        # https://www.researchgate.net/publication/238183352 (Telea 2004)
        return cv2.inpaint(frame, mask, 5, cv2.INPAINT_TELEA).astype(np.uint8, copy=False)
