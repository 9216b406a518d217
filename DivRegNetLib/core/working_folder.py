"""A working folder that exists, for the import of torch. No torch here."""

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def existing_working_folder() -> Iterator[None]:
    """Leaves a working folder that was removed and returns to it. MKL would end the process when torch is imported there."""
    try:
        os.getcwd()
    except OSError:
        removed = os.open(".", os.O_RDONLY)
        try:
            os.chdir(os.path.abspath(os.sep))
            yield
        finally:
            os.fchdir(removed)
            os.close(removed)
    else:
        yield
