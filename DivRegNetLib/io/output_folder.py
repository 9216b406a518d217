"""Output folders, in each of which one process works at a time."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from DivRegNetLib.errors import InputError
from DivRegNetLib.io.atomic import remove_abandoned
from DivRegNetLib.io.locks import FileIO, LocksUnsupported, acquire

LOCK = ".divregnet.lock"
ATTEMPTS = 10  # to lock a folder


@contextlib.contextmanager
def exclusive(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Gives an output folder to this process alone. The folder is created if necessary and cleared of abandoned files.

    If nothing was written, a folder that was created here, or left by a killed process, is removed again.

    Args:
        wait: until another process has finished with the folder; otherwise that is an error.
    Raises:
        InputError: another process is writing there, or the folder cannot be written.
    """
    temporary = not folder.exists() or (folder / LOCK).exists()
    lock = None
    try:
        lock = _acquire(folder, wait)
        if lock is None:
            raise InputError(f"{folder}: another process is writing there; wait for it, or choose another folder")
    except LocksUnsupported:
        pass  # working without a lock is better than not working
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror or error})") from error
    try:
        remove_abandoned(folder)
        yield
    finally:
        if lock is not None and os.name == "nt":  # where an open file cannot be removed
            lock.close()
        with contextlib.suppress(OSError):
            (folder / LOCK).unlink()
        if lock is not None:
            lock.close()
        if temporary:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _acquire(folder: Path, wait: bool) -> FileIO | None:
    """The lock of a folder, which another process that has just finished may remove in between."""
    for _ in range(ATTEMPTS - 1):
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            return acquire(folder / LOCK, wait=wait)
    return acquire(folder / LOCK, wait=wait)


def clear_abandoned(folder: Path) -> None:
    """Removes what a killed process left in its output folder, and the folder if it held nothing else."""
    if folder.is_dir():
        with contextlib.suppress(InputError), exclusive(folder):
            pass
