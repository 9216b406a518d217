"""Evidence: it knows aligned from displaced images, of whatever contrasts, and air does not count."""

import math

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from textures import other_contrast, textured

from DivRegNetLib.core import fields
from DivRegNetLib.core.grid import Grid
from DivRegNetLib.quality import evidence

SHAPE = (48, 56, 52)
GRID = Grid.build(SHAPE[::-1], (2.0, 2.0, 2.0), (10.0, -20.0, 30.0))


def measure(fixed, warped, **more):
    found = evidence.measure(fixed, warped, GRID, **more)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def pair():
    image = textured(SHAPE, 1)
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    return image, other_contrast(image) + 0.01 * noise


def test_aligned_images_of_two_contrasts_have_nothing_left_to_move(pair):
    numbers = measure(*pair).numbers
    assert numbers["motion 1"] < 0.3 and numbers["moved 1"] < 0.02
    assert numbers["fixed edges 1"] > 0.7 and numbers["warped edges 1"] > 0.7
    assert numbers["distance growth 1"] > 1.5 and numbers["information loss 1"] > 0.3


def test_every_voxel_of_shift_shows(pair):
    fixed, other = pair
    found = [measure(fixed, fields.shifted(other, s, 0, 0)).numbers for s in (0, 1, 2, 3, 8)]
    motion = [n["motion 1"] for n in found]
    assert motion[:4] == sorted(motion[:4])
    assert motion[2] == pytest.approx(2, abs=0.4)
    assert found[4]["moved 1"] > 0.5
    for name in ("fixed edges 1", "distance growth 1", "information loss 1"):
        values = [n[name] for n in found]
        assert values[:4] == sorted(values[:4], reverse=True), name
    coarse = [n["motion 4"] for n in found]
    assert coarse[4] == pytest.approx(2, abs=0.7)  # of voxels of 4


def test_noise_has_edges_in_all_directions(pair):
    noise = torch.rand(pair[0].shape, generator=torch.Generator().manual_seed(3))
    numbers = measure(pair[0], noise).numbers
    assert numbers["fixed edges 1"] == pytest.approx(1 / 3, abs=0.1)
    assert numbers["distance growth 1"] == pytest.approx(1, abs=0.05)
    assert numbers["moved 1"] > 0.8


def test_the_map_shows_where_the_images_do_not_match(pair):
    fixed, other = pair
    displacement = torch.zeros(1, 3, *SHAPE)
    displacement[:, 0] = 2.5 * torch.sigmoid((torch.arange(SHAPE[2]) - SHAPE[2] / 2) / 2)
    cells = measure(fixed, fields.warp(other, displacement)).cells
    motion = cells["motion 1"]
    assert motion[:, :, 9:].mean() > 5 * motion[:, :, :4].mean()
    assert motion[:, :, 9:-1].mean() == pytest.approx(2.5, abs=0.7)


def test_the_trend_is_the_affine_part_of_what_is_left_to_move(pair):
    fixed, other = pair
    points = fields.identity(SHAPE, like=torch.zeros(1))
    stretch = torch.zeros_like(points)
    stretch[:, 1] = 0.06 * (points[:, 1] - (SHAPE[1] - 1) / 2)
    trend = measure(fixed, fields.warp(other, stretch)).cells["trend 1"]
    expected = np.abs(0.06 * (evidence.CELL * (np.arange(trend.shape[1]) + 0.5) - SHAPE[1] / 2))
    assert trend.mean((0, 2)) == pytest.approx(expected, abs=0.3)
    assert measure(fixed, other).numbers["trend 1"] < 0.1


def test_edges_agree_where_the_images_match(pair):
    fixed, other = pair
    half = torch.cat((other[..., : SHAPE[2] // 2], other[..., SHAPE[2] // 2 :].flip(3)), 4)
    edges = measure(fixed, half).cells["edges 1"]
    assert edges[:, :, :3].mean() > 0.75 and edges[:, :, -3:].mean() < 0.5


def test_the_wider_window_tells_a_shift_as_well(pair):
    fixed, other = pair
    wide = [measure(fixed, fields.shifted(other, s, 0, 0)).numbers["wide motion 1"] for s in (0, 1, 2, 4)]
    assert wide == sorted(wide)
    assert wide[2] == pytest.approx(2, abs=0.4)


def test_cells_tell_how_sure_the_shifts_are_and_where_they_go_together(pair):
    fixed, other = pair
    still, moved = (measure(fixed, fields.shifted(other, s, 0, 0)).cells for s in (0, 2))
    inside = still["inside"] > 0.9
    assert moved["drift 1"][inside].mean() == pytest.approx(2, abs=0.4) and still["drift 1"][inside].mean() < 0.2
    assert still["gain 1"][inside].mean() < 0.1 < 1 < moved["gain 1"][inside].mean()
    noise = torch.rand(fixed.shape, generator=torch.Generator().manual_seed(3))
    unsure = measure(fixed, noise).cells
    assert unsure["spread 1"][inside].mean() > 1.5 * still["spread 1"][inside].mean()
    assert unsure["contrast 1"][inside].mean() < 0.5 * still["contrast 1"][inside].mean()


def test_air_around_the_images_and_what_was_not_measured_change_nothing(pair):
    bright = [0.3 + 0.7 * x for x in pair]
    alone = measure(*bright).numbers
    pad = [12] * 6
    noise = torch.rand(1, 1, *(n + 24 for n in SHAPE), generator=torch.Generator().manual_seed(2))
    with_air = [torch.nn.functional.pad(x, pad) for x in bright]
    with_air = [torch.where(x == 0, 0.02 * noise, x) for x in with_air]
    grid = Grid.build([n + 24 for n in SHAPE[::-1]], GRID.spacing)
    for name, value in evidence.measure(*with_air, grid).numbers.items():
        if name.split()[0] in ("motion", "moved"):
            assert value == pytest.approx(alone[name], abs=0.12), name

    valid = torch.zeros(1, 1, *noise.shape[2:], dtype=torch.bool)
    valid[..., 12:-12, 12:-12, 12:-12] = True
    found = evidence.measure(with_air[0], torch.where(valid, with_air[1], noise), grid, valid=valid).numbers
    for name in ("motion 1", "moved 1", "fixed edges 1", "warped edges 1"):
        assert found[name] == pytest.approx(alone[name], abs=0.12), name
    assert found["covered"] == pytest.approx(1, abs=0.15)


def test_images_without_anything_in_common_have_no_evidence(pair):
    nowhere = torch.zeros(1, 1, *SHAPE, dtype=torch.bool)
    assert evidence.measure(*pair, GRID, valid=nowhere) is None


def test_the_part_that_was_measured_is_told(pair):
    half = torch.zeros(1, 1, *SHAPE, dtype=torch.bool)
    half[..., : SHAPE[2] // 2] = True
    numbers = measure(*pair, valid=half).numbers
    assert numbers["covered"] == pytest.approx(0.5, abs=0.05)
    assert numbers["motion 1"] < 0.3


def test_cells_lie_where_their_voxels_are():
    image = torch.zeros(1, 1, *SHAPE)
    image[..., 16:32, 20:40, 12:36] = 1 + textured((16, 20, 24))
    found = measure(image, image)
    inside = found.cells["inside"] > 0.5
    indices = torch.from_numpy(inside).nonzero().numpy()[:, ::-1]
    points = found.grid.to_physical(indices)
    middle = GRID.to_physical((23.5, 29.5, 23.5))
    assert points.mean(0) == pytest.approx(middle, abs=1.1 * GRID.spacing[0])
    assert found.grid.spacing == pytest.approx([evidence.CELL * 2.0] * 3)


def test_a_large_image_is_looked_at_on_fewer_voxels():
    image = textured((24, 24, 240))
    grid = Grid.build((240, 24, 24), (1.0, 1.0, 1.0))
    numbers = evidence.measure(image, other_contrast(image), grid).numbers
    assert numbers["voxel_mm"] == pytest.approx(240 / evidence.LONGEST_SIDE)
    assert numbers["diagonal_mm"] == pytest.approx(math.hypot(240, 24, 24), rel=0.15)


def test_an_affine_map_is_no_bending_and_bending_is_measured_in_voxels(pair):
    points = fields.identity(SHAPE, like=torch.zeros(1))
    center = torch.tensor([(n - 1) / 2 for n in SHAPE[::-1]]).view(1, 3, 1, 1, 1)
    stretch = torch.tensor([[0.1, 0.05, 0], [0, -0.1, 0], [0.02, 0, 0.05]])
    affine = torch.einsum("ij,njdhw->nidhw", stretch, points - center) + 3
    assert measure(*pair, displacement=affine).numbers["bend"] < 0.05
    wave = torch.zeros(1, 3, *SHAPE)
    wave[:, 1] = 2 * torch.sin(2 * math.pi * points[:, 0] / 26)
    numbers = measure(*pair, displacement=wave + affine).numbers
    assert numbers["bend"] == pytest.approx(2 * 2 / math.pi, rel=0.25)
    assert numbers["slope"] > 0.1
    ripple = measure(*pair, displacement=wave + affine).cells["ripple"]
    assert ripple.mean() > 5 * measure(*pair, displacement=affine).cells["ripple"].mean()


def test_foreground_is_what_is_not_air_and_what_that_encloses():
    image = 0.02 * torch.rand(1, 1, *SHAPE, generator=torch.Generator().manual_seed(0))
    head = torch.zeros_like(image, dtype=torch.bool)
    head[..., 10:38, 10:46, 8:44] = True
    ventricle = torch.zeros_like(head)
    ventricle[..., 20:26, 24:32, 20:30] = True
    image = torch.where(head & ~ventricle, 0.6 + image, image)
    found = evidence.foreground(image)
    assert found[ventricle].all()
    assert found[head].all() and (found != head).float().mean() < 0.06  # smoothing makes it a little larger


@pytest.mark.parametrize("share", [0.15, 0.5, 0.85, 0.95])
def test_opening_and_filling_are_those_of_simpleitk(share):
    mask = np.random.default_rng(0).random((17, 20, 23)) < share
    image = sitk.GetImageFromArray(mask.astype(np.uint8))
    opened, filled = sitk.BinaryMorphologicalOpening(image, [1] * 3), sitk.BinaryFillhole(image)
    assert np.array_equal(evidence._opened(mask), sitk.GetArrayViewFromImage(opened) > 0)
    assert np.array_equal(evidence._filled(mask), sitk.GetArrayViewFromImage(filled) > 0)
