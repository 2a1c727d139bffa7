"""A recipe may name its pipeline on a hub: all parts are found in it, as in a local folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants
from recipes import Run
from tiny import save_pipeline
from transformers import BertConfig, BertModel, BertTokenizerFast

from mobius_train.errors import MobiusError

pytestmark = pytest.mark.slow


def _save_text_encoder(pipeline: Path, width: int) -> None:
    BertModel(
        BertConfig(vocab_size=8, hidden_size=width, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    ).save_pretrained(pipeline / "text_encoder")
    vocabulary = pipeline / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "dog", "number", "3"]))
    BertTokenizerFast(str(vocabulary), model_max_length=16).save_pretrained(pipeline / "tokenizer")


def test_a_dry_run_finds_every_part_under_one_hub_name(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = save_pipeline(tmp_path / "pipeline")
    _save_text_encoder(pipeline, width=384)
    # What a download leaves in the hub's cache.
    repository = tmp_path / "hub" / "models--someone--something"
    shutil.copytree(pipeline, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    # The library reads HF_HUB_CACHE once, when it is imported.
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    run(dry=True, pretrained_model_name_or_path="someone/something", text_encoder_name_or_path=None)
    assert "nothing was written" in capsys.readouterr().out
    # The control: an empty cache.
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(MobiusError, match="someone/something"):
        run(dry=True, pretrained_model_name_or_path="someone/something", text_encoder_name_or_path=None)
