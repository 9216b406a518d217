"""Volumes made by several processes, each of one thread."""

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
    """Every task with its record or what is broken, as they end.

    Raises:
        DeviceError: the memory ran out.
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
            f"a worker of {workers} ended, most likely because the memory ran out; give fewer --workers. What is "
            "prepared is kept"
        ) from error


def _start_worker() -> None:
    """One thread; Ctrl-C is the parent's to handle; the end of the parent, however it comes, is the end of the worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """As in a worker, so that a sum comes out the same in whichever process it is made."""
    threads = torch.get_num_threads(), sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    torch.set_num_threads(1)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads[0])
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads[1])
