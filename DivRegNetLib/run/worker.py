"""One registration in a process of its own, so that it can be watched, cancelled and killed, and takes nothing with it.

The child runs :func:`DivRegNetLib.registration.pipeline.register`, as the command line does. The parent, :class:`Worker`, needs
neither torch nor 3D Slicer, starts no thread, and never waits: it is polled, from a timer for instance.

The protocol
------------
``python -m DivRegNetLib.run.worker FOLDER``. FOLDER holds ``job.json``::

    {"images": {"fixed": GEOMETRY, "moving": GEOMETRY, "fixed_mask": GEOMETRY, "moving_mask": GEOMETRY},
     "options": {fields of Options; a given initial transform is its 4x4 matrix, LPS, mm}}

and the voxels of each image NAME in ``NAME.npy``, indexed [k, j, i] (and component). The masks may be missing. GEOMETRY
is ``{"spacing", "origin", "direction"}`` as SimpleITK has them.

The child writes to standard output one JSON object a line:

* ``{"divregnet": "progress", "stage": NAME, "fraction": 0 to 1}``
* ``{"divregnet": "done"}``, once the results are in FOLDER: ``result.json``, and ``warped.npy``, ``transform.npy`` and
  ``inverse.npy`` (displacements in mm, LPS, single precision)
* ``{"divregnet": "error", "kind": NAME OF AN EXCEPTION, "message": TEXT}``

Any other line, and all of standard error, is log. In the child, whatever torch, ITK or a ``print`` write to standard
output goes to standard error instead. Then the child waits to be ended.

As long as the parent lives it holds a lock on FOLDER's file ``parent``. When the child gets that lock the parent has
died, and the child removes FOLDER and ends at once, whatever it is doing. (A pipe would not do: PythonSlicer, a process
between the two, keeps its child's standard input open.)

The parent sends both streams to files in FOLDER and reads them as they grow, so that a child that talks too much, or
not at all, never blocks it.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import weakref
from collections import deque
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from DivRegNetLib import errors
from DivRegNetLib.core.grid import affine_transform
from DivRegNetLib.errors import Cancelled, DeviceError, DivRegNetError, InputError
from DivRegNetLib.io.claim import hold
from DivRegNetLib.models import Card
from DivRegNetLib.options import Options
from DivRegNetLib.registration.check import check_image

JOB, RESULT, STDOUT, STDERR, PARENT = "job.json", "result.json", "stdout", "stderr", "parent"
LOG_LINES = 30
LOG_BYTES = 8000
READ_BYTES = 1 << 20
END_SECONDS = 2.0


class WorkerDied(DivRegNetError, RuntimeError):
    """The worker ended without a result or an error of its own, or could not be started.

    exit_code: of the process, minus the signal that ended it; None where there is none.
    log: the last lines it wrote.
    """

    def __init__(self, message: str, exit_code: int | None = None, log: tuple[str, ...] = ()) -> None:
        super().__init__(message + ("\nIts last words:\n" + "\n".join(log) if log else ""))
        self.exit_code = exit_code
        self.log = log


KINDS = {e.__name__: e for e in (InputError, errors.ModelError, DeviceError, Cancelled, DivRegNetError)}


@dataclass(frozen=True)
class Event:
    """What a worker reported.

    kind: ``progress``, ``done`` or ``error``; after the last two there are no more.
    stage, fraction: of progress: one of :data:`DivRegNetLib.options.STAGES`, and how much of the whole is done, 0 to 1.
    message: of an error.
    """

    kind: str
    stage: str = ""
    fraction: float = 0.0
    message: str = ""


@dataclass(frozen=True)
class WorkerResult:
    """The fields of :class:`DivRegNetLib.registration.pipeline.Result`, which see; made without torch."""

    warped: sitk.Image
    transform: sitk.DisplacementFieldTransform
    inverse: sitk.DisplacementFieldTransform
    initial: np.ndarray
    quality: dict
    timings: dict[str, float]
    settings: dict
    warnings: tuple[str, ...]
    card: Card


class Worker:
    """A registration in a process of its own.

    ``start()``, then ``poll()`` from time to time while ``running``, then ``result()``. A context manager; when it is
    left, garbage-collected or this process ends, neither process nor folder stays behind.
    """

    def __init__(
        self,
        fixed: sitk.Image,
        moving: sitk.Image,
        *,
        fixed_mask: sitk.Image | None = None,
        moving_mask: sitk.Image | None = None,
        python: str | os.PathLike | None = None,
        environment: dict[str, str] | None = None,
        **options,
    ) -> None:
        """Nothing is started or written yet.

        Args:
            fixed, moving, fixed_mask, moving_mask, options: as of :func:`DivRegNetLib.registration.pipeline.register`, but for
                ``progress`` (see :meth:`poll`), and the model is a name or a path.
            python: the interpreter; None: PythonSlicer where this is 3D Slicer, otherwise the present one.
            environment: variables of the process; None: those of this one.
        Raises:
            InputError: an image or an option that cannot be used.
        """
        if options.get("model", "") is None:
            del options["model"]
        try:
            self._options = Options(**options)
        except TypeError as error:
            known = ", ".join(Options.__dataclass_fields__)
            raise InputError(f"unknown option: {error}; options are {known}") from error
        images = {"fixed": check_image(fixed, "fixed"), "moving": check_image(moving, "moving")}
        for name, mask in (("fixed_mask", fixed_mask), ("moving_mask", moving_mask)):
            if mask is not None:
                if not isinstance(mask, sitk.Image):
                    raise InputError(f"{name} must be a SimpleITK image, got {type(mask).__name__}")
                images[name] = mask
        self._images = images
        self._python = str(python) if python is not None else _interpreter()
        self._environment = dict(os.environ if environment is None else environment)
        self._process: subprocess.Popen | None = None
        self._end = lambda: None
        self._buffer = b""
        self._stray: deque[str] = deque(maxlen=LOG_LINES)
        self._log: tuple[str, ...] = ()
        self._result: WorkerResult | None = None
        self._error: DivRegNetError | None = None
        self.running = False

    def start(self) -> "Worker":
        """Writes the job and starts the process; returns itself.

        Raises:
            WorkerDied: the folder could not be written, or the interpreter not be started.
            RuntimeError: it was started before.
        """
        if self._process is not None or self._error is not None:
            raise RuntimeError("a worker is started once; make another")
        remove = None
        try:
            self._folder = Path(tempfile.mkdtemp(prefix="divregnet-"))
            remove = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
            _write_job(self._folder, self._images, self._options)
            alive = hold(self._folder / PARENT)
            with open(self._folder / STDOUT, "wb") as out, open(self._folder / STDERR, "wb") as log:
                self._process = subprocess.Popen(
                    [self._python, "-m", "DivRegNetLib.run.worker", str(self._folder)],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=log,
                    env=_environment(self._environment),
                    **_own_group(),
                )
        except OSError as error:
            if remove is not None:
                remove()
            self._error = WorkerDied(f"the worker cannot be started: {error}")
            raise self._error from error
        remove.detach()
        self._images = {}
        self._stdout = open(self._folder / STDOUT, "rb")  # noqa: SIM115 -- closed by _end
        self._end = weakref.finalize(self, _end, self._process, self._folder, [self._stdout, alive])
        self.running = True
        return self

    def poll(self) -> list[Event]:
        """What happened since the last call; returns at once. Reads the result in when it is there.

        The list ends with ``done`` or ``error`` in the call that sets ``running`` to False.
        """
        if not self.running:
            return []
        code = self._process.poll()  # before reading, so that nothing it wrote last is missed
        events = []
        while chunk := self._stdout.read(READ_BYTES):
            *lines, self._buffer = (self._buffer + chunk).split(b"\n")
            for line in lines:
                if not self._take(line, events):
                    return events
            if len(self._buffer) > READ_BYTES:
                self._stray.append(_text(self._buffer)[:LOG_BYTES])
                self._buffer = b""
            if code is None:
                break  # a child that floods its output must not keep us here
        if code is not None and (not self._buffer or self._take(self._buffer, events)):
            events.append(self._finish(self._died(code)))
        return events

    def cancel(self) -> None:
        """Ends the process with all of its children and removes its folder; afterwards ``result()`` raises Cancelled."""
        if self.running:
            self._finish(Cancelled("cancelled"))

    def result(self, timeout: float | None = None) -> WorkerResult:
        """The result; waits for it where the worker is still running.

        Args:
            timeout: seconds; None: for ever.
        Raises:
            InputError, ModelError, DeviceError, Cancelled: what the registration raised.
            WorkerDied: it ended without saying why.
            TimeoutError: it is still running.
            RuntimeError: it was not started.
        """
        if self._process is None and self._error is None:
            raise RuntimeError("the worker was not started")
        until = None if timeout is None else time.monotonic() + timeout
        while self.running:
            self.poll()
            if self.running:
                if until is not None and time.monotonic() > until:
                    raise TimeoutError(f"the worker is still running after {timeout:g} s")
                time.sleep(0.02)
        if self._error is not None:
            raise self._error
        return self._result

    @property
    def pid(self) -> int | None:
        """Of the process, None before it was started."""
        return None if self._process is None else self._process.pid

    @property
    def log(self) -> tuple[str, ...]:
        """The last lines the process wrote that are no events."""
        return self._read_log() if self.running else self._log

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_) -> None:
        self.cancel()

    def _take(self, line: bytes, events: list[Event]) -> bool:
        """Acts on one line of output; False when it was the last that matters."""
        message = _parse(line)
        if message is None:
            if line.strip():
                self._stray.append(_text(line)[:LOG_BYTES])
            return True
        if message["divregnet"] == "progress":
            events.append(Event("progress", message["stage"], float(message["fraction"])))
            return True
        if message["divregnet"] == "error":
            kind = KINDS.get(message["kind"])
            error = kind(message["message"]) if kind else WorkerDied(message["message"], log=self._read_log())
            events.append(self._finish(error))
            return False
        try:
            self._result = _read_result(self._folder)
            events.append(self._finish(None))
        except Exception as error:  # whatever is in the files, and memory for it may be missing here as well
            events.append(
                self._finish(WorkerDied(f"the worker's result cannot be read: {error}", log=self._read_log()))
            )
        return False

    def _finish(self, error: DivRegNetError | None) -> Event:
        self._log = self._read_log()
        self._error = error
        self.running = False
        self._end()
        return Event("done") if error is None else Event("error", message=str(error))

    def _died(self, code: int) -> WorkerDied:
        if code < 0:
            try:
                how = f"was ended by signal {-code} ({signal.Signals(-code).name})"
            except ValueError:
                how = f"was ended by signal {-code}"
        else:
            how = f"ended with exit code {code}"
        hint = ", as happens where memory runs out: choose a coarser spacing" if code in (-9, 137) else ""
        return WorkerDied(f"the registration {how}{hint}", code, self._read_log())

    def _read_log(self) -> tuple[str, ...]:
        try:
            with open(self._folder / STDERR, "rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(size - LOG_BYTES, 0))
                lines = [line for line in _text(file.read()).splitlines() if line.strip()]
        except OSError:
            lines = []
        return tuple([*self._stray, *lines][-LOG_LINES:])


# --- parent


def _interpreter() -> str:
    """Inside 3D Slicer its PythonSlicer, which sets Slicer's paths; otherwise the running interpreter."""
    inside_slicer = hasattr(sys.modules.get("slicer"), "app")
    return (shutil.which("PythonSlicer") if inside_slicer else None) or sys.executable


def _environment(variables: dict[str, str]) -> dict[str, str]:
    """So that the child finds this very library, and nothing by chance in the working directory."""
    paths = [str(Path(__file__).resolve().parents[2]), variables.get("PYTHONPATH", "")]
    own = {
        "PYTHONPATH": os.pathsep.join(p for p in paths if p),
        "PYTHONSAFEPATH": "1",
        "PYTHONFAULTHANDLER": "1",
        "PYTHONIOENCODING": "utf-8",
    }
    return variables | own


def _own_group() -> dict:
    """What makes Popen start the head of a process group that can be ended as a whole, without a console window."""
    if os.name == "nt":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW}
    return {"start_new_session": True}


def _end(process: subprocess.Popen, folder: Path, files: list) -> None:
    """Ends a process with its children, waits until it is gone, and removes the folder."""
    if os.name == "nt":
        command = ["taskkill", "/F", "/T", "/PID", str(process.pid)]
        subprocess.run(command, capture_output=True, check=False, creationflags=subprocess.CREATE_NO_WINDOW)
    else:
        with suppress(ProcessLookupError, PermissionError):  # the latter on macOS, where only the dead are left
            os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(END_SECONDS)
    for file in files:
        file.close()
    shutil.rmtree(folder, ignore_errors=True)


def _parse(line: bytes) -> dict | None:
    """The message of a line of output, None if it is none."""
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


def _text(line: bytes) -> str:
    return line.decode("utf-8", errors="replace")


# --- files, both sides


def _write_job(folder: Path, images: dict[str, sitk.Image], options: Options) -> None:
    geometry = {name: _save_image(folder, name, image) for name, image in images.items()}
    job = {"images": geometry, "options": options.as_dict()}
    (folder / JOB).write_text(json.dumps(job), encoding="utf-8")


def _read_job(folder: Path) -> tuple[dict[str, sitk.Image], dict]:
    """Images by name, and options."""
    job = json.loads((folder / JOB).read_text(encoding="utf-8"))
    options = job["options"]
    if not isinstance(options["align"], str):
        options["align"] = affine_transform(np.array(options["align"]))
    return {name: _load_image(folder, name, geometry) for name, geometry in job["images"].items()}, options


def _write_result(folder: Path, result) -> None:
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


def _read_result(folder: Path) -> WorkerResult:
    record = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    images = {name: _load_image(folder, name, geometry) for name, geometry in record.pop("images").items()}
    for name in ("transform", "inverse"):
        images[name] = sitk.DisplacementFieldTransform(sitk.Cast(images[name], sitk.sitkVectorFloat64))
    record["initial"] = np.array(record["initial"])
    record["warnings"] = tuple(record["warnings"])
    record["card"] = Card(**record["card"])
    return WorkerResult(**images, **record)


def _save_image(folder: Path, name: str, image: sitk.Image) -> dict:
    """Writes the voxels, returns the geometry; image files would lose sheared axes or some pixel types."""
    np.save(folder / f"{name}.npy", sitk.GetArrayViewFromImage(image))
    return {"spacing": image.GetSpacing(), "origin": image.GetOrigin(), "direction": image.GetDirection()}


def _load_image(folder: Path, name: str, geometry: dict) -> sitk.Image:
    array = np.load(folder / f"{name}.npy")
    image = sitk.GetImageFromArray(array, isVector=array.ndim > len(geometry["spacing"]))
    image.SetSpacing(geometry["spacing"])
    image.SetOrigin(geometry["origin"])
    image.SetDirection(geometry["direction"])
    return image


# --- child


def main(folder: str | os.PathLike) -> None:
    """The child: does the job in a folder, reports on it, and waits to be ended. Does not return."""
    folder = Path(folder)
    if not (folder / JOB).is_file():
        raise SystemExit(f"{folder}: there is no {JOB}; this is started by DivRegNetLib.run.worker.Worker")
    protocol = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    parent = threading.Thread(target=_end_with_parent, args=(folder,), daemon=True)
    parent.start()

    def send(event: str, **values) -> None:
        protocol.write(json.dumps({"divregnet": event, **values}) + "\n")
        protocol.flush()

    def progress(stage: str, fraction: float) -> None:
        send("progress", stage=stage, fraction=min(max(fraction, 0.0), 1.0))

    try:
        from DivRegNetLib.registration.pipeline import register

        images, options = _read_job(folder)
        _write_result(folder, register(**images, **options, progress=progress))
        send("done")
    except DivRegNetError as error:
        send("error", kind=type(error).__name__, message=str(error))
    except ImportError as error:
        send("error", kind=WorkerDied.__name__, message=errors.missing_package(error))
    except Exception as error:
        traceback.print_exc()
        if errors.is_out_of_memory(error):
            message = (
                f"the memory ran out ({' '.join(str(error).split())[:200]}): choose a coarser spacing, or device cpu"
            )
            send("error", kind=DeviceError.__name__, message=message)
        else:
            send("error", kind=WorkerDied.__name__, message=f"the registration failed: {type(error).__name__}: {error}")
    parent.join()


def _end_with_parent(folder: Path) -> None:
    """Waits until the parent has ended; then ends this process at once."""
    hold(folder / PARENT).close()
    shutil.rmtree(folder, ignore_errors=True)
    if os.name != "nt" and os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
