"""A cohort on Dask workers, one pair at a time in each. This is the only module that knows Dask.

The client, which is the process of the command line, submits no more pairs than there are workers: no pair waits in a
worker's queue, so a worker that dies takes one pair with it. Dask then gives that pair to another worker, and gives it up
after a few deaths. Files are not transferred: client and workers see the same files at the same paths. The scheduler
imports this module too, so torch is imported on the workers only.
"""

import asyncio
import contextlib
import functools
import logging
import os
import queue
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from DivRegNetLib import models
from DivRegNetLib.errors import DivRegNetError, InputError, ModelError
from DivRegNetLib.io.atomic import write_text
from DivRegNetLib.io.output_folder import clear_abandoned
from DivRegNetLib.options import Options
from DivRegNetLib.run.cohort.pairs import Pair
from DivRegNetLib.run.cohort.results import TABLE, csv_text, failed_row
from DivRegNetLib.run.threads import COUNTS, prepare_threads, usable_processors

if TYPE_CHECKING:
    import distributed

LOCAL = "local:"
CONNECT_SECONDS = 10.0  # for the scheduler to answer
WORKERS_SECONDS = 60.0  # without a single worker, at the start or after all were lost
POLL_SECONDS = 1.0  # between counts of the workers

_one_at_a_time = threading.Lock()  # a worker's process may have several threads


def rows(
    pairs: dict[str, Pair], output: Path, options: Options, address: str, *, overwrite: bool, preview: bool
) -> Iterator[dict]:
    """The rows of a cohort as pairs finish; see :func:`DivRegNetLib.run.cohort.register_pairs`.

    Closing the iterator, or an exception in it, cancels the work of the workers.

    Args:
        address: of a scheduler, such as ``tcp://HOST:PORT``; or ``local:N``, N processes on this machine.
    Raises:
        InputError: Dask is not installed, the address is wrong, nothing answers there, or there are no workers.
        ModelError: the model cannot be used.
        DivRegNetError: the scheduler was lost.
    """
    try:
        import distributed
        from distributed.utils import silence_logging_cmgr
    except ImportError as error:
        raise InputError('Dask is not installed: pip install "divregnet[dask]" (in a checkout: ".[dask]")') from error

    card = models.find(options.model)
    sha256 = models.read_card(card).sha256
    # The bundled models are found by name wherever a worker's library is installed.
    model = options.model if card.parent == models.bundled_folder() else str(card.absolute())
    settings = options.as_arguments() | {"model": model}
    output = output.absolute()
    waiting = [(name, {key: path.absolute() for key, path in pair.paths().items()}) for name, pair in pairs.items()][
        ::-1
    ]
    running: dict[distributed.Future, str] = {}
    finished: queue.SimpleQueue = queue.SimpleQueue()
    try:
        with silence_logging_cmgr(logging.CRITICAL), _scheduler(address) as scheduler, _client(scheduler) as client:
            if not (output / TABLE).exists():  # workers recognize the folder by it
                write_text(csv_text([]), output / TABLE)
            last_worker = time.monotonic()
            while waiting or running:
                workers = _count_workers(client, address)
                if workers:
                    last_worker = time.monotonic()
                elif time.monotonic() - last_worker > WORKERS_SECONDS:
                    raise InputError(f"{address}: the scheduler has no workers; start some and repeat the command")
                while waiting and len(running) < workers:
                    name, pair = waiting.pop()
                    job = (name, pair, output, settings, sha256, overwrite, preview)
                    future = client.submit(register_pair, *job, key=("register", name, uuid.uuid4().hex))
                    running[future] = name
                    future.add_done_callback(finished.put)
                with contextlib.suppress(queue.Empty):
                    future = finished.get(timeout=POLL_SECONDS)
                    yield _row(future, running.pop(future), output, address)
    finally:
        if address.startswith(LOCAL):
            for name in running.values():
                clear_abandoned(output / name)


@contextlib.contextmanager
def _scheduler(address: str) -> Iterator[str]:
    """The address of a scheduler; for ``local:N``, of one that is started here with N workers."""
    if not address.startswith(LOCAL):
        yield address
        return
    import dask
    import distributed

    number = address.removeprefix(LOCAL)
    if not (number.isdecimal() and int(number)):
        raise InputError(f"{address}: a number of processes is expected, as in {LOCAL}2")
    threads = threads_of_worker(int(number))
    settings = {"distributed.nanny.pre-spawn-environ": threads, "distributed.scheduler.allowed-failures": 1}
    with (
        dask.config.set(settings),
        distributed.LocalCluster(
            n_workers=int(number),
            threads_per_worker=1,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            memory_limit=0,  # the system's own, not a share of it
            preload=[__name__],
            silence_logs=logging.CRITICAL,
        ) as cluster,
    ):
        yield cluster.scheduler_address


def threads_of_worker(number: int, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables of one of several workers on this machine: its share of the processors, or fewer threads if the user says
    so, which wait without spinning unless the user wants it."""
    share = max(usable_processors() // number, 1)
    given = {name: environment.get(name, "") for name in COUNTS}
    variables = {name: str(min(int(n), share) if n.isdecimal() and int(n) else share) for name, n in given.items()}
    if "OMP_WAIT_POLICY" in environment:
        variables["OMP_WAIT_POLICY"] = environment["OMP_WAIT_POLICY"]
    prepare_threads(variables)
    return variables


def dask_setup(worker: object) -> None:
    """Called by Dask in every process of ``local:N``: only the client reacts to Ctrl-C in the terminal, and ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def _client(address: str) -> Iterator["distributed.Client"]:
    import distributed

    try:
        with ThreadPoolExecutor(1) as thread:  # the caller may run an event loop of its own
            thread.submit(lambda: asyncio.run(_check_scheduler(address))).result()
        client = distributed.Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError, RuntimeError, asyncio.TimeoutError) as error:
        reason = str(error) or f"no answer for {CONNECT_SECONDS:g} s"
        raise InputError(f"{address}: no Dask scheduler answers there ({reason})") from error
    with client:
        yield client


async def _check_scheduler(address: str) -> None:
    """Raises soon where something other than Dask listens, for whose greeting a client would wait forever."""
    from distributed import Security
    from distributed.comm import connect

    arguments = Security().get_connection_args("client")
    comm = await asyncio.wait_for(connect(address, timeout=CONNECT_SECONDS, **arguments), CONNECT_SECONDS)
    await comm.close()


def _count_workers(client: "distributed.Client", address: str) -> int:
    try:
        return len(client.nthreads())
    except OSError as error:
        raise _lost(address) from error


def _lost(address: str) -> DivRegNetError:
    return DivRegNetError(f"{address}: the scheduler was lost; repeat the command to continue")


def _row(future: "distributed.Future", name: str, output: Path, address: str) -> dict:
    """The row of a pair that has finished or failed."""
    from distributed import KilledWorker

    if future.status == "finished":
        return future.result()
    if future.status != "error":
        raise _lost(address)
    error = future.exception()
    if not isinstance(error, KilledWorker):
        return failed_row(name, f"unexpected {type(error).__name__}: {error}")
    clear_abandoned(output / name)
    return failed_row(
        name,
        f"KilledWorker: {error.allowed_failures + 1} worker processes died while they registered this pair, the last at "
        f"{error.last_worker.address}; possibly their memory ran out",
    )


def register_pair(
    name: str, pair: dict[str, Path], output: Path, options: dict, sha256: str, overwrite: bool, preview: bool = True
) -> dict:
    """Runs on a worker: registers one pair and returns its row; the message of a failed one ends with the worker's host.

    Args:
        pair: fields of :class:`~DivRegNetLib.run.cohort.pairs.Pair`; like ``output``, absolute paths.
        options: fields of :class:`~DivRegNetLib.options.Options`.
        sha256: of the weights that the client has.
    Raises:
        Cancelled: the client has gone.
    """
    from distributed import get_worker

    prepare_threads()  # before the first pair imports torch
    from DivRegNetLib.run.cohort.register_row import register_row

    worker = get_worker()
    task = worker.state.tasks[worker.get_current_task()]
    with _one_at_a_time:
        if (output / TABLE).exists():
            row = register_row(
                name,
                Pair(**pair),
                output,
                Options(**options),
                lambda: _load(options["model"], options["device"], sha256),
                overwrite=overwrite,
                preview=preview,
                progress=lambda *_: task.state != "cancelled",
            )
        else:
            row = failed_row(name, f"{output}: not the client's folder; workers need the same files at the same paths")
    if row["status"] != "ok":
        row["message"] += f" (on {socket.gethostname()})"
    return row


@functools.lru_cache(maxsize=1)
def _load(model: str, device: str, sha256: str) -> models.Model:
    """The model, which stays loaded in the worker's process.

    Raises:
        ModelError: there is no such model here, or its weights are not the client's.
    """
    from DivRegNetLib.core.device import pick_device

    loaded = models.load(model, pick_device(device))
    if loaded.card.sha256 != sha256:
        raise ModelError(f"{model}: the worker has other weights of that name; install the same version everywhere")
    return loaded
