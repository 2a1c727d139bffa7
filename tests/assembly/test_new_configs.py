"""Configurations of models and schedulers that cannot be what they say are refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, Transformer2DModel
from recipes import recipe, write
from tiny_sd import save_pixart

from mobius_train.assembly.load_model import load_image_or_video_model
from mobius_train.assembly.load_scheduler import load_scheduler
from mobius_train.assembly.new_configs import check_new_configs
from mobius_train.config import RunConfig, load
from mobius_train.errors import MobiusError

FLOW = "FlowMatchEulerDiscreteScheduler"


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"_class_name": "FlowMatchEulerScheduler"}, "no scheduler FlowMatchEulerScheduler"),
        ({"_class_name": "FlowMatchHeunDiscreteScheduler", "shift": 3.0}, "FlowMatchHeun.* has no betas"),
        ({"_class_name": "FlowMatchLCMScheduler"}, "FlowMatchLCM.* has no betas"),
        ({"_class_name": "EDMDPMSolverMultistepScheduler"}, "EDM.* has no betas"),
        ({"_class_name": "UNet2DConditionModel"}, "no scheduler UNet2DConditionModel"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "UniPC.* is set to flow matching"),
        ({"_class_name": "DDIMScheduler", "prediction_type": "flow_prediction"}, "DDIM.* is set to flow matching"),
    ],
)
@pytest.mark.parametrize("saved", [False, True])
def test_a_scheduler_that_records_no_supported_process(
    values: dict[str, Any], named: str, saved: bool, tmp_path: Path
) -> None:
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(values))
    with pytest.raises(MobiusError, match=rf"{named}: .*{FLOW}"):
        load_scheduler(*((None, str(tmp_path)) if saved else (values, None)))


def test_every_sampler_of_a_ddpm_model_records_its_schedule(tmp_path: Path) -> None:
    names = ("DDPM", "DDIM", "PNDM", "EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep", "UniPCMultistep")
    for name in (f"{name}Scheduler" for name in names):
        getattr(diffusers, name)(beta_end=0.03).save_pretrained(tmp_path / name / "scheduler")
        loaded = load_scheduler(None, str(tmp_path / name))
        assert isinstance(loaded, DDPMScheduler)
        assert loaded.config.beta_end == 0.03
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(tmp_path / FLOW / "scheduler")
    assert load_scheduler(None, str(tmp_path / FLOW)).config.shift == 3


def _recipe(folder: Path, **changes: Any) -> RunConfig:
    return load(write(folder / "recipe.yaml", recipe(folder, folder, folder / "out", **changes)))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"scheduler_config": {"_class_name": FLOW, "shfit": 3.0}}, rf"{FLOW}.*shfit; did you mean shift\?"),
        ({"scheduler_config": {"beta_strat": 0.1}}, r"DDPMScheduler.*beta_strat; did you mean beta_start\?"),
        (
            {"unet_config": {"_class_name": "SD3Transformer2DModel", "qk_nrm": "rms_norm"}},
            r"SD3Transformer2DModel.*qk_nrm; did you mean qk_norm\?",
        ),
        ({"unet_config": {"layers_per_blok": 1}}, r"UNet2DConditionModel.*layers_per_blok; did you mean layers_per"),
        ({"vae_config": {"scale": 1.0}}, r"vae_config.*AutoencoderKL.*scale"),
    ],
)
def test_a_name_that_the_class_does_not_have(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(MobiusError, match=rf"(?s){named}"):
        check_new_configs(_recipe(tmp_path, **changes))


def test_a_saved_configuration_is_accepted(tmp_path: Path) -> None:
    unet = dict(diffusers.UNet2DConditionModel(block_out_channels=(32, 32, 32, 32)).config)
    check_new_configs(_recipe(tmp_path, unet_config=unet | {"_diffusers_version": "0.1"}))


def test_a_transformer_of_another_kind_under_pixarts_name(tmp_path: Path) -> None:
    folder = save_pixart(tmp_path / "pixart", sigma=False)
    shutil.rmtree(folder / "transformer")
    classes = {"norm_type": "ada_norm_zero", "num_embeds_ada_norm": 10, "activation_fn": "gelu-approximate"}
    sizes = {"num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 1}
    dit: Any = Transformer2DModel
    dit(**sizes, **classes, sample_size=8, patch_size=2).save_pretrained(folder / "transformer")
    with pytest.raises(MobiusError, match=r"Transformer2DModel with norm_type=ada_norm_zero cannot be a backbone"):
        load_image_or_video_model(None, str(folder))
    path = folder / "transformer" / "config.json"
    values = json.loads(path.read_text())
    del values["_class_name"]
    path.write_text(json.dumps(values))
    with pytest.raises(MobiusError, match=r"transformer.config\.json has no _class_name"):
        load_image_or_video_model(None, str(folder))
