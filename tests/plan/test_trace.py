"""What is recorded of storages, on real tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import DEEP, recipe, write
from tiny_sd import save_sd3, save_sdxl
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mobius_train.assembly.load_model import load_image_or_video_model
from mobius_train.assembly.model_configs import find_configs
from mobius_train.conditions import Conditions
from mobius_train.config import load
from mobius_train.models import build_denoiser
from mobius_train.plan.simulate import Simulator
from mobius_train.plan.trace import BLOCK, Recorder

KIB = 1024


def test_storages_live_from_their_making_to_their_last_reference() -> None:
    given = torch.ones(KIB)
    with Recorder() as recorder:
        first = given + 1
        second = first.view(32, 32).t().mul_(2)
        third = torch.cat([first, first])
        del first, second
        recorder.mark("forward")
        torch.zeros(3)
    trace = recorder.trace()
    # A view, a change in place, and a view of what existed before make nothing.
    assert trace.sizes.tolist() == [4 * KIB, 8 * KIB, 0, BLOCK]
    assert trace.activations().tolist() == [4 * KIB, 12 * KIB, 8 * KIB, 8 * KIB + BLOCK]
    assert trace.saved() == {"other": 8 * KIB}
    assert len(third) == 2 * KIB


@pytest.mark.parametrize(("device", "host"), [("cpu", 2), (None, 0)])
def test_room_in_host_memory_counts_apart(device: str | None, host: int) -> None:
    with Recorder() as recorder:
        activation = torch.ones(KIB)
        for _ in range(3):
            # The earlier copy is freed after the later one is made: two are alive at once.
            copy = torch.empty_like(activation, device=device)
    trace = recorder.trace()
    assert trace.host == host * 4 * KIB
    assert trace.peak == (1 + 2 - host) * 4 * KIB
    assert len(copy) == KIB


def test_gradients_are_told_from_activations() -> None:
    layer = nn.Linear(64, 64, bias=False)
    recorder = Recorder()
    recorder.watch(layer, "layer")
    recorder.watch_gradients(layer)
    with recorder:
        loss = layer(torch.ones(8, 64)).square().sum()
        recorder.mark("forward")
        loss.backward()
        torch.zeros(1)
    trace = recorder.trace()
    assert trace.gradients()[-1] == 4 * 64 * 64
    assert trace.flops == {"forward": 2 * 8 * 64 * 64, "backward": 2 * 8 * 64 * 64}
    assert trace.saved()["layer"] == 4 * 8 * 64


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_a_convolutions_gradients_take_the_operations_of_its_forward_pass(groups: int) -> None:
    layer = nn.Conv3d(8, 8, 3, padding=1, groups=groups)
    recorder = Recorder()
    with recorder:
        output = layer(torch.ones(2, 8, 3, 4, 5, requires_grad=True)).sum()
        recorder.mark("forward")
        output.backward()
    forward = 2 * (2 * 3 * 4 * 5) * 27 * 8 * (8 // groups)
    assert recorder.trace().flops == {"forward": forward, "backward": 2 * forward}


def test_recomputation_saves_less_and_computes_more() -> None:
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)) for _ in range(4)))

    def trace(recomputed: bool) -> Any:
        recorder = Recorder()
        for layer in layers:
            recorder.watch(layer, "layers")
        with recorder:
            hidden: Tensor = torch.ones(256, 64, requires_grad=True)
            for layer in layers:
                hidden = checkpoint(layer, hidden, use_reentrant=False) if recomputed else layer(hidden)
            recorder.mark("forward")
            hidden.sum().backward()
        recorder.close()
        return recorder.trace()

    kept, recomputed = trace(False), trace(True)
    assert sum(recomputed.saved().values()) < 0.7 * sum(kept.saved().values())
    assert recomputed.flops["backward"] > kept.flops["backward"]
    assert recomputed.flops["forward"] == kept.flops["forward"]


# The shapes of a caption's conditions; those of the emoji backbone without a pipeline of its own.
SHAPES: dict[Any, dict[str, tuple[int, ...]]] = {
    None: {"text": (8, 384)},
    save_sdxl: {"text": (16, 40), "pooled": (20,), "sizes": (6,)},
    save_sd3: {"text": (16 + 256, 48), "pooled": (32,)},
}


@pytest.fixture(scope="module")
def pipelines(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Path]:
    folder = tmp_path_factory.mktemp("pipelines")
    return {None: tiny_pipeline} | {save: save(folder / save.__name__) for save in (save_sdxl, save_sd3)}


# tests/measure/test_measure.py measures whole runs of the emoji backbone, in the parallel and the serial mode.
@pytest.mark.parametrize(
    ("save", "mode", "shape"),
    [
        (None, "full", {}),
        (save_sdxl, "serial", {}),
        (save_sdxl, "parallel", DEEP),
        (save_sd3, "serial", {}),
        (save_sd3, "parallel", {}),
        (save_sd3, "parallel", DEEP),
        (save_sdxl, "parallel", DEEP | {"trained_tail": True}),
        (save_sd3, "parallel", DEEP | {"trained_tail": True}),
    ],
    ids=[
        "emoji-full",
        "sdxl-serial",
        "sdxl-deep",
        "sd3-serial",
        "sd3-parallel",
        "sd3-deep",
        "sdxl-trained-tail",
        "sd3-trained-tail",
    ],
)
def test_a_real_model_keeps_what_was_simulated(
    save: Any, mode: Any, shape: dict[str, Any], pipelines: dict[Any, Path], tmp_path: Path
) -> None:
    own: dict[str, Any] = {} if save is None else {"text_encoder_name_or_path": None, "max_text_tokens": None}
    pipeline = pipelines[save]
    # Without the phases that save nothing.
    own |= {"validation": {"prompts": []}, "data": {"validation": None}}
    values = recipe(pipeline, tmp_path, tmp_path / "run", mode=mode, **shape, **own)
    config = load(write(tmp_path / "recipe.yaml", values))
    models = find_configs(config)
    simulated = sum(Simulator().simulate(config, models).step.saved().values())

    image_model: Any = load_image_or_video_model(None, str(pipeline))
    denoiser: Any = build_denoiser(image_model, "text-to-video", mode, shape)
    weights = {parameter.untyped_storage()._cdata for parameter in denoiser.parameters()}
    seen: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        sample = torch.randn(2, denoiser.backbone.latent_channels, 4, 8, 8)
        conditions = Conditions({name: torch.randn(2, *sizes) for name, sizes in SHAPES[save].items()})
        prediction = denoiser.predict(sample, torch.tensor([3, 700]), conditions)
        loss = (prediction.float() - torch.randn_like(sample)).square().flatten(1).mean(1).mean()
    real = sum(tensor.untyped_storage().nbytes() for key, tensor in seen.items() if key not in weights)
    assert loss.requires_grad
    assert simulated == pytest.approx(real, rel=0.01)
