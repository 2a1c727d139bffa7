"""Print the traffic of a step and the predicted efficiency on 8, 64 and 512 GPUs, as in docs/scaling.md."""

from __future__ import annotations

import _environment  # noqa: F401

# isort: split
import argparse

from mobius_train.cli import parse_options, run

GPUS = (8, 64, 512)
NVLINK = 240e9  # bytes per second


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=float, default=668e6, help="trained parameters (default: %(default)g)")
    parser.add_argument("--tflop", type=float, default=10.26, help="TFLOP per micro-batch (default: %(default)s)")
    parser.add_argument("--tflops", type=float, default=73.0, help="achieved TFLOP/s of a GPU (default: %(default)s)")
    parser.add_argument("--accumulation", type=int, default=2, help="micro-batches per step (default: %(default)s)")
    parser.add_argument("--gigabits", type=float, default=100.0, help="Gb/s of a node's network (default: %(default)s)")
    return parser


def main() -> None:
    arguments = parse_options(make_parser())
    # This imports torch, which takes seconds.
    from mobius_train.plan.step_time import Interconnect, Workload, step_seconds

    work = Workload(int(arguments.parameters), arguments.tflop, arguments.tflops, arguments.accumulation)
    interconnect = Interconnect(within=NVLINK, between=arguments.gigabits / 8 * 1e9)
    print(f"| GB sent per step and GPU, efficiency | {' | '.join(f'{gpus} GPUs' for gpus in GPUS)} |")
    print("|---" * (1 + len(GPUS)) + "|")
    for stage in range(4):
        cells = []
        for gpus in GPUS:
            efficiency = work.compute_seconds / step_seconds(work, stage, gpus, interconnect)
            cells.append(f"{work.traffic(stage).sent(gpus) / 1e9:.2f}, {efficiency:.0%}")
        print(f"| ZeRO-{stage} | {' | '.join(cells)} |")


if __name__ == "__main__":
    run(main)
