"""Unusual values, types, geometry and masks: the right result in mm, or an error in one sentence with the remedy."""

import numpy as np
import pytest
import SimpleITK as sitk

from DivRegNetLib.core.grid import Grid
from DivRegNetLib.errors import InputError
from DivRegNetLib.registration.check import FARTHEST_ORIGIN_MM
from DivRegNetLib.registration.pipeline import register

SHIFT = np.array([7.0, -5.0, 6.0])  # of the moving phantom, mm
QUICK = {"align": "none", "device": "cpu", "spacing": 5.0}


@pytest.fixture
def fixed(grid, paint):
    return paint(grid)


@pytest.fixture
def shifted(paint):
    """``(grid, contrast=None) -> image``: the phantom on a grid, shifted."""
    to_phantom = np.eye(4)
    to_phantom[:3, 3] = -SHIFT
    return lambda grid, contrast=None: paint(grid, to_phantom, contrast)


@pytest.fixture
def left_over(landmarks):
    """``(result, points=landmarks, shift=SHIFT) -> share``: mean error in mm, of that without registration."""

    def share(result, points=landmarks, shift=SHIFT) -> float:
        found = np.array([result.transform.TransformPoint(p) for p in np.asarray(points).tolist()])
        assert np.isfinite(found).all()
        return np.linalg.norm(found - points - shift, axis=1).mean() / np.linalg.norm(shift)

    return share


def image_of(array, spacing=(4.0, 4.0, 4.0), **header) -> sitk.Image:
    image = sitk.GetImageFromArray(np.asarray(array))
    image.SetSpacing(spacing[: image.GetDimension()])
    for name, value in header.items():
        getattr(image, f"Set{name}")(value)
    return image


NOISE = np.random.default_rng(0).random((8, 9, 10))
REFUSED = {
    "infinite": (
        image_of(np.where(NOISE > 0.99, np.inf, NOISE)),
        r"holds \d+ voxels that are NaN or infinite; replace",
    ),
    "zero": (image_of(np.zeros((8, 9, 10), np.uint8)), r"is constant \(0 everywhere\)"),
    "one voxel": (image_of(np.ones((1, 1, 1), np.float32)), "is constant"),
    "2D": (image_of(NOISE[0]), "has 2 dimensions, 3 are needed"),
    "4D": (sitk.JoinSeries([image_of(NOISE)] * 2), "has 4 dimensions, 3 are needed; pick one"),
    "colors": (sitk.GetImageFromArray(np.stack([NOISE] * 3, -1), isVector=True), "has 3 components per voxel"),
    "complex": (image_of(NOISE.astype(np.complex64)), "is complex; take its magnitude"),
    "run lengths": (sitk.Cast(image_of((NOISE > 0.5).astype(np.uint8)), sitk.sitkLabelUInt8), "run-length label map"),
    "values too large": (image_of(NOISE * 1e300), "single precision cannot .* shift and scale them"),
    "values too close": (image_of(NOISE + 1e12), "single precision cannot .* shift and scale them"),
    "huge spacing": (image_of(NOISE, (250.0, 1.0, 1.0)), "spacing of 250 mm; repair its header"),
    "far away": (image_of(NOISE, Origin=(0.0, 3e6, 0.0)), "lies 3 km from the origin .*; move its origin nearer"),
    "flat axes": (image_of(NOISE, Direction=(1, 1, 0, 1, 1.0005, 0, 0, 0, 1)), "axes that do not span space"),
    "no image": ("scan.nii", "got str"),
    "nothing": (None, "must be a SimpleITK image, got NoneType"),
}


@pytest.mark.parametrize("side", ["fixed", "moving"])
@pytest.mark.parametrize("kind", REFUSED)
def test_an_image_that_cannot_be_registered_is_named_with_the_remedy(kind, side, fixed):
    image, message = REFUSED[kind]
    pair = {"fixed": fixed, "moving": fixed} | {side: image}
    with pytest.raises(InputError, match=f"the {side} image .*{message}"):
        register(**pair, device="cpu")


# --- values


INTEGERS = [np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.uint64, np.int64]


@pytest.mark.parametrize("interpolation", ["linear", "nearest"])
@pytest.mark.parametrize("kind", [*INTEGERS, np.float32, np.float64], ids=lambda kind: np.dtype(kind).name)
def test_every_type_keeps_its_whole_range(kind, interpolation, grid, moving_grid, paint, tiny_model):
    values = sitk.GetArrayFromImage(paint(moving_grid)).astype(float)
    unit = (values - values.min()) / np.ptp(values)
    limits = np.iinfo(kind) if np.dtype(kind).kind in "iu" else np.finfo(np.float32)
    low, high = float(limits.min) / (1 if np.dtype(kind).kind in "iu" else 4), float(limits.max)
    high = high / 4 if np.dtype(kind).kind == "f" else min(high, np.nextafter(high, 0) if high > 2**60 else high)
    exact = np.minimum(low + unit * (high - low), high)
    exact = np.floor(exact) if np.dtype(kind).kind in "iu" else exact
    moving = moving_grid.image(exact.astype(kind))
    options = QUICK | {"model": tiny_model, "interpolation": interpolation, "default_value": float(exact.min())}
    result = register(paint(grid), moving, **options)
    assert result.warped.GetPixelID() == moving.GetPixelID()
    method = sitk.sitkLinear if interpolation == "linear" else sitk.sitkNearestNeighbor
    again = sitk.Resample(moving_grid.image(exact), result.warped, result.transform, method, float(exact.min()))
    found, expected = (sitk.GetArrayFromImage(i).astype(float) for i in (result.warped, again))
    assert expected.max() > low + 0.9 * (high - low), "the ends of the range must be met"
    np.testing.assert_allclose(
        found, expected, atol=max(1.01, 1e-6 * (high - low)) if np.dtype(kind).kind != "f" else 1e33
    )


@pytest.mark.parametrize("value", [-5.0, 256.0, 1e30])
def test_a_default_value_that_voxels_cannot_hold_is_refused(value, fixed):
    moving = sitk.Cast(fixed * 200, sitk.sitkUInt8)
    with pytest.raises(InputError, match=r"default value .* does not fit .* \(uint8\); choose one from 0 to 255"):
        register(fixed, moving, default_value=value, **QUICK)


@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1e30])
def test_the_unit_of_the_values_does_not_matter(scale, grid, moving_grid, fixed, shifted, left_over):
    """Diffusion in m^2/s is of the order of 1e-9."""
    assert left_over(register(fixed * scale, shifted(moving_grid) * scale, **QUICK)) < 0.35


def test_one_voxel_of_65535_changes_nothing(grid, moving_grid, fixed, shifted, left_over):
    images = [sitk.Cast(image * 800, sitk.sitkUInt16) for image in (fixed, shifted(moving_grid))]
    clean = register(*images, **QUICK)
    for image in images:
        image[4, 5, 6] = 65535
    hot = register(*images, **QUICK)
    assert left_over(hot) < 0.35
    assert abs(left_over(hot) - left_over(clean)) < 0.05


def test_the_padding_of_a_ct_is_air_to_the_registration_and_stays_in_the_warped_volume(
    moving_grid, fixed, shifted, left_over
):
    """The scanner's field of view is a cylinder, and what is outside is filled up."""
    moving = sitk.Cast(shifted(moving_grid) * 1300 - 1024, sitk.sitkInt16)
    array = sitk.GetArrayFromImage(moving)
    _, j, i = np.indices(array.shape)
    array[(2 * (j - 8) / 17) ** 2 + (2 * (i - 13) / 27) ** 2 > 1] = -3024
    padded = moving_grid.image(array)
    ct = sitk.Cast(fixed * 1300 - 1024, sitk.sitkInt16)
    clean, result = (register(ct, m, **QUICK) for m in (moving, padded))
    assert left_over(result) < left_over(clean) + 0.1
    assert result.settings["default_value"] == -1024
    assert sitk.GetArrayFromImage(result.warped).min() < -2500


def test_a_wide_range_that_is_no_padding_is_left_alone():
    """A phase image reaches evenly from -4096 to 4095."""
    from DivRegNetLib.core.intensity import without_padding

    phase = image_of(np.linspace(-4096, 4095, 720).reshape(8, 9, 10).astype(np.int16))
    np.testing.assert_array_equal(*(sitk.GetArrayFromImage(i) for i in (without_padding(phase), phase)))


# --- geometry


def sheared(grid: Grid) -> Grid:
    matrix = grid.matrix.copy()
    matrix[:3, 2] += 0.35 * np.linalg.norm(matrix[:3, 2]) * matrix[:3, 1] / np.linalg.norm(matrix[:3, 1])
    matrix[:3, 3] += grid.center - Grid(grid.size, matrix).center
    return Grid(grid.size, matrix)


@pytest.mark.parametrize("side", ["fixed", "moving"])
@pytest.mark.parametrize("kind", ["tilted gantry", "left-handed", "thick slices", "fine along one axis", "1 km away"])
def test_odd_geometry_gives_the_same_registration(kind, side, grid, moving_grid, grid_about, paint, shifted, left_over,
                                                  landmarks):  # fmt: skip
    center = grid.center
    odd = {
        "tilted gantry": sheared(grid_about(center, (26, 28, 26), (5.0, 5.0, 5.0), (5, 3, -4))),
        "left-handed": Grid(grid.size, grid.matrix @ [[-1, 0, 0, 19], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
        "thick slices": grid_about(center, (56, 60, 16), (2.2, 2.2, 8.0), (5, 3, -4)),
        "fine along one axis": grid_about(center, (1500, 18, 18), (0.08, 7.0, 7.0)),
        "1 km away": grid,
    }[kind]  # fmt: skip
    grids = {"fixed": grid, "moving": moving_grid} | {side: odd}
    images = [paint(grids["fixed"]), shifted(grids["moving"])]
    away = np.zeros(3)
    if kind == "1 km away":
        away = np.array([0.9 * FARTHEST_ORIGIN_MM, 0, -0.9 * FARTHEST_ORIGIN_MM])
        for image in images:
            image.SetOrigin((np.array(image.GetOrigin()) + away).tolist())
    assert left_over(register(*images, **QUICK), landmarks + away) < 0.4


def test_one_slice_is_registered_in_its_plane_however_thin(grid_about, paint, left_over):
    """1 mm is less than the 5 mm worked at: the slice must not fall between two voxels."""
    center, shift = np.array([31.0, -47.0, 112.0]), np.array([8.0, -6.0, 0.0])
    slice_grid = grid_about(center, (40, 40, 1), (3.0, 3.0, 1.0))
    to_phantom = np.eye(4)
    to_phantom[:3, 3] = -shift
    moving = paint(slice_grid, to_phantom)
    points = center + np.array([(x, y, 0) for x in (-25, 0, 25) for y in (-25, 0, 25)])
    for align in ("none", "affine"):
        result = register(paint(slice_grid), moving, **QUICK | {"align": align})
        assert left_over(result, points, shift) < 0.5


def test_8_by_8_by_3_voxels_are_registered_and_not_turned(grid_about, paint):
    few = grid_about((31.0, -47.0, 112.0), (8, 8, 3), (14.0, 14.0, 30.0))
    to_phantom = np.eye(4)
    to_phantom[:3, 3] = (0.0, 9.0, 0.0)
    result = register(paint(few), paint(few, to_phantom), **QUICK | {"align": "affine"})
    np.testing.assert_allclose(result.initial[:3, :3], np.eye(3), atol=1e-12)
    assert result.quality["nmi"]["after"] > result.quality["nmi"]["before"]
    same = register(paint(few), paint(few), **QUICK | {"align": "affine"})
    assert same.quality["largest_displacement_mm"] < 1


def test_images_that_share_no_place_are_refused(fixed, grid, grid_about, paint):
    away = grid_about(grid.center + np.array([400.0, 0, 0]), (10, 10, 10), (5.0, 5.0, 5.0))
    with pytest.raises(InputError, match="do not overlap in physical space; choose an initial alignment"):
        register(fixed, paint(away) + image_noise(away), **QUICK)


def image_noise(grid: Grid) -> sitk.Image:
    return grid.image(np.random.default_rng(0).random(grid.shape, dtype=np.float32))


def test_a_moving_image_inside_one_fixed_slice_overlaps_it(grid_about, paint):
    """Between the centers of two slices of 60 mm; it shows what is there, so there is nothing to move."""
    thick = grid_about((31.0, -47.0, 112.0), (26, 28, 3), (4.0, 4.0, 60.0))
    small = grid_about((31.0, -47.0, 112.0), (14, 15, 8), (4.0, 4.0, 4.0))
    result = register(paint(thick), paint(small), **QUICK)
    point = result.transform.TransformPoint((31.0, -47.0, 112.0))
    assert np.linalg.norm(np.array(point) - (31.0, -47.0, 112.0)) < 10


def test_what_is_far_smaller_than_a_voxel_worked_at_is_refused(fixed):
    speck = image_of(NOISE.astype(np.float32), (1e-4, 1e-4, 1e-4), Origin=fixed.GetOrigin())
    with pytest.raises(InputError, match="at 5 mm the fixed image is flat; choose a finer spacing"):
        register(speck, fixed, **QUICK | {"align": "center"})


@pytest.mark.parametrize("matrix", [np.zeros((3, 3)), np.diag([1, 1, 0]), np.full((3, 3), np.nan)])
def test_an_initial_transform_without_inverse_is_refused(matrix, fixed):
    transform = sitk.AffineTransform(3)
    transform.SetMatrix(matrix.ravel().tolist())
    with pytest.raises(InputError, match=r"initial transform .* choose one with an inverse"):
        register(fixed, fixed, device="cpu", align=transform)


# --- masks


def ones(grid: Grid, kind=np.uint8) -> sitk.Image:
    return grid.image(np.ones(grid.shape, kind))


def one_voxel(grid: Grid) -> sitk.Image:
    mask = ones(grid) * 0
    mask[10, 13, 9] = 1
    return mask


BAD_MASKS = {
    "empty": (lambda g: ones(g) * 0, "mask is empty where the {} image is; draw it there"),
    "elsewhere": (lambda g: image_of(np.ones((5, 5, 5), np.uint8), Origin=(5000, 0, 0)), "mask is empty where the {}"),
    "NaN": (lambda g: ones(g, np.float32) * float("nan"), r"mask holds \d+ voxels that are NaN; replace them by 0"),
    "2D": (lambda g: ones(g)[:, :, 0], "mask has 2 dimensions"),
    "complex": (lambda g: ones(g, np.complex64), "mask is complex"),
    "colors": (lambda g: sitk.Compose(ones(g), ones(g)), "mask has 2 components"),
    "run lengths": (lambda g: sitk.Cast(ones(g), sitk.sitkLabelUInt8), "mask is a run-length label map"),
    "an array": (lambda g: np.ones(g.shape), "mask must be a SimpleITK image, got ndarray"),
    "one voxel": (one_voxel, r"mask covers 0 blocks of 2 voxels of 5 mm, too few to compare; draw a larger mask"),
}


@pytest.mark.parametrize("side", ["fixed", "moving"])
@pytest.mark.parametrize("kind", BAD_MASKS)
def test_a_mask_that_cannot_be_used_is_named_with_the_remedy(kind, side, fixed, grid):
    make, message = BAD_MASKS[kind]
    with pytest.raises(InputError, match=f"the {side} {message.format(side)}"):
        register(fixed, fixed, **{f"{side}_mask": make(grid)}, **QUICK)


@pytest.mark.parametrize("kind", [np.uint8, np.int64, np.float64])
def test_a_full_mask_of_any_type_and_grid_lets_the_registration_be(kind, fixed, grid_about, grid, shifted, moving_grid,
                                                                    left_over):  # fmt: skip
    """Tiny, negative or large: what is not zero counts."""
    everywhere = grid_about(grid.center, (11, 12, 13), (25.0, 25.0, 25.0), (10, 20, 30))
    full = ones(everywhere, kind) * {np.uint8: 200, np.int64: -1, np.float64: 1e-60}[kind]
    result = register(fixed, shifted(moving_grid), fixed_mask=full, moving_mask=full, **QUICK)
    assert left_over(result) < 0.4
