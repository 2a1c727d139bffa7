"""Compare the time of an optimizer step with diffusers' own video models, trained as its scripts train.

    python benchmarks/peers.py --record benchmarks/peers_cpu.json
    python benchmarks/peers.py --record FILE --config configs/sd21.yaml gradient_checkpointing=false

A peer is built from the same image model, with all of its spatial layers frozen:

    UNet3D        UNet3DConditionModel: its temporal convolutions and attentions are trained
    AnimateDiff   UNetMotionModel with a new MotionAdapter: its motion modules are trained

Both run in the loop of diffusers' scripts: accelerate, AdamW, clipping; AnimateDiff also with gradient checkpointing,
which diffusers does not support in UNet3DConditionModel. Data, noise, loss, batch and optimizer are those of the other
variants, which run in this project's engine. Measuring, records and options are those of step_time.py.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from step_time import RECOMPUTED, VARIANTS, Variant, compare

from mobius_train.cli import run, run_rank
from mobius_train.errors import MobiusError
from mobius_train.measure.side_by_side import Job

OURS = ("serial", "serial recomputed", "paper", "half", "tail-2", "paper recomputed", "half recomputed")
# By variant: the peer, and the fields of the recipe.
PEERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "UNet3D": ("UNet3D", ()),
    "AnimateDiff": ("AnimateDiff", ()),
    "AnimateDiff recomputed": ("AnimateDiff", (RECOMPUTED,)),
}
RECIPE = ("mode=serial", "use_ema=false", "optimizer=adamw")
WORKER = "--worker"


def main() -> None:
    ours = {name: Variant((*VARIANTS[name], *RECIPE[1:])) for name in OURS}
    theirs = {
        variant: Variant((*RECIPE, *fields), (__file__, WORKER, name)) for variant, (name, fields) in PEERS.items()
    }
    compare(__doc__, ours | theirs)


class Peer(NamedTuple):
    """A video model of diffusers.

    temporal: its trained modules. texts_of_frames: the model takes a text for each frame, not for each clip.
    """

    model: Any
    temporal: list[Any]
    texts_of_frames: bool = False


def unet3d(serial: Any) -> Peer:
    """UNet3DConditionModel with the weights of a SerialUNet."""
    from diffusers.models.resnet import TemporalConvLayer
    from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel

    from mobius_train.convert.unet3d import to_unet3d

    model = to_unet3d(serial.unet, serial.temporal.state_dict())
    kinds = TemporalConvLayer | TransformerTemporalModel
    return Peer(model, [module for module in model.modules() if isinstance(module, kinds)])


def animate_diff(serial: Any) -> Peer:
    """UNetMotionModel with the image model of a SerialUNet and new motion modules."""
    from diffusers import MotionAdapter, UNetMotionModel
    from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D

    config = serial.unet.config
    adapter = MotionAdapter(
        block_out_channels=config.block_out_channels,
        motion_layers_per_block=config.layers_per_block,
        motion_norm_num_groups=config.norm_num_groups,
    )
    model = UNetMotionModel.from_unet2d(serial.unet, adapter)
    return Peer(model, [module for module in model.modules() if isinstance(module, AnimateDiffTransformer3D)], True)


MAKERS: dict[str, Callable[[Any], Peer]] = {"UNet3D": unet3d, "AnimateDiff": animate_diff}


def worker() -> None:
    """Measure a peer in this process, and write the record that `mobius_train.measure.worker` writes."""
    from mobius_train.config import load
    from mobius_train.job import environment

    name, job, record = sys.argv[2], Job(**json.loads(sys.argv[3])), Path(sys.argv[4])
    launch = environment.prepare()
    from mobius_train.job.distributed import Distributed
    from mobius_train.job.quiet import quiet_libraries
    from mobius_train.job.versions import versions
    from mobius_train.measure.measure import measure_steps
    from mobius_train.measure.random_task import random_task

    quiet_libraries()
    config = load(Path(job.config), job.overrides).model_copy(update={"global_batch_size": None})
    try:
        with Distributed(launch) as distributed:
            peers: list[Peer] = []

            def instead(serial: Any) -> Any:
                if type(serial).__name__ != "SerialUNet":
                    raise MobiusError(f"{name} is built from a UNet, but the recipe has a {type(serial).__name__}")
                peers.append(MAKERS[name](serial))
                return denoiser_of(peers[0])

            task = random_task(config, Path(job.config), distributed, instead)
            engine = loop_of(peers[0], config)
            flops = flops_of(task, engine)
            measured = measure_steps(config, task, engine, warmup=job.warmup, steps=job.steps)
    except MobiusError as error:
        record.write_text(json.dumps({"error": str(error)}), encoding="utf-8")
        raise
    trained = sum(parameter.numel() for parameter in task.trained.parameters() if parameter.requires_grad)
    found = {
        "measured": asdict(measured) | {"peak": measured.peak},
        "planned": {"flops": flops, "trained": trained},
        "config": config.model_dump(mode="json"),
        "versions": versions(),
    }
    record.write_text(json.dumps(found), encoding="utf-8")


def loop_of(peer: Peer, config: Any) -> Any:
    """The body of the loop of diffusers' scripts as an engine."""
    import torch
    from accelerate import Accelerator
    from diffusers.training_utils import cast_training_params

    from mobius_train.dtypes import Dtypes
    from mobius_train.engine.optimizers import make_optimizer
    from mobius_train.engine.protocol import Piece, StepReport
    from mobius_train.engine.settings import engine_settings

    # As a script on one GPU that no launcher started. Otherwise accelerate would wrap the model for several ranks.
    os.environ.pop("LOCAL_RANK", None)
    if torch.cuda.is_available():
        os.environ["ACCELERATE_TORCH_DEVICE"] = f"cuda:{torch.cuda.current_device()}"
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    peer.model.requires_grad_(False)
    for module in peer.temporal:
        module.requires_grad_(True)
    if config.gradient_checkpointing:
        peer.model.enable_gradient_checkpointing()
    peer.model.to(accelerator.device, Dtypes.of(config).trained).train()
    cast_training_params(peer.model, torch.float32)
    trained = [parameter for parameter in peer.model.parameters() if parameter.requires_grad]
    model, optimizer = accelerator.prepare(peer.model, make_optimizer(trained, engine_settings(config)))
    every = config.gradient_accumulation_steps

    class Loop:
        device, dtype = accelerator.device, Dtypes.of(config).trained

        def __init__(self) -> None:
            self._done = 0

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return model(*args, **kwargs)

        def backward(self, loss: torch.Tensor) -> None:
            accelerator.backward(loss / every)

        def step(self, learning_rate: float) -> StepReport | None:
            self._done += 1
            if self._done % every:
                return None
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            norm = accelerator.clip_grad_norm_(trained, config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            return StepReport(True, float(norm), None)

        def pieces(self) -> dict[str, Piece]:
            kinds = ("exp_avg", "exp_avg_sq")
            states = [optimizer.state[parameter] for parameter in trained]
            return {
                f"{kind}/{number}": Piece((), 0, state[kind]) for number, state in enumerate(states) for kind in kinds
            }

    return Loop()


def denoiser_of(peer: Peer) -> Any:
    """The peer as a denoiser, as far as a measurement uses one."""
    from torch import Tensor, nn

    from mobius_train.conditions import TEXT, Conditions
    from mobius_train.models.denoiser import HEAD, SPATIAL, TEMPORAL

    class Denoiser(nn.Module):
        frozen = None

        def __init__(self) -> None:
            super().__init__()
            self.trained = peer.model

        def predict(self, sample: Tensor, timestep: Any, conditions: Conditions, trained: Any = None) -> Tensor:
            text = conditions[TEXT]
            if peer.texts_of_frames:
                text = text.repeat_interleave(sample.shape[2], 0)
            prediction: Tensor = (trained or peer.model)(sample, timestep, text, return_dict=False)[0]
            return prediction

        def branches(self) -> Mapping[str, Sequence[nn.Module]]:
            head = [peer.model.conv_norm_out, peer.model.conv_act, peer.model.conv_out]
            return {SPATIAL: [self], TEMPORAL: peer.temporal, HEAD: head}

    return Denoiser()


def flops_of(task: Any, engine: Any) -> dict[str, int]:
    """Floating point operations of one micro-batch, with those of recomputation in the backward pass."""
    from mobius_train.plan.trace import Recorder

    batch = task.source.on_device(next(task.training_batches(0)))
    with Recorder() as recorder:
        loss = task.loss(engine, batch).mean()
        recorder.mark("forward")
        engine.backward(loss)
    for parameter in task.parts.denoiser.parameters():
        parameter.grad = None
    return recorder.trace().flops


if __name__ == "__main__":
    if sys.argv[1:2] == [WORKER]:
        run_rank(worker)
    else:
        run(main)
