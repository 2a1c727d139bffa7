"""Clips in the layout of the official VBench tool (`pip install vbench`), which measures what needs its own weights.

FOLDER/videos/<prompt>-<k>.mp4    k counts the clips of a prompt
FOLDER/prompts.json               {file: prompt}, for --prompt_file
FOLDER/full_info.json             prompts, dimensions and paths, as VBench writes it for own clips
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from mobius_train.evaluate.clips import EvaluatedClip
from mobius_train.media.video import write_mp4

# VBench's documentation lists these for own prompts.
OWN_CLIPS = (
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
)
MOST_BYTES = 200  # of a prompt in a file name; file systems allow 255 for the whole name


class VBenchLayout:
    """Writes clips one by one, then the files that list them.

    Args:
        folder: a new or temporary folder.
        place: where the folder will be when the tool runs.
    """

    def __init__(self, folder: Path, place: Path) -> None:
        self._folder, self._place = folder, place
        self._count: Counter[str] = Counter()
        self.prompts: dict[str, str] = {}
        (folder / "videos").mkdir(parents=True)

    def add(self, clip: EvaluatedClip, mp4: bytes | None = None) -> str:
        """Write a clip and return its file name.

        Args:
            mp4: the clip's own file, which is copied; without it the frames are encoded with `write_mp4`.
        """
        stem = _file_stem(clip.caption)
        name = f"{stem}-{self._count[stem]}.mp4"
        self._count[stem] += 1
        path = self._folder / "videos" / name
        if mp4 is None:
            write_mp4(clip.frames, path, clip.fps)
        else:
            path.write_bytes(mp4)
        self.prompts[name] = clip.caption
        return name

    def finish(self) -> None:
        """Write prompts.json and full_info.json."""
        videos = self._place.resolve() / "videos"
        info = [
            {"prompt_en": prompt, "dimension": list(OWN_CLIPS), "video_list": [str(videos / name)]}
            for name, prompt in self.prompts.items()
        ]
        for name, content in (("prompts.json", self.prompts), ("full_info.json", info)):
            (self._folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")


def _file_stem(prompt: str) -> str:
    """The prompt as a file name: it is exact unless the prompt is long or contains a slash."""
    name = prompt.replace("/", "-").replace("\0", " ").replace("\n", " ").lstrip(".")
    return name.encode()[:MOST_BYTES].decode(errors="ignore") or "clip"
