"""A cohort on Dask workers, each pair in one of them; here is all that knows Dask.

The client, which is the process that was asked, hands out no more pairs than there are workers: none waits in a worker's
queue, so a worker that dies takes one pair with it. Dask then gives that pair to another worker, and after a few deaths
gives it up. Files do not travel: client and workers see the same ones at the same paths. The scheduler imports this
file too, so torch is imported on the workers alone.
"""

import asyncio
import contextlib
import functools
import logging
import queue
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from DivRegNetLib import models
from DivRegNetLib.errors import DivRegNetError, InputError, ModelError
from DivRegNetLib.io import atomic, claim
from DivRegNetLib.options import Options

if TYPE_CHECKING:
    import distributed

    from DivRegNetLib.run.cohort import Pair

LOCAL = "local:"
CONNECT_SECONDS = 10.0  # for the scheduler to answer
WORKERS_SECONDS = 60.0  # without a single worker, at the start or after all were lost
LOOK_SECONDS = 1.0  # between looks at how many workers there are

_one_at_a_time = threading.Lock()  # a worker process may have several threads


def register_pairs(
    pairs: dict[str, "Pair"], output: Path, options: Options, address: str, *, overwrite: bool
) -> Iterator[dict]:
    """The rows of a cohort, see :func:`DivRegNetLib.run.cohort.register_pairs`, as pairs finish.

    Closing the iterator, or an exception in it, calls back what the workers do.

    Args:
        address: of a scheduler, as ``tcp://HOST:PORT``; or ``local:N``, N processes on this machine.
    Raises:
        InputError: Dask is not installed; the address is wrong, nothing answers there, or there are no workers.
        ModelError: the model cannot be used.
        DivRegNetError: the scheduler was lost.
    """
    from DivRegNetLib.run import cohort

    try:
        import distributed
        from distributed.utils import silence_logging_cmgr
    except ImportError as error:
        raise InputError('Dask is not installed: pip install "divregnet[dask]" (in a checkout: ".[dask]")') from error

    card = models.find(options.model)
    sha256 = models.read_card(card).sha256
    own = card.parent != models.bundled_folder()  # the bundled ones come with the library, wherever that is
    settings = options.as_arguments() | {"model": str(card.absolute()) if own else options.model}
    output = output.absolute()
    waiting = [
        (name, {k: path.absolute() for k, path in asdict(pair).items() if path is not None})
        for name, pair in pairs.items()
    ][::-1]
    running: dict[distributed.Future, str] = {}
    finished: queue.SimpleQueue = queue.SimpleQueue()
    try:
        with silence_logging_cmgr(logging.CRITICAL), _scheduler(address) as scheduler, _client(scheduler) as client:
            if not (output / cohort.TABLE).exists():  # workers recognize the folder by it
                atomic.write_text(cohort.csv_text([]), output / cohort.TABLE)
            seen = time.monotonic()
            while waiting or running:
                workers = _count_workers(client, address)
                if workers:
                    seen = time.monotonic()
                elif time.monotonic() - seen > WORKERS_SECONDS:
                    raise InputError(f"{address}: the scheduler has no workers; start some and run this again to go on")
                while waiting and len(running) < workers:
                    name, pair = waiting.pop()
                    job = (name, pair, output, settings, sha256, overwrite)
                    future = client.submit(register_pair, *job, key=("register", name, uuid.uuid4().hex))
                    running[future] = name
                    future.add_done_callback(finished.put)
                with contextlib.suppress(queue.Empty):
                    future = finished.get(timeout=LOOK_SECONDS)
                    yield _row(future, running.pop(future), output, address)
    finally:
        if address.startswith(LOCAL):
            for name in running.values():
                claim.tidy(output / name)


@contextlib.contextmanager
def _scheduler(address: str) -> Iterator[str]:
    """The address of the scheduler that is meant; for ``local:N``, of one started here with N workers."""
    if not address.startswith(LOCAL):
        yield address
        return
    import dask
    import distributed

    number = address.removeprefix(LOCAL)
    if not (number.isdecimal() and int(number)):
        raise InputError(f"{address}: a number of processes is expected, as in {LOCAL}2")
    share = max(1, dask.system.CPU_COUNT // int(number))
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"), share)
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


def dask_setup(worker: object) -> None:
    """Dask calls this in every process of ``local:N``: Ctrl-C in the terminal is for the client, which ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def _client(address: str) -> Iterator["distributed.Client"]:
    import distributed

    try:
        with ThreadPoolExecutor(1) as beside:  # the caller may run an event loop of its own
            beside.submit(lambda: asyncio.run(_knock(address))).result()
        client = distributed.Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError, RuntimeError, asyncio.TimeoutError) as error:
        reason = str(error) or f"silent for {CONNECT_SECONDS:g} s"
        raise InputError(f"{address}: no Dask scheduler answers there ({reason})") from error
    with client:
        yield client


async def _knock(address: str) -> None:
    """Fails soon where something else than Dask listens; a client would wait for its greeting without end."""
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
    return DivRegNetError(f"{address}: the scheduler was lost; run this again to go on")


def _row(future: "distributed.Future", name: str, output: Path, address: str) -> dict:
    """The row of a pair that is finished, one way or another."""
    from distributed import KilledWorker

    from DivRegNetLib.run import cohort

    if future.status == "finished":
        return future.result()
    if future.status != "error":
        raise _lost(address)
    error = future.exception()
    if not isinstance(error, KilledWorker):
        return cohort.failed_row(name, f"unexpected {type(error).__name__}: {error}")
    claim.tidy(output / name)
    return cohort.failed_row(
        name,
        f"KilledWorker: {error.allowed_failures + 1} worker processes died while they registered this pair, the last at "
        f"{error.last_worker.address}; perhaps their memory ran out",
    )


def register_pair(name: str, pair: dict[str, Path], output: Path, options: dict, sha256: str, overwrite: bool) -> dict:
    """What a worker does: registers one pair and returns its row; the reason of a failure ends with the worker's host.

    Args:
        pair: fields of :class:`DivRegNetLib.run.cohort.Pair`; like ``output``, absolute paths.
        options: fields of :class:`~DivRegNetLib.options.Options`.
        sha256: of the weights that the client has.
    Raises:
        Cancelled: the client left.
    """
    from distributed import get_worker

    from DivRegNetLib.run import cohort

    worker = get_worker()
    task = worker.state.tasks[worker.get_current_task()]
    with _one_at_a_time:
        if (output / cohort.TABLE).exists():
            row = cohort.register_row(
                name,
                cohort.Pair(**pair),
                output,
                Options(**options),
                lambda: _load(options["model"], options["device"], sha256),
                overwrite=overwrite,
                progress=lambda *_: task.state != "cancelled",
            )
        else:
            row = cohort.failed_row(name, f"{output}: not the folder that the client sees; workers need the same paths")
    if row["status"] != "ok":
        row["message"] += f" (on {socket.gethostname()})"
    return row


@functools.lru_cache(maxsize=1)
def _load(model: str, device: str, sha256: str) -> models.Model:
    """A model stays loaded in a worker process; other weights are another model.

    Raises:
        ModelError: there is no such model here, or its weights are not the client's.
    """
    from DivRegNetLib.core.device import pick_device

    loaded = models.load(model, pick_device(device))
    if loaded.card.sha256 != sha256:
        raise ModelError(f"{model}: the worker has other weights of that name; install the same version everywhere")
    return loaded
