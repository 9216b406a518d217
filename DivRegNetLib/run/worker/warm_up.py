"""What a worker does while it waits for its first job: everything that the first registration of a process does for all."""

import ctypes
import os
import sys
import threading
from contextlib import suppress

import numpy as np
import SimpleITK as sitk

from DivRegNetLib.models import Cache
from DivRegNetLib.run.process import without_collection

NICE = 5  # by which the thread's nice value is raised; the highest is 19
SIZE, SPACING_MM = (40, 44, 36), 4.0  # of the volumes that are registered


class WarmUp:
    """A thread of low priority that imports torch, loads a model and registers two small volumes.

    The process keeps its priority: on most systems a process that has lowered it cannot raise it again.
    """

    def __init__(self, options: dict, cache: Cache) -> None:
        """Begins.

        Args:
            options: ``model`` and ``device`` of :class:`~DivRegNetLib.options.Options`.
            cache: which keeps the model.
        """
        _pair()  # ITK starts its threads with its first filter: they must not have the low priority
        self._options, self._cache, self._ended = options, cache, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        return not self._thread.is_alive()

    def stop(self) -> None:
        """Ends it as soon as possible: between two steps of the registration, but not within an import."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        _lower_priority()
        with suppress(Exception):  # whatever is wrong, the first job will say it
            with without_collection():
                from DivRegNetLib.registration.pipeline import register

            if not self._ended.is_set():
                register(*_pair(), load=self._cache.load, progress=lambda *_: not self._ended.is_set(), **self._options)


def _lower_priority() -> None:
    """Lowers the priority of the calling thread, where the system can do that."""
    with suppress(AttributeError, OSError):
        if sys.platform == "linux":
            nice = os.getpriority(os.PRIO_PROCESS, 0)  # on Linux a thread has its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(nice + NICE, 19))
        elif sys.platform == "darwin":
            os.setpriority(os.PRIO_DARWIN_THREAD, 0, os.PRIO_DARWIN_BG)
        elif os.name == "nt":
            this_thread, below_normal = ctypes.c_void_p(-2), -1
            ctypes.windll.kernel32.SetThreadPriority(this_thread, below_normal)


def _pair() -> tuple[sitk.Image, sitk.Image]:
    """Two volumes of the same ball with a smaller one in it, of different contrast."""
    z, y, x = (SPACING_MM * (np.arange(n) - n / 2) for n in SIZE[::-1])
    ball = 1 / (1 + np.exp((np.sqrt(z[:, None, None] ** 2 + y[:, None] ** 2 + x**2) - 55) / 4))
    core = np.exp(-((z[:, None, None] - 20) ** 2 + (y[:, None] + 15) ** 2 + (x - 10) ** 2) / 600)
    images = []
    for array in (ball + core, ball - 0.7 * core):
        image = sitk.GetImageFromArray((1000 * array).astype(np.float32))
        image.SetSpacing([SPACING_MM] * 3)
        images.append(sitk.Cast(image, sitk.sitkInt16))
    return images[0], images[1]
