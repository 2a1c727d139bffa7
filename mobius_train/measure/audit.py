"""Prove on real steps of a recipe that the backward graph excludes the frozen spatial branch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from mobius_train.bars import DELAY, progress
from mobius_train.config import RunConfig
from mobius_train.engine.choose import choose_engine
from mobius_train.engine.protocol import Engine
from mobius_train.engine.spread import Spread
from mobius_train.errors import MobiusError
from mobius_train.job.distributed import Distributed
from mobius_train.measure.graph import leaves_of_graph, owned_nodes
from mobius_train.measure.measure import roots
from mobius_train.measure.saved import Saved, saved_for_backward
from mobius_train.models import weights_hash
from mobius_train.models.backbone import DivisibleBackbone
from mobius_train.tasks.build_task import build_task
from mobius_train.tasks.denoising import DiffusionTask
from mobius_train.trainer import micro_batch

# With fp16 the loss scaler skips steps until its scale is small enough.
MOST_ATTEMPTS = 40


@dataclass(frozen=True)
class Claim:
    """A claim, with the names of the modules or parameters that violate it."""

    what: str
    offenders: tuple[str, ...] = ()

    @property
    def proven(self) -> bool:
        return not self.offenders


@dataclass(frozen=True)
class Audit:
    """The claims, and the tensors that one micro-batch saves for the backward pass."""

    claims: tuple[Claim, ...]
    saved: Saved
    nodes: dict[str, int]
    """Autograd nodes by module."""

    @property
    def proven(self) -> bool:
        return all(claim.proven for claim in self.claims)


def audit(config: RunConfig, spread: Spread, steps: int = 2, fusion_depth: int | None = None) -> Audit:
    """Build a text-to-video recipe like a run, take `steps` optimizer steps, and check graph and weights.

    The spatial branch is the image model in any mode; the frozen encoders are checked too. The blocks behind the fusion
    are in the graph by design, so the claims are about the blocks in front of it. The graph belongs to the model and
    does not depend on the engine. FSDP cannot be audited: it replaces parameters by unnamed tensors during computation.

    Args:
        fusion_depth: number of blocks behind the fusion to claim; by default the model's.

    Raises:
        MobiusError: the recipe has another stage or engine, or cannot run.
    """
    if config.stage != "text-to-video":
        raise MobiusError(f"stage {config.stage!r} has no spatial branch to audit: give a text-to-video recipe")
    if spread.engine != "deepspeed":
        raise MobiusError(f"the audit runs under DeepSpeed, but the engine is {spread.engine}")
    with Distributed(spread.launch) as distributed:
        make_engine = choose_engine(config, spread)
        task = cast(DiffusionTask, build_task(config, distributed))
        engine = make_engine(task.trained, task.units, distributed)
        return _audit(task, engine, config, steps, fusion_depth)


def _audit(task: DiffusionTask, engine: Engine, config: RunConfig, steps: int, fusion_depth: int | None) -> Audit:
    denoiser, spatial = cast(nn.Module, task.parts.denoiser), task.parts.denoiser.image_model
    frozen = (*_names(denoiser, spatial), "vae", *task.parts.encoders.text.encoders)
    hash_before = weights_hash(spatial)
    names = {id(p): name for name, p in denoiser.named_parameters()}
    own = {id(p) for p in spatial.parameters()}
    gradients = Gradients({name: p for name, p in denoiser.named_parameters() if p.requires_grad})
    graph = _take_steps(task, engine, config, steps, gradients)

    behind = task.parts.denoiser.frozen_in_graph()
    if fusion_depth is not None:
        behind = cast(DivisibleBackbone, task.parts.denoiser.backbone).behind(fusion_depth) if fusion_depth else []
    exempt = {id(inner) for module in behind for inner in module.modules()}
    tail = {name for name, module in denoiser.named_modules() if id(module) in exempt}
    blocks = [name for name, module in denoiser.named_modules() if any(module is block for block in behind)]
    front = f" in front of the last {len(behind)} blocks" if behind else ""

    def inside(found: Mapping[str, int]) -> tuple[str, ...]:
        """The entries inside frozen modules in front of the fusion, in order of decreasing count."""
        guilty = [name for name in found if any(name == f or name.startswith(f + ".") for f in frozen)]
        return tuple(sorted((name for name in guilty if name not in tail), key=lambda name: -found[name]))

    idle = tuple(block for block in blocks if not any(name.startswith(f"{block}.") for name in graph.nodes))
    foreign = tuple(
        names.get(id(leaf), f"a tensor of shape {tuple(leaf.shape)}")
        for leaf in graph.leaves
        if id(leaf) in own or id(leaf) not in names
    )
    claims = (
        Claim(f"no spatial module{front} owns an autograd node", inside(graph.nodes)),
        Claim(f"no spatial module{front} has saved a tensor for the backward pass", inside(graph.saved.tensors)),
        *([Claim(f"the last {len(behind)} blocks own autograd nodes", idle)] if behind else []),
        Claim("all leaves of the graph are trained parameters outside the spatial branch", foreign),
        Claim("every trained parameter gets a finite gradient", gradients.bad()),
        Claim(f"every trained parameter gets a non-zero gradient within {steps} steps", gradients.zero()),
        Claim(
            "the spatial weights' hash is unchanged",
            () if weights_hash(spatial) == hash_before else tuple(_names(denoiser, spatial)),
        ),
    )
    return Audit(claims, graph.saved, dict(sorted(graph.nodes.items(), key=lambda item: -item[1])))


class _Graph(NamedTuple):
    """The graph of one micro-batch.

    Attributes:
        saved: the tensors saved for the backward pass.
        nodes: the number of autograd nodes by module.
        leaves: the tensors at which it ends.
    """

    saved: Saved
    nodes: dict[str, int]
    leaves: list[Tensor]


def _take_steps(task: DiffusionTask, engine: Engine, config: RunConfig, steps: int, gradients: Gradients) -> _Graph:
    """Take optimizer steps, and record the graph of the first micro-batch.

    Raises:
        MobiusError: too few steps had finite gradients.
    """
    models, batches = roots(task), task.ahead(task.training_batches(0))

    def forward() -> Tensor:
        # With frozen_ahead a batch passes the frozen branch when it is taken, so this is observed too.
        return task.loss(engine, next(batches)).mean()

    with owned_nodes(models) as nodes:
        loss, saved = saved_for_backward(forward, models, _gpu(engine.device))
        leaves = leaves_of_graph(loss)
        engine.backward(loss)
    report, applied = engine.step(config.learning_rate), 0
    with progress(total=steps, desc="auditing", unit="step", delay=DELAY, disable=not task.distributed.is_main) as bar:
        for _ in range(MOST_ATTEMPTS):
            while report is None:
                micro_batch(task, engine, next(batches))
                report = engine.step(config.learning_rate)
            applied += report.applied
            bar.update(report.applied)
            gradients.close_step(report.applied)
            if applied == steps:
                return _Graph(saved, nodes, leaves)
            report = None
    raise MobiusError(f"only {applied} of {MOST_ATTEMPTS} steps had finite gradients: too few for a proof")


def _names(denoiser: nn.Module, spatial: nn.Module) -> Iterable[str]:
    return (name for name, module in denoiser.named_children() if module is spatial)


def _gpu(device: torch.device) -> torch.device | None:
    return device if device.type == "cuda" else None


class Gradients:
    """Checks every gradient when autograd computes it, before an engine removes it."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._finite: dict[str, bool] = {}
        self._this_step: dict[str, tuple[bool, bool]] = {}
        self._nonzero: set[str] = set()
        self._names = list(parameters)
        for name, parameter in parameters.items():
            parameter.register_hook(self._look(name))

    def close_step(self, applied: bool) -> None:
        """Count the gradients of an applied step. A skipped step does not count: its loss scale was too large."""
        if applied:
            for name, (finite, nonzero) in self._this_step.items():
                self._finite[name] = self._finite.get(name, True) and finite
                if nonzero:
                    self._nonzero.add(name)
        self._this_step = {}

    def bad(self) -> tuple[str, ...]:
        """Parameters without a gradient, or with a gradient that was not finite."""
        return tuple(name for name in self._names if not self._finite.get(name, False))

    def zero(self) -> tuple[str, ...]:
        return tuple(name for name in self._names if name not in self._nonzero)

    def _look(self, name: str) -> Any:
        def hook(gradient: Tensor) -> None:
            finite, nonzero = self._this_step.get(name, (True, False))
            here = bool(gradient.isfinite().all()), bool(gradient.any())
            self._this_step[name] = (finite and here[0], nonzero or here[1])

        return hook
