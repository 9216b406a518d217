"""Errors about unusable files, which name the file and the reason."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from DivRegNetLib.errors import InputError, is_out_of_memory


class Broken(Exception):
    """A file that cannot be used, and why."""

    def __init__(self, file: Path, reason: str) -> None:
        super().__init__(file, reason)
        self.file, self.reason = file, reason.removeprefix(f"{file}: ")


@contextlib.contextmanager
def blame() -> Iterator[Callable[[Path], None]]:
    """Turns errors into :class:`Broken` of the file that was named last; lack of memory stays a MemoryError."""
    files: list[Path] = []
    try:
        yield files.append
    except (InputError, OSError, RuntimeError) as error:
        if any(e is not None and is_out_of_memory(e) for e in (error, error.__cause__)):
            raise MemoryError(str(error)) from error
        raise Broken(files[-1], str(error)) from error


def complaint(unfit: list[Broken], total: int) -> str:
    """The message about all unusable files of a cohort of ``total`` volumes."""
    lines = [f"  {error.file}: {error.reason}" for error in unfit]
    return "\n".join(
        [
            f"{len(unfit)} of {total} volumes cannot be used:",
            *lines,
            "repair or remove them, or leave them out with --skip-broken; the volumes that are prepared already are kept",
        ]
    )
