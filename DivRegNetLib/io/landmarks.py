"""Landmark files: Slicer's markups, its older fiducial lists, and CSV tables. Every error names the file."""

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from DivRegNetLib.core.grid import LPS_FROM_RAS
from DivRegNetLib.errors import InputError
from DivRegNetLib.io.atomic import write_json, write_text
from DivRegNetLib.io.paths import check_ending, check_file
from DivRegNetLib.io.tables import LARGEST_TABLE_BYTES, parse_table, read_text

LANDMARK_SUFFIXES = (".json", ".csv", ".fcsv")
WRITTEN_LANDMARKS = (".json", ".csv")
SYSTEMS = {"LPS": False, "1": False, "RAS": True, "0": True}  # coordinate systems; whether it is RAS


@dataclass(frozen=True)
class Landmarks:
    """Labeled points, some of which may be undefined: listed, but without a position.

    points: (n, 3) LPS, mm; NaN where undefined.
    labels: n strings.
    """

    points: np.ndarray
    labels: tuple[str, ...]

    @property
    def defined(self) -> np.ndarray:
        """(n,) bool: which points have a position."""
        return np.isfinite(self.points).all(axis=1)


@dataclass(frozen=True)
class LandmarkPairs:
    """Points that correspond.

    fixed, moving: (n, 3) LPS, mm.
    labels: of the pairs, n strings.
    notes: sentences on what was left out and how pairs were found.
    """

    fixed: np.ndarray
    moving: np.ndarray
    labels: tuple[str, ...]
    notes: tuple[str, ...] = ()


def pair_landmarks(fixed: Landmarks, moving: Landmarks) -> LandmarkPairs:
    """Pairs of defined landmarks: by label where both lists have the same unique labels, else by their order.

    Raises:
        InputError: the lists have different numbers of landmarks, or no pair is defined.
    """
    numbers = [len(m.labels) for m in (fixed, moving)]
    if numbers[0] != numbers[1]:
        raise InputError(
            f"{numbers[0]} fixed landmarks but {numbers[1]} moving ones: they must be pairs, with the same labels or in one "
            "order; a point without a partner can be listed as undefined"
        )
    order, notes = list(range(numbers[0])), []
    if set(fixed.labels) == set(moving.labels) and len(set(fixed.labels)) == numbers[0]:
        order = [moving.labels.index(label) for label in fixed.labels]
        if order != sorted(order):
            notes.append("the landmarks are in different orders and were paired by their labels")
    both = fixed.defined & moving.defined[order]
    if not both.all():
        left_out = [fixed.labels[i] or f"number {i + 1}" for i in np.flatnonzero(~both)]
        notes.append(f"landmarks left out because they are undefined in one list or both: {_listed(left_out)}")
    if not both.any():
        raise InputError("no landmark is defined in both lists")
    labels = tuple(label for label, kept in zip(fixed.labels, both, strict=True) if kept)
    return LandmarkPairs(fixed.points[both], moving.points[order][both], labels, tuple(notes))


def _listed(labels: list[str], most: int = 10) -> str:
    return ", ".join(labels[:most]) + (f" and {len(labels) - most} more" if len(labels) > most else "")


def read_landmarks(path: str | Path) -> Landmarks:
    """Reads Slicer's ``.mrk.json`` or ``.fcsv``, or a table with columns x, y, z (LPS), l, p, s or r, a, s.

    Raises:
        InputError: names the file and what is wrong.
    """
    path = Path(path)
    check_file(path, LARGEST_TABLE_BYTES)
    try:
        text = read_text(path)
        read = {".json": _parse_markups, ".fcsv": _parse_fcsv, ".csv": _parse_csv}.get(path.suffix.lower())
        if read is None:
            raise ValueError(f"landmark files end in {', '.join(LANDMARK_SUFFIXES)}")
        landmarks = read(text)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, csv.Error) as error:
        if isinstance(error, InputError) and str(error).startswith(str(path)):
            raise
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise InputError(f"{path}: cannot be read as landmarks ({reason})") from error
    if not landmarks.defined.any():
        raise InputError(f"{path}: all of its landmarks are undefined")
    return landmarks


UNDEFINED = (np.nan, np.nan, np.nan)


def _landmarks(points: list, labels: list[str], ras: bool) -> Landmarks:
    """Raises ValueError for no point at all, or a defined one that is not finite."""
    if not points:
        raise ValueError("it holds no landmark")
    if bad := [
        label for p, label in zip(points, labels, strict=True) if p is not UNDEFINED and not np.isfinite(p).all()
    ]:
        raise ValueError(f"the landmark {bad[0]!r} has a coordinate that is not finite")
    array = np.array(points, dtype=float).reshape(len(points), 3)
    return Landmarks(array @ LPS_FROM_RAS[:3, :3] if ras else array, tuple(labels))


def _is_ras(system: str) -> bool:
    if system.upper() not in SYSTEMS:
        raise ValueError(f"its coordinate system is {system!r}; save it in RAS or LPS")
    return SYSTEMS[system.upper()]


def _parse_markups(text: str) -> Landmarks:
    points, labels, systems = [], [], set()
    for markup in json.loads(text.lstrip("\ufeff"))["markups"]:
        systems.add(_is_ras(str(markup.get("coordinateSystem", "LPS"))))
        units = markup.get("coordinateUnits", "mm")
        if {*([units] if isinstance(units, str) else units)} != {"mm"}:
            raise ValueError(f"its coordinates are in {units}; save them in mm")
        for point in markup["controlPoints"]:
            defined = point.get("positionStatus", "defined") == "defined"
            points.append(point["position"] if defined else UNDEFINED)
            labels.append(str(point.get("label", len(labels) + 1)))
    if len(systems) > 1:
        raise ValueError("some of its points are in RAS, others in LPS")
    return _landmarks(points, labels, ras=systems == {True})


def _parse_fcsv(text: str) -> Landmarks:
    points, labels, ras = [], [], True
    for line in text.splitlines():
        if line.startswith("#"):
            key, _, value = line[1:].partition("=")
            if key.strip() == "CoordinateSystem":
                ras = _is_ras(value.strip())
        elif line.strip():
            row = next(csv.reader([line]))
            points.append([float(v) for v in row[1:4]])
            labels.append(row[11] if len(row) > 11 and row[11] else str(len(labels) + 1))
    return _landmarks(points, labels, ras)


def _parse_csv(text: str) -> Landmarks:
    table = parse_table(text, "the table")
    names = {name.lower(): name for name in table.columns if name}

    def number(row: dict[str, str], axis: str) -> float:
        cell = row[names[axis]]
        return float(cell if table.delimiter == "," else cell.replace(",", "."))

    for axes in (("x", "y", "z"), ("l", "p", "s"), ("r", "a", "s")):
        if set(axes) <= set(names):
            points, labels = [], []
            for i, (line, row) in enumerate(table.rows):
                defined = row.get(names.get("defined", ""), "") not in ("0", "false", "False")
                if defined and not all(row[names[a]] for a in axes):
                    raise ValueError(f"line {line} has too few columns")
                points.append([number(row, a) for a in axes] if defined else UNDEFINED)
                labels.append(row[names["label"]] if "label" in names else str(i + 1))
            return _landmarks(points, labels, ras=axes[0] == "r")
    raise ValueError("the first line must name the columns x, y, z (LPS), l, p, s or r, a, s")


def write_landmarks(landmarks: Landmarks, path: Path) -> None:
    """Writes ``.mrk.json`` (Slicer markups) or ``.csv`` (label, x, y, z), LPS mm. Undefined points stay listed.

    Raises:
        InputError: the file cannot be written, or has another ending.
    """
    check_ending(path, WRITTEN_LANDMARKS, "landmarks")
    rows = list(zip(landmarks.labels, landmarks.points.tolist(), landmarks.defined.tolist(), strict=True))
    if path.suffix.lower() == ".csv":
        text, mark = io.StringIO(), not landmarks.defined.all()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("label", "x", "y", "z", *(["defined"] if mark else [])))
        for label, point, defined in rows:
            position = [f"{v:.6f}" for v in point] if defined else [""] * 3
            writer.writerow((label, *position, *([int(defined)] if mark else [])))
        write_text(text.getvalue(), path)
        return
    control_points = [
        {"id": str(i + 1), "label": label}
        | ({"position": point, "positionStatus": "defined"} if defined else {"positionStatus": "undefined"})
        for i, (label, point, defined) in enumerate(rows)
    ]
    schema = "https://raw.githubusercontent.com/slicer/slicer/master/Modules/Loadable/Markups/Resources/Schema/"
    markup = {"type": "Fiducial", "coordinateSystem": "LPS", "coordinateUnits": "mm", "controlPoints": control_points}
    write_json({"@schema": schema + "markups-schema-v1.0.3.json#", "markups": [markup]}, path)


def is_landmarks(path: str | Path) -> bool:
    return Path(path).suffix.lower() in LANDMARK_SUFFIXES
