"""The command line as a user types it: files in, files out, exit codes, one clear line for what cannot be used."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from DivRegNetLib import models
from DivRegNetLib.core.grid import Grid
from DivRegNetLib.io import images, landmarks
from DivRegNetLib.options import STAGES
from DivRegNetLib.run.cli import main

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["--device", "cpu", "--align", "center", "--spacing", "6"]


@pytest.fixture
def sample(sample_data):
    return lambda name: str(sample_data / name)


@pytest.fixture
def pair(sample):
    return [sample("fixed_T1.nii.gz"), sample("moving_T2.nii.gz")]


@pytest.fixture
def references(sample):
    return [
        "--fixed-labels", sample("fixed_T1_labels.nii.gz"), "--moving-labels", sample("moving_T2_labels.nii.gz"),
        "--fixed-landmarks", sample("fixed_T1.mrk.json"), "--moving-landmarks", sample("moving_T2.mrk.json"),
    ]  # fmt: skip


def test_register_writes_every_file_and_scores_before_and_after(pair, references, tmp_path, capsys):
    output = tmp_path / "a folder with spaces and ü"
    assert main(["register", *pair, *references, "--output", str(output), "--device", "cpu"]) == 0
    names = {p.name for p in output.iterdir()}
    assert names == {
        "warped.nii.gz", "transform.h5", "inverse.h5", "displacement.nii.gz", "preview.png", "quality.json",
        "warped_labels.nii.gz", "warped_landmarks.mrk.json",
    }  # fmt: skip
    quality = json.loads((output / "quality.json").read_text())["quality"]
    dice = [quality["labels"][stage]["mean"]["dice"] for stage in ("before", "aligned", "after")]
    error = [quality["landmarks_mm"][stage]["mean"] for stage in ("before", "aligned", "after")]
    assert dice[0] < dice[1] < dice[2]
    assert error[0] > error[1] > error[2]
    assert "landmark error mm" in capsys.readouterr().out


def test_the_preview_can_be_left_out_and_nothing_that_is_not_needed_is_imported(pair, tmp_path):
    """torch's optimizers import its compiler, which takes as long as torch itself."""
    code = (
        "import sys\nfrom DivRegNetLib.run.cli import main\nassert main(sys.argv[1:]) == 0\n"
        "print({'PIL', 'matplotlib', 'sympy', 'torch._dynamo', 'dask'} & set(sys.modules), file=sys.stderr)\n"
    )
    output = tmp_path / "out"
    options = ["--device", "cpu", "--spacing", "6", "--no-preview"]
    command = [sys.executable, "-c", code, "register", *pair, *options, "--output", str(output)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stderr.splitlines()[-1] == "set()"
    assert (output / "quality.json").exists() and not (output / "preview.png").exists()


@pytest.mark.parametrize(("thread", "taken_apart"), [("pass", False), ("threading.Thread(target=waits).start()", True)])
def test_the_program_ends_at_once_but_not_before_what_has_to_be_done(thread, taken_apart):
    code = (
        "import atexit, threading, time\nfrom DivRegNetLib.run.process import leave\n"
        "class Kept:\n    def __del__(self):\n        print('taken apart')\nkept = Kept()\n"
        "def waits():\n    time.sleep(0.2)\n    print('waited')\n"
        f"atexit.register(print, 'at exit')\nprint('printed')\n{thread}\nleave(3)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    more = (["waited"], ["taken apart"]) if taken_apart else ([], [])
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout.split("\n")[:-1] == ["printed", *more[0], "at exit", *more[1]]


@pytest.mark.skipif(sys.platform != "linux", reason="concerns glibc")
def test_memory_that_is_freed_is_used_again():
    pages = "resource.getrusage(resource.RUSAGE_SELF).ru_minflt"
    code = (
        "import resource\nfrom DivRegNetLib.run.process import prepare_process\nprepare_process()\n"
        "for i in range(9):\n    kept = [b'x' * (20 << 20) for _ in range(3)]\n    del kept\n"
        f"    before = {pages} if i == 0 else before\nprint({pages} - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(done.stdout) < 1000  # of 4 kB; 120,000 where it is given back


def test_displacements_are_read_back_as_they_were(grid, tmp_path):
    """They are stored in another way than ITK's."""
    values = np.random.default_rng(0).normal(size=(*grid.shape, 3)).astype(np.float32)
    field = grid.image(values)
    images.write_image(field, tmp_path / "field.nii.gz")
    written = (tmp_path / "field.nii.gz").read_bytes()
    # Neither its name nor the time are stored: the same field makes the same file.
    assert b"nii" not in written[:100] and written[4:8] == bytes(4)
    for found in (images.read_image(tmp_path / "field.nii.gz"), sitk.ReadImage(str(tmp_path / "field.nii.gz"))):
        assert np.array_equal(sitk.GetArrayFromImage(found), values)
        assert Grid.of(found).matrix == pytest.approx(grid.matrix, abs=1e-3)
    assert [p.name for p in tmp_path.iterdir()] == ["field.nii.gz"]


def test_the_verdict_is_printed_and_kept_and_can_be_an_exit_code(pair, tmp_path, capsys):
    fixed = images.read_image(Path(pair[0]))
    noise = np.random.default_rng(0).integers(0, 1000, fixed.GetSize()[::-1]).astype(np.int16)
    image = sitk.GetImageFromArray(noise)
    image.CopyInformation(fixed)
    images.write_image(image, tmp_path / "noise.nii.gz")
    command = ["register", pair[0], str(tmp_path / "noise.nii.gz"), *QUICK, "--output", str(tmp_path / "out")]
    assert main([*command, "--fail-on", "red", "--error-map"]) == 3
    report = json.loads((tmp_path / "out" / "quality.json").read_text())
    assert report["verdict"]["level"] == "red"
    printed = capsys.readouterr().out
    assert report["verdict"]["error"].startswith("more than ")
    line = f"verdict: RED, expected error {report['verdict']['error']}. "
    assert line + report["verdict"]["headline"] in printed and report["verdict"]["reasons"][0] in printed
    error = images.read_image(tmp_path / "out" / "error_map.nii.gz")
    assert error.GetSize() == fixed.GetSize()
    values = sitk.GetArrayViewFromImage(error)
    assert values[values > 0].mean() == pytest.approx(report["verdict"]["expected_error_mm"], rel=0.3)
    assert main([*command, "--overwrite"]) == 0
    assert not (tmp_path / "out" / "error_map.nii.gz").exists()
    table = tmp_path / "pairs.csv"
    table.write_text(f"name,fixed,moving\nbad,{pair[0]},noise.nii.gz\n")
    assert (
        main(["register", "--pairs", str(table), *QUICK, "--output", str(tmp_path / "all"), "--fail-on", "amber"]) == 3
    )
    (row,) = csv.DictReader((tmp_path / "all" / "results.csv").open())
    assert (row["verdict"], float(row["expected_error_mm"]) > 4) == ("red", True)


def test_results_are_kept_unless_told_to_overwrite(pair, tmp_path, capsys):
    command = ["register", *pair, *QUICK, "--output", str(tmp_path / "out")]
    assert main(command) == 0
    before = (tmp_path / "out" / "quality.json").stat().st_mtime_ns
    assert main(command) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "out" / "quality.json").stat().st_mtime_ns == before
    assert main([*command, "--overwrite"]) == 0
    assert (tmp_path / "out" / "quality.json").stat().st_mtime_ns > before


def test_json_prints_the_report_and_nothing_else(pair, tmp_path, capsys):
    assert main(["register", *pair, *QUICK, "--json", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == json.loads((tmp_path / "quality.json").read_text())
    assert printed.err == ""


def test_stages_are_plain_lines_where_there_is_no_terminal(pair, tmp_path, capsys):
    assert main(["register", *pair, *QUICK, "--output", str(tmp_path)]) == 0
    assert capsys.readouterr().err.split() == [
        word for stage in STAGES
        for word in (stage, "...")
    ]  # fmt: skip


def test_apply_keeps_the_set_of_labels(pair, sample, tmp_path):
    assert main(["register", *pair, "--device", "cpu", "--output", str(tmp_path / "out")]) == 0
    labels = sample("moving_T2_labels.nii.gz")
    warped = tmp_path / "labels.nrrd"
    apply = ["apply", str(tmp_path / "out/transform.h5"), labels, "--reference", pair[0], "--output", str(warped)]
    assert main([*apply, "--labels"]) == 0
    before, after = (set(np.unique(sitk.GetArrayFromImage(images.read_labels(p)))) for p in (labels, warped))
    assert after == before
    assert images.read_labels(warped).GetPixelID() == sitk.sitkUInt8


def test_apply_carries_a_volume_as_register_does_and_landmarks_to_the_fixed_ones(pair, sample, tmp_path):
    output = tmp_path / "out"
    assert main(["register", *pair, "--device", "cpu", "--output", str(output)]) == 0
    volume, marks = tmp_path / "v.nii.gz", tmp_path / "m.csv"
    transform = str(output / "transform.h5")
    assert main(["apply", transform, pair[1], "--reference", pair[0], "--output", str(volume)]) == 0
    np.testing.assert_array_equal(
        *(sitk.GetArrayFromImage(images.read_image(p)) for p in (volume, output / "warped.nii.gz"))
    )
    assert main(["apply", transform, sample("moving_T2.mrk.json"), "--output", str(marks)]) == 0
    fixed = landmarks.read_landmarks(sample("fixed_T1.mrk.json"))
    carried = landmarks.read_landmarks(marks)
    assert carried.labels == fixed.labels
    assert np.linalg.norm(carried.points - fixed.points, axis=1).mean() < 4


def test_a_cohort_continues_where_it_stopped_and_survives_a_bad_pair(pair, tmp_path, capsys):
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(b"\x1f\x8b no gzip")
    table = tmp_path / "pairs.csv"
    table.write_text(f"name,fixed,moving\none,{pair[0]},{pair[1]}\nbad,{pair[0]},{broken}\ntwo,{pair[0]},{pair[1]}\n")
    output = tmp_path / "cohort"
    command = ["register", "--pairs", str(table), *QUICK, "--output", str(output)]
    assert main(command) == 2
    assert "broken.nii.gz" in capsys.readouterr().err
    rows = list(csv.DictReader((output / "results.csv").open()))
    assert [(r["name"], r["status"]) for r in rows] == [("one", "ok"), ("bad", "failed"), ("two", "ok")]
    assert float(rows[0]["nmi_after"]) == float(rows[2]["nmi_after"]) > 1
    done = (output / "one" / "quality.json").stat().st_mtime_ns
    broken.write_bytes(Path(pair[1]).read_bytes())
    assert main(command) == 0
    assert (output / "one" / "quality.json").stat().st_mtime_ns == done
    assert [r["status"] for r in csv.DictReader((output / "results.csv").open())] == ["ok"] * 3


def test_evaluate_reports_labels_and_landmarks_before_and_after(pair, references, tmp_path, capsys):
    assert main(["register", *pair, *QUICK, "--output", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    command = ["evaluate", *references, "--transform", str(tmp_path / "out/transform.h5"), "--json"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["labels"]["after"]["mean"]["dice"] > found["labels"]["before"]["mean"]["dice"]
    assert found["landmarks_mm"]["after"]["mean"] < found["landmarks_mm"]["before"]["mean"]


def test_models_lists_the_bundled_model(capsys):
    assert main(["models"]) == 0
    assert "general" in capsys.readouterr().out
    assert main(["models", "--json"]) == 0
    assert any(card["name"] == "general" for card in json.loads(capsys.readouterr().out))


def test_models_lists_the_classes_of_a_class_network(tiny_model, capsys):
    card = models.find(tiny_model)
    told = {"classes": ["background", "liver", "spleen"], "classnet": {"classes": 3}}
    card.write_text(json.dumps(json.loads(card.read_text()) | told))
    assert main(["models"]) == 0
    assert "guided by classes: liver, spleen" in capsys.readouterr().out


def bad_inputs(folder):
    """Arguments after ``register`` -> what the message must hold."""
    (folder / "empty.nii.gz").touch()
    (folder / "text.nii").write_text("not an image")
    (folder / "folder").mkdir()
    (folder / "pairs.csv").write_text("fixed,wobbly\na,b\n")
    good = str(folder / "good.nii.gz")
    return [
        ([str(folder / "missing.nii.gz"), good], "missing.nii.gz"),
        ([good, str(folder / "empty.nii.gz")], "empty.nii.gz"),
        ([str(folder / "text.nii"), good], "text.nii"),
        ([good, str(folder / "folder")], "no DICOM series"),
        ([good], "MOVING"),
        ([good, good, "--align", str(folder / "no.h5")], "no.h5"),
        ([good, good, "--model", "nobody"], "nobody"),
        ([good, good, "--fixed-mask", str(folder / "text.nii")], "text.nii"),
        ([good, good, "--fixed-labels", good], "both"),
        (["--pairs", str(folder / "pairs.csv")], "moving"),
    ]


@pytest.mark.parametrize("case", range(10))
def test_bad_input_is_one_line_and_exit_code_2(case, tmp_path, capsys):
    array = np.random.default_rng(0).random((12, 12, 12), dtype=np.float32)
    images.write_image(sitk.GetImageFromArray(array), tmp_path / "good.nii.gz")
    arguments, message = bad_inputs(tmp_path)[case]
    output = tmp_path / "out"
    assert main(["register", *arguments, "--output", str(output), "--device", "cpu"]) == 2
    printed = [line for line in capsys.readouterr().err.splitlines() if not line.endswith("...")]
    assert len(printed) == 1
    assert message in printed[0]
    assert "Traceback" not in printed[0]
    assert not output.exists()


def test_debug_shows_where(tmp_path):
    from DivRegNetLib.errors import InputError

    with pytest.raises(InputError):
        main(["register", "a.nii", "b.nii", "--output", str(tmp_path), "--debug"])


def test_an_output_that_is_an_input_is_refused_and_untouched(pair, tmp_path, capsys):
    moving = tmp_path / "warped.nii.gz"
    moving.write_bytes(Path(pair[1]).read_bytes())
    before = moving.read_bytes()
    assert main(["register", pair[0], str(moving), *QUICK, "--output", str(tmp_path)]) == 2
    assert "input" in capsys.readouterr().err
    assert moving.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["warped.nii.gz"]


def test_a_dicom_folder_is_read(tmp_path, pair):
    folder = tmp_path / "dicom"
    folder.mkdir()
    image = sitk.Cast(sitk.Shrink(images.read_image(pair[0]), [4, 4, 4]), sitk.sitkInt16)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for k in range(image.GetDepth()):
        cut = image[:, :, k]
        position = image.TransformIndexToPhysicalPoint((0, 0, k))
        for tag, value in {
            "0008|0060": "MR", "0020|000e": "1.2.826.0.1.3680043.2.1125.1", "0020|000d": "1.2.826.0.1.3680043.2.1125.2",
            "0020|0032": "\\".join(map(str, position)), "0020|0013": str(k), "0008|0008": "ORIGINAL\\PRIMARY\\AXIAL",
            "0020|0037": "1\\0\\0\\0\\1\\0", "0008|0018": f"1.2.826.0.1.3680043.2.1125.3.{k + 1}",
            "0008|0016": "1.2.840.10008.5.1.4.1.1.4", "0018|0050": str(image.GetSpacing()[2]),
        }.items():  # fmt: skip
            cut.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{k:03d}.dcm"))
        writer.Execute(cut)
    read = images.read_image(folder)
    assert read.GetSize() == image.GetSize()
    assert read.GetSpacing() == pytest.approx(image.GetSpacing(), abs=1e-3)
    assert read.GetOrigin() == pytest.approx(image.GetOrigin(), abs=1e-3)
