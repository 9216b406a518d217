"""A process in which libraries work, whatever it was started with: open standard streams, and a working folder."""

import atexit
import contextlib
import ctypes
import gc
import os
import sys
import threading
from collections.abc import Iterator
from typing import NoReturn

KEPT_BYTES = 1 << 27  # of memory that was freed; more is given back to the system
LARGE_BYTES = 1 << 25  # an array of so many is given back in any case, so that memory is not left in pieces
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def prepare_process() -> None:
    """Opens standard streams that are closed, leaves a working folder that was removed, and keeps memory that is freed."""
    _prepare_streams()
    _keep_memory()
    try:
        os.getcwd()
    except OSError:  # MKL would end the process; nothing can be relative to such a folder
        os.chdir(os.path.abspath(os.sep))


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """For imports: looking again and again for garbage among the objects of large libraries takes a tenth of their time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def leave(code: int) -> NoReturn:
    """Ends the process as ``sys.exit`` does, but leaves it to the system to free the memory: the interpreter, which takes every
    object apart, needs half a second for those of PyTorch."""
    if all(thread.daemon or thread is threading.main_thread() for thread in threading.enumerate()):
        with contextlib.suppress(OSError, ValueError):  # where an output cannot be written, the interpreter says so
            atexit._run_exitfuncs()
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(code)
    sys.exit(code)


def _keep_memory() -> None:
    """Lets the C library keep memory that is freed and, a moment later, asked for again, where it is glibc.

    Otherwise the system fills the memory of the next array with zeros, which takes a twentieth of the processor's time of a
    registration, and a tenth in a process that has registered before.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):
            library = ctypes.CDLL(None)
            library.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
            library.mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)


def _prepare_streams() -> None:
    """Opens standard streams that are closed, and lets both outputs write every character.

    Without this the next file that is opened would become standard error, and libraries would print into it.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            with contextlib.suppress(OSError):
                os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest free number, which is this
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed, or a program with windows only
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 -- it stays open
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError, OSError):  # a stand-in for a stream, or a closed one
            stream.reconfigure(errors="backslashreplace")
