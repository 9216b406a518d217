"""Real worker processes: their messages, their results, and that no process and no file of them remains."""

import gc
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from processes import PATIENCE, is_alive, wait_for

from DivRegNetLib.core.composites import displacement_on, field_of
from DivRegNetLib.core.grid import Grid, affine_transform
from DivRegNetLib.errors import Cancelled, DeviceError, InputError, ModelError
from DivRegNetLib.options import STAGES
from DivRegNetLib.registration.pipeline import register
from DivRegNetLib.run.worker import Worker, WorkerDied
from DivRegNetLib.run.worker.process import can_write_temporary_files

OPTIONS = {"model": "tiny", "device": "cpu", "align": "none"}

posix = pytest.mark.skipif(os.name == "nt", reason="signals")


@pytest.fixture
def pair(grid, moving_grid, paint, other_contrast):
    """The phantom on two oblique grids, whole numbers in the moving image."""
    moving = sitk.Cast(paint(moving_grid, contrast=other_contrast) * 1000, sitk.sitkInt16)
    return paint(grid), moving


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Where the workers' folders are made; a function that lists those there are."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    return lambda: list(place.iterdir())


@pytest.fixture
def script(tmp_path):
    """``(body) -> path``: an interpreter that, asked for the worker, runs the body; ``folder`` is the job's."""

    def write(body: str) -> Path:
        path = tmp_path / "interpreter"
        head = f"#!{sys.executable}\nimport os, sys, time\nfrom pathlib import Path\nfolder = Path(sys.argv[-1])\n"
        path.write_text(head + textwrap.dedent(body))
        path.chmod(0o755)
        return path

    return write


def finish(worker) -> list:
    """All events until the worker ends."""
    events, until = [], time.monotonic() + PATIENCE
    while worker.running:
        assert time.monotonic() < until
        events += worker.poll()
        time.sleep(0.01)
    return events


def test_a_worker_gives_what_the_pipeline_gives(pair, tiny_model, folders, grid):
    mask = grid.image(np.ones(grid.shape, np.uint8))
    expected = register(*pair, fixed_mask=mask, **OPTIONS, default_value=-7.0, error_map=True)
    worker = Worker(*pair, fixed_mask=mask, **OPTIONS, default_value=-7.0, error_map=True).start()
    events = finish(worker)
    assert not any(e.kind == "error" for e in events)
    found = worker.result()
    assert np.array_equal(sitk.GetArrayFromImage(found.warped), sitk.GetArrayFromImage(expected.warped))
    assert found.warped.GetPixelID() == pair[1].GetPixelID()
    assert Grid.of(found.warped) == grid
    for name in ("transform", "inverse"):
        ours, theirs = (field_of(getattr(r, name)) for r in (found, expected))
        assert Grid.of(ours) == Grid.of(theirs)
        assert sitk.GetArrayFromImage(ours) == pytest.approx(sitk.GetArrayFromImage(theirs), abs=1e-4)
    assert np.array_equal(found.initial, expected.initial)
    assert (found.quality, found.settings, found.warnings) == (expected.quality, expected.settings, expected.warnings)
    assert (found.card, found.verdict) == (expected.card, expected.verdict)
    maps = (sitk.GetArrayFromImage(r.error_map) for r in (found, expected))
    assert np.array_equal(*maps) and Grid.of(found.error_map) == Grid.of(expected.error_map)
    assert set(found.timings) == set(expected.timings)
    assert folders() == []


def test_progress_names_every_stage_and_never_goes_back(pair, tiny_model):
    events = finish(Worker(*pair, **OPTIONS).start())
    progress = [e for e in events if e.kind == "progress"]
    fractions = [e.fraction for e in progress]
    assert list(dict.fromkeys(e.stage for e in progress)) == list(STAGES)
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert [e.kind for e in events[len(progress) :]] == ["done"]


def test_sheared_grids_and_a_given_transform_reach_the_pipeline_whole(pair, tiny_model):
    shear = np.array([[1, 0.2, 0, 0], [0, 1, 0, 0], [0, 0.1, 1, 0], [0, 0, 0, 1]], float)
    fixed = Grid(pair[0].GetSize(), shear @ Grid.of(pair[0]).matrix).stamp(sitk.Image(pair[0]))
    align = affine_transform(shear)
    with Worker(fixed, pair[1], **(OPTIONS | {"align": align})) as worker:
        found = worker.start().result(PATIENCE)
    expected = register(fixed, pair[1], **(OPTIONS | {"align": align}))
    assert Grid.of(found.warped) == Grid.of(fixed)
    assert found.initial == pytest.approx(shear)
    assert np.array_equal(sitk.GetArrayFromImage(found.warped), sitk.GetArrayFromImage(expected.warped))


@pytest.mark.parametrize("pixel", [sitk.sitkInt8, sitk.sitkInt64])
def test_the_moving_images_pixel_type_survives(pair, tiny_model, pixel):
    moving = sitk.Cast(sitk.RescaleIntensity(sitk.Cast(pair[1], sitk.sitkFloat64), 0, 100), pixel)
    assert Worker(pair[0], moving, **OPTIONS).start().result(PATIENCE).warped.GetPixelID() == pixel


def test_two_workers_at_once_do_not_mix(pair, tiny_model, folders):
    fixed, moving = pair
    one, two = Worker(fixed, moving, **OPTIONS).start(), Worker(moving, fixed, **OPTIONS).start()
    assert len(folders()) == 2
    assert Grid.of(two.result(PATIENCE).warped) == Grid.of(moving)
    assert Grid.of(one.result(PATIENCE).warped) == Grid.of(fixed)
    assert folders() == []


# --- errors


def test_what_the_pipeline_raises_comes_back_as_it_was(pair, tiny_model, folders, grid):
    empty = grid.image(np.zeros(grid.shape, np.uint8))
    cases = (
        ({"fixed_mask": empty}, InputError, "the fixed mask is empty where the fixed image is"),
        ({"model": "no such"}, ModelError, "no model 'no such'; known are "),
        ({"device": "cuda:77"}, DeviceError, "device 'cuda:77' "),
    )
    for options, kind, words in cases:
        worker = Worker(*pair, **(OPTIONS | options)).start()
        events = finish(worker)
        assert events[-1].kind == "error"
        with pytest.raises(kind) as raised:
            worker.result()
        assert type(raised.value) is kind
        assert str(raised.value).startswith(words)
        assert events[-1].message == str(raised.value)
    assert folders() == []


@pytest.mark.parametrize(
    "options, words",
    [
        ({"refine": -1}, "refine is a whole number of at least 0"),
        ({"color": "red"}, "unknown option"),
        ({"progress": print}, "unknown option"),
        ({"fixed_mask": "mask.nii"}, "fixed_mask must be a SimpleITK image"),
    ],
)
def test_an_option_that_cannot_be_used_starts_nothing(pair, folders, options, words):
    with pytest.raises(InputError, match=words):
        Worker(*pair, **(OPTIONS | options))
    assert folders() == []


def test_an_image_that_cannot_be_used_starts_nothing(pair, folders):
    with pytest.raises(InputError, match="the moving image is constant"):
        Worker(pair[0], pair[1] * 0, **OPTIONS)
    assert folders() == []


@posix
def test_memory_that_is_never_enough_asks_for_a_coarser_spacing_or_the_cpu(pair, tiny_model, script):
    python = script("""
        import torch
        from DivRegNetLib import models
        from DivRegNetLib.run.worker import child
        from DivRegNetLib.registration.regnet import RegNet
        def register(self, fixed, moving, start=None, valid=None):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        RegNet.register = register
        child.main(folder)
    """)
    with pytest.raises(DeviceError, match=r"the last time at .* mm: choose a coarser spacing, or device cpu"):
        Worker(*pair, **OPTIONS, python=python).start().result(PATIENCE)


@posix
@pytest.mark.skipif(sys.platform != "linux", reason="address space limits")
def test_a_computer_without_memory_gets_a_coarser_resolution_and_is_told(pair, tiny_model, script):
    """The system promises what it does not give: torch, ITK or NumPy fails in the middle of the work."""
    python = script("""
        import resource
        import torch, numpy, SimpleITK
        import DivRegNetLib.registration.pipeline
        from DivRegNetLib.run.worker import child
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + 400 * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        child.main(folder)
    """)
    result = Worker(*pair, **(OPTIONS | {"spacing": 0.9}), python=python).start().result(PATIENCE)
    assert result.settings["spacing"] > 0.9
    assert any("little memory" in warning for warning in result.warnings)


@posix
def test_a_killed_worker_says_so_and_leaves_nothing(pair, tiny_model, folders):
    worker = Worker(*pair, **OPTIONS).start()
    wait_for(lambda: any(e.kind == "progress" for e in worker.poll()))
    os.kill(worker.pid, signal.SIGKILL)
    assert finish(worker)[-1].kind == "error"
    with pytest.raises(WorkerDied, match=r"signal 9 \(SIGKILL\).*memory.*coarser spacing") as raised:
        worker.result()
    assert raised.value.exit_code == -9
    assert folders() == []


@posix
def test_the_last_words_of_a_crash_are_kept(pair, tiny_model, script, folders):
    python = script("""
        print("about to fall", flush=True)
        import ctypes, faulthandler
        faulthandler.enable()
        ctypes.string_at(0)
    """)
    with pytest.raises(WorkerDied, match="SIGSEGV") as raised:
        Worker(*pair, **OPTIONS, python=python).start().result(PATIENCE)
    assert "about to fall" in raised.value.log
    assert any("Segmentation fault" in line for line in raised.value.log)
    assert folders() == []


@posix
def test_a_missing_package_and_an_unforeseen_error_are_told(pair, tiny_model, script):
    python = script("""
        sys.modules["torch"] = None
        from DivRegNetLib.run.worker import child
        child.main(folder)
    """)
    with pytest.raises(WorkerDied, match=r"a Python package is missing or damaged: .*torch"):
        Worker(*pair, **OPTIONS, python=python).start().result(PATIENCE)
    python = script("""
        import DivRegNetLib.registration.pipeline
        from DivRegNetLib.run.worker import child
        def register(*_, **__):
            raise ZeroDivisionError("somewhere deep")
        DivRegNetLib.registration.pipeline.register = register
        child.main(folder)
    """)
    with pytest.raises(WorkerDied, match="ZeroDivisionError: somewhere deep") as raised:
        Worker(*pair, **OPTIONS, python=python).start().result(PATIENCE)
    assert any(line.startswith("Traceback") for line in raised.value.log)


def test_an_interpreter_that_is_not_there_is_named(pair, tmp_path, folders):
    worker = Worker(*pair, **OPTIONS, python=tmp_path / "no python")
    with pytest.raises(WorkerDied, match=r"cannot be started: .*no python"):
        worker.start()
    assert not worker.running
    assert folders() == []


def test_a_temporary_folder_that_cannot_be_written_is_told(pair, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(WorkerDied, match=r"cannot be started: .*nowhere.*; free space there, or set TMPDIR"):
        Worker(*pair, **OPTIONS).start()


@posix
def test_a_disk_that_is_full_is_no_lack_of_memory(pair, script, monkeypatch):
    """A child that cannot write its result cannot write why, either: it ends with exit code 1 and no word."""
    monkeypatch.setattr("DivRegNetLib.run.worker.parent.can_write_temporary_files", lambda: False)
    python = script("raise SystemExit(1)")
    with pytest.raises(
        WorkerDied, match="folder for temporary files is full: free space there, or set TMPDIR"
    ) as raised:
        Worker(*pair, **OPTIONS, python=python).start().result(PATIENCE)
    assert "memory" not in str(raised.value)


def test_whether_temporary_files_can_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert can_write_temporary_files() and not list(tmp_path.iterdir())
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    assert not can_write_temporary_files()


# --- garbage


@posix
def test_garbage_on_the_pipe_is_log_and_changes_nothing(pair, tiny_model, script):
    python = script(r"""
        out = sys.stdout.buffer
        for line in (b"\xff\xfe\x00\x80", b"{", b"[" * 100000, b"null", b'{"divregnet": "progress"}', b"x" * 3000000,
                     b'{"divregnet": "progress", "stage": "deform", "fraction": NaN}',
                     b'{"divregnet": "progress", "stage": "deform", "fraction": 7}',
                     b'{"divregnet": "error", "kind": 3, "message": null}', b'{"divregnet": "finished"}', b"", b"hello"):
            out.write(line + b"\n")
        out.flush()
        os.write(2, b"\xc3\x28 worse\n")
        from DivRegNetLib.run.worker import child
        import DivRegNetLib.registration.pipeline
        register = DivRegNetLib.registration.pipeline.register
        def talkative(*arguments, **options):
            print('{"divregnet": "done"}', flush=True)
            os.write(1, b'{"divregnet": "error", "kind": "InputError", "message": "from C"}\n')
            return register(*arguments, **options)
        DivRegNetLib.registration.pipeline.register = talkative
        child.main(folder)
    """)
    worker = Worker(*pair, **OPTIONS, python=python).start()
    events = finish(worker)
    assert [e.kind for e in events if e.kind != "progress"] == ["done"]
    assert all(e.stage in STAGES and 0 <= e.fraction <= 1 for e in events if e.kind == "progress")
    assert worker.result().warped.GetSize() == pair[0].GetSize()
    assert {"hello", '{"divregnet": "finished"}'} <= set(worker.log)
    assert any("worse" in line for line in worker.log)


@posix
@pytest.mark.parametrize(
    "body, words",
    [
        ('print(\'{"divregnet": "done"}\', flush=True); time.sleep(600)', "result cannot be read"),
        (
            "(folder / 'job-1' / 'result.json').write_text('[]'); print('{\"divregnet\": \"done\"}', flush=True)",
            "cannot be read",
        ),
        ("sys.exit(0)", "ended with exit code 0"),
        ('print(\'{"divregnet": "done"\', flush=True); sys.exit(3)', "ended with exit code 3"),
        (
            'print(\'{"divregnet": "error", "kind": "SystemExit", "message": "odd"}\', end=\'\', flush=True)',
            "odd",
        ),
    ],
    ids=["no result", "nonsense as result", "silent end", "half a line", "unknown kind, no line end"],
)
def test_a_worker_that_lies_is_found_out(pair, script, folders, body, words):
    with pytest.raises(WorkerDied, match=words):
        Worker(*pair, **OPTIONS, python=script(body)).start().result(PATIENCE)
    assert folders() == []


@posix
def test_polling_a_worker_that_never_stops_talking_returns(pair, script):
    python = script("""
        while True:
            os.write(1, b"la " * 300000)
    """)
    with Worker(*pair, **OPTIONS, python=python) as worker:
        worker.start()
        time.sleep(0.2)
        for _ in range(5):
            assert worker.poll() == []
        assert worker.running


# --- the end


@posix
def test_cancelling_ends_the_process_with_its_children_and_removes_the_folder(pair, script, folders):
    python = script("""
        import signal, subprocess
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (folder / "child").write_text(str(child.pid))
        time.sleep(600)
    """)
    worker = Worker(*pair, **OPTIONS, python=python).start()
    (folder,) = folders()
    wait_for(lambda: (folder / "child").is_file() and (folder / "child").read_text())
    pids = [worker.pid, int((folder / "child").read_text())]
    assert all(is_alive(pid) for pid in pids)
    started = time.monotonic()
    worker.cancel()
    assert not any(is_alive(pid) for pid in pids)
    assert folders() == []
    assert time.monotonic() - started < 2  # what the user is promised
    assert not worker.running
    assert worker.poll() == []
    with pytest.raises(Cancelled):
        worker.result()


def test_cancelling_while_the_network_works_takes_effect(pair, tiny_model, folders):
    worker = Worker(*pair, **(OPTIONS | {"refine": 100000, "spacing": 1.5})).start()
    wait_for(lambda: any(e.stage == "refine" for e in worker.poll()))
    started = time.monotonic()
    worker.cancel()
    assert time.monotonic() - started < 2  # what the user is promised
    assert not is_alive(worker.pid)
    assert folders() == []


def test_leaving_or_forgetting_a_worker_ends_it(pair, tiny_model, folders):
    with Worker(*pair, **OPTIONS) as left:
        left.start()
        assert is_alive(left.pid)
    forgotten = Worker(*pair, **OPTIONS).start()
    pids = [left.pid, forgotten.pid]
    del forgotten
    gc.collect()
    assert not any(is_alive(pid) for pid in pids)
    assert folders() == []


NO_LOCKS = """
import errno, fcntl
def flock(*_): raise OSError(errno.ENOLCK, "No locks available")
fcntl.flock = flock
"""


@pytest.fixture
def without_locks(tmp_path):
    """Variables of an environment in which no file can be locked, as on some network and FUSE file systems."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(NO_LOCKS)
    root = Path(__file__).resolve().parents[2]
    return os.environ | {"PYTHONPATH": f"{site}{os.pathsep}{root}"}


@posix
def test_a_temporary_folder_without_locks_ends_no_worker(pair, tiny_model, folders, without_locks):
    """Issue 18, fault 5: the lock that could be had was taken for the end of the parent."""
    worker = Worker(*pair, **OPTIONS, environment=without_locks).start()
    events = finish(worker)
    assert [e.message for e in events if e.kind == "error"] == []
    assert worker.result().warped.GetSize() == pair[0].GetSize()
    assert folders() == []


PARENT = """
import sys, time
import SimpleITK as sitk
from DivRegNetLib.run.worker import Worker
fixed, moving = (sitk.ReadImage(path) for path in sys.argv[1:3])
options = dict(model="tiny", device="cpu", align="none", refine=100000, spacing=1.5)
worker = Worker(fixed, moving, python=sys.argv[3], **options).start()
assert "torch" not in sys.modules
while not any(e.stage == "refine" for e in worker.poll()):
    time.sleep(0.01)
print(worker.pid, flush=True)
{ending}
"""


@posix
@pytest.mark.parametrize("ending", ["killed", "returns", "killed, a launcher between", "killed, no locks"])
def test_when_the_parent_ends_the_worker_and_its_folder_go(pair, tiny_model, folders, tmp_path, without_locks, ending):
    python = Path(sys.executable)
    if "launcher" in ending:
        python = tmp_path / "launcher"
        python.write_text(f'#!/bin/sh\nsleep 20 | {sys.executable} "$@"\n')
        python.chmod(0o755)
    paths = [str(tmp_path / f"{name}.mha") for name in ("fixed", "moving")]
    for path, image in zip(paths, pair, strict=True):
        sitk.WriteImage(image, path)
    code = PARENT.format(ending="" if ending == "returns" else "time.sleep(600)")
    place = tmp_path / "temporary"
    root = Path(__file__).resolve().parents[2]
    environment = without_locks if "no locks" in ending else os.environ | {"PYTHONPATH": str(root)}
    environment = environment | {"TMPDIR": str(place)}
    command = [sys.executable, "-c", code, *paths, str(python)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as parent:
        pid = int(parent.stdout.readline())
        if ending != "returns":
            assert is_alive(pid)
            assert len(folders()) == 1
            parent.kill()
    wait_for(lambda: folders() == [])
    if "launcher" not in ending:  # that one sleeps on, but the worker is gone
        wait_for(lambda: not is_alive(pid))


def test_a_worker_is_started_once_and_waited_for_only_then(pair, tiny_model):
    worker = Worker(*pair, **OPTIONS)
    with pytest.raises(RuntimeError, match="not started"):
        worker.result()
    assert worker.poll() == []
    assert not worker.running
    with worker.start():
        with pytest.raises(RuntimeError, match="started once"):
            worker.start()
        with pytest.raises(TimeoutError):
            worker.result(timeout=0.01)


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "precious").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "DivRegNetLib.run.worker", str(tmp_path)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert done.returncode != 0
    assert "there is no worker.json" in done.stderr
    assert (tmp_path / "precious").is_file()


def test_a_launcher_whose_child_was_killed_is_told_as_lack_of_memory(pair, script):
    """PythonSlicer (Slicer's launcher, Base/QTCore's counterpart in commontk/AppLauncher) returns 1 in that case."""
    launcher = script("sys.exit(1)")
    with Worker(*pair, python=launcher, device="cpu") as worker:
        worker.start()
        finish(worker)
        with pytest.raises(WorkerDied, match="exit code 1, as happens when memory runs out: choose a coarser spacing"):
            worker.result()


def test_a_python_that_fails_is_not_told_as_lack_of_memory(pair, script):
    with Worker(*pair, python=script("raise ImportError('no such module')"), device="cpu") as worker:
        worker.start()
        finish(worker)
        with pytest.raises(WorkerDied) as raised:
            worker.result()
    assert "memory" not in str(raised.value) and "no such module" in str(raised.value)


def test_a_job_is_written_in_steps_and_a_start_that_is_given_up_leaves_nothing(pair, folders, tiny_model, monkeypatch):
    from DivRegNetLib.run.worker import protocol

    monkeypatch.setattr(protocol, "SLAB_BYTES", 2000)
    worker = Worker(*pair, **OPTIONS)
    steps = worker.starting()
    for _ in range(3):
        next(steps)
    assert folders() and not worker.running
    steps.close()
    assert not folders()
    with Worker(*pair, **OPTIONS) as again:
        count = sum(1 for _ in again.starting())
        assert count > 20 and again.running
        assert again.result(PATIENCE).warped.GetSize() == pair[0].GetSize()


def test_a_result_can_stay_in_files_and_is_read_bit_by_bit(pair, folders, tiny_model):
    expected = register(*pair, **OPTIONS)
    with Worker(*pair, keep_files=True, inverse=False, **OPTIONS) as worker:
        worker.start()
        pid = worker.pid
        finish(worker)
        files = worker.files
        assert not is_alive(pid) and folders()
        assert files.quality == expected.quality and files.grid("transform") == Grid.of(expected.warped)
        assert np.array_equal(files.array("warped"), sitk.GetArrayFromImage(expected.warped))
        field = sitk.GetArrayFromImage(displacement_on(expected.transform, Grid.of(expected.warped)))
        assert files.array("transform").dtype == np.float32
        assert files.array("transform") == pytest.approx(field, abs=1e-4)
        with pytest.raises(FileNotFoundError):
            files.array("inverse")
        worker.close()
        assert not folders()


def test_the_worker_measures_segments_that_share_layers_and_landmarks(pair, tiny_model, landmarks):
    from DivRegNetLib.quality import metrics
    from DivRegNetLib.quality.references import References, Segments

    fixed, moving = pair
    sides = []
    for image, low in ((fixed, 0.5), (moving, 500)):
        array = sitk.GetArrayFromImage(image) / low
        layers = [np.digitize(array, (1.0, 1.3)), array > 0.7]
        layers = [sitk.GetImageFromArray(layer.astype(np.uint8)) for layer in layers]
        for layer in layers:
            layer.CopyInformation(image)
        sides.append(Segments(tuple(layers), {"rim": (0, 1), "core": (0, 2), "all": (1, 1), f"own {low}": (0, 1)}))
    references = References(*sides, landmarks, landmarks + np.array([3, 0, 4]), tuple("abc" * 9))
    with Worker(*pair, references=references, **OPTIONS) as worker:
        result = worker.start().result(PATIENCE)
    assert result.quality["landmark_error_mm"]["before"] == pytest.approx(5)
    assert [row["label"] for row in result.quality["landmarks"]] == list("abc" * 9)
    expected = metrics.landmark_error(landmarks, landmarks + np.array([3, 0, 4]), result.transform)
    assert [row["after"] for row in result.quality["landmarks"]] == pytest.approx(expected, abs=1e-4)
    assert set(result.quality["segments"]) == {"rim", "core", "all"}
    for name, (layer, value) in sides[0].values.items():
        if name in result.quality["segments"]:
            for stage, transform in (("before", sitk.Transform()), ("after", result.transform)):
                warped = sitk.Resample(sides[1].layers[layer], fixed, transform, sitk.sitkNearestNeighbor, 0)
                target = sitk.GetArrayFromImage(sides[0].layers[layer]) == value
                dice = metrics.dice(target, sitk.GetArrayFromImage(warped) == value)
                assert result.quality["segments"][name][stage] == pytest.approx(dice)


def test_what_cannot_be_measured_is_said_and_the_registration_is_kept(pair, tiny_model):
    from DivRegNetLib.quality.references import References, Segments

    mask = sitk.Cast(pair[0] > 0.5, sitk.sitkUInt8)
    points = np.zeros((2, 3))
    references = References(Segments((mask,), {"a": (0, 1)}), Segments((mask,), {"b": (0, 1)}), points, points[:1])
    with Worker(*pair, references=references, **OPTIONS) as worker:
        result = worker.start().result(PATIENCE)
    assert "dice" not in result.quality and "landmark_error_mm" not in result.quality
    assert any("no segment of the same name" in w for w in result.warnings)
    assert any("2 fixed and 1 moving landmarks" in w for w in result.warnings)
