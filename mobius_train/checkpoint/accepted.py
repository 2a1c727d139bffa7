"""The differences that a resumed run may have from the run that wrote its checkpoint, and what each costs."""

from __future__ import annotations

from dataclasses import dataclass

from mobius_train.config import RunConfig

# By the end of the field resume_with_changed_<…> that accepts it.
COSTS = {
    "batch": (
        "steps take another number of samples from here on, so a step of the schedule, of the average and of the"
        " moments is no longer what it was, and with scale_lr neither is the learning rate; with data.buckets, clips of"
        " this epoch can come twice or never"
    ),
    "precision": (
        "weights and moments go on in float32, but the model computes with another rounding, and the loss scale begins"
        " anew; the run is no longer that of one precision"
    ),
    "learning_rate": (
        "the new schedule holds from this step on, as if it had held from the first, while weights and moments are"
        " those of the old one; the run cannot be repeated by one recipe"
    ),
}
# The fields that decide the learning rate of a step. A larger max_train_steps is how a run is prolonged.
LEARNING_RATE = ("learning_rate", "scale_lr", "lr_scheduler", "lr_warmup_steps")


@dataclass(frozen=True)
class Accepted:
    """The recipe's fields resume_with_changed_<…>."""

    data: bool = False
    batch: bool = False
    precision: bool = False
    learning_rate: bool = False

    @classmethod
    def of(cls, config: RunConfig) -> Accepted:
        return cls(
            data=config.resume_with_changed_data,
            batch=config.resume_with_changed_batch,
            precision=config.resume_with_changed_precision,
            learning_rate=config.resume_with_changed_learning_rate,
        )


def offer(kind: str) -> str:
    """How to accept a change, and what it costs, for the end of an error."""
    return f"or set resume_with_changed_{kind}=true, which costs: {COSTS[kind]}"


def note(kind: str, change: str) -> str:
    """A line for a change that was accepted."""
    return f"{change}, as resume_with_changed_{kind} allows: {COSTS[kind]}"
