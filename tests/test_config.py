"""The configuration: what it accepts, what it refuses, and that it says why."""

from pathlib import Path

import pytest
import yaml

from mobius_train.config import RunConfig, load
from mobius_train.errors import MobiusError

MINIMAL = {"data": {"train": "clips"}, "output_dir": "out", "max_train_steps": 10}
REPOSITORY = Path(__file__).parent.parent


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def test_overrides_reach_sections_and_read_numbers_as_people_write_them(recipe: Path) -> None:
    config = load(recipe, ["learning_rate=1e-5", "data.num_frames=16", "objective.snr_gamma=5", "use_ema=true"])
    assert (config.learning_rate, config.data.num_frames, config.objective.snr_gamma) == (1e-5, 16, 5.0)
    assert config.use_ema is True


def test_the_dump_reads_back_as_the_same_configuration(recipe: Path, tmp_path: Path) -> None:
    config = load(recipe, ["validation.prompts=[a dog, 笑脸]"])
    again = tmp_path / "resolved.yaml"
    again.write_text(config.dump(), encoding="utf-8")
    assert load(again) == config


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("learning_rat=1", "learning_rat: learning_rate?"),
        ("data.num_frame=4", "data.num_frame: num_frames?"),
        ("objective.zzz=1", "objective.zzz:"),
        ("mixed_precision=bf17", "mixed_precision: 'bf17'"),
        ("train_batch_size=0", "train_batch_size: 0"),
        ("data.num_frames=1", "text-to-video data.num_frames"),
        ("stage=text-to-image", "text-to-image data.random_frame"),
        ("lr_warmup_steps=10", "lr_warmup_steps=10 max_train_steps=10"),
        ("gradient_checkpointing_kept=0.5", "gradient_checkpointing_kept=0.5 gradient_checkpointing"),
        ("activation_offload=1.5", "activation_offload: 1.5"),
        ("activation_memory_budget=0.5", "activation_memory_budget compile=true"),
        ("attention_backend=xformers", "attention_backend: 'xformers'"),
        ("frozen_dtype=fp8", "frozen_dtype: 'fp8'"),
        ("mode=serial frozen_dtype=bf16", "frozen_dtype text-to-video parallel 'serial'"),
        ("mode=full activation_offload=0.2", "activation_offload text-to-video parallel 'full'"),
        ("mode=serial compile=true", "compile text-to-video parallel 'serial'"),
        (
            "gradient_checkpointing=true gradient_checkpointing_kept=0.6 activation_offload=0.5",
            "gradient_checkpointing_kept=0.6 activation_offload=0.5",
        ),
        ("compile=true recompute_activations=true", "recompute_activations compile activation_memory_budget"),
        ("gradient_checkpointing=true recompute_activations=true", "recompute_activations gradient_checkpointing"),
        (
            "gradient_checkpointing=true compile=true activation_memory_budget=0.5",
            "activation_memory_budget gradient_checkpointing",
        ),
    ],
)
def test_a_mistake_is_refused_by_name(recipe: Path, overrides: str, words: str) -> None:
    with pytest.raises(MobiusError) as refused:
        load(recipe, overrides.split())
    # The lines before it list the overrides themselves.
    (problem,) = str(refused.value).split("\n  - ")[1:]
    for word in words.split():
        assert word in problem


@pytest.mark.parametrize("override", ["nonsense", "output_dir.x=1"])
def test_an_override_that_cannot_be_applied_is_named(recipe: Path, override: str) -> None:
    with pytest.raises(MobiusError, match=f"override {override!r}"):
        load(recipe, [override])


@pytest.mark.parametrize(
    "overrides",
    [
        "gradient_checkpointing=true gradient_checkpointing_kept=0.5 activation_offload=0.2 recompute_activations=true",
        "compile=true activation_memory_budget=0.5 frozen_dtype=bf16 attention_backend=eager",
        "gradient_checkpointing=true compile=true gradient_checkpointing_kept=0.5 activation_memory_budget=0",
        "mode=serial gradient_checkpointing=true attention_backend=sdpa",
    ],
)
def test_memory_options_that_go_together(recipe: Path, overrides: str) -> None:
    config = load(recipe, overrides.split())
    for override in overrides.split():
        name, _, value = override.partition("=")
        assert getattr(config, name) == yaml.safe_load(value)
        assert getattr(config, name) != getattr(load(recipe), name)


def test_all_mistakes_are_listed_at_once(recipe: Path) -> None:
    with pytest.raises(MobiusError, match=r"(?s)\n  - learning_rat: .*\n  - seeed: "):
        load(recipe, ["learning_rat=1", "seeed=2"])


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.train=https://user:word@host/a.tar?sig=secret", "seeed=1"],
        ["data.num_frames=https://user:word@host/a.tar?sig=secret"],
        ["data.train.x=https://user:word@host/a.tar?sig=secret"],
    ],
)
def test_credentials_and_signatures_are_not_printed(recipe: Path, overrides: list[str]) -> None:
    with pytest.raises(MobiusError, match=r"https://host/a\.tar") as refused:
        load(recipe, overrides)
    assert "secret" not in str(refused.value)
    assert "word" not in str(refused.value)


def test_a_missing_or_broken_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(MobiusError, match=r"nowhere\.yaml"):
        load(tmp_path / "nowhere.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [")
    with pytest.raises(MobiusError, match=r"broken\.yaml"):
        load(broken)


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_recipes_are_valid(path: Path) -> None:
    assert isinstance(load(path), RunConfig)


def test_a_recipe_that_version_0_1_0_wrote_is_read(tmp_path: Path) -> None:
    path = Path(__file__).parent / "files" / "written-by-0.1.0" / "parallel" / "config.yaml"
    assert "allow_shell_commands: false" in path.read_text()
    assert "allow_shell_commands" not in load(path).dump()
    with pytest.raises(MobiusError, match=r"data.allow_shell_commands: no such key"):
        load(path, ["data.allow_shell_commands=true"])
