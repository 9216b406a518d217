"""One pair of a cohort: its row in the table of results, whether it was registered, was registered before, or failed."""

import json
from collections.abc import Callable
from pathlib import Path

from DivRegNetLib.errors import Cancelled, DivRegNetError
from DivRegNetLib.io.output_folder import clear_abandoned
from DivRegNetLib.models import Model
from DivRegNetLib.options import Options, Progress
from DivRegNetLib.registration import memory
from DivRegNetLib.run.cohort.pairs import Pair
from DivRegNetLib.run.cohort.register_files import register_files
from DivRegNetLib.run.cohort.results import QUALITY, failed_row, row_of


def register_row(
    name: str,
    pair: Pair,
    output: Path,
    options: Options,
    model: Callable[[], Model],
    *,
    overwrite: bool,
    progress: Progress | None = None,
) -> dict:
    """Registers a pair of a cohort into ``output / name`` unless it has results there; returns its row.

    Raises:
        Cancelled: the progress callback returned False.
    """
    folder = output / name
    try:
        if (folder / QUALITY).exists() and not overwrite:
            clear_abandoned(folder)  # of a process that was killed after it wrote the last file
            report = json.loads((folder / QUALITY).read_text(encoding="utf-8"))
        else:
            report = register_files(pair, folder, options, model=model(), overwrite=overwrite, progress=progress)
        return row_of(name, report)
    except Cancelled:
        raise
    except (DivRegNetError, OSError, ValueError) as error:
        return failed_row(name, str(error))
    except Exception as error:  # whatever it is, the other pairs must go on
        return failed_row(name, f"unexpected {type(error).__name__}: {error}")
    finally:
        memory.give_back()
