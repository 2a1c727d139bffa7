"""The configuration: what it accepts, what it refuses, and that it says why."""

import time
from pathlib import Path

import pytest
import yaml
from recipes import RECIPES

from mobius_train.config import RunConfig, load
from mobius_train.errors import MobiusError
from mobius_train.yaml_files import dump_yaml, parse_yaml

MINIMAL = {"data": {"train": "clips"}, "output_dir": "out", "max_train_steps": 10}
REPOSITORY = Path(__file__).parent.parent
# Those of a single run.


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
        ("data.train=[]", "data: train repeats=0"),
        ("data.validation=[]", "data: validation repeats=0"),
        ("data.train=5", "data.train: 5"),
        ('data.train=[a,{"path":"b","repeat":2}]', "data.train.1.repeat:"),
        ('data.train=[{"repeats":2}]', "data.train.0.path:"),
        ('data.train=[{"path":"a","repeats":-1}]', "data.train.0.repeats:"),
        ('data.train=[{"path":"a","repeats":0},{"path":"b","repeats":0}]', "data: repeats=0 train"),
        ('data.validation=[{"path":"a","repeats":2}]', "data: repeats validation"),
        ("data.train=[a,b] data.subset=dog", "data: subset train"),
        ("data.max_windows=2", "data: max_windows=2 frame_window=all"),
        ("data.frame_rate=0", "data.frame_rate:"),
        ("data.frame_stride=0", "data.frame_stride:"),
        ("data.frame_window=random data.cache_dir=c", "data: frame_window=random cache_dir frame_window=all"),
        ("lr_warmup_steps=10", "lr_warmup_steps=10 max_train_steps=10"),
        ("gradient_checkpointing_kept=0.5", "gradient_checkpointing_kept=0.5 gradient_checkpointing"),
        ("activation_offload=1.5", "activation_offload: 1.5"),
        ("activation_memory_budget=0.5", "activation_memory_budget compile=true"),
        ("attention_backend=xformers", "attention_backend: 'xformers'"),
        ("frozen_dtype=fp8", "frozen_dtype: 'fp8'"),
        ("ring_width=inf", "ring_width: finite"),
        ("learning_rate=.inf", "learning_rate: finite"),
        ("trained_tail=true", "trained_tail=true fusion_depth"),
        ("text_encoder_dtype=fp16", "text_encoder_dtype: 'fp16'"),
        ("mode=serial frozen_dtype=bf16", "frozen_dtype text-to-video parallel 'serial'"),
        ("mode=full activation_offload=0.2", "activation_offload text-to-video parallel 'full'"),
        ("mode=serial compile=true", "compile text-to-video parallel 'serial'"),
        ("mode=serial frozen_compile=true", "frozen_compile text-to-video parallel 'serial'"),
        ("mode=full frozen_ahead=true", "frozen_ahead text-to-video parallel 'full'"),
        ("frozen_cuda_graphs=true", "frozen_cuda_graphs frozen_compile=true"),
        ("frozen_cuda_graphs=true frozen_compile=true frozen_ahead=true", "frozen_cuda_graphs frozen_ahead"),
        ("frozen_compile=true shard_frozen=true", "frozen_compile shard_frozen=false"),
        ("frozen_ahead=true shard_frozen=true", "frozen_ahead shard_frozen=false"),
        ("frozen_int8=true shard_frozen=true", "frozen_int8 shard_frozen=false"),
        ("mode=serial frozen_int8=true", "frozen_int8 text-to-video parallel 'serial'"),
        ("frozen_ahead=true sequence_parallel_size=2", "sequence_parallel_size=2 frozen_ahead=true"),
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


def test_a_path_is_a_set_and_is_written_as_a_path(recipe: Path) -> None:
    (one,) = load(recipe).data.train
    assert (one.path, one.repeats, one.caption_prefix, one.subset) == ("clips", 1, "", None)
    assert yaml.safe_load(load(recipe).dump())["data"]["train"] == "clips"
    sets = load(recipe, ["data.train=[a, {path: b, repeats: 3, caption_prefix: sks dog}]", "data.validation=[a, b]"])
    assert [(one.path, one.repeats, one.caption_prefix) for one in sets.data.train] == [
        ("a", 1, ""),
        ("b", 3, "sks dog"),
    ]
    written = yaml.safe_load(sets.dump())["data"]
    assert written["train"] == [{"path": "a"}, {"path": "b", "repeats": 3, "caption_prefix": "sks dog"}]
    recipe.write_text(sets.dump(), encoding="utf-8")
    assert load(recipe) == sets
    assert load(recipe, ["data.train.1.repeats=0"]).data.train[1].repeats == 0
    (alone,) = load(recipe, ["data.train={path: b, repeats: 3}", "data.train.repeats=2"]).data.train
    assert (alone.path, alone.repeats) == ("b", 2)


@pytest.mark.parametrize("override", ["nonsense", "output_dir.x=1"])
def test_an_override_that_cannot_be_applied_is_named(recipe: Path, override: str) -> None:
    with pytest.raises(MobiusError, match=f"override {override!r}"):
        load(recipe, [override])


@pytest.mark.parametrize(
    "overrides",
    [
        "gradient_checkpointing=true gradient_checkpointing_kept=0.5 activation_offload=0.2 recompute_activations=true",
        "compile=true activation_memory_budget=0.5 frozen_dtype=bf16 attention_backend=eager",
        "frozen_compile=true frozen_channels_last=true frozen_ahead=true frozen_int8=true",
        "frozen_compile=true frozen_cuda_graphs=true sequence_parallel_size=2",
        "gradient_checkpointing=true compile=true gradient_checkpointing_kept=0.5 activation_memory_budget=0",
        "mode=serial gradient_checkpointing=true attention_backend=sdpa",
        "fusion_depth=1 trained_tail=true",
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


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_the_recipes_are_valid(path: Path) -> None:
    assert isinstance(load(path), RunConfig)


def test_a_recipe_that_version_0_1_0_wrote_is_read(tmp_path: Path) -> None:
    path = Path(__file__).parent / "files" / "written-by-0.1.0" / "parallel" / "config.yaml"
    assert "allow_shell_commands: false" in path.read_text()
    assert "allow_shell_commands" not in load(path).dump()
    with pytest.raises(MobiusError, match=r"data.allow_shell_commands: no such key"):
        load(path, ["data.allow_shell_commands=true"])


@pytest.mark.parametrize("word", ["no", "No", "yes", "on", "OFF", "y", "n", "2024-01-01", "nan", "12:30:x"])
def test_words_are_words_in_fields_of_text(recipe: Path, word: str) -> None:
    values = MINIMAL | {"data": {"train": "clips", "caption_language": "WORD"}, "validation": {"prompts": ["WORD"]}}
    recipe.write_text(yaml.safe_dump(values).replace("WORD", word))
    in_the_file = load(recipe)
    overridden = load(recipe, [f"data.caption_language={word}", f"validation.prompts=[{word}]"])
    for config in (in_the_file, overridden):
        assert config.data.caption_language == word
        assert config.validation.prompts == (word,)
        assert load(recipe, [f"validation.negative_prompt={word}"]).validation.negative_prompt == word


def test_no_is_a_precision_and_a_switch(recipe: Path) -> None:
    for word, switch in (("no", False), ("yes", True), ("off", False), ("on", True), ("true", True), ("false", False)):
        config = load(recipe, [f"use_ema={word}", f"unet_config={{a: [{word}], b: none}}"])
        assert (config.use_ema, config.unet_config) == (switch, {"a": [switch], "b": "none"})
    recipe.write_text(yaml.safe_dump(MINIMAL) + "mixed_precision: no\nlearning_rate: 1e-5\nuse_ema: on\n")
    config = load(recipe, ["max_train_steps=1e3"])
    assert (config.mixed_precision, config.learning_rate, config.use_ema) == ("no", 1e-5, True)
    assert config.max_train_steps == 1000
    assert load(recipe, ["mixed_precision=no"]).mixed_precision == "no"


def test_one_word_is_a_list_of_one(recipe: Path) -> None:
    config = load(recipe, ["report_to=tensorboard", "validation.prompts=a dog, running", "data.subset=a dog"])
    assert config.report_to == ("tensorboard",)
    assert config.validation.prompts == ("a dog, running",)
    assert config.data.subset == ("a dog",)
    assert load(recipe, ["report_to=[]"]).report_to == ()
    assert load(recipe, ["report_to=[wandb, mlflow]"]).report_to == ("wandb", "mlflow")
    with pytest.raises(MobiusError, match=r"report_to.*'tensorboard', 'wandb' or 'mlflow'.*comet"):
        load(recipe, ["report_to=comet"])


def bomb(reference: str) -> str:
    lines = ["a0: &a0 {x: 1, y: 2}"]
    lines += [f"a{n}: &a{n} {reference.replace('*', f'*a{n - 1}')}" for n in range(1, 30)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    "text",
    [
        bomb("[*, *, *, *, *, *, *, *, *]"),
        bomb("{p: *, q: *, r: *}"),
        bomb("{<<: [*, *, *, *]}"),
        "a: &a [*a]",
        "a: &a {b: *a}",
        "[" * 100_000,
        "{a: " * 100_000,
        "- " * 5_000,
        "unet_config: " + "[" * 60 + "]" * 60,
    ],
    ids=["lists", "mappings", "merges", "itself", "itself in a mapping", "deep", "deep mapping", "deep block", "60"],
)
def test_yaml_that_explodes_is_refused_within_a_second(recipe: Path, text: str) -> None:
    started = time.process_time()
    recipe.write_text(yaml.safe_dump(MINIMAL) + text)
    with pytest.raises(MobiusError, match=recipe.name):
        load(recipe)
    if "\n" not in text:
        recipe.write_text(yaml.safe_dump(MINIMAL))
        with pytest.raises(MobiusError, match="override"):
            load(recipe, [f"unet_config={text.removeprefix('unet_config: ').removeprefix('a: ')}"])
    assert time.process_time() - started < 1


def test_anchors_are_allowed_and_wrong_values_are_cut(recipe: Path) -> None:
    recipe.write_text(yaml.safe_dump(MINIMAL) + "seed: &n 7\ngradient_accumulation_steps: *n\n")
    assert load(recipe).gradient_accumulation_steps == 7
    with pytest.raises(MobiusError) as refused:
        load(recipe, [f"seed=[{'1, ' * 9999}]"])
    assert len(str(refused.value).split("\n  - ")[1]) < 400


def test_the_length_is_set_once_and_epochs_are_rounded_up(recipe: Path) -> None:
    epochs = ["max_train_steps=null", "num_train_epochs=1.5", "train_batch_size=2", "gradient_accumulation_steps=2"]
    config = load(recipe, epochs)
    # 15 samples in steps of 4, and of 8.
    assert config.with_steps(10, 1).steps == 4
    # Of a run that has seen 8 samples in 4 steps of 2, 7 are left: 2 steps of 4.
    assert config.with_steps(10, 1, step=4, samples_seen=8).steps == 6
    assert config.with_steps(10, 1, step=4, samples_seen=16).steps == 4
    resolved = config.with_steps(10, 2)
    assert (resolved.max_train_steps, resolved.num_train_epochs) == (2, None)
    assert resolved.with_steps(99, 1) == resolved
    for overrides in (["num_train_epochs=1"], ["max_train_steps=null"]):
        with pytest.raises(MobiusError, match="max_train_steps or num_train_epochs, and the other to null"):
            load(recipe, overrides)
    with pytest.raises(MobiusError, match=r"num_train_epochs=1\.5 of 10 clips.*\n.*lr_warmup_steps=4 must be less"):
        load(recipe, [*epochs, "lr_warmup_steps=4"]).with_steps(10, 1)


def test_no_credential_is_in_the_text_for_others(recipe: Path) -> None:
    config = load(recipe, ["data.train=https://me:secret@example.org/{0..3}.tar?token=hidden"])
    assert "secret" in config.dump()
    text = dump_yaml(config.public_values())
    assert "secret" not in text
    assert "hidden" not in text
    assert "train: https://example.org/{0..3}.tar\n" in text


@pytest.mark.parametrize(
    "text",
    [
        "true love",
        "Trueman",
        "falsetto",
        "1e5 apples",
        "2e3x",
        "23e9",
        "1e-4",
        "no",
        "~",
        "1_000",
        "2024-01-01",
        "0x1f",
    ],
)
def test_texts_stay_texts(text: str) -> None:
    """Words that begin like a switch or a number, and words that YAML 1.1 or 1.2 take for another value."""
    assert parse_yaml(dump_yaml({"prompts": [text]})) == {"prompts": [text]}
    assert yaml.safe_load(dump_yaml([text])) == [text]
    if " " in text or text.endswith(("x", "n", "o")):
        assert parse_yaml(text) == text


@pytest.mark.parametrize("value", [1e-4, 1e30, -2.5, 3, True, None, "a: b", ["x", {"y": 1e-08}]])
def test_values_are_read_as_they_were_written(value: object) -> None:
    assert parse_yaml(dump_yaml(value)) == value


@pytest.mark.parametrize("quantiles", ["[-0.5]", "[1.5]", "[]"])
def test_quantiles_are_inside_the_schedule(recipe: Path, quantiles: str) -> None:
    with pytest.raises(MobiusError, match=r"validation\.timestep_quantiles"):
        load(recipe, [f"validation.timestep_quantiles={quantiles}"])


def test_an_autoencoder_is_not_named_by_the_field_of_other_stages(recipe: Path) -> None:
    fields = ["stage=autoencoder", "pretrained_model_name_or_path=vae"]
    with pytest.raises(MobiusError, match="vae_name_or_path is of the other stages"):
        load(recipe, [*fields, "vae_name_or_path=other"])
