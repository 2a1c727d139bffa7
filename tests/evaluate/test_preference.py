"""Pairs, page, key and tally, without a browser."""

from __future__ import annotations

import base64
import io
import json
import re
import runpy
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from preference import FIRST, SECOND, make_page, prompts, save_clips, save_votes, two_models, winner

from mobius_train.errors import MobiusError
from mobius_train.evaluate.preference.binomial import wilson_interval
from mobius_train.evaluate.preference.key import QUESTIONS, read_key
from mobius_train.evaluate.preference.page import write_page
from mobius_train.evaluate.preference.pairs import Pair, pair_clips
from mobius_train.evaluate.preference.tally import tally_votes

PAIRS = 5
TOOL = Path(__file__).resolve().parents[2] / "tools" / "compare_preferences.py"


def blocks(page: Path) -> dict[str, Any]:
    text = page.read_text(encoding="utf-8")
    return {name: json.loads(data) for name, data in re.findall(r'json" id="([\w-]+)">(.*?)</script>', text)}


def picture(frame: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(frame)))


def test_the_page_shows_each_pair_once_and_the_key_knows_the_sides(tmp_path: Path) -> None:
    key = make_page(tmp_path, PAIRS).key
    assert key == read_key(tmp_path / "key.json")
    shown = blocks(tmp_path / "page.html")
    assert shown["settings"]["pairs"] == PAIRS
    assert sorted(pair.prompt for pair in key.sides.pairs) == [f"a dog number {number}" for number in range(PAIRS)]
    for number, pair in enumerate(key.sides.pairs):
        on_page = shown[f"pair-{number}"]
        assert (on_page["pair"], on_page["prompt"]) == (pair.pair, pair.prompt)
        grey = {side: np.asarray(picture(on_page[side][0])).mean() for side in ("left", "right")}
        assert (grey["left"] < grey["right"]) == (pair.left == "first"), "the first model's clips are dark"
        one, other = np.asarray(picture(on_page["left"][0])), np.asarray(picture(on_page["left"][1]))
        assert abs(other.mean() - one.mean() - 20) < 2, "the frames are in order"


def test_nothing_gives_a_side_away(tmp_path: Path) -> None:
    save_clips(tmp_path / FIRST, prompts(PAIRS), side=24)
    save_clips(tmp_path / SECOND, prompts(PAIRS), side=220, grey=90)
    pairs = pair_clips(tmp_path / FIRST, tmp_path / SECOND)
    written = write_page(pairs, FIRST, SECOND, page=tmp_path / "page.html", key=tmp_path / "key.json", seed=1)
    assert (written.shape.width, written.resized) == (192, PAIRS)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    for hint in (FIRST, SECOND, "mobius_train", "Mobius", str(tmp_path), "00-a-dog", ".gif", ".mp4", "seed"):
        assert hint not in text
    assert FIRST in (tmp_path / "key.json").read_text(encoding="utf-8"), "the control"
    for name, pair in blocks(tmp_path / "page.html").items():
        if name != "settings":
            for left, right in zip(pair["left"], pair["right"], strict=True):
                assert len(left) == len(right)
                for image in map(picture, (left, right)):
                    assert (image.format, image.size) == ("WEBP", (192, 192))
                    assert not {"exif", "xmp", "icc_profile", "comment"} & image.info.keys()


def test_sides_are_balanced_and_follow_the_seed(tmp_path: Path) -> None:
    keys = []
    for number, seed in enumerate((3, 3, 4)):
        (tmp_path / str(number)).mkdir()
        keys.append(make_page(tmp_path / str(number), 8, seed).key)
    assert keys[0] == keys[1] != keys[2]
    assert [pair.prompt for pair in keys[0].sides.pairs] != [pair.prompt for pair in keys[2].sides.pairs]
    for key in keys:
        assert Counter(pair.left for pair in key.sides.pairs) == {"first": 4, "second": 4}


def test_no_prompt_ends_its_block(tmp_path: Path) -> None:
    first, second = two_models(tmp_path, ["x"])
    bad = "</script><script>alert(1)</script>"
    pairs = [Pair(bad, first / "00-x.gif", second / "00-x.gif")]
    write_page(pairs, FIRST, SECOND, page=tmp_path / "page.html", key=tmp_path / "key.json", seed=0)
    assert bad not in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert blocks(tmp_path / "page.html")["pair-0"]["prompt"] == bad


LONG = ["A dog; it runs on the beach, at the end of a long summer", "红心", "🔥"]


def test_exact_prompts_come_from_the_metadata(tmp_path: Path) -> None:
    first, second = two_models(tmp_path, LONG, listed=True)
    assert {pair.prompt for pair in pair_clips(first, second)} == set(LONG)
    # Of one folder they are enough.
    (first / "metadata.jsonl").unlink()
    assert {pair.prompt for pair in pair_clips(first, second)} == set(LONG)
    (second / "metadata.jsonl").unlink()
    with pytest.raises(MobiusError, match=r"00-a-dog-it-runs-on-the-beach-at-the-end-of, 02\. .*metadata\.jsonl"):
        pair_clips(first, second)


def test_clips_with_metadata_are_matched_by_prompt(tmp_path: Path) -> None:
    of = ["a cat", "a dog", "a cat"]
    first = save_clips(tmp_path / "first", of, listed=True)
    second = save_clips(tmp_path / "second", ["a dog", "a cat", "a cat"], listed=True)
    pairs = {(pair.prompt, pair.first.stem[:2], pair.second.stem[:2]) for pair in pair_clips(first, second)}
    assert pairs == {("a cat", "00", "01"), ("a dog", "01", "00"), ("a cat", "02", "02")}
    save_clips(second, ["a cat", "a dog"], listed=True)
    with pytest.raises(MobiusError, match=r"only .*first has a cat\."):
        pair_clips(first, second)


def test_unequal_folders_are_refused(tmp_path: Path) -> None:
    first, second = two_models(tmp_path, prompts(3))
    (second / "01-a-dog-number-1.gif").rename(second / "01-a-cat.gif")
    with pytest.raises(MobiusError, match=rf"{FIRST} has 01-a-dog-number-1; .*{SECOND} has 01-a-cat\."):
        pair_clips(first, second)
    with pytest.raises(MobiusError, match="itself"):
        pair_clips(first, first / ".." / FIRST)
    with pytest.raises(MobiusError, match="no folder"):
        pair_clips(first, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MobiusError, match="no clips"):
        pair_clips(first, tmp_path / "empty")


def test_one_format_is_compared(tmp_path: Path) -> None:
    first, second = two_models(tmp_path, prompts(2))
    other = save_clips(tmp_path / "other", prompts(2), suffix="mp4")
    with pytest.raises(MobiusError, match=r"\.gif.*\.mp4"):
        pair_clips(first, other)
    save_clips(first, prompts(2), suffix="mp4")
    assert {pair.first.suffix for pair in pair_clips(first, other)} == {".mp4"}
    assert {pair.first.suffix for pair in pair_clips(first, second)} == {".gif"}


def test_clips_that_cannot_be_compared_are_refused_before_files_are_written(tmp_path: Path) -> None:
    first, second = two_models(tmp_path, prompts(2))
    page, key = tmp_path / "page.html", tmp_path / "key.json"

    def write(other: Path, fps: float = 8.0) -> None:
        write_page(pair_clips(first, other), FIRST, SECOND, page=page, key=key, seed=0, fps=fps)

    with pytest.raises(MobiusError, match=r"has 2 frames.*has 3.*--num-frames"):
        write(save_clips(tmp_path / "longer", prompts(2), frames=3))
    Image.new("RGB", (24, 24)).save(second / "01-a-dog-number-1.gif")
    with pytest.raises(MobiusError, match=r"01-a-dog-number-1.gif is a still"):
        write(second)
    (second / "01-a-dog-number-1.gif").write_bytes(b"GIF89a")
    with pytest.raises(MobiusError, match=r"01-a-dog-number-1.gif is damaged"):
        write(second)
    with pytest.raises(MobiusError, match="fps=0"):
        write(save_clips(tmp_path / "good", prompts(2)), fps=0)
    with pytest.raises(MobiusError, match="two files"):
        write_page(pair_clips(first, tmp_path / "good"), FIRST, SECOND, page=page, key=page, seed=0)
    assert not page.exists()
    write(tmp_path / "good")
    assert page.exists()
    assert key.exists()
    key.unlink()
    with pytest.raises(MobiusError, match=r"page\.html exists"):
        write(tmp_path / "good")
    assert not key.exists()


def test_planted_votes_are_counted_exactly(tmp_path: Path) -> None:
    key = make_page(tmp_path, 40).key
    tally = tally_votes(key, [save_votes(tmp_path / "anna.json", key, "Anna")])
    assert tally.voters == {"Anna": 40}
    for question in QUESTIONS:
        planted = Counter(winner(number, question) for number in range(40))
        assert tally.votes[question] == tally.pairs[question]
        assert vars(tally.votes[question]) == {
            "first": planted["first"],
            "second": planted["second"],
            "no_difference": planted["none"],
        }
    report = tally.as_json()["questions"]
    assert report["text_alignment"]["votes"]["ratio"] == 27 / 40
    assert report["text_alignment"]["votes"]["wilson_95"] == wilson_interval(27, 40)
    assert report["frame_quality"]["votes"]["ratio"] == 10 / 20, "no difference is not in the ratio"
    assert report["motion_quality"]["votes"]["sign_test_p"] == 2 / 2**40


def test_the_votes_of_several_voters_are_added(tmp_path: Path) -> None:
    key = make_page(tmp_path, PAIRS).key

    def always_left(number: int, question: str, left: str) -> str:
        return "left"

    def no_difference(number: int, question: str, left: str) -> str:
        return "none"

    files = [
        save_votes(tmp_path / "a.json", key, "a"),
        save_votes(tmp_path / "b.json", key, "b", pairs=3, choose=always_left),
        save_votes(tmp_path / "c.json", key, "c", pairs=1, choose=no_difference),
    ]
    tally = tally_votes(key, files)
    assert tally.voters == {"a": PAIRS, "b": 3, "c": 1}
    left = Counter(pair.left for pair in key.sides.pairs[:3])
    votes, pairs = tally.votes["motion_quality"], tally.pairs["motion_quality"]
    assert (votes.first, votes.second, votes.no_difference) == (PAIRS + left["first"], left["second"], 1)
    # Where the voters disagree, the pair is undecided.
    assert (pairs.first, pairs.second, pairs.no_difference) == (PAIRS - left["second"], 0, left["second"])
    nothing = tally_votes(key, files[2:]).as_json()["questions"]["motion_quality"]["votes"]
    assert (nothing["no_difference"], nothing["ratio"], nothing["wilson_95"], nothing["sign_test_p"]) == (
        1,
        *[None] * 3,
    )


def changed(path: Path, change: Any) -> Path:
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


CHANGES = {
    "other page": (lambda ballot: ballot.update(page="0" * 32), "0" * 32),
    "unknown pair": (lambda ballot: ballot["votes"][1].update(pair="feedfeedfeedfeed"), "feedfeedfeedfeed"),
    "pair twice": (lambda ballot: ballot["votes"].append(ballot["votes"][0]), "votes twice"),
    "unknown answer": (
        lambda ballot: ballot["votes"][2]["answers"].update(motion_quality="both"),
        r"votes\.2\.answers",
    ),
    "no answer": (lambda ballot: ballot["votes"][2]["answers"].pop("motion_quality"), "motion_quality"),
    "unknown question": (lambda ballot: ballot["votes"][2]["answers"].update(colour="left"), "colour"),
    "no votes": (lambda ballot: ballot.update(votes=[]), "no votes"),
    "no name": (lambda ballot: ballot.update(voter="  "), "voter"),
    "a further field": (lambda ballot: ballot.update(weight=2), "weight"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_changed_ballot_is_refused_by_name(tmp_path: Path, case: str) -> None:
    key = make_page(tmp_path, PAIRS).key
    files = [save_votes(tmp_path / f"{name}.json", key, name) for name in ("anna", "bert")]
    assert len(tally_votes(key, files).voters) == 2, "the control"
    change, message = CHANGES[case]
    changed(files[1], change)
    with pytest.raises(MobiusError, match=rf"bert\.json .*{message}"):
        tally_votes(key, files)


def test_two_files_of_one_voter_are_refused(tmp_path: Path) -> None:
    key = make_page(tmp_path, PAIRS).key
    files = [save_votes(tmp_path / "1.json", key, "Anna"), save_votes(tmp_path / "2.json", key, " anna ")]
    with pytest.raises(MobiusError, match=r"1\.json and .*2\.json.*anna"):
        tally_votes(key, files)


def test_a_changed_key_is_refused(tmp_path: Path) -> None:
    make_page(tmp_path, PAIRS)
    path = tmp_path / "key.json"
    side = {"first": "second", "second": "first"}
    changed(path, lambda key: key["sides"]["pairs"][0].update(left=side[key["sides"]["pairs"][0]["left"]]))
    with pytest.raises(MobiusError, match=r"key\.json was changed"):
        read_key(path)
    path.write_text("[]")
    with pytest.raises(MobiusError, match=r"key\.json is not"):
        read_key(path)
    with pytest.raises(MobiusError, match="cannot read"):
        read_key(tmp_path / "none.json")


def compare(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> object:
    """The exit status of tools/compare_preferences.py, run in this process."""
    monkeypatch.setattr(sys, "argv", ["compare_preferences.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(str(TOOL), run_name="__main__")
    return exit_info.value.code


def test_the_tool(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = two_models(tmp_path, prompts(PAIRS))
    files: list[str | Path] = ["--page", tmp_path / "page.html", "--key", tmp_path / "key.json"]
    assert compare(monkeypatch, "page", first, second, *files) == 0
    assert "± 33.0%" in capsys.readouterr().out
    assert compare(monkeypatch, "page", first, second, *files) == 1
    assert "page.html exists" in capsys.readouterr().err
    key = read_key(tmp_path / "key.json")
    votes = [save_votes(tmp_path / f"{voter}.json", key, voter) for voter in ("anna", "bert")]
    assert compare(monkeypatch, "tally", tmp_path / "key.json", *votes, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["first"], report["voters"]) == (str(first), {"anna": PAIRS, "bert": PAIRS})
    assert report["questions"]["text_alignment"]["votes"]["first"] == 2 * 4
    assert report["questions"]["text_alignment"]["pairs"]["first"] == 4
    assert compare(monkeypatch, "tally", tmp_path / "key.json", *votes) == 0
    assert compare(monkeypatch, "tally", tmp_path / "key.json", votes[0], votes[0]) == 1
