"""The invariants at the size of Stable Diffusion 2.1: batch 2, 8 frames, 32x32 latents, with fake tensors.

Fake tensors have shapes and storages and no values: what is compared is which operators run on which shapes,
and what the graph keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from autograd_memory import Step, held_for_backward, step
from diffusers import UNet2DConditionModel, UNet3DConditionModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mobius_train.conditions import Conditions
from mobius_train.measure.saved import saved_for_backward
from mobius_train.models import SerialUNet, build_denoiser
from mobius_train.models.backbone import fold_conditions, fold_frames
from mobius_train.models.recompute import LayerMemory
from mobius_train.models.unet.backbone import Walk, output_head

pytestmark = pytest.mark.slow

MIB = 2**20


@pytest.fixture(scope="module", autouse=True)
def _fake_tensors() -> Iterator[None]:
    with FakeTensorMode():
        yield


def sd21() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        attention_head_dim=(5, 10, 20, 20),
        cross_attention_dim=1024,
        use_linear_projection=True,
    ).eval()


def batch() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 4, 8, 32, 32), torch.tensor([3, 700]), torch.randn(2, 77, 1024)


def given() -> tuple[Tensor, Tensor, Conditions]:
    sample, timestep, text = batch()
    return sample, timestep, Conditions.of_text(text)


def held(model: Any) -> float:
    return held_for_backward(lambda: model.predict(*given()), model) / MIB


def measured(model: Any, memory: LayerMemory) -> Step:
    model.set_memory(memory)
    return step(lambda: model.predict(*given()), model)


@pytest.fixture(scope="module")
def parallel() -> Any:
    return build_denoiser(sd21(), "text-to-video", "parallel")


@pytest.fixture(scope="module")
def serial() -> Any:
    return build_denoiser(sd21(), "text-to-video", "serial")


@pytest.fixture(scope="module")
def kept(parallel: Any) -> Step:
    return measured(parallel, LayerMemory())


@pytest.fixture(scope="module")
def recomputed(parallel: Any) -> Step:
    return measured(parallel, LayerMemory(gradient_checkpointing=True))


def millions(module: nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


class Operators(TorchDispatchMode):
    """The operators that run, and the shapes that they give."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[str, list[torch.Size]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.log.append((str(func), [leaf.shape for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]))
        return result


def operators(run: Callable[[], object]) -> list[tuple[str, list[torch.Size]]]:
    with torch.no_grad(), Operators() as seen:
        run()
    # Asking for a tensor's device or dtype computes nothing.
    return [(name, shapes) for name, shapes in seen.log if not name.startswith("prim.")]


def folded() -> tuple[Tensor, Any, Conditions]:
    sample, timestep, conditions = given()
    return fold_frames(sample), *fold_conditions(timestep, conditions, 8)


def test_the_walk_runs_the_operators_of_the_untouched_forward() -> None:
    unet = sd21()
    pictures = folded()

    def stream() -> None:
        *_, last = Walk(unet, *pictures).features()
        output_head(unet, last.hidden)

    expected = operators(lambda: unet(*pictures[:2], pictures[2]["text"]))
    assert len(expected) > 1000
    assert operators(stream) == expected

    other = SerialUNet.from_unet2d(unet)
    assert operators(lambda: other(*batch())) != expected


def test_parameters(parallel: Any, serial: Any) -> None:
    assert millions(parallel.spatial) == pytest.approx(866, abs=0.5)
    assert millions(parallel.ring) == pytest.approx(668, abs=0.5)
    assert millions(serial.temporal) == pytest.approx(545, abs=0.5)


def test_serial_has_the_weights_of_the_3d_unet(serial: Any) -> None:
    unet3d = UNet3DConditionModel(sample_size=32, attention_head_dim=64, cross_attention_dim=1024)
    expected = {name: tensor.shape for name, tensor in unet3d.state_dict().items()}
    converted = SerialUNet.from_unet3d(unet3d)
    for model in (serial, converted):
        names = {
            name.removeprefix("unet.").removeprefix("temporal."): tensor.shape
            for name, tensor in model.state_dict().items()
        }
        assert names == expected
    with torch.no_grad():
        assert converted.predict(*given()).shape == (2, 4, 8, 32, 32)


@pytest.mark.parametrize("run", ["kept", "recomputed"])
def test_parallel_keeps_nothing_of_the_spatial_branch(parallel: Any, request: pytest.FixtureRequest, run: str) -> None:
    found: Step = request.getfixturevalue(run)
    assert found.output.shape == (2, 4, 8, 32, 32)
    assert "spatial" not in found.branches()
    assert {id(leaf) for leaf in found.leaves} == set(map(id, parallel.ring.parameters()))
    assert all(parameter.grad is not None for parameter in parallel.ring.parameters())


def test_memory_held_for_the_backward_pass(serial: Any, kept: Step, recomputed: Step) -> None:
    assert kept.saved.total / MIB == pytest.approx(10006, rel=0.01)
    assert recomputed.saved.total / MIB == pytest.approx(551, rel=0.02)
    saved = saved_for_backward(lambda: serial.predict(*given()), {"": serial})[1]
    assert saved.total / MIB == pytest.approx(14701, rel=0.01)
    # The control of the test above.
    assert sum(count for name, count in saved.tensors.items() if name.startswith("unet.")) > 300
    full = build_denoiser(serial, "text-to-video", "full")
    assert held(full) == pytest.approx(16294, rel=0.01)


def test_memory_options(parallel: Any) -> None:
    for memory, expected, on_host in (
        (LayerMemory(True, gradient_checkpointing_kept=0.25), 648, 0),
        (LayerMemory(True, activation_offload=0.2), 542, 68),
    ):
        parallel.ring.set_memory(memory)
        everything = held(parallel)
        assert everything - parallel.ring.host_bytes / MIB == pytest.approx(expected, rel=0.02)
        assert parallel.ring.host_bytes / MIB == pytest.approx(on_host, rel=0.02)


def test_what_the_options_compute_again(parallel: Any, kept: Step, recomputed: Step) -> None:
    assert kept.forward + kept.backward == pytest.approx(10.26, rel=0.01)
    # Norms and activations are free in products; all of the ring's layers are a third of the forward pass.
    activations = measured(parallel, LayerMemory(recompute_activations=True))
    assert activations.saved.total / MIB == pytest.approx(5797, rel=0.02)
    assert (activations.forward, activations.backward) == (kept.forward, kept.backward)
    assert (recomputed.forward, recomputed.backward) == (
        kept.forward,
        pytest.approx(kept.backward + 2.13, abs=0.05),
    )


def test_recomputed_in_bf16_it_holds_less_than_1000_mib() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        model: Any = build_denoiser(sd21(), "text-to-video", "parallel")
    finally:
        torch.set_default_dtype(torch.float32)
    model.set_memory(LayerMemory(gradient_checkpointing=True))
    sample, timestep, text = batch()
    narrow = (sample.bfloat16(), timestep, Conditions.of_text(text.bfloat16()))
    assert held_for_backward(lambda: model.predict(*narrow), model) / MIB == pytest.approx(275, rel=0.02)
