"""Landmark files: Slicer's markups, its older fiducial lists, and CSV tables. Every error names the file."""

import csv
import io
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from DivRegNetLib.core.grid import LPS_FROM_RAS
from DivRegNetLib.core.points import map_points
from DivRegNetLib.errors import InputError
from DivRegNetLib.io.atomic import write_json, write_text
from DivRegNetLib.io.paths import check_ending, check_file

LANDMARK_SUFFIXES = (".json", ".csv", ".fcsv")
WRITTEN_LANDMARKS = (".json", ".csv")
LARGEST_LANDMARKS_BYTES = 100_000_000


@dataclass(frozen=True)
class Landmarks:
    """Labeled points.

    points: (n, 3) LPS, mm.
    labels: n strings.
    """

    points: np.ndarray
    labels: tuple[str, ...]


def read_landmarks(path: str | Path) -> Landmarks:
    """Reads Slicer's ``.mrk.json`` or ``.fcsv``, or CSV with a header of x, y, z (LPS), l, p, s or r, a, s.

    Raises:
        InputError: names the file and what is wrong.
    """
    path = Path(path)
    check_file(path, LARGEST_LANDMARKS_BYTES)
    try:
        text = path.read_text(encoding="utf-8-sig")
        read = {".json": _parse_markups, ".fcsv": _parse_fcsv, ".csv": _parse_csv}.get(path.suffix.lower())
        if read is None:
            raise ValueError(f"landmark files end in {', '.join(LANDMARK_SUFFIXES)}")
        landmarks = read(text)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, csv.Error) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise InputError(f"{path}: cannot be read as landmarks ({reason})") from error
    if not np.isfinite(landmarks.points).all():
        raise InputError(f"{path}: a landmark has a coordinate that is not finite")
    return landmarks


def _landmarks(points: list, labels: list[str], ras: bool) -> Landmarks:
    if not points:
        raise ValueError("it holds no landmark")
    array = np.array(points, dtype=float).reshape(len(points), 3)
    return Landmarks(array @ LPS_FROM_RAS[:3, :3] if ras else array, tuple(labels))


def _parse_markups(text: str) -> Landmarks:
    points, labels, systems = [], [], set()
    for markup in json.loads(text)["markups"]:
        systems.add(str(markup.get("coordinateSystem", "LPS")).upper())
        for point in markup["controlPoints"]:
            if point.get("positionStatus", "defined") == "defined":
                points.append(point["position"])
                labels.append(str(point.get("label", len(labels) + 1)))
    if len(systems) > 1 or not systems <= {"LPS", "RAS", "0", "1"}:
        raise ValueError(f"coordinate systems {sorted(systems)}, one of LPS and RAS is expected")
    return _landmarks(points, labels, ras=bool(systems & {"RAS", "0"}))


def _parse_fcsv(text: str) -> Landmarks:
    points, labels, ras = [], [], True
    for line in text.splitlines():
        if line.startswith("#"):
            key, _, value = line[1:].partition("=")
            if key.strip() == "CoordinateSystem":
                ras = value.strip().upper() in ("RAS", "0")
        elif line.strip():
            row = next(csv.reader([line]))
            points.append([float(v) for v in row[1:4]])
            labels.append(row[11] if len(row) > 11 and row[11] else str(len(labels) + 1))
    return _landmarks(points, labels, ras)


def _parse_csv(text: str) -> Landmarks:
    rows = list(csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True))
    names = {name.strip().lower(): name for name in (rows[0] if rows else {}) if name}
    for axes in (("x", "y", "z"), ("l", "p", "s"), ("r", "a", "s")):
        if set(axes) <= set(names):
            short = [i for i, row in enumerate(rows, start=2) if any(row[names[a]] is None for a in axes)]
            if short:
                raise ValueError(f"line {short[0]} has too few columns")
            points = [[float(row[names[a]]) for a in axes] for row in rows]
            labels = [str(row[names["label"]]) if "label" in names else str(i + 1) for i, row in enumerate(rows)]
            return _landmarks(points, labels, ras=axes[0] == "r")
    raise ValueError("the first line must name the columns x, y, z (LPS), l, p, s or r, a, s")


def write_landmarks(landmarks: Landmarks, path: Path) -> None:
    """Writes ``.mrk.json`` (Slicer markups) or ``.csv`` (label, x, y, z), LPS mm.

    Raises:
        InputError: the file cannot be written, or has another ending.
    """
    check_ending(path, WRITTEN_LANDMARKS, "landmarks")
    if path.suffix.lower() == ".csv":
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("label", "x", "y", "z"))
        for label, point in zip(landmarks.labels, landmarks.points, strict=True):
            writer.writerow((label, *(f"{v:.6f}" for v in point)))
        write_text(text.getvalue(), path)
        return
    control_points = [
        {"id": str(i + 1), "label": label, "position": [float(v) for v in p], "positionStatus": "defined"}
        for i, (label, p) in enumerate(zip(landmarks.labels, landmarks.points, strict=True))
    ]
    schema = "https://raw.githubusercontent.com/slicer/slicer/master/Modules/Loadable/Markups/Resources/Schema/"
    markup = {"type": "Fiducial", "coordinateSystem": "LPS", "coordinateUnits": "mm", "controlPoints": control_points}
    write_json({"@schema": schema + "markups-schema-v1.0.3.json#", "markups": [markup]}, path)


def map_landmarks(landmarks: Landmarks, transform: sitk.Transform) -> Landmarks:
    """Landmarks through a transform (LPS, mm)."""
    return replace(landmarks, points=map_points(transform, landmarks.points))


def is_landmarks(path: str | Path) -> bool:
    return Path(path).suffix.lower() in LANDMARK_SUFFIXES
