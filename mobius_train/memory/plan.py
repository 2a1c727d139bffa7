"""Each rank's peak memory before anything is launched, and what it is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mobius_train.config import RunConfig
from mobius_train.engine.ds_config import resolve, with_bucket_sizes
from mobius_train.errors import MobiusError
from mobius_train.memory import engines
from mobius_train.memory.engines import EngineMemory
from mobius_train.memory.gpus import Gpu, check_gpu
from mobius_train.memory.models import ModelConfigs, find_configs
from mobius_train.memory.simulate import Simulation, Simulator
from mobius_train.run import engine_settings

MIB = 2**20
# Of a process on a GPU: CUDA's context and kernels, cuBLAS's and cuDNN's handles and workspaces, NCCL's buffers.
CONTEXT = 800_000_000
ENCODERS, COPY, CONTEXT_PART = "frozen encoders", "weights to sample from", "context and workspaces"
TRANSIENT = "largest transient"
SAVED = "saved for backward: "

Phase = Literal["start", "encoding", "forward and backward", "optimizer's step", "sampling"]


@dataclass(frozen=True)
class Layout:
    """How the trained weights are spread.

    Attributes:
        engine: deepspeed; or ddp, torch's DistributedDataParallel, which this project does not train with, to compare.
        ds_json: the DeepSpeed JSON as it is written.
    """

    ranks: int = 1
    engine: Literal["deepspeed", "ddp"] = "deepspeed"
    ds_json: dict[str, Any] | None = None


@dataclass(frozen=True)
class Plan:
    """What one rank needs, the one that needs most.

    Attributes:
        parts: bytes at the peak, by what they are.
        phases: bytes at the peak of each phase.
        saved: bytes kept for the backward pass at the end of the forward pass, by part of the model.
        host: bytes in host memory that an offload takes for this rank.
        flops: of one micro-batch on one rank, forward (with the frozen branch) and backward (with recomputation).
        trained: trained parameters.
        sources: where each model's configuration was found.
        gpu: None to plan without one.
    """

    parts: dict[str, int]
    phases: dict[Phase, int]
    saved: dict[str, int]
    host: int
    flops: dict[str, int]
    trained: int
    sources: dict[str, str]
    gpu: Gpu | None = None

    @property
    def peak(self) -> int:
        return sum(self.parts.values())

    @property
    def phase(self) -> Phase:
        return max(self.phases, key=lambda phase: self.phases[phase])

    @property
    def fits(self) -> bool:
        """On the GPU; always without one."""
        return self.gpu is None or self.peak <= self.gpu.bytes


class Planner:
    """Plans variants of one recipe; what has been simulated once is remembered.

    Args:
        recipe: its file, see `find_configs`.
    """

    def __init__(self, recipe: Path | None = None) -> None:
        self._recipe = recipe
        self._models: dict[tuple[str | None, ...], ModelConfigs] = {}
        self._simulator = Simulator()
        self._simulations: dict[str, Simulation] = {}

    def plan(self, config: RunConfig, layout: Layout, gpu: Gpu | None = None) -> Plan:
        """Plan a recipe under a layout, on a GPU or without one.

        Raises:
            MobiusError: the recipe contradicts the DeepSpeed JSON or the GPU, or its models can't be built.
        """
        if gpu is not None:
            check_gpu(gpu, config)
        memory = self._engine_memory(config, layout)
        sim = self._simulation(config)
        engine = memory(sim)
        everywhere = engine.resident | {CONTEXT_PART: CONTEXT, ENCODERS: sim.encoder_bytes}
        everywhere[engines.FROZEN] += sim.frozen_bytes
        own_engine = layout.engine != "ddp"
        if own_engine and sim.frozen_inside:
            # `Inference` keeps copies of frozen weights inside the trained module.
            everywhere[COPY] = sum(sim.frozen_inside) * sim.itemsize
        phases = self._phases(config, sim, engine, own_engine)
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
        )

    def _phases(
        self, config: RunConfig, sim: Simulation, engine: EngineMemory, own_engine: bool
    ) -> dict[Phase, dict[str, int]]:
        """What each phase holds at its peak beside what lives everywhere."""
        phases: dict[Phase, dict[str, int]] = {
            "forward and backward": _training_peak(sim, engine),
            "optimizer's step": engine.stepping,
        }
        if sim.encoding:
            cached = config.data.cache_dir is not None
            phases["encoding"] = {engines.GRADIENTS: 0 if cached else engine.between, TRANSIENT: sim.encoding}
        if own_engine and max(sim.sampling, sim.heldout):
            copy = sum(sim.trained) * sim.itemsize
            phases["sampling"] = {COPY: copy, TRANSIENT: max(sim.sampling, sim.heldout)}
        return phases

    def _engine_memory(self, config: RunConfig, layout: Layout) -> Callable[[Simulation], EngineMemory]:
        """The formulas of a layout, whose contradictions with the recipe are found before anything is simulated."""
        accumulation = config.gradient_accumulation_steps
        if layout.ranks < 1:
            raise MobiusError(f"{layout.ranks} ranks: there must be 1 or more")
        product = config.train_batch_size * accumulation * layout.ranks
        if config.global_batch_size not in (None, product):
            raise MobiusError(
                f"global_batch_size={config.global_batch_size}, but train_batch_size={config.train_batch_size} x"
                f" gradient_accumulation_steps={accumulation} x {layout.ranks} rank(s) = {product}: change one of them"
            )
        if layout.engine == "ddp":
            if layout.ds_json is not None:
                raise MobiusError("a DeepSpeed configuration was given, but the engine is ddp: remove one of them")
            if config.mixed_precision != "no":
                raise MobiusError(
                    f"mixed_precision={config.mixed_precision} with ddp: it is planned in float32 alone, set no"
                )
            return lambda sim: engines.ddp(sim, accumulation, config.use_ema)
        resolved = resolve(layout.ds_json or {}, engine_settings(config), layout.ranks)

        def memory(sim: Simulation) -> EngineMemory:
            filled = with_bucket_sizes(resolved, sum(sim.trained))
            return engines.deepspeed(sim, filled, layout.ranks, accumulation, config.use_ema)

        return memory

    def _configs(self, config: RunConfig) -> ModelConfigs:
        key = (
            config.stage,
            config.pretrained_model_name_or_path,
            config.vae_name_or_path,
            config.text_encoder_name_or_path,
        )
        if key not in self._models:
            self._models[key] = find_configs(config, self._recipe)
        return self._models[key]

    def _simulation(self, config: RunConfig) -> Simulation:
        irrelevant = {
            "global_batch_size": None,
            "gradient_accumulation_steps": 1,
            # The two 16-bit types have the same sizes.
            "mixed_precision": "no" if config.mixed_precision == "no" else "bf16",
            "use_ema": False,
            "data": config.data.model_copy(update={"cache_dir": None}),
        }
        key = config.model_copy(update=irrelevant).model_dump_json()
        if key not in self._simulations:
            self._simulations[key] = self._simulator.simulate(config, self._configs(config))
        return self._simulations[key]


def plan(
    config: RunConfig,
    layout: Layout,
    gpu: Gpu | None = None,
    recipe: Path | None = None,
) -> Plan:
    """Each rank's peak memory; see `Planner`.

    Raises:
        MobiusError: the recipe contradicts the DeepSpeed JSON or the GPU, or its models can't be built.
    """
    return Planner(recipe).plan(config, layout, gpu)


def _training_peak(sim: Simulation, engine: EngineMemory) -> dict[str, int]:
    activations, gradients = sim.step.activations(), sim.step.gradients()
    beside = engine.during(gradients)
    time = int((activations + sum(beside.values())).argmax())
    saved, transient = sim.step.at(time)
    parts = {SAVED + label: size for label, size in saved.items()} | {TRANSIENT: transient}
    return parts | {name: int(curve[time]) for name, curve in beside.items()}
