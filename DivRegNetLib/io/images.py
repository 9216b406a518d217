"""Volumes and label maps: any file that SimpleITK reads, and DICOM folders. Every error names the file."""

import os
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from DivRegNetLib.errors import InputError, reason_of
from DivRegNetLib.io import dicom, nifti
from DivRegNetLib.io.atomic import write_atomically
from DivRegNetLib.io.damage import reason_why_incomplete
from DivRegNetLib.io.itk import file_access
from DivRegNetLib.io.paths import check_ending, check_file, unchanged, utf8_name
from DivRegNetLib.io.volume_files import files_of

WRITTEN_VOLUMES = (".nii", ".nii.gz", ".nrrd", ".mha")  # formats that hold a 3D volume and its geometry in one file


def read_image(path: str | Path) -> sitk.Image:
    """A volume: any file that SimpleITK reads, or a folder that holds one DICOM series.

    Raises:
        InputError: names the file and what is wrong with it.
    """
    path = Path(path)
    utf8_name(path)
    if os.path.isdir(path):
        return dicom.read_series(path)
    check_file(path)
    if dicom.is_dicom(path):
        return dicom.read_file(path)
    try:
        with unchanged(*files_of(path)), file_access():
            header = nifti.check_complete(path)
            if missing := reason_why_incomplete(path):
                raise RuntimeError(f"it lacks {missing}")
            image = sitk.ReadImage(utf8_name(path))
    except (RuntimeError, TypeError, UnicodeError) as error:
        raise InputError(
            f"{path}: cannot be read as an image ({reason_of(error)}); is it complete, and of the format its name says?"
        ) from error
    while image.GetDimension() > 3 and image.GetSize()[-1] == 1:
        image = image[..., 0]
    nifti.check_geometry(path, image, header)
    return image


def check_right_angles(image: sitk.Image, name: str) -> None:
    """Raises InputError unless the axes of an image are orthogonal, without which NIfTI cannot store its geometry."""
    axes = image.GetDimension()
    direction = np.reshape(image.GetDirection(), (axes, axes))
    if np.abs(direction.T @ direction - np.eye(axes)).max() > 1e-4:
        raise InputError(
            f"{name}: the axes are not at right angles, as of a CT with tilted gantry, and results on this grid could "
            "not be saved as NIfTI; resample it to right angles, or use it as the moving image"
        )


def read_labels(path: str | Path) -> sitk.Image:
    """A label map: a volume of whole numbers (floats that hold whole numbers are converted).

    Raises:
        InputError: names the file, and the first value that is not a whole number.
    """
    image = read_image(path)
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        layers = any(key.startswith("Segment0_") for key in image.GetMetaDataKeys())
        raise InputError(
            f"{path}: holds segments that overlap, in {image.GetNumberOfComponentsPerPixel()} layers, where one label per "
            "voxel is needed; in Slicer, export it to a label map, or each segment to a file of its own"
            if layers
            else f"{path}: a label map is a 3D volume with one component per voxel"
        )
    if "float" in image.GetPixelIDTypeAsString():
        values = sitk.GetArrayViewFromImage(image)
        fractions = values[~(np.isfinite(values) & (values == np.round(values)))]
        if fractions.size:
            raise InputError(f"{path}: a label map holds whole numbers, but this one holds {fractions[0]:g}")
        large = values.size and np.abs(values).max() > np.iinfo(np.int32).max
        image = sitk.Cast(image, sitk.sitkInt64 if large else sitk.sitkInt32)
    return image


def write_image(image: sitk.Image, path: Path) -> None:
    """Writes a compressed volume atomically.

    Raises:
        InputError: the file cannot be written, or its format cannot hold the volume and its geometry.
    """
    check_ending(path, WRITTEN_VOLUMES, "volumes")
    if path.name.lower().endswith(nifti.SUFFIXES):
        check_right_angles(image, str(path))

    def write(part: Path) -> None:
        with file_access():
            if part.name.endswith(".nii.gz") and image.GetNumberOfComponentsPerPixel() > 1:
                nifti.write_vectors(image, part)
            else:
                sitk.WriteImage(image, utf8_name(part), useCompression=True)
            nifti.check_complete(part)  # ITK does not notice a full disk when it writes NIfTI

    write_atomically(path, write)
