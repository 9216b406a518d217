"""One process at a time in an output folder, and nothing half-written left there by one that was killed.

The lock is the operating system's, on a file: it goes with the process that holds it, however that ends.
"""

import contextlib
import errno
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from DivRegNetLib.errors import InputError

LOCK = ".divregnet.lock"
PART = ".divregnet-"
"""How the names begin of folders in which files wait until they are whole."""

_TAKEN = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)


@contextlib.contextmanager
def claimed(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """This process alone works in a folder, which is made if need be and tidied first.

    Where nothing has come into it in the end, a folder that was not there before, or that a killed process left, goes.

    Args:
        wait: for another process that works there; else that is an error.
    Raises:
        InputError: another process works there, or the folder cannot be written.
    """
    passing = not folder.exists() or (folder / LOCK).exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = hold(folder / LOCK, wait=wait)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror or error})") from error
    if lock is None:
        raise InputError(f"{folder}: another process is writing there; wait for it, or choose another folder")
    try:
        for left in folder.glob(f"{PART}*"):
            shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        if os.name == "nt":  # where an open file cannot be removed
            lock.close()
        with contextlib.suppress(OSError):
            (folder / LOCK).unlink()
        lock.close()
        if passing:
            with contextlib.suppress(OSError):
                folder.rmdir()


def tidy(folder: Path) -> None:
    """Removes what a killed process left in its folder, and the folder where it held nothing else."""
    if folder.is_dir():
        with contextlib.suppress(InputError), claimed(folder):
            pass


def hold(path: Path, *, wait: bool = True) -> BinaryIO | None:
    """A file, made if need be, that this process alone has locked until it closes it or ends.

    Args:
        wait: until it can be had; else None where another process has it.
    Raises:
        OSError: it cannot be opened.
    """
    while True:
        file = open(path, "ab")  # noqa: SIM115 -- it stays open
        try:
            _lock(file, wait)
        except OSError as error:
            if error.errno in _TAKEN:
                file.close()
                if wait:  # Windows gives up after ten seconds
                    continue
                return None
            return file  # a file system without locks: better none than no work at all
        with contextlib.suppress(OSError):
            if sys.platform == "win32" or os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()  # removed by the one before, in between: it is nobody's lock


def _lock(file: BinaryIO, wait: bool) -> None:
    if os.name == "nt":
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
        return
    import fcntl

    fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
