"""Atomic writing: a file is written in a staging folder beside its place and then moved there, or nothing changes."""

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from DivRegNetLib.errors import InputError, reason_of
from DivRegNetLib.io.locks import FileIO, LocksUnsupported, acquire
from DivRegNetLib.io.paths import VOLUME_SUFFIXES, utf8_name

STAGING = ".divregnet-"
"""How the names of staging folders begin."""

LOCK = "lock"  # the file in a staging folder that its process holds locked
ABANDONED_SECONDS = 24 * 3600.0  # age of a staging folder that is removed on a file system without locks


def write_text(text: str, path: Path) -> None:
    """Writes UTF-8 atomically; what is no character, as in odd file names, is escaped. Raises InputError where the file
    cannot be written."""
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8", errors="backslashreplace"))


def write_json(value: object, path: Path) -> None:
    """Writes indented JSON atomically. Raises InputError where the file cannot be written, ValueError for NaN."""
    write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", path)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Lets ``write`` write a file in a staging folder, then moves it to ``path``. A failure changes nothing.

    Folders are created as needed.

    Raises:
        InputError: names the file and why it cannot be written.
    """
    utf8_name(path)
    suffix = next((s for s in VOLUME_SUFFIXES if path.name.lower().endswith(s)), path.suffix)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with staging_folder(path.parent) as folder:
            part = folder / f"part{suffix}"
            try:
                write(part)
            except InputError as error:
                raise InputError(f"{path}: cannot be written completely; is the disk full?") from error
            os.replace(part, path)
    except (OSError, RuntimeError, UnicodeError) as error:
        raise InputError(f"{path}: cannot be written ({reason_of(error)})") from error


@contextlib.contextmanager
def staging_folder(folder: Path) -> Iterator[Path]:
    """A new folder inside ``folder``, for files that are to be moved to their places together; removed afterwards.

    Its process holds a lock in it as long as it lives. Staging folders whose process was killed are removed first.

    Raises:
        OSError: the folder cannot be written.
    """
    remove_abandoned(folder)
    with contextlib.ExitStack() as stack:
        path, lock = _new_staging_folder(folder)
        stack.callback(shutil.rmtree, path, ignore_errors=True)
        if lock is not None:
            stack.callback(lock.close)  # before the folder goes: Windows does not remove open files
        yield path


def remove_abandoned(folder: Path) -> None:
    """Removes the staging folders in a folder that no living process holds. Links are left alone."""
    for path in folder.glob(f"{STAGING}*"):
        with contextlib.suppress(OSError):
            if not path.is_dir() or path.is_symlink():
                continue
            try:
                lock = acquire(path / LOCK, wait=False)
            except LocksUnsupported:
                if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                    shutil.rmtree(path, ignore_errors=True)
                continue
            if lock is not None:
                if os.name == "nt":
                    lock.close()
                shutil.rmtree(path, ignore_errors=True)
                lock.close()


def _new_staging_folder(folder: Path) -> tuple[Path, FileIO | None]:
    """A new staging folder and its lock; None on a file system without locks."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=STAGING, dir=folder))
        try:
            lock = acquire(path / LOCK)
        except LocksUnsupported:
            return path, None
        except FileNotFoundError:
            continue  # another process took it for abandoned before it was locked
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise
        return path, lock
