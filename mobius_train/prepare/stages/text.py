"""OCR of text in the picture: drops clips with text, or paints the text over.

The rule is Mobius's. A text counts if its score is above 0.4 and it has at least 4 letters. A frame has text if such
texts cover more than 2% of it. A clip has text if more than one of its frames has text.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mobius_train.errors import MobiusError
from mobius_train.prepare.candidate import Candidate, Dropped, Frames
from mobius_train.prepare.stages import onnx
from mobius_train.prepare.stages.stage import ClipStage

Mask = NDArray[np.uint8]  # (H, W), 255 where there is text


@lru_cache(maxsize=4)
def _reader(side: int, score: float) -> Any:
    """RapidOCR with the Chinese and English models of its wheel, and one thread, because parts run in parallel."""
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
    """Clips with text are dropped, inpainted or only scored, depending on `action`."""

    name: Literal["text"]
    action: Literal["drop", "remove", "score"] = "drop"
    score: float = Field(0.4, ge=0, le=1, description="smallest score of a text that counts")
    length: int = Field(4, ge=1, description="smallest number of letters of a text that counts")
    area: float = Field(0.02, ge=0, le=1, description="a frame has text if text covers more than this share of it")
    frames: int = Field(1, ge=0, description="a clip has text if more than this many frames have text")
    look_at: int = Field(4, ge=1, description="evenly spaced frames to read; reading stops once the result is certain")
    side: int = Field(320, ge=32, description="for detection, longer sides are scaled down to this many pixels")
    grow: int = Field(3, ge=0, description="pixels around a text that are also painted over")
    lama: Path | None = Field(
        None, description="a LaMa with image and mask as .onnx, used instead of Telea's inpainting"
    )

    def check(self) -> None:
        if self.lama is not None:
            onnx.check(self.lama, inputs=2)

    def process(self, clip: Candidate) -> None:
        frames = clip.pixels
        count = min(self.look_at, len(frames))
        shares: list[float] = []
        with_text = 0
        for left in range(count, 0, -1):
            decided = with_text > self.frames or with_text + left <= self.frames
            if decided and self.action != "score":
                break
            shares.append(float((self._mask(frames[(count - left) * len(frames) // count]) > 0).mean()))
            with_text += shares[-1] > self.area
        clip.scores[self.name] = {"frames": with_text, "area": round(max(shares, default=0.0), 4)}
        if with_text <= self.frames or self.action == "score":
            return
        if self.action == "drop":
            raise Dropped("text", f"up to {max(shares):.1%} of a frame, in {with_text} of {len(shares)} frames")
        clip.frames = np.stack([self._removed(frame) for frame in frames])
        clip.notes.append("text removed")

    def _mask(self, frame: Frames) -> Mask:
        mask = np.zeros(frame.shape[:2], np.uint8)
        result = _reader(self.side, self.score)(np.ascontiguousarray(frame[:, :, ::-1]))
        if result.boxes is None or result.txts is None:
            return mask
        for box, text, score in zip(result.boxes, result.txts, result.scores, strict=True):
            if score >= self.score and len(text.strip()) >= self.length:
                cv2.fillPoly(mask, [np.round(np.asarray(box)).astype(np.int32)], 255)
        return mask

    def _removed(self, frame: Frames) -> Frames:
        mask = self._mask(frame)
        if not mask.any():
            return frame
        if self.grow:
            mask = cv2.dilate(mask, np.ones((2 * self.grow + 1,) * 2, np.uint8)).astype(np.uint8)
        if self.lama is not None:
            return _by_lama(self.lama, frame, mask)
        # https://www.researchgate.net/publication/238183352 (Telea 2004)
        return cv2.inpaint(frame, mask, 5, cv2.INPAINT_TELEA).astype(np.uint8, copy=False)


def _by_lama(path: Path, frame: Frames, mask: Mask) -> Frames:
    """Inpaint with LaMa (https://arxiv.org/abs/2109.07161); only pixels under the mask change.

    The model has the format of https://github.com/opencv/opencv_zoo: image from 0 to 1, mask 0 or 1.
    """
    height, width = onnx.size(path, (frame.shape[0], frame.shape[1]))
    image = cv2.resize(frame, (width, height)).transpose(2, 0, 1)[None].astype(np.float32) / 255
    hole = (cv2.resize(mask, (width, height)) > 0).astype(np.float32)[None, None]
    session = onnx.session(path)
    names = (value.name for value in session.get_inputs())
    [painted, *_] = session.run(None, dict(zip(names, (image, hole), strict=True)))
    if painted.shape != image.shape:
        raise MobiusError(f"{path} outputs {painted.shape} instead of a picture of {image.shape}")
    full = cv2.resize(painted[0].transpose(1, 2, 0).clip(0, 255), (frame.shape[1], frame.shape[0]))
    return np.where(mask[:, :, None] > 0, full.round().astype(np.uint8), frame)
