"""Runs work in steps from a timer, so that the window stays alive meanwhile."""

import time
from collections.abc import Callable, Generator

import qt

STEP_SECONDS = 0.04  # of work between two looks at the window's events


class Task:
    """Runs a generator to its end, bit by bit, then hands over what it returns.

    Args:
        steps: the work; see :mod:`DivRegNetModule.steps`.
        done: called with the result.
        failed: called with the exception that the work raised.
    """

    def __init__(self, steps: Generator, done: Callable, failed: Callable[[Exception], None]) -> None:
        self._steps, self._done, self._failed = steps, done, failed
        self._timer = qt.QTimer()
        self._timer.setInterval(0)
        self._timer.timeout.connect(self._advance)
        self._timer.start()

    @property
    def running(self) -> bool:
        return self._steps is not None

    def stop(self) -> None:
        """Gives the work up; neither ``done`` nor ``failed`` is called."""
        self._timer.stop()
        steps, self._steps = self._steps, None
        if steps is not None:
            steps.close()

    def _advance(self) -> None:
        if self._steps is None:
            return
        until = time.monotonic() + STEP_SECONDS
        try:
            while time.monotonic() < until:
                next(self._steps)
        except StopIteration as stop:
            self._timer.stop()
            self._steps = None
            self._done(stop.value)
        except Exception as error:
            self._timer.stop()
            self._steps = None
            self._failed(error)
