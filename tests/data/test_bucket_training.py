"""Whole runs on buckets of several lengths and sizes, pictures among them, with captions in variants."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launching import launch
from mixed_clips import BUCKETS, save_mixed
from recipes import DS_CONFIGS, Run, losses, metrics, recipe, write

from mobius_train.data import cache
from mobius_train.errors import MobiusError

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5  # of the order of float32 sums; see test_ranks.py
WORKER = Path(__file__).parents[1] / "runs" / "ranks_worker.py"


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    return save_mixed(tmp_path / "mixed.tar")


def _data(shard: Path, **changes: Any) -> dict[str, Any]:
    return {"train": str(shard), "validation": str(shard), "buckets": BUCKETS, **changes}


def _bits(output: Path) -> list[str]:
    return [loss.hex() for loss in losses(output)]


def _heldout(output: Path) -> list[float]:
    return [line["heldout_loss"] for line in metrics(output) if "heldout_loss" in line]


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "parallel", "gradient_checkpointing": True},
        {"mode": "serial"},
        {"mode": "full"},
        {
            "stage": "text-to-image",
            "data": {
                "buckets": [
                    {"num_frames": 1, "width": 32, "height": 32},
                    {"num_frames": 1, "width": 32, "height": 64},
                ]
            },
        },
    ],
    ids=lambda changes: "-".join(map(str, changes.values()))[:30],
)
def test_every_model_trains_on_buckets_the_same_from_a_cache(
    run: Run, mixed: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    data, short = _data(mixed) | changes.pop("data", {}), {"validation": {"prompts": []}, "max_train_steps": 4}
    online = run("online", data=data, **short, **changes)
    cached = run("cached", data=data | {"cache_dir": str(tmp_path / "cache")}, **short, **changes)
    assert len(set(_bits(online))) == 4
    assert _bits(online) == _bits(cached)
    assert _heldout(online) == _heldout(cached)


def test_the_autoencoder_trains_on_buckets(run: Run, mixed: Path) -> None:
    output = run(stage="autoencoder", data=_data(mixed))
    assert len(losses(output)) == 4
    assert (output / "final" / "vae").is_dir()


def test_a_dry_run_tries_the_largest_bucket(run: Run, mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(data=_data(mixed), dry=True)
    said = capsys.readouterr().out
    assert "bucket 4x48x32: 5 clips, 37.5% of the batches" in said
    assert "bucket 1x32x48: 5 clips, 25.0% of the batches" in said


@pytest.mark.distributed
def test_two_ranks_train_and_resume_as_one(run: Run, tiny_pipeline: Path, mixed: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "data": _data(mixed),
        "max_train_steps": 4,
        "checkpointing_steps": 2,
        "validation": {"prompts": [], "max_clips": 15},
    }
    path = write(tmp_path / "recipe.yaml", recipe(tiny_pipeline, mixed, tmp_path / "unused", **options))
    two = ("zero2", "fsdp+gradient_accumulation_steps=2+train_batch_size=1")
    result = launch(2, WORKER, str(path), str(tmp_path / "2"), str(DS_CONFIGS), *two)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    whole = run("whole", train_batch_size=4, **options)
    for name in two:
        assert losses(tmp_path / "2" / name) == pytest.approx(losses(whole), rel=TOLERANCE), name
        assert _heldout(tmp_path / "2" / name) == pytest.approx(_heldout(whole), rel=TOLERANCE), name
    # On one rank from where the two were after two steps.
    moved = tmp_path / "2" / "zero2"
    lines = (moved / "metrics.jsonl").read_text().splitlines()
    (moved / "metrics.jsonl").write_text("\n".join(line for line in lines if json.loads(line)["step"] <= 2) + "\n")
    assert run("2/zero2", train_batch_size=4, resume_from_checkpoint="checkpoint-2", **options) == moved
    assert losses(moved) == pytest.approx(losses(whole), rel=TOLERANCE)


def test_the_cache_holds_every_caption_once(
    run: Run, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mobius_train.encoders.text_encoder import TextEncoder

    encoded: list[str] = []
    encode = TextEncoder.encode

    def counted(self: TextEncoder, caption: str, where: str = "") -> Any:
        encoded.append(f"{where}: {caption}")
        return encode(self, caption, where)

    monkeypatch.setattr(TextEncoder, "encode", counted)
    data = _data(mixed, validation=None, cache_dir=str(tmp_path / "cache"))
    output = run(data=data, validation={"prompts": []})
    of_clips = sorted(text for text in encoded if text.startswith("clip"))
    assert len(of_clips) == len(set(of_clips)) == 15 + 12
    (folder,) = (tmp_path / "cache").glob("train-*")
    read = cache.LatentCache(folder, json.loads((folder / cache.KEYS).read_text()))
    assert not read.read(1, 0).conditions["text"].equal(read.read(1, 1).conditions["text"])
    assert read.read(1, 0).conditions["text"].equal(read[1].conditions["text"])
    encoded.clear()
    again = run("again", data=data, validation={"prompts": []}, seed=1)
    assert not any(text.startswith("clip") for text in encoded)
    # The control of the tests above: another seed draws other clips and captions.
    assert not set(_bits(again)) & set(_bits(output))


# Refused, before anything runs


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"buckets": []}, "data.buckets"),
        ({"buckets": [BUCKETS[2]]}, r"text-to-video.*data\.buckets.*num_frames"),
        ({"buckets": BUCKETS[:1] * 2}, "4x48x32"),
        ({"buckets": BUCKETS, "random_frame": True}, "random_frame"),
        ({"buckets": [BUCKETS[0] | {"share": 1.5}]}, "share"),
        ({"buckets": [BUCKETS[0] | {"fps": 8}]}, r"buckets\.0\.fps"),
        ({"buckets": [BUCKETS[0], BUCKETS[1] | {"width": 34}]}, r"data\.buckets\.1\.width=34.*\b4\b"),
        ({"buckets": BUCKETS[:2]}, r"\b5 of 15 .*data\.buckets.*clip02\.png"),
        (
            {"buckets": [BUCKETS[0], BUCKETS[2], {"num_frames": 9, "width": 32, "height": 32, "share": 0.1}]},
            r"9x32x32.*0\.1.*data\.buckets",
        ),
        (
            {"buckets": [BUCKETS[2] | {"share": 1.0}, {"num_frames": 9, "width": 32, "height": 32}]},
            r"mixed\.tar.*text-to-video",
        ),
    ],
)
def test_buckets_that_cannot_work_are_refused(run: Run, mixed: Path, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(MobiusError, match=match):
        run(data=_data(mixed, **changes))


def test_pictures_alone_make_no_text_to_image_bucket_of_frames(run: Run, mixed: Path) -> None:
    with pytest.raises(MobiusError, match=r"text-to-image.*data\.buckets.*num_frames=1"):
        run(stage="text-to-image", data=_data(mixed))
