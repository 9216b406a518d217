"""The parent's side of a worker. It needs neither torch nor 3D Slicer, starts no thread, and never blocks: it is polled,
from a timer for instance."""

import os
import shutil
import signal
import sys
import time
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import SimpleITK as sitk

from DivRegNetLib.errors import Cancelled, DivRegNetError, InputError, ModelError
from DivRegNetLib.options import Options
from DivRegNetLib.quality.references import References
from DivRegNetLib.registration.check import check_image
from DivRegNetLib.result import Result
from DivRegNetLib.run.worker.process import Process, Surroundings, can_write_temporary_files, remove_job
from DivRegNetLib.run.worker.protocol import KINDS, Event, ResultFiles, WorkerDied, parse_message, write_job
from DivRegNetLib.run.worker.standby import Standby

LOG_LINES = 30  # kept of what the child writes beside its messages
LOG_BYTES = 8000
READ_BYTES = 1 << 20  # of the child's output at a time
KILLED = (-9, 137, 0xC0000017)  # exit codes of a process that the system killed for its memory
TEMPORARY_FILES_REMEDY = "free space there, or set TMPDIR to another folder for temporary files"
REUSABLE = (InputError, ModelError)  # after which a process can do the next job


class Worker:
    """A registration in a process of its own.

    Call ``start()``, then ``poll()`` from time to time while ``running``, then ``result()``. When the worker is left as a
    context manager or garbage-collected, or this process ends, the child's process and folder are removed. With a
    :class:`~DivRegNetLib.run.worker.standby.Standby` the process goes on to the next worker where nothing went wrong.
    """

    def __init__(
        self,
        fixed: sitk.Image,
        moving: sitk.Image,
        *,
        fixed_mask: sitk.Image | None = None,
        moving_mask: sitk.Image | None = None,
        references: References | None = None,
        keep_files: bool = False,
        inverse: bool = True,
        python: str | os.PathLike | None = None,
        environment: dict[str, str] | None = None,
        standby: Standby | None = None,
        **options,
    ) -> None:
        """Checks the arguments; nothing is started or written yet.

        Args:
            fixed, moving, fixed_mask, moving_mask, options: as of :func:`DivRegNetLib.registration.pipeline.register`, except
                that there is no ``progress`` (see :meth:`poll`) and the model is a name or a path.
            references: what the result is measured with; the scores are added to its quality card.
            keep_files: leave the result in files, see :attr:`files`, instead of reading it.
            inverse: False: the inverse transform is not made, and ``result()`` cannot be called.
            python: the interpreter; None: PythonSlicer inside 3D Slicer, otherwise the running one.
            environment: variables of the child's process; None: those of this one.
            standby: has a process that may do the job, and keeps it afterwards; None: the job has a process of its own.
        Raises:
            InputError: an image or an option that cannot be used.
        """
        if options.get("model", "") is None:
            del options["model"]
        self._options = Options.of(**options)
        images = {name: check_image(image, name) for name, image in (("fixed", fixed), ("moving", moving))}
        for name, mask in (("fixed_mask", fixed_mask), ("moving_mask", moving_mask)):
            if mask is not None:
                if not isinstance(mask, sitk.Image):
                    raise InputError(f"{name} must be a SimpleITK image, got {type(mask).__name__}")
                images[name] = sitk.Image(mask)
        self._images, self._references = images, references
        self._keep_files, self._inverse = keep_files, inverse
        self._files: ResultFiles | None = None
        self._surroundings = surroundings(python, environment)
        self._standby = standby
        self._process: Process | None = None
        self._accepted = False  # the process has found the job
        self._end = weakref.finalize(self, _nothing)
        self._buffer, self._log_start = b"", 0
        self._stray: deque[str] = deque(maxlen=LOG_LINES)
        self._log: tuple[str, ...] = ()
        self._result: Result | None = None
        self._error: DivRegNetError | None = None
        self.running = False

    def start(self) -> "Worker":
        """Writes the job and starts the process; returns itself.

        Raises: as :meth:`starting`.
        """
        for _ in self.starting():
            pass
        return self

    def starting(self) -> Iterator[None]:
        """As :meth:`start`, in steps that take a fraction of a second each, for a caller that must not be blocked.

        Raises:
            WorkerDied: the folder could not be written or the interpreter could not be started.
            RuntimeError: the worker was started before.
        """
        if self._process is not None or self._error is not None:
            raise RuntimeError("a worker can be started once; create another")
        try:
            self._begin(self._standby and self._standby.take(self._surroundings))
            yield
            yield from write_job(self._folder, self._images, self._options, self._references, self._inverse)
        except GeneratorExit:  # the caller gave up
            self._end()
            raise
        except OSError as error:
            remedy = "" if can_write_temporary_files() else f"; {TEMPORARY_FILES_REMEDY}"
            self._end()
            self._error = WorkerDied(f"the worker cannot be started: {error}{remedy}")
            raise self._error from error
        self._images, self._references = {}, None
        self.running = True

    def _begin(self, process: Process | None) -> None:
        """Makes the folder of the job, in a process that waits or else in a new one."""
        if process is not None:
            try:
                self._join(process, process.next_job())
                return
            except OSError:  # it has just ended
                process.end()
        process = Process(self._surroundings, stay=self._standby is not None)
        try:
            self._join(process, process.next_job())
        except OSError:
            process.end()
            raise

    def _join(self, process: Process, folder: Path) -> None:
        """The job is done by this process, in this folder."""
        self._process, self._folder, self._accepted = process, folder, False
        self._buffer, self._log_start = b"", process.log_bytes
        self._end.detach()
        self._end = weakref.finalize(self, _end, process, folder)

    def poll(self) -> list[Event]:
        """The events since the last call; returns at once. Reads the result when the child has written it.

        The list ends with ``done`` or ``error`` in the call that sets ``running`` to False.
        """
        if not self.running:
            return []
        code = self._process.exit_code()  # before reading, so that its last output is not missed
        events = []
        while chunk := self._process.stdout.read(READ_BYTES):
            *lines, self._buffer = (self._buffer + chunk).split(b"\n")
            for line in lines:
                if not self._take(line, events):
                    return events
            if len(self._buffer) > READ_BYTES:
                self._stray.append(_text(self._buffer)[:LOG_BYTES])
                self._buffer = b""
            if code is None:
                break  # a child that writes without end must not block the parent
        if code is None or (self._buffer and not self._take(self._buffer, events)):
            return events
        if self._accepted or not self._process.was_idle or not self._begin_again():
            events.append(self._finish(self._died(code)))
        return events

    def cancel(self) -> None:
        """Ends the process and all of its children and removes its folder; afterwards ``result()`` raises Cancelled."""
        if self.running:
            self._finish(Cancelled("cancelled"))

    def result(self, timeout: float | None = None) -> Result:
        """The result; waits for it while the worker is running.

        Args:
            timeout: seconds; None: no limit.
        Raises:
            InputError, ModelError, DeviceError, Cancelled: the error that the registration raised.
            WorkerDied: the process ended without giving a reason.
            TimeoutError: the worker is still running.
            RuntimeError: the worker was not started.
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
        if self._result is None:
            self._result = self._files.result()
        return self._result

    @property
    def files(self) -> ResultFiles:
        """The result as files, when ``keep_files`` was given and the worker has ended; until :meth:`close`.

        Raises: as :meth:`result`.
        """
        if self._error is not None:
            raise self._error
        if self._files is None:
            raise RuntimeError("the worker is still running, or was not asked to keep files")
        return self._files

    def close(self) -> None:
        """Removes the files that were kept."""
        self._files = None
        self._end()

    def closing(self) -> Iterator[None]:
        """As :meth:`close`, file by file, for a thread that must not wait long: to remove a large file takes a while."""
        self._files = None
        for file in self._folder.glob("*.npy"):
            with suppress(OSError):
                file.unlink()
            yield
        self._end()

    @property
    def pid(self) -> int | None:
        """Of the process; None before it was started."""
        return None if self._process is None else self._process.pid

    @property
    def log(self) -> tuple[str, ...]:
        """The last lines that the process wrote beside its messages."""
        return self._read_log() if self.running else self._log

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_) -> None:
        self.cancel()

    def _begin_again(self) -> bool:
        """Gives the job, which a process that had waited did not live to begin, to a new one; False if that cannot be."""
        try:
            process = Process(self._surroundings, stay=True)
            old, folder = self._process, process.take_job(self._folder)
        except OSError:
            return False
        self._join(process, folder)
        old.end()
        return True

    def _take(self, line: bytes, events: list[Event]) -> bool:
        """Handles one line of output; False if it was the last message."""
        message = parse_message(line)
        if message is None:
            if line.strip():
                self._stray.append(_text(line)[:LOG_BYTES])
            return True
        if message["divregnet"] == "started":
            self._accepted = True
            return True
        if message["divregnet"] == "progress":
            events.append(Event("progress", message["stage"], float(message["fraction"])))
            return True
        if message["divregnet"] == "error":
            kind = KINDS.get(message["kind"])
            error = kind(message["message"]) if kind else WorkerDied(message["message"], log=self._read_log())
            events.append(self._finish(error, reusable=isinstance(error, REUSABLE)))
            return False
        try:
            self._files = ResultFiles(self._folder)
            if not self._keep_files:
                self._result = self._files.result()
            events.append(self._finish(None, reusable=True))
        except Exception as error:  # the files may hold anything, and memory may be short here as well
            events.append(
                self._finish(WorkerDied(f"the worker's result cannot be read: {error}", log=self._read_log()))
            )
        return False

    def _finish(self, error: DivRegNetError | None, *, reusable: bool = False) -> Event:
        """The job has ended; its process is kept where that is possible."""
        self._log = self._read_log()
        self._error = error
        self.running = False
        if reusable and self._standby is not None:
            self._end.detach()
            self._end = weakref.finalize(self, remove_job, self._folder)
            self._standby.put(self._process)
        else:
            self._process.end()
        if error is not None or not self._keep_files:
            self._files = None
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
        log = self._read_log()
        # PythonSlicer, which stands between the two, exits with 1 where its child was killed. A
        # Python that fails says why.
        silent = code == 1 and not any("Error" in line or "Traceback" in line for line in log)
        hint = ", as happens when memory runs out: choose a coarser spacing" if code in KILLED or silent else ""
        if not can_write_temporary_files():
            hint = f", as the folder for temporary files is full: {TEMPORARY_FILES_REMEDY}"
        return WorkerDied(f"the registration {how}{hint}", code, log)

    def _read_log(self) -> tuple[str, ...]:
        text = _text(self._process.read_log(self._log_start, LOG_BYTES))
        lines = [line for line in text.splitlines() if line.strip()]
        return tuple([*self._stray, *lines][-LOG_LINES:])


def surroundings(python: str | os.PathLike | None, environment: dict[str, str] | None) -> Surroundings:
    """What a worker is started with.

    Args:
        python: None: PythonSlicer inside 3D Slicer, which sets Slicer's paths; otherwise the running interpreter.
        environment: None: the variables of this process.
    """
    if python is None:
        inside_slicer = hasattr(sys.modules.get("slicer"), "app")
        python = (shutil.which("PythonSlicer") if inside_slicer else None) or sys.executable
    return Surroundings.of(str(python), dict(os.environ if environment is None else environment))


def _nothing() -> None:
    """A worker that was not started has nothing to end."""


def _end(process: Process, folder: Path) -> None:
    """Ends a job with its process, and removes its folder."""
    process.end()
    remove_job(folder)


def _text(line: bytes) -> str:
    return line.decode("utf-8", errors="replace")
