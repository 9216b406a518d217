"""Which ATen operators a function runs: how many of them compute something, and at which of them a GPU would be waited for."""

from collections import Counter
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Views and allocations, which start no kernel on a GPU.
NO_KERNEL = frozenset(
    [
        "_reshape_alias",
        "_unsafe_view",
        "alias",
        "as_strided",
        "detach",
        "detach_",
        "diagonal",
        "empty",
        "empty_like",
        "empty_permuted",
        "empty_strided",
        "expand",
        "lift_fresh",
        "new_empty",
        "new_empty_strided",
        "permute",
        "select",
        "slice",
        "split",
        "split_with_sizes",
        "squeeze",
        "t",
        "transpose",
        "unbind",
        "unfold",
        "unsqueeze",
        "view",
    ]
)
# Their result, or its shape, is needed on the CPU before the program can go on.
WAITS = frozenset(
    [
        "_local_scalar_dense",
        "_unique2",
        "bincount",
        "equal",
        "histc",
        "is_nonzero",
        "item",
        "lift_fresh",
        "masked_select",
        "nonzero",
        "nonzero_numpy",
        "unique_consecutive",
        "unique_dim",
    ]
)


class AsOnGpu(torch.Tensor):
    """A tensor on a CPU that is treated as on a GPU: nothing is done for the cache of a CPU. ``x.as_subclass(AsOnGpu)``."""

    is_cuda = True


class Operators(TorchDispatchMode):
    """While it is entered, counts operators by name. Composite ones are counted by their parts, except in inference mode.

    kernels: of operators that compute.
    waits: of operators that a GPU would have to be waited for, and of tensors made of Python numbers, which are copied to it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in NO_KERNEL:
            self.kernels[name] += 1
        if name in WAITS or (name.startswith("index") and _has_mask(args)):
            self.waits[name] += 1
        return function(*args, **(kwargs or {}))


def _has_mask(arguments: tuple) -> bool:
    """Whether a tensor is indexed by a boolean one."""
    indices = [i for a in arguments if isinstance(a, list | tuple) for i in a if isinstance(i, torch.Tensor)]
    return any(i.dtype in (torch.bool, torch.uint8) for i in indices)


def operators(run: Callable[[], object]) -> Operators:
    """The operators of a function, without gradients."""
    with torch.no_grad(), Operators() as counted:
        run()
    return counted
