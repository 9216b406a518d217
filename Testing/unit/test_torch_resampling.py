"""Resampling by torch compared with SimpleITK's, which is what is promised."""

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from DivRegNetLib.core import physical_fields, resampling, torch_resampling
from DivRegNetLib.core.composites import composite
from DivRegNetLib.core.grid import Grid

CPU = torch.device("cpu")


@pytest.fixture
def deformation(grid, rigid):
    """A bent displacement on a working grid, that grid, and an alignment that moves a part of the moving volume out of the
    fixed one."""
    working = grid.working_grid(6.0, multiple=4)
    random = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, 3, 4, 4, 4, generator=random) * 2
    displacement = torch.nn.functional.interpolate(coarse, size=working.shape, mode="trilinear")
    return displacement, working, rigid((7, -4, 11), (9, -14, 5))


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
def test_torch_resamples_as_simpleitk_does_through_the_transform(
    pixel, deformation, grid, moving_grid, paint, monkeypatch
):
    monkeypatch.setattr(physical_fields, "CHUNK_VOXELS", 2000)  # several slabs
    displacement, working, initial = deformation
    moving = sitk.Cast(paint(moving_grid) * 200 + 5, pixel)
    assert torch_resampling.can_resample(moving)
    along = torch_resampling.Resampling(moving, grid.empty_image(), initial, 3.0, CPU)
    transform = physical_fields.forward_transform(displacement, working, initial, grid, along)
    expected = resampling.resample(moving, grid.empty_image(), transform, sitk.sitkLinear, 3.0)
    found = along.warped
    assert found.GetPixelID() == pixel and Grid.of(found) == grid
    ours, theirs = (sitk.GetArrayFromImage(image) for image in (found, expected))
    assert (theirs == 3.0).mean() > 0.05 and theirs.std() > 20
    if "float" in moving.GetPixelIDTypeAsString():
        assert ours == pytest.approx(theirs, abs=1e-3 if pixel == sitk.sitkFloat32 else 1e-9)
    else:
        difference = np.abs(ours.astype(float) - theirs)
        assert difference.max() <= 1 and (difference > 0).mean() < 1e-3


def test_the_result_has_exactly_the_geometry_of_the_reference(grid, moving_grid, paint):
    """A grid has axes of unit length, so that a direction that was rounded in a file would be changed by it."""
    reference = grid.empty_image()
    reference.SetSpacing((1.3, 0.7, 2.1))
    reference.SetDirection([round(x, 4) for x in reference.GetDirection()])
    warped = torch_resampling.Resampling(paint(moving_grid), reference, np.eye(4), 0.0, CPU).warped
    assert (warped.GetSpacing(), warped.GetOrigin(), warped.GetDirection()) == (
        reference.GetSpacing(), reference.GetOrigin(), reference.GetDirection()
    )  # fmt: skip


def test_integers_stay_within_their_range_and_halves_are_rounded_upward():
    grid = Grid.build((4, 1, 1), (1, 1, 1), (0, 0, 0), np.eye(3))
    image = grid.image(np.array([[[0, 1, 255, 254]]], np.uint8))
    half = torch.zeros(1, 3, 1, 1, 4)
    half[0, 0, 0, 0, :3] = 0.5
    along = torch_resampling.Resampling(image, grid.empty_image(), np.eye(4), 0.0, CPU)
    along(slice(0, 1), half)
    assert sitk.GetArrayFromImage(along.warped).ravel().tolist() == [1, 128, 255, 254]


def test_the_border_of_a_volume_is_where_simpleitk_has_it():
    """Half a voxel beyond the outermost centers; the lower end belongs to the volume, the upper one does not."""
    image = Grid.build((3, 2, 4), (1, 1, 1)).image(np.arange(1.0, 25.0).reshape(4, 2, 3))
    at = Grid.build((21, 17, 25), (0.25, 0.25, 0.25), (-1, -1, -1))
    expected = resampling.resample(image, at.empty_image(), composite(np.eye(4), _still(at)), sitk.sitkLinear, -5.0)
    along = torch_resampling.Resampling(image, at.empty_image(), np.eye(4), -5.0, CPU)
    along(slice(0, 25), torch.zeros(1, 3, 25, 17, 21))
    ours, theirs = (sitk.GetArrayFromImage(i) for i in (along.warped, expected))
    assert (ours == -5.0).any() and ours.max() == 24
    np.testing.assert_allclose(ours, theirs, atol=1e-12)


def _still(grid):
    return grid.stamp(sitk.Image(list(grid.size), sitk.sitkVectorFloat64, 3))


def test_what_torch_cannot_do_is_left_to_simpleitk(moving_grid, paint):
    moving = paint(moving_grid)
    assert not torch_resampling.can_resample(sitk.Cast(moving * 100, sitk.sitkInt64))
    assert not torch_resampling.can_resample(sitk.Compose(moving, moving))
    assert torch_resampling.can_resample(moving)
