"""Everything around a registration: environment, streams, homes, locales, and programs that use the library.

It runs and gives the usual result, or says in one sentence what to do.
"""

import contextlib
import json
import locale
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from DivRegNetLib import models
from DivRegNetLib.io import images
from DivRegNetLib.io.itk import file_access
from DivRegNetLib.registration.pipeline import register
from DivRegNetLib.run.cli import main
from DivRegNetLib.run.threads import prepare_threads, usable_processors

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = {"device": "cpu", "align": "rigid", "refine": 1}
NOBODY = 65534
posix = pytest.mark.skipif(os.name == "nt", reason="POSIX")


@pytest.fixture
def pair(grid, moving_grid, paint, other_contrast):
    return paint(grid), paint(moving_grid, contrast=other_contrast)


@pytest.fixture
def files(pair, tmp_path):
    """The pair as files, with a name that is not ASCII."""
    paths = [tmp_path / "ü fixed.nii.gz", tmp_path / "moving.nii.gz"]
    for path, image in zip(paths, pair, strict=True):
        images.write_image(image, path)
    return [str(path) for path in paths]


@pytest.fixture
def command_line(files, tiny_model, tmp_path):
    """``(prefix, environment, **arguments of Popen) -> (exit code, output, quality card)``: a registration by the command
    line, in a shell after the prefix and before the suffix; variables that are None are removed."""

    def run(suffix: str = "", prefix: str = "", more=(), **environment):
        output = tmp_path / "out"
        arguments = [
            "register",
            *files,
            "--model",
            tiny_model,
            "--device",
            "cpu",
            "--align",
            "none",
            "--output",
            str(output),
        ]
        command = f'{prefix} exec "$@" {suffix}'
        variables = os.environ | {"PYTHONPATH": str(ROOT)} | environment
        done = subprocess.run(
            ["sh", "-c", command, "sh", sys.executable, "-m", "DivRegNetLib.run.cli", *arguments, *more],
            env={k: v for k, v in variables.items() if v is not None}, capture_output=True, check=False, timeout=300,
        )  # fmt: skip
        report = output / "quality.json"
        return done, json.loads(report.read_text(encoding="utf-8")) if report.exists() else None

    return run


def numbers(report: dict | None) -> dict:
    """What must be the same in every environment."""
    assert report is not None
    return report["quality"]["nmi"] | {"largest": report["quality"]["largest_displacement_mm"]}


@pytest.fixture
def usual(pair, tiny_model):
    return register(*pair, model=tiny_model, device="cpu", align="none").quality["nmi"]


# --- the environment of the command line


ENVIRONMENTS = {
    "warnings are errors": {"PYTHONWARNINGS": "error"},
    "ASCII only": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"},
    "no home": {"HOME": None, "DIVREGNET_MODELS": None},
    "a home that is not there": {"HOME": "/nowhere/at/all", "XDG_CONFIG_HOME": "/proc/none"},
    "a temporary folder that is not there": {"TMPDIR": "/nowhere"},
    "threads that make no sense": {"OMP_NUM_THREADS": "many", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": "-3"},
    "no terminal": {"TERM": None, "COLUMNS": "x"},
    "encodings must be named": {"PYTHONWARNDEFAULTENCODING": "1", "PYTHONWARNINGS": "error::EncodingWarning"},
    "no docstrings": {"PYTHONOPTIMIZE": "2"},
}


@posix
@pytest.mark.parametrize("kind", ENVIRONMENTS)
def test_the_command_line_runs_in_every_environment(kind, command_line, usual):
    environment = ENVIRONMENTS[kind]
    more = []
    if "DIVREGNET_MODELS" in environment:
        more = ["--model", str(models.find("tiny"))]
    done, report = command_line(more=more, **environment)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert numbers(report).items() >= usual.items()
    assert report["warnings"] == []
    assert "preview.png" in report["files"]


@posix
def test_a_picture_that_cannot_be_drawn_is_said_and_the_registration_kept(command_line, tmp_path):
    (tmp_path / "hidden" / "PIL").mkdir(parents=True)
    (tmp_path / "hidden" / "PIL" / "__init__.py").write_text("raise RuntimeError('this one is broken')")
    done, report = command_line(PYTHONPATH=f"{tmp_path / 'hidden'}:{ROOT}")
    assert done.returncode == 0
    assert any("no preview" in warning and "this one is broken" in warning for warning in report["warnings"])
    assert "preview.png" not in report["files"] and "warped.nii.gz" in report["files"]


STREAMS = {
    "no standard error": "2>&-", "no standard output": ">&-", "no input": "<&-", "none": "<&- >&- 2>&-",
    "a full output for errors": "2>/dev/full",
}  # fmt: skip


@posix
@pytest.mark.parametrize("kind", STREAMS)
def test_the_command_line_runs_without_standard_streams(kind, command_line, usual, tmp_path):
    done, report = command_line(STREAMS[kind])
    assert done.returncode == 0
    assert numbers(report).items() >= usual.items()
    for name in ("warped.nii.gz", "displacement.nii.gz"):
        assert np.isfinite(sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / name)))).all()


@posix
def test_an_output_that_takes_no_text_does_not_cost_the_registration(command_line, usual):
    done, report = command_line(">/dev/full")
    assert numbers(report).items() >= usual.items()
    assert done.stderr.decode().splitlines()[-1] == "divregnet: the system refused: No space left on device"


@posix
def test_names_that_the_terminal_cannot_show_are_shown_otherwise(command_line, tmp_path):
    done, _ = command_line(PYTHONIOENCODING="ascii", PYTHONUTF8="0", more=["--json"])
    assert done.returncode == 0
    assert json.loads(done.stdout)["inputs"]["fixed"].endswith("ü fixed.nii.gz")


@posix
def test_a_working_folder_that_is_gone_or_closed_is_no_obstacle(command_line, usual, tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    done, report = command_line(prefix=f"cd '{gone}' && rmdir '{gone}' &&")
    assert done.returncode == 0, done.stderr
    assert numbers(report).items() >= usual.items()


@posix
@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="only root can become somebody else")
def test_a_user_without_name_home_and_rights_can_register(command_line, usual, tmp_path):
    if not shutil.which("setpriv"):
        pytest.skip("needs setpriv")
    for folder in (tmp_path, *tmp_path.parents):
        if folder == Path(tempfile.gettempdir()):
            break
        folder.chmod(0o777)
    prefix = "setpriv --reuid 54321 --regid 54321 --clear-groups true || exit 77; set -- setpriv --reuid 54321 --regid 54321 "
    done, report = command_line(prefix=prefix + '--clear-groups "$@";', HOME=None, USER=None, LOGNAME=None)
    if done.returncode in (77, 126, 127) or b"Permission denied" in done.stderr.splitlines()[:1]:
        pytest.skip("the interpreter is not readable for others here")
    assert done.returncode == 0, done.stderr
    assert numbers(report).items() >= usual.items()


@posix
def test_an_output_folder_that_cannot_be_written_is_refused_before_the_work(tmp_path, files, tiny_model):
    name = os.fsdecode(bytes(tmp_path / "out") + b"\xff")
    code = main(["register", *files, "--model", tiny_model, "--device", "cpu", "--output", name])
    assert code == 2
    assert not list(tmp_path.glob("out*"))


@posix
def test_a_full_disk_is_told_with_the_name_of_the_file(command_line, tmp_path):
    done, report = command_line(prefix="ulimit -f 16 &&")
    assert done.returncode == 2 and report is None
    message = done.stderr.decode().splitlines()[-1]
    assert message.startswith(f"divregnet: {tmp_path}/out/") and "cannot be written" in message
    assert ".divregnet-" not in message
    assert not (tmp_path / "out").exists()


# --- locales


@posix
@pytest.mark.parametrize("name", ["a.nrrd", "a.mha", "a.nii.gz"])
def test_numbers_in_files_do_not_depend_on_the_locale(name, tmp_path):
    """In a process of its own: a program with windows sets the locale of its user."""
    if not shutil.which("localedef"):
        pytest.skip("needs localedef")
    made = subprocess.run(
        ["localedef", "-i", "de_DE", "-f", "UTF-8", str(tmp_path / "de_DE.UTF-8")], capture_output=True
    )
    if not (tmp_path / "de_DE.UTF-8").exists():
        pytest.skip(f"no German locale: {made.stderr!r}")
    code = f"""
import locale, sys
locale.setlocale(locale.LC_ALL, "de_DE.UTF-8")
import SimpleITK as sitk
from pathlib import Path
from DivRegNetLib.io import images, transforms
image = sitk.Image((5, 6, 7), sitk.sitkInt16) + 3
image.SetSpacing((1.5, 2.25, 6.3)); image.SetOrigin((-0.5, 0.25, 1.75))
images.write_image(image, Path({name!r}))
read = images.read_image({name!r})
assert max(abs(a - b) for a, b in zip(read.GetSpacing() + read.GetOrigin(), (1.5, 2.25, 6.3, -0.5, 0.25, 1.75))) < 1e-6
assert locale.format_string("%.1f", 1.5) == "1,5", "the program keeps its locale"
"""
    environment = os.environ | {"LOCPATH": str(tmp_path), "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    assert images.read_image(tmp_path / name).GetSpacing() == pytest.approx((1.5, 2.25, 6.3), abs=1e-6)
    assert locale.localeconv()["decimal_point"] == "."


# --- standard error


def test_while_files_are_read_standard_error_is_everybodys(capfd):
    with file_access(), file_access():
        os.write(2, b"a crash dump\n")
    assert "a crash dump" in capfd.readouterr().err


def test_itks_warnings_are_off_while_files_are_read_and_then_as_before():
    before = sitk.ProcessObject.GetGlobalWarningDisplay()
    with file_access():
        with file_access():
            assert not sitk.ProcessObject.GetGlobalWarningDisplay()
        assert not sitk.ProcessObject.GetGlobalWarningDisplay()
    assert sitk.ProcessObject.GetGlobalWarningDisplay() == before


def test_threads_that_read_and_write_transforms_do_not_disturb_each_other(tmp_path):
    """HDF5 in ITK would fail, or end the process, if two threads used it at a time."""
    code = """
import threading
from pathlib import Path
import numpy as np, SimpleITK as sitk
from DivRegNetLib.io.transforms import read_transform, write_transform

done = []

def work(name):
    field = sitk.GetImageFromArray(np.full((20, 20, 20, 3), len(name), float), isVector=True)
    transform = sitk.DisplacementFieldTransform(field)
    for _ in range(50):
        write_transform(transform, Path(name))
        assert read_transform(name).TransformPoint((5.0, 5.0, 5.0)) == (5.0 + len(name),) * 3
    done.append(name)

names = ["a.h5", "bb.h5", "ccc.h5"]
threads = [threading.Thread(target=work, args=(name,)) for name in names]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert sorted(done) == names
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, timeout=300)


# --- programs that use the library


def digest(result) -> tuple:
    return (
        result.quality["nmi"], result.initial.tolist(), sitk.GetArrayFromImage(result.warped).tobytes(),
        result.transform.TransformPoint((10.0, -40.0, 100.0)),
    )  # fmt: skip


@contextlib.contextmanager
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    assert torch.get_default_dtype() == torch.float64
    torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def another_device():
    torch.set_default_device("meta")
    yield
    assert torch.get_default_device().type == "meta"
    torch.set_default_device(None)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    assert torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def rounded_products():
    torch.set_float32_matmul_precision("medium")
    yield
    assert torch.get_float32_matmul_precision() == "medium"
    torch.set_float32_matmul_precision("highest")


@contextlib.contextmanager
def errors_of_numpy_and_warnings():
    with np.errstate(all="raise"), warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


PROGRAMS = {
    "double precision": double_precision,
    "another default device": another_device,
    "a device as context": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "no gradients": torch.no_grad,
    "inference mode": torch.inference_mode,
    "deterministic algorithms": deterministic,
    "products in bfloat16": rounded_products,
    "warnings and floating-point errors raise": errors_of_numpy_and_warnings,
    "anomalies are looked for": torch.autograd.detect_anomaly,
}


@pytest.mark.parametrize("kind", PROGRAMS)
def test_torch_as_the_program_has_set_it_changes_nothing_and_is_not_changed(kind, pair, tiny_model):
    expected = digest(register(*pair, model=tiny_model, **OPTIONS))
    random = torch.get_rng_state()
    with PROGRAMS[kind]():
        grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        found = digest(register(*pair, model=tiny_model, **OPTIONS))
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == (grad, inference)
    assert found == expected
    assert torch.equal(torch.get_rng_state(), random)


def test_a_model_that_is_loaded_under_other_defaults_is_the_same(tiny_model):
    with double_precision():
        loaded = models.load(tiny_model)
    assert {p.dtype for p in loaded.regnet.parameters()} == {torch.float32}


@posix
def test_a_forked_process_reads_files_though_its_parent_was_reading(files, tmp_path):
    """The thread of the parent that held the lock does not go on in the child."""
    code = f"""
import os, signal
from DivRegNetLib.io.images import read_image
from DivRegNetLib.io.itk import file_access
import threading
reading, leave = threading.Event(), threading.Event()

def read():
    with file_access():
        reading.set()
        leave.wait(60)

thread = threading.Thread(target=read)
thread.start()
reading.wait()
child = os.fork()
if child == 0:
    signal.alarm(60)
    os._exit(0 if read_image({files[0]!r}).GetDimension() == 3 else 1)
leave.set()
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
thread.join()
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, timeout=300)


@posix
def test_a_fork_after_use_works(pair, tiny_model, tmp_path):
    """In a process of its own with two threads: the child has none of its parent's threads left."""
    for name, image in zip(("fixed", "moving"), pair, strict=True):
        sitk.WriteImage(image, str(tmp_path / f"{name}.mha"))
    code = """
import os, sys, signal
import SimpleITK as sitk, torch
from DivRegNetLib import register
torch.set_num_threads(2)
fixed, moving = (sitk.ReadImage(n) for n in ("fixed.mha", "moving.mha"))
def run():
    return register(fixed, moving, model="tiny", device="cpu", align="rigid", refine=1).quality["nmi"]["after"]
parent = run()
child = os.fork()
if child == 0:
    signal.alarm(600)
    os._exit(0 if abs(run() - parent) < 1e-4 else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert torch.get_num_threads() == 2
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"}
    environment.pop("OMP_NUM_THREADS", None)
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, timeout=900)


@posix
def test_a_program_whose_working_folder_was_removed_is_not_ended(pair, tiny_model, tmp_path):
    """In a process of its own: MKL ends the process that it is first used in there."""
    for name, image in zip(("fixed", "moving"), pair, strict=True):
        sitk.WriteImage(image, str(tmp_path / f"{name}.mha"))
    code = """
import os
import SimpleITK as sitk
fixed, moving = (sitk.ReadImage(n) for n in ("fixed.mha", "moving.mha"))
os.mkdir("gone")
os.chdir("gone")
os.rmdir(os.path.join("..", "gone"))
from DivRegNetLib import register
print(register(fixed, moving, model="tiny", device="cpu", align="rigid").quality["nmi"]["after"])
try:
    os.getcwd()
except FileNotFoundError:
    print("the program is where it was")
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    nmi, where = done.stdout.splitlines()
    usual = register(*pair, model=tiny_model, device="cpu", align="rigid").quality["nmi"]["after"]
    assert float(nmi) == pytest.approx(usual, abs=1e-4)
    assert where == "the program is where it was"


def test_threads_with_one_model_do_not_disturb_each_other(pair, tiny_model):
    model = models.load(tiny_model)
    before = {k: v.clone() for k, v in model.regnet.state_dict().items()}
    expected = digest(register(*pair, model=model, **OPTIONS))
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(digest(register(*pair, model=model, **OPTIONS)))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 3
    assert all(torch.equal(v, model.regnet.state_dict()[k]) for k, v in before.items())
    assert not model.regnet.training


def test_the_images_of_the_program_are_not_touched(pair, tiny_model):
    """A view first copies the voxels that its image shares with another one, and two threads that view one such image crash
    the process."""
    masks = [sitk.Cast(image > 0, sitk.sitkUInt8) for image in pair]
    given = [*pair, *masks]
    shared = [sitk.Image(image) for image in given]
    register(*pair, fixed_mask=masks[0], moving_mask=masks[1], model=tiny_model, **OPTIONS)
    assert not any(image.IsUnique() for image in (*given, *shared))


def test_an_image_that_is_changed_while_it_is_registered_is_registered_as_it_was(pair, tiny_model):
    fixed, moving = pair
    expected = digest(register(fixed, moving, model=tiny_model, **OPTIONS))
    changed = [sitk.Image(i) for i in pair]

    def progress(stage: str, fraction: float) -> None:
        if stage == "align":
            for image in changed:
                image[0, 0, 0] = 1e6
                image.SetSpacing((1, 1, 1))

    assert digest(register(*changed, model=tiny_model, progress=progress, **OPTIONS)) == expected


# --- threads


def test_threads_wait_without_spinning_unless_the_user_wants_it():
    environment = {}
    prepare_threads(environment)
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"
    environment = {"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": "3"}
    prepare_threads(environment)
    assert (environment["OMP_WAIT_POLICY"], environment["OMP_NUM_THREADS"]) == ("ACTIVE", "3")


@pytest.mark.parametrize("given, expected", [({}, 3), ({"OMP_NUM_THREADS": "1"}, 1), ({"OMP_NUM_THREADS": "64"}, 3)])
def test_workers_on_one_machine_share_its_processors(given, expected, monkeypatch):
    from DivRegNetLib.run.cohort import dask

    monkeypatch.setattr(dask, "usable_processors", lambda: 7)
    variables = dask.threads_of_worker(2, given)
    assert variables["OMP_NUM_THREADS"] == str(expected)
    assert variables["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] == "3"
    assert variables["OMP_WAIT_POLICY"] == "PASSIVE"
    assert dask.threads_of_worker(2, {"OMP_WAIT_POLICY": "ACTIVE"})["OMP_WAIT_POLICY"] == "ACTIVE"
    assert dask.threads_of_worker(20, given)["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(
    "files, expected",
    [
        ({"cpu.max": "max 100000"}, None),
        ({"cpu.max": "100000 100000"}, 1),
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "1000 100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ({}, None),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")
def test_a_quota_of_processors_limits_the_threads(files, expected, tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    old = any(name.startswith("cpu/") for name in files)
    (tmp_path / "proc/self/cgroup").write_text("4:cpu,cpuacct:/\n" if old else "0::/job\n")
    for name, content in files.items():
        path = tmp_path / "sys/fs/cgroup" / ("" if old else "job") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    here = len(os.sched_getaffinity(0))
    assert usable_processors(tmp_path) == min(expected or here, here)


@pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")
def test_a_control_group_whose_name_is_odd_is_no_obstacle(tmp_path):
    name = b"caf\xc3\xa9 \xff:x"
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_bytes(b"garbage\n0::/" + name + b"\n")
    group = tmp_path / "sys/fs/cgroup" / os.fsdecode(name)
    group.mkdir(parents=True)
    (group / "cpu.max").write_text("100000 100000")
    code = f"""
from pathlib import Path
from DivRegNetLib.run.threads import usable_processors
assert usable_processors(Path({str(tmp_path)!r})) == 1
"""
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], env=os.environ | ascii_only, check=True)
