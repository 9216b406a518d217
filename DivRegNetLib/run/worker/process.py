"""A worker's process and its folder, as the parent sees them."""

import json
import os
import shutil
import signal
import subprocess
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from DivRegNetLib.io.locks import LocksUnsupported, acquire
from DivRegNetLib.run.threads import prepare_threads
from DivRegNetLib.run.worker.protocol import PARENT, STDERR, STDOUT, WORKER, job_folder

IDLE_SECONDS = 300.0  # without a job, after which a process that was kept ends itself
END_SECONDS = 2.0  # that a killed child may take to end
ENOUGH_BYTES = 1 << 17  # that a disk which is not full has left
LARGEST_OUTPUT = 10_000_000  # bytes of both streams of a process that is kept


class Surroundings(NamedTuple):
    """What a process is started with, and what a job can notice of it."""

    python: str
    environment: dict[str, str]
    folder: str

    @classmethod
    def of(cls, python: str, environment: dict[str, str]) -> "Surroundings":
        """Those of a process that is started now with this interpreter and these variables."""
        try:
            folder = os.getcwd()
        except OSError:  # it was removed
            folder = ""
        return cls(python, _environment(environment), folder)


class Process:
    """A child that does one job after another, each in a folder of its own.

    When this object is garbage-collected or the parent ends, the process ends, and its folder goes with the last job's.

    folder: see :mod:`DivRegNetLib.run.worker.protocol`.
    stdout: what the child writes, opened for reading.
    was_idle: whether it was waiting, or started in advance, when its present job was given to it.
    """

    def __init__(self, surroundings: Surroundings, *, stay: bool = False, warm_up: dict | None = None) -> None:
        """Starts the process.

        Args:
            stay: end after IDLE_SECONDS without a job or where its memory is needed, instead of waiting to be ended.
            warm_up: options ``model`` and ``device`` to compute something with, before the first job comes; None: nothing.
        Raises:
            OSError: the folder could not be written or the interpreter could not be started.
        """
        self.surroundings, self.was_idle = surroundings, False
        self._count = 0
        self.folder = Path(tempfile.mkdtemp(prefix="divregnet-"))
        files = []
        try:
            settings: dict = {"idle_seconds": IDLE_SECONDS} if stay else {}
            if warm_up is not None:
                settings["warm_up"] = warm_up
            (self.folder / WORKER).write_text(json.dumps(settings), encoding="utf-8")
            with suppress(LocksUnsupported):
                files.append(acquire(self.folder / PARENT))
            with open(self.folder / STDOUT, "wb") as out, open(self.folder / STDERR, "wb") as log:
                self._process = subprocess.Popen(
                    [surroundings.python, "-m", "DivRegNetLib.run.worker", str(self.folder)],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=log,
                    env=surroundings.environment,
                    **_own_group(),
                )
            files.append(open(self.folder / STDOUT, "rb"))  # noqa: SIM115 -- closed by _end
        except BaseException:
            for file in files:
                file.close()
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        self.stdout = files[-1]
        self.end = weakref.finalize(self, _end, self._process, self.folder, files)

    @property
    def pid(self) -> int:
        return self._process.pid

    def exit_code(self) -> int | None:
        """None while the process is there; negative where a signal ended it."""
        return self._process.poll()

    def next_job(self) -> Path:
        """The folder of its next job, which is made.

        Raises:
            OSError: it cannot be made; the process may have ended.
        """
        self._count += 1
        folder = job_folder(self.folder, self._count)
        folder.mkdir()
        return folder

    def take_job(self, folder: Path) -> Path:
        """Moves the folder of a job that another process did not begin here; returns where it is now."""
        self._count += 1
        return folder.rename(job_folder(self.folder, self._count))

    @property
    def log_bytes(self) -> int:
        """That the child has written to standard error so far."""
        try:
            return (self.folder / STDERR).stat().st_size
        except OSError:
            return 0

    def read_log(self, start: int, size: int) -> bytes:
        """The last ``size`` bytes that the child wrote to standard error after its first ``start`` ones."""
        try:
            with open(self.folder / STDERR, "rb") as file:
                file.seek(max(start, file.seek(0, os.SEEK_END) - size))
                return file.read()
        except OSError:
            return b""

    @property
    def may_stay(self) -> bool:
        """Whether it runs and has written no more than a process that is kept may."""
        return self.exit_code() is None and self.stdout.tell() + self.log_bytes < LARGEST_OUTPUT


def can_write_temporary_files() -> bool:
    """Whether the folder for temporary files can be written and has space left."""
    try:
        with tempfile.TemporaryFile() as file:
            file.write(bytes(ENOUGH_BYTES))
            file.flush()
    except OSError:
        return False
    return True


def remove_job(folder: Path) -> None:
    """Removes a job's folder, and its worker's if that was the last thing in it."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        folder.parent.rmdir()


def _environment(variables: dict[str, str]) -> dict[str, str]:
    """The child must import this very library, and nothing from the working directory."""
    paths = [str(Path(__file__).resolve().parents[3]), variables.get("PYTHONPATH", "")]
    own = {
        "PYTHONPATH": os.pathsep.join(p for p in paths if p),
        "PYTHONSAFEPATH": "1",
        "PYTHONFAULTHANDLER": "1",
        "PYTHONIOENCODING": "utf-8",
    }
    environment = variables | own
    prepare_threads(environment)
    return environment


def _own_group() -> dict:
    """Arguments of Popen for a process group that can be ended as a whole, without a console window."""
    if os.name == "nt":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW}
    return {"start_new_session": True}


def _end(process: subprocess.Popen, folder: Path, files: list) -> None:
    """Ends a process with its children, waits for its end, and removes its files; jobs are removed by their owners."""
    if os.name == "nt":
        command = ["taskkill", "/F", "/T", "/PID", str(process.pid)]
        subprocess.run(command, capture_output=True, check=False, creationflags=subprocess.CREATE_NO_WINDOW)
    else:
        with suppress(ProcessLookupError, PermissionError):  # the latter on macOS, where only ended processes are left
            os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(END_SECONDS)
    for file in files:
        file.close()
    remove_files(folder)


def remove_files(folder: Path) -> None:
    """Removes a worker's folder but for the folders of its jobs."""
    with suppress(OSError):
        for path in folder.iterdir():
            if not path.is_dir():
                with suppress(OSError):
                    path.unlink()
        folder.rmdir()
