"""Faults of NIfTI files that ITK does not report: missing or non-finite voxels, and two contradictory geometries."""

import contextlib
import gzip
import math
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from DivRegNetLib.core.grid import LPS_FROM_RAS, Grid
from DivRegNetLib.errors import InputError

SUFFIXES = (".nii", ".nii.gz", ".hdr", ".img", ".img.gz")
FLOATS = {16: "f4", 64: "f8"}  # data types, by their code in the header
MM = {1: 1000.0, 3: 0.001}  # millimeters in the other units of length, by their code


def check_complete(path: Path) -> dict[str, str]:
    """The fields of a NIfTI header by ITK's names; of other formats none.

    Raises:
        InputError: voxels are missing or not finite, which ITK reads as zeros without a warning.
    """
    if not path.name.lower().endswith(SUFFIXES):
        return {}
    try:
        reader = sitk.ImageFileReader()
        reader.SetFileName(str(path))
        reader.ReadImageInformation()
        header = {key: reader.GetMetaData(key) for key in reader.GetMetaDataKeys()}
        voxels = math.prod(int(header[f"dim[{i}]"]) for i in range(1, int(header["dim[0]"]) + 1))
        expected = voxels * int(header["bitpix"]) // 8
        start, kind = int(float(header["vox_offset"])), int(header["datatype"])
    except (RuntimeError, TypeError, UnicodeError, KeyError, ValueError, OverflowError):
        return {}  # not NIfTI, or an invalid header: reading the image gives the reason
    header_file, voxel_file = _pair(path)
    length = not_finite = 0
    with contextlib.suppress(OSError, EOFError, zlib.error):
        little = int.from_bytes(next(_blocks(header_file))[:4], "little") in (348, 540)
        number = FLOATS.get(kind) and np.dtype(FLOATS[kind]).newbyteorder("<" if little else ">")
        for block in _blocks(voxel_file, max(start, 348) if voxel_file == header_file else start):
            block = block[: expected - length]
            length += len(block)
            if number is not None:
                values = np.frombuffer(block, number, len(block) // number.itemsize)
                not_finite += values.size - int(np.isfinite(values).sum())
            if length >= expected:
                break
    if length < expected:
        raise InputError(f"{path}: the file is cut short or damaged; fetch it again")
    if not_finite:
        raise InputError(f"{path}: holds {not_finite} voxels that are NaN or infinite; replace them")
    return header


def _pair(path: Path) -> tuple[Path, Path]:
    """The files that hold the header and the voxels."""
    name = path.name
    if name.lower().endswith((".nii", ".nii.gz")):
        return path, path
    stem = name[: name.lower().rindex(".hdr" if name.lower().endswith(".hdr") else ".img")]
    pair = (path.with_name(f"{stem}{ending}") for ending in (".hdr", ".img", ".img.gz"))
    header, *voxels = (path if p.name.lower() == name.lower() else p for p in pair)
    return header, next((v for v in voxels if v.is_file()), voxels[0])


def _blocks(path: Path, start: int = 0) -> Iterator[bytes]:
    """The content of a file from a byte on, decompressed if necessary, a few MB at a time."""
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    with gzip.open(path) if compressed else path.open("rb") as file:
        file.seek(start)
        while block := file.read(1 << 22):
            yield block


def check_geometry(path: Path, image: sitk.Image, header: dict[str, str]) -> None:
    """Raises InputError where ITK's geometry of a NIfTI volume is not that of the sform, which other programs use.

    ITK uses the qform instead of an sform that is sheared or does not fit the voxel sizes.
    """
    if int(header.get("sform_code", 0)) <= 0 or image.GetDimension() != 3:
        return
    sform = np.eye(4)
    try:
        sform[:3] = [[float(v) for v in header[f"srow_{axis}"].split()] for axis in "xyz"]
        sform[:3] *= MM.get(int(header["xyzt_units"]) & 7, 1.0)
        by_sform, by_itk = Grid(image.GetSize(), LPS_FROM_RAS @ sform), Grid.of(image)
    except (KeyError, ValueError):
        return  # an sform of zeros, which counts as none, or one that is not finite
    difference = np.linalg.norm(by_sform.corners() - by_itk.corners(), axis=1).max()
    if difference > 0.1 * min(by_itk.spacing) + 1e-5 * np.abs(by_itk.corners()).max():
        raise InputError(
            f"{path}: its sform is sheared or does not fit its voxel sizes, and its qform differs by up to "
            f"{difference:.3g} mm; resample it to axes at right angles, or save it as NRRD"
        )
