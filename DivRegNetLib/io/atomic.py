"""Files appear whole or not at all: each is written under another name beside its place and then moved there."""

import contextlib
import errno
import json
import math
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from DivRegNetLib.errors import InputError
from DivRegNetLib.io.claim import PART
from DivRegNetLib.io.quiet import quiet, reason_of

VOLUME_SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd")
ABANDONED_S = 24 * 3600.0  # after which such a folder is nobody's, where the system cannot tell


def check_file(path: Path, largest: float = math.inf) -> None:
    """Raises InputError unless the path is a regular file, or a link to one, that holds something and may be read.

    Args:
        largest: number of bytes it may have.
    """
    check_name(path)
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            raise InputError(f"{path}: not a regular file")
        path.open("rb").close()
    except (OSError, ValueError) as error:
        missing = isinstance(error, OSError) and error.errno in (errno.ENOENT, errno.ENOTDIR)
        if isinstance(error, InputError):
            raise
        if missing and not path.is_symlink():
            raise InputError(f"{path}: there is no such file") from error
        if missing:
            raise InputError(f"{path}: is a link to {os.readlink(path)}, which is not there") from error
        raise InputError(f"{path}: cannot be opened ({getattr(error, 'strerror', None) or error})") from error
    if about.st_size == 0:
        raise InputError(f"{path}: the file is empty")
    if about.st_size > largest:
        raise InputError(f"{path}: has {about.st_size} bytes, more than {largest:g}; is it the file that is meant?")


def check_name(path: Path) -> None:
    """Raises InputError for a name that is no text: ITK ends the whole process over one."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{os.fspath(path)!a}: the name is not valid UTF-8; rename the file or its folder") from error


def check_ending(path: Path, endings: tuple[str, ...], what: str) -> None:
    if not path.name.lower().endswith(endings):
        raise InputError(f"{path}: {what} are written to files that end in {', '.join(endings)}; choose one of these")


def write_text(text: str, path: Path) -> None:
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_json(value: object, path: Path) -> None:
    """Writes JSON for people and machines; NaN is refused."""
    write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", path)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Lets ``write`` write a file beside ``path`` and moves it there; leaves nothing behind on failure.

    What a process that was killed has left there goes with the next writing.

    Raises:
        InputError: names the file and why it cannot be written.
    """
    check_name(path)
    suffix = next((s for s in VOLUME_SUFFIXES if path.name.lower().endswith(s)), path.suffix)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _waiting_room(path.parent) as folder:
            part = folder / f"part{suffix}"
            with quiet():
                try:
                    write(part)
                except InputError as error:
                    raise InputError(f"{path}: cannot be written whole; is the disk full?") from error
            os.replace(part, path)
    except (OSError, RuntimeError, UnicodeError) as error:
        raise InputError(f"{path}: cannot be written ({reason_of(error)})") from error


@contextlib.contextmanager
def _waiting_room(folder: Path) -> Iterator[Path]:
    """A folder in a folder, gone afterwards; those of processes that are gone are removed.

    Each is locked by its process, and the system lets go of the lock however that ends. Making and removing are done one
    process at a time, so that none is seen before it is locked.
    """
    with contextlib.ExitStack() as stack:
        with _locked(folder):
            for left in folder.glob(f"{PART}*"):
                if _is_abandoned(left):
                    shutil.rmtree(left, ignore_errors=True)
            own = tempfile.TemporaryDirectory(prefix=PART, dir=folder, ignore_cleanup_errors=True)
            stack.enter_context(own)
            stack.enter_context(_locked(own.name))
        yield Path(own.name)


@contextlib.contextmanager
def _locked(folder: str | Path) -> Iterator[None]:
    """Holds a folder, once no other process does; does nothing where the system has no such locks."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _is_abandoned(folder: Path) -> bool:
    """Whether a folder is no link and no process holds it."""
    try:
        if folder.is_symlink() or not folder.is_dir():
            return False
        if fcntl is None:
            return time.time() - folder.stat().st_mtime > ABANDONED_S
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(handle)
    except OSError:
        return False
    return True
