"""DICOM as scanners and archives write it: in the right place with the right values, or refused with what to do."""

import numpy as np
import pytest
import SimpleITK as sitk

from DivRegNetLib.core.grid import Grid
from DivRegNetLib.errors import InputError
from DivRegNetLib.io import dicom
from DivRegNetLib.io.images import read_image

pydicom = pytest.importorskip("pydicom")
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset  # noqa: E402
from pydicom.sequence import Sequence  # noqa: E402
from pydicom.uid import ExplicitVRLittleEndian, generate_uid  # noqa: E402

ENHANCED_MR, PET, DOSE = (f"1.2.840.10008.5.1.4.1.1.{n}" for n in ("4.1", "128", "481.2"))
STEP = np.array([0.0, 0.8, 4.9])  # mm from slice to slice: obliquely, as of a tilted gantry


@pytest.fixture
def truth() -> sitk.Image:
    """A volume in which no two slices, rows or columns are alike."""
    k, j, i = np.indices((12, 9, 8))
    matrix = np.eye(4)
    matrix[:3] = np.column_stack([(3.0, 0, 0), (0, 2.5, 0), STEP, (-42.0, -48.0, -30.0)])
    return Grid((8, 9, 12), matrix).image((100 * k + 10 * j + i).astype(np.int16))


def header(path, kind: str, number: int = 1) -> FileDataset:
    """What every object has."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = kind, ExplicitVRLittleEndian
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[str(path), str(number)])
    made = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    made.SOPClassUID, made.SOPInstanceUID = kind, meta.MediaStorageSOPInstanceUID
    made.StudyInstanceUID, made.SeriesInstanceUID = (generate_uid(entropy_srcs=[x]) for x in ("study", "series"))
    made.Modality, made.PatientID, made.InstanceNumber = "MR", "synthetic", number
    made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME2"
    made.BitsAllocated = made.BitsStored = 16
    made.HighBit, made.PixelRepresentation = 15, 1
    return made


def series(folder, image: sitk.Image, change=lambda made, k: None, kind: str = PET, order=None):
    """A file for each slice; ``change`` alters the header of slice k before it is written."""
    folder.mkdir()
    array = sitk.GetArrayFromImage(image)
    for n, k in enumerate(order or range(image.GetDepth())):
        made = header(folder, kind, n + 1)
        made.Rows, made.Columns = array.shape[1:]
        made.ImagePositionPatient = list(image.TransformIndexToPhysicalPoint((0, 0, k)))
        made.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        made.PixelSpacing, made.SliceThickness = [image.GetSpacing()[1], image.GetSpacing()[0]], 8.0
        made.PixelData = array[k].astype("<i2").tobytes()
        change(made, k)
        made.save_as(folder / f"{n:03d}.dcm", enforce_file_format=True)
    return folder


def enhanced(folder, image: sitk.Image, order, extra=lambda frame, n: None, shared=lambda item: None):
    """One file whose frames are the slices in some order; ``extra`` adds to the functional groups of frame n."""
    folder.mkdir()
    array = sitk.GetArrayFromImage(image)[list(order)]
    made = header(folder, ENHANCED_MR)
    made.Rows, made.Columns, made.NumberOfFrames = *array.shape[1:], len(array)
    common, plane, measures = Dataset(), Dataset(), Dataset()
    plane.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    measures.PixelSpacing, measures.SpacingBetweenSlices = [image.GetSpacing()[1], image.GetSpacing()[0]], 5.0
    common.PlaneOrientationSequence, common.PixelMeasuresSequence = Sequence([plane]), Sequence([measures])
    shared(common)
    frames = []
    for n, k in enumerate(order):
        frame, position = Dataset(), Dataset()
        position.ImagePositionPatient = list(image.TransformIndexToPhysicalPoint((0, 0, int(k))))
        frame.PlanePositionSequence = Sequence([position])
        extra(frame, n)
        frames.append(frame)
    made.SharedFunctionalGroupsSequence, made.PerFrameFunctionalGroupsSequence = Sequence([common]), Sequence(frames)
    made.PixelData = array.astype("<i2").tobytes()
    made.save_as(folder / "object.dcm", enforce_file_format=True)
    return folder


def assert_same(read: sitk.Image, truth: sitk.Image, scale=1.0, shift=0.0) -> None:
    np.testing.assert_allclose(Grid.of(read).corners(), Grid.of(truth).corners(), atol=1e-3)
    np.testing.assert_allclose(sitk.GetArrayFromImage(read), sitk.GetArrayFromImage(truth) * scale + shift, rtol=1e-6)


def refused(path, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        read_image(path)
    assert str(path) in str(error.value)


ORDERS = {
    "from the bottom up": list(range(12)),
    "from the top down": list(range(12))[::-1],
    "three interleaved stacks": [*range(0, 12, 3), *range(1, 12, 3), *range(2, 12, 3)],
}


@pytest.mark.parametrize("order", ORDERS)
def test_frames_lie_where_they_say_in_whatever_order_they_are(order, truth, tmp_path):
    folder = enhanced(tmp_path / "enhanced", truth, ORDERS[order])
    for path in (folder, folder / "object.dcm"):
        assert_same(read_image(path), truth)


@pytest.mark.parametrize("order", ORDERS)
def test_files_lie_where_they_say_in_whatever_order_they_are(order, truth, tmp_path):
    assert_same(read_image(series(tmp_path / "series", truth, order=ORDERS[order])), truth)


def test_two_echoes_in_one_object_are_told_apart_and_refused(truth, tmp_path):
    def echo(frame, n):
        item = Dataset()
        item.EffectiveEchoTime = 10.0 if n < 12 else 90.0
        frame.MREchoSequence = Sequence([item])

    folder = enhanced(tmp_path / "echoes", truth, [*range(12), *range(12)], echo)
    refused(
        folder, r"12 pairs of frames have the same position .*several volumes, of the echo times 10.0, 90.0; convert"
    )


def test_missing_frames_are_refused_with_the_gap(truth, tmp_path):
    folder = enhanced(tmp_path / "gap", truth, [k for k in range(12) if k not in (5, 6)])
    refused(folder, r"frames are missing .*: most are 4.96 mm from the next, but frames 5 and 6 are 14.9 mm apart")


def rescale(slope, intercept) -> Sequence:
    item = Dataset()
    item.RescaleSlope, item.RescaleIntercept, item.RescaleType = str(slope), str(intercept), "US"
    return Sequence([item])


def test_the_rescaling_of_frames_is_applied_whether_common_or_their_own(truth, tmp_path):
    def common(item):
        item.PixelValueTransformationSequence = rescale(2, -5)

    def own(frame, n):
        frame.PixelValueTransformationSequence = rescale(0.5 * (n + 1), n)

    assert_same(read_image(enhanced(tmp_path / "common", truth, range(12), shared=common)), truth, 2, -5)
    n = np.arange(12)[:, None, None]
    assert_same(read_image(enhanced(tmp_path / "own", truth, range(12), extra=own)), truth, 0.5 * (n + 1), n)


@pytest.mark.parametrize("first", [1.0, 0.25])
def test_a_pet_whose_slices_have_slopes_of_their_own_keeps_its_fractions(first, truth, tmp_path):
    slopes = np.array([first, *np.linspace(0.001, 0.01, 11)])

    def change(made, k):
        made.RescaleSlope, made.RescaleIntercept = f"{slopes[k]:.6f}", "0"

    read = read_image(series(tmp_path / "pet", truth, change))
    assert "float" in read.GetPixelIDTypeAsString()
    assert_same(read, truth, np.round(slopes, 6)[:, None, None])


def test_whole_numbers_stay_whole_where_all_slices_are_alike(truth, tmp_path):
    assert read_image(series(tmp_path / "mr", truth)).GetPixelID() == sitk.sitkInt16


def without(name: str):
    return lambda made, k: delattr(made, name)


@pytest.mark.parametrize(
    "name, words",
    [
        ("ImagePositionPatient", "Image Position"),
        ("ImageOrientationPatient", "Image Orientation"),
        ("PixelSpacing", "Pixel Spacing"),
    ],
)
def test_slices_that_do_not_say_where_they_are_are_refused(name, words, truth, tmp_path):
    refused(
        series(tmp_path / "s", truth, without(name)), rf"{words}.* is missing in 12 of 12 slices, .*get the original"
    )


def test_one_slice_is_no_volume(truth, tmp_path):
    refused(
        series(tmp_path / "s", truth) / "004.dcm", "is one slice of a DICOM series, not a volume; choose the folder"
    )
    refused(series(tmp_path / "one", truth, order=[3]), "one slice of a DICOM series")


def test_a_slice_that_is_there_twice_is_named(truth, tmp_path):
    refused(
        series(tmp_path / "s", truth, order=[*range(12), 5]),
        r"2 slices have the same position \(005.dcm and 012.dcm\), as of several volumes or of a slice that was exported twice",
    )


def test_a_mosaic_and_a_movie_are_refused(truth, tmp_path):
    def mosaic(made, k):
        made.ImageType = ["ORIGINAL", "PRIMARY", "M", "MOSAIC"]

    refused(series(tmp_path / "mosaic", truth, mosaic), "mosaic of the slices of a volume; convert it with dcm2niix")

    def movie(made, k):
        made.NumberOfFrames, made.PixelData = 2, made.PixelData * 2

    refused(
        series(tmp_path / "movie", truth, movie, order=[0]), "multi-frame file that does not say where each frame lies"
    )


def test_a_dose_lies_where_its_offsets_say(truth, tmp_path):
    def dose(made, k):
        array = sitk.GetArrayFromImage(truth)
        made.NumberOfFrames, made.GridFrameOffsetVector = 12, [float(3 * n) for n in range(12)]
        made.DoseGridScaling, made.PixelData = "1", array.astype("<i2").tobytes()

    read = read_image(series(tmp_path / "dose", truth, dose, DOSE, order=[0]))
    assert read.GetSpacing() == pytest.approx((3.0, 2.5, 3.0))
    assert read.GetOrigin() == pytest.approx((-42.0, -48.0, -30.0))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read), sitk.GetArrayFromImage(truth))


def test_a_slice_that_is_replaced_between_header_and_voxels_is_named(truth, tmp_path, monkeypatch):
    folder = series(tmp_path / "s", truth)
    other = series(tmp_path / "other", truth + 5)
    arrange = dicom._arrange

    def exchanged(*arguments):
        (other / "003.dcm").replace(folder / "003.dcm")
        return arrange(*arguments)

    monkeypatch.setattr(dicom, "_arrange", exchanged)
    refused(folder, "003.dcm: was changed while it was read; wait until it is complete")
