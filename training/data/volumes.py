"""One volume of a cohort: read, checked, resampled into the common space, and stored as a file of arrays."""

import json
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch

from DivRegNetLib.core.grid import Grid
from DivRegNetLib.core.intensity import normalize
from DivRegNetLib.core.resampling import resample_mask, resample_smooth
from DivRegNetLib.errors import InputError
from DivRegNetLib.io import atomic
from DivRegNetLib.io.images import read_image, read_labels
from DivRegNetLib.registration import alignment
from DivRegNetLib.registration.check import check_geometry, check_image
from training.data.broken import Broken, blame
from training.data.layouts import Source

NORMALIZATION = "robust"


@dataclass(frozen=True)
class Task:
    """Everything that a worker needs to write the file of one volume.

    reference: image file of the reference and its :func:`state`.
    grid: the common grid.
    place: the (4, 4) LPS map from the common space to the volume, if it shares that of another volume; None: to be computed.
    fingerprint: a hash of everything that the file depends on.
    """

    source: Source
    reference: tuple[Path, str]
    grid: Grid
    align: str
    place: list[list[float]] | None
    output: Path
    fingerprint: str

    @property
    def file(self) -> Path:
        return self.output / f"{self.source.name}.npz"


def state(path: Path) -> str:
    """Paths, sizes and modification times of a file, or of the files in a folder, to detect changes."""
    listed = sorted(path.iterdir()) if path.is_dir() else [path]
    return json.dumps([(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in listed])


def recorded(task: Task) -> dict | None:
    """The record (``fingerprint``, ``to_reference``) of a finished volume; None if it has to be processed."""
    try:
        with zipfile.ZipFile(task.file) as archive:
            record = json.loads(archive.comment)
    except (OSError, ValueError, zipfile.BadZipFile):
        return None
    return record if record["fingerprint"] == task.fingerprint else None


def make(task: Task) -> dict | Broken:
    """Writes the file of one volume and returns its record, or the error about a file that cannot be used."""
    try:
        arrays, matrix = _arrays(task)
    except Broken as error:
        return error
    record = {"to_reference": matrix.tolist(), "fingerprint": task.fingerprint}

    def write(part: Path) -> None:
        np.savez_compressed(part, **arrays)
        with zipfile.ZipFile(part, "a") as archive:  # in the same file, so that record and arrays always agree
            archive.comment = json.dumps(record).encode()

    atomic.write_atomically(task.file, write)
    return record


def _arrays(task: Task) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """``images`` (C, D, H, W) float16 and, if known, ``labels`` (D, H, W) uint8 on the common grid, and the (4, 4) LPS map
    from the common space to the volume.

    Raises:
        Broken: a file cannot be used.
    """
    source, grid = task.source, task.grid
    images, labels = read(source)
    arrays, matrix = {}, np.eye(4) if task.place is None else np.array(task.place)
    with blame() as at:
        at(source.images[0])
        if task.place is None and source.images[0] != task.reference[0]:
            matrix = alignment.align(_reference_image(*task.reference), images[0], task.align)
        stack = []
        for path, image in zip(source.images, images, strict=True):
            at(path)
            values = sitk.GetArrayFromImage(resample_smooth(image, grid, matrix)[0])
            if values.min() == values.max():
                raise InputError(
                    f"the volume lies outside the common space after the alignment {task.align!r}; try another --align"
                )
            stack.append(normalize(torch.from_numpy(values)[None, None], NORMALIZATION)[0, 0].numpy())
        arrays["images"] = np.stack(stack).astype(np.float16)
        if labels is not None:
            at(source.labels)
            arrays["labels"] = sitk.GetArrayFromImage(resample_mask(labels, grid, matrix)).astype(np.uint8)
            if not arrays["labels"].any():
                raise InputError(
                    f"all labels lie outside the common space after the alignment {task.align!r}; try another --align"
                )
    return arrays, matrix


@lru_cache(maxsize=1)
def _reference_image(path: Path, state: str) -> sitk.Image:
    """The image of the reference, read once by each worker; a changed ``state`` reads it again."""
    return read_image(path)


def read(source: Source) -> tuple[list[sitk.Image], sitk.Image | None]:
    """The images of a source and its labels as uint8, all checked.

    Raises:
        Broken: the file that cannot be used.
    """
    images, labels = [], None
    with blame() as at:
        for path in source.images:
            at(path)
            images.append(check_image(read_image(path), source.name))
        if source.labels is not None:
            at(source.labels)
            labels = read_labels(source.labels)
            check_geometry(labels, f"{source.name} label map")
            values = sitk.GetArrayViewFromImage(labels)
            low, high = int(values.min()), int(values.max())
            if low < 0 or high > 255:
                raise InputError(f"holds labels from {low} to {high}, but only 0 to 255 are possible; renumber them")
            if high == 0:
                raise InputError("no voxel is labeled; draw labels or remove the file")
            labels = sitk.Cast(labels, sitk.sitkUInt8)
            if Grid.of(labels) != Grid.of(images[0]):
                on_image = resample_mask(labels, Grid.of(images[0]), np.eye(4))
                if not sitk.GetArrayViewFromImage(on_image).any():
                    raise InputError(f"no label lies inside {source.images[0].name}; give both files the same origin")
    return images, labels
