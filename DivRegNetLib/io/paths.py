"""Checks of paths before files are opened. Every error names the path and what to do."""

import errno
import math
import os
import stat
from pathlib import Path

from DivRegNetLib.errors import InputError

VOLUME_SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd")


def check_file(path: Path, largest: float = math.inf) -> None:
    """Raises InputError unless the path is a readable, non-empty regular file, or a link to one.

    Args:
        largest: number of bytes that the file may have.
    """
    check_name(path)
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


def check_name(path: Path) -> None:
    """Raises InputError for a name that is not valid UTF-8, over which ITK would end the process."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{os.fspath(path)!a}: the name is not valid UTF-8; rename the file or its folder") from error


def check_ending(path: Path, endings: tuple[str, ...], what: str) -> None:
    """Raises InputError unless the name ends in one of the endings.

    Args:
        what: is to be written, in the plural, for the message.
    """
    if not path.name.lower().endswith(endings):
        raise InputError(f"{path}: {what} are written to files that end in {', '.join(endings)}; choose one of these")
