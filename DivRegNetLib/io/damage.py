"""MetaImage and HDF5 files that are cut short, recognized before ITK opens them: it prints to the terminal over them."""

import math
from pathlib import Path

META_SUFFIXES, HDF5_SUFFIXES = (".mha", ".mhd"), (".h5", ".hdf5", ".hdf")
META_BYTES = {
    "CHAR": 1, "UCHAR": 1, "SHORT": 2, "USHORT": 2, "INT": 4, "UINT": 4, "LONG": 4, "ULONG": 4, "LONG_LONG": 8,
    "ULONG_LONG": 8, "FLOAT": 4, "DOUBLE": 8,
}  # fmt: skip
LARGEST_META_HEADER = 1 << 20
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
HDF5_LENGTH_AT = {0: (13, 24), 1: (13, 28), 2: (9, 12), 3: (9, 12)}
"""Version of the superblock -> where it says how many bytes an address has, and where its addresses begin; the third of
them is the end of the file."""


def reason_why_incomplete(path: Path) -> str | None:
    """What is missing from a MetaImage or HDF5 file; None if nothing is, or the format is another one."""
    name = path.name.lower()
    if name.endswith(META_SUFFIXES):
        return _metaimage(path)
    if name.endswith(HDF5_SUFFIXES):
        return _hdf5(path)
    return None


def _metaimage(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            header, start = {}, 0
            for line in iter(lambda: file.readline(LARGEST_META_HEADER), b""):
                key, _, value = line.decode("latin-1").partition("=")
                header[key.strip()] = value.strip()
                start = file.tell()
                if key.strip() == "ElementDataFile" or start > LARGEST_META_HEADER:
                    break
        local = header["ElementDataFile"].upper() == "LOCAL"
        voxels = path if local else path.with_name(header["ElementDataFile"])
        if not voxels.is_file():
            return None if " " in header["ElementDataFile"] or "%" in header["ElementDataFile"] else "its voxels"
        present = voxels.stat().st_size - (start if local else max(int(header.get("HeaderSize", 0)), 0))
        if header.get("CompressedData", "False").upper().startswith("T"):
            expected = int(header.get("CompressedDataSize", 0))
        elif header.get("BinaryData", "True").upper().startswith("T"):
            element = META_BYTES[header["ElementType"].upper().removeprefix("MET_").removesuffix("_ARRAY")]
            expected = math.prod(map(int, header["DimSize"].split())) * element
            expected *= int(header.get("ElementNumberOfChannels", 1))
        else:
            return None
    except (KeyError, ValueError, OSError):
        return None  # an unusual header: ITK gives the reason
    return f"{expected - present} bytes of its voxels" if present < expected else None


def _hdf5(path: Path) -> str | None:
    length = path.stat().st_size
    with path.open("rb") as file:
        for start in (0, *(512 << i for i in range(20))):  # a user block may come first
            file.seek(start)
            block = file.read(64)
            if block.startswith(HDF5_SIGNATURE) or len(block) < 64:
                break
    if not block.startswith(HDF5_SIGNATURE):
        return "the signature of HDF5"
    if len(block) < 64 or block[8] not in HDF5_LENGTH_AT:
        return "its superblock"
    where, first = HDF5_LENGTH_AT[block[8]]
    size = block[where]
    end = int.from_bytes(block[first + 2 * size : first + 3 * size], "little") if size in (2, 4, 8) else math.inf
    return f"{end - length} of {end} bytes" if end > length else None
