"""The preparation of a cohort: checks in physical space, interruptions and broken files."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from DivRegNetLib.core.grid import Grid, apply_matrix
from DivRegNetLib.quality import metrics
from training.data import cohort, layouts
from training.data.layouts import Source
from training.data.prepare import Preparation, main, prepare_cohort
from training.data.space import MOST_VOXELS, frames, measure

SCRIPT = Path(__file__).resolve().parents[2] / "training" / "data" / "prepare.py"
MARKS = np.array([(14.0, -60.0, 95.0), (52.0, -45.0, 100.0), (28.0, -30.0, 135.0), (38.0, -75.0, 120.0)])
"""LPS points inside the phantom of conftest.py; label k is a ball about the k-th."""


def balls(grid: Grid, to_phantom: np.ndarray | None = None, radius: float = 11.0) -> sitk.Image:
    """The label map of MARKS on a grid, uint8."""
    k, j, i = np.indices(grid.shape)
    points = grid.to_physical(np.stack([i, j, k], -1))
    points = points if to_phantom is None else apply_matrix(to_phantom, points)
    found = np.zeros(grid.shape, np.uint8)
    for label, mark in enumerate(MARKS, start=1):
        found[np.linalg.norm(points - mark, axis=-1) < radius] = label
    return grid.image(found)


def finer(grid: Grid) -> Grid:
    """The same extent in voxels of half the side."""
    halved = np.diag([0.5, 0.5, 0.5, 1.0])
    halved[:3, 3] = -0.25
    return Grid([2 * side for side in grid.size], grid.matrix @ halved)


def read(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Images (C, D, H, W) float32 and labels of a prepared volume."""
    with np.load(folder / f"{name}.npz") as arrays:
        assert arrays["images"].dtype == np.float16
        return arrays["images"].astype(np.float32), arrays.get("labels")


def marks_found(about: dict, labels: np.ndarray) -> np.ndarray:
    """Middle of each label in the common space, (n, 3) LPS mm."""
    middles = [np.argwhere(labels == label).mean(0)[::-1] for label in range(1, len(MARKS) + 1)]
    return np.array(middles) * about["spacing"] + about["origin"]


@pytest.fixture
def save(tmp_path):
    """``(name, image, labels=None, ending=".nii.gz", **source) -> Source``: writes the files."""

    def write(
        name: str, image: sitk.Image, labels: sitk.Image | None = None, ending: str = ".nii.gz", **kind
    ) -> Source:
        file = tmp_path / f"raw/{name}{ending}"
        file.parent.mkdir(exist_ok=True)
        sitk.WriteImage(image, str(file))
        drawn = None
        if labels is not None:
            drawn = tmp_path / f"raw/{name}-labels.nii.gz"
            sitk.WriteImage(labels, str(drawn))
        return Source(name, kind.pop("subject", name), (file,), ("image",), drawn, **kind)

    return write


@pytest.fixture
def few(save, paint, grid_about):
    """Three small heads, each shifted and on its own grid, with labels; they are aligned."""
    grids = [grid_about((31 + 3 * i, -47, 112), (12 + i, 14, 13), (9.0, 8.0, 8.5), (5 * i, 0, 10)) for i in range(3)]
    endings = (".nii.gz", ".nrrd", ".mha")
    return [save(f"head{i}", paint(grid), balls(grid), endings[i]) for i, grid in enumerate(grids)]


QUICK = Preparation(spacing_mm=8.0, align="none", workers=1)


def done(sources: list[Source], output: Path, preparation: Preparation = QUICK) -> list[str]:
    """Prepares a cohort and returns the names of the volumes that were processed."""
    made: list[str] = []
    prepare_cohort(sources, output, preparation, lambda name, done, total: made.append(name))
    return sorted(made)


def about(folder: Path) -> dict:
    return json.loads((folder / "cohort.json").read_text())


def test_volumes_of_any_grid_and_pose_are_aligned_to_the_reference(
    save, paint, grid, moving_grid, rigid, other_contrast, tmp_path
):
    """The second head is rotated, stretched and shifted, with another contrast, on a left-handed anisotropic grid."""
    stretch = np.eye(4)
    stretch[:3, :3] = np.diag([1.05, 0.96, 1.03])
    about_head = rigid((0, 0, 0), (31, -47, 112))
    truth = rigid((10, -6, 14), (9.0, -7.0, 8.0)) @ about_head @ stretch @ np.linalg.inv(about_head)
    back, grid, moving_grid = np.linalg.inv(truth), finer(grid), finer(moving_grid)
    sources = [
        save("fixed", paint(grid), balls(grid), split="train"),
        save("moved", paint(moving_grid, back, other_contrast), balls(moving_grid, back), split="test"),
    ]
    listing = prepare_cohort(sources, tmp_path / "out", Preparation(spacing_mm=4.0, reference="fixed", workers=1))
    result = json.loads(listing.read_text())
    images, labels = zip(*(read(listing.parent, name) for name in ("fixed", "moved")), strict=True)
    common = Grid.build(result["shape"][::-1], [4.0] * 3, result["origin"])

    # The reference: exactly where its header says.
    fixed, moved = result["volumes"]
    np.testing.assert_array_equal(fixed["to_reference"], np.eye(4))
    assert np.linalg.norm(marks_found(result, labels[0]) - MARKS, axis=1).max() < 1.5
    exact = sitk.GetArrayFromImage(paint(common))
    inside = grid.contains(common.to_physical(np.argwhere(exact > 0.2)[:, ::-1]))
    assert np.corrcoef(images[0][0][exact > 0.2][inside], exact[exact > 0.2][inside])[0, 1] > 0.98
    # The other: the known map is undone, to half a voxel.
    error = apply_matrix(np.array(moved["to_reference"]), MARKS) - apply_matrix(truth, MARKS)
    assert np.linalg.norm(error, axis=1).max() < 2
    assert np.linalg.norm(marks_found(result, labels[1]) - MARKS, axis=1).max() < 2
    assert metrics.dice(labels[0] > 0, labels[1] > 0) > 0.85
    plain = sitk.Resample(balls(moving_grid, back), common.empty_image(sitk.sitkUInt8), sitk.Transform(), 1)
    assert metrics.dice(labels[0] > 0, sitk.GetArrayFromImage(plain) > 0) < 0.5, "the start must be bad"
    # The second contrast, put into the first one's intensities, is the first.
    as_first = paint(common, None, other_contrast)
    clear = (exact > 0.3) & (images[1][0] > 0)
    assert np.corrcoef(images[1][0][clear], sitk.GetArrayFromImage(as_first)[clear])[0, 1] > 0.9


def test_the_bundled_pair_is_aligned(sample_data, tmp_path):
    """BrainWeb's T1 and its T2, deformed and rotated by a known map; labels are AAL's."""
    pair = [
        Source(name, name, (sample_data / f"{name}.nii.gz",), (name[-2:],), sample_data / f"{name}_labels.nii.gz", role)
        for name, role in (("fixed_T1", "fixed"), ("moving_T2", "moving"))
    ]
    dice = {}
    for align in ("none", "affine"):
        folder = prepare_cohort(pair, tmp_path / align, Preparation(spacing_mm=4.0, align=align, workers=1)).parent
        fixed, moving = (read(folder, source.name)[1] for source in pair)
        dice[align] = metrics.dice(fixed > 0, moving > 0)
    assert dice["none"] < 0.85
    assert dice["affine"] > 0.88
    loaded = cohort.load(folder)
    assert [(v.name, v.role, v.contrasts) for v in loaded.volumes] == [
        ("fixed_T1", "fixed", ("T1",)),
        ("moving_T2", "moving", ("T2",)),
    ]


@pytest.fixture
def scanned_twice(save, paint, grid_about, rigid, other_contrast):
    """A reference, and two scans of another person in one frame; the second scan shows only the upper half of the head,
    which is too little to align it well."""
    elsewhere = np.linalg.inv(rigid((6, -4, 8), (25.0, -14.0, 30.0)))
    full, part = (grid_about((55, -60, 140 + up), (24, 26, n), (5.0, 5.0, 5.0)) for up, n in ((0, 26), (28, 13)))
    return [
        save("reference", paint(finer(grid_about((31, -47, 112), (12, 14, 13), (9.0, 8.0, 8.5)))), split="train"),
        save("mr", paint(part, elsewhere, other_contrast), subject="twice", role="moving", split="test"),
        save("ct", paint(full, elsewhere), subject="twice", split="test"),
    ]


def places(sources: list[Source], output: Path, **settings) -> dict[str, np.ndarray]:
    """Name -> map from the common space to the volume."""
    listing = prepare_cohort(sources, output, Preparation(spacing_mm=8.0, reference="reference", workers=1, **settings))
    return {v["name"]: np.array(v["to_reference"]) for v in json.loads(listing.read_text())["volumes"]}


def test_volumes_of_a_subject_in_one_frame_share_the_alignment_of_the_one_most_similar_to_the_reference(
    scanned_twice, tmp_path
):
    together, apart = (places(scanned_twice, tmp_path / str(t), together=t) for t in (True, False))
    np.testing.assert_array_equal(together["ct"], together["mr"])
    np.testing.assert_array_equal(together["ct"], apart["ct"])
    assert not np.allclose(apart["mr"], apart["ct"], atol=0.5)
    assert not np.allclose(together["ct"], np.eye(4), atol=0.5)


def test_volumes_of_a_subject_in_different_frames_are_aligned_separately(scanned_twice, tmp_path):
    reference, mr, ct = scanned_twice
    header = measure(mr)
    far = np.eye(4)
    far[0, 3] = 400.0
    headers = {s.name: measure(s) for s in scanned_twice}
    assert [[s.name for s in f] for f in frames(scanned_twice, headers, reference, True)] == [
        ["reference"],
        ["ct", "mr"],
    ]
    headers["mr"] = replace(header, grid=Grid(header.grid.size, far @ header.grid.matrix))
    assert len(frames(scanned_twice, headers, reference, True)) == 3
    named = [reference, replace(mr, frame="a"), replace(ct, frame="a")]
    assert len(frames(named, headers, reference, True)) == 2
    headers["mr"] = header
    assert len(frames([reference, mr, replace(ct, frame="a")], headers, reference, True)) == 3


def test_if_the_first_volume_of_a_frame_is_broken_the_next_one_is_aligned(scanned_twice, tmp_path):
    reference, mr, ct = scanned_twice
    alone = places([reference, mr], tmp_path / "alone")
    content = ct.images[0].read_bytes()
    ct.images[0].write_bytes(content[: len(content) // 2])
    left = places(scanned_twice, tmp_path / "out", skip_broken=True)
    assert set(left) == {"reference", "mr"}
    np.testing.assert_array_equal(left["mr"], alone["mr"])
    ct.images[0].write_bytes(content)  # mended: the other one follows it again
    both = places(scanned_twice, tmp_path / "out")
    np.testing.assert_array_equal(both["mr"], both["ct"])
    assert not np.allclose(both["mr"], alone["mr"], atol=0.5)


def test_a_prepared_cohort_can_be_loaded(few, tmp_path):
    listing = prepare_cohort(few, tmp_path / "out", QUICK)
    assert listing == tmp_path / "out/cohort.json"
    result, loaded = about(listing.parent), cohort.load(listing.parent)
    assert result["format"] == cohort.FORMAT
    assert result["reference"] in {source.name for source in few}
    assert result["preparation"]["align"] == "none"
    assert result["skipped"] == []
    assert loaded.spacing == 8 and all(side % 16 == 0 for side in loaded.shape)
    assert {v.split for v in loaded.volumes} == set(layouts.SPLITS)
    for volume, source, entry in zip(loaded.volumes, few, result["volumes"], strict=True):
        assert (volume.name, volume.subject, volume.files) == (source.name, source.subject, source.images)
        assert entry["files"]["labels"] == str(source.labels)
        assert volume.images.shape == (1, 1, *loaded.shape) and volume.labels.shape == (1, 1, *loaded.shape)
        assert volume.images.min() == 0 and volume.images.max() == 1
        assert set(volume.labels.unique().tolist()) == {0, 1, 2, 3, 4}
    assert sorted(path.name for path in listing.parent.iterdir()) == [
        "cohort.json",
        *(f"head{i}.npz" for i in range(3)),
    ]


def test_contrasts_and_labels_on_different_grids_are_joined_in_physical_space(
    save, paint, grid, moving_grid, other_contrast, tmp_path
):
    first, second = save("T1", paint(grid), balls(moving_grid)), save("T2", paint(moving_grid, None, other_contrast))
    both = Source("head", "head", (*first.images, *second.images), ("T1", "T2"), first.labels)
    folder = prepare_cohort([both], tmp_path / "out", Preparation(spacing_mm=5.0, workers=1)).parent
    images, labels = read(folder, "head")
    result = about(folder)
    assert images.shape == (2, *result["shape"]) and result["volumes"][0]["contrasts"] == ["T1", "T2"]
    assert np.linalg.norm(marks_found(result, labels) - MARKS, axis=1).max() < 2
    clear = (images[0] > 0.3) & (images[1] > 0)
    exact = paint(Grid.build(result["shape"][::-1], [5.0] * 3, result["origin"]), None, other_contrast)
    assert np.corrcoef(images[1][clear], sitk.GetArrayFromImage(exact)[clear])[0, 1] > 0.95


def test_the_spacing_is_chosen_from_the_cohort_within_a_limit_of_voxels(save, tmp_path, grid_about):
    noise = np.random.default_rng(0).random((20, 20, 20)).astype(np.float32)
    sides = (1.9, 2.1, 5.0)
    sources = [
        save(f"v{i}", grid_about((0, 0, 0), (20, 20, 20), (side, side, 3 * side)).image(noise))
        for i, side in enumerate(sides)
    ]
    chosen = about(prepare_cohort(sources, tmp_path / "out", Preparation(align="none", workers=1)).parent)
    assert chosen["spacing"] == 2
    huge = save("huge", grid_about((0, 0, 0), (20, 20, 20), (2.0, 2.0, 300.0 / 2)).image(noise))
    long = about(prepare_cohort([huge], tmp_path / "long", Preparation(align="none", workers=1)).parent)
    assert MOST_VOXELS < 32 * 32 * 1504, "what 2 mm would take"
    assert long["spacing"] == 2.5 and np.prod(long["shape"]) <= MOST_VOXELS
    with pytest.raises(ValueError, match=r"at 0.1 mm the common grid has .* voxels, more than .*; choose a coarser"):
        prepare_cohort([huge], tmp_path / "fine", Preparation(spacing_mm=0.1, align="none", workers=1))


def test_the_reference_is_the_median_of_the_training_volumes_that_may_be_fixed(save, paint, grid_about, tmp_path):
    def head(name: str, side: int, role: str, split: str) -> Source:
        return save(name, paint(grid_about((31, -47, 112), (side,) * 3, (8.0,) * 3)), role=role, split=split)

    sources = [
        head("a", 10, "fixed", "train"),
        head("b", 12, "fixed", "train"),
        head("c", 14, "fixed", "train"),
        head("d", 18, "fixed", "test"),
        head("e", 19, "fixed", "validation"),
        head("f", 20, "moving", "train"),
    ]
    assert about(prepare_cohort(sources, tmp_path / "out", QUICK).parent)["reference"] == "b"
    named = Preparation(spacing_mm=8.0, align="none", reference="f", workers=1)
    assert about(prepare_cohort(sources, tmp_path / "out", named).parent)["reference"] == "f"
    with pytest.raises(ValueError, match="the reference 'z' is not in the cohort; its volumes are a, b"):
        prepare_cohort(sources, tmp_path / "out", Preparation(reference="z", align="none", workers=1))


def test_a_second_run_reprocesses_only_what_changed(few, tmp_path, paint, grid):
    output = tmp_path / "out"
    keep = {"spacing_mm": 8.0, "align": "none", "reference": "head1", "workers": 1}
    names = ["head0", "head1", "head2"]
    assert done(few, output, Preparation(**keep)) == names
    first = about(output)
    assert done(few, output, Preparation(**keep)) == []
    assert about(output) == first
    os.utime(few[0].labels, ns=(1, 1))
    assert done(few, output, Preparation(**keep)) == ["head0"]
    (output / "head2.npz").write_bytes((output / "head2.npz").read_bytes()[:-50])
    assert done(few, output, Preparation(**keep)) == ["head2"]
    assert done(few[:2], output, Preparation(**keep)) == []
    assert done(few, output, Preparation(**keep, seed=5, fractions=(1, 1, 1))) == [], "a split is no reason"
    assert done(few, output, Preparation(**keep | {"align": "center"})) == names
    assert done(few, output, Preparation(**keep | {"align": "center", "spacing_mm": 9.0})) == names
    sitk.WriteImage(paint(grid), str(few[1].images[0]))
    assert done(few, output, Preparation(**keep | {"align": "center", "spacing_mm": 9.0})) == names, "the reference"


def test_while_volumes_are_reprocessed_there_is_no_listing(few, tmp_path):
    output = tmp_path / "out"
    prepare_cohort(few, output, QUICK)

    class Stop(Exception):
        pass

    def stop(name: str, done: int, total: int) -> None:
        raise Stop

    with pytest.raises(Stop):
        prepare_cohort(few, output, Preparation(spacing_mm=9.0, align="none", workers=1), stop)
    assert not (output / "cohort.json").exists()
    assert len(done(few, output, Preparation(spacing_mm=9.0, align="none", workers=1))) == 2


def test_a_killed_preparation_leaves_complete_files_and_has_the_same_result_when_run_again(
    few, save, paint, grid_about, rigid, tmp_path
):
    """The command line, killed at its first file, then with two worker processes, against a run without interruption."""
    turned = grid_about((31, -47, 112), (13, 14, 15), (9.0, 8.0, 7.5), (0, 6, 10))
    save("turned", paint(turned, rigid((8, 0, 3))))
    raw, output = tmp_path / "raw", tmp_path / "killed"
    for source in few:
        source.labels.unlink()
    command = [sys.executable, str(SCRIPT), "--images", str(raw), "--output", str(output), "--spacing", "8"]
    command += ["--align", "rigid", "--workers"]
    process = subprocess.Popen([*command, "1"], start_new_session=True, stderr=subprocess.DEVNULL)
    while not list(output.glob("*.npz")) and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it must have been at work"
    left = {path.name: path.stat().st_mtime_ns for path in output.glob("*.npz")}
    assert 1 <= len(left) < 4 and not (output / "cohort.json").exists()
    for name in left:
        with np.load(output / name) as arrays:
            assert arrays["images"].shape[0] == 1
    again = subprocess.run([*command, "2"], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "4/4" in again.stderr, "the bar"
    assert "mm, reference" in again.stdout
    assert all((output / name).stat().st_mtime_ns == when for name, when in left.items()), "done is done"
    whole = Preparation(spacing_mm=8.0, align="rigid", workers=1)
    unbroken = prepare_cohort(layouts.folder(raw), tmp_path / "unbroken", whole).parent
    for path in (*unbroken.glob("*.npz"), unbroken / "cohort.json"):
        assert (output / path.name).read_bytes() == path.read_bytes(), path.name


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _cut_inside(file: Path) -> None:
    """A file that was truncated first and compressed afterwards."""
    whole = gzip.decompress(file.read_bytes())
    file.write_bytes(gzip.compress(whole[: len(whole) // 2]))


def _image(change) -> object:
    """A way to break a file: its array (D, H, W) changed."""

    def write(file: Path) -> None:
        image = sitk.ReadImage(str(file))
        sitk.WriteImage(Grid.of(image).image(change(sitk.GetArrayFromImage(image))), str(file))

    return write


def _moved(file: Path) -> None:
    image = sitk.ReadImage(str(file))
    image.SetOrigin((900.0, 0.0, 0.0))
    sitk.WriteImage(image, str(file))


def _moved_with_labels(file: Path) -> None:
    _moved(file)
    _moved(file.with_name(file.name.replace(".nii.gz", "-labels.nii.gz")))


def _four_dimensional(file: Path) -> None:
    image = sitk.ReadImage(str(file))
    sitk.WriteImage(sitk.JoinSeries([image, image]), str(file))


BROKEN = {
    "missing": ("image", Path.unlink, "there is no such file"),
    "empty": ("image", lambda file: file.write_bytes(b""), "the file is empty"),
    "garbage": ("image", lambda file: file.write_bytes(b"no image" * 100), "cannot be read as an image"),
    "cut short": ("image", _cut, "the file is cut short or damaged; fetch it again"),
    "cut when unpacked": ("image", _cut_inside, "the file is cut short or damaged; fetch it again"),
    "four dimensions": ("image", _four_dimensional, "has 4 dimensions, 3 are needed"),
    "components": ("image", _image(lambda a: np.stack([a] * 3, -1)), "has 3 components per voxel, 1 is needed"),
    "constant": ("image", _image(lambda a: a * 0 + 7), r"is constant \(7 everywhere\)"),
    "far away": (
        "image",
        _moved_with_labels,
        "the volume lies outside the common space after the alignment 'none'; try another --align",
    ),
    "labels missing": ("labels", Path.unlink, "there is no such file"),
    "labels elsewhere": ("labels", _moved, r"no label lies inside head0.nii.gz; give both files the same origin"),
    "labels of halves": ("labels", _image(lambda a: a / np.float32(2)), "holds whole numbers, but .*0.5"),
    "labels of nothing": ("labels", _image(lambda a: a * 0), "no voxel is labeled; draw labels or remove the file"),
    "labels too large": (
        "labels",
        _image(lambda a: a * np.int16(100)),
        "holds labels from 0 to 400, but only 0 to 255 are",
    ),
    "labels below zero": (
        "labels",
        _image(lambda a: -a.astype(np.int16)),
        "holds labels from -4 to 0, but only 0 to 255 are",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_an_unusable_file_is_named_and_left_out_only_on_request(few, tmp_path, kind):
    which, damage, reason = BROKEN[kind]
    file = few[0].images[0] if which == "image" else few[0].labels
    damage(file)
    careful = Preparation(spacing_mm=8.0, align="none", reference="head2", workers=1)
    with pytest.raises(
        ValueError, match=rf"(?s)1 of 3 volumes cannot be used:.*{file.name}: .*{reason}.*--skip-broken"
    ):
        prepare_cohort(few, tmp_path / "out", careful)
    assert not (tmp_path / "out/cohort.json").exists()
    skipping = Preparation(spacing_mm=8.0, align="none", reference="head2", workers=1, skip_broken=True)
    assert done(few, tmp_path / "out", skipping) in ([], ["head0"]), "the others were kept"
    result = about(tmp_path / "out")
    assert [entry["name"] for entry in result["volumes"]] == ["head1", "head2"]
    (skipped,) = result["skipped"]
    assert skipped["file"] == str(file)
    assert not (tmp_path / "out/head0.npz").exists()


def test_all_broken_files_are_named_and_another_reference_is_chosen(few, tmp_path):
    few[1].images[0].write_bytes(b"no image" * 100)
    head2 = sitk.ReadImage(str(few[2].images[0]))
    head2[3, 4, 5] = float("nan")  # in an MHA file: ITK itself replaces NaN in NIfTI by 0
    sitk.WriteImage(head2, str(few[2].images[0]))
    with pytest.raises(
        ValueError, match=r"(?s)2 of 3 volumes.*head1.nrrd: cannot be read.*head2.mha: .*1 voxels that are NaN"
    ):
        prepare_cohort(few, tmp_path / "out", QUICK)
    skipping = Preparation(spacing_mm=8.0, align="none", skip_broken=True, workers=1)
    assert about(prepare_cohort(few, tmp_path / "out", skipping).parent)["reference"] == "head0"
    with pytest.raises(ValueError, match=r"the reference cannot be used: .*head1.nrrd: cannot be read"):
        prepare_cohort(few, tmp_path / "out", Preparation(reference="head1", workers=1, skip_broken=True))
    few[0].images[0].unlink()
    with pytest.raises(ValueError, match="3 of 3 volumes cannot be used"):
        prepare_cohort(few, tmp_path / "out", skipping)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"spacing_mm": 0.0}, "spacing_mm is a number of millimeters from 0.1 to 50, got 0.0"),
        ({"align": "elastic"}, "align is one of none, center, rigid, affine, got 'elastic'"),
        ({"workers": -1}, "workers is a number of processes"),
        ({"fractions": (0.5, 0.1, 0.1)}, "add up to 1"),
    ],
)
def test_an_invalid_setting_is_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        Preparation(**setting)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((), "no cohort is named; give --images"), (("--images", "nowhere"), "nowhere: there is no such folder")],
)
def test_the_command_explains_an_error_in_one_sentence(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["prepare.py", *arguments, "--output", str(tmp_path / "out")])
    assert main() == 2
    said = capsys.readouterr().err
    assert said.startswith("prepare.py: ") and message in said
