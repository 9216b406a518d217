"""What ITK does not say about NIfTI files: voxels that are missing or not finite, and two places of one volume."""

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
FLOATS = {16: "f4", 64: "f8"}  # by their code in the header
MM = {1: 1000.0, 3: 0.001}  # in a unit of length other than mm, by its code


def check_whole(path: Path) -> dict[str, str]:
    """The fields of a NIfTI header by ITK's names; of other files none.

    Raises:
        InputError: the voxels end early, or some are not finite: ITK reads zeros there without a word.
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
        return {}  # no NIfTI, or a header that makes no sense: reading it says why
    header_file, voxel_file = _pair(path)
    length = broken = 0
    with contextlib.suppress(OSError, EOFError, zlib.error):
        little = int.from_bytes(next(_blocks(header_file))[:4], "little") in (348, 540)
        number = FLOATS.get(kind) and np.dtype(FLOATS[kind]).newbyteorder("<" if little else ">")
        for block in _blocks(voxel_file, max(start, 348) if voxel_file == header_file else start):
            block = block[: expected - length]
            length += len(block)
            if number is not None:
                values = np.frombuffer(block, number, len(block) // number.itemsize)
                broken += values.size - int(np.isfinite(values).sum())
            if length >= expected:
                break
    if length < expected:
        raise InputError(f"{path}: the file is cut short or damaged; fetch it again")
    if broken:
        raise InputError(f"{path}: holds {broken} voxels that are NaN or infinite; replace them")
    return header


def _pair(path: Path) -> tuple[Path, Path]:
    """The files of header and voxels."""
    name = path.name
    if name.lower().endswith((".nii", ".nii.gz")):
        return path, path
    stem = name[: name.lower().rindex(".hdr" if name.lower().endswith(".hdr") else ".img")]
    pair = (path.with_name(f"{stem}{ending}") for ending in (".hdr", ".img", ".img.gz"))
    header, *voxels = (path if p.name.lower() == name.lower() else p for p in pair)
    return header, next((v for v in voxels if v.is_file()), voxels[0])


def _blocks(path: Path, start: int = 0) -> Iterator[bytes]:
    """A file, unpacked where it is packed by gzip, from a byte on, a few MB at a time."""
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    with gzip.open(path) if packed else path.open("rb") as file:
        file.seek(start)
        while block := file.read(1 << 22):
            yield block


def check_place(path: Path, image: sitk.Image, header: dict[str, str]) -> None:
    """Raises InputError where ITK does not put a NIfTI volume where its sform says, which is where others see it.

    ITK takes the qform instead of an sform that is sheared or does not fit the voxel sizes.
    """
    if int(header.get("sform_code", 0)) <= 0 or image.GetDimension() != 3:
        return
    sform = np.eye(4)
    try:
        sform[:3] = [[float(v) for v in header[f"srow_{axis}"].split()] for axis in "xyz"]
        sform[:3] *= MM.get(int(header["xyzt_units"]) & 7, 1.0)
        said, seen = Grid(image.GetSize(), LPS_FROM_RAS @ sform), Grid.of(image)
    except (KeyError, ValueError):
        return  # an sform of zeros, which is none, or a place that is not finite
    apart = np.linalg.norm(said.corners() - seen.corners(), axis=1).max()
    if apart > 0.1 * min(seen.spacing) + 1e-5 * np.abs(seen.corners()).max():
        raise InputError(
            f"{path}: its sform is sheared or does not fit its voxel sizes, and its qform says otherwise by up to "
            f"{apart:.3g} mm; resample it to axes at right angles, or save it as NRRD"
        )
