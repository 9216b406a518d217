"""The box of what an image shows: it leaves out air, and never anatomy."""

import numpy as np
import pytest
import SimpleITK as sitk

from DivRegNetLib.core.foreground import covered_region
from DivRegNetLib.core.grid import Grid

CENTER = np.array([28.0, -41.0, 117.0])
RADII = np.array([40.0, 55.0, 48.0])
UNMOVED = np.eye(4)


def points_of(grid: Grid) -> np.ndarray:
    k, j, i = np.indices(grid.shape)
    return grid.to_physical(np.stack([i, j, k], -1))


def ball(grid: Grid, center=CENTER, radii=RADII) -> np.ndarray:
    return (((points_of(grid) - center) / radii) ** 2).sum(-1) < 1


def scan(grid: Grid, inside: np.ndarray, noise: float = 0.0) -> sitk.Image:
    """A bright body in air, as a magnitude image with noise."""
    random = np.random.default_rng(0)
    real, imaginary = (random.normal(0, noise, grid.shape) for _ in range(2))
    return grid.image(np.hypot(inside * (300 + 200 * random.random(grid.shape)) + real, imaginary).astype(np.float32))


@pytest.fixture
def wide(grid_about):
    """Around the body at a corner of the field of view, rotated and anisotropic, three different sides."""
    return grid_about(CENTER + np.array([35, 30, -40]), (96, 78, 60), (2.2, 2.9, 3.6), (12, -8, 25))


@pytest.fixture
def straight():
    """The same along the axes, two of them flipped and exchanged."""
    direction = (0, -1, 0, 1, 0, 0, 0, 0, -1)
    grid = Grid.build((86, 94, 64), (2.2, 2.9, 3.4), (0, 0, 0), direction)
    return Grid.build(grid.size, grid.spacing, CENTER + np.array([20, -30, 25]) - grid.center, direction)


@pytest.mark.parametrize("noise", [0.0, 8.0, 25.0])
@pytest.mark.parametrize("name", ["wide", "straight"])
def test_the_region_contains_all_of_the_body_and_little_air(name, noise, request):
    grid = request.getfixturevalue(name)
    inside = ball(grid)
    image = scan(grid, inside, noise)
    region = covered_region(image, image, UNMOVED)
    assert region.contains(points_of(grid)[inside]).all()
    box = np.ptp(points_of(grid)[inside], axis=0) + 2 * max(grid.spacing)
    volume = region.voxels * np.prod(region.spacing)
    assert volume < min(2 * box.prod(), 0.6 * grid.voxels * np.prod(grid.spacing))
    assert np.abs(np.reshape(region.direction, (3, 3))).max(0) == pytest.approx(1), "along the LPS axes"


def test_along_the_axes_its_voxels_are_voxels_of_the_image(straight):
    image = scan(straight, ball(straight), 8.0)
    region = covered_region(image, image, UNMOVED)
    index = straight.to_index(region.to_physical((0, 0, 0)))
    np.testing.assert_allclose(index, np.round(index), atol=1e-9)
    assert region.spacing == pytest.approx(straight.spacing) and region.size != straight.size


def test_a_mask_is_covered_instead_of_the_foreground(wide, moving_grid):
    image = scan(wide, ball(wide), 8.0)
    part = ball(moving_grid, CENTER + np.array([5, 10, 0]), RADII / 3)
    mask = moving_grid.image(part.astype(np.uint8))
    region = covered_region(image, image, UNMOVED, mask, mask)
    assert region.contains(points_of(moving_grid)[part]).all()
    whole = covered_region(image, image, UNMOVED)
    assert region.voxels * np.prod(region.spacing) < 0.3 * whole.voxels * np.prod(whole.spacing)


def test_a_body_and_its_table_in_a_ct_are_covered_and_the_padding_is_not(straight):
    at = points_of(straight)
    body = ball(straight)
    table = (abs(at[..., 1] - (CENTER[1] + 60)) < 4) & (abs(at[..., 0] - CENTER[0]) < 60)
    hu = np.where(body, 40.0, np.where(table, -150.0, -1000.0)) + np.random.default_rng(0).normal(0, 15, straight.shape)
    hu[ball(straight, CENTER, RADII / 2)] = -860  # a lung
    round_view = np.linalg.norm(at[..., :2] - straight.center[:2], axis=-1) < 110
    image = straight.image(np.where(round_view, hu, -2000).astype(np.int16))
    region = covered_region(image, image, UNMOVED)
    assert region.contains(at[(body | table) & round_view]).all()
    assert region.voxels < 0.7 * straight.voxels


@pytest.mark.parametrize("what", ["tissue", "bright background", "thin", "noise"])
def test_where_air_cannot_be_told_everything_is_covered(what, wide, grid_about):
    random = np.random.default_rng(1)
    grid = grid_about(CENTER, (60, 50, 3), (2.0, 2.0, 6.0)) if what == "thin" else wide
    values = {
        "tissue": lambda: 100 + 50 * random.random(grid.shape) + 100 * ball(grid),
        "bright background": lambda: np.where(ball(grid), 100, 400) + random.normal(0, 5, grid.shape),
        "thin": lambda: 300.0 * ball(grid),
        "noise": lambda: random.normal(0, 100, grid.shape),
    }[what]()
    image = grid.image(values.astype(np.float32))
    assert covered_region(image, image, UNMOVED) == grid


def test_a_body_that_a_spot_outshines_is_not_cut(wide):
    """As in PET."""
    body = ball(wide)
    values = 3.0 * body + 300 * ball(wide, CENTER, RADII / 5) + np.random.default_rng(1).random(wide.shape) * 0.3
    image = wide.image(values.astype(np.float32))
    assert covered_region(image, image, UNMOVED).contains(points_of(wide)[body]).all()


def test_what_the_moving_image_shows_around_the_foreground_is_covered_too(straight, rigid):
    inside, larger = ball(straight), ball(straight, CENTER, RADII * 1.15)
    fixed, moving = scan(straight, inside, 8.0), scan(straight, larger, 8.0)
    alone, both = (covered_region(fixed, image, UNMOVED) for image in (fixed, moving))
    assert both.contains(points_of(straight)[larger]).all() and both.voxels > alone.voxels
    matrix = rigid((10, 5, -20), (90.0, 30.0, -60.0))
    moved = Grid(straight.size, matrix @ straight.matrix).stamp(sitk.Image(moving))
    again = covered_region(fixed, moved, matrix)
    assert again.contains(points_of(straight)[inside]).all() and again.voxels == pytest.approx(both.voxels, rel=0.4)
