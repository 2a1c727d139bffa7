"""Progress on a terminal and in a file."""

from __future__ import annotations

import io
import logging
import sys
import time

import pytest

from mobius_train import bars
from mobius_train.bars import AboveBars, progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_file_gets_lines_and_only_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress(total=1000, desc="encoding", unit="clip") as bar:
        for _ in range(1000):
            bar.update()
    assert isinstance(sys.stderr, io.StringIO)
    written = sys.stderr.getvalue()
    assert "\r" not in written
    first, last = written.splitlines()
    assert first.startswith("encoding: 0 of 1000 [00:00, ? left")
    assert last.startswith("encoding: 1000 of 1000 [")


def test_lines_come_at_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(bars, "EVERY", 0.0)
    list(progress(range(4), desc="hashing"))
    assert isinstance(sys.stderr, io.StringIO)
    # tqdm writes the last state when it ends, too.
    assert [line.split()[1] for line in sys.stderr.getvalue().splitlines()] == list("012344")


def test_lines_of_a_bar_below_another_one_have_no_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(bars, "EVERY", 0.0)
    with progress(total=1, desc="training"), progress(total=2, desc="sampling") as inner:
        inner.update()
        inner.update()
    assert isinstance(sys.stderr, io.StringIO)
    assert "\x1b" not in sys.stderr.getvalue()
    assert all(line.startswith(("training: ", "sampling: ")) for line in sys.stderr.getvalue().splitlines())


@pytest.mark.parametrize(("delay", "shown"), [(60.0, False), (0.001, True)])
def test_short_work_has_no_bar_if_it_is_delayed(delay: float, shown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(bars, "EVERY", 0.0)
    with progress(total=2, desc="comparing", delay=delay) as bar:
        bar.update()
        time.sleep(0.01)
        bar.update()
    assert isinstance(sys.stderr, io.StringIO)
    assert bool(sys.stderr.getvalue()) == shown


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    list(progress(range(4), desc="hashing"))
    assert isinstance(sys.stderr, io.StringIO)
    assert "\rhashing: 100%|" in sys.stderr.getvalue()


def test_a_message_is_a_line_of_its_own_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    logger = logging.getLogger("tests.bars")
    logger.addHandler(AboveBars())
    try:
        with progress(total=2, desc="hashing") as bar:
            bar.update()
            logger.warning("a clip is gone")
    finally:
        logger.handlers.clear()
    assert isinstance(sys.stderr, io.StringIO)
    assert "a clip is gone\n" in sys.stderr.getvalue()


def test_warnings_of_one_kind_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    logger, handler = logging.getLogger("tests.bars"), AboveBars()
    logger.addHandler(handler)
    try:
        for number in range(23):
            logger.warning("caption %d is too long", number)
            logger.warning("%s", f"message {number}")
            logger.error("clip %d is damaged", number)
        handler.close()
    finally:
        logger.handlers.clear()
    assert isinstance(sys.stderr, io.StringIO)
    lines = sys.stderr.getvalue().splitlines()
    assert [line for line in lines if "caption" in line] == [
        "caption 0 is too long",
        "caption 1 is too long",
        "caption 2 is too long",
        "caption 9 is too long (10 warnings of this kind)",
        "WARNING: 23 warnings in all: caption %d is too long",
    ]
    # Nothing else is left out.
    assert sum("message" in line for line in lines) == 23
    assert sum("damaged" in line for line in lines) == 23
