"""report.html of a run."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mobius_train import run_files
from mobius_train.errors import MobiusError
from mobius_train.run_page import curves, page
from mobius_train.run_page.page import write_run_page

NAN = float("nan")


def run_folder(folder: Path, lines: Sequence[Mapping[str, Any]], steps: Sequence[int] = ()) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in steps:
        samples = folder / "samples" / f"step-{step}"
        samples.mkdir(parents=True)
        for name in ("00-red-heart", "01-a-b", "comparison"):
            Image.new("RGB", (8, 8), "red").save(samples / f"{name}.gif")
    return folder


def drawn(lines: Sequence[Mapping[str, Any]]) -> dict[str, curves.Drawing]:
    return {drawing.title: drawing for drawing in curves.drawings(lines)}


def test_a_curve_fills_its_square() -> None:
    lines = [{"step": 0, "heldout_loss": 3.0}, *({"step": n, "loss": 4.0 - n} for n in (1, 2, 3))]
    loss = drawn(lines)["training loss"]
    (curve,) = loss.curves
    assert curve.points == "0.0000,0.0000 0.5000,0.5000 1.0000,1.0000"
    assert (loss.low, loss.high, loss.first, loss.final, curve.last) == ("1", "3", 1, 3, "1")
    # A single value is a line.
    assert drawn(lines)["held-out loss"].curves[0].points == "0,0.5000 1,0.5000"
    assert set(drawn(lines)) == {"training loss", "held-out loss"}


def test_curves_of_one_drawing_share_the_scale() -> None:
    names = {"neighbour_ratio/samples": 0.5, "neighbour_ratio/data": 1.0}
    ratio = drawn([{"step": 5, **names}])["neighbour ratio"]
    assert [(curve.name, curve.points) for curve in ratio.curves] == [
        ("samples", "0,1.0000 1,1.0000"),
        ("data", "0,0.0000 1,0.0000"),
    ]


def test_many_points_are_averaged_and_what_is_not_finite_is_left_out() -> None:
    lines = [{"step": n, "loss": NAN if n == 7 else float(n % 2)} for n in range(10 * curves.MOST)]
    loss = drawn(lines)["training loss"]
    assert len(loss.curves[0].points.split()) == curves.MOST
    assert (loss.first, loss.final) == (0, 10 * curves.MOST - 1)
    assert float(loss.curves[0].last) == pytest.approx(0.5, abs=0.06)


def test_the_page_contains_all_that_it_shows(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", [{"step": 1, "loss": 0.5}], steps=range(2, 30))
    (folder / run_files.OVERVIEW).write_text("model       a <ring>\nsteps       4 of 8 samples\n")
    (folder / "config.yaml").write_text("seed: 7\n")
    text = write_run_page(folder).read_text()
    # No other file, no server.
    assert re.findall(r'(?:src|href)="(?!data:)[^"]*', text) == []
    assert "a &lt;ring&gt;" in text
    assert "seed: 7" in text
    shown = [int(step) for step in re.findall(r"<p>step (\d+)</p>", text)]
    assert (len(shown), shown[0]) == (page.STEPS, 29)
    assert shown == sorted(shown, reverse=True)
    assert text.count("data:image/gif") == 2 * page.STEPS + 1
    assert "resume_from_checkpoint=latest" in text
    (folder / "final").mkdir()
    assert "tools/sample.py" in write_run_page(folder).read_text()


def test_stills_and_reconstructions_are_shown(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, [{"step": 1, "loss": 0.5}])
    (folder / "samples" / "step-1").mkdir(parents=True)
    for name in ("00-a-dog.png", "reconstructions.png", "contact_sheet.png"):
        (folder / "samples" / "step-1" / name).write_bytes(b"x")
    text = write_run_page(folder).read_text()
    assert text.count("data:image/png") == 2
    assert "a dog" in text


def test_a_large_picture_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "PICTURE", 10)
    text = write_run_page(run_folder(tmp_path, [{"step": 1, "loss": 0.5}], steps=[1])).read_text()
    assert "data:image" not in text
    assert "Too large for this page" in text


def test_a_cut_line_at_the_end_and_a_folder_without_metrics(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", [{"step": 1, "loss": 0.5}])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    assert "At step 1" in write_run_page(folder).read_text()
    with pytest.raises(MobiusError, match=r"no metrics\.jsonl"):
        write_run_page(tmp_path)


@pytest.mark.distributed
def test_in_a_browser_it_shows_all_and_fits_any_screen(tab: Any, tmp_path: Path) -> None:
    lines = [{"step": n, "loss": 1.0 / (n + 1), "neighbour_ratio/samples": 0.7} for n in range(20)]
    write_run_page(run_folder(tmp_path, lines, steps=[5, 10]))
    complaints: list[str] = []
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("requestfailed", lambda request: complaints.append(request.url))
    for width in (390, 1280):
        tab.set_viewport_size({"width": width, "height": 800})
        tab.goto((tmp_path / run_files.PAGE).as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
        assert tab.locator("img").count() == 5
        drawn = tab.locator("polyline").first.bounding_box()
        assert drawn["width"] > 100
        assert drawn["height"] > 50
    assert complaints == []
