"""Warnings of ITK and of the libraries below it, which are kept off the terminal: errors say what matters."""

import contextlib
import os
import threading
from collections.abc import Iterator

import SimpleITK as sitk


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Nothing that ITK, HDF5, NIfTI or MetaIO print to standard error is shown."""
    with _standard_error_to_null:
        shown = sitk.ProcessObject.GetGlobalWarningDisplay()
        sitk.ProcessObject.SetGlobalWarningDisplay(False)
        try:
            yield
        finally:
            sitk.ProcessObject.SetGlobalWarningDisplay(shown)


class _StandardErrorToNull:
    """Redirects standard error of the process until the last of those who entered, in any thread, has left."""

    def __init__(self) -> None:
        self._lock, self._entered, self._kept = threading.Lock(), 0, None

    def __enter__(self) -> None:
        with self._lock:
            self._entered += 1
            if self._entered == 1:
                with contextlib.suppress(OSError):  # there may be none, as in a program with windows only
                    kept = os.dup(2)
                    null = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(null, 2)
                    os.close(null)
                    self._kept = kept

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._entered -= 1
            if self._entered == 0 and self._kept is not None:
                os.dup2(self._kept, 2)
                os.close(self._kept)
                self._kept = None


_standard_error_to_null = _StandardErrorToNull()
