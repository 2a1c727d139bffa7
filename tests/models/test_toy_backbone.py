"""A new backbone, from the protocol alone: what must hold for every one, and whole runs of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import Run, losses, recipe, write
from safetensors.torch import load_file
from tiny import save_pipeline
from toy_backbone import TOY, ParallelToy, ToyBackbone, ToyImageModel

from mobius_train.conditions import Conditions
from mobius_train.config import load
from mobius_train.engine.spread import Spread
from mobius_train.errors import MobiusError
from mobius_train.models import build_denoiser, families
from mobius_train.models.backbone import fold_conditions, fold_frames, unfold_frames, without_graph
from mobius_train.models.recompute import LayerMemory
from mobius_train.pipeline import load_pipeline
from mobius_train.plan import plan
from mobius_train.ring_shape import PAPER


@pytest.fixture(autouse=True)
def _toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one line that a new backbone adds outside of its folder."""
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, TOY))


def given() -> tuple[torch.Tensor, torch.Tensor, Conditions]:
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(2, 4, 3, 8, 8, generator=generator)
    return sample, torch.tensor([17, 801]), Conditions.of_text(torch.randn(2, 5, 384, generator=generator))


def image_model() -> ToyImageModel:
    torch.manual_seed(0)
    return ToyImageModel().eval()


def stills(model: ToyImageModel) -> torch.Tensor:
    sample, timestep, conditions = given()
    timesteps, conditions = fold_conditions(timestep, conditions, 3)
    return unfold_frames(model(fold_frames(sample), timesteps, conditions["text"])[0], 3)


def test_its_features_are_those_of_the_untouched_model_without_a_graph() -> None:
    model, (sample, timestep, conditions) = image_model(), given()
    folded = fold_frames(sample), *fold_conditions(timestep, conditions, 3)
    backbone = ToyBackbone(model)
    features = list(without_graph(backbone.features(*folded)))
    assert len(features) == len(backbone.layers()) + 1
    assert not any(feature.hidden.requires_grad for feature in features)
    assert torch.equal(backbone.head(features[-1].hidden), fold_frames(stills(model)))


def test_a_new_parallel_model_predicts_what_the_image_model_does() -> None:
    expected = stills(image_model())
    model = build_denoiser(image_model(), "text-to-video", "parallel")
    assert isinstance(model, ParallelToy)
    assert torch.equal(model.predict(*given()), expected)
    # The control: another fusion predicts something else.
    ring: Any = model.ring
    torch.nn.init.normal_(ring.fusion.weight)
    assert not torch.allclose(model.predict(*given()), expected, atol=1e-2)


@pytest.mark.parametrize("memory", [LayerMemory(), LayerMemory(gradient_checkpointing=True)])
def test_every_ring_parameter_learns_and_no_other(memory: LayerMemory) -> None:
    model = build_denoiser(image_model(), "text-to-video", "parallel")
    model.set_memory(memory)
    optimizer = torch.optim.SGD(model.trained.parameters(), lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        model.predict(*given()).square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.trained.parameters())
    assert model.frozen is not None
    assert all(p.grad is None for p in model.frozen.parameters())


def test_a_mode_that_it_does_not_have_is_refused() -> None:
    with pytest.raises(MobiusError, match="mode=serial"):
        build_denoiser(image_model(), "text-to-video", "serial")


def pipeline_folder(folder: Path, text_width: int = 384) -> Path:
    """A pipeline with the toy in the place of the UNet."""
    save_pipeline(folder)
    (folder / "unet").rename(folder / "unused")
    torch.manual_seed(1)
    ToyImageModel(text_width=text_width).save_pretrained(folder / "toy")
    return folder


@pytest.mark.slow
def test_it_trains_resumes_samples_and_goes_on(run: Run, tmp_path: Path, clips_folder: Path) -> None:
    folder = pipeline_folder(tmp_path / "toy-pipeline")
    options: dict[str, Any] = {
        "pretrained_model_name_or_path": str(folder),
        "checkpointing_steps": 1,
        "max_train_steps": 2,
    }
    cache = {"data": {"cache_dir": str(tmp_path / "cache")}}
    whole = run("whole", **options, **cache)
    quiet = options | {"validation": {"prompts": []}}
    run("halved", **quiet | {"max_train_steps": 1})
    resumed = run("halved", **quiet, resume_from_checkpoint="latest")
    assert losses(resumed) == losses(whole)
    spatial = load_file(whole / "final" / "unet" / "spatial" / "diffusion_pytorch_model.safetensors")
    assert spatial.keys() == ToyImageModel().state_dict().keys()
    clips = load_pipeline(whole, "cpu")("a dog", num_inference_steps=2, output_type="uint8").frames
    assert clips.shape == (1, 4, 3, 32, 32)
    short = quiet | {"max_train_steps": 1}
    following = run("following", **short | {"pretrained_model_name_or_path": str(whole / "final")})
    assert len(losses(following)) == 1
    image = run("image", **short, stage="text-to-image", data={"random_frame": True})
    assert len(losses(image)) == 1
    planned = plan(load(write(tmp_path / "plan.yaml", recipe(folder, clips_folder, tmp_path / "out"))), Spread.over(1))
    ring = sum(p.numel() for p in TOY.new_parallel(image_model(), PAPER).trained.parameters())
    assert planned.trained == ring
    assert {"ring", "fusion and head"} <= planned.saved.keys()


@pytest.mark.slow
def test_a_text_encoder_that_does_not_fit_is_refused(run: Run, tmp_path: Path) -> None:
    folder = pipeline_folder(tmp_path / "toy-pipeline", text_width=100)
    with pytest.raises(MobiusError, match=r"width 100.*384"):
        run(pretrained_model_name_or_path=str(folder))
