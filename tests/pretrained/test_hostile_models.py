"""Model folders from strangers, given to a training: no code of theirs runs, and nothing is read from stdin."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from hostile_pickle import Command
from text_encoders import load_text_encoder
from tiny import save_pipeline
from transformers import CLIPTokenizerFast

from mobius_train.assembly.load_model import load_image_or_video_model, load_part
from mobius_train.errors import MobiusError
from mobius_train.prepare.stages import model_files

CPU = torch.device("cpu")
Load = Callable[[Path], Any]
LOADERS: dict[str, tuple[Load, str, str]] = {
    "image model": (lambda f: load_image_or_video_model(None, str(f)), "unet", "diffusion_pytorch_model"),
    "autoencoder": (lambda f: load_part(AutoencoderKL, "vae", None, str(f)), "vae", "diffusion_pytorch_model"),
    "text encoder": (lambda f: load_text_encoder(str(f), CPU), "text_encoder", "model"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_pipeline(tmp_path / "sd", "sd15")


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "the-command-ran"


@pytest.mark.parametrize(("load", "part", "stem"), LOADERS.values(), ids=LOADERS.keys())
def test_a_pickle_with_code_is_refused_by_name(folder: Path, marker: Path, load: Load, part: str, stem: str) -> None:
    (folder / part / f"{stem}.safetensors").unlink()
    path = folder / part / ("pytorch_model.bin" if stem == "model" else f"{stem}.bin")
    for zipped in (True, False):
        torch.save({"a": Command(marker)}, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(MobiusError, match=rf"{path.name}.*code"):
            load(folder)
        assert not marker.exists()


def test_a_model_that_brings_code_is_refused_without_a_question(
    folder: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", StringIO("y\n" * 9))
    for place in (folder / "text_encoder", shutil.copytree(folder / "text_encoder", folder / "captioner")):
        (place / "code.py").write_text(f"open({str(marker)!r}, 'w')\n")
        path = place / "config.json"
        code = {"AutoConfig": "code.C", "AutoModel": "code.M", "AutoProcessor": "code.P", "AutoTokenizer": "code.T"}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "unheard-of", "auto_map": code}))
    with pytest.raises(MobiusError, match=r"text_encoder: it needs Python code.*never run"):
        load_text_encoder(str(folder), CPU)
    for kind in ("AutoProcessor", "AutoModelForImageTextToText"):
        with pytest.raises(MobiusError, match="captioner"):
            model_files.check(str(folder / "captioner"), kind)
    assert not marker.exists()
    assert sys.stdin.read() == "y\n" * 9


@pytest.mark.parametrize("name", ["package:os.path", "package:..tests", "package:/etc", "package:", "package:a-b"])
def test_only_plain_names_of_packages_are_looked_up(name: str) -> None:
    before = set(sys.modules)
    with pytest.raises(MobiusError, match=r"not the name of a package"):
        load_text_encoder(name, CPU)
    assert set(sys.modules) == before


def test_a_package_with_a_model_is_found_without_its_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "some_encoder"
    save_pipeline(package / "model", "sd15")
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    shutil.copytree(package / "model" / "text_encoder", package, dirs_exist_ok=True)
    shutil.copytree(package / "model" / "tokenizer", package, dirs_exist_ok=True)
    monkeypatch.syspath_prepend(tmp_path)
    assert load_text_encoder("package:some_encoder", CPU).max_tokens == 16


def test_a_hub_name_that_was_never_downloaded(tmp_path: Path) -> None:
    for load in (
        lambda: load_image_or_video_model(None, "someone/something"),
        lambda: load_part(AutoencoderKL, "vae", None, "someone/something"),
        lambda: load_text_encoder("someone/something", CPU),
        lambda: model_files.check("someone/something", "AutoProcessor"),
    ):
        with pytest.raises(MobiusError, match=r"not on this machine.*HF_HUB_OFFLINE=1.*hf download someone/something"):
            load()
    (tmp_path / "file").write_text("")
    with pytest.raises(MobiusError, match="is a file"):
        load_text_encoder(str(tmp_path / "file"), CPU)


def test_a_vocabulary_of_gigabytes_is_not_read(folder: Path) -> None:
    path = folder / "tokenizer" / "tokenizer_config.json"
    os.truncate(path, 3 * 2**30)
    with pytest.raises(MobiusError, match=r"tokenizer_config\.json has 3221225472 bytes, the limit is 268435456"):
        load_text_encoder(str(folder), CPU)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(MobiusError, match=r"tokenizer_config\.json: not a regular file"):
        load_text_encoder(str(folder), CPU)


def test_a_token_without_an_embedding_is_refused(folder: Path) -> None:
    tokenizer = CLIPTokenizerFast.from_pretrained(folder / "tokenizer")
    tokenizer.add_tokens(["<my-cat>"])
    tokenizer.save_pretrained(folder / "tokenizer")
    with pytest.raises(MobiusError, match=r"tokenizer.*7 tokens.*embeddings of 6"):
        load_text_encoder(str(folder), CPU)
