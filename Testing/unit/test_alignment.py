"""Initial alignment of the analytic head in two contrasts, on grids that share nothing, judged by landmarks in mm."""

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from DivRegNetLib.core.grid import Grid, affine_transform, apply_matrix
from DivRegNetLib.registration import alignment

HEAD_CENTER = np.array([31.0, -47.0, 112.0])
SHIFT = (12.0, -13.0, 9.2)  # 20 mm


@pytest.fixture(scope="module")
def fixed_grid(grid_about) -> Grid:
    return grid_about((35, -50, 117), (36, 30, 40), (4.0, 5.0, 3.5), (12, -8, 25))


@pytest.fixture(scope="module")
def moved_grid(grid_about) -> Grid:
    """Nearly upside down against the fixed one."""
    return grid_about((41, -53, 120), (40, 34, 30), (3.5, 4.0, 5.0), (-20, 15, 160))


@pytest.fixture(scope="module")
def pair(fixed_grid, moved_grid, paint, other_contrast):
    """``truth -> (fixed, moving)``: moving has the other contrast and is moved by truth, fixed -> moving, (4, 4) LPS."""
    return lambda truth: (paint(fixed_grid), paint(moved_grid, np.linalg.inv(truth), other_contrast))


@pytest.fixture(scope="module")
def error(landmarks):
    """``(found, truth) -> (n,)``: distance of the landmarks under both maps, mm."""
    return lambda found, truth: np.linalg.norm(apply_matrix(found, landmarks) - apply_matrix(truth, landmarks), axis=1)


def bright_block(image: sitk.Image, center) -> tuple[sitk.Image, sitk.Image]:
    """The image with a bright block of 50 mm about an LPS point, and the mask of all but the block."""
    grid = Grid.of(image)
    k, j, i = np.indices(grid.shape)
    offset = np.abs(grid.to_physical(np.stack([i, j, k], -1)) - center)
    block = (offset < 25).all(-1)
    array = sitk.GetArrayFromImage(image)
    array[block] = 3
    return grid.image(array), grid.image((~block).astype(np.uint8))


@pytest.mark.parametrize("degrees", [(20, 0, 0), (12, -10, 12)])
def test_a_rigid_offset_of_20_degrees_and_20_mm_is_recovered_to_half_a_millimeter(degrees, pair, error, rigid):
    truth = rigid(degrees, SHIFT)
    assert error(np.eye(4), truth).mean() > 20
    found = alignment.align(*pair(truth), "rigid")
    assert error(found, truth).max() < 0.5
    rotation = found[:3, :3]
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-5)
    assert np.linalg.det(rotation) == pytest.approx(1, abs=1e-5)
    np.testing.assert_array_equal(found[3], (0, 0, 0, 1))


def test_an_affine_map_is_recovered_to_a_millimeter_and_the_same_to_the_bit_each_time(pair, error, rigid):
    stretch = np.eye(4)
    stretch[:3, :3] = [[1.06, 0.03, 0.0], [0.03, 0.95, 0.0], [0.0, 0.0, 1.03]]
    about = rigid((0, 0, 0), (31, -47, 112))
    truth = rigid((5, -10, 15), SHIFT) @ about @ stretch @ np.linalg.inv(about)
    images = pair(truth)
    fractions = []
    found = alignment.align(*images, "affine", progress=fractions.append)
    assert error(found, truth).max() < 1
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1
    np.testing.assert_array_equal(alignment.align(*images, "affine"), found)


@pytest.mark.parametrize("degrees", [(180, 0, 0), (0, 90, 0), (10, 180, 90), (0, 0, 120)])
def test_a_head_is_found_however_it_lies_and_the_turn_is_said(degrees, pair, error, rigid):
    truth = rigid(degrees, SHIFT)
    found = alignment.find(*pair(truth), "rigid")
    assert error(found.matrix, truth).max() < 1
    (sentence,) = found.warnings
    assert "turned by" in sentence


@pytest.mark.parametrize("scale", [0.62, 1.55])
def test_a_head_of_another_size_is_found_and_the_size_is_said(scale, pair, error, rigid):
    about = rigid((0, 0, 0), HEAD_CENTER)
    truth = rigid((20, -10, 15), SHIFT) @ about @ np.diag([scale, scale, scale, 1]) @ np.linalg.inv(about)
    found = alignment.find(*pair(truth), "affine")
    assert error(found.matrix, truth).max() < 1.5
    (sentence,) = found.warnings
    assert "as large as its header says" in sentence


def test_a_specimen_of_a_millimeter_is_aligned_like_a_head(pair, error, rigid, landmarks):
    """Nothing in the alignment is in millimeters."""
    truth, images, shrink = rigid((8, -6, 90), SHIFT), [], np.diag([0.01, 0.01, 0.01, 1])
    for image in pair(truth):
        grid = Grid.of(image)
        images.append(Grid(grid.size, shrink @ grid.matrix).stamp(sitk.Image(image)))
    found = np.linalg.inv(shrink) @ alignment.align(*images, "rigid") @ shrink
    assert error(found, truth).max() < 1


def test_what_is_aligned_already_stays_where_it_is(pair, error):
    found = alignment.find(*pair(np.eye(4)), "affine")
    assert error(found.matrix, np.eye(4)).max() < 0.5
    assert found.warnings == ()


def test_a_mirror_image_is_said_to_be_one(pair, error, rigid):
    mirror = rigid((0, 0, 0), HEAD_CENTER) @ np.diag([-1, 1, 1, 1]) @ rigid((0, 0, 0), -HEAD_CENTER)
    found = alignment.find(*pair(rigid((10, 5, -8), SHIFT) @ mirror), "rigid")
    assert np.linalg.det(found.matrix[:3, :3]) > 0
    assert any("mirror image" in sentence for sentence in found.warnings)


def test_centering_is_a_translation_that_brings_distant_heads_together(
    fixed_grid, grid_about, paint, other_contrast, error, rigid
):
    truth = rigid((0, 0, 0), (260.0, -380.0, 140.0))
    far = grid_about((296, -435, 262), (40, 34, 30), (3.5, 4.0, 5.0), (-20, 15, 160))
    found = alignment.align(paint(fixed_grid), paint(far, np.linalg.inv(truth), other_contrast), "center")
    np.testing.assert_array_equal(found[:3, :3], np.eye(3))
    assert error(found, truth).max() < 10


def test_the_result_does_not_depend_on_the_number_of_threads(pair, rigid):
    images, before = pair(rigid((25, -10, 15), SHIFT)), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(alignment.align(*images, "affine"))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def test_no_alignment_is_the_identity_and_another_word_is_refused(pair, rigid):
    images = pair(rigid((0, 0, 0)))
    np.testing.assert_array_equal(alignment.align(*images, "none"), np.eye(4))
    with pytest.raises(ValueError, match="'elastic'"):
        alignment.align(*images, "elastic")


def test_masks_take_a_disturbance_out_of_view(pair, error, rigid):
    """A bright block in each image, in places that do not correspond, on different sides of the head."""
    truth = rigid((8, -6, 10), (6.0, -5.0, 4.0))
    fixed, moving = pair(truth)
    fixed, fixed_mask = bright_block(fixed, (60, -47, 112))
    moving, moving_mask = bright_block(moving, (20, -80, 130))
    masked = alignment.align(fixed, moving, "rigid", fixed_mask=fixed_mask, moving_mask=moving_mask)
    assert error(masked, truth).max() < 1
    assert error(alignment.align(fixed, moving, "rigid"), truth).mean() > 2 * error(masked, truth).mean() + 1


def test_a_mask_may_be_on_a_grid_of_its_own(pair, error, rigid, grid_about):
    truth = rigid((0, 0, 0), (3.0, 2.0, -4.0))
    whole = grid_about((31, -47, 112), (24, 22, 20), (10.0, 11.0, 12.0), (30, 0, 0))
    mask = whole.image(np.ones(whole.shape, np.uint8))
    found = alignment.align(*pair(truth), "rigid", fixed_mask=mask, moving_mask=mask)
    assert error(found, truth).max() < 0.5


def test_a_small_moving_image_is_aligned_within_a_large_fixed_one(grid_about, paint, other_contrast, error, rigid):
    """A slab of 72 x 80 x 64 mm against a field of view of 256 mm."""
    truth = rigid((-10, 5, 6), (-6.0, 8.0, -4.0))
    fixed = paint(grid_about((31, -47, 112), (64, 64, 64), (4.0, 4.0, 4.0), (5, 3, 10)))
    slab = grid_about((31, -47, 112), (18, 20, 16), (4.0, 4.0, 4.0), (-10, 5, 20))
    found = alignment.align(fixed, paint(slab, np.linalg.inv(truth), other_contrast), "rigid")
    assert error(np.eye(4), truth).mean() > 11
    assert error(found, truth).mean() < 2.5


@pytest.mark.parametrize("piece_is_fixed", [False, True])
def test_a_piece_is_found_wherever_it_was_cut_out_of_a_whole(piece_is_fixed, grid_about, rigid):
    """A corner of a texture in another contrast, turned by 120 degrees and moved: no centers belong together."""
    noise = np.random.default_rng(6).normal(size=(44, 48, 46)).astype(np.float32)
    whole = sitk.SmoothingRecursiveGaussian(grid_about((31, -47, 112), (46, 48, 44), (2.5, 2.5, 2.5)).image(noise), 5.0)
    grid = grid_about((52, -25, 131), (22, 20, 18), (2.5, 2.5, 2.5), (20, 10, 15))
    piece = 1 - sitk.Resample(whole, grid.empty_image(), sitk.Transform(), sitk.sitkLinear)
    place = rigid((120, -50, 30), (40, -20, 10))
    Grid(grid.size, place @ grid.matrix).stamp(piece)
    images, truth = ((piece, whole), np.linalg.inv(place)) if piece_is_fixed else ((whole, piece), place)
    with torch.inference_mode():  # as in a registration
        found = alignment.align(*images)
    inside = grid.to_physical(np.array([[i, j, k] for i in (3, 18) for j in (3, 16) for k in (3, 14)]))
    points = apply_matrix(place, inside) if piece_is_fixed else inside
    assert np.linalg.norm(apply_matrix(found, points) - apply_matrix(truth, points), axis=1).max() < 1


def test_a_progress_callback_that_raises_ends_the_alignment(pair, rigid):
    class Stop(Exception):
        pass

    def stop(fraction: float) -> None:
        raise Stop

    with pytest.raises(Stop):
        alignment.align(*pair(rigid((0, 0, 0))), "rigid", progress=stop)


def test_images_smaller_than_a_head_are_aligned_too(grid_about, rigid):
    """Crops of 36 mm, of inverse contrast: the 8 mm that serve to search a head would blur all that is in them."""
    center, truth = (30, -45, 110), rigid((6, -5, 8), (3.0, -2.0, 2.5))
    noise = np.random.default_rng(3).normal(size=(64, 64, 64)).astype(np.float32)
    texture = sitk.SmoothingRecursiveGaussian(grid_about(center, (64, 64, 64), (1.0, 1.0, 1.0)).image(noise), 2.5)
    crop = grid_about(center, (36, 36, 36), (1.0, 1.0, 1.0), (5, -3, 4))
    fixed = sitk.Resample(texture, crop.empty_image(), affine_transform(truth), sitk.sitkLinear)
    found = alignment.align(fixed, sitk.Resample(-1.0 * texture, crop.empty_image()), "rigid")
    apart = np.linalg.norm(apply_matrix(found, crop.corners()) - apply_matrix(truth, crop.corners()), axis=-1)
    assert apart.mean() < 0.7
