"""Resampling by torch compared with SimpleITK's, which is what is promised."""

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from DivRegNetLib.core import resampling, torch_resampling
from DivRegNetLib.core.composites import composite
from DivRegNetLib.core.grid import Grid
from DivRegNetLib.core.physical_fields import forward_transform

CPU = torch.device("cpu")


@pytest.fixture
def transform(grid, rigid):
    """A bent field on a padded grid, and an alignment that moves a part of the moving volume out of the fixed one."""
    working = grid.working_grid(6.0, multiple=4)
    random = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, 3, 4, 4, 4, generator=random) * 2
    displacement = torch.nn.functional.interpolate(coarse, size=working.shape, mode="trilinear")
    return forward_transform(displacement, working, rigid((7, -4, 11), (9, -14, 5)), grid)


@pytest.mark.parametrize(
    "pixel",
    [
        sitk.sitkUInt8,
        sitk.sitkInt16,
        sitk.sitkUInt16,
        sitk.sitkInt32,
        sitk.sitkUInt32,
        sitk.sitkFloat32,
        sitk.sitkFloat64,
    ],
)
def test_torch_resamples_as_simpleitk_does(pixel, transform, grid, moving_grid, paint, monkeypatch):
    monkeypatch.setattr(torch_resampling, "SLAB_VOXELS", 2000)  # several slabs
    moving = sitk.Cast(paint(moving_grid) * 200 + 5, pixel)
    expected = resampling.resample(moving, grid.empty_image(), transform, sitk.sitkLinear, 3.0)
    found = torch_resampling.resample(moving, grid, transform, 3.0, CPU)
    assert found.GetPixelID() == pixel and Grid.of(found) == grid
    ours, theirs = (sitk.GetArrayFromImage(image) for image in (found, expected))
    assert (theirs == 3.0).mean() > 0.05 and theirs.std() > 20
    if "float" in moving.GetPixelIDTypeAsString():
        assert ours == pytest.approx(theirs, abs=1e-3 if pixel == sitk.sitkFloat32 else 1e-9)
    else:
        difference = np.abs(ours.astype(float) - theirs)
        assert difference.max() <= 1 and (difference > 0).mean() < 1e-3


def test_integers_stay_within_their_range_and_halves_are_rounded_upward():
    grid = Grid.build((4, 1, 1), (1, 1, 1), (0, 0, 0), np.eye(3))
    image = grid.image(np.array([[[0, 1, 255, 254]]], np.uint8))
    half = sitk.Image([4, 1, 1], sitk.sitkVectorFloat64, 3)
    for i in range(4):
        half[i, 0, 0] = (0.5 if i < 3 else 0.0, 0.0, 0.0)
    found = torch_resampling.resample(image, grid, composite(np.eye(4), half), 0.0, CPU)
    assert sitk.GetArrayFromImage(found).ravel().tolist() == [1, 128, 255, 254]


def test_what_torch_cannot_do_is_left_to_simpleitk(transform, grid, moving_grid, paint):
    moving = paint(moving_grid)
    assert torch_resampling.resample(sitk.Cast(moving * 100, sitk.sitkInt64), grid, transform, 0.0, CPU) is None
    thinned = forward_transform(
        torch.zeros(1, 3, 8, 8, 8), grid.working_grid(20.0, multiple=4), np.eye(4), grid.thinned(15.0)
    )
    assert torch_resampling.resample(moving, grid, thinned, 0.0, CPU) is None
    outside = Grid(grid.size, grid.matrix @ np.array([[1, 0, 0, 90], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]))
    assert torch_resampling.resample(moving, outside, transform, 0.0, CPU) is None
