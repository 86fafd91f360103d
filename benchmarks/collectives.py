"""What the ranks of a step send each other, counted: of torch.distributed's collectives, not of the network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# How often a rank sends its share of the others' data, 1 - 1/size of all of it: an all-reduce is a reduce-scatter and a
# gather. No algorithm sends less; a ring, gloo's and NCCL's for large tensors, sends this.
TIMES = {"allreduce_": 2, "_allgather_base_": 1, "allgather_": 1, "_reduce_scatter_base_": 1}


@dataclass(frozen=True)
class Dealt:
    """How a step was dealt to its ranks."""

    fullest: float  # tokens that the rank with the most computes, over the ranks' mean
    collectives: int  # that a rank takes part in
    sent_mb: float  # that a rank sends in them at least


class Sent(TorchDispatchMode):
    """Inside the block, of this rank among `size`: how many collectives it takes part in, and the bytes that it sends
    in them at least.

    Raises:
        KeyError: a collective whose bytes are not known here.
    """

    def __init__(self, size: int):
        super().__init__()
        self.share, self.collectives, self.bytes = 1 - 1 / size, 0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.collectives += 1
            given = [sum(x.nbytes for x in tree_leaves(each) if isinstance(x, Tensor)) for each in args]
            self.bytes += TIMES[func.overloadpacket.__name__] * self.share * max(given)
        return func(*args, **(kwargs or {}))
