"""Reading and writing what users have: volumes, DICOM folders, label maps, landmarks, transforms.

Every error names the file. Every file appears whole or not at all: it is written under another name beside its place and
then moved there.
"""

import contextlib
import csv
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from DivRegNetLib.errors import InputError
from DivRegNetLib.geometry import LPS_FROM_RAS

LANDMARK_SUFFIXES = (".json", ".csv", ".fcsv")
VOLUME_SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd")


@dataclass(frozen=True)
class Landmarks:
    """Points with names.

    points: (n, 3) LPS, mm.
    labels: n names.
    """

    points: np.ndarray
    labels: tuple[str, ...]


def read_image(path: str | Path) -> sitk.Image:
    """A volume: any file that SimpleITK reads, or a folder that holds one DICOM series.

    Raises:
        InputError: names the file and what is wrong with it.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: there is no such file")
    if path.is_dir():
        return _read_dicom(path)
    if not path.is_file():
        raise InputError(f"{path}: not a regular file")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty")
    try:
        with _quiet():
            image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise InputError(f"{path}: cannot be read as an image ({_reason(error)})") from error
    if image.GetDimension() == 4 and image.GetSize()[3] == 1:
        image = image[..., 0]
    return image


def _read_dicom(folder: Path) -> sitk.Image:
    reader = sitk.ImageSeriesReader()
    with _quiet():
        series = reader.GetGDCMSeriesIDs(str(folder))
    if not series:
        raise InputError(f"{folder}: the folder holds no DICOM series")
    if len(series) > 1:
        counts = ", ".join(f"{len(reader.GetGDCMSeriesFileNames(str(folder), s))} files in {s}" for s in series)
        raise InputError(f"{folder}: the folder holds {len(series)} DICOM series ({counts}); keep one")
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder), series[0]))
    try:
        with _quiet():
            return reader.Execute()
    except RuntimeError as error:
        raise InputError(f"{folder}: the DICOM series cannot be read ({_reason(error)})") from error


def read_labels(path: str | Path) -> sitk.Image:
    """A label map: a volume of whole numbers (floats that hold whole numbers are converted).

    Raises:
        InputError: names the file, and the first value that is not a whole number.
    """
    image = read_image(path)
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise InputError(f"{path}: a label map is a 3D volume with one component per voxel")
    if "float" in image.GetPixelIDTypeAsString():
        values = sitk.GetArrayViewFromImage(image)
        odd = values[~(np.isfinite(values) & (values == np.round(values)))]
        if odd.size:
            raise InputError(f"{path}: a label map holds whole numbers, but here is {odd[0]:g}")
        image = sitk.Cast(image, sitk.sitkInt32)
    return image


def read_landmarks(path: str | Path) -> Landmarks:
    """Landmarks from Slicer's ``.mrk.json`` or ``.fcsv``, or from CSV with a header of x, y, z (LPS), l, p, s or r, a, s.

    Raises:
        InputError: names the file and what is wrong.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        read = {".json": _parse_markups, ".fcsv": _parse_fcsv, ".csv": _parse_csv}.get(path.suffix.lower())
        if read is None:
            raise ValueError(f"landmark files end in {', '.join(LANDMARK_SUFFIXES)}")
        landmarks = read(text)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
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
    rows = list(csv.DictReader(text.splitlines(), skipinitialspace=True))
    names = {name.strip().lower(): name for name in (rows[0] if rows else {}) if name}
    for axes in (("x", "y", "z"), ("l", "p", "s"), ("r", "a", "s")):
        if set(axes) <= set(names):
            points = [[float(row[names[a]]) for a in axes] for row in rows]
            labels = [str(row[names["label"]]) if "label" in names else str(i + 1) for i, row in enumerate(rows)]
            return _landmarks(points, labels, ras=axes[0] == "r")
    raise ValueError("the first line must name the columns x, y, z (LPS), l, p, s or r, a, s")


def write_landmarks(landmarks: Landmarks, path: Path) -> None:
    """Writes ``.mrk.json`` (Slicer markups) or ``.csv`` (label, x, y, z), LPS mm."""
    if path.suffix.lower() == ".csv":
        lines = ["label,x,y,z"] + [
            f"{json.dumps(label)},{p[0]:.6f},{p[1]:.6f},{p[2]:.6f}"
            for label, p in zip(landmarks.labels, landmarks.points, strict=True)
        ]
        write_text("\n".join(lines) + "\n", path)
        return
    control_points = [
        {"id": str(i + 1), "label": label, "position": [float(v) for v in p], "positionStatus": "defined"}
        for i, (label, p) in enumerate(zip(landmarks.labels, landmarks.points, strict=True))
    ]
    schema = "https://raw.githubusercontent.com/slicer/slicer/master/Modules/Loadable/Markups/Resources/Schema/"
    markup = {"type": "Fiducial", "coordinateSystem": "LPS", "coordinateUnits": "mm", "controlPoints": control_points}
    write_json({"@schema": schema + "markups-schema-v1.0.3.json#", "markups": [markup]}, path)


def map_landmarks(landmarks: Landmarks, transform: sitk.Transform) -> Landmarks:
    """Every point through a transform (LPS, mm)."""
    points = [transform.TransformPoint(p) for p in landmarks.points.tolist()]
    return replace(landmarks, points=np.array(points))


def write_image(image: sitk.Image, path: Path) -> None:
    """Writes a volume, compressed."""
    write_whole(path, lambda part: sitk.WriteImage(image, str(part), useCompression=True))


def read_transform(path: str | Path) -> sitk.Transform:
    """An ITK transform file (.h5, .tfm, .txt, .mat), or a displacement field saved as a volume of 3-vectors (LPS, mm).

    Raises:
        InputError: names the file.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: there is no such file")
    try:
        with _quiet():
            if path.name.endswith(VOLUME_SUFFIXES):
                field = sitk.ReadImage(str(path), sitk.sitkVectorFloat64)
                transform = sitk.DisplacementFieldTransform(field)
            else:
                transform = sitk.ReadTransform(str(path))
    except RuntimeError as error:
        raise InputError(f"{path}: cannot be read as a transform ({_reason(error)})") from error
    if transform.GetDimension() != 3:
        raise InputError(f"{path}: the transform has {transform.GetDimension()} dimensions, 3 are needed")
    return transform


def write_transform(transform: sitk.Transform, path: Path) -> None:
    """Writes a transform in the format of the file's ending (.h5 for displacement fields)."""
    write_whole(path, lambda part: sitk.WriteTransform(transform, str(part)))


def write_text(text: str, path: Path) -> None:
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_json(value: object, path: Path) -> None:
    """Writes JSON for people and machines; NaN is refused."""
    write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", path)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Lets ``write`` write a file beside ``path`` and moves it there; leaves nothing behind on failure.

    Raises:
        InputError: names the file and why it cannot be written.
    """
    suffix = next((s for s in VOLUME_SUFFIXES if path.name.endswith(s)), path.suffix)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".divregnet-", dir=path.parent) as folder:
            part = Path(folder) / f"part{suffix}"
            with _quiet():
                write(part)
            os.replace(part, path)
    except (OSError, RuntimeError) as error:
        raise InputError(f"{path}: cannot be written ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    """The last telling line of an ITK error, without its source locations."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(("Exception thrown", "sitk::ERROR: itk::"))] or lines
    return telling[-1].removeprefix("sitk::ERROR:").strip()[:200] if telling else type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """ITK's own warnings off: what matters is said in an error."""
    shown = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(shown)


def invert_points(transform: sitk.Transform, points: np.ndarray, iterations: int = 30) -> np.ndarray:
    """Where a transform must start to arrive at the points: ``T(found) = points``, (n, 3) LPS mm, by Newton's method."""
    found = []
    for target in np.asarray(points, float):
        x = target.copy()
        for _ in range(iterations):
            here = np.array(transform.TransformPoint(x.tolist()))
            if np.linalg.norm(here - target) < 1e-4:
                break
            step = 0.5
            jacobian = [np.array(transform.TransformPoint((x + step * e).tolist())) - here for e in np.eye(3)]
            x -= np.linalg.lstsq(np.stack(jacobian, 1) / step, here - target, rcond=None)[0]
        found.append(x)
    return np.array(found).reshape(-1, 3)


def is_landmarks(path: str | Path) -> bool:
    return Path(path).suffix.lower() in LANDMARK_SUFFIXES
