"""CUDA graphs: the operations of a function are recorded once, and started again for other tensors as a whole.

A forward pass starts thousands of small operations, which take a CPU longer than a GPU. A graph starts them all at once.
"""

import threading
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from DivRegNetLib.core import fields

MOST = 4  # recordings that are kept: the candidates of a registration
SPARE = 6.0  # times the memory of a recording that must be free, so that keeping it makes no registration coarser


class Recording:
    """A function of tensors, recorded on a CUDA device.

    What is not computed while it is recorded must stay where it is: the tensors that the function is given are replaced by
    copies, results of :func:`fields.cached` are kept here, and parameters of networks have to be kept by the caller.
    """

    def __init__(self, function: Callable[..., Tensor], *tensors: Tensor) -> None:
        self._inputs, self._cached = [t.clone() for t in tensors], {}
        self._graph = torch.cuda.CUDAGraph()
        with fields.keeping_cached(self._cached):
            function(*self._inputs)  # loads libraries and makes what is cached, which a recording cannot do
        torch.cuda.synchronize()
        with fields.keeping_cached(self._cached, complete=True), torch.cuda.graph(self._graph):
            self._output = function(*self._inputs)

    def __call__(self, *tensors: Tensor) -> Tensor:
        """The function of other tensors of the same shapes."""
        for own, given in zip(self._inputs, tensors, strict=True):
            own.copy_(given)
        self._graph.replay()
        return self._output.clone()


class Recorder:
    """Calls functions of tensors. What is called a second time with tensors of the same shapes is recorded and then played.

    The recordings of the last MOST functions are kept, each for one set of shapes. Other devices than CUDA, and what cannot be
    recorded, are called as usual. Threads use a CUDA device one after the other: a recording has one place for its tensors.
    """

    def __init__(self, record: type[Recording] = Recording) -> None:
        self._record, self._lock = record, threading.Lock()
        self._kept: dict[Hashable, tuple[tuple, Recording | None]] = {}
        """By the key of the function: the shapes of its last call, and the recording for them, if it was made."""

    def __call__(self, key: Hashable, function: Callable[..., Tensor], *tensors: Tensor, room: bool = True) -> Tensor:
        """``function(*tensors)``.

        Args:
            key: what the function depends on beside its tensors.
            room: whether there is memory to keep a recording.
        """
        if tensors[0].device.type != "cuda":
            return function(*tensors)
        with self._lock:
            return self._on_cuda(key, function, *tensors, room=room)

    def _on_cuda(self, key: Hashable, function: Callable[..., Tensor], *tensors: Tensor, room: bool) -> Tensor:
        shapes = tuple((t.shape, t.dtype, t.stride(), t.device) for t in tensors)
        last, recording = self._kept.pop(key, (None, None))
        if last != shapes:
            recording = None
        elif recording is None and room:
            try:
                recording = self._record(function, *tensors)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # an operation that a graph cannot hold
                torch.cuda.synchronize()
                return function(*tensors)
        self._kept[key] = shapes, recording  # the last one called stands last
        while len(self._kept) > MOST:
            del self._kept[next(iter(self._kept))]
        return function(*tensors) if recording is None else recording(*tensors)
