"""A recipe may name its pipeline on a hub: all parts are found in it, as in a local folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launching import clean_environment
from recipes import DS_CONFIGS, REPOSITORY, recipe, write
from tiny import save_pipeline
from transformers import BertConfig, BertModel, BertTokenizerFast

pytestmark = pytest.mark.distributed


def _save_text_encoder(pipeline: Path, width: int) -> None:
    BertModel(
        BertConfig(vocab_size=8, hidden_size=width, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    ).save_pretrained(pipeline / "text_encoder")
    vocabulary = pipeline / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "dog", "number", "3"]))
    BertTokenizerFast(str(vocabulary), model_max_length=16).save_pretrained(pipeline / "tokenizer")


def test_a_dry_run_finds_every_part_under_one_hub_name(clips_folder: Path, tmp_path: Path) -> None:
    pipeline = save_pipeline(tmp_path / "pipeline")
    _save_text_encoder(pipeline, width=384)
    # What a download leaves in the hub's cache.
    repository = tmp_path / "hub" / "models--someone--something"
    shutil.copytree(pipeline, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    values = recipe(pipeline, clips_folder, tmp_path / "out", pretrained_model_name_or_path="someone/something")
    del values["text_encoder_name_or_path"]
    command = [sys.executable, str(REPOSITORY / "mobius_train" / "main.py"), "--dry-run"]
    command += ["--config", str(write(tmp_path / "recipe.yaml", values))]
    command += ["--deepspeed", str(DS_CONFIGS / "zero2.json")]
    environment = clean_environment(HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(tmp_path / "hub"), PATH=os.environ["PATH"])
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert "nothing was written" in result.stdout
