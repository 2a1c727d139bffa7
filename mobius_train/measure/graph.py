"""Ownership of the nodes of an autograd graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from mobius_train.measure.saved import named_modules

# Only nodes that accumulate a gradient have this attribute.
LEAF = "variable"


def nodes(roots: Iterable[Tensor], passed_over: Callable[[Node], bool] = lambda _: False) -> Iterator[Node]:
    """Yield the nodes of the backward pass from these tensors. `passed_over` nodes end the search and are excluded."""
    seen: set[Node] = set()
    stack = [tensor.grad_fn for tensor in roots]
    while stack:
        node = stack.pop()
        if node is None or node in seen or passed_over(node):
            continue
        seen.add(node)
        yield node
        stack.extend(following for following, _ in node.next_functions)


def leaves_of_graph(output: Tensor) -> list[Tensor]:
    """The tensors whose gradient a backward pass from `output` computes."""
    return [getattr(node, LEAF) for node in nodes([output]) if _is_leaf(node)]


@contextmanager
def owned_nodes(roots: Mapping[str, nn.Module]) -> Iterator[dict[str, int]]:
    """Count the nodes that each module creates in its forward passes; inner modules come before outer ones.

    A module's nodes lie between its outputs and its arguments, so nodes of a graph that is cut later count too.
    """
    counts: dict[str, int] = {}
    # Nodes are compared by identity, so they must live until the end.
    owned: set[Node] = set()

    def claim(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            before = {t.grad_fn for t in _tensors((args, kwargs)) if t.grad_fn is not None}
            made = nodes(_tensors(output), lambda node: node in owned or node in before)
            mine = [node for node in made if not _is_leaf(node)]
            if mine:
                owned.update(mine)
                counts[name] = counts.get(name, 0) + len(mine)

        return hook

    handles: list[RemovableHandle] = [
        module.register_forward_hook(claim(name), with_kwargs=True) for name, module in named_modules(roots)
    ]
    try:
        yield counts
    finally:
        owned.clear()
        for handle in handles:
            handle.remove()


def _is_leaf(node: Node) -> bool:
    """The node accumulates the gradient of a leaf, so it belongs to the leaf's owner."""
    return hasattr(node, LEAF)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
