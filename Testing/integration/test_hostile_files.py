"""Damaged and misnamed files, links, pipes, full disks: the right result, or an error in one sentence and no file changed."""

import gzip
import os
import re
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from DivRegNetLib.core.grid import Grid
from DivRegNetLib.errors import InputError
from DivRegNetLib.io import atomic, images, landmarks, transforms
from DivRegNetLib.io.atomic import STAGING
from DivRegNetLib.run.cli import main

NOBODY = 65534


@pytest.fixture(autouse=True)
def in_time():
    """What waits for a pipe for ever fails."""

    def stop(*_):
        raise TimeoutError("it waits for something that does not come")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def image() -> sitk.Image:
    made = sitk.GetImageFromArray(np.random.default_rng(0).random((10, 11, 12), dtype=np.float32))
    made.SetSpacing((1.0, 2.0, 3.0))
    made.SetOrigin((5.0, -6.0, 7.0))
    return made


@pytest.fixture
def good(image, tmp_path) -> Path:
    path = tmp_path / "good.nii.gz"
    images.write_image(image, path)
    return path


@pytest.fixture
def identity(tmp_path) -> Path:
    path = tmp_path / "identity.tfm"
    sitk.WriteTransform(sitk.AffineTransform(3), str(path))
    return path


def tree(folder: Path) -> dict:
    """Every file below a folder: size and time of last change."""
    return {
        p: (p.lstat().st_size, p.lstat().st_mtime_ns) for p in folder.rglob("*") if p.is_symlink() or not p.is_dir()
    }


def packed(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes())


def written(name: str, content) -> object:
    """A way to put a file beside the good one: its content from that one."""

    def put(folder: Path, good: Path) -> Path:
        path = folder / name
        path.write_bytes(content(good))
        return path

    return put


def converted(name: str, share: float, compressed: bool = False) -> object:
    """The good image in another format, of which only the first part is left."""

    def put(folder: Path, good: Path) -> Path:
        path = folder / name
        sitk.WriteImage(sitk.ReadImage(str(good)), str(path), useCompression=compressed)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
        return path

    return put


def with_value(value: float, order: str) -> object:
    """The good image with one voxel of a value that is no number, in either byte order."""

    def put(folder: Path, good: Path) -> Path:
        content = bytearray(packed(good))
        content[352:] = np.frombuffer(content[352:], "<f4").astype(f"{order}f4").tobytes()
        struct.pack_into(f"{order}f", content, 352 + 4 * 77, value)
        if order == ">":
            for start, kind in ((0, "i"), (40, "8h"), (70, "2h"), (76, "11f"), (252, "2h"), (256, "18f"), (344, "")):
                values = struct.unpack_from(f"<{kind}", content, start)
                struct.pack_into(f">{kind}", content, start, *values)
        path = folder / "bad.nii"
        path.write_bytes(content)
        return path

    return put


def header_changed(start: int, kind: str, *values) -> object:
    def put(folder: Path, good: Path) -> Path:
        content = bytearray(packed(good))
        struct.pack_into(f"<{kind}", content, start, *values)
        path = folder / "bad.nii"
        path.write_bytes(content)
        return path

    return put


def pair_cut_short(folder: Path, good: Path) -> Path:
    path = folder / "pair.hdr"
    sitk.WriteImage(sitk.ReadImage(str(good)), str(path))
    voxels = folder / "pair.img"
    voxels.write_bytes(voxels.read_bytes()[:1000])
    return path


def link_to(target: str) -> object:
    def put(folder: Path, good: Path) -> Path:
        path = folder / "link.nii.gz"
        path.symlink_to(folder / target)
        return path

    return put


def pipe(folder: Path, good: Path) -> Path:
    path = folder / "pipe.nii.gz"
    os.mkfifo(path)
    return path


def folder_named_like_a_file(folder: Path, good: Path) -> Path:
    path = folder / "folder.nii.gz"
    path.mkdir()
    return path


def no_text(folder: Path, good: Path) -> Path:
    path = Path(os.fsdecode(os.fsencode(folder) + b"/\xff.nii.gz"))
    path.write_bytes(good.read_bytes())
    return path


NRRD = b"NRRD0004\ntype: short\ndimension: 3\nsizes: 60000 60000 60000\nencoding: raw\nendian: little\n\nabcd"
META = (
    b"ObjectType = Image\nNDims = 3\nBinaryData = True\nDimSize = 4 4 4\nElementSpacing = 0 1 1\n"
    b"ElementType = MET_CHAR\nElementDataFile = LOCAL\n" + bytes(range(64))
)
SHEAR = (1.0, 0.5, 0.0, 10.0, 0.0, 2.0, 0.0, 20.0, 0.0, 0.0, 3.0, 30.0)
DAMAGED = {
    "gzip cut": (written("bad.nii.gz", lambda g: g.read_bytes()[:3000]), "cut short or damaged; fetch it again"),
    "gzip flipped": (
        written("bad.nii.gz", lambda g: g.read_bytes()[:3000] + b"\0" * 60 + g.read_bytes()[3060:]),
        "cut short or damaged; fetch it again|cannot be read as an image",
    ),
    "cut, then packed": (written("bad.nii.gz", lambda g: gzip.compress(packed(g)[:3000])), "cut short"),
    "nii cut": (written("bad.nii", lambda g: packed(g)[:-1]), "cut short"),
    "img cut": (pair_cut_short, "cut short"),
    "nrrd cut": (converted("bad.nrrd", 0.5), "cannot be read as an image .*; is it complete"),
    "packed nrrd cut": (converted("bad.nrrd", 0.5, True), "cannot be read as an image"),
    "mha cut": (converted("bad.mha", 0.5), "cannot be read as an image"),
    "packed mha cut": (converted("bad.mha", 0.5, True), "cannot be read as an image"),
    "NaN in NIfTI": (with_value(np.nan, "<"), "holds 1 voxels that are NaN or infinite; replace them"),
    "infinity in NIfTI of the other byte order": (with_value(np.inf, ">"), "holds 1 voxels that are NaN or infinite"),
    "voxels said to start far off": (header_changed(108, "f", 1e9), "cut short"),
    "voxels said to be many": (header_changed(42, "3h", 30000, 30000, 30000), "cut short"),
    "voxels said to be very many": (written("bad.nrrd", lambda g: NRRD), "cannot be read as an image"),
    "sides below zero": (header_changed(42, "h", -5), "cannot be read as an image"),
    "an unknown type": (header_changed(70, "h", 1000), "cannot be read as an image"),
    "place that is not finite": (header_changed(280, "12f", *[np.nan] * 12), "not finite; repair its header|cannot be"),
    "sheared sform, straight qform": (
        header_changed(280, "12f", *SHEAR),
        "its sform is sheared .* up to .* mm; resample",
    ),
    "voxel sizes below zero": (header_changed(80, "3f", -1.0, -2.0, -3.0), "does not fit its voxel sizes"),
    "spacing of nought": (written("bad.mha", lambda g: META), "cannot be read as an image"),
    "in meters": (header_changed(123, "B", 1), "spacing of 3000 mm; repair its header"),
    "nrrd named nii.gz": (
        lambda folder, good: converted("a.nrrd", 1.0)(folder, good).rename(folder / "bad.nii.gz"),
        "cannot be read as an image .* the format its name says",
    ),
    "gzip named nii": (written("bad.nii", lambda g: g.read_bytes()), "of the format its name says"),
    "named txt": (written("bad.txt", lambda g: g.read_bytes()), "of the format its name says"),
    "zero bytes": (written("bad.nii.gz", lambda g: b""), "the file is empty"),
    "noise": (written("bad.nii.gz", lambda g: bytes(range(256)) * 20), "cannot be read as an image"),
    "a folder": (folder_named_like_a_file, "holds no DICOM series"),
    "a link to nothing": (link_to("nowhere"), "is a link to .*nowhere, which does not exist"),
    "a link to itself": (link_to("link.nii.gz"), "cannot be opened"),
    "a pipe": (pipe, "not a regular file"),
    "a device": (lambda folder, good: Path("/dev/zero"), "not a regular file"),
    "a name too long": (lambda folder, good: folder / ("a" * 300), "cannot be opened"),
    "a name that is no text": (no_text, "the name is not valid UTF-8; rename"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_file_that_cannot_be_used_is_one_sentence_and_nothing_changes(kind, good, tmp_path, capfd):
    make, message = DAMAGED[kind]
    path = make(tmp_path, good)
    before = tree(tmp_path)
    capfd.readouterr()
    for arguments in ([path, good], [good, path], [good, good, "--moving-mask", path]):
        assert main(["register", *map(str, arguments), "--output", str(tmp_path / "out"), "--device", "cpu"]) == 2
        said = [line for line in capfd.readouterr().err.splitlines() if not line.endswith("...")]
        assert len(said) == 1, "one sentence, and nothing of the libraries below"
        assert said[0].startswith("divregnet: ")
        assert re.search(message, said[0]), said[0]
    assert tree(tmp_path) == before


@pytest.mark.parametrize("option", ["--fixed-landmarks", "--pairs", "--align", "--model"])
def test_a_pipe_instead_of_another_file_is_not_waited_for(option, good, tmp_path, capsys):
    path = tmp_path / "pipe.json"
    os.mkfifo(path)
    arguments = [option, str(path)] + ([] if option == "--pairs" else [str(good), str(good)])
    if option == "--fixed-landmarks":
        arguments += ["--moving-landmarks", str(path)]
    assert main(["register", *arguments, "--output", str(tmp_path / "out"), "--device", "cpu"]) == 2
    assert "pipe.json" in capsys.readouterr().err


NAMES = ["with spaces.nii.gz", "qu'o\"te.nii.gz", "new\nline.nii.gz", "ünï日本.nii.gz", "-dash.nii.gz",
         "$(touch x);.nii.gz", "%s%n.nii.gz", "UPPER.NII.GZ"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_any_name_can_be_read_and_written(name, good, identity, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(good.read_bytes())
    Path("results").mkdir()
    apply = ["apply", f"--reference={name}", f"--output=results/{name}", "--", str(identity), name]
    assert main(apply) == 0
    arrays = [sitk.GetArrayFromImage(images.read_image(path)) for path in (name, Path("results") / name)]
    np.testing.assert_allclose(arrays[1], arrays[0], atol=1e-6)
    assert sorted(os.listdir()) == sorted(["good.nii.gz", "identity.tfm", "results", name])


def test_a_nifti_file_that_is_not_packed_though_its_name_says_so_is_read(good, image, tmp_path):
    path = tmp_path / "plain.nii.gz"
    path.write_bytes(packed(good))
    np.testing.assert_array_equal(*(sitk.GetArrayFromImage(i) for i in (images.read_image(path), image)))


def test_where_sform_and_qform_differ_the_sform_counts_as_in_slicer(good, tmp_path):
    sform = (0.0, 2.0, 0.0, 10.0, 1.0, 0.0, 0.0, 20.0, 0.0, 0.0, 3.0, 30.0)
    read = images.read_image(header_changed(280, "12f", *sform)(tmp_path, good))
    ras = Grid.of(read).ras_matrix
    np.testing.assert_allclose(ras[:3].ravel(), sform, atol=1e-5)


def test_an_sform_of_zeros_is_none_and_the_qform_counts(good, image, tmp_path):
    assert Grid.of(images.read_image(header_changed(280, "12f", *[0.0] * 12)(tmp_path, good))) == Grid.of(image)


def test_a_negative_voxel_size_is_a_turned_axis(tmp_path):
    path = tmp_path / "turned.mha"
    path.write_bytes(META.replace(b"= 0 1 1", b"= -2 1 1"))
    read = images.read_image(path)
    assert read.GetSpacing() == (2, 1, 1)
    assert read.TransformIndexToPhysicalPoint((3, 0, 0)) == (-6, 0, 0)


def test_dimensions_of_one_beyond_the_third_do_not_count(image, tmp_path):
    path = tmp_path / "one.nii.gz"
    sitk.WriteImage(sitk.JoinSeries([image]), str(path))
    assert images.read_image(path).GetSize() == image.GetSize()


# --- DICOM


def write_slices(folder: Path, image: sitk.Image, series: int = 1, first: int = 0, **tags) -> None:
    """A series of slices, each where the image has it; ``tags`` of a slice: ``{tag: function of k}``."""
    folder.mkdir(exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    uid = "1.2.826.0.1.3680043.2.1125"
    direction = np.reshape(image.GetDirection(), (3, 3))
    for k in range(image.GetDepth()):
        cut = sitk.Cast(image[:, :, k] * 1000, sitk.sitkInt16)
        place = image.TransformIndexToPhysicalPoint((0, 0, k))
        for tag, value in {
            "0008|0060": "CT", "0008|0008": "ORIGINAL\\PRIMARY\\AXIAL", "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
            "0020|000d": f"{uid}.2", "0020|000e": f"{uid}.1.{series}", "0008|0018": f"{uid}.3.{series}.{first + k}",
            "0020|0013": str(first + k), "0020|0032": "\\".join(f"{v:.6f}" for v in place),
            "0020|0037": "\\".join(f"{v:.6f}" for v in direction[:, :2].T.ravel()), "0018|0050": "3",
        }.items():  # fmt: skip
            cut.SetMetaData(tag, value)
        for tag, value in tags.items():
            cut.SetMetaData(tag, value(k))
        writer.SetFileName(str(folder / f"{series}-{first + k:03d}.dcm"))
        writer.Execute(cut)


def refused(folder: Path, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        images.read_image(folder)
    assert str(error.value).startswith(f"{folder}: ")


def test_a_dicom_series_lies_where_its_slices_say_however_it_is_turned(image, tmp_path, grid):
    turned = Grid(image.GetSize(), grid.matrix).stamp(sitk.Image(image))
    write_slices(tmp_path / "dicom", turned)
    read = images.read_image(tmp_path / "dicom")
    np.testing.assert_allclose(Grid.of(read).corners(), Grid.of(turned).corners(), atol=1e-3)


def test_a_tilted_gantry_leans_the_axis_from_slice_to_slice(image, tmp_path):
    matrix = Grid.of(image).matrix.copy()
    matrix[:3, 2] = (0.0, 1.1, 3.0)
    tilted = Grid(image.GetSize(), matrix).stamp(sitk.Image(image))
    write_slices(tmp_path / "dicom", tilted)
    read = images.read_image(tmp_path / "dicom")
    np.testing.assert_allclose(Grid.of(read).corners(), Grid.of(tilted).corners(), atol=1e-3)


def test_a_tilted_volume_is_not_written_where_its_place_would_be_lost(image, good, identity, tmp_path, capsys):
    image.SetDirection((1, 0, 0, 0, 1, 0.34, 0, 0, 0.94))
    tilted = tmp_path / "tilted.nrrd"
    images.write_image(image, tilted)
    assert Grid.of(images.read_image(tilted)) == Grid.of(image)
    before = tree(tmp_path)
    assert main(["register", str(tilted), str(good), "--output", str(tmp_path / "out"), "--device", "cpu"]) == 2
    assert main(["apply", str(identity), str(good), f"--reference={tilted}", f"--output={tmp_path / 'a.nii.gz'}"]) == 2
    assert capsys.readouterr().err.count("not at right angles") == 2
    assert tree(tmp_path) == before


def test_two_series_in_one_folder_are_refused_with_their_sizes(image, tmp_path):
    write_slices(tmp_path / "dicom", image, series=1)
    write_slices(tmp_path / "dicom", image[:, :, :3], series=2)
    refused(tmp_path / "dicom", r"holds 2 DICOM series \(.*10 files in .*3 files in .*\); keep one")


def test_missing_slices_are_noticed(image, tmp_path):
    write_slices(tmp_path / "dicom", image)
    for k in (4, 5):
        (tmp_path / f"dicom/1-{k:03d}.dcm").unlink()
    refused(
        tmp_path / "dicom",
        "slices are missing .*: most are 3 mm from the next, but slices 4 and 5 are 9 mm apart; complete",
    )


def test_a_localizer_is_refused(image, tmp_path):
    turns = ("1\\0\\0\\0\\1\\0", "0\\1\\0\\0\\0\\-1", "1\\0\\0\\0\\0\\-1")
    write_slices(tmp_path / "dicom", image[:, :, :3], **{"0020|0037": lambda k: turns[k]})
    refused(tmp_path / "dicom", "not parallel, as of a localizer")


def test_several_volumes_in_one_series_are_refused(image, tmp_path):
    write_slices(tmp_path / "dicom", image[:, :, :4])
    write_slices(tmp_path / "dicom", image[:, :, :4], first=4)
    refused(tmp_path / "dicom", "4 pairs of slices have the same position .* as of several volumes")


# --- labels and landmarks


@pytest.mark.parametrize("largest", [255, 1000, 300_000])
def test_labels_of_any_size_stay_what_they_are(largest, identity, image, tmp_path):
    values = np.zeros((10, 11, 12), np.int64)
    values[3:6, 3:6, 3:6], values[6:9] = largest, largest - 1
    for kind in ("float32", "int32"):
        path, output = tmp_path / f"{kind}.nrrd", tmp_path / f"{kind}-applied.nrrd"
        sitk.WriteImage(Grid.of(image).image(values.astype(kind)), str(path))
        apply = ["apply", str(identity), str(path), f"--reference={path}", f"--output={output}", "--labels"]
        assert main(apply) == 0
        np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(output))), values)


def test_float_labels_beyond_32_bits_do_not_wrap_around(image, tmp_path):
    values = np.zeros((10, 11, 12))
    values[3] = 5_000_000_000
    sitk.WriteImage(Grid.of(image).image(values), str(tmp_path / "labels.nrrd"))
    assert sitk.GetArrayFromImage(images.read_labels(tmp_path / "labels.nrrd")).max() == 5_000_000_000


BAD_LANDMARKS = {
    "a.json": "[" * 100_000,
    "b.json": '{"markups": ["a"]}',
    "c.json": '{"markups": [{"controlPoints": [{"position": [1, 2]}]}]}',
    "d.json": '{"markups": [{"controlPoints": [{"position": [1, 2, NaN]}]}]}',
    "e.csv": "x,y,z\n1,2\n",
    "f.csv": "x,y,z\n1,2,three\n",
    "g.csv": "a,b\n1,2\n",
    "h.csv": "x,y,z\n",
    "i.fcsv": "# CoordinateSystem = LPS\nonly,one\n",
    "j.txt": "1 2 3",
    "k.csv": "x,y,z\n1,2,inf\n",
}


@pytest.mark.parametrize("name", BAD_LANDMARKS)
def test_a_landmark_file_that_cannot_be_used_is_one_sentence(name, identity, tmp_path, capsys):
    path = tmp_path / name
    path.write_text(BAD_LANDMARKS[name])
    assert main(["evaluate", "--fixed-landmarks", str(path), "--moving-landmarks", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and name in said and "unexpected" not in said


def test_landmarks_of_different_number_are_refused_before_the_work(good, tmp_path, capsys):
    for name, rows in (("two.csv", "1,2,3\n4,5,6\n"), ("one.csv", "1,2,3\n")):
        (tmp_path / name).write_text("x,y,z\n" + rows)
    marks = ["--fixed-landmarks", str(tmp_path / "two.csv"), "--moving-landmarks", str(tmp_path / "one.csv")]
    assert main(["register", str(good), str(good), *marks, "--output", str(tmp_path / "out"), "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert "2 fixed landmarks but 1 moving ones" in said
    assert "align" not in said, "the work had begun"


def test_landmarks_beyond_what_the_transform_covers_are_named_and_marked(image, tmp_path, capsys):
    field = np.zeros((10, 11, 12, 3))
    field[..., 0] = 2.0
    transforms.write_transform(sitk.DisplacementFieldTransform(Grid.of(image).image(field)), tmp_path / "t.h5")
    (tmp_path / "m.csv").write_text("x,y,z,label\n9,0,20,in\n900,-900,0,out\n")
    assert main(["apply", str(tmp_path / "t.h5"), str(tmp_path / "m.csv"), f"--output={tmp_path / 'f.csv'}"]) == 0
    read = landmarks.read_landmarks(tmp_path / "f.csv")
    np.testing.assert_allclose(read.points, [(7, 0, 20), [np.nan] * 3], atol=1e-3)
    assert read.labels == ("in", "out")
    assert "1 moving landmarks have no place in fixed space and are marked as undefined: out lies outside" in (
        capsys.readouterr().err
    )
    (tmp_path / "m.csv").write_text("x,y,z,label\n900,-900,0,out\n")
    assert main(["apply", str(tmp_path / "t.h5"), str(tmp_path / "m.csv"), f"--output={tmp_path / 'g.csv'}"]) == 2
    assert not (tmp_path / "g.csv").exists()


def test_a_reference_beyond_what_the_transform_covers_is_refused(image, good, tmp_path, capsys):
    field = np.full((10, 11, 12, 3), 2.0)
    transforms.write_transform(sitk.DisplacementFieldTransform(Grid.of(image).image(field)), tmp_path / "t.h5")
    larger = Grid((24, 11, 10), Grid.of(image).matrix)
    images.write_image(larger.image(np.zeros(larger.shape, np.float32)), tmp_path / "larger.nii.gz")
    apply = ["apply", str(tmp_path / "t.h5"), str(good), "--output", str(tmp_path / "o.nii.gz"), "--reference"]
    assert main([*apply, str(good)]) == 0
    assert main([*apply, str(tmp_path / "larger.nii.gz"), "--overwrite"]) == 2
    assert "lie outside the region that the transform covers" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["m.csv", "m.mrk.json"])
def test_landmark_names_come_back_whatever_they_are(name, tmp_path):
    labels = ('with "quotes", commas', "two\nlines", "ünï日本", "")
    marks = landmarks.Landmarks(np.arange(12.0).reshape(4, 3), labels)
    landmarks.write_landmarks(marks, tmp_path / name)
    back = landmarks.read_landmarks(tmp_path / name)
    assert back.labels == labels
    np.testing.assert_allclose(back.points, marks.points)


# --- writing


def test_apply_does_not_write_over_what_it_reads(good, identity, image, tmp_path, capsys):
    other = tmp_path / "other.nii.gz"
    images.write_image(image * 2, other)
    (tmp_path / "link.nii.gz").symlink_to(good)
    before = tree(tmp_path)
    for output in (good, other, identity, tmp_path / "link.nii.gz", tmp_path / "x" / ".." / "good.nii.gz"):
        command = ["apply", str(identity), str(good), f"--reference={other}", f"--output={output}", "--overwrite"]
        assert main(command) == 2
        assert "is an input of this command; choose another file" in capsys.readouterr().err
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["a.mhd", "a.xyz", "a", "a.png"])
def test_a_format_that_cannot_hold_a_volume_in_one_file_is_refused(name, good, identity, tmp_path, capsys):
    before = tree(tmp_path)
    assert main(["apply", str(identity), str(good), f"--reference={good}", f"--output={tmp_path / name}"]) == 2
    assert "end in .nii, .nii.gz, .nrrd, .mha; choose one of these" in capsys.readouterr().err
    assert tree(tmp_path) == before


def test_output_folders_that_cannot_be_are_one_sentence(good, tmp_path, capsys):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    before = tree(tmp_path)
    for output in (good, good / "below", tmp_path / "loop", tmp_path / ("a" * 300), Path("/proc/nothing")):
        quick = ["--device", "cpu", "--align", "none", "--spacing", "6"]
        assert main(["register", str(good), str(good), *quick, "--output", str(output)]) == 2
        said = [line for line in capsys.readouterr().err.splitlines() if not line.endswith("...")]
        assert len(said) == 1 and str(output) in said[0]
    assert tree(tmp_path) == before


def in_a_process(what: str, *paths: Path, before: str = "") -> str:
    """Runs a line of code on ``files``, ``p`` (paths) and ``image``; returns what the InputError says, or ``done``."""
    code = f"""
import os, resource, signal, sys
import numpy as np, SimpleITK as sitk
from pathlib import Path
from DivRegNetLib.errors import InputError
from DivRegNetLib.io import atomic, images, landmarks, transforms
p = [Path(a) for a in sys.argv[1:]]
image = sitk.GetImageFromArray(np.random.default_rng(0).random((40, 40, 40), dtype=np.float32))
field = sitk.DisplacementFieldTransform(sitk.Cast(sitk.Compose(image, image, image), sitk.sitkVectorFloat64))
{before}
try:
    {what}
    print("done")
except InputError as error:
    print(error)
"""
    command = [sys.executable, "-c", code, *map(str, paths)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    return ran.stdout.strip()


WRITERS = {
    "a.nii.gz": "images.write_image(image, p[0])",
    "a.nii": "images.write_image(image, p[0])",
    "a.nrrd": "images.write_image(image, p[0])",
    "a.mha": "images.write_image(image, p[0])",
    "a.h5": "transforms.write_transform(field, p[0])",
    "a.json": "atomic.write_json(['x' * 1000] * 200, p[0])",
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_disk_that_fills_up_leaves_what_was_there_and_no_part(name, tmp_path):
    """As where a disk is full, the system refuses to make a file longer, here than 50 kB."""
    path = tmp_path / name
    path.write_bytes(b"what was there")
    limit = "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))"
    said = in_a_process(WRITERS[name], path, before=limit)
    assert said.startswith(f"{path}: cannot be written")
    assert path.read_bytes() == b"what was there"
    assert os.listdir(tmp_path) == [name]


def test_a_small_file_system_that_is_full_is_one_sentence(image, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting needs more rights than this test has; the same is shown by a limit on the size of files")
    try:
        big = sitk.GetImageFromArray(np.random.default_rng(0).random((40, 40, 40), dtype=np.float32))
        for name in ("a.nii.gz", "a.nrrd"):
            with pytest.raises(InputError, match=f"{name}: cannot be written"):
                images.write_image(big, disk / name)
        assert os.listdir(disk) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def as_somebody_without_rights() -> str:
    return f"os.setgid({NOBODY}); os.setuid({NOBODY})" if os.geteuid() == 0 else ""


@pytest.fixture
def shut(tmp_path_factory, good):
    """A folder that may be entered but not written to, with a file that may not be read."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        file = Path(folder) / "secret.nii.gz"
        file.write_bytes(good.read_bytes())
        file.chmod(0)
        os.chmod(folder, 0o555)
        yield file
        os.chmod(folder, 0o755)


def test_without_permission_the_file_is_named(shut):
    said = in_a_process("images.read_image(p[0])", shut, before=as_somebody_without_rights())
    assert said == f"{shut}: cannot be opened (Permission denied)"
    said = in_a_process(
        "images.write_image(image, p[0])", shut.with_name("new.nii"), before=as_somebody_without_rights()
    )
    assert said == f"{shut.with_name('new.nii')}: cannot be written (Permission denied)"


def test_what_a_killed_writer_left_goes_with_the_next_writing_and_a_living_one_is_let_alone(tmp_path):
    wait = "atomic.write_atomically(p[0], lambda part: (part.write_text('x'), print('writing', flush=True), sys.stdin.read()))"
    code = f"import sys; from pathlib import Path; from DivRegNetLib.io import atomic; p = [Path(sys.argv[1])]; {wait}"
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / name)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2],
        )
        for name in ("killed.txt", "living.txt")
    ]  # fmt: skip
    for writer in writers:
        assert writer.stdout.readline() == b"writing\n"
    assert len(os.listdir(tmp_path)) == 2
    os.kill(writers[0].pid, signal.SIGKILL)
    writers[0].wait()
    atomic.write_text("mine", tmp_path / "mine.txt")
    assert len([name for name in os.listdir(tmp_path) if name.startswith(STAGING)]) == 1
    writers[1].communicate(b"")
    assert writers[1].returncode == 0
    assert sorted(os.listdir(tmp_path)) == ["living.txt", "mine.txt"]
    assert (tmp_path / "living.txt").read_text() == "x"


def test_a_link_that_is_called_like_a_part_is_not_followed(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "kept.txt").write_text("kept")
    output = tmp_path / "out"
    output.mkdir()
    (output / f"{STAGING}link").symlink_to(mine)
    atomic.write_text("new", output / "new.txt")
    assert (mine / "kept.txt").read_text() == "kept"


# --- training


def test_training_names_the_files_it_cannot_use_and_writes_no_model(good, tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "cut.nii.gz").write_bytes(good.read_bytes()[:3000])
    (raw / "whole.nii.gz").write_bytes(good.read_bytes())
    train = [sys.executable, "training/train.py", "--images", str(raw), "--name", "mine", "--device", "cpu"]
    train += ["--output", str(tmp_path / "run"), "--models", str(tmp_path / "models")]
    ran = subprocess.run(train, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert ran.returncode == 2
    assert "cut.nii.gz: the file is cut short or damaged; fetch it again" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert not (tmp_path / "models").exists()
    assert (raw / "whole.nii.gz").read_bytes() == good.read_bytes()
