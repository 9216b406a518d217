"""Round trips through files, nodes, coordinate systems and maps, on grids and fields drawn by hypothesis; any two images
give a finite result or an error in one sentence."""

import json
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import grids, numbers

from DivRegNetLib.core import fields, physical_fields
from DivRegNetLib.core.composites import field_of
from DivRegNetLib.core.grid import LPS_FROM_RAS, Grid, apply_matrix
from DivRegNetLib.errors import DivRegNetError
from DivRegNetLib.io import images, landmarks
from DivRegNetLib.registration.pipeline import register

SHAPE = (10, 14, 12)


def noise(grid: Grid, kind=np.float32) -> sitk.Image:
    values = np.random.default_rng(0).random(grid.shape) * 200
    return grid.image(values.astype(kind))


@st.composite
def smooth_fields(draw, steepest: float = 0.3) -> torch.Tensor:
    """(1, 3, *SHAPE) voxels: waves along all axes whose gradient stays below ``steepest``; nought at the border."""
    length = draw(st.floats(8, 30))
    phases, directions = draw(numbers(0, 6.25)), draw(numbers(-1, 1, 9))
    k, j, i = (torch.arange(n, dtype=torch.float64) for n in SHAPE)
    points = torch.stack(torch.meshgrid(k, j, i, indexing="ij")[::-1])
    window = math.prod(torch.sin(math.pi * (p + 0.5) / n) for p, n in zip(points, SHAPE[::-1], strict=True))
    waves = [
        torch.sin(
            2 * math.pi / length * sum(w * p for w, p in zip(directions[3 * a : 3 * a + 3], points, strict=True))
            + phase
        )
        for a, phase in enumerate(phases)
    ]
    field = torch.stack(waves)[None] * window
    steepness = max(g.abs().max() for g in fields.gradients(field)) * 3
    return field * (steepest / steepness.clamp_min(1e-6)).clamp_max(2.0)


# Maps


@given(smooth_fields(), smooth_fields(), smooth_fields())
def test_composition_associates(a, b, c):
    left, right = fields.compose(fields.compose(a, b), c), fields.compose(a, fields.compose(b, c))
    assert (left - right).norm(dim=1).max() < 0.1  # what interpolation between voxels costs
    assert (left - right).norm(dim=1).mean() < 0.01


@given(smooth_fields())
def test_the_inverse_inverts_on_either_side_and_twice_is_back(field):
    inverse = fields.invert(field, iterations=100, tolerance=1e-6)
    assert fields.compose(field, inverse).norm(dim=1).max() < 1e-4
    assert fields.compose(inverse, field).norm(dim=1).max() < 0.1
    assert (fields.invert(inverse, iterations=100, tolerance=1e-6) - field).norm(dim=1).max() < 0.1


@given(smooth_fields())
def test_composition_with_nothing_changes_nothing(field):
    nothing = torch.zeros_like(field)
    assert torch.equal(fields.compose(nothing, field), field)
    assert (fields.compose(field, nothing) - field).abs().max() < 1e-12


@given(smooth_fields(), grids(least=6, most=9), st.floats(2.0, 6.0), numbers(-20, 20))
def test_the_transforms_in_mm_undo_each_other_on_any_grids(field, moving, spacing, shift):
    """Forward on the working grid, which is the fixed one; back on a moving grid that is anywhere around it."""
    working = Grid.build(SHAPE[::-1], [spacing] * 3, (-40, 30, 200))
    initial = np.eye(4)
    initial[:3, 3] = shift
    placed = moving.matrix.copy()
    placed[:3, 3] += working.center + shift - moving.center
    moving = Grid(moving.size, placed)
    u = field.float()
    forward = physical_fields.forward_transform(u, working, initial, working)
    back = physical_fields.inverse_transform(u, fields.invert(u), working, initial, moving, iterations=12)
    points = moving.to_physical(np.stack(np.meshgrid(*[[1.0, n - 2.0] for n in moving.size]), -1).reshape(-1, 3))
    inner = working.to_index(points - shift)
    points = points[((inner > 1.5) & (inner < np.array(working.size) - 2.5)).all(1)]
    for point in points.tolist():
        there = forward.TransformPoint(back.TransformPoint(point))
        assert np.linalg.norm(np.subtract(there, point)) < 0.1 * spacing


# Files


@given(grids(least=2), st.sampled_from([".nrrd", ".mha"]), st.sampled_from([np.uint8, np.int16, np.float32, np.int64]))
def test_a_volume_comes_back_from_a_file_as_it_went(grid, ending, kind):
    image = noise(grid, kind)
    with tempfile.TemporaryDirectory() as folder:
        images.write_image(image, Path(folder) / f"a{ending}")
        back = images.read_image(Path(folder) / f"a{ending}")
    assert Grid.of(back) == grid
    assert back.GetPixelID() == image.GetPixelID()
    np.testing.assert_array_equal(sitk.GetArrayFromImage(back), sitk.GetArrayFromImage(image))


@given(grids(least=2, shear=0.0))
def test_a_volume_comes_back_from_nifti_in_single_precision(grid):
    image = noise(grid)
    with tempfile.TemporaryDirectory() as folder:
        images.write_image(image, Path(folder) / "a.nii.gz")
        back = images.read_image(Path(folder) / "a.nii.gz")
    np.testing.assert_allclose(Grid.of(back).corners(), grid.corners(), atol=2e-3)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(back), sitk.GetArrayFromImage(image))


@given(st.lists(numbers(-1000, 1000), min_size=1, max_size=6))
def test_landmarks_are_the_same_in_every_file_format_and_coordinate_system(points):
    points = np.array(points, float)
    ras = apply_matrix(LPS_FROM_RAS, points)
    rows = [",".join(map(repr, p)) for p in ras.tolist()]
    controls = [{"position": p, "label": str(i)} for i, p in enumerate(ras.tolist())]
    texts = {
        "a.csv": "r,a,s\n" + "\n".join(rows),
        "a.fcsv": "# CoordinateSystem = RAS\n" + "\n".join(f"id,{row},0,0,0,1,1,1,0,name" for row in rows),
        "a.mrk.json": json.dumps({"markups": [{"coordinateSystem": "RAS", "controlPoints": controls}]}),
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, text in texts.items():
            path = Path(folder) / name
            path.write_text(text)
            read = landmarks.read_landmarks(path)
            np.testing.assert_allclose(read.points, points, atol=1e-9)
            if name != "a.fcsv":
                landmarks.write_landmarks(read, path)
                np.testing.assert_allclose(landmarks.read_landmarks(path).points, points, atol=1e-6)


# Nodes


@settings(max_examples=12)
@given(grids(least=2), st.sampled_from([np.uint8, np.int16, np.float32, np.float64]))
def test_a_volume_goes_from_file_to_node_to_file_unchanged(grid, kind):
    pytest.importorskip("slicer")
    import slicer
    from DivRegNetModule.mrml.volumes import volume_image
    from mrml_scenes import add_volume

    image = noise(grid, kind)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.nrrd"
        images.write_image(image, path)
        node = add_volume(slicer.vtkMRMLScene(), images.read_image(path), "node")
        images.write_image(volume_image(node), path)
        back = images.read_image(path)
    assert Grid.of(back) == grid
    assert back.GetPixelID() == image.GetPixelID()
    np.testing.assert_array_equal(sitk.GetArrayFromImage(back), sitk.GetArrayFromImage(image))


@given(grids(least=3, most=8, shear=0.0), numbers(-3, 3, 3))
def test_a_displacement_leads_to_the_same_point_in_vtk_and_itk(grid, slope):
    pytest.importorskip("slicer")
    from DivRegNetModule.mrml.transforms import grid_transform

    k, j, i = np.indices(grid.shape)
    field = np.stack([slope[0] * i + 1, slope[1] * j - 2, slope[2] * k + 3], -1).astype(float)
    transform = sitk.DisplacementFieldTransform(grid.image(field))
    vtk_transform = grid_transform(transform)
    for index in ((1, 1, 1), tuple(n - 2 for n in grid.size), tuple((n - 1) / 2 for n in grid.size)):
        point = grid.to_physical(index)
        lps = np.array(transform.TransformPoint(point.tolist()))
        ras = vtk_transform.TransformPoint((LPS_FROM_RAS[:3, :3] @ point).tolist())
        np.testing.assert_allclose(LPS_FROM_RAS[:3, :3] @ ras, lps, atol=2e-3)


# No way to fail but one sentence


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    grids(most=10), grids(most=10),
    st.sampled_from([np.uint8, np.int16, np.uint32, np.float32, np.float64]),
    st.sampled_from(["none", "center"]), st.floats(1.0, 40.0), st.booleans(),
)  # fmt: skip
def test_whatever_two_images_are_the_end_is_a_finite_result_or_one_sentence(
    tiny_model, fixed, moving, kind, align, spacing, mask
):
    masks = {"fixed_mask": noise(fixed, np.uint8) > 50} if mask else {}
    try:
        result = register(
            noise(fixed), noise(moving, kind), model=tiny_model, align=align, spacing=spacing, device="cpu", **masks
        )
    except DivRegNetError as error:
        assert "\n" not in str(error) and len(str(error)) > 20
        return
    for image in (result.warped, field_of(result.transform), field_of(result.inverse)):
        assert np.isfinite(sitk.GetArrayFromImage(image)).all()
    assert Grid.of(result.warped) == fixed
    json.dumps(result.quality, allow_nan=False)
