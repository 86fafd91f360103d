"""What a run does, counted without a clock: operators, waits, elements, bytes, products."""

from collections import Counter

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "_unique2", "unique_dim")


def waits(func, args, kwargs):
    """Whether the host would wait for a GPU, on which the tensors of `func` were."""
    name = func.overloadpacket.__name__
    by_mask = name == "index" and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    by_counts = name == "repeat_interleave" and not kwargs.get("output_size")
    return name in WAITS or by_mask or by_counts


class Recorder(TorchDispatchMode):
    """Inside the block, of every operator of torch that runs.

    Attributes:
        ops: how often each ran, by name.
        waits: the names of those, `tolist` among them, for which the host would wait for a GPU.
        sizes: the numbers of elements of their results, without bytes: Triton's interpreter sees storages as bytes.
    """

    def __init__(self):
        super().__init__()
        self.ops, self.waits, self.sizes = Counter(), [], set()

    def __enter__(self):
        self.tolist = torch.Tensor.tolist
        torch.Tensor.tolist = lambda tensor: self.waits.append("tolist") or self.tolist(tensor)
        return super().__enter__()

    def __exit__(self, *error):
        torch.Tensor.tolist = self.tolist
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out, name = func(*args, **kwargs), func.overloadpacket.__name__
        self.ops[name] += 1
        if waits(func, args, kwargs):
            self.waits.append(name)
        self.sizes |= {x.numel() for x in tensors_of(out) if x.dtype != torch.uint8}
        return out


class Peak(TorchDispatchMode):
    """The bytes of the operators' results inside the block that were there at once, at most: what `bytes` is."""

    def __init__(self):
        super().__init__()
        self.bytes, self.held = 0, {}  # by storage

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {StorageWeakRef(x.untyped_storage()) for x in tensors_of((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        self.held = {storage: size for storage, size in self.held.items() if not storage.expired()}
        for storage in (x.untyped_storage() for x in tensors_of(out)):
            if StorageWeakRef(storage) not in given:
                self.held[StorageWeakRef(storage)] = storage.nbytes()
        self.bytes = max(self.bytes, sum(self.held.values()))
        return out


class Held(TorchDispatchMode):
    """The bytes of the tensors that operators take or give inside the block, at most at once: what `most` is, as it is
    when an operator gives a new one of 4 KiB. A storage that is resized, as FSDP2 does it, counts with what it has.

    Args:
        beside: gives tensors that do not count.
    """

    def __init__(self, beside):
        super().__init__()
        self.beside, self.most, self.seen = beside, 0, {}  # by storage

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen |= self.storages((args, kwargs))
        out = func(*args, **(kwargs or {}))
        there = self.storages(out)
        new = [x for x in tensors_of(out) if x.nbytes >= 4096] and there.keys() - self.seen.keys()
        self.seen |= there
        if new:  # no views, nothing in place
            counted = self.seen.keys() - self.storages(self.beside()).keys()
            storages = [torch.UntypedStorage._new_with_weak_ptr(key) for key in counted]
            self.most = max(self.most, sum(storage.nbytes() for storage in storages if storage is not None))
            self.seen = {key: storage for key, storage in self.seen.items() if not storage.expired()}
        return out

    def storages(self, values):
        parts = [x.to_local() if hasattr(x, "to_local") else x for x in tensors_of(values)]
        return {storage.cdata: storage for storage in (StorageWeakRef(x.untyped_storage()) for x in parts)}


def tensors_of(values):
    return [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]


def flops(run):
    """Of the matrix products that `run` takes."""

    def addmm_(out, a, b, **_):
        return 2 * a[0] * a[1] * b[1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_}) as counter:
        run()
    return counter.get_total_flops()
