"""One recipe, one set of parts: whatever the tensors come from, names, shapes, dtypes and what is trained agree."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from recipes import RECIPES, REPOSITORY, recipe, write
from tiny import KINDS, save_pipeline
from tiny_sd import save_pixart, save_sd3, save_sdxl
from torch import nn

from mobius_train.assembly.model_configs import find_configs
from mobius_train.assembly.parts import autoencoder_of, frozen_hash_in, load_parts, parts_of
from mobius_train.assembly.weights import Pretrained, Random, WeightSource
from mobius_train.config import RunConfig, load
from mobius_train.dtypes import Dtypes
from mobius_train.encoders.encoders import Encoders
from mobius_train.errors import MobiusError
from mobius_train.models import weights_hash

CPU, META = torch.device("cpu"), torch.device("meta")
CONFIGS = REPOSITORY / "configs"
NAMES = [path.stem for path in RECIPES]
Entry = tuple[str, torch.Size, torch.dtype, bool]


def read(name: str, tiny: dict[str, Path]) -> tuple[RunConfig, Path]:
    """A recipe; models that are not in this repository are replaced by tiny ones of their kind."""
    path = CONFIGS / f"{name}.yaml"
    config = load(path, ["data.train=x", "data.validation=null"])
    changes: dict[str, object] = {}
    if name == "emoji_t2i":
        # What emoji_vae.yaml would have written.
        changes = {"vae_name_or_path": str(REPOSITORY / "assets" / "emoji-backbone")}
    elif name == "emoji_sd3":
        changes = dict.fromkeys(("pretrained_model_name_or_path", "vae_name_or_path"), str(tiny["sd3 of MiniLM"]))
        # The tiny transformer has fewer blocks.
        changes["fusion_depth"] = 1
    elif not name.startswith("emoji"):
        kind = name if name in tiny else "sd3" if name.startswith("sd3") else "sd21"
        changes = {
            # The tiny transformer has positions for 128 px.
            "data": config.data.model_copy(update={"resolution": 64}),
            "pretrained_model_name_or_path": str(tiny[kind]),
            "vae_name_or_path": None,
            "text_encoder_name_or_path": None,
            "max_text_tokens": None,
            "unet_config": None if config.unet_config is None else config.unet_config | KINDS["sd21"],
        }
    return config.model_copy(update=changes), path


def entries(config: RunConfig, weights: WeightSource, device: torch.device) -> list[Entry]:
    """All tensors of a recipe's models; the trained module as an engine casts it."""
    return sorted(_entries(config, weights, device))


def _entries(config: RunConfig, weights: WeightSource, device: torch.device) -> Iterator[Entry]:
    if config.stage == "autoencoder":
        models: dict[str, Any] = {"vae": autoencoder_of(config, weights, device)}
    else:
        parts = parts_of(config, weights, device)
        parts.denoiser.trained.to(Dtypes.of(config).trained)
        encoders = parts.encoders
        models = {"denoiser": parts.denoiser, "vae": encoders.images.vae, **_text(encoders)}
    for name, model in models.items():
        for inner, tensor in (*model.named_parameters(), *model.named_buffers()):
            yield f"{name}.{inner}", tensor.shape, tensor.dtype, tensor.requires_grad


def _text(encoders: Encoders) -> dict[str, Any]:
    return {part: encoder.model for part, encoder in encoders.text.encoders.items()}


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Stable Diffusion 2.x, XL and 3 and PixArt-Σ of a few channels, by kind or recipe."""
    folder = tmp_path_factory.mktemp("models")
    pipelines = {"sd21": save_pipeline(folder / "sd21", "sd21")}
    pipelines["pixart_sigma"] = save_pixart(folder / "pixart", sigma=True)
    pipelines["sd3 of MiniLM"] = save_sd3(folder / "sd3-of-minilm", with_t5=False, text=384, pooled=384)
    return pipelines | {"sdxl": save_sdxl(folder / "sdxl"), "sd3": save_sd3(folder / "sd3")}


@pytest.mark.parametrize("name", NAMES)
def test_fake_random_and_pretrained_parts_agree(name: str, tiny: dict[str, Path]) -> None:
    config, path = read(name, tiny)
    configs = find_configs(config, path)
    fake = entries(config, Random(configs, META), META)
    assert entries(config, Random(configs, CPU), CPU) == fake
    assert entries(config, Pretrained(), CPU) == fake
    assert any(requires_grad for *_, requires_grad in fake)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [("sd21", {"ring_width": 0.5, "fusion_depth": 1, "trained_tail": True}), ("sd3", {"ring_width": 0.5})],
)
def test_a_video_model_whose_training_continues_keeps_its_shape(
    kind: str, shape: dict[str, Any], tiny: dict[str, Path], tmp_path: Path
) -> None:
    config, path = read("sd3_medium" if kind == "sd3" else "sd21", tiny)
    new = config.model_copy(update={"ring_width": None, "fusion_depth": None, "tail_temporal_layers": None} | shape)
    model = cast(nn.Module, parts_of(new, Pretrained(), CPU).denoiser)
    shutil.copytree(tiny[kind], tmp_path / "final")
    part = "transformer" if kind == "sd3" else "unet"
    shutil.rmtree(tmp_path / "final" / part)
    cast(Any, model).save_pretrained(tmp_path / "final" / part)
    given = dict.fromkeys(shape) | {"pretrained_model_name_or_path": str(tmp_path / "final")}
    continued = new.model_copy(update=given)
    configs = find_configs(continued, path)
    fake = entries(continued, Random(configs, META), META)
    assert entries(continued, Pretrained(), CPU) == fake
    # The control: a new ring has the paper's shape.
    of_image_model = continued.model_copy(update={"pretrained_model_name_or_path": str(tiny[kind])})
    assert entries(of_image_model, Random(find_configs(of_image_model, path), META), META) != fake


def test_frozen_blocks_in_the_graph_are_not_in_fp16_without_a_loss_scale(tiny: dict[str, Path]) -> None:
    config, path = read("sd21", tiny)
    half = config.model_copy(update={"frozen_dtype": "fp16", "mixed_precision": "no", "fusion_depth": 1})
    weights = Random(find_configs(half, path), META)
    with pytest.raises(MobiusError, match=r"frozen_dtype=fp16.*mixed_precision=no"):
        parts_of(half, weights, META)
    # No frozen block runs behind the fusion.
    for changes in ({"trained_tail": True}, {"fusion_depth": 0, "tail_temporal_layers": None, "ring_width": 1.0}):
        parts_of(half.model_copy(update=changes), weights, META)


def test_the_comparison_sees_a_dtype_and_what_is_trained(tiny: dict[str, Path]) -> None:
    config, path = read("emoji", tiny)
    configs = find_configs(config, path)
    expected = entries(config, Random(configs, META), META)
    for changes in ({"frozen_dtype": "bf16"}, {"mode": "serial"}, {"mode": "full"}, {"ring_width": 1.0}):
        assert entries(config.model_copy(update=changes), Random(configs, META), META) != expected


@pytest.mark.parametrize(
    ("prediction", "gamma", "warns"),
    [("v_prediction", 5.0, True), ("v_prediction", None, False), ("epsilon", 5.0, False)],
)
def test_min_snr_with_velocities_is_not_for_motion(
    tiny_pipeline: Path,
    clips_folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    prediction: str,
    gamma: float | None,
    warns: bool,
) -> None:
    objective = {"prediction_type": prediction, "snr_gamma": gamma}
    values = recipe(tiny_pipeline, clips_folder, tmp_path / "out", objective=objective)
    load_parts(load(write(tmp_path / "recipe.yaml", values)), Pretrained(), CPU)
    assert ("objective.snr_gamma" in caplog.text) == warns


def test_the_hash_of_new_frozen_weights_is_that_of_the_run(tiny: dict[str, Path]) -> None:
    """The frozen branch of a recipe with unet_config is random, by the recipe's seed."""
    config, path = read("emoji", tiny)
    new = config.model_copy(update={"unet_config": find_configs(config, path).image_model})
    frozen = parts_of(new, Pretrained(), CPU).denoiser.frozen
    assert frozen is not None
    state = torch.get_rng_state()
    assert frozen_hash_in(new, torch.float32) == weights_hash(frozen, torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    # The controls.
    assert frozen_hash_in(new.model_copy(update={"seed": 1}), torch.float32) != frozen_hash_in(new, torch.float32)
    assert frozen_hash_in(config, torch.float32) != frozen_hash_in(new, torch.float32)
