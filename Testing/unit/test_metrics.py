"""Metrics against distances in mm that can be worked out by hand, on a rotated anisotropic grid."""

import json
import math
import time

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from DivRegNetLib.core import fields
from DivRegNetLib.errors import InputError
from DivRegNetLib.quality import metrics
from DivRegNetLib.similarity.kldivnet import KLDivNet
from DivRegNetLib.similarity.mutual_information import nmi


def box(grid, low, high) -> np.ndarray:
    """True for voxels low <= (i, j, k) < high; (D, H, W)."""
    array = np.zeros(grid.shape, bool)
    array[tuple(slice(a, b) for a, b in zip(low[::-1], high[::-1], strict=True))] = True
    return array


def ball(grid, center, radius: float) -> np.ndarray:
    """True for voxels within a radius (mm) of a continuous voxel index."""
    k, j, i = np.indices(grid.shape)
    points = grid.to_physical(np.stack([i, j, k], -1))
    return np.linalg.norm(points - grid.to_physical(center), axis=-1) <= radius


def brute_force(fixed: np.ndarray, warped: np.ndarray, grid) -> dict[str, float]:
    """Surface distances by looking at every pair of surface voxels."""

    def surface(region: np.ndarray) -> np.ndarray:
        found = []
        for k, j, i in np.argwhere(region):
            neighbors = [(k + 1, j, i), (k - 1, j, i), (k, j + 1, i), (k, j - 1, i), (k, j, i + 1), (k, j, i - 1)]
            inside = [all(0 <= a < n for a, n in zip(p, region.shape, strict=True)) and region[p] for p in neighbors]
            if not all(inside):
                found.append((i, j, k))
        return grid.to_physical(found)

    distance = np.linalg.norm(surface(fixed)[:, None] - surface(warped)[None], axis=-1)
    there, back = distance.min(1), distance.min(0)
    both = np.concatenate([there, back])
    return {
        "asd": both.mean(),
        "hd": both.max(),
        "hd95": max(np.percentile(there, 95), np.percentile(back, 95)),
    }


def tensor(image: sitk.Image) -> torch.Tensor:
    return torch.from_numpy(sitk.GetArrayFromImage(image))[None, None]


def test_dice_of_boxes_is_twice_their_overlap_over_their_sizes(grid):
    fixed, warped = box(grid, (2, 3, 4), (8, 9, 10)), box(grid, (4, 3, 4), (10, 9, 10))
    assert metrics.dice(fixed, warped) == pytest.approx(2 * 4 / (6 + 6))
    assert metrics.dice(fixed, fixed) == 1
    assert metrics.dice(fixed, box(grid, (10, 10, 10), (12, 12, 12))) == 0
    nothing = np.zeros(grid.shape, bool)
    assert math.isnan(metrics.dice(nothing, nothing))
    assert metrics.dice(fixed, nothing) == 0


@pytest.mark.parametrize(("axis", "millimeters"), [(0, 6.0), (1, 5.0), (2, 7.5)])
def test_parallel_plates_are_as_far_apart_as_their_spacing_says(grid, axis, millimeters):
    plates = []
    for at in (4, 7):
        low, high = [0, 0, 0], list(grid.size)
        low[axis], high[axis] = at, at + 1
        plates.append(box(grid, low, high))
    found = metrics.surface_distances(*plates, grid)
    assert found == pytest.approx({"asd": 3 * millimeters, "hd": 3 * millimeters, "hd95": 3 * millimeters}, rel=1e-6)


@pytest.mark.parametrize(("axis", "millimeters"), [(0, 6.0), (1, 5.0), (2, 7.5)])
def test_the_hausdorff_distance_of_a_shifted_box_is_its_shift(grid, axis, millimeters):
    low, high, shift = np.array([3, 4, 5]), np.array([9, 12, 11]), 2 * np.eye(3, dtype=int)[axis]
    fixed, warped = box(grid, low, high), box(grid, low + shift, high + shift)
    found = metrics.surface_distances(fixed, warped, grid)
    assert found["hd"] == pytest.approx(2 * millimeters, rel=1e-6)
    assert found == pytest.approx(brute_force(fixed, warped, grid), rel=1e-5)


def test_concentric_spheres_are_apart_by_the_difference_of_their_radii(grid_about):
    grid = grid_about((5, 6, 7), (48, 40, 44), (1.0, 1.2, 1.1), (20, 10, -30))
    center = (23.5, 19.5, 21.5)
    found = metrics.surface_distances(ball(grid, center, 20), ball(grid, center, 14), grid)
    assert found["asd"] == pytest.approx(6, abs=0.3)
    assert 6 <= found["hd95"] <= found["hd"] <= 6 + 1.2 * math.sqrt(3)


def test_surface_distances_agree_with_brute_force_up_to_the_border_of_the_image(grid):
    fixed = ball(grid, (4, 8, 3), 30) | box(grid, (12, 18, 10), (20, 26, 18))
    warped = ball(grid, (7, 9, 5), 25)
    assert metrics.surface_distances(fixed, warped, grid) == pytest.approx(brute_force(fixed, warped, grid), rel=1e-5)
    assert metrics.surface_distances(warped, fixed, grid) == pytest.approx(brute_force(fixed, warped, grid), rel=1e-5)


def test_a_region_through_the_whole_image_ends_at_its_border(grid):
    fixed, warped = box(grid, (0, 5, 0), (20, 15, 18)), box(grid, (3, 5, 0), (16, 15, 18))
    found = metrics.surface_distances(fixed, warped, grid)
    assert found == pytest.approx(brute_force(fixed, warped, grid), rel=1e-5)
    assert found["hd"] == pytest.approx(4 * 6.0, rel=1e-6)


def test_identical_regions_have_no_distance_and_empty_ones_none_that_is_known(grid):
    region = ball(grid, (10, 12, 8), 25)
    assert metrics.surface_distances(region, region, grid) == {"asd": 0, "hd": 0, "hd95": 0}
    assert all(math.isnan(v) for v in metrics.surface_distances(region, np.zeros_like(region), grid).values())


def test_label_overlap_scores_every_label_the_mean_and_the_union(grid):
    fixed = box(grid, (2, 2, 2), (8, 8, 8)) * 3 + box(grid, (8, 2, 2), (12, 8, 8)) * 7
    warped = (
        box(grid, (2, 2, 2), (9, 8, 8)) * 3 + box(grid, (9, 2, 2), (12, 8, 8)) * 7 + box(grid, (0, 20, 0), (2, 22, 2))
    )
    found = metrics.label_overlap(*(grid.image(x.astype(np.uint8)) for x in (fixed, warped)))
    assert set(found["labels"]) == {"1", "3", "7"}
    three, seven = found["labels"]["3"], found["labels"]["7"]
    assert three["dice"] == pytest.approx(2 * 6 / (6 + 7))
    assert seven["dice"] == pytest.approx(2 * 3 / (4 + 3))
    assert three["hd"] == seven["hd"] == pytest.approx(6.0)
    assert found["labels"]["1"] == {"dice": 0, "asd": None, "hd": None, "hd95": None}, "in one of the maps only"
    for key, value in found["mean"].items():
        assert value == pytest.approx((three[key] + seven[key]) / 2)
    size = 6**3 + 4 * 6 * 6
    assert found["union"]["dice"] == pytest.approx(2 * size / (2 * size + 8))
    json.dumps(found, allow_nan=False)


def test_label_maps_on_two_grids_or_without_labels_are_refused(grid, moving_grid):
    labels, others = grid.empty_image(sitk.sitkUInt8), moving_grid.empty_image(sitk.sitkUInt8)
    with pytest.raises(InputError, match="one grid"):
        metrics.label_overlap(labels, others)
    with pytest.raises(InputError, match="no label"):
        metrics.label_overlap(labels, labels)


def test_landmark_error_is_the_distance_after_the_transform(landmarks):
    offset = np.array([3.0, -4.0, 12.0])
    shift, shifted = sitk.TranslationTransform(3, offset.tolist()), landmarks + offset
    np.testing.assert_allclose(metrics.landmark_error(landmarks, shifted), 13)
    np.testing.assert_allclose(metrics.landmark_error(landmarks, shifted, shift), 0, atol=1e-9)
    np.testing.assert_allclose(metrics.landmark_error(landmarks, landmarks, shift), 13)
    assert metrics.landmark_error(landmarks[:0], landmarks[:0], shift).shape == (0,)


def test_landmarks_that_are_no_pairs_are_refused(landmarks):
    with pytest.raises(InputError, match="27 fixed landmarks but 26"):
        metrics.landmark_error(landmarks, landmarks[1:])


def test_nmi_is_two_for_images_that_tell_all_of_each_other_and_one_for_unrelated_ones(grid, paint):
    image = sitk.GetArrayFromImage(paint(grid))
    shuffled = np.random.default_rng(0).permutation(image.ravel()).reshape(image.shape)
    assert nmi(image, image) == pytest.approx(2)
    assert nmi(image, 5 - 3 * image) == pytest.approx(2, abs=0.02)
    assert 1 <= nmi(image, shuffled, bins=16) < 1.05
    assert nmi(np.zeros(8), np.zeros(8)) == 2, "nothing is left to be told"


def test_nmi_of_a_known_joint_distribution_is_exact():
    """Three quarters agree of two binary images: H = ln 2 each, joint entropy by hand."""
    fixed, moving = np.array([0, 0, 0, 0, 1, 1, 1, 1]), np.array([0, 0, 0, 1, 1, 1, 1, 0])
    joint = -(2 * 3 / 8 * math.log(3 / 8) + 2 * 1 / 8 * math.log(1 / 8))
    assert nmi(fixed, moving, bins=2) == pytest.approx(2 * math.log(2) / joint)


def test_jacobian_statistics_count_folds_and_spread():
    stretched = 0.5 * fields.identity((6, 7, 8), like=torch.zeros(1)).clone()
    found = metrics.jacobian_statistics(stretched)
    assert found["folded_percent"] == 0
    assert found["log_jacobian_sd"] == pytest.approx(0, abs=1e-5)
    folded = torch.zeros(1, 3, 6, 7, 9)
    folded[:, 0, :, :, 4:] = -2  # one of eight steps along x goes backwards
    found = metrics.jacobian_statistics(folded)
    assert found["folded_percent"] == pytest.approx(100 / 8)
    assert found["log_jacobian_sd"] == pytest.approx(0, abs=1e-6)
    uneven = torch.zeros(1, 3, 6, 7, 9)
    uneven[:, 1, :, 3:] = 1  # det J is 2 in one of six rows, 1 elsewhere
    assert metrics.jacobian_statistics(uneven)["log_jacobian_sd"] == pytest.approx(math.log(2) * math.sqrt(5) / 6)


def test_the_quality_of_the_identity_has_no_displacement(grid, paint, other_contrast):
    fixed, moving = tensor(paint(grid)), tensor(paint(grid, contrast=other_contrast))
    zero = torch.zeros(1, 3, *grid.shape)
    found = metrics.quality(fixed, moving, moving, zero, zero, 2.0, KLDivNet())
    assert set(found) == {
        "nmi",
        "similarity",
        "folded_percent",
        "log_jacobian_sd",
        "largest_displacement_mm",
        "mean_displacement_mm",
        "inverse_consistency_mm",
    }
    for key in ("folded_percent", "log_jacobian_sd", "largest_displacement_mm", "mean_displacement_mm"):
        assert found[key] == 0
    assert found["inverse_consistency_mm"] == {"mean": 0, "largest": 0}
    for scores in (found["nmi"], found["similarity"]):
        assert scores["before"] == pytest.approx(scores["aligned"]) == pytest.approx(scores["after"], rel=1e-5)
    json.dumps(found, allow_nan=False)


def test_quality_measures_in_millimeters_of_the_working_grid(grid, paint, other_contrast, rigid):
    fixed = tensor(paint(grid))
    aligned = torch.roll(tensor(paint(grid, contrast=other_contrast)), 2, dims=4)
    shift = torch.zeros(1, 3, *grid.shape)
    shift[:, 0] = 2
    found = metrics.quality(fixed, fixed.flip(2), aligned, shift, -shift, 2.5, None)
    assert found["similarity"] is None
    assert found["largest_displacement_mm"] == found["mean_displacement_mm"] == 5
    assert found["inverse_consistency_mm"]["largest"] == pytest.approx(0, abs=1e-5)
    assert found["nmi"]["after"] > found["nmi"]["aligned"] + 0.1
    wrong = metrics.quality(fixed, aligned, aligned, shift, -0.5 * shift, 2.5, None)
    assert wrong["inverse_consistency_mm"]["mean"] == pytest.approx(2.5)


def test_quality_looks_for_similarity_inside_the_mask_alone(grid, paint, other_contrast):
    fixed, moving = tensor(paint(grid)), tensor(paint(grid, contrast=other_contrast))
    mask = torch.zeros(1, 1, *grid.shape, dtype=torch.bool)
    mask[..., 4:14, 6:20, 5:15] = True
    noise = torch.rand(moving.shape, generator=torch.Generator().manual_seed(0))
    disturbed = torch.where(mask, moving, noise)
    zero, net = torch.zeros(1, 3, *grid.shape), KLDivNet()
    clean, same = (metrics.quality(fixed, m, m, zero, zero, 2.0, net, mask=mask) for m in (moving, disturbed))
    assert clean["nmi"]["before"] == same["nmi"]["before"]
    assert clean["similarity"]["before"] == same["similarity"]["before"]


def test_quality_is_known_even_where_nothing_stays_on_the_grid(grid, paint):
    """Such a registration is hopeless, but its card must say so instead of failing."""
    image = tensor(paint(grid))
    away = torch.full((1, 3, *grid.shape), 100.0)
    found = metrics.quality(image, image, image, away, -away, 2.0, None)
    assert found["inverse_consistency_mm"] == {"mean": None, "largest": None}
    assert found["largest_displacement_mm"] == pytest.approx(200 * math.sqrt(3), rel=1e-5)


def test_thousands_of_labels_are_scored_in_one_pass(grid_about):
    """8,000 labels in a million voxels took 52 s of processor time, each being looked for in all voxels."""
    grid = grid_about((0, 0, 0), (100, 100, 100), (1.0, 1.5, 2.0))
    k, j, i = np.indices(grid.shape)
    labels = (k // 5 * 400 + j // 5 * 20 + i // 5 + 1).astype(np.int32)
    moved = np.roll(labels, 1, axis=0)
    started = time.process_time()
    found = metrics.label_overlap(grid.image(labels), grid.image(moved))
    assert time.process_time() - started < 15
    assert len(found["labels"]) == 8000
    for label in (1234, 4321):
        one, other = labels == label, moved == label
        expected = {"dice": metrics.dice(one, other)} | metrics.surface_distances(one, other, grid)
        assert found["labels"][str(label)] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("far", [1, 2_000_000_000])
def test_labels_may_be_any_whole_numbers(far, grid):
    """Small ones are looked up, large ones sorted; negative ones and other types in the two maps make no difference."""
    rng = np.random.default_rng(0)
    numbers = np.array([-7, 0, 3, 200, 3 + far])
    fixed, moving = (numbers[rng.integers(0, 5, grid.shape)] for _ in range(2))
    found = metrics.label_overlap(grid.image(fixed), grid.image(moving.astype(np.int32)))
    assert sorted(map(int, found["labels"])) == sorted(set(numbers.tolist()) - {0})
    for label, scores in found["labels"].items():
        one, other = fixed == int(label), moving == int(label)
        expected = {"dice": metrics.dice(one, other)} | metrics.surface_distances(one, other, grid)
        assert scores == pytest.approx(expected, rel=1e-5)
