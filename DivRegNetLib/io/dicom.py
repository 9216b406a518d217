"""DICOM: a folder with one series of slices, or one multi-frame object. What cannot be placed in space is refused.

ITK places slices without positions 1 mm apart, takes frames in the order of the file, and rounds a series to the voxel type
of its first slice, all without a warning. Here the headers are read by pydicom, and ITK only decodes voxels.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import SimpleITK as sitk

from DivRegNetLib.core.grid import Grid
from DivRegNetLib.errors import InputError, reason_of
from DivRegNetLib.io.itk import file_access
from DivRegNetLib.io.paths import unchanged, utf8_name

if TYPE_CHECKING:
    from pydicom import Dataset

SUFFIXES = (".dcm", ".dicom", ".ima")
CONVERT = "convert it with dcm2niix, and use the NIfTI file of one volume"
RT_DOSE = "1.2.840.10008.5.1.4.1.1.481.2"
MAY_DIFFER = (  # functional group, attribute and words for what tells several volumes in one object apart
    ("MREchoSequence", "EffectiveEchoTime", "echo times"),
    ("MRDiffusionSequence", "DiffusionBValue", "b-values"),
    ("TemporalPositionSequence", "TemporalPositionTimeOffset", "times"),
    ("FrameContentSequence", "TemporalPositionIndex", "times"),
    ("CardiacSynchronizationSequence", "NominalCardiacTriggerDelayTime", "phases of the heart"),
    ("MRImageFrameTypeSequence", "FrameType", "kinds of image"),
    ("CTImageFrameTypeSequence", "FrameType", "kinds of image"),
)


@dataclass(frozen=True)
class Slice:
    """Where a slice or frame lies and how its voxels are stored.

    name: for messages.
    position: (3,) LPS of its first voxel, mm; None where the header has none.
    orientation: (6,) unit vectors along a row and along a column; None likewise.
    spacing: (2,) mm between rows and between columns; None likewise.
    storage: everything that must be equal for voxels of one type: rescale slope and intercept, bits, sign.
    size: rows, columns.
    """

    name: str
    position: np.ndarray | None
    orientation: np.ndarray | None
    spacing: np.ndarray | None
    storage: tuple
    size: tuple[int, int]


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM, by its first bytes or its name."""
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM" or path.name.lower().endswith(SUFFIXES)


def read_series(folder: Path) -> sitk.Image:
    """The volume in a folder that holds one DICOM series.

    Raises:
        InputError: names the folder, what is wrong with the series and what to do.
    """
    reader = sitk.ImageSeriesReader()
    with file_access():
        series = reader.GetGDCMSeriesIDs(utf8_name(folder))
        files = {uid: reader.GetGDCMSeriesFileNames(utf8_name(folder), uid) for uid in series}
    if not series:
        raise InputError(f"{folder}: the folder holds no DICOM series; choose the folder that holds the files of one")
    if len(series) > 1:
        counts = ", ".join(f"{len(names)} files in {uid}" for uid, names in files.items())
        raise InputError(f"{folder}: the folder holds {len(series)} DICOM series ({counts}); keep one")
    paths = [Path(os.fsdecode(name.encode())) for name in files[series[0]]]
    if len(paths) == 1:
        return read_file(paths[0])
    with unchanged(*paths):
        return _read_slices(folder, paths)


def _read_slices(folder: Path, paths: list[Path]) -> sitk.Image:
    """The volume of the files of one series."""
    headers = [_read_header(path) for path in paths]
    if any(int(header.get("NumberOfFrames") or 1) > 1 for header in headers):
        raise InputError(f"{folder}: the series has several multi-frame files; {CONVERT}")
    if any("MOSAIC" in (header.get("ImageType") or ()) for header in headers):
        raise InputError(f"{folder}: each file is a mosaic of the slices of a volume; {CONVERT}")
    slices = [_slice(path.name, header) for path, header in zip(paths, headers, strict=True)]
    order, grid = _arrange(folder, slices, "slice")
    paths, slices = [paths[k] for k in order], [slices[k] for k in order]
    try:
        with file_access():
            if len({s.storage for s in slices}) == 1:
                image = sitk.ReadImage([utf8_name(path) for path in paths])
            else:  # as of a PET: each slice has a rescale slope of its own, or another type
                image = sitk.GetImageFromArray(np.stack([_read_2d(path) for path in paths]))
    except RuntimeError as error:
        raise InputError(f"{folder}: the DICOM series cannot be read ({reason_of(error)})") from error
    if image.GetSize() != grid.size:
        raise InputError(f"{folder}: the slices cannot be stacked to {grid.size} voxels; {CONVERT}")
    return grid.stamp(image)


def read_file(path: Path) -> sitk.Image:
    """The volume in one multi-frame DICOM file.

    Raises:
        InputError: names the file, what is wrong with it and what to do.
    """
    with unchanged(path):
        return _read_frames(path)


def _read_frames(path: Path) -> sitk.Image:
    """The volume of one multi-frame file."""
    header = _read_header(path)
    if int(header.get("NumberOfFrames") or 1) < 2:
        raise InputError(
            f"{path}: is one slice of a DICOM series, not a volume; choose the folder that holds all of its slices"
        )
    frames = list(_frames(path, header))
    order, grid = _arrange(path, frames, "frame", header)
    try:
        with file_access():
            image = sitk.ReadImage(utf8_name(path))
        array = sitk.GetArrayFromImage(image)
        if len({f.storage for f in frames}) > 1:
            array = _rescaled_by_frame(path, frames)
    except (RuntimeError, NotImplementedError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: the DICOM file cannot be read ({reason_of(error)}); {CONVERT}") from error
    if array.shape != (len(frames), *frames[0].size):
        raise InputError(f"{path}: has voxels of shape {array.shape}, which its header does not explain; {CONVERT}")
    return grid.stamp(sitk.GetImageFromArray(array[order]))


def _arrange(path: Path, slices: list[Slice], what: str, header: "Dataset | None" = None) -> tuple[list[int], Grid]:
    """The order of slices or frames along their normal, and the grid that they make.

    A tilted gantry makes the third axis oblique to the slices.

    Raises:
        InputError: they are not placed, not parallel, coincide, or are not evenly apart.
    """
    for attribute, words in (
        ("position", "Image Position (Patient)"),
        ("orientation", "Image Orientation (Patient)"),
        ("spacing", "Pixel Spacing"),
    ):
        if missing := [s.name for s in slices if getattr(s, attribute) is None]:
            raise InputError(
                f"{path}: {words} is missing in {len(missing)} of {len(slices)} {what}s, so that nobody knows where in "
                "space they are; get the original series, or a volume with its geometry (NIfTI, NRRD)"
            )
    if len({s.size for s in slices}) > 1 or np.ptp([s.spacing for s in slices], axis=0).max() > 1e-3:
        raise InputError(f"{path}: the {what}s differ in size or pixel spacing; keep those of one volume")
    orientations = np.array([s.orientation for s in slices])
    if np.abs(orientations - orientations[0]).max() > 1e-3:
        raise InputError(f"{path}: the {what}s are not parallel, as of a localizer; choose the folder of a volume")
    row, column = orientations[0].reshape(2, 3)
    along = np.array([s.position for s in slices]) @ np.cross(row, column)
    order = np.argsort(along, kind="stable").tolist()
    positions = np.array([slices[k].position for k in order])
    steps = np.diff(positions, axis=0)
    coincide = np.flatnonzero(np.abs(np.diff(along[order])) < 1e-3)
    if coincide.size:
        names = " and ".join(slices[order[k]].name for k in (coincide[0], coincide[0] + 1))
        raise InputError(
            f"{path}: {coincide.size + 1 if coincide.size == 1 else f'{coincide.size} pairs of'} {what}s have the same "
            f"position ({names}), {_several_volumes(header)}"
        )
    step = np.median(steps, axis=0)
    length = float(np.linalg.norm(step))
    deviation = np.linalg.norm(steps - step, axis=1)
    if deviation.max() > 0.1 * length:
        worst = int(deviation.argmax())
        raise InputError(
            f"{path}: {what}s are missing or not evenly apart: most are {length:.3g} mm from the next, but {what}s "
            f"{worst + 1} and {worst + 2} are {np.linalg.norm(steps[worst]):.3g} mm apart; complete the series"
        )
    matrix = np.eye(4)
    between_rows, between_columns = slices[0].spacing
    matrix[:3] = np.column_stack([row * between_columns, column * between_rows, step, positions[0]])
    rows, columns = slices[0].size
    return order, Grid((columns, rows, len(slices)), matrix)


def _several_volumes(header: "Dataset | None") -> str:
    """What may be the reason that slices coincide, and what to do."""
    for group, attribute, words in MAY_DIFFER if header is not None else ():
        values = sorted({str(_of_frame(header, k, group, attribute)) for k in range(int(header.NumberOfFrames))})
        if len(values) > 1:
            return f"as it holds several volumes, of the {words} {', '.join(values[:6])}; {CONVERT}"
    return f"as of several volumes or of a slice that was exported twice; keep one, or {CONVERT}"


@contextmanager
def _without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _read_header(path: Path) -> "Dataset":
    import pydicom

    try:
        with _without_warnings():
            return pydicom.dcmread(path, stop_before_pixels=True, force=True)
    except Exception as error:  # of a damaged file, pydicom raises all kinds of errors
        raise InputError(f"{path}: the DICOM header cannot be read ({reason_of(error)})") from error


def _numbers(value: object, count: int) -> np.ndarray | None:
    """That many finite numbers; None where the value is missing or something else."""
    try:
        numbers = np.array([float(v) for v in value])
    except (TypeError, ValueError):
        return None
    return numbers if numbers.shape == (count,) and np.isfinite(numbers).all() else None


def _storage(header: object, transformation: object) -> tuple:
    """What must be equal for voxels of one type; the rescaling first."""
    slope, intercept = (transformation.get(name) for name in ("RescaleSlope", "RescaleIntercept"))
    bits = tuple(header.get(name) for name in ("BitsAllocated", "BitsStored", "PixelRepresentation"))
    return (1.0 if slope in (None, "") else float(slope), 0.0 if intercept in (None, "") else float(intercept), *bits)


def _slice(name: str, header: "Dataset") -> Slice:
    with _without_warnings():
        return Slice(
            name,
            _numbers(header.get("ImagePositionPatient"), 3),
            _numbers(header.get("ImageOrientationPatient"), 6),
            _numbers(header.get("PixelSpacing"), 2),
            _storage(header, header),
            (int(header.get("Rows") or 0), int(header.get("Columns") or 0)),
        )


def _of_frame(header: "Dataset", frame: int, group: str, attribute: str) -> object:
    """An attribute of a frame, from its own functional groups or the shared ones; None where there is none."""
    for sequence, index in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
        groups = header.get(sequence)
        item = groups[index].get(group) if groups and index < len(groups) else None
        if item and (value := item[0].get(attribute)) is not None:
            return value
    return None


def _frames(path: Path, header: "Dataset") -> Iterator[Slice]:
    """The frames of a multi-frame file, in its order."""
    number = int(header.NumberOfFrames)
    size = int(header.get("Rows") or 0), int(header.get("Columns") or 0)
    if header.get("SOPClassUID") == RT_DOSE:
        yield from _dose_frames(path, header, number)
        return
    if not header.get("PerFrameFunctionalGroupsSequence"):
        raise InputError(f"{path}: is a multi-frame file that does not say where each frame lies; {CONVERT}")
    with _without_warnings():
        for k in range(number):
            group = {
                name: _of_frame(header, k, "PixelValueTransformationSequence", name)
                for name in ("RescaleSlope", "RescaleIntercept")
            }
            yield Slice(
                f"{k + 1}",
                _numbers(_of_frame(header, k, "PlanePositionSequence", "ImagePositionPatient"), 3),
                _numbers(_of_frame(header, k, "PlaneOrientationSequence", "ImageOrientationPatient"), 6),
                _numbers(_of_frame(header, k, "PixelMeasuresSequence", "PixelSpacing"), 2),
                _storage(header, group),
                size,
            )


def _dose_frames(path: Path, header: "Dataset", number: int) -> Iterator[Slice]:
    """The frames of a radiotherapy dose: one position, and offsets from it."""
    first = _slice("1", header)
    offsets = _numbers(header.get("GridFrameOffsetVector"), number)
    if first.position is None or first.orientation is None or offsets is None:
        raise InputError(f"{path}: is a dose that does not say where each frame lies; {CONVERT}")
    normal = np.cross(*first.orientation.reshape(2, 3))
    for k, offset in enumerate(offsets - offsets[0]):
        position = first.position + offset * normal
        yield Slice(f"{k + 1}", position, first.orientation, first.spacing, first.storage, first.size)


def _read_2d(path: Path) -> np.ndarray:
    """The voxels [j, i] of a slice, rescaled."""
    array = sitk.GetArrayFromImage(sitk.ReadImage(utf8_name(path), sitk.sitkFloat32))
    return array[0] if array.ndim == 3 else array


def _rescaled_by_frame(path: Path, frames: list[Slice]) -> np.ndarray:
    """Voxels [k, j, i] of frames that have a rescale slope or intercept of their own."""
    import pydicom

    with _without_warnings():
        stored = pydicom.dcmread(path).pixel_array
    slopes, intercepts = (np.array([f.storage[i] for f in frames], np.float32)[:, None, None] for i in (0, 1))
    return stored.astype(np.float32) * slopes + intercepts
