"""Work in steps: generators that yield after each fraction of a second, so that a window that runs them stays alive.

A generator is run to its end by :func:`finish` (scripts), or bit by bit by :class:`DivRegNetModule.background.Task` (the
panel). What it returns is the result.
"""

from collections.abc import Generator, Iterator
from typing import Any, TypeVar

T = TypeVar("T")
Steps = Generator[None, None, T]

SLAB_BYTES = 16_000_000  # that are copied or computed in one step


def finish(steps: Generator[Any, None, T]) -> T:
    """Runs a generator to its end and returns its result."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value


def slabs(length: int, bytes_each: float) -> Iterator[tuple[int, int]]:
    """(start, end) of consecutive parts of ``length`` slices, each of about SLAB_BYTES, at least one slice."""
    step = max(int(SLAB_BYTES / max(bytes_each, 1)), 1)
    for start in range(0, length, step):
        yield start, min(start + step, length)
