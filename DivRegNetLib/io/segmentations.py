"""Segmentation files of 3D Slicer (``.seg.nrrd``): label maps whose segments have names, colors and terminology.

Segments that overlap are in several layers, which SimpleITK reads as the components of a vector image.
"""

import re
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from DivRegNetLib.errors import InputError
from DivRegNetLib.io.atomic import write_atomically
from DivRegNetLib.io.images import read_image, read_labels, write_image
from DivRegNetLib.io.itk import file_access
from DivRegNetLib.io.paths import check_ending, utf8_name

SUFFIX = ".seg.nrrd"
NRRD_SUFFIXES = (".nrrd",)
KINDS = b"kinds: vector domain domain domain"  # as ITK writes layers


def metadata_of(image: sitk.Image) -> dict[str, str]:
    """What a segmentation file says about its segments; empty for other images."""
    keys = [key for key in image.GetMetaDataKeys() if re.match(r"Segment(\d+|ation)_", key)]
    return {key: image.GetMetaData(key) for key in keys} if any(key.startswith("Segment0_") for key in keys) else {}


def segments(metadata: dict[str, str]) -> dict[str, tuple[int, int]]:
    """Name -> layer and label value of each segment that has a name."""
    found = {}
    for number in range(len(metadata)):
        name = metadata.get(f"Segment{number}_Name")
        value = metadata.get(f"Segment{number}_LabelValue")
        if name and value:
            found[name] = int(metadata.get(f"Segment{number}_Layer", 0)), int(value)
    return found


def read_segmentation(path: str | Path) -> sitk.Image:
    """A label map, or a segmentation with its metadata; one with layers is a vector image.

    Raises:
        InputError: names the file and what is wrong with it.
    """
    image = read_image(path)
    if image.GetNumberOfComponentsPerPixel() > 1 and metadata_of(image) and image.GetDimension() == 3:
        return image
    return read_labels(path)


def read_mask(path: str | Path) -> sitk.Image:
    """A mask: a volume, or the union of all segments of a segmentation.

    Raises:
        InputError: names the file and what is wrong with it.
    """
    image = read_image(path)
    if image.GetNumberOfComponentsPerPixel() > 1 and metadata_of(image):
        union = sitk.GetImageFromArray((sitk.GetArrayViewFromImage(image) != 0).any(-1).astype(np.uint8))
        union.CopyInformation(image)
        return union
    return image


def write_segmentation(image: sitk.Image, metadata: dict[str, str], path: Path) -> None:
    """Writes a label map, and with a name that ends in ``.nrrd`` the metadata of its segments.

    Raises:
        InputError: the file cannot be written, or its format cannot hold layers.
    """
    if not metadata:
        write_image(image, path)
        return
    layered = image.GetNumberOfComponentsPerPixel() > 1
    if not path.name.lower().endswith(NRRD_SUFFIXES):
        if layered:
            raise InputError(f"{path}: segments that overlap can be written to {SUFFIX} only; choose this ending")
        write_image(image, path)
        return
    check_ending(path, NRRD_SUFFIXES, "segmentations")
    labeled = sitk.Image(image)
    for key in labeled.GetMetaDataKeys():
        labeled.EraseMetaData(key)
    for key, value in (metadata | _extents(image, metadata)).items():
        labeled.SetMetaData(key, value)

    def write(part: Path) -> None:
        with file_access():
            sitk.WriteImage(labeled, utf8_name(part), useCompression=True)
        if layered:
            _name_layers(part)

    write_atomically(path, write)


def match_names(fixed: sitk.Image, moving: sitk.Image) -> dict[int, int]:
    """Label values of the moving label map -> those that the fixed one has for segments of the same names.

    Empty where the values are the same already, or not both have names, or none is common.
    """
    values = [{name: value for name, (_, value) in segments(metadata_of(i)).items()} for i in (fixed, moving)]
    common = [name for name in values[1] if name in values[0]]
    if not common or all(values[0][name] == values[1][name] for name in common):
        return {}
    new = {values[1][name]: values[0][name] for name in common}
    present = [int(v) for i in (fixed, moving) for v in np.unique(sitk.GetArrayViewFromImage(i))]
    free = 1 + max(*present, *values[0].values(), *values[1].values())
    others = sorted({*present, *values[1].values()} - {0, *new})
    return new | {value: free + i if value in new.values() else value for i, value in enumerate(others)}


def relabel(image: sitk.Image, values: dict[int, int]) -> sitk.Image:
    """A label map with other label values; those that are not named stay."""
    array = sitk.GetArrayViewFromImage(image)
    changed = array.astype(np.int32)
    for old, new in values.items():
        changed[array == old] = new
    result = sitk.GetImageFromArray(changed)
    result.CopyInformation(image)
    return result


def relabel_metadata(metadata: dict[str, str], values: dict[int, int]) -> dict[str, str]:
    """The metadata of a segmentation after :func:`relabel`."""
    changed = {k: str(values.get(int(v), int(v))) for k, v in metadata.items() if k.endswith("_LabelValue")}
    return metadata | changed


def _extents(image: sitk.Image, metadata: dict[str, str]) -> dict[str, str]:
    """The box of each segment, as Slicer writes it, on the image's grid."""
    array = sitk.GetArrayViewFromImage(image)
    layers = array[..., None] if array.ndim == 3 else array
    boxes = {"Segmentation_ReferenceImageExtentOffset": "0 0 0"}
    for number in range(len(metadata)):
        value = metadata.get(f"Segment{number}_LabelValue")
        if value is None:
            continue
        layer = min(int(metadata.get(f"Segment{number}_Layer", 0)), layers.shape[-1] - 1)
        inside = layers[..., layer] == int(value)
        box = [0, -1, 0, -1, 0, -1]
        if inside.any():
            along = [np.flatnonzero(inside.any(tuple(a for a in range(3) if a != axis))) for axis in (2, 1, 0)]
            box = [int(end) for voxels in along for end in (voxels[0], voxels[-1])]
        boxes[f"Segment{number}_Extent"] = " ".join(map(str, box))
    return boxes


def _name_layers(path: Path) -> None:
    """Calls the first axis of an NRRD file a list, as Slicer wants it, where ITK calls it a vector."""
    content = path.read_bytes()
    at = content.index(KINDS, 0, content.index(b"\n\n"))
    path.write_bytes(content[:at] + KINDS.replace(b"vector", b"list") + content[at + len(KINDS) :])
