"""Reports of experiments and the benchmark: a table in Markdown, CSV and JSON, and how it was made."""

import csv
import io
import math
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch

import DivRegNetLib
from DivRegNetLib.io import atomic

REQUIRED = ("preset", "seeds", "device", "seconds")


def table(rows: list[dict]) -> str:
    """Rows as a Markdown table: floats with four digits, empty where a row has no value, None or NaN."""
    rows, columns = _without_nan(rows), _columns(rows)
    cells = [["" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v) for v in r.values()] for r in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in [columns, ["---"] * len(columns), *cells])


def write(folder: Path, name: str, rows: list[dict], about: dict) -> None:
    """Writes NAME.json, NAME.csv (every digit) and NAME.md (four digits), each atomically.

    Args:
        rows: values by column; a row may lack columns.
        about: how the experiment was run: all keys of :data:`REQUIRED` (``seconds`` is wall time) and any others;
            :func:`environment` is added. A ``note`` is printed above the table.
    Raises:
        ValueError: there are no rows, or a required key is missing.
        InputError: a file cannot be written.
    """
    if missing := [key for key in REQUIRED if key not in about]:
        raise ValueError(f"the report {name} does not say its {missing[0]}; needed are {', '.join(REQUIRED)}")
    if not rows:
        raise ValueError(f"the report {name} has no rows")
    note, plain = about.get("note", ""), _without_nan(rows)
    run = {key: value for key, value in about.items() if key != "note"} | environment()
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(plain[0]))
    writer.writeheader()
    writer.writerows(plain)
    atomic.write_json({"note": note, "rows": plain, "run": run}, folder / f"{name}.json")
    # As bytes: text would get a second carriage return on Windows.
    atomic.write_atomically(folder / f"{name}.csv", lambda part: part.write_bytes(text.getvalue().encode()))
    ran = "\n".join(f"- {key}: `{value}`" for key, value in run.items())
    parts = [f"# {name}", note, table(rows), "## What was run", ran]
    atomic.write_text("\n\n".join(filter(None, parts)) + "\n", folder / f"{name}.md")


def write_log(rows: list[dict], file: Path) -> None:
    """Writes the log of a training as CSV, atomically; rows may lack columns."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    atomic.write_text(text.getvalue(), file)


def environment() -> dict:
    """Command line, versions and threads of this process; of paths outside the checkout only the last name."""
    words = [f".../{Path(a).name}" if Path(a).is_absolute() or ".." in Path(a).parts else a for a in sys.argv]
    return {
        "command": shlex.join(["python", *words]),
        "version": commit(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }


def commit() -> str:
    """The commit of this checkout (with ``-dirty`` where files differ from it); without git the version of the package."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return DivRegNetLib.__version__


def _columns(rows: list[dict]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def _without_nan(rows: list[dict]) -> list[dict]:
    """The rows with all columns; None for absent values and for NaN and infinity, which JSON does not have."""
    full = [{key: row.get(key) for key in _columns(rows)} for row in rows]
    return [{k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()} for row in full]
