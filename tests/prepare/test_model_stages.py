"""The stages with models, on tiny random ones that are saved and loaded as real ones are."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import made
import numpy as np
import pytest
import torch
import transformers
import yaml
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from mobius_train.errors import MobiusError
from mobius_train.prepare.preparation import prepare_data
from mobius_train.prepare.recipe import PrepareConfig
from mobius_train.prepare.stages.aesthetic import Aesthetic
from mobius_train.prepare.stages.caption import CaptionStage
from mobius_train.prepare.stages.stage import Stage
from mobius_train.prepare.stages.stitch import Stitch
from mobius_train.prepare.stages.summarise import Summarise
from mobius_train.prepare.stages.translate import Translate
from mobius_train.prepare.stages.watermark import Watermark

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<image>"]
WORDS = [*SPECIAL, "a", "the", "red", "square", "moves", "right", "left", "slowly", "user", "方", "块"]
CHAT = (
    "{% for part in messages[0]['content'] %}{{ '<image> ' if part['type'] == 'image' else part['text'] }}{% endfor %}"
)


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"unk": "[UNK]", "pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "bos": "[CLS]", "eos": "[SEP]"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        additional_special_tokens=["<image>"],
        **{f"{role}_token": word for role, word in names.items()},
    )


def _layers(**more: int) -> dict[str, int]:
    return {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, **more}


def _image_processor() -> transformers.CLIPImageProcessor:
    return transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def _words_alone(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """A random model that writes something: its special tokens would be skipped."""
    model.generation_config.suppress_tokens = list(range(len(SPECIAL)))
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """captioner (BLIP), chat (LLaVA), text (T5), clip, classifier, head.safetensors."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    ends = {"bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    text = _layers(vocab_size=len(WORDS), encoder_hidden_size=16, max_position_embeddings=64, **ends)
    vision = _layers(image_size=32, patch_size=16)
    blip = transformers.BlipConfig(text_config=text, vision_config=vision, projection_dim=8, image_text_hidden_size=16)
    _words_alone(transformers.BlipForConditionalGeneration(blip)).save_pretrained(folder / "captioner")
    pictures = transformers.BlipImageProcessor(size={"height": 32, "width": 32})
    transformers.BlipProcessor(pictures, _tokenizer()).save_pretrained(folder / "captioner")

    llama = transformers.LlamaConfig(**_layers(vocab_size=len(WORDS), max_position_embeddings=256), pad_token_id=0)
    llava = transformers.LlavaConfig(
        text_config=llama, vision_config=transformers.CLIPVisionConfig(**vision), image_token_id=4
    )
    _words_alone(transformers.LlavaForConditionalGeneration(llava)).save_pretrained(folder / "chat")
    chat = transformers.LlavaProcessor(
        _image_processor(),
        _tokenizer(),
        patch_size=16,
        vision_feature_select_strategy="default",
        chat_template=CHAT,
        num_additional_image_tokens=1,
    )
    chat.save_pretrained(folder / "chat")

    t5 = transformers.T5Config(
        vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, pad_token_id=0, eos_token_id=3
    )
    t5.decoder_start_token_id = 0
    _words_alone(transformers.T5ForConditionalGeneration(t5)).save_pretrained(folder / "text")
    _tokenizer().save_pretrained(folder / "text")

    clip = transformers.CLIPVisionConfig(**vision, projection_dim=8)
    transformers.CLIPVisionModelWithProjection(clip).save_pretrained(folder / "clip")
    _image_processor().save_pretrained(folder / "clip")
    save_file({"weight": torch.randn(1, 8), "bias": torch.tensor([5.0])}, folder / "head.safetensors")

    vit = transformers.ViTConfig(**vision, id2label={0: "clean", 1: "watermark"}, label2id={"clean": 0, "watermark": 1})
    classifier = transformers.ViTForImageClassification(vit)
    classifier.save_pretrained(folder / "classifier")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "classifier")
    return folder


def _clip(**more: Any) -> made.Candidate:
    return made.clip(made.moving(6), **more)


def _one(stage: Stage, clip: made.Candidate) -> made.Candidate:
    [clip] = stage.apply([clip])
    return clip


def test_a_captioner_describes_frame_after_frame(folder: Path) -> None:
    stage = CaptionStage(name="caption", model=str(folder / "captioner"), frames=3, max_new_tokens=4)
    clip = _one(stage, _clip())
    assert len(clip.drafts) == 3
    assert clip.captions["en"] == next(draft for draft in clip.drafts if draft)
    assert _one(stage, _clip()).captions == clip.captions
    assert _one(stage, _clip(captions={"en": "mine"})).captions == {"en": "mine"}


def test_a_chat_model_sees_all_frames_and_its_question_is_no_answer(folder: Path) -> None:
    stage = CaptionStage(name="caption", model=str(folder / "chat"), frames=2, prompt="user moves", max_new_tokens=3)
    clip = _one(stage, _clip())
    assert len(clip.drafts) == 1
    assert len(clip.captions["en"].split()) <= 3
    other = _one(stage, made.clip(255 - made.moving(6)))
    assert clip.row().keys() == other.row().keys()


def test_a_chat_model_is_shown_all_frames_at_once_and_a_captioner_one_by_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, bool]] = []

    def describe(stage: CaptionStage, pictures: list[Any], chat: bool) -> str:
        seen.append((len(pictures), chat))
        return "words"

    monkeypatch.setattr(CaptionStage, "_describe", describe)
    for model in ("chat", "captioner"):
        _one(CaptionStage(name="caption", model=str(folder / model), frames=3), _clip())
    assert seen == [(3, True), (1, False), (1, False), (1, False)]


def test_a_summary_is_made_of_all_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mobius_train.prepare.stages.model_files.rewrite", lambda model, text, length: text.upper())
    clip = _one(Summarise(name="summarise", model="any", prefix="sum: "), _clip(drafts=["a red square", "moves"]))
    assert clip.captions == {"en": "SUM: A RED SQUARE MOVES"}


def test_drafts_become_one_caption_and_captions_another_language(folder: Path) -> None:
    model = str(folder / "text")
    clip = _one(Summarise(name="summarise", model=model, max_new_tokens=4), _clip(drafts=["a red square", "moves"]))
    assert clip.dropped is None
    assert clip.captions["en"]
    translated = _one(Translate(name="translate", model=model, first_token="方", max_new_tokens=4), clip)
    assert translated.captions["zh"].startswith("方")
    for stage in (Summarise(name="summarise", model=model), Translate(name="translate", model=model)):
        dropped = _one(stage, _clip()).dropped
        assert dropped is not None
        assert dropped.reason == "no caption"


def test_the_aesthetic_score_is_the_head_on_clips_embedding(folder: Path) -> None:
    stage = Aesthetic(
        name="aesthetic", model=str(folder / "clip"), head=folder / "head.safetensors", minimum=-100, frames=1
    )
    clip = _clip()
    score = _one(stage, clip).scores["aesthetic"]["score"]
    processor = transformers.AutoImageProcessor.from_pretrained(folder / "clip")
    model = transformers.CLIPVisionModelWithProjection.from_pretrained(folder / "clip").eval()
    from safetensors.torch import load_file

    head = load_file(folder / "head.safetensors")
    with torch.no_grad():
        embedding = model(**processor(images=[clip.pixels[3]], return_tensors="pt")).image_embeds[0]
    expected = (embedding / embedding.norm()) @ head["weight"][0] + head["bias"][0]
    assert score == pytest.approx(float(expected), abs=1e-3)
    strict = stage.model_copy(update={"minimum": score + 0.1})
    dropped = _one(strict, _clip()).dropped
    assert dropped is not None
    assert dropped.reason == "ugly"


def test_watermarks_are_what_the_classifier_says(folder: Path) -> None:
    model = str(folder / "classifier")
    probability = _one(Watermark(name="watermark", model=model, maximum=1), _clip()).scores["watermark"]["probability"]
    opposite = Watermark(name="watermark", model=model, label="clean", maximum=1)
    assert probability + _one(opposite, _clip()).scores["watermark"]["probability"] == pytest.approx(1, abs=1e-3)
    dropped = _one(Watermark(name="watermark", model=model, maximum=probability - 0.01), _clip()).dropped
    assert dropped is not None
    assert dropped.reason == "watermark"


def test_shots_of_one_event_become_one_clip(folder: Path) -> None:
    frames = made.moving(9)
    frames[6:] = np.random.default_rng(0).integers(0, 256, frames[6:].shape)

    def shots() -> list[made.Candidate]:
        parts = [made.clip(frames[n : n + 3], key=f"a--shot{n // 3}") for n in (0, 3, 6)]
        for number, part in enumerate(parts):
            part.start, part.end = number * 0.3, number * 0.3 + 0.3
        parts[1].start, parts[2].start = parts[0].end, parts[1].end
        return parts

    model = str(folder / "clip")
    first, second = (
        shot.scores.get("stitch") for shot in Stitch(name="stitch", model=model, above=1.0).apply(shots())[1:]
    )
    assert first is not None
    assert second is not None
    assert first["similarity"] > second["similarity"]
    between = (first["similarity"] + second["similarity"]) / 2
    joined = Stitch(name="stitch", model=model, above=between).apply(shots())
    assert [clip.key for clip in joined] == ["a--shot0", "a--shot2"]
    assert (joined[0].pixels == frames[:6]).all()
    assert joined[0].end == pytest.approx(0.6)
    first, _, last = shots()
    apart = Stitch(name="stitch", model=model, above=-1).apply([first, last])
    assert len(apart) == 2  # the one between them was dropped


def _broken(folder: Path, absent: Path) -> dict[str, tuple[dict[str, Any], str]]:
    """Stages whose models don't serve, and what is said of each."""
    bare = absent.with_name("bare")
    bare.mkdir()
    (bare / "config.json").write_bytes((folder / "clip" / "config.json").read_bytes())
    save_file({"weight": torch.zeros(1, 5), "bias": torch.zeros(1)}, bare / "narrow.safetensors")
    clip, text, classifier = (str(folder / name) for name in ("clip", "text", "classifier"))
    narrow = str(bare / "narrow.safetensors")
    return {
        "no folder": ({"name": "caption", "model": str(absent)}, "absent .*AutoProcessor"),
        "no weights": ({"name": "stitch", "model": str(bare)}, "bare "),
        "another kind": ({"name": "summarise", "model": clip}, "clip .*found"),
        "no head": ({"name": "aesthetic", "model": clip, "head": str(absent)}, "absent is not a linear head"),
        "head of another width": (
            {"name": "aesthetic", "model": clip, "head": narrow},
            " 5 features, but .* 8",
        ),
        "no such class": (
            {"name": "watermark", "model": classifier, "label": "logo"},
            "no class 'logo'.* clean, wa",
        ),
        "no such token": (
            {"name": "translate", "model": text, "first_token": "zho"},
            "first_token 'zho'",
        ),
    }


def test_a_model_that_does_not_serve_is_told_before_anything_is_done(tmp_path: Path, folder: Path) -> None:
    source = {"kind": "folder", "path": str(made.heap(tmp_path / "heap", 1))}
    for name, (stage, problem) in _broken(folder, tmp_path / "absent").items():
        with pytest.raises(MobiusError, match=problem):
            prepare_data(made.recipe(tmp_path / name, source, stages=[{"name": "decode"}, stage]))
        assert not (tmp_path / name).exists()


@pytest.mark.distributed
def test_a_whole_recipe_with_models(tmp_path: Path, folder: Path) -> None:
    inputs = made.heap(tmp_path / "heap", 2)
    for caption in inputs.glob("*.txt"):
        caption.unlink()
    stages = [
        {"name": "decode"},
        {"name": "shots"},
        {"name": "stitch", "model": str(folder / "clip")},
        {"name": "watermark", "model": str(folder / "classifier"), "maximum": 1.0},
        {"name": "deduplicate"},
        {"name": "caption", "model": str(folder / "captioner"), "max_new_tokens": 4},
        {"name": "summarise", "model": str(folder / "text"), "max_new_tokens": 4},
        {"name": "translate", "model": str(folder / "text"), "first_token": "方", "max_new_tokens": 4},
    ]
    source = {"kind": "folder", "path": str(inputs), "captions": "optional"}
    outputs = [tmp_path / "one", tmp_path / "two"]
    for output, workers in zip(outputs, (1, 2), strict=True):
        prepare_data(made.recipe(output, source, stages=stages, part_size=1), workers)
    assert made.result(outputs[0]) == made.result(outputs[1])
    assert {tuple(sorted(row["captions"])) for row in made.rows(outputs[0])} == {("en", "zh")}


def test_the_recipe_of_the_page_captions_videos_without_captions(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(made.video(made.moving(20, (320, 256))))
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    [block] = [block for block in page.split("\n\n") if "captions: optional" in block and block.startswith("    ")]
    places = {"my/videos": tmp_path / "videos", "data/captioned": tmp_path / "out", "FOLDER": folder / "captioner"}
    for name, place in places.items():
        block = block.replace(name, str(place))
    prepare_data(PrepareConfig.model_validate(yaml.safe_load(textwrap.dedent(block))))
    [row] = made.rows(tmp_path / "out")
    assert (row["kept"], list(row["captions"]), row["output"]["num_frames"]) == (True, ["en"], 16)
