"""Reading and writing what users have: volumes, DICOM folders, label maps, landmarks, transforms.

Every error names the file. Every file appears whole or not at all: it is written under another name beside its place and
then moved there.
"""

import contextlib
import csv
import errno
import io
import json
import math
import os
import re
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import numpy as np
import SimpleITK as sitk

from DivRegNetLib import dicom, nifti
from DivRegNetLib.claim import PART
from DivRegNetLib.errors import InputError
from DivRegNetLib.geometry import LPS_FROM_RAS

LANDMARK_SUFFIXES = (".json", ".csv", ".fcsv")
WRITTEN_LANDMARKS = (".json", ".csv")
VOLUME_SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd")
WRITTEN_VOLUMES = (".nii", ".nii.gz", ".nrrd", ".mha")  # in one file, of 3D volumes with their place in space
LARGEST_LANDMARKS_BYTES = 100_000_000
ABANDONED_S = 24 * 3600.0  # after which such a folder is nobody's, where the system cannot tell


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
    _check_name(path)
    if os.path.isdir(path):
        return _read_dicom(path)
    check_file(path)
    try:
        with _quiet():
            header = nifti.check_whole(path)
            image = sitk.ReadImage(str(path))
    except (RuntimeError, TypeError, UnicodeError) as error:
        raise InputError(
            f"{path}: cannot be read as an image ({_reason(error)}); is it whole, and of the format its name says?"
        ) from error
    while image.GetDimension() > 3 and image.GetSize()[-1] == 1:
        image = image[..., 0]
    nifti.check_place(path, image, header)
    return image


def check_file(path: Path, largest: float = math.inf) -> None:
    """Raises InputError unless the path is a regular file, or a link to one, that holds something and may be read.

    Args:
        largest: number of bytes it may have.
    """
    _check_name(path)
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            raise InputError(f"{path}: not a regular file")
        path.open("rb").close()
    except (OSError, ValueError) as error:
        missing = isinstance(error, OSError) and error.errno in (errno.ENOENT, errno.ENOTDIR)
        if isinstance(error, InputError):
            raise
        if missing and not path.is_symlink():
            raise InputError(f"{path}: there is no such file") from error
        if missing:
            raise InputError(f"{path}: is a link to {os.readlink(path)}, which is not there") from error
        raise InputError(f"{path}: cannot be opened ({getattr(error, 'strerror', None) or error})") from error
    if about.st_size == 0:
        raise InputError(f"{path}: the file is empty")
    if about.st_size > largest:
        raise InputError(f"{path}: has {about.st_size} bytes, more than {largest:g}; is it the file that is meant?")


def _read_dicom(folder: Path) -> sitk.Image:
    reader = sitk.ImageSeriesReader()
    with _quiet():
        series = reader.GetGDCMSeriesIDs(str(folder))
    if not series:
        raise InputError(f"{folder}: the folder holds no DICOM series")
    if len(series) > 1:
        counts = ", ".join(f"{len(reader.GetGDCMSeriesFileNames(str(folder), s))} files in {s}" for s in series)
        raise InputError(f"{folder}: the folder holds {len(series)} DICOM series ({counts}); keep one")
    names = reader.GetGDCMSeriesFileNames(str(folder), series[0])
    reader.SetFileNames(names)
    reader.MetaDataDictionaryArrayUpdateOn()
    try:
        with _quiet():
            image = reader.Execute()
    except RuntimeError as error:
        raise InputError(f"{folder}: the DICOM series cannot be read ({_reason(error)})") from error
    return image if len(names) < 2 or image.GetDimension() != 3 else dicom.placed_by_slices(folder, image, reader)


def check_right_angles(image: sitk.Image, name: str) -> None:
    """Raises InputError where the axes of an image lean, so that no NIfTI file can say where it is."""
    direction = np.reshape(image.GetDirection(), (3, 3))
    if np.abs(direction.T @ direction - np.eye(3)).max() > 1e-4:
        raise InputError(
            f"{name}: the axes are not at right angles, as of a CT with tilted gantry, and results on this grid could "
            "not be saved as NIfTI; resample it to right angles, or take it as the moving image"
        )


def _check_name(path: Path) -> None:
    """Raises InputError for a name that is no text: ITK ends the whole process over one."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{os.fspath(path)!a}: the name is not valid UTF-8; rename the file or its folder") from error


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
        large = values.size and np.abs(values).max() > np.iinfo(np.int32).max
        image = sitk.Cast(image, sitk.sitkInt64 if large else sitk.sitkInt32)
    return image


def read_landmarks(path: str | Path) -> Landmarks:
    """Landmarks from Slicer's ``.mrk.json`` or ``.fcsv``, or from CSV with a header of x, y, z (LPS), l, p, s or r, a, s.

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
    _check_ending(path, WRITTEN_LANDMARKS, "landmarks")
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
    """Every point through a transform (LPS, mm)."""
    points = [transform.TransformPoint(p) for p in landmarks.points.tolist()]
    return replace(landmarks, points=np.array(points))


def write_image(image: sitk.Image, path: Path) -> None:
    """Writes a volume, compressed.

    Raises:
        InputError: the file cannot be written, or its format cannot hold the volume and where it is.
    """
    _check_ending(path, WRITTEN_VOLUMES, "volumes")
    if path.name.lower().endswith(nifti.SUFFIXES):
        check_right_angles(image, str(path))

    def write(part: Path) -> None:
        sitk.WriteImage(image, str(part), useCompression=True)
        nifti.check_whole(part)  # of NIfTI, ITK does not notice where the disk was full

    write_whole(path, write)


def read_transform(path: str | Path) -> sitk.Transform:
    """An ITK transform file (.h5, .tfm, .txt, .mat), or a displacement field saved as a volume of 3-vectors (LPS, mm).

    Raises:
        InputError: names the file.
    """
    path = Path(path)
    check_file(path)
    is_volume = path.name.lower().endswith(VOLUME_SUFFIXES)
    try:
        with _quiet():
            if is_volume:
                nifti.check_whole(path)
                field = sitk.ReadImage(str(path), sitk.sitkVectorFloat64)
                transform = sitk.DisplacementFieldTransform(field)
            else:
                transform = sitk.ReadTransform(str(path))
    except (RuntimeError, TypeError, UnicodeError) as error:
        raise InputError(
            f"{path}: cannot be read as a transform ({_reason(error)}); is it whole, and a transform file of ITK?"
        ) from error
    if transform.GetDimension() != 3:
        raise InputError(f"{path}: the transform has {transform.GetDimension()} dimensions, 3 are needed")
    return transform


def write_transform(transform: sitk.Transform, path: Path) -> None:
    """Writes a transform as HDF5; of text files, ITK does not notice where the disk is full.

    Raises:
        InputError: the file cannot be written, or does not end in ``.h5``.
    """
    _check_ending(path, (".h5",), "transforms")

    def write(part: Path) -> None:
        if hasattr(os, "posix_fallocate"):  # where the disk is full, HDF5 says so, but crashes when the process ends
            with part.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, 8 * transform.GetNumberOfParameters() + 1)
            part.unlink()
        sitk.WriteTransform(transform, str(part))

    write_whole(path, write)


def _check_ending(path: Path, endings: tuple[str, ...], what: str) -> None:
    if not path.name.lower().endswith(endings):
        raise InputError(f"{path}: {what} are written to files that end in {', '.join(endings)}; choose one of these")


def write_text(text: str, path: Path) -> None:
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_json(value: object, path: Path) -> None:
    """Writes JSON for people and machines; NaN is refused."""
    write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", path)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Lets ``write`` write a file beside ``path`` and moves it there; leaves nothing behind on failure.

    What a process that was killed has left there goes with the next writing.

    Raises:
        InputError: names the file and why it cannot be written.
    """
    _check_name(path)
    suffix = next((s for s in VOLUME_SUFFIXES if path.name.lower().endswith(s)), path.suffix)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _waiting_room(path.parent) as folder:
            part = folder / f"part{suffix}"
            with _quiet():
                try:
                    write(part)
                except InputError as error:
                    raise InputError(f"{path}: cannot be written whole; is the disk full?") from error
            os.replace(part, path)
    except (OSError, RuntimeError, UnicodeError) as error:
        raise InputError(f"{path}: cannot be written ({_reason(error)})") from error


@contextlib.contextmanager
def _waiting_room(folder: Path) -> Iterator[Path]:
    """A folder in a folder, gone afterwards; those of processes that are gone are removed.

    Each is locked by its process, and the system lets go of the lock however that ends. Making and removing are done one
    process at a time, so that none is seen before it is locked.
    """
    with contextlib.ExitStack() as stack:
        with _locked(folder):
            for left in folder.glob(f"{PART}*"):
                if _is_abandoned(left):
                    shutil.rmtree(left, ignore_errors=True)
            own = tempfile.TemporaryDirectory(prefix=PART, dir=folder, ignore_cleanup_errors=True)
            stack.enter_context(own)
            stack.enter_context(_locked(own.name))
        yield Path(own.name)


@contextlib.contextmanager
def _locked(folder: str | Path) -> Iterator[None]:
    """Holds a folder, once no other process does; does nothing where the system has no such locks."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _is_abandoned(folder: Path) -> bool:
    """Whether a folder is no link and no process holds it."""
    try:
        if folder.is_symlink() or not folder.is_dir():
            return False
        if fcntl is None:
            return time.time() - folder.stat().st_mtime > ABANDONED_S
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(handle)
    except OSError:
        return False
    return True


def _reason(error: Exception) -> str:
    """What the system says, or the last telling line of an ITK error, without its source locations."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if any("orthonormal" in line for line in lines):
        return "its axes are not at right angles, which this format cannot say; resample it, or save it as NRRD"
    noise = ("Exception thrown", "sitk::ERROR: itk::", "Reason: No such file")
    telling = [line for line in lines if not line.startswith(noise)] or lines or [type(error).__name__]
    return re.sub(r"^(sitk::ERROR:|ITK ERROR:|\w+\(0x\w+\):|\s)*", "", telling[-1])[:200]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """ITK's own warnings off, and what the libraries below it (HDF5, NIfTI, MetaIO) print: errors say what matters."""
    with _hush:
        shown = sitk.ProcessObject.GetGlobalWarningDisplay()
        sitk.ProcessObject.SetGlobalWarningDisplay(False)
        try:
            yield
        finally:
            sitk.ProcessObject.SetGlobalWarningDisplay(shown)


class _Hush:
    """Standard error of the whole process to nowhere, until the last of those who entered, in any thread, has left."""

    def __init__(self) -> None:
        self._lock, self._entered, self._kept = threading.Lock(), 0, None

    def __enter__(self) -> None:
        with self._lock:
            self._entered += 1
            if self._entered == 1:
                with contextlib.suppress(OSError):  # there may be none, as in a program with windows only
                    kept = os.dup(2)
                    nowhere = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(nowhere, 2)
                    os.close(nowhere)
                    self._kept = kept

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._entered -= 1
            if self._entered == 0 and self._kept is not None:
                os.dup2(self._kept, 2)
                os.close(self._kept)
                self._kept = None


_hush = _Hush()


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
