"""Transforms: ITK transform files, and displacement fields saved as volumes. Every error names the file."""

import os
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from DivRegNetLib.errors import InputError, reason_of
from DivRegNetLib.io import nifti
from DivRegNetLib.io.atomic import write_atomically
from DivRegNetLib.io.damage import reason_why_incomplete
from DivRegNetLib.io.itk import file_access
from DivRegNetLib.io.paths import VOLUME_SUFFIXES, check_ending, check_file, unchanged, utf8_name


def read_transform(path: str | Path) -> sitk.Transform:
    """An ITK transform file (.h5, .tfm, .txt, .mat), or a displacement field saved as a volume of 3-vectors (LPS, mm).

    Raises:
        InputError: names the file.
    """
    path = Path(path)
    check_file(path)
    is_volume = path.name.lower().endswith(VOLUME_SUFFIXES)
    try:
        with unchanged(path), file_access():
            if missing := reason_why_incomplete(path):
                raise RuntimeError(f"it lacks {missing}")
            if is_volume:
                nifti.check_complete(path)
                field = sitk.ReadImage(utf8_name(path), sitk.sitkVectorFloat64)
                transform = sitk.DisplacementFieldTransform(field)
            else:
                transform = sitk.ReadTransform(utf8_name(path))
    except (RuntimeError, TypeError, UnicodeError) as error:
        raise InputError(
            f"{path}: cannot be read as a transform ({reason_of(error)}); is it complete, and an ITK transform file?"
        ) from error
    if transform.GetDimension() != 3:
        raise InputError(f"{path}: the transform has {transform.GetDimension()} dimensions, 3 are needed")
    if not _is_finite(transform):
        raise InputError(f"{path}: the transform has parameters that are not finite")
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
        with file_access():
            sitk.WriteTransform(transform, utf8_name(part))

    write_atomically(path, write)


def _is_finite(transform: sitk.Transform) -> bool:
    if transform.GetTransformEnum() == sitk.sitkComposite:
        parts = sitk.CompositeTransform(transform)
        return all(_is_finite(parts.GetNthTransform(i)) for i in range(parts.GetNumberOfTransforms()))
    if transform.GetTransformEnum() == sitk.sitkDisplacementField:  # whose parameters would be a tuple of all voxels
        field = sitk.DisplacementFieldTransform(transform).GetDisplacementField()
        return bool(np.isfinite(sitk.GetArrayViewFromImage(field)).all())
    return bool(np.isfinite((*transform.GetParameters(), *transform.GetFixedParameters())).all())
