"""What the ring keeps for the backward pass: less with every option, and the same gradients."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import pytest
import torch
from autograd_memory import held_for_backward
from diffusers import UNet2DConditionModel
from sd3 import sd3_batch, tiny_sd3
from torch import Tensor, nn
from unets import Batch, batch_for, tiny_unet

from mobius_train.measure.saved import saved_for_backward
from mobius_train.models import ParallelUNet, build_denoiser, offload
from mobius_train.models.backbone import LayerShape
from mobius_train.models.compiling import compile_layers
from mobius_train.models.recompute import LayerMemory, TreatedUnits, Treatment
from mobius_train.models.tokens import ring as token_ring
from mobius_train.models.unet import ring as unet_ring
from mobius_train.models.unet.layers import bytes_per_flop
from mobius_train.ring_shape import PAPER, RingShape

pytestmark = pytest.mark.slow

OPTIONS = {
    "recomputed": LayerMemory(gradient_checkpointing=True),
    "a third kept": LayerMemory(gradient_checkpointing=True, gradient_checkpointing_kept=0.34),
    "activations": LayerMemory(recompute_activations=True),
    "a third with activations": LayerMemory(True, gradient_checkpointing_kept=0.34, recompute_activations=True),
    "a fifth offloaded": LayerMemory(activation_offload=0.2),
    "all offloaded": LayerMemory(activation_offload=1.0),
    "a fifth offloaded, the rest recomputed": LayerMemory(gradient_checkpointing=True, activation_offload=0.2),
    "everything": LayerMemory(True, 0.34, recompute_activations=True, activation_offload=0.34),
}


@pytest.fixture(autouse=True)
def _small_tensors_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "MIN_BYTES", 0)


def trained_model(unet: UNet2DConditionModel) -> ParallelUNet:
    """One whose ring's every part has a say in the prediction."""
    model = ParallelUNet.from_unet2d(unet)
    torch.manual_seed(1)
    nn.init.normal_(model.ring.fusion.weight)
    return model


def step(model: ParallelUNet, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The prediction, and the ring's gradients by name."""
    model.zero_grad()
    output = model.predict(*batch.given())
    output.square().mean().backward()
    return output.detach(), {name: p.grad.clone() for name, p in model.ring.named_parameters() if p.grad is not None}


def assert_same(a: tuple[Tensor, dict[str, Tensor]], b: tuple[Tensor, dict[str, Tensor]], what: object = "") -> None:
    assert torch.equal(a[0], b[0]), what
    assert a[1].keys() == b[1].keys(), what
    assert [name for name in a[1] if not torch.equal(a[1][name], b[1][name])] == [], what


def test_prediction_and_gradients_are_the_same_to_the_last_bit() -> None:
    model = trained_model(tiny_unet("emoji"))
    batch = batch_for(model.spatial, frames=4)
    plain = step(model, batch)
    assert all(gradient.isfinite().all() for gradient in plain[1].values())
    for option, memory in OPTIONS.items():
        model.ring.set_memory(memory)
        assert_same(step(model, batch), plain, option)


@pytest.mark.parametrize(
    "shape",
    [PAPER, RingShape(0.5, 1), RingShape(0.5, 1, True), RingShape(0.5, 1, trained_tail=True), RingShape(0.0, 2, True)],
    ids=["paper", "frozen-tail", "tail", "trained-tail", "no-ring"],
)
@pytest.mark.parametrize("kind", ["unet", "tokens"])
def test_there_is_one_treatment_for_each_unit(kind: str, shape: RingShape, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one more or less, units behind it would have the treatment of another."""
    made: list[TreatedUnits] = []

    class Kept(TreatedUnits):
        def __init__(self, treatments: Iterable[Treatment]) -> None:
            super().__init__(treatments)
            made.append(self)

    model: Any = tiny_unet("emoji") if kind == "unet" else tiny_sd3()
    monkeypatch.setattr(unet_ring if kind == "unet" else token_ring, "TreatedUnits", Kept)
    batch: Any = batch_for(model, frames=2) if kind == "unet" else sd3_batch(model)
    build_denoiser(model, "text-to-video", "parallel", asdict(shape)).predict(*batch.given())
    (units,) = made
    assert list(units._treatments) == []


def test_a_layer_that_is_recomputed_otherwise_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    # The control of the test above.
    model = trained_model(tiny_unet("emoji"))
    batch = batch_for(model.spatial, frames=4)
    plain = step(model, batch)
    model.ring.set_memory(LayerMemory(gradient_checkpointing=True))
    output = model.predict(*batch.given())
    monkeypatch.setattr(nn.SiLU, "forward", lambda self, x: nn.functional.silu(x) * (1 + 1e-6))
    output.square().mean().backward()
    assert any(not torch.equal(p.grad, plain[1][name]) for name, p in model.ring.named_parameters())


def held(model: ParallelUNet, batch: Batch, memory: LayerMemory) -> int:
    """Bytes on the computing device."""
    model.ring.set_memory(memory)
    return held_for_backward(lambda: model.predict(*batch.given()), model) - model.ring.host_bytes


def test_every_option_keeps_less() -> None:
    model = ParallelUNet.from_unet2d(tiny_unet("emoji"))
    batch = batch_for(model.spatial, frames=4)
    kept = {name: held(model, batch, memory) for name, memory in OPTIONS.items()}
    plain = held(model, batch, LayerMemory())
    assert kept["recomputed"] < kept["a third with activations"] < kept["a third kept"] < plain
    assert kept["activations"] < 0.65 * plain
    assert kept["a fifth offloaded"] < 0.9 * plain
    # What is left is of the entry and the head.
    assert kept["all offloaded"] < 0.25 * plain
    assert kept["a fifth offloaded, the rest recomputed"] < 1.2 * kept["recomputed"]


def layer(in_channels: int, channels: int, heads: int | None = 1) -> LayerShape:
    return LayerShape(in_channels, channels, heads)


def test_shares_go_to_the_layers_that_spare_most_flops_for_a_byte() -> None:
    layers = [layer(320, 320), layer(640, 640), layer(1280, 1280, None), layer(1280, 1280), layer(960, 320)]
    costs = [bytes_per_flop(each) for each in layers]
    ranking = sorted(range(5), key=costs.__getitem__)
    assert ranking == [2, 3, 1, 4, 0]
    assert LayerMemory(True, 0.4, activation_offload=0.2).treatments(costs) == (
        "recompute",
        *("recompute", "offload", "keep", "keep", "recompute"),
        "recompute",
    )
    # Where nothing is recomputed, offloading frees the most.
    assert LayerMemory(activation_offload=0.4, recompute_activations=True).treatments(costs) == (
        "selective",
        *("offload", "selective", "selective", "selective", "offload"),
        "selective",
    )


def test_frozen_features_in_half_the_width_are_kept_in_it() -> None:
    model = trained_model(tiny_unet("emoji"))
    batch = batch_for(model.spatial, frames=4)
    model.ring.gradient_checkpointing = True
    wide, output = held(model, batch, LayerMemory(True)), model.predict(*batch.given())
    model.spatial.to(torch.bfloat16)
    narrow = held(model, batch, LayerMemory(True))
    # A layer keeps t and SC(h): the one in float32, the other in bfloat16.
    assert narrow < 0.85 * wide
    prediction, gradients = step(model, batch)
    assert prediction.dtype == torch.float32
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients.values())
    torch.testing.assert_close(prediction, output.detach(), atol=0.1, rtol=0.1)
    assert not torch.equal(prediction, output)


@pytest.mark.parametrize(("frozen", "ring"), [("float32", "bfloat16"), ("float16", "bfloat16")])
def test_any_frozen_dtype_goes_with_any_of_the_ring(frozen: str, ring: str) -> None:
    model = trained_model(tiny_unet("emoji"))
    model.spatial.to(getattr(torch, frozen))
    model.ring.to(getattr(torch, ring))
    prediction, gradients = step(model, batch_for(model.spatial, frames=4))
    assert prediction.dtype == getattr(torch, ring)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.fixture
def _compiler_as_before() -> Iterator[None]:
    before = torch._functorch.config.activation_memory_budget
    yield
    torch._functorch.config.activation_memory_budget = before
    torch._dynamo.reset()


def saved(model: ParallelUNet, batch: Batch) -> int:
    """Bytes that autograd saves, parameters aside; unlike `held`, seen inside of compiled graphs."""
    return saved_for_backward(lambda: model.predict(*batch.given()), {"": model}, compiled=True)[1].total


@pytest.mark.usefixtures("_compiler_as_before")
def test_the_compiler_keeps_within_its_budget_and_gives_the_same_gradients() -> None:
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    unet, results = tiny_unet("emoji", block_out_channels=(32,), **blocks), []
    model = trained_model(unet)
    batch = batch_for(unet, frames=4)
    plain, kept = step(model, batch), saved(model, batch)
    for budget in (1.0, 0.4):
        torch._dynamo.reset()
        compiled = copy.deepcopy(model)
        # The partitioner of inductor, without its code generation.
        compile_layers(compiled.ring.layers_to_compile(), budget, backend="aot_eager")
        assert_same(step(compiled, batch), plain)
        assert compiled.state_dict().keys() == model.state_dict().keys()
        results.append(saved(compiled, batch))
    assert results[0] < kept
    assert results[1] < 0.6 * results[0]


class BiasInPlace(torch.autograd.Function):
    """x W^T + b as DeepSpeed computes it under ZeRO-3."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        output = x.matmul(weight.t())
        output += bias
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.flatten(0, 1).t() @ x.flatten(0, 1), gradient.sum((0, 1))


def test_a_product_that_is_changed_in_place_is_not_changed_twice() -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(shape, requires_grad=True) for shape in ((2, 3, 4), (4, 4), (4,))]

    def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return (BiasInPlace.apply(BiasInPlace.apply(x, weight, bias).tanh(), weight, bias) * 2).sin()

    results = []
    for treatment in ("keep", "selective"):
        output = TreatedUnits([treatment]).run(layer, *leaves)
        results.append([output, *torch.autograd.grad(output.sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_unit_is_recomputed_though_an_engine_gathers_its_weights_only_then() -> None:
    """As ZeRO-3 does in the first micro-batch behind a restore, and FSDP in a trained tail with temporal layers."""
    torch.manual_seed(0)
    linear, x = nn.Linear(4, 4), torch.randn(2, 4)
    whole, gathered = linear.weight.detach().clone(), []

    def gather(module: nn.Module, _: Any) -> None:
        if not linear.weight.numel():
            linear.weight.data = torch.empty(16).copy_(whole.flatten()).view(4, 4)
            gathered.append(torch.is_grad_enabled())

    linear.register_forward_pre_hook(gather)
    results = []
    for treatment in ("keep", "selective"):
        linear.zero_grad()
        output = TreatedUnits([treatment]).run(lambda x: (linear(x).sin() * 2).cos(), x)
        if treatment == "selective":
            linear.weight.data = torch.empty(0)
        output.sum().backward()
        results.append([output.detach(), *(p.grad.clone() for p in linear.parameters() if p.grad is not None)])
    assert gathered == [True]
    assert [len(result) for result in results] == [3, 3]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_offloading_fetches_one_unit_ahead_and_frees_each_copy_after_its_last_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alive: weakref.WeakSet[offload.HostCopy] = weakref.WeakSet()
    create = offload.HostCopy.__init__

    def created(self: offload.HostCopy, *args: Any) -> None:
        create(self, *args)
        alive.add(self)

    monkeypatch.setattr(offload.HostCopy, "__init__", created)
    progress: list[tuple[int, int]] = []

    class Marked(torch.autograd.Function):
        """Tells, when the backward pass comes to it, how many copies live and how many are back."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            progress.append((len(alive), sum(copy._fetched is not None for copy in alive)))
            return gradient

    moved = offload.Offload()
    x = torch.randn(2, 4, requires_grad=True)
    for _ in range(4):
        with moved.unit():
            # exp saves its result, which cos saves too: one copy for both.
            x = x.exp().cos()
        x = Marked.apply(x)
    assert len(alive) == 4
    assert moved.host_bytes == 4 * x.nbytes
    x.sum().backward()
    assert progress == [(4, 0), (3, 1), (2, 1), (1, 1)]
    assert not alive
    assert moved.host_bytes == 0


def test_parameters_are_never_offloaded() -> None:
    moved, linear = offload.Offload(), nn.Linear(64, 64)
    x = torch.randn(2, 64, requires_grad=True)
    with moved.unit():
        linear(x).sum()
    assert moved.host_bytes == 0
    with moved.unit():
        y = linear(x)
    assert moved.host_bytes == x.nbytes
    y.sum().backward()


def test_what_is_recomputed_or_offloaded_trains_nothing_where_no_gradient_is_asked_for() -> None:
    model = trained_model(tiny_unet("emoji"))
    batch = batch_for(model.spatial, frames=4)
    with torch.no_grad():
        plain = model.predict(*batch.given())
        model.ring.set_memory(OPTIONS["everything"])
        assert torch.equal(model.predict(*batch.given()), plain)
    assert model.ring.host_bytes == 0
