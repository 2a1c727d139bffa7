"""Counting what collectives carry, below every engine: as torch.distributed hands it to the process group."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Which argument is the whole: of a gather the output, of a scatter the input.
WHOLE = {
    "allreduce_": 0,
    "allreduce_coalesced_": 0,
    "_allgather_base_": 0,
    "allgather_": 0,
    "allgather_into_tensor_coalesced_": 0,
    "_reduce_scatter_base_": 1,
    "reduce_scatter_": 1,
    "reduce_scatter_tensor_coalesced_": 1,
    "reduce_": 0,
    "broadcast_": 0,
}
KINDS = {"allreduce": "all-reduce", "allgather": "all-gather", "reduce_scatter": "reduce-scatter"}


class CountCollectives(TorchDispatchMode):
    """`bytes`: of the whole tensors, by kind of collective. Anything that it does not know is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            if name != "barrier":
                tensors = [leaf for leaf in tree_leaves(args[WHOLE[name]]) if isinstance(leaf, Tensor)]
                size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
                self.bytes[next((kind for key, kind in KINDS.items() if key in name), name.strip("_"))] += size
        return func(*args, **(kwargs or {}))
