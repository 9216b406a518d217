"""Landmark files: Slicer's markups, its older fiducial lists, and CSV tables. Every error names the file."""

import csv
import io
import json
from collections.abc import Sequence
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
    numbered: the file has no labels; they are the numbers of the points.
    """

    points: np.ndarray
    labels: tuple[str, ...]
    numbered: bool = False

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
    """Pairs of landmarks that are defined in both lists, see :func:`match_labels`.

    Raises:
        InputError: the lists have different numbers of landmarks and no labels in common, or no pair is defined.
    """
    unnamed = fixed.numbered or moving.numbered
    labels = [("",) * len(m.labels) if unnamed else m.labels for m in (fixed, moving)]
    matches = match_labels(*labels)
    if matches is None:
        raise InputError(
            f"{len(fixed.labels)} fixed landmarks but {len(moving.labels)} moving ones: they must be pairs, with the same "
            "labels or in one order; a point without a partner can be listed as undefined"
        )
    notes = []
    if [j for _, j in matches] != sorted(j for _, j in matches):
        notes.append("the landmarks are in different orders and were paired by their labels")
    for name, landmarks, matched in zip(("fixed", "moving"), (fixed, moving), zip(*matches, strict=True), strict=True):
        if alone := [_name(landmarks, i) for i in range(len(landmarks.labels)) if i not in matched]:
            notes.append(f"{name} landmarks left out because no other has their label: {_listed(alone)}")
    both = [(i, j) for i, j in matches if fixed.defined[i] and moving.defined[j]]
    if left_out := [_name(fixed, i) for i, j in matches if (i, j) not in both]:
        notes.append(f"landmarks left out because they are undefined in one list or both: {_listed(left_out)}")
    if not both:
        raise InputError("no landmark is defined in both lists")
    chosen = [list(side) for side in zip(*both, strict=True)]
    names = tuple(fixed.labels[i] for i in chosen[0])
    return LandmarkPairs(fixed.points[chosen[0]], moving.points[chosen[1]], names, tuple(notes))


def match_labels(fixed: Sequence[str], moving: Sequence[str]) -> list[tuple[int, int]] | None:
    """Numbers (in the first, in the second list) of the landmarks that belong together.

    Where no label occurs twice in a list, and some occur in both lists, landmarks with the same label belong together, and
    the others to none. Otherwise the order counts, and the lists must have the same length; None if they do not. Case and
    surrounding blanks are ignored.
    """
    lists = [[label.strip().casefold() for label in labels] for labels in (fixed, moving)]
    unique = all(len(set(labels)) == len(labels) and all(labels) for labels in lists)
    if unique and set(lists[0]) & set(lists[1]):
        return [(i, lists[1].index(label)) for i, label in enumerate(lists[0]) if label in lists[1]]
    return [(i, i) for i in range(len(fixed))] if len(fixed) == len(moving) else None


def _name(landmarks: Landmarks, number: int) -> str:
    return landmarks.labels[number] or f"number {number + 1}"


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
    """Points with their labels; numbers where none has a label.

    Raises:
        ValueError: there is no point at all, or a defined one is not finite.
    """
    if not points:
        raise ValueError("it holds no landmark")
    if bad := [
        label for p, label in zip(points, labels, strict=True) if p is not UNDEFINED and not np.isfinite(p).all()
    ]:
        raise ValueError(f"the landmark {bad[0]!r} has a coordinate that is not finite")
    array = np.array(points, dtype=float).reshape(len(points), 3)
    numbered = not any(labels)
    names = map(str, range(1, len(points) + 1)) if numbered else labels
    return Landmarks(array @ LPS_FROM_RAS[:3, :3] if ras else array, tuple(names), numbered)


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
            labels.append(str(point.get("label", "")))
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
            labels.append(row[11] if len(row) > 11 else "")
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
            for line, row in table.rows:
                defined = row.get(names.get("defined", ""), "") not in ("0", "false", "False")
                if defined and not all(row[names[a]] for a in axes):
                    raise ValueError(f"line {line} has too few columns")
                points.append([number(row, a) for a in axes] if defined else UNDEFINED)
                labels.append(row[names["label"]] if "label" in names else "")
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
