"""One pair of a cohort: its row in the table of results, whether it was registered, was registered before, or failed."""

import json
from collections.abc import Callable
from pathlib import Path

from DivRegNetLib.errors import Cancelled, DivRegNetError
from DivRegNetLib.io.output_folder import clear_abandoned
from DivRegNetLib.models import Model
from DivRegNetLib.options import Options, Progress
from DivRegNetLib.registration import memory
from DivRegNetLib.run.cohort.origin import differences, origin_of
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
    preview: bool = True,
    progress: Progress | None = None,
) -> dict:
    """Registers a pair of a cohort into ``output / name``; returns its row.

    Results that are there are kept, if all of them are and they were made from the same files with the same options, model
    and version.

    Raises:
        Cancelled: the progress callback returned False.
    """
    folder, changes = output / name, []
    try:
        if (folder / QUALITY).exists() and not overwrite:
            clear_abandoned(folder)  # of a process that was killed after it wrote the last file
            report = _read_report(folder / QUALITY)
            changes = differences(report.get("origin"), origin_of(pair, options))
            if missing := [file for file in report.get("files", ()) if not (folder / file).is_file()]:
                changes.append(f"{', '.join(missing)} is missing")
            if not changes:
                return row_of(name, report)
        overwrite = overwrite or bool(changes)
        arguments = {"model": model(), "overwrite": overwrite, "preview": preview, "progress": progress}
        row = row_of(name, register_files(pair, folder, options, **arguments))
        if changes:
            row["message"] = (
                f"registered again, since in the earlier results {'; '.join(changes)}. {row['message']}".strip()
            )
        return row
    except Cancelled:
        raise
    except (DivRegNetError, OSError, ValueError) as error:
        return failed_row(name, str(error))
    except Exception as error:  # whatever it is, the other pairs must go on
        return failed_row(name, f"unexpected {type(error).__name__}: {error}")
    finally:
        memory.give_back()


def _read_report(path: Path) -> dict:
    """The content of ``quality.json``; empty where it is damaged."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return report if isinstance(report, dict) else {}
