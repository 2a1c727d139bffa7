"""The page in a headless browser: votes by mouse and keys, reload, export, tally."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from preference import answer, make_page, winner

from mobius_train.evaluate.preference.key import QUESTIONS, Key
from mobius_train.evaluate.preference.tally import tally_votes

KEYS = {"left": "ArrowLeft", "none": "ArrowDown", "right": "ArrowRight"}

pytestmark = pytest.mark.distributed


def open_page(tab: Any, folder: Path, pairs: int) -> Key:
    """Make a page, open it from the disk, and return its key."""
    key = make_page(folder, pairs).key
    tab.goto((folder / "page.html").as_uri())
    return key


def begin(tab: Any, voter: str) -> None:
    tab.fill("#voter", voter)
    tab.click("#go")


def vote(tab: Any, key: Key, *, mouse: bool) -> None:
    """Answer the three questions of the pair that is shown, as planted."""
    names = [pair.pair for pair in key.sides.pairs]
    number = names.index(tab.get_attribute("#vote", "data-pair"))
    for question in QUESTIONS:
        side = answer(number, question, key.sides.pairs[number].left)
        if mouse:
            tab.click(f"#{question} button[value={side}]")
        else:
            tab.keyboard.press(KEYS[side])


def export(tab: Any, folder: Path, section: str) -> Path:
    with tab.expect_download() as download:
        tab.click(f"#{section} .download")
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


def test_votes_of_a_browser_are_tallied_exactly(tab: Any, tmp_path: Path) -> None:
    pairs = 40
    events: list[str] = []
    tab.on("request", lambda request: events.append(request.url[:80]))
    tab.on("pageerror", lambda error: events.append(str(error)))
    tab.on("console", lambda message: events.append(message.text))
    key = open_page(tab, tmp_path, pairs)
    assert "± 15 %" in tab.inner_text("#precision")
    tab.click("#go")
    assert tab.is_hidden("#vote"), "a voter has a name"
    begin(tab, "Anna B.")
    for number in range(pairs):
        assert tab.inner_text("#position") == f"Pair {number + 1} of {pairs}"
        tab.keyboard.press("Enter")
        assert tab.inner_text("#position") == f"Pair {number + 1} of {pairs}", "three answers are needed"
        vote(tab, key, mouse=number % 2 == 0)
        tab.keyboard.press("Enter")
        if number == 9:
            tab.reload()
            assert tab.input_value("#voter") == "Anna B."
            assert f"10 of {pairs}" in tab.inner_text("#go")
            tab.click("#go")
    path = export(tab, tmp_path, "end")
    assert path.name == f"votes-Anna-B--{key.page[:8]}.json"
    tally = tally_votes(key, [path])
    assert tally.voters == {"Anna B.": pairs}
    for question in QUESTIONS:
        planted = Counter(winner(number, question) for number in range(pairs))
        votes = tally.votes[question]
        assert (votes.first, votes.second, votes.no_difference) == tuple(
            planted[k] for k in ("first", "second", "none")
        )
    assert [event for event in events if not event.startswith(("file:", "data:image/webp", "blob:"))] == []
    assert len([event for event in events if event.startswith("file:")]) == 2, "the page, and its reload"


def test_an_answer_can_be_changed_and_a_part_exported(tab: Any, tmp_path: Path) -> None:
    key = open_page(tab, tmp_path, 2)
    begin(tab, "b")
    assert tab.is_disabled("#vote .download")
    for question in QUESTIONS:
        assert tab.is_disabled("#next")
        tab.click(f"#{question} button[value=left]")
    tab.click("#next")
    tab.keyboard.press("ArrowLeft")
    tab.keyboard.press("Backspace")
    tab.click("#motion_quality button[value=right]")
    tally = tally_votes(key, [export(tab, tmp_path, "vote")])
    assert tally.voters == {"b": 1}, "the second pair is incomplete"
    first_is_left = key.sides.pairs[0].left == "first"
    assert tally.votes["frame_quality"].first == first_is_left
    assert tally.votes["motion_quality"].second == first_is_left


def test_both_clips_show_the_same_frame(tab: Any, tmp_path: Path) -> None:
    key = open_page(tab, tmp_path, 2)
    begin(tab, "c")
    tab.wait_for_function("document.getElementById('frame').textContent !== ''")
    grey = "side => document.getElementById(side).getContext('2d').getImageData(0, 0, 1, 1).data[0]"
    frames = []
    for press in (" ", ".", "."):
        tab.keyboard.press(press)
        tab.evaluate("() => new Promise(requestAnimationFrame)")
        frames.append([tab.evaluate(grey, side) for side in ("left", "right")])
    (left, right), (left_later, right_later), again = frames
    assert (right > left) == (key.sides.pairs[0].left == "first"), "the first model's clips are dark"
    assert abs(right - left) == pytest.approx(120, abs=2)
    assert abs(left_later - left) == pytest.approx(40, abs=2)
    assert right_later - right == pytest.approx(left_later - left, abs=2)
    assert again == [left, right]


def test_another_voter_starts_anew(tab: Any, tmp_path: Path) -> None:
    key = open_page(tab, tmp_path, 2)
    begin(tab, "d")
    vote(tab, key, mouse=False)
    tab.on("dialog", lambda dialog: dialog.accept())
    for name, kept in (("d", "1 of 2"), ("", "Start")):
        tab.reload()
        assert tab.input_value("#voter") == name
        assert kept in tab.inner_text("#go")
        if name:
            tab.click("#start .another")


def test_a_browser_that_keeps_nothing_is_reported(tab: Any, tmp_path: Path) -> None:
    key = open_page(tab, tmp_path, 1)
    assert tab.is_hidden("#forgetful")
    tab.add_init_script("Object.defineProperty(window, 'localStorage', { get() { throw new Error(); } })")
    tab.reload()
    assert tab.is_visible("#forgetful")
    begin(tab, "e")
    vote(tab, key, mouse=False)
    assert tally_votes(key, [export(tab, tmp_path, "vote")]).voters == {"e": 1}
