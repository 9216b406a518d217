"""Real worker processes that do one job after another: as a new process would, and nothing of a job remains."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from processes import PATIENCE, is_alive, wait_for

from DivRegNetLib import models
from DivRegNetLib.core.composites import field_of
from DivRegNetLib.errors import Cancelled, InputError, ModelError
from DivRegNetLib.registration.regnet import RegNet
from DivRegNetLib.run.worker import Standby, Worker, WorkerDied, process, warm_up

OPTIONS = {"model": "tiny", "device": "cpu", "align": "none"}
LONG = OPTIONS | {"refine": 100000, "spacing": 1.5}
MOST_GROWTH = 8e6  # bytes of the process per job

posix = pytest.mark.skipif(os.name == "nt", reason="signals")
linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc")


@pytest.fixture
def pair(grid, moving_grid, paint, other_contrast):
    """The phantom on two oblique grids, whole numbers in the moving image."""
    return paint(grid), sitk.Cast(paint(moving_grid, contrast=other_contrast) * 1000, sitk.sitkInt16)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Where the workers' folders are made; a function that lists those there are."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    return lambda: list(place.iterdir())


@pytest.fixture
def standby(folders):
    kept = Standby()
    yield kept
    kept.close()
    assert folders() == []


def same(one, two) -> bool:
    """Whether two results are the same, bit by bit."""
    images = [[r.warped, field_of(r.transform), field_of(r.inverse)] for r in (one, two)]
    arrays = [[sitk.GetArrayFromImage(image) for image in each] for each in images]
    records = [(r.quality, r.settings, r.warnings, r.card, r.initial.tolist()) for r in (one, two)]
    return all(map(np.array_equal, *arrays)) and records[0] == records[1]


def kept_files(folders) -> list[str]:
    """Names of what is in the workers' folders."""
    return sorted(path.name for folder in folders() for path in folder.rglob("*"))


WAITING = ["parent", "stderr", "stdout", "worker.json"]


def test_the_next_job_is_done_in_the_same_process_as_a_new_one_would(pair, tiny_model, folders, standby):
    fresh = Worker(*pair, **OPTIONS).start().result(PATIENCE)
    with torch.random.fork_rng(devices=[]):
        other = Worker(
            pair[1], pair[0], standby=standby, **(OPTIONS | {"align": "rigid", "refine": 2, "error_map": True})
        )
        other.start().result(PATIENCE)
    pid = other.pid
    assert is_alive(pid) and kept_files(folders) == WAITING
    second = Worker(*pair, standby=standby, **OPTIONS).start()
    assert second.pid == pid
    assert same(second.result(PATIENCE), fresh)
    assert is_alive(pid) and kept_files(folders) == WAITING
    assert not any(line in second.log for line in other.log)


def test_an_input_that_cannot_be_used_does_not_cost_the_process(pair, tiny_model, folders, standby, grid):
    empty = grid.image(np.zeros(grid.shape, np.uint8))
    pids = []
    for options, kind in (({"fixed_mask": empty}, InputError), ({"model": "no such"}, ModelError)):
        worker = Worker(*pair, standby=standby, **(OPTIONS | options)).start()
        with pytest.raises(kind):
            worker.result(PATIENCE)
        assert kept_files(folders) == WAITING
        pids.append(worker.pid)
    last = Worker(*pair, standby=standby, **OPTIONS).start()
    assert last.result(PATIENCE) and {*pids} == {last.pid}


def test_after_cancel_the_next_job_has_a_new_process(pair, tiny_model, folders, standby):
    first = Worker(*pair, standby=standby, **OPTIONS).start()
    fresh = first.result(PATIENCE)
    cancelled = Worker(*pair, standby=standby, **LONG).start()
    wait_for(lambda: any(e.stage == "refine" for e in cancelled.poll()))
    started = time.monotonic()
    cancelled.cancel()
    assert time.monotonic() - started < 2  # what the user is promised
    assert not is_alive(first.pid) and folders() == [] and standby.pid is None
    with pytest.raises(Cancelled):
        cancelled.result()
    next_one = Worker(*pair, standby=standby, **OPTIONS).start()
    assert same(next_one.result(PATIENCE), fresh) and next_one.pid != first.pid


@posix
def test_a_process_that_was_killed_while_it_waited_costs_no_job(pair, tiny_model, folders, standby):
    first = Worker(*pair, standby=standby, **OPTIONS).start()
    fresh = first.result(PATIENCE)
    os.kill(first.pid, signal.SIGKILL)
    wait_for(lambda: standby.pid is None)
    second = Worker(*pair, standby=standby, **OPTIONS).start()
    assert second.pid != first.pid and same(second.result(PATIENCE), fresh)
    # Now it dies when the job has been written already, and before it has seen it.
    os.kill(second.pid, signal.SIGSTOP)
    third = Worker(*pair, standby=standby, **OPTIONS).start()
    assert third.pid == second.pid
    os.kill(second.pid, signal.SIGKILL)
    assert same(third.result(PATIENCE), fresh) and third.pid != second.pid
    assert kept_files(folders) == WAITING


@posix
def test_a_process_that_is_killed_in_its_second_job_says_so_and_leaves_nothing(pair, tiny_model, folders, standby):
    first = Worker(*pair, standby=standby, **OPTIONS).start()
    first.result(PATIENCE)
    second = Worker(*pair, standby=standby, **LONG).start()
    wait_for(lambda: any(e.stage == "refine" for e in second.poll()))
    os.kill(second.pid, signal.SIGKILL)
    with pytest.raises(WorkerDied, match=r"signal 9 \(SIGKILL\)"):
        second.result(PATIENCE)
    assert second.pid == first.pid and folders() == []
    assert Worker(*pair, standby=standby, **OPTIONS).start().result(PATIENCE)


@posix
@pytest.mark.parametrize("why", ["idle", "memory"])
def test_a_process_that_nobody_needs_ends_and_removes_its_folder(folders, standby, monkeypatch, tmp_path, why):
    python = tmp_path / "interpreter"  # that says how much memory there is
    python.write_text(
        f"#!{sys.executable}\nimport sys\nfrom DivRegNetLib.run.worker import child\n"
        f"child.memory.available = lambda: {0 if why == 'memory' else 1e12}\nchild.MEMORY_SECONDS = 0.1\n"
        "child.main(sys.argv[-1])\n"
    )
    python.chmod(0o755)
    monkeypatch.setattr(process, "IDLE_SECONDS", 0.2 if why == "idle" else 1000)
    monkeypatch.setattr("DivRegNetLib.run.worker.standby.available", lambda: 1e12)
    standby.prepare(model="no such", device="cpu", python=python)
    pid = standby.pid
    assert pid is not None
    wait_for(lambda: folders() == [])
    wait_for(lambda: standby.pid is None)


def test_where_memory_is_short_no_process_is_started_in_advance(folders, standby, monkeypatch):
    monkeypatch.setattr("DivRegNetLib.run.worker.standby.available", lambda: 1.5e9)
    standby.prepare()
    assert standby.pid is None and folders() == []


PARENT = """
import sys, time
import SimpleITK as sitk
from DivRegNetLib.run.worker import Standby, Worker
fixed, moving = (sitk.ReadImage(path) for path in sys.argv[1:3])
standby = Standby()
worker = Worker(fixed, moving, standby=standby, model="tiny", device="cpu", align="none").start()
worker.result(120)
assert "torch" not in sys.modules and standby.pid == worker.pid
print(worker.pid, flush=True)
{ending}
"""


@posix
@pytest.mark.parametrize("ending", ["", "time.sleep(600)"], ids=["returns", "killed"])
def test_when_the_parent_ends_the_waiting_process_and_its_folder_go(pair, tiny_model, folders, tmp_path, ending):
    paths = [str(tmp_path / f"{name}.mha") for name in ("fixed", "moving")]
    for path, image in zip(paths, pair, strict=True):
        sitk.WriteImage(image, path)
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "TMPDIR": str(tmp_path / "temporary")}
    command = [sys.executable, "-c", PARENT.format(ending=ending), *paths]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as parent:
        pid = int(parent.stdout.readline())
        if ending:
            assert is_alive(pid) and len(folders()) == 1
            parent.kill()
    wait_for(lambda: folders() == [])
    wait_for(lambda: not is_alive(pid))


def test_a_model_that_was_replaced_between_two_jobs_is_loaded_again(pair, tiny_model, tmp_path, standby):
    first = Worker(*pair, standby=standby, **OPTIONS).start()
    before = first.result(PATIENCE)
    folder = tmp_path / "models"
    card, loaded = models.read_card(folder / "tiny.json"), models.load("tiny")
    other = RegNet(loaded.regnet.config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        torch.nn.init.normal_(other.head.weight, std=0.05)
    models.save(folder, card, other, loaded.kldivnet)
    second = Worker(*pair, standby=standby, **OPTIONS).start()
    after = second.result(PATIENCE)
    assert second.pid == first.pid and not same(after, before)
    assert same(after, Worker(*pair, **OPTIONS).start().result(PATIENCE))
    (folder / "tiny.safetensors").write_bytes(b"damaged")
    with pytest.raises(ModelError, match="checksum"):
        Worker(*pair, standby=standby, **OPTIONS).start().result(PATIENCE)


def test_a_job_with_other_surroundings_gets_a_process_of_its_own(pair, tiny_model, standby, tmp_path, monkeypatch):
    """Variables such as the number of threads or the models' folder are read by libraries when they are loaded."""
    pids = [Worker(*pair, standby=standby, **OPTIONS).start()]
    pids[-1].result(PATIENCE)
    environment = os.environ | {"DIVREGNET_NOTHING": "1"}
    pids.append(Worker(*pair, standby=standby, environment=environment, **OPTIONS).start())
    pids[-1].result(PATIENCE)
    assert not is_alive(pids[0].pid)
    monkeypatch.chdir(tmp_path)  # names of models may be paths
    pids.append(Worker(*pair, standby=standby, environment=environment, **OPTIONS).start())
    pids[-1].result(PATIENCE)
    assert len({worker.pid for worker in pids}) == 3


@linux
def test_memory_does_not_grow_from_job_to_job(pair, tiny_model, standby):
    used = []
    for _ in range(6):
        worker = Worker(*pair, standby=standby, **(OPTIONS | {"spacing": 2.5})).start()
        worker.result(PATIENCE)
        pages = int(Path(f"/proc/{worker.pid}/statm").read_text().split()[1])
        used.append(pages * os.sysconf("SC_PAGE_SIZE"))
    assert standby.pid == worker.pid
    assert used[-1] - used[0] < 5 * MOST_GROWTH and used[-1] - used[2] < 3 * MOST_GROWTH, used


@linux
def test_a_process_started_in_advance_warms_up_at_low_priority_and_does_the_job_at_its_own(
    pair, tiny_model, folders, standby
):
    standby.prepare(model="tiny", device="cpu")
    pid = standby.pid

    def priorities() -> set[int]:
        """The nice values of its threads."""
        found = set()
        for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
            with contextlib.suppress(OSError):  # it has just ended
                found.add(int(stat.read_text().rpartition(")")[2].split()[16]))
        return found

    own = os.getpriority(os.PRIO_PROCESS, 0)
    lowered = min(own + warm_up.NICE, 19)
    if own < lowered:
        wait_for(lambda: {own, lowered} <= priorities())
        wait_for(lambda: lowered not in priorities())
    standby.prepare(model="tiny", device="cpu")
    assert standby.pid == pid
    worker = Worker(*pair, standby=standby, **OPTIONS).start()
    assert worker.pid == pid
    result = worker.result(PATIENCE)
    assert own in priorities() and kept_files(folders) == WAITING
    assert same(result, Worker(*pair, **OPTIONS).start().result(PATIENCE))


def test_a_job_that_comes_while_the_process_warms_up_is_done(pair, tiny_model, standby):
    standby.prepare(model="tiny", device="cpu")
    worker = Worker(*pair, standby=standby, **OPTIONS).start()
    assert same(worker.result(PATIENCE), Worker(*pair, **OPTIONS).start().result(PATIENCE))


def test_results_kept_in_files_outlive_their_process(pair, tiny_model, folders, standby):
    first = Worker(*pair, standby=standby, keep_files=True, **OPTIONS).start()
    wait_for(lambda: first.poll() is not None and not first.running)
    second = Worker(*pair, standby=standby, keep_files=True, **OPTIONS).start()
    wait_for(lambda: second.poll() is not None and not second.running)
    standby.close()
    assert second.pid == first.pid and not is_alive(first.pid)
    assert np.array_equal(first.files.array("warped"), second.files.array("warped"))
    for _ in first.closing():
        pass
    second.close()
    assert folders() == []
