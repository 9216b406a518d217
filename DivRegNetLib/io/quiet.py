"""What ITK and the libraries below it print, kept away, and what they say made into a sentence."""

import contextlib
import os
import re
import threading
from collections.abc import Iterator

import SimpleITK as sitk


def reason_of(error: Exception) -> str:
    """What the system says, or the last telling line of an ITK error, without its source locations."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if any("orthonormal" in line for line in lines):
        return "its axes are not at right angles, which this format cannot say; resample it, or save it as NRRD"
    noise = ("Exception thrown", "sitk::ERROR: itk::", "Reason: No such file")
    telling = [line for line in lines if not line.startswith(noise)] or lines or [type(error).__name__]
    return re.sub(r"^(sitk::ERROR:|ITK ERROR:|\w+\(0x\w+\):|\s)*", "", telling[-1])[:200]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """ITK's own warnings off, and what the libraries below it (HDF5, NIfTI, MetaIO) print: errors say what matters."""
    with _hush:
        shown = sitk.ProcessObject.GetGlobalWarningDisplay()
        sitk.ProcessObject.SetGlobalWarningDisplay(False)
        try:
            yield
        finally:
            sitk.ProcessObject.SetGlobalWarningDisplay(shown)


class _Hush:
    """Standard error of the whole process to nowhere, until the last of those who entered, in any thread, has left."""

    def __init__(self) -> None:
        self._lock, self._entered, self._kept = threading.Lock(), 0, None

    def __enter__(self) -> None:
        with self._lock:
            self._entered += 1
            if self._entered == 1:
                with contextlib.suppress(OSError):  # there may be none, as in a program with windows only
                    kept = os.dup(2)
                    nowhere = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(nowhere, 2)
                    os.close(nowhere)
                    self._kept = kept

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._entered -= 1
            if self._entered == 0 and self._kept is not None:
                os.dup2(self._kept, 2)
                os.close(self._kept)
                self._kept = None


_hush = _Hush()
