"""The grid on a device that is none: `python -m tests.pretend tests/ops/test_token_loss.py` runs the test bodies there,
with the reference, on a machine without a GPU. Its tensors are the CPU's and say that they lie elsewhere; an operation
that mixes the two raises, as on a GPU."""

import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from tests import grid

NAME = "pretend"


class Elsewhere(torch.Tensor):
    """A tensor of the CPU, `inner`, that says it lies on the device "pretend"."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )  # fmt: skip
        tensor.inner = inner
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return on_the_cpu(func, args, kwargs or {})

    def tolist(self):
        return self.inner.tolist()


def on_the_cpu(func, args, kwargs):
    """What `func` gives for the tensors' contents, back where its arguments, or its `device`, say."""
    given, spec = tree_flatten((args, kwargs))
    tensors = [x for x in given if isinstance(x, torch.Tensor)]
    there = any(isinstance(x, Elsewhere) for x in tensors)
    if func.overloadpacket.__name__ not in ("copy_", "_to_copy"):  # between devices
        alien = [x for x in tensors if there and x.ndim > 0 and not isinstance(x, Elsewhere)]
        assert not alien, f"{func} of tensors on {NAME} and a tensor {tuple(alien[0].shape)} on the CPU"
    if kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]).type == NAME
    inside = [x.inner if isinstance(x, Elsewhere) else torch.device("cpu") if isinstance(x, torch.device) else x
              for x in given]  # fmt: skip
    args, kwargs = tree_unflatten(inside, spec)
    out = func(*args, **kwargs)
    written = {id(x): outer for x, outer in zip(inside, given) if isinstance(outer, Elsewhere)}
    return tree_map(
        lambda x: x if not isinstance(x, torch.Tensor) else written.get(id(x), Elsewhere(x) if there else x), out
    )


class Pretend(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return on_the_cpu(func, args, kwargs or {})


class Module(_DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]


if __name__ == "__main__":
    _setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    torch.__future__.set_swap_module_params_on_conversion(True)  # .to(dtype): `inner` goes where its tensor goes
    grid.DEVICES[:] = [NAME]
    with Pretend():
        sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", f"reference-{NAME}", *sys.argv[1:]]))
