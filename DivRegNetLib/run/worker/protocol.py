"""What a worker and its parent exchange: jobs, messages and results. No torch here.

The child is started as ``python -m DivRegNetLib.run.worker FOLDER``. FOLDER holds ``worker.json``::

    {"idle_seconds": NUMBER, "warm_up": {"model": NAME, "device": NAME}}

The child ends when it has had no job for that long, or when others need its memory; without ``idle_seconds`` it waits to be
ended. With ``warm_up`` it imports its libraries and computes something small, at low priority, until the first job comes.

The jobs come one after another, each in a folder of its own: ``FOLDER/job-1``, ``FOLDER/job-2`` and so on. A job begins when
its ``job.json`` appears, which is moved there when all else is written::

    {"images": {"fixed": GEOMETRY, "moving": GEOMETRY, "fixed_mask": GEOMETRY, "moving_mask": GEOMETRY},
     "options": {fields of Options; an initial transform is its 4x4 matrix, LPS, mm},
     "inverse": true, or false where the inverse transform is not to be made}

and the voxels of each image NAME in ``NAME.npy``, indexed [k, j, i] (and component). The masks are optional. GEOMETRY
is ``{"spacing", "origin", "direction"}`` as in SimpleITK. Where the result is to be measured with references, ``job.json``
has ``"references"``: segments with their layers (images ``fixed_layer_0``, ...) and landmarks.

The child writes one JSON object per line to standard output:

* ``{"divregnet": "started"}``, when it has found a job
* ``{"divregnet": "progress", "stage": NAME, "fraction": 0 to 1}``
* ``{"divregnet": "done"}``, once the result is in the job's folder: ``result.json``, and ``warped.npy``, ``transform.npy`` and
  ``inverse.npy`` (displacements in mm, LPS, single precision), and ``error_map.npy`` where it was asked for
* ``{"divregnet": "error", "kind": NAME OF AN EXCEPTION, "message": TEXT}``

Any other line, and all of standard error, is log. In the child, whatever torch, ITK or a ``print`` write to standard
output goes to standard error instead. After ``done`` or ``error`` the child waits for the next job. A job whose child ended
before it said ``started`` was lost by no fault of its own, and the parent may give it to another child.

While the parent lives it holds a lock on FOLDER's file ``parent``. When the child gets that lock, the parent has ended:
the child removes FOLDER and ends at once, whatever it is doing. (The end of a pipe would not show this: PythonSlicer, a
process between the two, keeps its child's standard input open.)

The parent sends both streams to files in FOLDER and reads them as they grow, so that it is never blocked by a child that
writes too much, or nothing.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from DivRegNetLib.core.composites import composite, displacement_on, field_grid
from DivRegNetLib.core.grid import Grid, affine_transform, apply_matrix
from DivRegNetLib.errors import Cancelled, DeviceError, DivRegNetError, InputError, ModelError
from DivRegNetLib.models.card import Card
from DivRegNetLib.options import Options
from DivRegNetLib.quality.references import References, Segments
from DivRegNetLib.result import Result

WORKER, STDOUT, STDERR, PARENT = "worker.json", "stdout", "stderr", "parent"
"""Files in the folder of a worker."""
JOB, RESULT = "job.json", "result.json"
"""Files in the folder of a job."""
SPARE_BYTES = 1e9  # of main memory that a process which has no job leaves to others
SLAB_BYTES = 32_000_000  # that are written at a time


class WorkerDied(DivRegNetError, RuntimeError):
    """The worker could not be started, or ended without a result or an error of its own.

    exit_code: of the process, minus the signal that ended it; None where there is none.
    log: the last lines that it wrote.
    """

    def __init__(self, message: str, exit_code: int | None = None, log: tuple[str, ...] = ()) -> None:
        super().__init__(message + ("\nThe last lines it wrote:\n" + "\n".join(log) if log else ""))
        self.exit_code = exit_code
        self.log = log


KINDS = {e.__name__: e for e in (InputError, ModelError, DeviceError, Cancelled, DivRegNetError)}
"""Exceptions that are raised by the parent as they were by the child; any other becomes a WorkerDied."""


@dataclass(frozen=True)
class Event:
    """A message of a worker.

    kind: ``progress``, ``done`` or ``error``; the last two end the sequence.
    stage, fraction: of progress: one of :data:`DivRegNetLib.options.STAGES`, and the part of the whole that is done, 0
        to 1.
    message: of an error.
    """

    kind: str
    stage: str = ""
    fraction: float = 0.0
    message: str = ""


def encode_message(event: str, **values) -> str:
    """A line of the child's output."""
    return json.dumps({"divregnet": event, **values}) + "\n"


def parse_message(line: bytes) -> dict | None:
    """The message in a line of output; None if there is no valid one."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return None
    match message:
        case {"divregnet": "progress", "stage": str(), "fraction": int() | float() as fraction} if 0 <= fraction <= 1:
            return message
        case {"divregnet": "started" | "done"} | {"divregnet": "error", "kind": str(), "message": str()}:
            return message
    return None


def job_folder(folder: Path, number: int) -> Path:
    """The folder of a worker's job, counted from 1."""
    return folder / f"job-{number}"


def write_job(
    folder: Path,
    images: dict[str, sitk.Image],
    options: Options,
    references: References | None = None,
    inverse: bool = True,
) -> Iterator[None]:
    """Writes images by name (``fixed``, ``moving``, ...), options and references to a folder, in short steps."""
    job: dict = {"images": {}, "options": options.as_dict(), "inverse": inverse}
    layers = {}
    if references is not None:
        job["references"], layers = _references_record(references)
    for name, image in (images | layers).items():
        job["images"][name] = _geometry(image)
        yield from _save_array(folder, name, sitk.GetArrayViewFromImage(image))
    unfinished = folder / f"{JOB}.unfinished"
    unfinished.write_text(json.dumps(job), encoding="utf-8")
    os.replace(unfinished, folder / JOB)


@dataclass(frozen=True)
class Job:
    """A job as it is read.

    images, options: keyword arguments of :func:`DivRegNetLib.registration.pipeline.register`.
    references: to measure the result with, or None.
    inverse: whether the inverse transform is made.
    """

    images: dict[str, sitk.Image]
    options: dict
    references: References | None
    inverse: bool


def read_job(folder: Path) -> Job:
    """The job in a folder."""
    job = json.loads((folder / JOB).read_text(encoding="utf-8"))
    options = job["options"]
    if not isinstance(options["align"], str):
        options["align"] = affine_transform(np.array(options["align"]))
    images = {name: _load_image(folder, name, geometry) for name, geometry in job["images"].items()}
    references = _read_references(job["references"], images) if "references" in job else None
    return Job(images, options, references, job["inverse"])


def write_result(folder: Path, result: Result) -> None:
    """Writes a result to a folder."""
    record = {
        "images": {},
        "initial": result.initial.tolist(),
        "quality": result.quality,
        "timings": result.timings,
        "settings": result.settings,
        "warnings": result.warnings,
        "card": asdict(result.card),
    }
    images = {"warped": result.warped, "transform": _whole_displacement(result.transform)}
    if result.inverse is not None:
        images["inverse"] = _whole_displacement(result.inverse)
    if result.error_map is not None:
        images["error_map"] = result.error_map
    for name, image in images.items():
        record["images"][name] = _geometry(image)
        values = sitk.GetArrayViewFromImage(image)
        for _ in _save_array(folder, name, values, values.dtype if name == "warped" else np.dtype(np.float32)):
            pass
    record["margin"] = _margin(images["transform"], result.warped)
    (folder / RESULT).write_text(json.dumps(record), encoding="utf-8")


def read_result(folder: Path) -> Result:
    """The result in a folder. Raises whatever invalid files give rise to."""
    return ResultFiles(folder).result()


class ResultFiles:
    """A result that is still in files, so that one can read what one needs, bit by bit.

    Its attributes are those of :class:`~DivRegNetLib.result.Result`, but for the images.
    """

    def __init__(self, folder: Path) -> None:
        """Raises whatever invalid files give rise to."""
        record = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        self._folder, self._geometry = folder, record["images"]
        self._margin = np.array(record["margin"], int)
        self.initial = np.array(record["initial"])
        self.quality: dict = record["quality"]
        self.timings: dict[str, float] = record["timings"]
        self.settings: dict = record["settings"]
        self.warnings: tuple[str, ...] = tuple(record["warnings"])
        self.card = Card(**record["card"])
        for name in ("warped", "transform"):
            self.array(name)

    def holds(self, name: str) -> bool:
        """Whether this image was asked for and written."""
        return name in self._geometry

    def array(self, name: str) -> np.ndarray:
        """The voxels of ``warped``, ``transform``, ``inverse`` or ``error_map``, [k, j, i] (and component); read where they
        are used.

        Of the transforms the displacement ``T(p) - p``, LPS mm; that of ``transform`` covers the fixed image.
        """
        whole = self._whole(name)
        if name != "transform":
            return whole
        i, j, k = self._margin
        return whole[k : len(whole) - k, j : whole.shape[1] - j, i : whole.shape[2] - i]

    def grid(self, name: str) -> Grid:
        """The grid of :meth:`array`."""
        grid = self._whole_grid(name)
        if name != "transform":
            return grid
        matrix = grid.matrix.copy()
        matrix[:3, 3] = grid.to_physical(self._margin)
        return Grid(tuple(np.array(grid.size) - 2 * self._margin), matrix)

    def _whole(self, name: str) -> np.ndarray:
        return np.load(self._folder / f"{name}.npy", mmap_mode="r")

    def _whole_grid(self, name: str) -> Grid:
        image = sitk.Image(1, 1, 1, sitk.sitkUInt8)
        _stamp(image, self._geometry[name])
        return Grid(self._whole(name).shape[2::-1], Grid.of(image).matrix)

    def result(self) -> Result:
        """All of it, read into memory.

        Raises:
            KeyError: the inverse was not written.
        """
        warped = _load_image(self._folder, "warped", self._geometry["warped"])
        matrices = {"transform": self.initial, "inverse": np.linalg.inv(self.initial)}
        transforms = (
            _composite(matrix, self._whole(name), self._whole_grid(name)) for name, matrix in matrices.items()
        )
        values = self.initial, self.quality, self.timings, self.settings, self.warnings, self.card
        return Result(warped, *transforms, *values, self.error_map())

    def error_map(self) -> sitk.Image | None:
        """The map of the expected error; None where it was not asked for."""
        if not self.holds("error_map"):
            return None
        return _load_image(self._folder, "error_map", self._geometry["error_map"])


def _whole_displacement(transform: sitk.Transform) -> sitk.Image:
    """``T(p) - p`` on the grid of the field in a result's transform, in single precision."""
    return displacement_on(transform, field_grid(transform), sitk.sitkVectorFloat32)


def _margin(field: sitk.Image, image: sitk.Image) -> list[int]:
    """Voxels by which a field begins before an image and ends after it, along i, j and k."""
    return np.round(Grid.of(field).to_index(image.GetOrigin())).astype(int).tolist()


def _composite(matrix: np.ndarray, displacement: np.ndarray, grid: Grid) -> sitk.CompositeTransform:
    """The transform of a :func:`_whole_displacement` (D, H, W, 3): the matrix and the field that comes before it."""
    back = np.linalg.inv(matrix)
    k, j, i = np.indices(grid.shape, sparse=True)
    field = np.empty(displacement.shape)
    for axis, origin in enumerate(grid.matrix[:3]):
        field[..., axis] = origin[0] * i + origin[1] * j + origin[2] * k + origin[3]
    points = field.copy()
    field = apply_matrix(back, field + displacement) - points
    return composite(matrix, grid.image(field))


def with_measurements(result: Result, scores: dict, notes: list[str]) -> Result:
    """A result with more in its quality card and its warnings."""
    return replace(result, quality=result.quality | scores, warnings=(*result.warnings, *notes))


def _references_record(references: References) -> tuple[dict, dict[str, sitk.Image]]:
    """References as JSON, and the images of their layers by name."""
    record: dict = {"labels": list(references.labels)}
    layers = {}
    for side in ("fixed", "moving"):
        if (points := getattr(references, f"{side}_points")) is not None:
            record[f"{side}_points"] = np.asarray(points, float).tolist()
        if (segments := getattr(references, f"{side}_segments")) is not None:
            record[f"{side}_segments"] = segments.values
            layers |= {f"{side}_layer_{i}": layer for i, layer in enumerate(segments.layers)}
    return record, layers


def _read_references(record: dict, images: dict[str, sitk.Image]) -> References:
    """References; takes their layers out of the images."""
    values: dict = {"labels": tuple(record["labels"])}
    for side in ("fixed", "moving"):
        if f"{side}_points" in record:
            values[f"{side}_points"] = np.array(record[f"{side}_points"]).reshape(-1, 3)
        if f"{side}_segments" in record:
            count = sum(name.startswith(f"{side}_layer_") for name in images)
            layers = tuple(images.pop(f"{side}_layer_{i}") for i in range(count))
            where = {name: (layer, value) for name, (layer, value) in record[f"{side}_segments"].items()}
            values[f"{side}_segments"] = Segments(layers, where)
    return References(**values)


def _geometry(image: sitk.Image) -> dict:
    return {"spacing": image.GetSpacing(), "origin": image.GetOrigin(), "direction": image.GetDirection()}


def _stamp(image: sitk.Image, geometry: dict) -> None:
    image.SetSpacing(geometry["spacing"])
    image.SetOrigin(geometry["origin"])
    image.SetDirection(geometry["direction"])


def _save_array(folder: Path, name: str, array: np.ndarray, dtype: np.dtype | None = None) -> Iterator[None]:
    """Writes voxels as ``.npy``, slab by slab. Image files would lose sheared axes or some pixel types."""
    path, dtype = folder / f"{name}.npy", dtype or array.dtype
    file = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=array.shape)
    step = max(SLAB_BYTES // max(array[:1].nbytes, 1), 1)
    for start in range(0, len(array), step):
        file[start : start + step] = array[start : start + step]
        yield
    file.flush()


def _load_image(folder: Path, name: str, geometry: dict) -> sitk.Image:
    array = np.load(folder / f"{name}.npy")
    image = sitk.GetImageFromArray(array, isVector=array.ndim > len(geometry["spacing"]))
    _stamp(image, geometry)
    return image
