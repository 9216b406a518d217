"""A cohort: a table of pairs of files, each registered into a folder of its own. torch is imported when work begins."""

import contextlib
from collections.abc import Callable
from pathlib import Path

from DivRegNetLib.io.atomic import write_text
from DivRegNetLib.io.output_folder import exclusive
from DivRegNetLib.options import Options
from DivRegNetLib.run.cohort.pairs import Pair, check_names, read_pairs
from DivRegNetLib.run.cohort.results import QUALITY, TABLE, csv_text

__all__ = ["QUALITY", "TABLE", "Pair", "read_pairs", "register_pairs"]


def register_pairs(
    pairs: dict[str, Pair],
    output: Path,
    options: Options,
    *,
    overwrite: bool = False,
    preview: bool = True,
    dask: str | None = None,
    finished: Callable[[], object] | None = None,
) -> list[dict]:
    """Registers a cohort, each pair into a folder of its name. The table ``results.csv`` grows as pairs finish.

    A model is loaded once per process. Results that are there are kept if they were made from the same files with the same
    options and model. A pair that fails becomes a row that gives the reason.

    Args:
        overwrite, preview: see :func:`DivRegNetLib.run.cohort.register_files.register_files`.
        dask: where :mod:`DivRegNetLib.run.cohort.dask` finds its workers; None: in this process, one pair after another.
        finished: called after each pair.
    Returns:
        The rows of the table, in the order of ``pairs``.
    Raises:
        InputError: a name of a pair cannot be the name of a folder.
        DivRegNetError: the model, or with ``dask`` the scheduler or its workers, cannot be used; or another process
            registers a cohort into this folder.
    """
    check_names(pairs)
    if dask is None:
        from DivRegNetLib.run.cohort import serial as scheduler

        arguments = ()
    else:
        from DivRegNetLib.run.cohort import dask as scheduler

        arguments = (dask,)
    choices = {"overwrite": overwrite, "preview": preview}
    with exclusive(output):
        rows: dict[str, dict] = {}
        # Closing the iterator when this process is interrupted also stops the workers.
        with contextlib.closing(scheduler.rows(pairs, output, options, *arguments, **choices)) as source:
            for row in source:
                rows[row["name"]] = row
                finished_rows = [rows[name] for name in pairs if name in rows]
                write_text(csv_text(finished_rows), output / TABLE)
                if finished is not None:
                    finished()
        return finished_rows
