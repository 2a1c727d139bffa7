"""The record of the study and the page that shows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import emoji_study
import pytest
import torch
from torch import nn

from mobius_train.conditions import Conditions
from mobius_train.data.batch import EncodedBatch
from mobius_train.errors import MobiusError
from mobius_train.models.tokens.layers import Clip, Mixing

REPOSITORY = Path(__file__).parents[2]
TEXT = Conditions({"text": torch.zeros(4, 1, 1)})


@pytest.mark.parametrize(
    ("name", "fields", "last"),
    [("int8", ["frozen_int8=true"], "tail-2"), ("trained_tail", [], "tail-2-trained")],
)
def test_the_page_has_the_results_of_a_variant(
    name: str, fields: list[str], last: str, capsys: pytest.CaptureFixture[str]
) -> None:
    record = json.loads((REPOSITORY / "benchmarks" / f"emoji_study_{name}.json").read_text())
    assert record["set"] == fields
    assert record["results"][-1]["member"] == last
    emoji_study._print(record["results"])
    assert capsys.readouterr().out in (REPOSITORY / "docs" / "quality.md").read_text()


@pytest.mark.parametrize("name", ["emoji_study", "emoji_study_all", "emoji_sd3_study", "emoji_sd3_study_1000"])
@pytest.mark.parametrize("show", [emoji_study._print, emoji_study._print_means])
def test_the_page_has_the_tables_of_the_record(name: str, show: Any, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads((REPOSITORY / "benchmarks" / f"{name}.json").read_text())
    show(record["results"])
    table = capsys.readouterr().out
    assert "| serial" in table
    assert table in (REPOSITORY / "docs" / "quality.md").read_text()


def result(member: str, seed: int, error: float, gflop: float = 10) -> dict[str, Any]:
    costs = {"gflop": gflop, "saved_mib": 100, "saved_mib_recomputed": 5, "step_seconds": None}
    point = {"step": 300, "train_motion/0.85": error}
    return {
        "member": member,
        "seed": seed,
        "curve": [point],
        "heldout": {"heldout_motion/0.85": 0.5},
        "figures": {},
    } | costs


def test_a_member_is_compared_with_the_serial_model_of_its_seeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = [result("serial", 0, 0.1), result("serial", 1, 0.2), result("half", 1, 0.3, 4), result("half", 2, 0.5, 4)]
    for one in made:
        (tmp_path / f"{one['member']}-{one['seed']}.json").write_text(json.dumps(one))
    emoji_study._print_means(emoji_study._results(tmp_path, 300))
    serial, half = capsys.readouterr().out.splitlines()[2:]
    assert serial.startswith("| serial | 2 | 1.00 | 1.00 | 0.05 |  | 0.1500 (0.1000 to 0.2000) | 1.00 |")
    # Seed 2 has no serial model.
    assert half.startswith("| half | 2 | 0.40 | 1.00 | 0.05 |  | 0.4000 (0.3000 to 0.5000) | 1.50 |")
    with pytest.raises(MobiusError, match=r"another number of steps than 100: half-1, half-2, serial-0"):
        emoji_study._results(tmp_path, 100)


def test_a_control_changes_what_its_name_says() -> None:
    order = torch.arange(8.0).reshape(1, 1, 8, 1, 1)
    batch = EncodedBatch(torch.tensor([0]), ["a"], order.expand(4, 2, 8, 1, 1), 10 * order.expand(4, 2, 8, 1, 1), TEXT)
    shuffled = emoji_study._shuffled(batch, 3)
    assert torch.equal(shuffled.mean.sort(2).values, batch.mean)
    assert not torch.equal(shuffled.mean, batch.mean)
    # Mean, deviation and all channels of a frame stay together; each clip has an order of its own.
    assert torch.equal(10 * shuffled.mean, shuffled.std)
    assert torch.equal(shuffled.mean[:, 0], shuffled.mean[:, 1])
    assert not torch.equal(shuffled.mean[0], shuffled.mean[1])
    mixing, hidden = Mixing(8), torch.ones(2, 4, 8)
    clip = Clip(num_frames=2, grid=(2, 2))
    assert mixing(hidden, clip).any()
    emoji_study._without_mixing(nn.ModuleDict({"mixing": mixing}))
    assert not mixing(hidden, clip).any()
    with pytest.raises(MobiusError, match="transformer"):
        emoji_study._without_mixing(nn.Linear(2, 2))
