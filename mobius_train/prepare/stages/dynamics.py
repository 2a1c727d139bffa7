"""Dynamic degree: the speed of the fastest parts of a clip, from dense optical flow.

The measure is VBench's dynamic degree (https://arxiv.org/abs/2311.17982): the mean of the largest 5% of the flow.
VBench uses RAFT. Here the flow is OpenCV's DIS, which needs no weights, or RAFT as .onnx in the format of
https://github.com/opencv/opencv_zoo/tree/main/models/optical_flow_estimation_raft.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from pydantic import Field

from mobius_train.errors import MobiusError
from mobius_train.metrics.optical_flow import FAST, Flow, dis_flow, fastest_speed
from mobius_train.prepare.candidate import Candidate, Dropped, Frames
from mobius_train.prepare.stages import onnx
from mobius_train.prepare.stages.stage import ClipStage


class Dynamics(ClipStage):
    """Scores `degree` in pixels per second at `width`, averaged over `pairs` evenly spaced pairs of adjacent frames."""

    name: Literal["dynamics"]
    width: int = Field(128, ge=16, description="width in pixels to which frames are scaled")
    pairs: int = Field(8, ge=1)
    minimum: float = Field(0.0, ge=0)
    maximum: float | None = Field(None, gt=0)
    raft: Path | None = Field(None, description="a RAFT with two inputs as .onnx, used instead of DIS")

    def check(self) -> None:
        if self.raft is not None:
            onnx.check(self.raft, inputs=2)

    def process(self, clip: Candidate) -> None:
        frames, fps = clip.pixels, clip.fps or 1.0
        if len(frames) < 2:
            raise Dropped("still")
        steps = len(frames) - 1
        chosen = sorted({number * steps // self.pairs for number in range(min(self.pairs, steps))})
        size = (self.width, max(16, round(frames.shape[1] * self.width / frames.shape[2])))
        fastest = []
        for number in chosen:
            before, after = (cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in frames[number:][:2])
            flow = dis_flow(before, after, FAST) if self.raft is None else _by_raft(self.raft, before, after)
            fastest.append(fastest_speed(flow))
        degree = float(np.mean(fastest)) * fps
        clip.scores[self.name] = {"degree": round(degree, 3)}
        if degree < self.minimum:
            raise Dropped("too little motion", f"{degree:.2f}")
        if self.maximum is not None and degree > self.maximum:
            raise Dropped("too much motion", f"{degree:.2f}")


def _by_raft(path: Path, before: Frames, after: Frames) -> Flow:
    """RAFT's flow. Frames are scaled to the model's input size, and the flow back to the size of the frames."""
    height, width = onnx.size(path, before.shape[:2])
    scaled = (
        cv2.resize(frame, (width, height)).transpose(2, 0, 1)[None].astype(np.float32) for frame in (before, after)
    )
    session = onnx.session(path)
    outputs = session.run(None, dict(zip((value.name for value in session.get_inputs()), scaled, strict=True)))
    flow = max(outputs, key=lambda output: output.shape[-1])  # the other output is coarse
    if flow.shape != (1, 2, height, width):
        raise MobiusError(f"{path} outputs {flow.shape} instead of a flow of (1, 2, {height}, {width})")
    return np.asarray(flow[0].transpose(1, 2, 0) * (before.shape[1] / width, before.shape[0] / height), np.float32)
