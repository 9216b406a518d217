"""A cohort on real Dask workers, in processes of their own: what the local cohort gives, whatever happens to a worker.

A lease on its landmarks holds a pair where it is until the test lets go: the system makes whoever opens them wait.
"""

import contextlib
import csv
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from DivRegNetLib import models
from DivRegNetLib.io import atomic, images
from DivRegNetLib.io.landmarks import Landmarks, write_landmarks
from DivRegNetLib.options import Options
from DivRegNetLib.run import cohort
from DivRegNetLib.run.cli import main
from DivRegNetLib.run.cohort import dask as on_dask

distributed = pytest.importorskip("distributed", reason="needs the extra dask")
fcntl = pytest.importorskip("fcntl", reason="files are held by the locks of POSIX systems")
with_leases = pytest.mark.skipif(sys.platform != "linux", reason="leases on files are Linux's")

ANY_PORT = "127.0.0.1:0"
PATIENCE = 180  # seconds; a slow machine is no failure
SETTINGS = {"model": "tiny", "device": "cpu", "align": "none", "spacing": 12.0}
FLAGS = [text for key, value in SETTINGS.items() for text in (f"--{key}", str(value))]


@pytest.fixture(scope="module")
def cluster():
    """A scheduler and two worker processes that are started again when they die; a pair is given up at the second death."""
    import dask

    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 1}),
        distributed.LocalCluster(
            2, threads_per_worker=1, memory_limit=0, dashboard_address=ANY_PORT, silence_logs=50
        ) as own,
    ):
        yield own


@pytest.fixture
def client(cluster):
    with distributed.Client(cluster, set_as_default=False) as own:
        own.wait_for_workers(2, timeout=PATIENCE)
        yield own


@pytest.fixture
def one_thread():
    """Torch here as in the workers, where Dask gives it one thread: the order of sums is then the same."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def write_table(tmp_path, paint, grid, rigid, landmarks, tiny_model):
    """``names -> pairs.csv``: pairs of different motion; the moving landmarks are ``NAME.csv`` beside the table."""

    def write(*names: str) -> Path:
        images.write_image(paint(grid), tmp_path / "fixed.nii.gz")
        write_landmarks(Landmarks(landmarks, ("",) * len(landmarks)), tmp_path / "fixed.csv")
        lines = ["name,fixed,moving,fixed_landmarks,moving_landmarks"]
        for i, name in enumerate(names):
            images.write_image(paint(grid, rigid((2 * i, 0, 0))), tmp_path / f"{name}.nii.gz")
            write_landmarks(Landmarks(landmarks, ("",) * len(landmarks)), tmp_path / f"{name}.csv")
            lines.append(f"{name},fixed.nii.gz,{name}.nii.gz,fixed.csv,{name}.csv")
        (tmp_path / "pairs.csv").write_text("\n".join(lines))
        return tmp_path / "pairs.csv"

    return write


def wait_until(happened, what: str):
    """The first value of ``happened()`` that is true."""
    deadline = time.monotonic() + PATIENCE
    while not (value := happened()):
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.1)
    return value


class Held:
    """Puts a file under a lease: a process that opens it waits, up to the system's 45 s, until it is let go."""

    def __init__(self, path: Path) -> None:
        self.path, self.content, self._lease = path, path.read_bytes(), None
        self.hold()

    def hold(self) -> None:
        """A new file takes the place of the one that was held; who waits for that one goes on waiting."""
        fresh = self.path.with_suffix(".held")
        fresh.write_bytes(self.content)
        self._before, self._lease = self._lease, fresh.open("rb+")
        fcntl.fcntl(self._lease, fcntl.F_SETSIG, signal.SIGURG)  # that someone waits is looked up; this one is ignored
        fcntl.fcntl(self._lease, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fresh.replace(self.path)

    def waited_for(self) -> bool:
        return fcntl.fcntl(self._lease, fcntl.F_GETLEASE) != fcntl.F_WRLCK

    def let_go(self) -> None:
        self._lease.close()


@contextlib.contextmanager
def running(arguments: list[str]):
    """``main(arguments)`` beside the test; ends when it does. The list gets its exit code."""
    code: list[int] = []
    thread = threading.Thread(target=lambda: code.append(main(arguments)))
    thread.start()
    try:
        yield code
    finally:
        thread.join(PATIENCE)
        assert not thread.is_alive()


def kill_worker_of(name: str, held: Held, client, cluster) -> None:
    """SIGKILL to the worker process that is in the midst of a pair; the next one that takes it will wait, too."""
    wait_until(held.waited_for, f"{name} is being read")
    held.hold()
    working = client.processing()
    address = next(a for a, keys in working.items() if any(name in key for key in keys))
    nanny = next(n for n in cluster.workers.values() if n.worker_address == address)
    os.kill(nanny.pid, signal.SIGKILL)
    wait_until(lambda: address not in client.nthreads(), "the worker is gone")


def read_table(output: Path) -> list[dict]:
    with (output / cohort.TABLE).open() as file:
        return list(csv.DictReader(file))


def remains(output: Path) -> list[Path]:
    return [p for p in output.rglob(".divregnet*")]


def test_the_table_and_the_volumes_are_those_of_the_local_cohort(
    write_table, tmp_path, client, cluster, one_thread, capsys
):
    names = ["a", "b", "missing", "c", "d"]
    command = ["register", "--pairs", str(write_table(*names)), *FLAGS]
    (tmp_path / "missing.nii.gz").unlink()
    assert main([*command, "--output", str(tmp_path / "here")]) == 2
    with_dask = [*command, "--output", str(tmp_path / "there"), "--dask", cluster.scheduler_address]
    assert main(with_dask) == 2
    here, there = read_table(tmp_path / "here"), read_table(tmp_path / "there")
    assert [row["name"] for row in there] == names
    missing = there[2].pop("message")
    assert str(tmp_path / "missing.nii.gz") in missing
    assert socket.gethostname() in missing
    for row in (*here, *there):
        assert (row.pop("seconds") != "") == (row["status"] == "ok")
    here[2].pop("message")
    assert there == here
    for name in ("a", "b", "c", "d"):
        assert {p.name for p in (tmp_path / "there" / name).iterdir()} == {
            p.name for p in (tmp_path / "here" / name).iterdir()
        }
        np.testing.assert_array_equal(
            *(
                sitk.GetArrayFromImage(images.read_image(tmp_path / o / name / "warped.nii.gz"))
                for o in ("here", "there")
            )
        )
    loads = client.run(lambda: on_dask._load.cache_info().misses)
    assert set(loads.values()) <= {0, 1}
    assert 1 in loads.values()

    done = (tmp_path / "there" / "a" / "quality.json").stat().st_mtime_ns
    images.write_image(images.read_image(tmp_path / "a.nii.gz"), tmp_path / "missing.nii.gz")
    assert main(with_dask) == 0
    assert (tmp_path / "there" / "a" / "quality.json").stat().st_mtime_ns == done
    assert [row["status"] for row in read_table(tmp_path / "there")] == ["ok"] * 5


@with_leases
def test_a_killed_worker_costs_only_its_pair(write_table, tmp_path, client, cluster, capsys):
    table = write_table("poison", "a", "unlucky", "b")
    poison, unlucky = (Held(tmp_path / f"{name}.csv") for name in ("poison", "unlucky"))
    output = tmp_path / "out"
    with running(
        ["register", "--pairs", str(table), *FLAGS, "--output", str(output), "--dask", cluster.scheduler_address]
    ) as code:
        kill_worker_of("poison", poison, client, cluster)
        kill_worker_of("poison", poison, client, cluster)
        kill_worker_of("unlucky", unlucky, client, cluster)
        unlucky.let_go()
    assert code == [2]
    rows = read_table(output)
    assert [row["name"] for row in rows] == ["poison", "a", "unlucky", "b"]
    assert [row["status"] for row in rows] == ["failed", "ok", "ok", "ok"]
    assert "2 worker processes died" in rows[0]["message"]
    assert not remains(output)
    assert not (output / "poison").exists()


@with_leases
def test_a_client_that_leaves_calls_back_what_the_workers_do(write_table, tmp_path, client, cluster):
    pairs = cohort.read_pairs(write_table("a", "late"))
    held, output = Held(tmp_path / "late.csv"), tmp_path / "out"
    rows = on_dask.rows(pairs, output, Options(**SETTINGS), cluster.scheduler_address, overwrite=False, preview=False)
    assert next(rows)["name"] == "a"
    wait_until(held.waited_for, "the second pair is at work")
    rows.close()
    wait_until(lambda: not any(client.processing().values()), "the scheduler has forgotten the pair")
    held.let_go()

    def idle() -> bool:
        return not any(client.run(lambda dask_worker: len(dask_worker.state.executing)).values())

    wait_until(idle, "the worker has let go of it")
    assert sorted(p.name for p in output.iterdir()) == ["a", cohort.TABLE]


@with_leases
def test_ctrl_c_ends_local_processes_and_leaves_whole_folders_only(write_table, tmp_path):
    table, output = write_table("a", "stuck"), tmp_path / "out"
    held = Held(tmp_path / "stuck.csv")
    command = [sys.executable, "-m", "DivRegNetLib.run.cli", "register", "--pairs", str(table), "--output", str(output)]
    process = subprocess.Popen(
        [*command, *FLAGS, "--dask", "local:1"],
        cwd=Path(cohort.__file__).parents[3],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a group of its own, to which a terminal's Ctrl-C goes
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what a shell runs with & ignores it
    )
    try:
        wait_until(lambda: held.waited_for() or process.poll() is not None, "the second pair is at work")
        assert process.poll() is None, process.stderr.read()
        os.killpg(process.pid, signal.SIGINT)
        error = process.communicate(timeout=PATIENCE)[1]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130, error
    assert error.splitlines()[-1] == "divregnet: interrupted"
    assert "Traceback" not in error
    assert [(row["name"], row["status"]) for row in read_table(output)] == [("a", "ok")]
    assert sorted(p.name for p in output.iterdir()) == ["a", cohort.TABLE]
    assert not remains(output)


@pytest.fixture
def silent_listener():
    """The address of a port where something listens that is no scheduler."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"tcp://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "silent", "wobbly://a:1", "local:none"])
def test_an_address_that_is_none_is_one_line_and_exit_code_2(
    address, silent_listener, write_table, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(on_dask, "CONNECT_SECONDS", 1.0)
    address = silent_listener if address == "silent" else address
    output = tmp_path / "out"
    command = ["register", "--pairs", str(write_table("a")), *FLAGS, "--output", str(output), "--dask", address]
    assert main(command) == 2
    printed = [line for line in capsys.readouterr().err.splitlines() if line.startswith("divregnet")]
    assert len(printed) == 1
    assert address in printed[0]
    assert not output.exists()


def test_a_scheduler_without_workers_is_not_waited_for_without_end(write_table, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(on_dask, "WORKERS_SECONDS", 1.0)
    command = ["register", "--pairs", str(write_table("a")), *FLAGS, "--output", str(tmp_path / "out")]
    with distributed.LocalCluster(n_workers=0, dashboard_address=ANY_PORT, silence_logs=50) as empty:
        assert main([*command, "--dask", empty.scheduler_address]) == 2
    assert "no workers" in capsys.readouterr().err


def test_a_worker_that_does_not_see_the_output_folder_writes_nowhere_and_says_so(write_table, tmp_path, client):
    pair = cohort.read_pairs(write_table("a"))["a"].paths()
    job = ("a", pair, tmp_path / "out", SETTINGS, "", False)
    row = client.submit(on_dask.register_pair, *job).result(timeout=PATIENCE)
    assert row["status"] == "failed"
    assert str(tmp_path / "out") in row["message"]
    assert socket.gethostname() in row["message"]
    assert not (tmp_path / "out").exists()


def test_a_worker_with_other_weights_of_that_name_fails_the_pair(write_table, tmp_path, client, tiny_model):
    pair = cohort.read_pairs(write_table("a"))["a"].paths()
    atomic.write_text("", tmp_path / "out" / cohort.TABLE)
    options = SETTINGS | {"model": str(models.find(tiny_model))}
    job = ("a", pair, tmp_path / "out", options, "another checksum", False)
    row = client.submit(on_dask.register_pair, *job).result(timeout=PATIENCE)
    assert row["status"] == "failed"
    assert "other weights" in row["message"]


def test_without_dask_the_message_says_what_to_install(write_table, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "distributed", None)
    command = ["register", "--pairs", str(write_table("a")), *FLAGS, "--output", str(tmp_path / "out")]
    assert main([*command, "--dask", "local:1"]) == 2
    assert "divregnet[dask]" in capsys.readouterr().err


def test_dask_is_for_cohorts(capsys):
    assert main(["register", "a.nii", "b.nii", "--output", "out", "--dask", "local:1"]) == 2
    assert "--pairs" in capsys.readouterr().err


def test_what_a_killed_process_left_is_cleared_away_by_the_next(write_table, tmp_path):
    pairs = cohort.read_pairs(write_table("a"))
    left = tmp_path / "out" / "a" / f"{atomic.STAGING}left"
    atomic.write_text("half", left / "warped.nii.gz")
    assert cohort.register_pairs(pairs, tmp_path / "out", Options(**SETTINGS))[0]["status"] == "ok"
    assert not remains(tmp_path / "out")


def test_a_result_that_cannot_take_its_place_leaves_no_half_written_folder(write_table, tmp_path):
    pairs = cohort.read_pairs(write_table("a"))
    taken = tmp_path / "out" / "a" / "warped.nii.gz"
    taken.mkdir(parents=True)
    row = cohort.register_pairs(pairs, tmp_path / "out", Options(**SETTINGS))[0]
    assert row["status"] == "failed"
    assert str(taken.parent) in row["message"]
    assert list(taken.parent.iterdir()) == [taken]
