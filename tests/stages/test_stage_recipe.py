"""What a file of stages means, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mobius_train.data.buckets import Shape, best_bucket
from mobius_train.errors import MobiusError
from mobius_train.stages.recipe import read_stages

REPOSITORY = Path(__file__).parents[2]
BASE = {
    "data": {"train": "clips", "buckets": [{"num_frames": 4, "width": 32, "height": 32}], "cache_dir": "cache"},
    "output_dir": "runs/staged",
    "max_train_steps": 7,
    "learning_rate": 1e-3,
    "seed": 10,
}
LARGE = {"num_frames": 8, "width": 64, "height": 64, "share": 0.5}
STAGES: list[dict[str, Any]] = [
    {"name": "small", "max_train_steps": 2, "use_ema": True},
    {"name": "large-2", "max_train_steps": 3, "data": {"buckets": [LARGE], "cache_dir": None}, "learning_rate": 5e-4},
    {"name": "last", "max_train_steps": 4, "optimizer_state": "kept"},
]


def _write(folder: Path, stages: Any = STAGES, **top: Any) -> Path:
    (folder / "base.yaml").write_text(yaml.safe_dump(BASE))
    path = folder / "stages.yaml"
    path.write_text(yaml.safe_dump({"base": "base.yaml", "stages": stages} | top))
    return path


def test_a_stage_is_the_base_with_its_own_fields(tmp_path: Path) -> None:
    stages = read_stages(_write(tmp_path))
    small, large, last = (recipe.config for recipe in stages.recipes)
    assert [recipe.folder for recipe in stages.recipes] == ["1-small", "2-large-2", "3-last"]
    assert stages.output_dir == Path("runs/staged")
    assert large.output_dir == Path("runs/staged/2-large-2")
    # Mappings are merged, lists and values replaced.
    assert ([one.path for one in large.data.train], large.data.cache_dir) == (["clips"], None)
    assert large.data.buckets is not None
    assert [bucket.model_dump() for bucket in large.data.buckets] == [LARGE]
    assert small.data.cache_dir == last.data.cache_dir == Path("cache")
    assert [c.max_train_steps for c in (small, large, last)] == [2, 3, 4]
    assert [c.learning_rate for c in (small, large, last)] == [1e-3, 5e-4, 1e-3]
    assert [c.seed for c in (small, large, last)] == [11, 12, 13]
    assert {c.resume_from_checkpoint for c in (small, large, last)} == {"auto"}
    assert [recipe.start_from for recipe in stages.recipes] == [None, "average", "weights"]
    assert [recipe.optimizer_state for recipe in stages.recipes] == ["fresh", "fresh", "kept"]


def test_overrides_reach_the_base_or_one_stage(tmp_path: Path) -> None:
    path = _write(tmp_path, output_dir="runs/of-the-file")
    assert read_stages(path).output_dir == Path("runs/of-the-file")
    of_stages = ["stages.large-2.learning_rate=5e-5", "stages.last.start_from=weights"]
    of_the_base = ["seed=20", "output_dir=here", "learning_rate=2e-3", "data.num_frames=16", "mode=parallel"]
    stages = read_stages(path, [*of_stages, *of_the_base, "resume_from_checkpoint=auto"])
    assert [recipe.config.learning_rate for recipe in stages.recipes] == [2e-3, 5e-5, 2e-3]
    assert [recipe.config.seed for recipe in stages.recipes] == [21, 22, 23]
    assert {recipe.config.data.num_frames for recipe in stages.recipes} == {16}
    assert stages.output_dir == Path("here")


def test_values_that_an_alias_shares_are_changed_in_one_stage_alone(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
    path = tmp_path / "stages.yaml"
    path.write_text(
        "base: base.yaml\nstages:\n  - {name: a, max_train_steps: 1, data: &d {num_frames: 8}}\n"
        "  - {name: b, max_train_steps: 1, data: *d}\n"
    )
    stages = read_stages(path, ["stages.b.data.num_frames=16"])
    assert [recipe.config.data.num_frames for recipe in stages.recipes] == [8, 16]


def _with(number: int, **fields: Any) -> list[dict[str, Any]]:
    return [stage | fields if place == number else stage for place, stage in enumerate(STAGES)]


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        (_with(1, learning_rat=1), "large-2 learning_rat: learning_rate?"),
        (_with(1, data={"num_frame": 1}), "large-2 data.num_frame: num_frames?"),
        (_with(2, train_batch_size=0), "last train_batch_size: 0"),
        (_with(2, start_form="average"), "last start_form: no such key"),
        (_with(2, start_from="best"), "stage 3 start_from: 'best'"),
        (_with(2, optimizer_state="old"), "stage 3 optimizer_state: 'old'"),
        ([{"name": "only"}], "only max_train_steps"),
        ([{"max_train_steps": 1}], "stage 1 name"),
        (_with(2, name="small"), "two stages name small"),
        (_with(1, name="../up"), "stage 2 name: '../up'"),
        (_with(1, name=".hidden"), "stage 2 name: '.hidden'"),
        (_with(1, name="a/b"), "stage 2 name: 'a/b'"),
        (_with(1, name="a b"), "stage 2 name: 'a b'"),
        (_with(1, name="a\n"), "stage 2 name:"),
        (_with(1, name=""), "stage 2 name: ''"),
        (_with(1, name="n" * 65), "stage 2 name:"),
        (_with(1, name=24), "stage 2 name: 24"),
        (_with(0, start_from="weights"), "small start_from first"),
        (_with(0, optimizer_state="kept"), "small optimizer_state first"),
        (_with(2, start_from="average"), "last start_from=average large-2 use_ema"),
        (_with(1, output_dir="elsewhere"), "large-2 output_dir"),
        (_with(1, resume_from_checkpoint="latest"), "large-2 resume_from_checkpoint"),
        (_with(0, stage="autoencoder", data={"cache_dir": None}), "small autoencoder vae_name_or_path"),
        ([], "stages:"),
        (["small"], "stages.0: 'small'"),
        ({"name": "small"}, "stages:"),
    ],
)
def test_a_mistake_is_refused_with_the_stage_and_the_field(tmp_path: Path, stages: Any, words: str) -> None:
    with pytest.raises(MobiusError) as refused:
        read_stages(_write(tmp_path, stages))
    for word in words.split():
        assert word in str(refused.value)


def test_mistakes_of_several_stages_are_listed_at_once(tmp_path: Path) -> None:
    stages = [stage | {"seeed": 1} for stage in STAGES]
    with pytest.raises(MobiusError, match=r"(?s)stage small .*seeed.*stage large-2 .*seeed.*stage last .*seeed"):
        read_stages(_write(tmp_path, stages))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stages.middle.seed=1", "stages.middle.seed=1 small, large-2, last"),
        ("stages.small=1", "stages.small=1 FIELD"),
        ("stages.small.seeed=1", "small seeed"),
        ("max_train_steps=5", "max_train_steps=5 stages.NAME.max_train_steps"),
        ("resume_from_checkpoint=latest", "resume_from_checkpoint=latest remove"),
        ("output_dir=runs/{time}", "runs/{time} output_dir"),
        ("learning_rat=1", "learning_rat"),
        ("nonsense", "nonsense"),
    ],
)
def test_an_override_that_does_nothing_is_refused(tmp_path: Path, override: str, words: str) -> None:
    with pytest.raises(MobiusError) as refused:
        read_stages(_write(tmp_path), [override])
    for word in words.split():
        assert word in str(refused.value)


def test_an_override_of_a_field_that_every_stage_sets_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path, [stage | {"mode": "parallel"} for stage in STAGES])
    with pytest.raises(MobiusError, match=r"mode=serial.*stages\.NAME\.mode"):
        read_stages(path, ["mode=serial"])
    # The control: one stage that does not set it.
    path = _write(tmp_path, [STAGES[0], *[stage | {"mode": "parallel"} for stage in STAGES[1:]]])
    assert [recipe.config.mode for recipe in read_stages(path, ["mode=serial"]).recipes] == ["serial"] + [
        "parallel"
    ] * 2


@pytest.mark.parametrize("text", ["base: nowhere.yaml\nstages: [{name: a, max_train_steps: 1}]", "a: [", "[]", "x: 1"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "stages.yaml"
    path.write_text(text)
    with pytest.raises(MobiusError, match=r"nowhere\.yaml" if "nowhere" in text else r"stages\.yaml"):
        read_stages(path)


def test_videos_and_pictures_fill_every_bucket_of_the_five_stages() -> None:
    """At the stages' frame rate; a video of a data set is some seconds long, of 720p."""
    seconds = (2, 3.5, 6, 12)
    for recipe in read_stages(REPOSITORY / "configs" / "vchitect_stages.yaml").recipes:
        data = recipe.config.data
        assert data.frame_rate is not None
        videos = [Shape(int(length * data.frame_rate), 1280, 720) for length in seconds]
        buckets = [Shape(bucket.num_frames, bucket.width, bucket.height) for bucket in data.buckets or ()]
        assert {best_bucket(clip, buckets) for clip in [*videos, Shape(1, 2048, 1536)]} == set(buckets)
        # The control: long videos alone leave the pictures' bucket empty.
        assert {best_bucket(clip, buckets) for clip in videos[2:]} != set(buckets)


def test_the_five_stages_of_the_paper_grow() -> None:
    stages = read_stages(REPOSITORY / "configs" / "vchitect_stages.yaml")
    assert len(stages.recipes) == 5
    assert len({recipe.config.seed for recipe in stages.recipes}) == 5
    longest, largest = [], []
    shifts: list[float] = []
    for recipe in stages.recipes:
        buckets = recipe.config.data.buckets or ()
        assert sum(bucket.share or 0 for bucket in buckets) == pytest.approx(1)
        assert {side % 16 for bucket in buckets for side in (bucket.width, bucket.height)} == {0}
        assert min(bucket.num_frames for bucket in buckets) == 1
        longest.append(max(bucket.num_frames for bucket in buckets))
        largest.append(max(bucket.height for bucket in buckets))
        # A token of Stable Diffusion 3 is 16 x 16 pixels; see the file.
        tokens = max(bucket.num_frames * bucket.width * bucket.height for bucket in buckets) / 16**2
        shifts.append(recipe.config.objective.flow_shift or 0)
        assert shifts[-1] == pytest.approx(3 * (tokens / 4096) ** 0.25, abs=0.25)
        assert recipe.config.mode == "full"
    assert longest == [24, 40, 80, 40, 40]
    assert largest == [336, 336, 336, 720, 720]
    assert shifts == sorted(shifts)
