"""A moving volume that changes in time, as a 4D file: each of its frames is a pair of a cohort with the fixed volume."""

from dataclasses import replace
from pathlib import Path

import SimpleITK as sitk

from DivRegNetLib.errors import InputError
from DivRegNetLib.io import nifti
from DivRegNetLib.io.damage import reason_why_incomplete
from DivRegNetLib.io.images import read_image, write_image
from DivRegNetLib.io.itk import file_access
from DivRegNetLib.io.paths import check_file
from DivRegNetLib.run.cohort.pairs import Pair

FRAMES, WARPED = "frames", "warped.nii.gz"
"""In the output folder: the folder of the frames as volumes, and the warped frames as one 4D file."""


def is_4d(path: Path) -> bool:
    """Whether a file holds several volumes; False where that cannot be told, of which reading it gives the reason."""
    try:
        check_file(path)  # ITK would wait for a pipe without end
        if (header := nifti.read_header(path)) is not None:
            return bool(header["dim"][0] == 4 and header["dim"][4] > 1)
        if reason_why_incomplete(path):
            return False
        reader = sitk.ImageFileReader()
        reader.SetFileName(str(path))
        with file_access():
            reader.ReadImageInformation()
    except (InputError, RuntimeError, TypeError, UnicodeError):
        return False
    return reader.GetDimension() == 4 and reader.GetSize()[3] > 1


def split(pair: Pair, output: Path) -> dict[str, Pair]:
    """Writes the frames of the moving file into the output folder, and returns a pair for each, by number.

    Raises:
        InputError: the file is not 4D, or a frame cannot be written.
    """
    moving = read_image(pair.moving)
    if moving.GetDimension() != 4:
        raise InputError(f"{pair.moving}: has {moving.GetDimension()} dimensions, not 4")
    folder = output / FRAMES
    folder.mkdir(parents=True, exist_ok=True)
    pairs = {}
    for i in range(moving.GetSize()[3]):
        file = folder / f"{i:04d}.nii.gz"
        write_image(moving[..., i], file)
        pairs[file.name.split(".")[0]] = replace(pair, moving=file)
    return pairs


def join_warped(names: list[str], output: Path) -> Path | None:
    """Writes the warped frames as one 4D file; None where a frame is missing."""
    files = [output / name / WARPED for name in names]
    if not all(file.is_file() for file in files):
        return None
    write_image(sitk.JoinSeries([read_image(file) for file in files]), output / WARPED)
    return output / WARPED
