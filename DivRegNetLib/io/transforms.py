"""Transforms: ITK transform files, and displacement fields saved as volumes. Every error names the file."""

import os
from pathlib import Path

import SimpleITK as sitk

from DivRegNetLib.errors import InputError, reason_of
from DivRegNetLib.io import nifti
from DivRegNetLib.io.atomic import write_atomically
from DivRegNetLib.io.itk_messages import silenced
from DivRegNetLib.io.paths import VOLUME_SUFFIXES, check_ending, check_file


def read_transform(path: str | Path) -> sitk.Transform:
    """An ITK transform file (.h5, .tfm, .txt, .mat), or a displacement field saved as a volume of 3-vectors (LPS, mm).

    Raises:
        InputError: names the file.
    """
    path = Path(path)
    check_file(path)
    is_volume = path.name.lower().endswith(VOLUME_SUFFIXES)
    try:
        with silenced():
            if is_volume:
                nifti.check_complete(path)
                field = sitk.ReadImage(str(path), sitk.sitkVectorFloat64)
                transform = sitk.DisplacementFieldTransform(field)
            else:
                transform = sitk.ReadTransform(str(path))
    except (RuntimeError, TypeError, UnicodeError) as error:
        raise InputError(
            f"{path}: cannot be read as a transform ({reason_of(error)}); is it complete, and an ITK transform file?"
        ) from error
    if transform.GetDimension() != 3:
        raise InputError(f"{path}: the transform has {transform.GetDimension()} dimensions, 3 are needed")
    return transform


def write_transform(transform: sitk.Transform, path: Path) -> None:
    """Writes a transform atomically as HDF5; when ITK writes text files, it does not notice a full disk.

    Raises:
        InputError: the file cannot be written, or does not end in ``.h5``.
    """
    check_ending(path, (".h5",), "transforms")

    def write(part: Path) -> None:
        if hasattr(os, "posix_fallocate"):  # on a full disk HDF5 raises, but then crashes when the process ends
            with part.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, 8 * transform.GetNumberOfParameters() + 1)
            part.unlink()
        with silenced():
            sitk.WriteTransform(transform, str(part))

    write_atomically(path, write)
