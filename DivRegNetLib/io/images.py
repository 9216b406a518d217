"""Volumes and label maps: any file that SimpleITK reads, and DICOM folders. Every error names the file."""

import os
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from DivRegNetLib.errors import InputError
from DivRegNetLib.io import dicom, nifti
from DivRegNetLib.io.atomic import check_ending, check_file, check_name, write_whole
from DivRegNetLib.io.quiet import quiet, reason_of

WRITTEN_VOLUMES = (".nii", ".nii.gz", ".nrrd", ".mha")  # in one file, of 3D volumes with their place in space


def read_image(path: str | Path) -> sitk.Image:
    """A volume: any file that SimpleITK reads, or a folder that holds one DICOM series.

    Raises:
        InputError: names the file and what is wrong with it.
    """
    path = Path(path)
    check_name(path)
    if os.path.isdir(path):
        return _read_dicom(path)
    check_file(path)
    try:
        with quiet():
            header = nifti.check_whole(path)
            image = sitk.ReadImage(str(path))
    except (RuntimeError, TypeError, UnicodeError) as error:
        raise InputError(
            f"{path}: cannot be read as an image ({reason_of(error)}); is it whole, and of the format its name says?"
        ) from error
    while image.GetDimension() > 3 and image.GetSize()[-1] == 1:
        image = image[..., 0]
    nifti.check_place(path, image, header)
    return image


def _read_dicom(folder: Path) -> sitk.Image:
    reader = sitk.ImageSeriesReader()
    with quiet():
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
        with quiet():
            image = reader.Execute()
    except RuntimeError as error:
        raise InputError(f"{folder}: the DICOM series cannot be read ({reason_of(error)})") from error
    return image if len(names) < 2 or image.GetDimension() != 3 else dicom.placed_by_slices(folder, image, reader)


def check_right_angles(image: sitk.Image, name: str) -> None:
    """Raises InputError where the axes of an image lean, so that no NIfTI file can say where it is."""
    direction = np.reshape(image.GetDirection(), (3, 3))
    if np.abs(direction.T @ direction - np.eye(3)).max() > 1e-4:
        raise InputError(
            f"{name}: the axes are not at right angles, as of a CT with tilted gantry, and results on this grid could "
            "not be saved as NIfTI; resample it to right angles, or take it as the moving image"
        )


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


def write_image(image: sitk.Image, path: Path) -> None:
    """Writes a volume, compressed.

    Raises:
        InputError: the file cannot be written, or its format cannot hold the volume and where it is.
    """
    check_ending(path, WRITTEN_VOLUMES, "volumes")
    if path.name.lower().endswith(nifti.SUFFIXES):
        check_right_angles(image, str(path))

    def write(part: Path) -> None:
        sitk.WriteImage(image, str(part), useCompression=True)
        nifti.check_whole(part)  # of NIfTI, ITK does not notice where the disk was full

    write_whole(path, write)
