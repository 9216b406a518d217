"""Where the slices of a DICOM series lie: evenly apart and parallel, or it is no volume."""

from pathlib import Path

import numpy as np
import SimpleITK as sitk

from DivRegNetLib.errors import InputError

POSITION, ORIENTATION = "0020|0032", "0020|0037"  # of a slice


def placed_by_slices(folder: Path, image: sitk.Image, reader: sitk.ImageSeriesReader) -> sitk.Image:
    """A volume of slices with the third axis from slice to slice, which a tilted gantry leans to the side.

    Raises:
        InputError: the slices are not parallel, lie upon one another, or are not evenly apart.
    """
    slices = range(image.GetDepth())
    if not all(reader.HasMetaDataKey(k, tag) for k in slices for tag in (POSITION, ORIENTATION)):
        return image
    turns, places = (
        np.array([[float(v) for v in reader.GetMetaData(k, tag).split("\\")] for k in slices])
        for tag in (ORIENTATION, POSITION)
    )
    if np.abs(turns - turns[0]).max() > 1e-3:
        raise InputError(f"{folder}: the slices are not parallel, as of a localizer; choose the folder of a volume")
    steps = np.diff(places, axis=0)
    step = np.median(steps, axis=0)
    length = float(np.linalg.norm(step))
    if length < 1e-3:
        raise InputError(f"{folder}: several slices lie in one place, as of several volumes; keep one volume")
    uneven = np.linalg.norm(steps - step, axis=1)
    if uneven.max() > 0.1 * length:
        raise InputError(
            f"{folder}: slices are missing or not evenly apart: most are {length:.3g} mm from the next, but slice "
            f"{int(uneven.argmax()) + 1} is {np.linalg.norm(steps[uneven.argmax()]):.3g} mm; complete the series"
        )
    direction = np.reshape(image.GetDirection(), (3, 3)).copy()
    direction[:, 2] = step / length
    image.SetDirection(direction.ravel().tolist())
    image.SetSpacing((*image.GetSpacing()[:2], length))
    image.SetOrigin(places[0].tolist())
    return image
