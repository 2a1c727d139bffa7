"""Print what a step sends and how well GPUs scale, as the tables of docs/scaling.md."""

from __future__ import annotations

import argparse

from mobius_train.plan.step_time import Interconnect, Workload, step_seconds
from mobius_train.plan.traffic import traffic

GPUS = (8, 64, 512)
INTERCONNECTS = (
    Interconnect("8 x 200 Gb/s a node", 8, within=240e9, between=200e9),
    Interconnect("100 Gb/s a node", 8, within=240e9, between=12.5e9),
    Interconnect("25 Gb/s a node", 8, within=240e9, between=3.125e9),
)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--ring", type=float, default=668e6, help="trained parameters of parallel (default: %(default)g)"
    )
    parser.add_argument("--full", type=float, default=1411e6, help="and of full (default: %(default)g)")
    parser.add_argument("--ring-tflop", type=float, default=10.26, help="of a micro-batch (default: %(default)s)")
    parser.add_argument("--full-tflop", type=float, default=14.2, help="of a micro-batch (default: %(default)s)")
    parser.add_argument("--tflops", type=float, default=73.0, help="that a GPU reaches (default: %(default)s)")
    parser.add_argument("--accumulation", type=int, default=2, help="micro-batches of a step (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    modes = {
        "parallel": Workload(int(arguments.ring), arguments.ring_tflop, arguments.tflops, arguments.accumulation),
        "full": Workload(int(arguments.full), arguments.full_tflop, arguments.tflops, arguments.accumulation),
    }
    columns = [f"{mode}, {gpus} GPUs" for mode in modes for gpus in GPUS]
    print("| GB sent per step and GPU | " + " | ".join(columns) + " |")
    print("|---" * (1 + len(columns)) + "|")
    for stage in range(4):
        cells = [
            f"{traffic(work.parameters, stage, accumulation=work.accumulation).sent(gpus) / 1e9:.2f}"
            for work in modes.values()
            for gpus in GPUS
        ]
        print(f"| ZeRO-{stage} | " + " | ".join(cells) + " |")
    print("\n| seconds per step (efficiency) | " + " | ".join(columns) + " |")
    print("|---" * (1 + len(columns)) + "|")
    for interconnect in INTERCONNECTS:
        for stage in range(4):
            cells = []
            for work in modes.values():
                sent = traffic(work.parameters, stage, accumulation=work.accumulation)
                for gpus in GPUS:
                    seconds = step_seconds(work, stage, sent, gpus, interconnect)
                    cells.append(f"{seconds:.2f} ({work.compute_seconds / seconds:.0%})")
            print(f"| {interconnect.name}, ZeRO-{stage} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
