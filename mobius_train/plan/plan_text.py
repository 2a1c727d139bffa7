"""A plan as text and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from mobius_train.plan.advice import Advice
from mobius_train.plan.largest import QUANTITIES
from mobius_train.plan.planner import CONTEXT, MIB, Plan
from mobius_train.sequence.group import Sent

# Seconds of a small collective inside a node with NVLink, assumed, not measured.
LATENCY = 25e-6

ASSUMPTIONS = (
    f"context and workspaces: {CONTEXT / MIB:.0f} MiB for CUDA's context and kernels, cuBLAS's and cuDNN's workspaces"
    " and NCCL's buffers; not simulated",
    "live tensors are counted in the allocator's 512-byte blocks; fragmentation is not",
    "PyTorch's fused attention kernels do not store scores; eager attention does",
    "the autoencoder and the text encoders are on the GPU in float32; with a cache, only while it is filled, and the"
    " autoencoder for sampling",
    "torch.compile is ignored",
    "AdamW is torch's fused implementation, which has no temporaries (with ddp: torch's default, with one temporary as"
    " large as the updated parameters)",
)


def as_json(plan: Plan, limits: dict[str, int | None], advice: list[Advice]) -> dict[str, Any]:
    """The whole plan; sizes in bytes."""
    gpu = plan.gpu
    return {
        "peak": plan.peak,
        "phase": plan.phase,
        "parts": plan.parts,
        "phases": plan.phases,
        "saved_for_backward": plan.saved,
        "host": plan.host,
        "trained_parameters": plan.trained,
        "flops": plan.flops,
        "sent": None if plan.sent is None else asdict(plan.sent),
        "gpu": None if gpu is None else asdict(gpu) | {"bytes": gpu.bytes},
        "fits": None if gpu is None else plan.fits,
        "largest": limits,
        "changes": [asdict(one) for one in advice],
        "sources": plan.sources,
        "assumptions": list(ASSUMPTIONS),
    }


def as_text(plan: Plan, limits: dict[str, int | None], advice: list[Advice]) -> str:
    """The plan as readable text; sizes in MiB, as in nvidia-smi."""
    lines = [f"peak of each rank: {_mib(plan.peak)} MiB, in {plan.phase}"]
    lines += [f"  {name:<36}{_mib(size):>9}" for name, size in sorted(plan.parts.items(), key=lambda part: -part[1])]
    lines.append("by phase, MiB")
    lines += [f"  {phase:<36}{_mib(size):>9}" for phase, size in plan.phases.items()]
    saved = ", ".join(f"{_mib(size)} {label}" for label, size in plan.saved.items() if size >= MIB)
    lines.append(f"saved for backward: {_mib(sum(plan.saved.values()))} MiB ({saved})")
    work = ", ".join(f"{count / 1e12:.2f} {name}" for name, count in plan.flops.items())
    lines.append(f"work of a micro-batch: {work} TFLOP; {plan.trained / 1e6:.1f}M trained parameters")
    if plan.sent is not None:
        lines.append(f"sent to the ranks that share a micro-batch: {sent_text(plan.sent)}")
    if plan.host:
        lines.append(f"in host memory: {_mib(plan.host)} MiB for each rank")
    lines += ["", *_verdict(plan, limits)]
    if advice:
        lines += ["", "Possible changes, the cheapest first (MiB: alone, and with those above it):"]
        lines += [_change(one) for one in advice]
        if not any(one.fits_together for one in advice):
            lines.append("  All of these together do not fit: use a larger GPU, fewer frames or a smaller model.")
    lines += ["", "Assumptions:", *(f"  - {text}" for text in ASSUMPTIONS), "Models:"]
    lines += [f"  {part:<16}{source}" for part, source in plan.sources.items()]
    return "\n".join(lines)


def sent_text(sent: Sent) -> str:
    """What the ranks that share a clip send to each other, and its latency."""
    exchanged, calls = sent.bytes["exchange"] / MIB, sent.calls
    sums = calls["gather"] + calls["reduce"]
    return (
        f"{exchanged:.1f} MiB in {calls['exchange']} exchanges; {sums} sums and statistics of"
        f" {(sent.bytes['gather'] + sent.bytes['reduce']) / MIB:.2f} MiB, about {sums * LATENCY * 1e3:.1f} ms at"
        f" {LATENCY * 1e6:.0f} us each"
    )


def _verdict(plan: Plan, limits: dict[str, int | None]) -> list[str]:
    gpu = plan.gpu
    if gpu is None:
        return ["No GPU was given: use --gpu to check a GPU's memory."]
    left = gpu.bytes - plan.peak
    if plan.fits:
        lines = [f"It fits a {gpu.name} ({_mib(gpu.bytes)} MiB) with {_mib(left)} MiB to spare."]
    else:
        lines = [f"It does NOT fit a {gpu.name} ({_mib(gpu.bytes)} MiB): {_mib(-left)} MiB too much."]
    if limits:
        found = (f"{one.name}={one.text(limits[one.name])}" for one in QUANTITIES if one.name in limits)
        lines.append(f"The largest value that fits, other settings unchanged: {', '.join(found)}.")
    return lines


def _change(one: Advice) -> str:
    mark = "fits alone" if one.fits_alone else "fits with those above" if one.fits_together else ""
    sizes = f"{_mib(one.alone):>7} {_mib(one.together):>7}"
    return f"  {sizes}  {one.setting} ({one.cost}){' <- ' + mark if mark else ''}"


def _mib(size: int) -> str:
    return f"{size / MIB:.0f}"
