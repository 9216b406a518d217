"""The files of one registration, and tables of them."""

import csv
from dataclasses import dataclass, fields
from pathlib import Path

from DivRegNetLib.errors import InputError
from DivRegNetLib.io.paths import check_file

LARGEST_TABLE_BYTES = 100_000_000


@dataclass(frozen=True)
class Pair:
    """The files of one registration; all but the first two are optional."""

    fixed: Path
    moving: Path
    fixed_mask: Path | None = None
    moving_mask: Path | None = None
    fixed_labels: Path | None = None
    moving_labels: Path | None = None
    fixed_landmarks: Path | None = None
    moving_landmarks: Path | None = None

    def paths(self) -> dict[str, Path]:
        """Field -> path, of those that are given."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}


def read_pairs(table: Path) -> dict[str, Pair]:
    """Name -> pair, from a CSV file with a header.

    The columns are ``fixed`` and ``moving`` and, optionally, ``name`` and the other fields of :class:`Pair`. Paths are
    relative to the table's folder.

    Raises:
        InputError: names the table, the line and what is wrong.
    """
    known = [f.name for f in fields(Pair)]
    check_file(table, LARGEST_TABLE_BYTES)
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            columns = [c.strip() for c in reader.fieldnames or []]
            reader.fieldnames = columns
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{table}: cannot be read as a table of pairs ({error})") from error
    for needed in ("fixed", "moving"):
        if needed not in columns:
            raise InputError(f"{table}: has no column {needed!r}; its first line names the columns")
    if unknown := [c for c in columns if c not in [*known, "name"]]:
        raise InputError(f"{table}: unknown column {unknown[0]!r}; known are name, {', '.join(known)}")
    pairs: dict[str, Pair] = {}
    for line, row in enumerate(rows, start=2):
        if not (row["fixed"] and row["moving"]):
            raise InputError(f"{table}, line {line}: fixed and moving are needed")
        name = (row.get("name") or f"{len(pairs) + 1:04d}").strip()
        if name in pairs or name in (".", "..") or any(c in name for c in "/\\\0"):
            raise InputError(f"{table}, line {line}: the name {name!r} is taken or cannot be the name of a folder")
        pairs[name] = Pair(**{k: table.parent / row[k].strip() for k in known if row.get(k)})
    if not pairs:
        raise InputError(f"{table}: lists no pair")
    return pairs
