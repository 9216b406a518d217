"""Locks on files. The operating system releases a lock when its process ends, however it ends.

These few lines stand in for the package ``filelock`` for three reasons. A lock file must disappear together with the folder
that it is in; after taking the lock one therefore has to compare the locked file with the file at the path, and
``filelock`` does not give its file descriptor away. Slicer imports this module before PyTorch, and ``filelock`` with it, is
installed. And a worker waits for its parent to end: here it sleeps until then, where ``filelock`` looks again and again.
"""

import contextlib
import errno
import os
import weakref
from io import FileIO
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

_CONTENDED = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)


class LocksUnsupported(OSError):
    """The file system has no locks."""


def acquire(path: Path, *, wait: bool = True) -> FileIO | None:
    """Locks a file, which is created if necessary; closing the returned file releases the lock.

    The lock excludes other processes and other threads of this one. Forked children do not hold it.

    Args:
        wait: until the lock is free; otherwise None is returned where another holds it.
    Raises:
        LocksUnsupported: the file system has no locks. Other OSErrors: the file cannot be opened.
    """
    while True:
        file = FileIO(path, "a")
        try:
            locked = _lock(file.fileno(), wait)
        except BaseException:
            file.close()
            raise
        if locked:
            with contextlib.suppress(OSError):
                if fcntl is None or os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                    _held.add(file)
                    return file
        file.close()  # the previous holder removed this file after it was opened here: try again with a new one
        if not locked and not wait:
            return None


def _lock(descriptor: int, wait: bool) -> bool:
    """Whether the lock was taken; where it is to be waited for, False asks for another attempt."""
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        else:
            msvcrt.locking(descriptor, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)  # waits for ten seconds
    except OSError as error:
        if error.errno in _CONTENDED:
            return False
        raise LocksUnsupported(error.errno, error.strerror) from error
    return True


_held: "weakref.WeakSet[FileIO]" = weakref.WeakSet()


def _close_inherited() -> None:
    """A forked child shares its parent's locks and would keep them after the parent has ended."""
    for file in list(_held):
        file.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited)
