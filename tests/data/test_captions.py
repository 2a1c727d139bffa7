"""Captions: one, or variants with weights, in every form that a clip can have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from clip_files import animation, write_tar

from mobius_train.data.captions import caption_of
from mobius_train.data.clips import open_clips
from mobius_train.errors import MobiusError


def _captions(caption: Any) -> list[tuple[str, float]]:
    return [tuple(one) for one in caption_of({"caption": caption}, "clip", "en")]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a dog ", [("a dog", 1)]),
        ({"en": "a dog", "zh": "狗"}, [("a dog", 1)]),
        (["a dog", "it runs"], [("a dog", 1), ("it runs", 1)]),
        (["a dog", {"text": "it runs", "weight": 3}], [("a dog", 1), ("it runs", 3)]),
        ({"zh": [], "en": [{"text": " a dog"}, {"text": "it runs", "weight": 0.5}]}, [("a dog", 1), ("it runs", 0.5)]),
        (["a dog", {"text": "it runs", "weight": 0}], [("a dog", 1)]),
        (["a dog", "it runs", " a dog"], [("a dog", 2), ("it runs", 1)]),
    ],
)
def test_captions_are_words_or_variants_in_a_language(caption: Any, expected: list[tuple[str, float]]) -> None:
    assert _captions(caption) == expected


@pytest.mark.parametrize(
    ("caption", "match"),
    [
        ([], "none of the 0 captions of clip"),
        ([{"text": "a", "weight": 0}, {"text": "b", "weight": 0.0}], "none of the 2 captions of clip has a weight"),
        ([{"text": "a", "weight": -1}], "a caption of clip has weight -1: .* 0"),
        ([{"text": "a", "weight": "1"}], "weight '1'"),
        ([{"text": "a", "weight": None}], "weight None"),
        ([{"text": "a", "weight": True}], "weight True"),
        ([{"text": "a", "weight": float("nan")}], "weight nan"),
        ([{"text": "a", "weight": float("inf")}], "weight inf"),
        ([{"text": "a", "wieght": 1}], "a caption of clip has .*text, wieght"),
        ([{"weight": 1}], "the caption of clip is None"),
        (["a", ""], "the caption of clip is empty"),
        (["a", ["b"]], "the caption of clip is"),
        ({"text": "a", "weight": 1}, "language 'en'; available: text, weight"),
    ],
)
def test_captions_that_make_no_sense_are_refused_by_name(caption: Any, match: str) -> None:
    with pytest.raises(MobiusError, match=match):
        _captions(caption)


def test_shards_and_metadata_hold_variants(tmp_path: Path) -> None:
    variants = ["a dog", {"text": "it runs", "weight": 3}]
    path = write_tar(
        tmp_path / "a.tar",
        {"k.webp": animation(4), "k.json": json.dumps({"caption": {"en": variants}}).encode()},
    )
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "k.webp").write_bytes(animation(4))
    line = json.dumps({"file_name": "k.webp", "text": variants})
    (tmp_path / "folder" / "metadata.jsonl").write_text(line)
    for source in (path, tmp_path / "folder"):
        clips = open_clips(str(source), num_frames=4, resolution=16)
        assert clips.captions(0) == ["a dog", "it runs"]
        assert clips.caption_weights == {0: (1.0, 3.0)}
        assert [clips.read(0, number).caption for number in (0, 1)] == ["a dog", "it runs"]
        assert clips[0].caption == "a dog"
    bad = line.replace("3}", "-3}")
    (tmp_path / "folder" / "metadata.jsonl").write_text(bad)
    with pytest.raises(MobiusError, match=r"metadata.jsonl, line 1 has weight -3"):
        open_clips(str(tmp_path / "folder"), num_frames=4, resolution=16)


def test_the_identity_follows_the_words_and_not_their_weights(tmp_path: Path) -> None:
    def identity(caption: Any) -> dict[str, str]:
        members = {"k.webp": animation(4), "k.json": json.dumps({"caption": caption}).encode()}
        return open_clips(str(write_tar(tmp_path / "a.tar", members)), num_frames=4, resolution=16).identity

    assert identity(["a", "b"]) == identity(["a", {"text": "b", "weight": 2}])
    assert len({str(identity(caption)) for caption in ("a", ["a", "b"], ["b", "a"], ["a", "c"])}) == 4
    assert identity("a") == identity(["a"])
