"""The invariants at the size of Stable Diffusion 2.1: batch 2, 8 frames, 32x32 latents, with fake tensors.

Fake tensors have shapes and storages and no values: what is compared is which operators run on which shapes,
and what the graph keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest
import torch
from autograd_memory import held_for_backward, tensors_saved_in
from diffusers import UNet2DConditionModel, UNet3DConditionModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mobius_train.conditions import Conditions
from mobius_train.measure.graph import leaves_of_graph
from mobius_train.measure.saved import saved_for_backward
from mobius_train.models import SerialUNet, build_denoiser
from mobius_train.models.backbone import fold_conditions, fold_frames
from mobius_train.models.recompute import LayerMemory
from mobius_train.models.unet.backbone import Walk, output_head

pytestmark = pytest.mark.slow

MIB = 2**20


@pytest.fixture(autouse=True)
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


def build(mode: Literal["parallel", "serial", "full"], gradient_checkpointing: bool = False) -> Any:
    model = build_denoiser(sd21(), "text-to-video", mode)
    model.set_memory(LayerMemory(gradient_checkpointing))
    return model


def held(model: Any) -> float:
    return held_for_backward(lambda: model.predict(*given()), model) / MIB


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

    serial = SerialUNet.from_unet2d(unet)
    assert operators(lambda: serial(*batch())) != expected


def test_parameters() -> None:
    parallel = build("parallel")
    assert millions(parallel.spatial) == pytest.approx(866, abs=0.5)
    assert millions(parallel.ring) == pytest.approx(668, abs=0.5)
    assert millions(build("serial").temporal) == pytest.approx(545, abs=0.5)


def test_serial_has_the_weights_of_the_3d_unet() -> None:
    unet3d = UNet3DConditionModel(sample_size=32, attention_head_dim=64, cross_attention_dim=1024)
    expected = {name: tensor.shape for name, tensor in unet3d.state_dict().items()}
    for serial in (build("serial"), SerialUNet.from_unet3d(unet3d)):
        names = {
            name.removeprefix("unet.").removeprefix("temporal."): tensor.shape
            for name, tensor in serial.state_dict().items()
        }
        assert names == expected
        assert serial.predict(*given()).shape == (2, 4, 8, 32, 32)


@pytest.mark.parametrize("gradient_checkpointing", [False, True], ids=["kept", "recomputed"])
def test_parallel_keeps_nothing_of_the_spatial_branch(gradient_checkpointing: bool) -> None:
    model = build("parallel", gradient_checkpointing)
    output, saved = saved_for_backward(lambda: model.predict(*given()), {"": model})
    assert output.shape == (2, 4, 8, 32, 32)
    assert not any(name.startswith("spatial") for name in saved.tensors)
    ring = set(map(id, model.ring.parameters()))
    assert all(id(leaf) in ring for leaf in leaves_of_graph(output))
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in model.ring.parameters())


def test_serial_keeps_the_spatial_branch() -> None:
    model = build("serial")
    assert tensors_saved_in("unet", lambda: model.predict(*given()), model) > 300


def test_memory_held_for_the_backward_pass() -> None:
    parallel, serial, full = held(build("parallel")), held(build("serial")), held(build("full"))
    assert parallel == pytest.approx(10006, rel=0.01)
    assert serial == pytest.approx(14701, rel=0.01)
    assert full == pytest.approx(16294, rel=0.01)
    assert held(build("parallel", gradient_checkpointing=True)) == pytest.approx(551, rel=0.02)


def test_memory_options() -> None:
    model = build("parallel")
    for memory, expected, on_host in (
        (LayerMemory(recompute_activations=True), 5797, 0),
        (LayerMemory(True, gradient_checkpointing_kept=0.25), 648, 0),
        (LayerMemory(True, activation_offload=0.2), 542, 68),
    ):
        model.ring.set_memory(memory)
        everything = held(model)
        assert everything - model.ring.host_bytes / MIB == pytest.approx(expected, rel=0.02)
        assert model.ring.host_bytes / MIB == pytest.approx(on_host, rel=0.02)


def test_recomputed_in_bf16_it_holds_less_than_1000_mib() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = build("parallel", gradient_checkpointing=True)
    finally:
        torch.set_default_dtype(torch.float32)
    sample, timestep, text = batch()
    narrow = (sample.bfloat16(), timestep, Conditions.of_text(text.bfloat16()))
    assert held_for_backward(lambda: model.predict(*narrow), model) / MIB == pytest.approx(275, rel=0.02)


def flops(model: Any) -> tuple[float, float]:
    """TFLOP of a forward and a backward pass."""
    with FlopCounterMode(display=False) as counter:
        output = model.predict(*given())
        forward = counter.get_total_flops()
        output.sum().backward()
    return forward / 1e12, (counter.get_total_flops() - forward) / 1e12


def test_what_the_options_compute_again() -> None:
    model = build("parallel")
    forward, backward = flops(model)
    assert forward + backward == pytest.approx(10.26, rel=0.01)
    # Norms and activations are free in products; all of the ring's layers are a third of the forward pass.
    model.ring.set_memory(LayerMemory(recompute_activations=True))
    assert flops(model) == (forward, backward)
    model.ring.set_memory(LayerMemory(gradient_checkpointing=True))
    assert flops(model) == (forward, pytest.approx(backward + 2.13, abs=0.05))
