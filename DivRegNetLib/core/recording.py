"""CUDA graphs: the operations of a function are recorded once, and started again for other tensors as a whole.

A forward pass starts thousands of small operations, which take a CPU longer than a GPU. A graph starts them all at once.
"""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from DivRegNetLib.core import fields

SPARE = 6.0  # times the memory of a recording that must be free, so that keeping it makes no registration coarser


class Recording:
    """A function of tensors, recorded on a CUDA device.

    What is not computed while it is recorded must stay where it is: the tensors that the function is given are replaced by
    copies, results of :func:`fields.cached` are kept here, and parameters of networks have to be kept by the caller.
    """

    def __init__(self, function: Callable[..., Tensor], *tensors: Tensor) -> None:
        self._inputs, self._used = [t.clone() for t in tensors], []
        self._graph = torch.cuda.CUDAGraph()
        function(*self._inputs)  # loads libraries and fills caches, which a recording cannot do
        torch.cuda.synchronize()
        with fields.collecting_cached(self._used), torch.cuda.graph(self._graph):
            self._output = function(*self._inputs)

    def __call__(self, *tensors: Tensor) -> Tensor:
        """The function of other tensors of the same shapes."""
        for own, given in zip(self._inputs, tensors, strict=True):
            own.copy_(given)
        self._graph.replay()
        return self._output.clone()


class Recorder:
    """Calls functions of tensors. What is called a second time with tensors of the same shapes is recorded and then played.

    The last recording is kept. Other devices than CUDA, and what cannot be recorded, are called as usual.
    """

    def __init__(self, record: type[Recording] = Recording) -> None:
        self._record = record
        self._last: Hashable = None
        self._recording: Recording | None = None

    def __call__(self, key: Hashable, function: Callable[..., Tensor], *tensors: Tensor, room: bool = True) -> Tensor:
        """``function(*tensors)``.

        Args:
            key: what the function depends on beside its tensors.
            room: whether there is memory to keep a recording.
        """
        if tensors[0].device.type != "cuda":
            return function(*tensors)
        key = (key, tuple((t.shape, t.dtype, t.stride(), t.device) for t in tensors))
        if key != self._last:
            self._last, self._recording = key, None
            return function(*tensors)
        if self._recording is None:
            if not room:
                return function(*tensors)
            try:
                self._recording = self._record(function, *tensors)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # an operation that a graph cannot hold
                self._last = None
                torch.cuda.synchronize()
                return function(*tensors)
        return self._recording(*tensors)
