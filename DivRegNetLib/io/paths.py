"""Checks of paths before files are opened. Every error names the path and what to do."""

import contextlib
import errno
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from DivRegNetLib.errors import InputError

VOLUME_SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd")


def check_file(path: Path, largest: float = math.inf) -> None:
    """Raises InputError unless the path is a readable, non-empty regular file, or a link to one.

    Args:
        largest: number of bytes that the file may have.
    """
    utf8_name(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path}: not a regular file")
        path.open("rb").close()
    except (OSError, ValueError) as error:
        missing = isinstance(error, OSError) and error.errno in (errno.ENOENT, errno.ENOTDIR)
        if isinstance(error, InputError):
            raise
        if missing and not path.is_symlink():
            raise InputError(f"{path}: there is no such file") from error
        if missing:
            raise InputError(f"{path}: is a link to {os.readlink(path)}, which does not exist") from error
        raise InputError(f"{path}: cannot be opened ({getattr(error, 'strerror', None) or error})") from error
    if status.st_size == 0:
        raise InputError(f"{path}: the file is empty")
    if status.st_size > largest:
        raise InputError(f"{path}: has {status.st_size} bytes, more than {largest:g}; is this the right file?")


@contextlib.contextmanager
def unchanged(*paths: Path) -> Iterator[None]:
    """For reading files in several steps. Raises InputError where another process replaces or writes them meanwhile."""
    before = [_state(path) for path in paths]

    def check() -> None:
        if changed := [path for path, state in zip(paths, before, strict=True) if _state(path) != state]:
            raise InputError(f"{changed[0]}: was changed while it was read; wait until it is complete, and try again")

    try:
        yield
    except Exception as error:
        try:
            check()
        except InputError as changed:
            raise changed from error
        raise
    check()


def _state(path: Path) -> tuple[int, ...] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def utf8_name(path: Path) -> str:
    """The name of a file for ITK, which expects UTF-8, also where Python takes names for ASCII (LC_ALL=C).

    Raises:
        InputError: the name is not valid UTF-8; over such a name ITK would end the process.
    """
    try:
        return os.fsencode(path).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{os.fspath(path)!a}: the name is not valid UTF-8; rename the file or its folder") from error


def check_ending(path: Path, endings: tuple[str, ...], what: str) -> None:
    """Raises InputError unless the name ends in one of the endings.

    Args:
        what: is to be written, in the plural, for the message.
    """
    if not path.name.lower().endswith(endings):
        raise InputError(f"{path}: {what} are written to files that end in {', '.join(endings)}; choose one of these")
