"""Faults of NIfTI files that ITK does not report: missing or non-finite voxels, and two contradictory geometries."""

import contextlib
import gzip
import math
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import SimpleITK as sitk

from DivRegNetLib.core.grid import LPS_FROM_RAS, Grid
from DivRegNetLib.errors import InputError
from DivRegNetLib.io.paths import utf8_name

PAIRED_SUFFIXES = (".hdr", ".img", ".img.gz")
SUFFIXES = (".nii", ".nii.gz", *PAIRED_SUFFIXES)
FLOATS = {16: "f4", 64: "f8"}  # data types, by their code in the header
BITS = {
    1: 1,
    2: 8,
    4: 16,
    8: 32,
    16: 32,
    32: 64,
    64: 64,
    128: 24,
    256: 8,
    512: 16,
    768: 32,
    1024: 64,
    1280: 64,
    1536: 128,
    1792: 128,
    2048: 256,
    2304: 32,
}  # fmt: skip -- per voxel, by data type
MM = {1: 1000.0, 3: 0.001}  # millimeters in the other units of length, by their code
HEADER = np.dtype([
    ("sizeof_hdr", "i4"), ("unused", "V36"), ("dim", "i2", 8), ("intent", "V14"), ("datatype", "i2"), ("bitpix", "i2"),
    ("slice_start", "i2"), ("pixdim", "f4", 8), ("vox_offset", "f4"), ("scaling", "V11"), ("xyzt_units", "u1"),
    ("text", "V128"), ("qform_code", "i2"), ("sform_code", "i2"), ("quatern", "f4", 6), ("srow", "f4", (3, 4)),
    ("intent_name", "V16"), ("magic", "S4"),
])  # fmt: skip


def read_header(path: Path) -> np.void | None:
    """The header of a NIfTI or Analyze file; None for other formats, and where it cannot be read.

    Raises:
        InputError: the header cannot be true.
    """
    if not path.name.lower().endswith(SUFFIXES):
        return None
    try:
        with _open(header_and_voxels(path)[0]) as file:
            block = file.read(HEADER.itemsize)
        header = next(
            h for h in (np.frombuffer(block, HEADER.newbyteorder(o))[0] for o in "<>") if h["sizeof_hdr"] == 348
        )
    except (StopIteration, ValueError, OSError, EOFError, zlib.error):
        return None  # not NIfTI: reading the image gives the reason
    _check_header(path, header)
    return header


def check_complete(path: Path) -> np.void | None:
    """The header of a NIfTI file; of Analyze and other formats None.

    Raises:
        InputError: the header cannot be true, or voxels are missing or not finite, which ITK reads as zeros without a
            warning.
    """
    header = read_header(path)
    if header is None:
        return None
    header_file, voxel_file = header_and_voxels(path)
    dimensions = max(int(header["dim"][0]), 1)
    expected = math.prod(max(int(n), 1) for n in header["dim"][1 : dimensions + 1]) * BITS[int(header["datatype"])] // 8
    start = int(header["vox_offset"])
    length = not_finite = 0
    with contextlib.suppress(OSError, EOFError, zlib.error):
        number = FLOATS.get(int(header["datatype"]))
        number = number and np.dtype(number).newbyteorder(header.dtype["sizeof_hdr"].byteorder)
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
    return header if header["magic"] in (b"n+1", b"ni1") else None


def _check_header(path: Path, header: np.void) -> None:
    """Raises InputError for a header over which the NIfTI library would print to the terminal."""
    faults = []
    if not 1 <= header["dim"][0] <= 7 or header["dim"][1] < 1 or (header["dim"][2 : header["dim"][0] + 1] < 0).any():
        faults.append(f"dimensions {header['dim'].tolist()}")
    if int(header["datatype"]) not in BITS:
        faults.append(f"data type {header['datatype']}")
    if not (np.isfinite(header["vox_offset"]) and 0 <= header["vox_offset"] < 2**53):
        faults.append(f"voxels that begin at byte {header['vox_offset']}")
    if faults:
        raise InputError(f"{path}: cannot be read as an image: its header says {', '.join(faults)}; fetch it again")
    forms = [header[f] for f, code in (("srow", "sform_code"), ("quatern", "qform_code")) if header[code] > 0]
    if header["magic"] in (b"n+1", b"ni1") and not all(np.isfinite(f).all() for f in (header["pixdim"][1:4], *forms)):
        raise InputError(f"{path}: has a spacing, origin or direction that is not finite; repair its header")


def header_and_voxels(path: Path) -> tuple[Path, Path]:
    """The files that hold the header and the voxels."""
    name = path.name
    if name.lower().endswith((".nii", ".nii.gz")):
        return path, path
    stem = name[: name.lower().rindex(".hdr" if name.lower().endswith(".hdr") else ".img")]
    pair = (path.with_name(f"{stem}{ending}") for ending in (".hdr", ".img", ".img.gz"))
    header, *voxels = (path if p.name.lower() == name.lower() else p for p in pair)
    return header, next((v for v in voxels if v.is_file()), voxels[0])


def write_vectors(image: sitk.Image, path: Path) -> None:
    """Writes an image of vectors as ``.nii.gz`` whose content is stored as it is: compression would take a twentieth of a
    second for each million voxels of a displacement, and make the file a tenth smaller."""
    plain = path.with_name("plain.nii")
    try:
        sitk.WriteImage(image, utf8_name(plain), useCompression=False)
        # Neither name nor time are stored, so that the same image makes the same file.
        with (
            plain.open("rb") as source,
            path.open("wb") as file,
            gzip.GzipFile("", "wb", compresslevel=0, fileobj=file, mtime=0) as stored,
        ):
            shutil.copyfileobj(source, stored, 1 << 20)
    finally:
        plain.unlink(missing_ok=True)


def _open(path: Path) -> BinaryIO:
    """A file for reading, decompressed if necessary."""
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if compressed else path.open("rb")


def _blocks(path: Path, start: int = 0) -> Iterator[bytes]:
    """The content of a file from a byte on, decompressed if necessary, a few MB at a time."""
    with _open(path) as file:
        file.seek(start)
        while block := file.read(1 << 22):
            yield block


def check_geometry(path: Path, image: sitk.Image, header: np.void | None) -> None:
    """Raises InputError where ITK's geometry of a NIfTI volume is not that of the sform, which other programs use.

    ITK uses the qform instead of an sform that is sheared or does not fit the voxel sizes.
    """
    if header is None or header["sform_code"] <= 0 or image.GetDimension() != 3:
        return
    sform = np.eye(4)
    sform[:3] = header["srow"] * MM.get(int(header["xyzt_units"]) & 7, 1.0)
    try:
        by_sform, by_itk = Grid(image.GetSize(), LPS_FROM_RAS @ sform), Grid.of(image)
    except ValueError:
        return  # an sform of zeros, which counts as none
    difference = np.linalg.norm(by_sform.corners() - by_itk.corners(), axis=1).max()
    if difference > 0.1 * min(by_itk.spacing) + 1e-5 * np.abs(by_itk.corners()).max():
        raise InputError(
            f"{path}: its sform is sheared or does not fit its voxel sizes, and its qform differs by up to "
            f"{difference:.3g} mm; resample it to axes at right angles, or save it as NRRD"
        )
