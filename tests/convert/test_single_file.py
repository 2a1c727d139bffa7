from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from latent_diffusion_names import single_file
from safetensors.torch import save_file
from torch import Tensor

from mobius_train.convert.image_model import from_image_model
from mobius_train.convert.single_file import from_single_file
from mobius_train.errors import MobiusError
from mobius_train.models import weights_hash


@pytest.fixture
def config(stable_diffusion: dict[str, Path], tmp_path: Path) -> Path:
    """Configurations without any weights."""
    ignored = shutil.ignore_patterns("*.safetensors", "*.bin")
    return Path(shutil.copytree(stable_diffusion["sd15"], tmp_path / "config", ignore=ignored))


@pytest.fixture
def state(stable_diffusion: dict[str, Path]) -> dict[str, Tensor]:
    return {name: t.contiguous() for name, t in single_file(stable_diffusion["sd15"]).items()}


@pytest.mark.parametrize("kind", ["safetensors", "ckpt"])
def test_all_weights_arrive(
    stable_diffusion: dict[str, Path], config: Path, state: dict[str, Tensor], kind: str, tmp_path: Path
) -> None:
    extra = {
        "alphas_cumprod": torch.linspace(1, 0, 10),
        "model_ema.decay": torch.tensor(0.9),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(16)[None],
    }
    path = tmp_path / f"model.{kind}"
    if kind == "safetensors":
        save_file(state | extra, path)
    else:
        torch.save({"state_dict": state | extra, "global_step": 3}, path)
    report = from_single_file(path, config, tmp_path / "out")
    written = StableDiffusionPipeline.from_pretrained(tmp_path / "out", safety_checker=None)
    expected = StableDiffusionPipeline.from_pretrained(stable_diffusion["sd15"], safety_checker=None)
    for part in ("unet", "vae", "text_encoder"):
        assert weights_hash(getattr(written, part)) == weights_hash(getattr(expected, part))
    assert {what for what, _ in report.left_out} == extra.keys()
    from_image_model(tmp_path / "out", tmp_path / "video", "parallel")


def test_stable_diffusion_2_has_an_open_clip_encoder(stable_diffusion: dict[str, Path], tmp_path: Path) -> None:
    source, path = stable_diffusion["sd21"], tmp_path / "model.safetensors"
    state = {name: tensor.contiguous() for name, tensor in single_file(source, open_clip=True).items()}
    save_file(state, path)
    ignored = shutil.ignore_patterns("*.safetensors", "*.bin")
    config = Path(shutil.copytree(source, tmp_path / "config", ignore=ignored))
    report = from_single_file(path, config, tmp_path / "out")
    written = StableDiffusionPipeline.from_pretrained(tmp_path / "out", safety_checker=None)
    expected = StableDiffusionPipeline.from_pretrained(source, safety_checker=None)
    for part in ("unet", "vae", "text_encoder"):
        assert weights_hash(getattr(written, part)) == weights_hash(getattr(expected, part))
    assert not report.left_out


# Names in the file and, without the blocks, in diffusers.
LACKING = {
    "model.diffusion_model.middle_block.0.in_layers.2.weight": r"in_layers\.2|conv1\.weight",
    "first_stage_model.decoder.conv_out.weight": r"conv_out\.weight",
    "cond_stage_model.transformer.text_model.final_layer_norm.weight": r"text_encoder: .*final_layer_norm\.weight",
}


def test_nothing_is_dropped_or_made_up_in_silence(config: Path, state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(state | {"model.diffusion_model.control.weight": torch.ones(3)}, path)
    with pytest.raises(MobiusError, match=r"control\.weight"):
        from_single_file(path, config, tmp_path / "out")
    for name, told in LACKING.items():
        save_file({n: t for n, t in state.items() if n != name}, path)
        with pytest.raises(MobiusError, match=rf"model\.safetensors|{told}"):
            from_single_file(path, config, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_other_families_and_missing_configurations_are_refused(
    stable_diffusion: dict[str, Path], config: Path, state: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    with pytest.raises(MobiusError, match=r"model_index\.json"):
        from_single_file(path, tmp_path, tmp_path / "out")
    save_file({"some.weight": torch.ones(2)}, path)
    with pytest.raises(MobiusError, match=r"model\.safetensors"):
        from_single_file(path, config, tmp_path / "out")
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(MobiusError, match=r"model\.safetensors"):
        from_single_file(path, config, tmp_path / "out")
    with pytest.raises(MobiusError, match=r"none\.ckpt"):
        from_single_file(tmp_path / "none.ckpt", config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
