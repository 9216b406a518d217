"""A worker's process that waits for the next job, so that a job does not wait for a process."""

import os
from contextlib import suppress

from DivRegNetLib.registration.memory import available
from DivRegNetLib.run.worker.process import Process, Surroundings
from DivRegNetLib.run.worker.protocol import SPARE_BYTES


class Standby:
    """Keeps the process of the last worker for the next one: with its libraries, its model, and on a graphics card its
    context and kernels. For one thread; like a worker, it never blocks.

    The process ends when it was not needed for some minutes, when memory is short, with this one, with this object, and when
    a job that it does is cancelled.
    """

    def __init__(self) -> None:
        self._process: Process | None = None

    def prepare(
        self,
        *,
        model: str | None = None,
        device: str | None = None,
        python: str | os.PathLike | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        """Starts a process in advance, which warms up at low priority; does nothing where one is waiting or memory is short.

        Args:
            model, device: options that the next job will probably have; None: the defaults.
            python, environment: as of a :class:`~DivRegNetLib.run.worker.parent.Worker`.
        """
        from DivRegNetLib.run.worker.parent import surroundings

        around = surroundings(python, environment)
        if self._fits(around) or available() < 2 * SPARE_BYTES:
            return
        self.close()
        options = {"model": model, "device": device}
        with suppress(OSError):  # the next job will say what is wrong
            self._process = Process(around, stay=True, warm_up={k: v for k, v in options.items() if v})

    def take(self, around: Surroundings) -> Process | None:
        """The process that waits, if it was started with what a job needs; otherwise None, and it is ended."""
        process, fits = self._process, self._fits(around)
        self._process = None
        if fits:
            process.was_idle = True
            return process
        if process is not None:
            process.end()
        return None

    def put(self, process: Process) -> None:
        """Keeps a process that has done its job."""
        self.close()
        if process.may_stay:
            self._process = process
        else:
            process.end()

    @property
    def pid(self) -> int | None:
        """Of the process that waits; None if none does."""
        if self._process is None or self._process.exit_code() is not None:
            return None
        return self._process.pid

    def close(self) -> None:
        """Ends the process that waits."""
        process, self._process = self._process, None
        if process is not None:
            process.end()

    def _fits(self, around: Surroundings) -> bool:
        return self._process is not None and self._process.surroundings == around and self._process.may_stay
