"""A cohort that is run again: only what was made from the same files with the same options and model is kept."""

import csv
import json
from pathlib import Path

import pytest
import SimpleITK as sitk
import torch

from DivRegNetLib import __version__, models
from DivRegNetLib.io import images
from DivRegNetLib.run.cli import main
from DivRegNetLib.run.cohort import QUALITY, TABLE

QUICK = {"--model": "tiny", "--device": "cpu", "--align": "none", "--spacing": "12"}


@pytest.fixture
def cohort(grid, paint, rigid, tiny_model, tmp_path):
    """``(**options) -> rows by name``: runs two pairs; both share the fixed image and have masks."""
    images.write_image(paint(grid), tmp_path / "fixed.nii.gz")
    images.write_image(sitk.Cast(paint(grid) > 0.1, sitk.sitkUInt8), tmp_path / "mask.nii.gz")
    for i, name in enumerate("ab"):
        images.write_image(paint(grid, rigid((3 * i, 0, 0), (2, 0, 0))), tmp_path / f"{name}.nii.gz")
    rows = "".join(f"{n},fixed.nii.gz,{n}.nii.gz,mask.nii.gz\n" for n in "ab")
    (tmp_path / "pairs.csv").write_text("name,fixed,moving,fixed_mask\n" + rows)

    def run(*more: str, **options: str) -> dict[str, dict]:
        arguments = [x for pair in (QUICK | {f"--{k}": v for k, v in options.items()}).items() for x in pair]
        output = tmp_path / "out"
        code = main(["register", "--pairs", str(tmp_path / "pairs.csv"), "--output", str(output), *arguments, *more])
        assert code == 0
        with (output / TABLE).open(newline="") as file:
            return {row["name"]: row for row in csv.DictReader(file)}

    run.folder = tmp_path / "out"
    return run


def times(folder: Path) -> dict[str, int]:
    return {name: (folder / name / QUALITY).stat().st_mtime_ns for name in "ab"}


def test_what_is_the_same_is_kept(cohort, tmp_path):
    cohort()
    before = times(cohort.folder)
    for path in (tmp_path / "fixed.nii.gz", tmp_path / "a.nii.gz"):  # the same content, written again
        path.write_bytes(path.read_bytes())
    rows = cohort(device="auto")
    assert times(cohort.folder) == before
    assert [row["message"] for row in rows.values()] == ["", ""]


def test_a_cohort_without_previews_gets_none_and_is_not_registered_again_for_them(cohort):
    cohort("--no-preview")
    assert not list(cohort.folder.rglob("preview.png"))
    before = times(cohort.folder)
    cohort()
    assert times(cohort.folder) == before


def replaced_image(folder: Path) -> None:
    images.write_image(images.read_image(folder / "a.nii.gz") * 2, folder / "a.nii.gz")


def replaced_mask(folder: Path) -> None:
    images.write_image(images.read_image(folder / "mask.nii.gz") * 0 + 1, folder / "mask.nii.gz")


def replaced_model(folder: Path) -> None:
    model = models.load("tiny")
    with torch.inference_mode(False):
        torch.nn.init.normal_(model.regnet.head.weight, std=0.01)
    models.save(folder / "models", model.card, model.regnet, model.kldivnet)


def damaged_report(folder: Path) -> None:
    (folder / "out" / "a" / QUALITY).write_text('{"quality": {"nmi"')


def report_of_an_older_version(folder: Path) -> None:
    path = folder / "out" / "a" / QUALITY
    report = json.loads(path.read_text())
    del report["origin"]
    path.write_text(json.dumps(report))


def missing_output(folder: Path) -> None:
    (folder / "out" / "a" / "warped.nii.gz").unlink()


def made_by_another_version(folder: Path) -> None:
    path = folder / "out" / "a" / QUALITY
    report = json.loads(path.read_text())
    report["origin"]["version"] = "0.0.9"
    path.write_text(json.dumps(report))


CHANGES = {
    "an input": (replaced_image, {}, "a", "moving differs"),
    "an input of both": (replaced_mask, {}, "ab", "fixed mask differs"),
    "the model": (replaced_model, {}, "ab", "the model differs"),
    "an option": (lambda folder: None, {"spacing": "10"}, "ab", "spacing was 12.0 and is 10.0"),
    "another option": (
        lambda folder: None,
        {"interpolation": "nearest"},
        "ab",
        "interpolation was linear and is nearest",
    ),
    "a damaged report": (damaged_report, {}, "a", "they do not say what they were made from"),
    "an older version": (report_of_an_older_version, {}, "a", "they do not say what they were made from"),
    "another version": (made_by_another_version, {}, "a", f"DivRegNet was version 0.0.9 and is {__version__}"),
    "a file that was removed": (missing_output, {}, "a", "warped.nii.gz is missing"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_what_was_made_from_something_else_is_made_again_and_named(kind, cohort, tmp_path):
    change, options, again, message = CHANGES[kind]
    cohort()
    before = times(cohort.folder)
    change(tmp_path)
    rows = cohort(**options)
    after = times(cohort.folder)
    assert {name for name in "ab" if after[name] != before[name]} == set(again)
    for name, row in rows.items():
        assert row["status"] == "ok"
        assert (f"registered again, since in the earlier results {message}" in row["message"]) == (name in again)
    assert cohort(**options)["a"]["message"] == "" and times(cohort.folder) == after


def test_files_of_an_earlier_registration_do_not_stay_beside_new_ones(cohort, tmp_path, grid, landmarks):
    cohort()
    for name in ("warped_labels.nii.gz", "warped_landmarks.mrk.json"):
        (cohort.folder / "a" / name).write_text("old")
    (cohort.folder / "a" / "notes.txt").write_text("mine")
    cohort("--overwrite")
    left = {p.name for p in (cohort.folder / "a").iterdir()}
    assert left == {*json.loads((cohort.folder / "a" / QUALITY).read_text())["files"], "notes.txt"}


def test_a_file_that_is_replaced_while_it_is_read_is_named(cohort, tmp_path, monkeypatch):
    from DivRegNetLib.run.cohort import register_files

    whole = register_files.check_image

    def exchanged(image, name):
        replaced_image(tmp_path)
        return whole(image, name)

    monkeypatch.setattr(register_files, "check_image", exchanged)
    with pytest.raises(AssertionError):
        cohort()
    with (cohort.folder / TABLE).open(newline="") as file:
        row = next(csv.DictReader(file))
    assert "a.nii.gz: was changed while it was read; wait until it is complete" in row["message"]


def test_voxels_beside_a_header_count_as_the_file(cohort, tmp_path):
    moving = images.read_image(tmp_path / "a.nii.gz")
    sitk.WriteImage(moving, str(tmp_path / "a.mhd"))
    table = tmp_path / "pairs.csv"
    table.write_text(table.read_text().replace("a.nii.gz", "a.mhd"))
    cohort()
    before = times(cohort.folder)
    sitk.WriteImage(moving * 2, str(tmp_path / "other.mhd"))
    (tmp_path / "a.raw").write_bytes((tmp_path / "other.raw").read_bytes())
    assert "moving differs" in cohort()["a"]["message"]
    after = times(cohort.folder)
    assert after["a"] != before["a"] and after["b"] == before["b"]
