"""DICOM folders: one series, whose slices are parallel and evenly apart."""

from pathlib import Path

import numpy as np
import SimpleITK as sitk

from DivRegNetLib.errors import InputError, reason_of
from DivRegNetLib.io.itk_messages import silenced

POSITION, ORIENTATION = "0020|0032", "0020|0037"  # of a slice


def read_series(folder: Path) -> sitk.Image:
    """The volume in a folder that holds one DICOM series.

    Raises:
        InputError: names the folder and what is wrong with the series.
    """
    reader = sitk.ImageSeriesReader()
    with silenced():
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
        with silenced():
            image = reader.Execute()
    except RuntimeError as error:
        raise InputError(f"{folder}: the DICOM series cannot be read ({reason_of(error)})") from error
    return image if len(names) < 2 or image.GetDimension() != 3 else _placed_by_slices(folder, image, reader)


def _placed_by_slices(folder: Path, image: sitk.Image, reader: sitk.ImageSeriesReader) -> sitk.Image:
    """The volume with its third axis from slice to slice; a tilted gantry makes that axis oblique to the slices.

    Raises:
        InputError: the slices are not parallel, coincide, or are not evenly apart.
    """
    slices = range(image.GetDepth())
    if not all(reader.HasMetaDataKey(k, tag) for k in slices for tag in (POSITION, ORIENTATION)):
        return image
    orientations, positions = (
        np.array([[float(v) for v in reader.GetMetaData(k, tag).split("\\")] for k in slices])
        for tag in (ORIENTATION, POSITION)
    )
    if np.abs(orientations - orientations[0]).max() > 1e-3:
        raise InputError(f"{folder}: the slices are not parallel, as of a localizer; choose the folder of a volume")
    steps = np.diff(positions, axis=0)
    step = np.median(steps, axis=0)
    length = float(np.linalg.norm(step))
    if length < 1e-3:
        raise InputError(f"{folder}: several slices have the same position, as of several volumes; keep one volume")
    deviation = np.linalg.norm(steps - step, axis=1)
    if deviation.max() > 0.1 * length:
        raise InputError(
            f"{folder}: slices are missing or not evenly apart: most are {length:.3g} mm from the next, but slice "
            f"{int(deviation.argmax()) + 1} is {np.linalg.norm(steps[deviation.argmax()]):.3g} mm; complete the series"
        )
    direction = np.reshape(image.GetDirection(), (3, 3)).copy()
    direction[:, 2] = step / length
    image.SetDirection(direction.ravel().tolist())
    image.SetSpacing((*image.GetSpacing()[:2], length))
    image.SetOrigin(positions[0].tolist())
    return image
