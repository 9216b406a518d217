"""Files that cannot be used: which, and why."""

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
    """Turns what goes wrong into Broken of the file last told; memory that ran out is no file's fault."""
    told: list[Path] = []
    try:
        yield told.append
    except (InputError, OSError, RuntimeError) as error:
        if any(e is not None and is_out_of_memory(e) for e in (error, error.__cause__)):
            raise MemoryError(str(error)) from error
        raise Broken(told[-1], str(error)) from error


def complaint(unfit: list[Broken], total: int) -> str:
    lines = [f"  {error.file}: {error.reason}" for error in unfit]
    return "\n".join(
        [
            f"{len(unfit)} of {total} volumes cannot be used:",
            *lines,
            "repair or remove them, or leave them out with --skip-broken; what else is prepared is kept",
        ]
    )
