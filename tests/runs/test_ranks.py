"""One, two and four ranks under ZeRO 0 to 3 and FSDP, and a run that moves between them: the same losses.

The clips, noise and timesteps of a global batch are the same bits on any number of ranks. What differs is the order
in which float32 sums are made: kernels choose by the size of the batch, and gradients are added up over ranks. After
three steps of AdamW that is some 1e-6 of the loss; a wrong sample or a wrong mean is 1e-2 and more.

`tests/engine/test_engines.py` has every engine on every number of ranks, and every move, on a small module.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from launching import launch
from recipes import DEEP, DS_CONFIGS, Run, losses, metrics, recipe, start, write

# Layers that are recomputed while FSDP gathers them for the backward pass; and two groups of two ranks.
RECOMPUTED = "fsdp+gradient_checkpointing=true"
HYBRID = "fsdp+fsdp.sharding=hybrid+fsdp.shard_size=2"
# test_hostfile.py has ZeRO 2.
ENGINES = {2: ("zero0", RECOMPUTED), 4: (HYBRID,)}
TOLERANCE = 1e-5


def _heldout(output: Path) -> list[float]:
    return [line["heldout_loss"] for line in metrics(output) if "heldout_loss" in line]


@pytest.mark.distributed
def test_one_two_and_four_ranks_lose_the_same_and_a_run_moves_between_them(
    run: Run, tiny_pipeline: Path, clips_folder: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"max_train_steps": 3, "use_ema": True, "validation": {"prompts": []}, **DEEP}
    path = write(tmp_path / "recipe.yaml", recipe(tiny_pipeline, clips_folder, tmp_path / "unused", **options))
    moved = f"output_dir={tmp_path / 'moved'}+resume_from_checkpoint=auto"
    moves = {2: f"zero1+deterministic=true+{moved}+max_train_steps=1", 4: f"zero3+{moved}+max_train_steps=2"}
    worker = Path(__file__).parent / "ranks_worker.py"
    for ranks in (2, 4):
        arguments = (str(path), str(tmp_path / str(ranks)), str(DS_CONFIGS))
        result = launch(ranks, worker, *arguments, *ENGINES[ranks], moves[ranks], timeout=600)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    alone = run("alone", "zero0", train_batch_size=4, **options)
    run("moved", "zero2", train_batch_size=4, resume_from_checkpoint="latest", **options)

    assert len(set(losses(alone))) == 3
    for ranks, engines in ENGINES.items():
        for engine in engines:
            output = tmp_path / str(ranks) / engine
            assert losses(output) == pytest.approx(losses(alone), rel=TOLERANCE), (ranks, engine)
            assert _heldout(output) == pytest.approx(_heldout(alone), rel=TOLERANCE), (ranks, engine)
    assert losses(tmp_path / "moved") == pytest.approx(losses(alone), rel=TOLERANCE)
    assert _heldout(tmp_path / "moved")[-1] == pytest.approx(_heldout(alone)[-1], rel=TOLERANCE)
    # The control: another global batch.
    other = run("other", "zero0", train_batch_size=2, **options | {"max_train_steps": 1})
    assert losses(other) != pytest.approx(losses(alone)[:1], rel=1e-2)


@pytest.mark.distributed
def test_a_mistake_exits_non_zero_through_every_launcher(
    tiny_pipeline: Path, clips_folder: Path, tmp_path: Path
) -> None:
    path = write(tmp_path / "recipe.yaml", recipe(tiny_pipeline, clips_folder, tmp_path / "out"))
    for launcher, ranks in (("deepspeed", 1), ("torchrun", 2), ("python", 1)):
        result = start(path, "learning_rat=1", launcher=launcher, ranks=ranks)
        assert result.returncode != 0, launcher
        assert "did you mean learning_rate" in result.stdout + result.stderr, launcher
    assert not (tmp_path / "out").exists()
