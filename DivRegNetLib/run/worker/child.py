"""The worker's process: does the job in a folder and reports on it. torch is imported only when the job begins."""

import os
import shutil
import signal
import threading
import time
import traceback
from pathlib import Path

from DivRegNetLib.errors import DeviceError, DivRegNetError, is_out_of_memory, missing_package
from DivRegNetLib.io.locks import LocksUnsupported, acquire
from DivRegNetLib.quality.references import measure
from DivRegNetLib.run.process import prepare_process
from DivRegNetLib.run.worker.protocol import (
    JOB,
    PARENT,
    WorkerDied,
    encode_message,
    read_job,
    with_measurements,
    write_result,
)

PARENT_SECONDS = 1.0  # between looks at the parent on a file system without locks


def main(folder: str | os.PathLike) -> None:
    """Does the job in a folder, reports on it, and waits to be ended. Does not return."""
    prepare_process()
    folder = Path(folder)
    if not (folder / JOB).is_file():
        raise SystemExit(f"{folder}: there is no {JOB}; this is started by DivRegNetLib.run.worker.Worker")
    messages = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    parent = threading.Thread(target=_end_with_parent, args=(folder,), daemon=True)
    parent.start()

    def send(event: str, **values) -> None:
        messages.write(encode_message(event, **values))
        messages.flush()

    def progress(stage: str, fraction: float) -> None:
        send("progress", stage=stage, fraction=min(max(fraction, 0.0), 1.0))

    try:
        from DivRegNetLib.registration.pipeline import register

        job = read_job(folder)
        result = register(**job.images, **job.options, progress=progress)
        if job.references is not None:
            result = with_measurements(result, *measure(job.references, result))
        write_result(folder, result, job.inverse)
        send("done")
    except DivRegNetError as error:
        send("error", kind=type(error).__name__, message=str(error))
    except ImportError as error:
        send("error", kind=WorkerDied.__name__, message=missing_package(error))
    except Exception as error:
        traceback.print_exc()
        if is_out_of_memory(error):
            reason = " ".join(str(error).split())[:200]
            message = f"the memory ran out ({reason}): choose a coarser spacing, or device cpu"
            send("error", kind=DeviceError.__name__, message=message)
        else:
            send("error", kind=WorkerDied.__name__, message=f"the registration failed: {type(error).__name__}: {error}")
    parent.join()


def _end_with_parent(folder: Path) -> None:
    """Waits until the parent has ended, then ends this process and its children at once."""
    try:
        acquire(folder / PARENT).close()
    except LocksUnsupported:
        parent = os.getppid()
        while os.getppid() == parent:
            time.sleep(PARENT_SECONDS)
    shutil.rmtree(folder, ignore_errors=True)
    if os.name != "nt" and os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)
