"""The files of one registration, and tables of them."""

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

from DivRegNetLib.errors import InputError
from DivRegNetLib.io.tables import read_table
from DivRegNetLib.run.cohort.results import TABLE

RESERVED = (TABLE,)
DEVICES = ("con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10)))
LONGEST_NAME = 200  # bytes


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
    """Name -> pair, from a table with a header (see :mod:`DivRegNetLib.io.tables`).

    The columns are ``fixed`` and ``moving`` and, optionally, ``name`` and the other fields of :class:`Pair`. Paths are
    relative to the table's folder.

    Raises:
        InputError: names the table, the line and what is wrong.
    """
    known = [f.name for f in fields(Pair)]
    content = read_table(table)
    for needed in ("fixed", "moving"):
        if needed not in content.columns:
            raise InputError(
                f"{table}: has no column {needed!r}; its first line must name the columns, but names "
                f"{', '.join(map(repr, content.columns))}"
            )
    if unknown := [c for c in content.columns if c not in [*known, "name", ""]]:
        raise InputError(f"{table}: unknown column {unknown[0]!r}; known are name, {', '.join(known)}")
    pairs: dict[str, Pair] = {}
    for line, row in content.rows:
        if not (row["fixed"] and row["moving"]):
            raise InputError(f"{table}, line {line}: fixed and moving are needed")
        name = row.get("name") or f"{len(pairs) + 1:04d}"
        if name in pairs:
            raise InputError(f"{table}, line {line}: the name {name!r} appears twice; choose another name")
        pairs[name] = Pair(**{k: table.parent / row[k] for k in known if row.get(k)})
    if not pairs:
        raise InputError(f"{table}: lists no pair")
    try:
        check_names(pairs)
    except InputError as error:
        raise InputError(f"{table}: {error}") from error
    return pairs


def check_names(names: Iterable[str]) -> None:
    """Raises InputError unless each pair can have a folder of its name, on every system."""
    taken: dict[str, str] = {}
    for name in names:
        if reason := _why_no_folder_name(name):
            raise InputError(f"the name {name!r} {reason}; choose another name")
        key = unicodedata.normalize("NFC", name).casefold()
        if key in taken:
            raise InputError(
                f"the names {taken[key]!r} and {name!r} are the same folder on many systems; choose another name"
            )
        taken[key] = name


def _why_no_folder_name(name: str) -> str | None:
    """Why the results of a pair cannot be in a folder of this name on every system; None if they can."""
    if name.startswith("."):
        return "begins with a dot, as hidden and temporary folders do"
    if name.casefold() in RESERVED:
        return "is reserved for another file"
    if name != name.strip() or name.endswith("."):
        return "begins or ends with a blank or ends with a dot"
    if odd := sorted({c for c in name if c in '/\\:*?"<>|' or unicodedata.category(c) == "Cc"}):
        return f"contains {odd[0]!r}"
    if name.split(".")[0].casefold() in DEVICES:
        return "is the name of a device on Windows"
    if len(name.encode(errors="surrogatepass")) > LONGEST_NAME:
        return f"is longer than {LONGEST_NAME} bytes"
    return None
