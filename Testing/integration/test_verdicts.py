"""Verdicts on real registrations: never green where the result is wrong, not red where it is right."""

import numpy as np
import pytest
import SimpleITK as sitk

from DivRegNetLib import register
from DivRegNetLib.core.composites import displacement_on
from DivRegNetLib.core.grid import Grid, apply_matrix

FAST = {"device": "cpu"}


def _coarse(image: sitk.Image, factor: int) -> sitk.Image:
    return sitk.Cast(sitk.Round(sitk.BinShrink(sitk.Cast(image, sitk.sitkFloat32), [factor] * 3)), sitk.sitkInt16)


@pytest.fixture(scope="module")
def heads(sample_data):
    """The bundled T1 and T2 at about 4.5 mm."""
    fixed = _coarse(sitk.ReadImage(str(sample_data / "fixed_T1.nii.gz")), 3)
    moving = sitk.ReadImage(str(sample_data / "moving_T2.nii.gz"))
    return fixed, sitk.Resample(_coarse(moving, 1), fixed, sitk.Transform())


def _turned(image: sitk.Image, matrix) -> sitk.Image:
    """Its header turned about its middle."""
    grid, turned = Grid.of(image), sitk.Image(image)
    turn = np.eye(4)
    turn[:3, :3], turn[:3, 3] = matrix, grid.center - np.asarray(matrix) @ grid.center
    return Grid(grid.size, turn @ grid.matrix).stamp(turned)


def test_two_contrasts_of_one_head_are_green_and_the_error_is_of_the_right_size(heads):
    verdict = register(*heads, **FAST).verdict
    assert verdict.level == "green"
    assert 0.3 < verdict.expected_error_mm < 3


@pytest.mark.parametrize(
    "matrix",
    [np.diag([-1, 1, -1]), np.diag([1, 1, -1]), np.diag([-1, -1, 1]), np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1]])],
    ids=["feet first", "upside down", "prone", "on the side"],
)
def test_a_head_that_lies_the_wrong_way_is_red(heads, matrix):
    fixed, moving = heads
    result = register(fixed, _turned(moving, matrix), align="none", **FAST)
    assert result.verdict.level == "red"
    assert result.verdict.expected_error_mm > 5


@pytest.mark.parametrize(
    ("matrix", "said"),
    [
        (np.diag([-1, 1, -1]), "degrees about the front-back axis"),
        (np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1]]), "degrees about the head-foot axis"),
    ],
    ids=["feet first", "on the side"],
)
def test_a_head_that_lies_the_wrong_way_is_turned_and_a_warning_says_so(heads, matrix, said):
    fixed, moving = heads
    right, result = (register(fixed, x, **FAST) for x in (moving, _turned(moving, matrix)))
    assert any(said in warning for warning in result.warnings)
    assert right.warnings == ()
    points = Grid.of(fixed).to_physical(
        np.stack(np.meshgrid(*[[10.0, 25.0, 40.0]] * 3, indexing="ij"), -1).reshape(-1, 3)
    )
    turn = np.eye(4)
    center = Grid.of(moving).center
    turn[:3, :3], turn[:3, 3] = matrix, center - matrix @ center
    apart = apply_matrix(result.initial, points) - apply_matrix(turn @ right.initial, points)
    assert np.linalg.norm(apart, axis=-1).mean() < 2


def test_a_head_that_is_shifted_by_a_third_is_red(heads):
    fixed, moving = heads
    moved = sitk.Image(moving)
    moved.SetOrigin([o + d for o, d in zip(moving.GetOrigin(), (0, 50, 0), strict=True)])
    assert register(fixed, moved, align="none", **FAST).verdict.level == "red"


@pytest.mark.parametrize("sigma", [0, 2])
def test_noise_is_red(heads, sigma):
    fixed, _ = heads
    noise = np.random.default_rng(0).random(fixed.GetSize()[::-1]).astype(np.float32)
    image = sitk.DiscreteGaussian(Grid.of(fixed).image(1000 * noise), float((sigma * fixed.GetSpacing()[0]) ** 2))
    assert register(fixed, image, align="center", **FAST).verdict.level == "red"


def _tube(shift: float) -> sitk.Image:
    z, y, x = np.indices((48, 48, 48)).astype(float)
    inside = np.hypot(x - 24 - shift - 4 * np.sin(z / 7), y - 24 + shift - 3 * np.cos(z / 5)) < 2
    return _image(300 * inside)


def _ellipsoid(center, radii) -> sitk.Image:
    z, y, x = np.indices((48, 48, 48)).astype(float)
    return _image(sum(((a - c) / r) ** 2 for a, c, r in zip((x, y, z), center, radii, strict=True)) < 1)


def _image(array) -> sitk.Image:
    image = sitk.GetImageFromArray(array.astype(np.int16))
    image.SetSpacing((3, 3, 3))
    return image


@pytest.mark.parametrize(
    ("fixed", "moving"),
    [
        (_tube(0), _tube(3)),
        (_ellipsoid((24, 24, 24), (14, 11, 9)), _ellipsoid((27, 22, 25), (12, 12, 10))),
    ],
    ids=["a vessel", "two masks"],
)
def test_images_of_two_values_that_overlap_afterwards_are_not_red(fixed, moving):
    result = register(fixed, moving, **FAST)
    high = sitk.GetArrayViewFromImage(moving).max() / 2
    one, other = (sitk.GetArrayFromImage(x) > high for x in (fixed, result.warped))
    assert 2 * (one & other).sum() / (one.sum() + other.sum()) > 0.9
    assert result.verdict.level != "red"


def test_two_parts_of_a_head_that_overlap_by_a_third_are_not_red(heads):
    fixed, moving = heads
    whole = register(fixed, moving, **FAST)
    n = fixed.GetSize()[2]
    lower, upper = fixed[:, :, : int(0.65 * n)], moving[:, :, int(0.35 * n) :]
    result = register(lower, upper, align=sitk.AffineTransform(*_linear(whole.initial)), **FAST)
    common = slice(int(0.45 * n), int(0.6 * n))
    fields = (sitk.GetArrayFromImage(displacement_on(r.transform, Grid.of(lower)))[common] for r in (result, whole))
    assert np.linalg.norm(next(fields) - next(fields), axis=-1).mean() < 3
    assert result.verdict.level != "red"


def _linear(matrix: np.ndarray) -> tuple:
    return matrix[:3, :3].ravel().tolist(), matrix[:3, 3].tolist()


def test_the_map_of_the_expected_error_shows_what_was_cut_out_of_one_image(sample_data):
    """A ball of 14 mm, filled with a dark gray."""
    fixed, moving = (sitk.ReadImage(str(sample_data / f"{name}.nii.gz")) for name in ("fixed_T1", "moving_T2"))
    values, middle = sitk.GetArrayFromImage(fixed), Grid.of(fixed).center + np.array([-30.0, -20.0, 10.0])
    values[_distance(fixed, middle) < 14] = np.percentile(values[values > values.max() / 10], 20)
    expected = []
    for image in (fixed, Grid.of(fixed).image(values)):
        result = register(image, moving, error_map=True, **FAST)
        errors = sitk.GetArrayFromImage(result.error_map)
        assert errors[errors > 0].mean() == pytest.approx(result.verdict.expected_error_mm, rel=0.3)
        expected.append(errors[_distance(result.error_map, middle) < 8].mean())
    assert expected[1] > 1.4 * expected[0]


def _distance(image: sitk.Image, point: np.ndarray) -> np.ndarray:
    """(D, H, W) mm from a point to the voxels of an image."""
    indices = np.stack(np.indices(image.GetSize()[::-1])[::-1], -1)
    return np.linalg.norm(Grid.of(image).to_physical(indices) - point, axis=-1)


def test_a_map_of_the_expected_error_is_made_where_it_is_asked_for(heads):
    assert register(*heads, **FAST).error_map is None
