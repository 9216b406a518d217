"""What a worker and its parent exchange: a job, messages and a result. No torch here.

The child is started as ``python -m DivRegNetLib.run.worker FOLDER``. FOLDER holds ``job.json``::

    {"images": {"fixed": GEOMETRY, "moving": GEOMETRY, "fixed_mask": GEOMETRY, "moving_mask": GEOMETRY},
     "options": {fields of Options; an initial transform is its 4x4 matrix, LPS, mm}}

and the voxels of each image NAME in ``NAME.npy``, indexed [k, j, i] (and component). The masks are optional. GEOMETRY
is ``{"spacing", "origin", "direction"}`` as in SimpleITK.

The child writes one JSON object per line to standard output:

* ``{"divregnet": "progress", "stage": NAME, "fraction": 0 to 1}``
* ``{"divregnet": "done"}``, once the result is in FOLDER: ``result.json``, and ``warped.npy``, ``transform.npy`` and
  ``inverse.npy`` (displacements in mm, LPS, single precision)
* ``{"divregnet": "error", "kind": NAME OF AN EXCEPTION, "message": TEXT}``

Any other line, and all of standard error, is log. In the child, whatever torch, ITK or a ``print`` write to standard
output goes to standard error instead. After its last message the child waits to be ended.

While the parent lives it holds a lock on FOLDER's file ``parent``. When the child gets that lock, the parent has ended:
the child removes FOLDER and ends at once, whatever it is doing. (The end of a pipe would not show this: PythonSlicer, a
process between the two, keeps its child's standard input open.)

The parent sends both streams to files in FOLDER and reads them as they grow, so that it is never blocked by a child that
writes too much, or nothing.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from DivRegNetLib.core.grid import affine_transform
from DivRegNetLib.errors import Cancelled, DeviceError, DivRegNetError, InputError, ModelError
from DivRegNetLib.models.card import Card
from DivRegNetLib.options import Options
from DivRegNetLib.result import Result

JOB, RESULT, STDOUT, STDERR, PARENT = "job.json", "result.json", "stdout", "stderr", "parent"
"""Files in the folder of a job."""


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
        case {"divregnet": "done"} | {"divregnet": "error", "kind": str(), "message": str()}:
            return message
    return None


def write_job(folder: Path, images: dict[str, sitk.Image], options: Options) -> None:
    """Writes images by name (``fixed``, ``moving``, ...) and options to a folder."""
    geometry = {name: _save_image(folder, name, image) for name, image in images.items()}
    job = {"images": geometry, "options": options.as_dict()}
    (folder / JOB).write_text(json.dumps(job), encoding="utf-8")


def read_job(folder: Path) -> tuple[dict[str, sitk.Image], dict]:
    """Images by name, and options, as keyword arguments of :func:`DivRegNetLib.registration.pipeline.register`."""
    job = json.loads((folder / JOB).read_text(encoding="utf-8"))
    options = job["options"]
    if not isinstance(options["align"], str):
        options["align"] = affine_transform(np.array(options["align"]))
    return {name: _load_image(folder, name, geometry) for name, geometry in job["images"].items()}, options


def write_result(folder: Path, result: Result) -> None:
    """Writes a result to a folder."""
    record = {
        "images": {"warped": _save_image(folder, "warped", result.warped)},
        "initial": result.initial.tolist(),
        "quality": result.quality,
        "timings": result.timings,
        "settings": result.settings,
        "warnings": result.warnings,
        "card": asdict(result.card),
    }
    for name in ("transform", "inverse"):
        field = sitk.Cast(getattr(result, name).GetDisplacementField(), sitk.sitkVectorFloat32)
        record["images"][name] = _save_image(folder, name, field)
    (folder / RESULT).write_text(json.dumps(record), encoding="utf-8")


def read_result(folder: Path) -> Result:
    """The result in a folder. Raises whatever invalid files give rise to."""
    record = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    images = {name: _load_image(folder, name, geometry) for name, geometry in record.pop("images").items()}
    for name in ("transform", "inverse"):
        images[name] = sitk.DisplacementFieldTransform(sitk.Cast(images[name], sitk.sitkVectorFloat64))
    record["initial"] = np.array(record["initial"])
    record["warnings"] = tuple(record["warnings"])
    record["card"] = Card(**record["card"])
    return Result(**images, **record)


def _save_image(folder: Path, name: str, image: sitk.Image) -> dict:
    """Writes the voxels and returns the geometry. Image files would lose sheared axes or some pixel types."""
    np.save(folder / f"{name}.npy", sitk.GetArrayViewFromImage(image))
    return {"spacing": image.GetSpacing(), "origin": image.GetOrigin(), "direction": image.GetDirection()}


def _load_image(folder: Path, name: str, geometry: dict) -> sitk.Image:
    array = np.load(folder / f"{name}.npy")
    image = sitk.GetImageFromArray(array, isVector=array.ndim > len(geometry["spacing"]))
    image.SetSpacing(geometry["spacing"])
    image.SetOrigin(geometry["origin"])
    image.SetDirection(geometry["direction"])
    return image
