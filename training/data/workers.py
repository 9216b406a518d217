"""Worker processes for the preparation of volumes, with one thread each."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

import SimpleITK as sitk
import torch

from DivRegNetLib.errors import DeviceError
from training.data.broken import Broken
from training.data.volumes import Task, make


def run(tasks: list[Task], workers: int) -> Iterator[tuple[Task, dict | Broken]]:
    """Processes all tasks and yields each one with its record or error when it is finished.

    Raises:
        DeviceError: out of memory.
    """
    workers = min(workers, len(tasks))
    try:
        if workers <= 1:
            with _one_thread():
                for task in tasks:
                    yield task, make(task)
            return
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)
        try:
            futures = {pool.submit(make, task): task for task in tasks}
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)
    except (BrokenProcessPool, MemoryError) as error:
        raise DeviceError(
            f"one of {workers} workers ended, most likely for lack of memory; give fewer --workers. The volumes that are "
            "prepared already are kept"
        ) from error


def _start_worker() -> None:
    """Uses one thread, leaves Ctrl-C to the parent process, and ends when the parent process ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Uses one thread, as a worker does, so that results do not depend on the number of workers."""
    threads = torch.get_num_threads(), sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    torch.set_num_threads(1)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads[0])
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads[1])
