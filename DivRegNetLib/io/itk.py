"""How ITK reads and writes files here: with decimal points whatever the locale, and without warnings on the terminal.

Standard error itself is left alone, as other threads and crash dumps write to it. What the libraries below ITK print about
damaged files is avoided instead: such files are recognized before ITK opens them (:mod:`DivRegNetLib.io.damage`).
"""

import contextlib
import ctypes
import locale
import sys
import threading
from collections.abc import Iterator

import SimpleITK as sitk

_LC_NUMERIC_MASK = 1 << 4 if sys.platform == "darwin" else 1 << 1


@contextlib.contextmanager
def file_access() -> Iterator[None]:
    """For calls of ITK that read or write files."""
    with _without_warnings, _decimal_points():
        yield


class _WithoutWarnings:
    """Turns ITK's warnings off until the last of those who entered, in any thread, has left."""

    def __init__(self) -> None:
        self._lock, self._entered, self._shown = threading.Lock(), 0, True

    def __enter__(self) -> None:
        with self._lock:
            self._entered += 1
            if self._entered == 1:
                self._shown = sitk.ProcessObject.GetGlobalWarningDisplay()
                sitk.ProcessObject.SetGlobalWarningDisplay(False)

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._entered -= 1
            if self._entered == 0:
                sitk.ProcessObject.SetGlobalWarningDisplay(self._shown)


_without_warnings = _WithoutWarnings()


@contextlib.contextmanager
def _decimal_points() -> Iterator[None]:
    """Numbers are read and written with decimal points in this thread; other threads keep the locale of the process."""
    if locale.localeconv()["decimal_point"] == ".":
        yield
    elif sys.platform == "win32":
        with _thread_locale_windows():
            yield
    else:
        with _thread_locale_posix():
            yield


@contextlib.contextmanager
def _thread_locale_posix() -> Iterator[None]:
    library = ctypes.CDLL(None)
    for name, arguments in (
        ("uselocale", [ctypes.c_void_p]),
        ("duplocale", [ctypes.c_void_p]),
        ("newlocale", [ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p]),
        ("freelocale", [ctypes.c_void_p]),
    ):
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, ctypes.c_void_p
    before = library.uselocale(None)
    own = library.newlocale(_LC_NUMERIC_MASK, b"C", library.duplocale(before))
    library.uselocale(own)
    try:
        yield
    finally:
        library.uselocale(before)
        library.freelocale(own)


@contextlib.contextmanager
def _thread_locale_windows() -> Iterator[None]:
    per_thread = ctypes.CDLL("ucrtbase")._configthreadlocale
    before = per_thread(1)  # _ENABLE_PER_THREAD_LOCALE
    numbers = locale.setlocale(locale.LC_NUMERIC)
    locale.setlocale(locale.LC_NUMERIC, "C")
    try:
        yield
    finally:
        locale.setlocale(locale.LC_NUMERIC, numbers)
        per_thread(before)
