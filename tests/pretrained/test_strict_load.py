"""Every loader of a pretrained model accounts for every weight, and names the file that is at fault."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from text_encoders import load_text_encoder
from tiny import save_pipeline
from transformers import BertConfig, BertModel, CLIPConfig, CLIPModel, CLIPTextModel

from mobius_train.assembly.load_model import load_image_or_video_model, load_part
from mobius_train.errors import MobiusError
from mobius_train.models import ParallelUNet
from mobius_train.models.composite import Composite
from mobius_train.pipeline import TextToVideoPipeline
from mobius_train.prepare.stages import model_files
from mobius_train.pretrained.strict_load import load_diffusers

CPU = torch.device("cpu")
UNET, TEXT = "diffusion_pytorch_model.safetensors", "model.safetensors"
SIZES: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
VISION = SIZES | {"image_size": 8, "patch_size": 4}
Load = Callable[[Path], Any]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of an image model, with the parts of one of ours beside it."""
    folder = save_pipeline(tmp_path_factory.mktemp("models") / "sd", "small")
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    model = ParallelUNet.from_unet2d(unet)
    text = load_text_encoder(str(folder), CPU)
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    scheduler = load_part(DDPMScheduler, "scheduler", None, str(folder))
    TextToVideoPipeline(vae, text.model, text.tokenizer, model, scheduler).save_pretrained(folder / "ours")
    return folder


def load_ours(folder: Path) -> Composite:
    return ParallelUNet.from_pretrained(folder / "ours" / "unet")


def load_pipeline(folder: Path) -> TextToVideoPipeline:
    return TextToVideoPipeline.from_pretrained(folder / "ours")


def load_image_model(folder: Path) -> Any:
    return load_image_or_video_model(None, str(folder))


def load_vae(folder: Path) -> Any:
    return load_part(AutoencoderKL, "vae", None, str(folder))


def load_text(folder: Path) -> Any:
    return load_text_encoder(str(folder), CPU)


# What is loaded, and a file of weights that it reads.
LOADERS: dict[str, tuple[Load, str]] = {
    "image model": (load_image_model, f"unet/{UNET}"),
    "autoencoder": (load_vae, f"vae/{UNET}"),
    "text encoder": (load_text, f"text_encoder/{TEXT}"),
    "video model, spatial": (load_ours, f"ours/unet/spatial/{UNET}"),
    "video model, ring": (load_ours, f"ours/unet/ring/{UNET}"),
    "pipeline, unet": (load_pipeline, f"ours/unet/ring/{UNET}"),
    "pipeline, vae": (load_pipeline, f"ours/vae/{UNET}"),
    "pipeline, text": (load_pipeline, f"ours/text_encoder/{TEXT}"),
}
PARAMETERS = pytest.mark.parametrize(("load", "file"), LOADERS.values(), ids=LOADERS.keys())


def of_layer(state: dict[str, torch.Tensor]) -> str:
    """The name of a weight inside a layer, not of a pooler."""
    return next(name for name in sorted(state) if name.endswith("weight") and ".0." in name and state[name].ndim > 1)


@PARAMETERS
def test_missing_unexpected_and_misshapen_weights_are_refused(
    source: Path, tmp_path: Path, load: Load, file: str
) -> None:
    folder = shutil.copytree(source, tmp_path / "copy")
    load(folder)  # the control
    path = folder / file
    whole = load_file(path)
    name = of_layer(whole)
    extra = name.replace(".0.", ".77.", 1)
    for state, fault in (
        ({n: t for n, t in whole.items() if n != name}, f"{name} is missing"),
        (whole | {extra: torch.ones(2)}, f"{extra} is not a weight"),
        (whole | {name: torch.ones(3, 5)}, rf"{name} has the shape \(3, 5\)"),
    ):
        save_file(state, path, metadata={"format": "pt"})
        with pytest.raises(MobiusError, match=fault) as refused:
            load(folder)
        assert file in str(refused.value)


@PARAMETERS
def test_a_damaged_file_is_named_with_the_cause(source: Path, tmp_path: Path, load: Load, file: str) -> None:
    folder = shutil.copytree(source, tmp_path / "copy")
    path = folder / file
    whole = path.read_bytes()
    config = path.with_name("config.json")
    good = config.read_text()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    for changed, content, cause in (
        (path, pointer, "git-lfs pointer"),
        (path, b"", "damaged"),
        (path, whole[: len(whole) // 2], "truncated"),
        (path, whole[:-1], "truncated"),
        (config, pointer, "git-lfs pointer"),
        (config, b"\xff\xfe{}", "UTF-8"),
        (config, b"[]", "configuration"),
        (config, b"{", "JSON"),
        (config, b'{"a":' * 100_000, "nested"),
        (
            config,
            json.dumps(json.loads(good) | {"norm_num_groups": 0, "num_attention_heads": 0}).encode(),
            "cannot load",
        ),
    ):
        path.write_bytes(whole)
        config.write_text(good)
        changed.write_bytes(content)
        with pytest.raises(MobiusError, match=cause) as refused:
            load(folder)
        assert str(changed.parent) in str(refused.value)
        assert "\n" not in str(refused.value)
    path.unlink()
    config.write_text(good)
    with pytest.raises(MobiusError, match="contains no weights"):
        load(folder)


def test_an_index_that_promises_more_than_its_files_is_refused(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "unet"
    UNet2DConditionModel.from_pretrained(source / "unet").save_pretrained(folder, max_shard_size="200KB")
    expected = load_file(source / "unet" / UNET)
    loaded = load_diffusers(UNet2DConditionModel, folder).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    shard = sorted(folder.glob("*.safetensors"))[0]
    state = load_file(shard)
    name = state.popitem()[0]
    save_file(state, shard)
    with pytest.raises(MobiusError, match=rf"index\.json.*{shard.name}.*{name} is only in the index"):
        load_diffusers(UNet2DConditionModel, folder)
    shard.unlink()
    with pytest.raises(MobiusError, match=rf"{shard.name}.*no such file"):
        load_diffusers(UNet2DConditionModel, folder)


def test_other_towers_and_poolers_are_harmless(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source / "tokenizer", tmp_path, dirs_exist_ok=True)
    text = CLIPTextModel.from_pretrained(source / "text_encoder")
    config = CLIPConfig(text_config=text.config.to_dict(), vision_config=VISION, projection_dim=8)
    CLIPModel(config).save_pretrained(tmp_path)
    state = load_file(tmp_path / TEXT)
    save_file(state | {"text_model.embeddings.position_ids": torch.arange(16)}, tmp_path / TEXT, {"format": "pt"})
    loaded = load_text_encoder(str(tmp_path), CPU).model.state_dict()
    assert torch.equal(
        loaded["embeddings.token_embedding.weight"], state["text_model.embeddings.token_embedding.weight"]
    )

    bert = BertModel(BertConfig(vocab_size=9, **SIZES))
    bert.save_pretrained(tmp_path)
    state = load_file(tmp_path / TEXT)
    save_file({n: t for n, t in state.items() if "pooler" not in n}, tmp_path / TEXT, {"format": "pt"})
    load_text_encoder(str(tmp_path), CPU)


def test_a_model_of_a_preparation_stage_is_loaded_strictly(source: Path, tmp_path: Path) -> None:
    CLIPModel(CLIPConfig(vision_config=VISION, text_config=SIZES)).save_pretrained(tmp_path)
    model_files.check(str(tmp_path), "CLIPVisionModelWithProjection")
    model_files.read.cache_clear()
    state = load_file(tmp_path / TEXT)
    save_file({n: t for n, t in state.items() if n != "visual_projection.weight"}, tmp_path / TEXT, {"format": "pt"})
    with pytest.raises(MobiusError, match=r"visual_projection\.weight is missing"):
        model_files.check(str(tmp_path), "CLIPVisionModelWithProjection")


def test_weights_of_one_variant_alone_are_loaded(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(source, tmp_path / "copy")
    for path in (folder / "unet" / UNET, folder / "text_encoder" / TEXT):
        half = {name: tensor.half() for name, tensor in load_file(path).items()}
        save_file(half, path.with_suffix(".fp16.safetensors"), {"format": "pt"})
    path = folder / "unet" / UNET
    with caplog.at_level(logging.WARNING):
        whole = load_image_model(folder).state_dict()
    assert "fp16" not in caplog.text
    path.unlink()
    (folder / "text_encoder" / TEXT).unlink()
    with caplog.at_level(logging.WARNING):
        loaded = load_image_model(folder).state_dict()
        load_text(folder)
    assert f"{folder / 'unet'} has only fp16 weights" in caplog.text
    assert f"{folder / 'text_encoder'} has only fp16 weights" in caplog.text
    name = of_layer(whole)
    assert loaded[name].dtype == torch.float32
    assert torch.equal(loaded[name], whole[name].half().float())
    assert not torch.equal(loaded[name], whole[name])


def test_a_part_that_is_not_there_is_named(source: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(source, tmp_path / "copy")
    shutil.rmtree(folder / "vae")
    with pytest.raises(MobiusError, match=r"no vae in .*vae/config\.json nor config\.json"):
        load_vae(folder)
    shutil.rmtree(folder / "scheduler")
    with pytest.raises(MobiusError, match=r"scheduler/scheduler_config\.json"):
        load_part(DDPMScheduler, "scheduler", None, str(folder))
    with pytest.raises(MobiusError, match="UNet2DConditionModel, not a AutoencoderKL"):
        load_part(AutoencoderKL, "unet", None, str(folder))
