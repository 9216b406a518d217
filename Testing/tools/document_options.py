"""Writes the tables of arguments and options in docs/command-line.md from the command line itself.

    python Testing/tools/document_options.py

A table stands between ``<!-- table: NAME -->`` and ``<!-- end of table -->``; NAME is a command of ``divregnet``, or
``options`` for the table of :mod:`DivRegNetLib.options`, or ``presets`` for those of :mod:`DivRegNetLib.presets`. A test
compares the file with what this program would write.
"""

import argparse
import math
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "command-line.md"
TABLE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def updated(text: str) -> str:
    """The text of the document with all of its tables as they should be."""
    return TABLE.sub(lambda found: found[1] + _table(found[2]) + found[3], text)


def tables(text: str) -> list[str]:
    """The names of the tables in the text of the document."""
    return [name for _, name, _ in TABLE.findall(text)]


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    from DivRegNetLib.run import cli

    return cli._parser()


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Command -> its parser."""
    return next(a for a in parser()._actions if isinstance(a, argparse._SubParsersAction)).choices


def _table(name: str) -> str:
    if name == "options":
        return _options()
    if name == "presets":
        return _presets()
    rows = [_row(action) for action in parsers()[name]._actions if not _is_elsewhere(action, name)]
    return "| argument | meaning |\n|---|---|\n" + "".join(f"| {a} | {b} |\n" for a, b in rows)


def _is_elsewhere(action: argparse.Action, command: str) -> bool:
    """Whether the document describes an argument elsewhere: as one that all commands have, or in the table of options."""
    from DivRegNetLib.options import table

    flags = {"--help", "--json", "--debug"}
    if command == "register":
        flags |= {option.flag for option in table().values()}
    return bool(flags & set(action.option_strings))


def _presets() -> str:
    from DivRegNetLib.presets import PRESETS

    rows = []
    for preset in PRESETS.values():
        options = ", ".join(f"`--{name} {value}`" for name, value in preset.options.items()) or "the defaults"
        rows.append(f"| `{preset.name}` | {preset.label} | {options} | {preset.help} |\n")
    return "| `--preset` | in the panel | options | meaning |\n|---|---|---|---|\n" + "".join(rows)


def _row(action: argparse.Action) -> tuple[str, str]:
    value = "" if action.nargs == 0 else action.metavar or "|".join(map(str, action.choices or [action.dest.upper()]))
    name = f"{action.option_strings[-1]} {value}" if action.option_strings else value
    meaning = f"{action.help[0].upper()}{action.help[1:]}"
    meaning += "" if meaning.endswith(".") else "."
    if action.required and action.option_strings:
        meaning += " Required."
    elif action.nargs != 0 and action.default is not None and "efault" not in meaning:
        meaning += (
            f" Default: {action.default:g}." if isinstance(action.default, float) else f" Default: {action.default}."
        )
    return f"`{name.strip()}`".replace("|", "\\|"), meaning


def _options() -> str:
    from DivRegNetLib.options import table

    lines = ["| option | values | default | meaning |", "|---|---|---|---|"]
    for option in table().values():
        default = option.default_help or ("off" if option.kind is bool else f"`{option.default}`")
        lines.append(f"| `{option.flag}` | {_values(option)} | {default} | {option.help} |")
    return "\n".join(lines) + "\n"


def _values(option) -> str:
    """The values that an option can have."""
    from DivRegNetLib.options import ALIGNMENTS

    if option.kind is bool:
        return "without a value"
    if option.choices:
        return ", ".join(f"`{choice}`" for choice in option.choices)
    if option.name == "align":
        return ", ".join(f"`{choice}`" for choice in ALIGNMENTS) + ", or a file"
    if option.kind not in (int, float):
        return "text"
    number = "whole number" if option.kind is int else "number"
    unit = f" {option.unit}" if option.unit else ""
    if math.isfinite(option.low) and math.isfinite(option.high):
        return f"{number} from {option.low:g} to {option.high:g}{unit}"
    return f"{number} of at least {option.low:g}{unit}" if math.isfinite(option.low) else f"{number}{unit}"


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    DOCUMENT.write_text(updated(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
