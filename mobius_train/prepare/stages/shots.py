"""Shot segmentation with PySceneDetect's AdaptiveDetector.

https://www.scenedetect.com/docs/latest/api/detectors.html
"""

from __future__ import annotations

import copy
from typing import Literal

from pydantic import Field
from scenedetect import AdaptiveDetector, FrameTimecode

from mobius_train.prepare.candidate import Candidate, Frames
from mobius_train.prepare.stages.stage import Stage


class Shots(Stage):
    """Cuts clips at abrupt changes of the picture; every shot becomes a clip."""

    name: Literal["shots"]
    adaptive_threshold: float = Field(3.0, gt=0, description="ratio of a frame's change to that of its neighbours")
    min_content_val: float = Field(15.0, ge=0, description="smallest change at a cut, 0 to 255")
    min_scene_frames: int = Field(15, ge=1)
    window_width: int = Field(2, ge=1)

    def apply(self, clips: list[Candidate]) -> list[Candidate]:
        return [shot for clip in clips for shot in (self._cut(clip) if clip.dropped is None else [clip])]

    def _cut(self, clip: Candidate) -> list[Candidate]:
        frames, fps, start = clip.pixels, clip.fps or 1.0, clip.start or 0.0
        ends = [*self._cuts(frames, fps), len(frames)]
        shots = []
        for number, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
            shot = copy.deepcopy(clip) if len(ends) > 1 else clip
            if len(ends) > 1:
                shot.key = f"{clip.key}--shot{number:03d}"
            shot.frames = frames[begin:end]
            shot.start, shot.end = start + begin / fps, start + end / fps
            shot.scores["shots"] = {"shot": number, "of": len(ends)}
            shots.append(shot)
        return shots

    def _cuts(self, frames: Frames, fps: float) -> list[int]:
        detector = AdaptiveDetector(
            adaptive_threshold=self.adaptive_threshold,
            min_scene_len=self.min_scene_frames,
            window_width=self.window_width,
            min_content_val=self.min_content_val,
        )
        cuts: set[int] = set()
        for number, frame in enumerate(frames):
            timecode = FrameTimecode(number, float(fps))
            cuts.update(cut.frame_num for cut in detector.process_frame(timecode, frame[:, :, ::-1]))
        return sorted(cut for cut in cuts if 0 < cut < len(frames))
