"""Dense optical flow by OpenCV's DIS (https://arxiv.org/abs/1603.03590), which needs no weights.

OpenCV comes with the optional extra `data`. On translations of 1 and 3 pixels of textured frames the median flow of
OpenCV's preset MEDIUM is 1.00 and 3.00, and that of FAST, with which recipes of preparation set thresholds, 1.12 and
2.89.

Legend: F frames, H, W pixels; a flow is (H, W, 2) float32, the displacement in pixels, right and down.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

FAST, MEDIUM = cv2.DISOPTICAL_FLOW_PRESET_FAST, cv2.DISOPTICAL_FLOW_PRESET_MEDIUM
FASTEST = 0.05  # the share of pixels that VBench's dynamic degree averages (https://arxiv.org/abs/2311.17982)
Frame = NDArray[np.uint8]  # (H, W, 3) RGB
Flow = NDArray[np.float32]


@lru_cache(maxsize=2)
def _dis(preset: int) -> Any:
    return cv2.DISOpticalFlow.create(preset)


def dis_flow(before: Frame, after: Frame, preset: int = MEDIUM) -> Flow:
    """The flow from one frame to another, both (H, W, 3) uint8 RGB."""
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in (before, after)]
    return np.asarray(_dis(preset).calc(*grey, None), np.float32)


def fastest_speed(flow: Flow) -> float:
    """Mean length of the largest 5 % of a flow's displacements, in pixels."""
    speeds = np.sort(np.linalg.norm(flow, axis=2), axis=None)
    return float(speeds[-max(1, int(len(speeds) * FASTEST)) :].mean())


def middle_frame(before: Frame, after: Frame) -> NDArray[np.float32]:
    """The frame halfway between two, (H, W, 3) float32, by linear motion along the flows of both directions.

    With t = 1/2 in Eq. 4 of https://arxiv.org/abs/1712.00080 the flow from the middle to the first frame is
    (F_10 - F_01) / 4, and that to the second frame is its negative. Both warped frames count the same.
    """
    to_before = (dis_flow(after, before) - dis_flow(before, after)) * np.float32(0.25)
    return (_warp(before, to_before) + _warp(after, -to_before)) * np.float32(0.5)


def _warp(frame: Frame, flow: Flow) -> NDArray[np.float32]:
    """Sample a frame at x + flow(x), bilinearly; positions outside take the nearest border pixel."""
    height, width = flow.shape[:2]
    columns, rows = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    return np.asarray(
        cv2.remap(
            frame.astype(np.float32),
            columns + flow[..., 0],
            rows + flow[..., 1],
            cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_REPLICATE,
        ),
        np.float32,
    )
