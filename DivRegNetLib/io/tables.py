"""Tables with a header line, as spreadsheets save them: comma, semicolon or tab; UTF-8, UTF-16 or Windows-1252."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path

from DivRegNetLib.errors import InputError
from DivRegNetLib.io.paths import check_file

DELIMITERS = ",;\t"
LARGEST_TABLE_BYTES = 100_000_000
BYTE_ORDER_MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


@dataclass(frozen=True)
class Table:
    """The cells of a table as text.

    columns: names from the header line.
    rows: number of the line in the file, and column -> cell without surrounding blanks. Empty lines are left out.
    delimiter: between cells.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[int, dict[str, str]], ...]
    delimiter: str


def read_table(path: Path) -> Table:
    """Reads a table.

    Raises:
        InputError: names the file, the line and what is wrong.
    """
    check_file(path, LARGEST_TABLE_BYTES)
    return parse_table(read_text(path), str(path))


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, UTF-16 or, where it is neither, Windows-1252.

    Raises:
        InputError: it is none of these.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if content.startswith(mark)), None)
    if encoding is None and b"\0" in content[:2]:
        encoding = "utf-16-be" if content[:1] == b"\0" else "utf-16-le"
    for candidate in [encoding] if encoding else ["utf-8", "cp1252"]:
        try:
            return content.decode(candidate)
        except UnicodeDecodeError:
            continue
    raise InputError(f'{path}: its encoding is not known; save it as text in UTF-8 (in Excel: "CSV UTF-8")')


def parse_table(text: str, name: str) -> Table:
    """A table from text; ``name`` is for messages.

    Raises:
        InputError: there is no header line, or a line has more cells than the header.
    """
    lines = text.lstrip("\ufeff").splitlines(keepends=True)
    first = next((i for i, line in enumerate(lines) if line.strip()), len(lines))
    declared = ""
    if first < len(lines) and lines[first].lower().startswith("sep="):  # what Excel writes and obeys
        declared, first = lines[first].strip()[4:5], first + 1
    header = lines[first] if first < len(lines) else ""
    delimiter = declared if declared and declared in DELIMITERS else max(DELIMITERS, key=header.count)
    reader = csv.reader(io.StringIO("".join(lines[first:]), newline=""), delimiter=delimiter, skipinitialspace=True)
    rows = []
    try:
        columns = tuple(cell.strip() for cell in next(reader, ()))
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            if any(cells[len(columns) :]):
                raise InputError(
                    f"{name}, line {first + reader.line_num}: has {len(cells)} cells, but the first line has "
                    f"{len(columns)}; put quotation marks around text that holds {_word(delimiter)}"
                )
            if any(cells):
                cells += [""] * (len(columns) - len(cells))
                rows.append((first + reader.line_num, dict(zip(columns, cells, strict=False))))
    except csv.Error as error:
        raise InputError(f"{name}, line {first + reader.line_num}: cannot be read as a table ({error})") from error
    if not any(columns):
        raise InputError(f"{name}: has no header line that names its columns")
    if repeated := [c for c in columns if c and columns.count(c) > 1]:
        raise InputError(f"{name}: has two columns {repeated[0]!r}")
    return Table(columns, tuple(rows), delimiter)


def _word(delimiter: str) -> str:
    return {",": "a comma", ";": "a semicolon", "\t": "a tab"}[delimiter]
