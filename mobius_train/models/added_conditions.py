"""Conditions in the call signature of diffusers' UNets, and the check of conditions against their widths.

Legend: B clips; L text tokens, D their width; P width of the pooled text.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mobius_train.conditions import MASK, POOLED, SIZES, TEXT, Conditions
from mobius_train.errors import MobiusError

# The names in `added_cond_kwargs`, diffusers' argument for conditions besides the text.
ADDED = {POOLED: "text_embeds", SIZES: "time_ids"}


def given_conditions(
    encoder_hidden_states: Tensor,
    added_cond_kwargs: Mapping[str, Tensor] | None = None,
    encoder_attention_mask: Tensor | None = None,
) -> Conditions:
    """The arguments of a diffusers-like call as conditions.

    Args:
        encoder_hidden_states: the text, (B, L, D).
        added_cond_kwargs: `text_embeds`, the pooled text, (B, P); and `time_ids`, the sizes, (B, 6).
        encoder_attention_mask: (B, L), 0 for padding.

    Raises:
        MobiusError: a name is unknown.
    """
    added = dict(added_cond_kwargs or {})
    found = {own: added.pop(name) for own, name in ADDED.items() if name in added}
    if added:
        raise MobiusError(
            f"added_cond_kwargs has {', '.join(map(repr, added))}, but this model knows only"
            f" {' and '.join(map(repr, ADDED.values()))}: remove the others"
        )
    mask = {} if encoder_attention_mask is None else {MASK: encoder_attention_mask.bool()}
    return Conditions({TEXT: encoder_hidden_states, **found, **mask})


def added_cond_kwargs(conditions: Conditions) -> dict[str, Tensor]:
    """The conditions besides the text, by diffusers' names; the inverse of `given_conditions`."""
    return {name: conditions[own] for own, name in ADDED.items() if own in conditions.tensors}


def check_conditions(conditions: Conditions, widths: Mapping[str, int], clips: int) -> None:
    """Check that a batch has all conditions of a model.

    Args:
        widths: size of the last axis of each condition, by name; see `Backbone.condition_widths`.
        clips: B.

    Raises:
        MobiusError: a condition is missing, or has another shape.
    """
    problems, tokens = [], conditions[TEXT].shape[1:2] if TEXT in conditions.tensors else ()
    for name, width in widths.items():
        argument = f"{name} ({ADDED[name]} in added_cond_kwargs)" if name in ADDED else name
        argument = f"{name} (encoder_attention_mask)" if name == MASK else argument
        if name not in conditions.tensors:
            problems.append(f"{argument} is missing")
            continue
        found = tuple(conditions[name].shape)
        wanted = (clips, *(tokens if name in (TEXT, MASK) else ()), *([width] if width else []))
        if found != wanted:
            problems.append(f"{argument} has the shape {found}, not {wanted}")
        if name == SIZES and conditions[name].itemsize < 4:
            problems.append(f"{argument} is in {conditions[name].dtype}, which rounds large sizes: give integers")
    if problems:
        raise MobiusError(
            "the conditions do not fit the model:\n  - "
            + "\n  - ".join(problems)
            + f"\nGive {', '.join(f'{name} of width {width}' if width else name for name, width in widths.items())}"
        )
