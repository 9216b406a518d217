"""Which files hold a volume: some formats keep header and voxels apart, and DICOM has a file for each slice."""

import re
from pathlib import Path

from DivRegNetLib.io import nifti

LARGEST_HEADER = 1 << 20
HEADERS = {".mhd": "elementdatafile", ".mha": "elementdatafile", ".nhdr": "datafile", ".nrrd": "datafile"}
"""Ending of a file -> the key, without blanks and in lower case, with which its header names the files of the voxels."""


def files_of(path: Path) -> list[Path]:
    """The files that hold what is at a path, sorted, whether they exist or not: the file itself and files of voxels that its
    header names, or all files in a folder.

    Raises:
        OSError: the folder or the header cannot be read.
    """
    if path.is_dir():
        return sorted(p for p in path.iterdir() if p.is_file())
    name = path.name.lower()
    if name.endswith(nifti.PAIRED_SUFFIXES):
        return sorted({path, *nifti.header_and_voxels(path)})
    key = next((key for ending, key in HEADERS.items() if name.endswith(ending)), None)
    return sorted({path, *(path.parent / voxels for voxels in _voxel_files(path, key))}) if key else [path]


def _voxel_files(path: Path, key: str) -> list[str]:
    """The files of voxels that a header of MetaImage or NRRD names; none where the voxels follow the header.

    A header names one file, a pattern (``slice%03d.raw 1 12 1``), or ``LIST``, after which each line names a file.
    """
    if not path.is_file():
        return []
    with path.open("rb") as file:
        lines = file.read(LARGEST_HEADER).split(b"\n")
    for number, line in enumerate(lines):
        if not line.strip() and key == "datafile":
            return []  # voxels follow
        field = re.match(r"([^:=]+)[:=]=?(.*)", line.decode("utf-8", "surrogateescape"))
        if field is None or "".join(field[1].split()).lower() != key:
            continue
        value = field[2].strip()
        if value.upper() == "LOCAL":
            return []
        if value.upper().split(" ")[0] == "LIST":
            rest = (other.decode("utf-8", "surrogateescape").strip() for other in lines[number + 1 :])
            return [other for other in rest if other]
        if pattern := re.fullmatch(r"(.*%\d*d.*?)\s+(\d+)\s+(\d+)(?:\s+(\d+))?(?:\s+\d+)?", value):
            template, first, last, step = pattern[1], *(int(n or 1) for n in pattern.groups()[1:])
            return [template % n for n in range(first, min(last, first + 100_000) + 1, max(step, 1))]
        return [value]
    return []
