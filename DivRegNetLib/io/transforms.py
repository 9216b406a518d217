"""Transforms: ITK transform files, displacement fields saved as volumes, and points through them backwards."""

import os
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from DivRegNetLib.errors import InputError
from DivRegNetLib.io import nifti
from DivRegNetLib.io.atomic import VOLUME_SUFFIXES, check_ending, check_file, write_whole
from DivRegNetLib.io.quiet import quiet, reason_of


def read_transform(path: str | Path) -> sitk.Transform:
    """An ITK transform file (.h5, .tfm, .txt, .mat), or a displacement field saved as a volume of 3-vectors (LPS, mm).

    Raises:
        InputError: names the file.
    """
    path = Path(path)
    check_file(path)
    is_volume = path.name.lower().endswith(VOLUME_SUFFIXES)
    try:
        with quiet():
            if is_volume:
                nifti.check_whole(path)
                field = sitk.ReadImage(str(path), sitk.sitkVectorFloat64)
                transform = sitk.DisplacementFieldTransform(field)
            else:
                transform = sitk.ReadTransform(str(path))
    except (RuntimeError, TypeError, UnicodeError) as error:
        raise InputError(
            f"{path}: cannot be read as a transform ({reason_of(error)}); is it whole, and a transform file of ITK?"
        ) from error
    if transform.GetDimension() != 3:
        raise InputError(f"{path}: the transform has {transform.GetDimension()} dimensions, 3 are needed")
    return transform


def write_transform(transform: sitk.Transform, path: Path) -> None:
    """Writes a transform as HDF5; of text files, ITK does not notice where the disk is full.

    Raises:
        InputError: the file cannot be written, or does not end in ``.h5``.
    """
    check_ending(path, (".h5",), "transforms")

    def write(part: Path) -> None:
        if hasattr(os, "posix_fallocate"):  # where the disk is full, HDF5 says so, but crashes when the process ends
            with part.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, 8 * transform.GetNumberOfParameters() + 1)
            part.unlink()
        sitk.WriteTransform(transform, str(part))

    write_whole(path, write)


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
