"""Predict each rank's peak memory before a launch, with its components."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np

from mobius_train.assembly.model_configs import FIELDS, ModelConfigs, find_configs
from mobius_train.config import RunConfig
from mobius_train.config_sections import FsdpConfig
from mobius_train.engine.ds_config import with_bucket_sizes
from mobius_train.engine.spread import Spread
from mobius_train.errors import MobiusError
from mobius_train.plan import zero_states as engines
from mobius_train.plan.adam_states import EIGHT_BIT, FLOAT32
from mobius_train.plan.fsdp_states import fsdp
from mobius_train.plan.gpus import Gpu, check_gpu
from mobius_train.plan.simulate import FrozenModel, Simulation, Simulator
from mobius_train.plan.zero_states import EngineMemory
from mobius_train.sequence.group import Sent

MIB = 2**20
# Bytes per process on a GPU: CUDA's context and kernels, cuBLAS's and cuDNN's handles and workspaces, NCCL's buffers.
CONTEXT = 800_000_000
ENCODERS, COPY, CONTEXT_PART = "frozen encoders", "weights to sample from", "context and workspaces"
TRANSIENT = "largest transient"
AHEAD = "frozen branch of the next micro-batch"
SAVED = "saved for backward: "

# Also the names of the measured phases.
ENCODING: Final = "encoding"
TRAINING: Final = "forward and backward"
STEPPING: Final = "optimizer's step"
Phase = Literal["start", "encoding", "forward and backward", "optimizer's step", "sampling"]


@dataclass(frozen=True)
class Plan:
    """The memory of the rank that needs the most.

    Attributes:
        parts: bytes at the peak, by component.
        phases: bytes at the peak of each phase.
        saved: bytes kept for the backward pass at the end of the forward pass, by part of the model.
        host: bytes in host memory that offloading uses for this rank.
        flops: of one micro-batch on one rank, forward (with the frozen branch) and backward (with recomputation).
        trained: number of trained parameters.
        sources: the origin of each model's configuration.
        gpu: the GPU, or None.
        sent: in a micro-batch to the ranks that share its clips, by the rank that sends the most; None if there are
            none.
    """

    parts: dict[str, int]
    phases: dict[Phase, int]
    saved: dict[str, int]
    host: int
    flops: dict[str, int]
    trained: int
    sources: dict[str, str]
    gpu: Gpu | None = None
    sent: Sent | None = None

    @property
    def peak(self) -> int:
        return sum(self.parts.values())

    @property
    def allocated(self) -> int:
        """The peak without the CUDA context: what torch allocates."""
        return self.peak - CONTEXT

    @property
    def phase(self) -> Phase:
        return max(self.phases, key=lambda phase: self.phases[phase])

    @property
    def fits(self) -> bool:
        """The peak fits the GPU; always true without a GPU."""
        return self.gpu is None or self.peak <= self.gpu.bytes


class Planner:
    """Plans variants of one recipe; simulations are cached.

    Args:
        recipe: the recipe's file, see `find_configs`.
    """

    def __init__(self, recipe: Path | None = None) -> None:
        self._recipe = recipe
        self._models: dict[str, ModelConfigs] = {}
        self._simulator = Simulator()
        self._simulations: dict[str, Simulation] = {}

    def plan(self, config: RunConfig, spread: Spread, gpu: Gpu | None = None) -> Plan:
        """Plan a recipe for a spread, and optionally a GPU.

        Raises:
            MobiusError: the recipe conflicts with the DeepSpeed JSON or the GPU, or its models cannot be built.
        """
        if gpu is not None:
            check_gpu(gpu, config)
        memory = engine_memory(config, spread)
        sim = self.simulation(config)
        engine = memory(sim)
        frozen = _Shared(sim.frozen, spread.ranks if config.shard_frozen else 1)
        everywhere = engine.resident | {CONTEXT_PART: CONTEXT}
        everywhere[engines.FROZEN] += frozen.resident
        # A stream's memory stays its own in the allocator, so its peak counts, not what it holds.
        everywhere[AHEAD] = sim.ahead
        phases = peaks_of_phases(config, sim, engine, spread)
        totals: dict[Phase, int] = {phase: sum(everywhere.values()) + sum(p.values()) for phase, p in phases.items()}
        worst = max(totals, key=lambda phase: totals[phase])
        parts = dict(everywhere)
        for name, size in phases[worst].items():
            parts[name] = parts.get(name, 0) + size
        return Plan(
            parts={name: size for name, size in parts.items() if size},
            phases=totals,
            saved=sim.step.saved(),
            host=sum(engine.host.values()) + sim.step.host,
            flops=sim.step.flops,
            trained=sum(sim.trained),
            sources=self._configs(config).sources,
            gpu=gpu,
            sent=sim.sent,
        )

    def _configs(self, config: RunConfig) -> ModelConfigs:
        key = config.model_dump_json(include=FIELDS)
        if key not in self._models:
            self._models[key] = find_configs(config, self._recipe)
        return self._models[key]

    def simulation(self, config: RunConfig) -> Simulation:
        """Simulate a step of the recipe on fake tensors, for any engine and number of ranks."""
        irrelevant = {
            "global_batch_size": None,
            "gradient_accumulation_steps": 1,
            # Both 16-bit dtypes have the same size.
            "mixed_precision": "no" if config.mixed_precision == "no" else "bf16",
            "use_ema": False,
            "optimizer": "adamw",
            "shard_frozen": False,
            "fsdp": FsdpConfig(),
            "data": config.data.model_copy(update={"cache_dir": None, "cache_required": False}),
        }
        key = config.model_copy(update=irrelevant).model_dump_json()
        if key not in self._simulations:
            self._simulations[key] = self._simulator.simulate(config, self._configs(config))
        return self._simulations[key]


def plan(
    config: RunConfig,
    spread: Spread,
    gpu: Gpu | None = None,
    recipe: Path | None = None,
) -> Plan:
    """Predict each rank's peak memory; see `Planner`.

    Raises:
        MobiusError: the recipe conflicts with the DeepSpeed JSON or the GPU, or its models cannot be built.
    """
    return Planner(recipe).plan(config, spread, gpu)


def engine_memory(config: RunConfig, spread: Spread) -> Callable[[Simulation], EngineMemory]:
    """The memory formulas of a spread. Conflicts with the recipe are detected before any simulation."""
    spread.check(config)
    accumulation = config.gradient_accumulation_steps
    adam = EIGHT_BIT if config.optimizer == "adamw_8bit" else FLOAT32
    if spread.engine == "fsdp":
        size = spread.shard_size(config)
        return lambda sim: fsdp(sim, config.fsdp, size, accumulation, config.use_ema, adam)
    if spread.engine == "ddp":
        if config.optimizer != "adamw" or config.shard_frozen:
            raise MobiusError("ddp can be planned only with optimizer=adamw and shard_frozen=false: set these")
        if config.mixed_precision != "no":
            raise MobiusError(
                f"mixed_precision={config.mixed_precision} with ddp: ddp can be planned only in float32, set"
                " mixed_precision=no"
            )
        return lambda sim: engines.ddp(sim, accumulation, config.use_ema)
    resolved = spread.resolved(config)

    def memory(sim: Simulation) -> EngineMemory:
        filled = with_bucket_sizes(resolved, sum(sim.trained))
        return engines.deepspeed(sim, filled, spread.ranks, accumulation, config.use_ema, adam)

    return memory


def peaks_of_phases(
    config: RunConfig, sim: Simulation, engine: EngineMemory, spread: Spread
) -> dict[Phase, dict[str, int]]:
    """Bytes at the peak of each phase, in addition to those resident in all phases."""
    ranks = spread.ranks if config.shard_frozen else 1
    frozen, text = _Shared(sim.frozen, ranks), _Shared(sim.text, ranks)
    cached = config.data.cache_dir is not None
    online = sim.vae.whole + text.resident
    # With a cache only the autoencoder is on the GPU after it is filled, and only for sampling. The prompts are encoded
    # before the first step.
    training = 0 if cached else online
    phases: dict[Phase, dict[str, int]] = {
        TRAINING: {ENCODERS: training} | _training_peak(sim, engine, frozen.gathered),
        STEPPING: {ENCODERS: training} | engine.stepping,
    }
    if sim.encoding and cached:
        # A run that requires a full cache encodes nothing on the GPU.
        if not config.data.cache_required:
            phases[ENCODING] = {ENCODERS: sim.vae.whole + sim.text.whole, TRANSIENT: sim.encoding}
    elif sim.encoding:
        phases[ENCODING] = {
            ENCODERS: online,
            engines.GRADIENTS: engine.between,
            engines.GATHERED: text.gathered,
            TRANSIENT: sim.encoding,
        }
    if spread.engine == "ddp" or not max(sim.sampling, sim.heldout):
        return phases
    copied = sum(sim.trained) + (0 if engine.frozen_whole else sum(sim.frozen_inside))
    gathered = max(frozen.gathered, 0 if cached else text.gathered)
    evaluating = {COPY: copied * sim.itemsize, engines.GATHERED: gathered}
    heldout = evaluating | {ENCODERS: training, TRANSIENT: sim.heldout}
    sampling = evaluating | {ENCODERS: sim.vae.whole if cached else online, TRANSIENT: sim.sampling}
    phases["sampling"] = max(heldout, sampling if sim.sampling else heldout, key=lambda parts: sum(parts.values()))
    return phases


class _Shared:
    """Bytes of a frozen model on one of the ranks that share it: resident, and gathered for a layer.

    The gathered bytes include the collective's buffer: see `fsdp_states.py`.
    """

    def __init__(self, model: FrozenModel, ranks: int) -> None:
        layers = sum(model.layers)
        self.resident, self.gathered = model.whole, 0
        if ranks > 1:
            self.resident = model.whole - layers + layers // ranks
            self.gathered = 2 * max(model.layers, default=0)


def _training_peak(sim: Simulation, engine: EngineMemory, frozen: int) -> dict[str, int]:
    """
    Args:
        frozen: gathered bytes of the frozen branch while it runs.
    """
    step = sim.step
    activations, gradients = step.activations(), step.gradients()
    beside = engine.during(gradients)
    if frozen:
        # The layers behind the fusion are gathered again in the backward pass.
        running = np.arange(len(gradients)) < (len(gradients) if sim.frozen_in_graph else step.entered.min())
        beside[engines.GATHERED] = beside.get(engines.GATHERED, 0) + running * frozen
    time = int((activations + sum(beside.values())).argmax())
    saved, transient = step.at(time)
    parts = {SAVED + label: size for label, size in saved.items()} | {TRANSIENT: transient}
    return parts | {name: int(curve[time]) for name, curve in beside.items()}
