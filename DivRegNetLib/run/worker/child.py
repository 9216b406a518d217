"""The worker's process: does the jobs in its folder and reports on them. torch is imported only when the first job begins, or
while the process warms up for it."""

import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from DivRegNetLib.errors import DeviceError, DivRegNetError, is_out_of_memory, missing_package
from DivRegNetLib.io.locks import LocksUnsupported, acquire
from DivRegNetLib.models import Cache
from DivRegNetLib.quality.references import measure
from DivRegNetLib.registration import memory
from DivRegNetLib.run.process import prepare_process, without_collection
from DivRegNetLib.run.worker.process import remove_files
from DivRegNetLib.run.worker.protocol import (
    JOB,
    PARENT,
    SPARE_BYTES,
    WORKER,
    WorkerDied,
    encode_message,
    job_folder,
    read_job,
    with_measurements,
    write_result,
)
from DivRegNetLib.run.worker.warm_up import WarmUp

PARENT_SECONDS = 1.0  # between looks at the parent on a file system without locks
JOB_SECONDS = 0.02  # between looks for the next job
MEMORY_SECONDS = 2.0  # between looks at the memory while there is no job
SPARE_ON_DEVICE = 0.1  # of the memory of a graphics card


def main(folder: str | os.PathLike) -> None:
    """Does the jobs in a folder and reports on them. Does not return."""
    prepare_process()
    folder = Path(folder)
    try:
        settings = json.loads((folder / WORKER).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SystemExit(f"{folder}: there is no {WORKER}; this is started by DivRegNetLib.run.worker.Worker") from None
    messages = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    threading.Thread(target=_end_with_parent, args=(folder,), daemon=True).start()

    def send(event: str, **values) -> None:
        messages.write(encode_message(event, **values))
        messages.flush()

    cache = Cache()
    warm_up = WarmUp(settings["warm_up"], cache) if "warm_up" in settings else None
    number = 1
    while _wait_for(job_folder(folder, number) / JOB, settings.get("idle_seconds"), warm_up):
        send("started")
        if warm_up is not None:
            warm_up.stop()
            warm_up = None
        _do(job_folder(folder, number), cache, send)
        _give_back_memory()
        number += 1
    remove_files(folder)
    os._exit(0)


def _do(folder: Path, cache: Cache, send: Callable) -> None:
    """Does a job; reports the result or an error."""

    def progress(stage: str, fraction: float) -> None:
        send("progress", stage=stage, fraction=min(max(fraction, 0.0), 1.0))

    try:
        with without_collection():
            from DivRegNetLib.registration.pipeline import register

        job = read_job(folder)
        result = register(**job.images, **job.options, inverse=job.inverse, progress=progress, load=cache.load)
        if job.references is not None:
            result = with_measurements(result, *measure(job.references, result))
        write_result(folder, result)
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


def _wait_for(job: Path, idle_seconds: float | None, warm_up: WarmUp | None) -> bool:
    """Waits for a job; False where none has come for so long, or others need the memory. None: waits for ever."""
    started = looked = time.monotonic()
    while not job.is_file():
        time.sleep(JOB_SECONDS)
        now = time.monotonic()
        if idle_seconds is None:
            continue
        if now - started > idle_seconds:
            return False
        if now - looked > MEMORY_SECONDS and (warm_up is None or warm_up.is_done):
            looked = now
            if _memory_is_short():
                return False
    return True


def _memory_is_short() -> bool:
    """Whether others need what this process holds in main memory or on a graphics card."""
    if memory.available() < SPARE_BYTES:
        return True
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    free, total = torch.cuda.mem_get_info()
    return free < SPARE_ON_DEVICE * total


def _give_back_memory() -> None:
    """Returns what a job has left, in main memory and on a graphics card."""
    memory.give_back()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


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
