"""How ITK reads and writes files here: in one thread at a time, with decimal points whatever the locale, and without warnings
on the terminal.

Standard error itself is left alone, as other threads and crash dumps write to it. What the libraries below ITK print about
damaged files is avoided instead: such files are recognized before ITK opens them (:mod:`DivRegNetLib.io.damage`).
"""

import contextlib
import ctypes
import locale
import os
import sys
import threading
from collections.abc import Iterator

import SimpleITK as sitk

_LC_NUMERIC_MASK = 1 << 4 if sys.platform == "darwin" else 1 << 1
_one_at_a_time = threading.RLock()


def _renew_lock() -> None:
    """In a forked process, where a thread that held the lock does not go on."""
    global _one_at_a_time
    _one_at_a_time = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


@contextlib.contextmanager
def file_access() -> Iterator[None]:
    """For calls of ITK that read or write files. One thread makes them at a time: SimpleITK lets other threads go on
    meanwhile, but HDF5, which ITK also asks about files of other formats, crashes when two threads use it."""
    with _one_at_a_time, _decimal_points():
        shown = sitk.ProcessObject.GetGlobalWarningDisplay()
        sitk.ProcessObject.SetGlobalWarningDisplay(False)
        try:
            yield
        finally:
            sitk.ProcessObject.SetGlobalWarningDisplay(shown)


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
