"""What the slice views show after a registration, and that one click takes them back."""

import time

import numpy as np
import pytest
from mrml_scenes import bump, put_under
from panel import add_blob, census, layers, wait, wait_for

from DivRegNetLib.quality.verdict import judge


def planes() -> list[np.ndarray]:
    import slicer

    return [
        slicer.util.arrayFromVTKMatrix(view.GetSliceToRAS()) for view in slicer.util.getNodesByClass("vtkMRMLSliceNode")
    ]


def settle(app) -> None:
    """Lets the views take the sizes of a new layout."""
    from DivRegNetModule.comparison import LAYOUT_MS

    end = time.monotonic() + 1.5 * LAYOUT_MS / 1000
    while time.monotonic() < end:
        app.processEvents()
        time.sleep(0.005)


def along_axes_of(node) -> bool:
    """Whether every view lies in a plane of a volume."""
    import slicer
    import vtk

    matrix = vtk.vtkMatrix4x4()
    node.GetIJKToRASMatrix(matrix)
    axes = slicer.util.arrayFromVTKMatrix(matrix)[:3, :3]
    axes = axes / np.linalg.norm(axes, axis=0)
    return all(np.abs(axes.T @ plane[:3, 2]).max() > 0.9999 for plane in planes())


@pytest.fixture
def shown(ready, pair):
    """The views show the moving volume, along its planes, before a registration; then it has been registered."""
    import slicer
    from DivRegNetModule import views

    array = np.eye(4)
    array[:3, :3] = [[np.cos(0.5), 0, np.sin(0.5)], [0, 1, 0], [-np.sin(0.5), 0, np.cos(0.5)]]
    array[:3, :3] *= 3
    pair[1].SetIJKToRASMatrix(slicer.util.vtkMatrixFromArray(array))
    views.show_layers(pair[1], None, 0.0)
    views.along(pair[1])
    before = planes(), layers()
    assert along_axes_of(pair[1]) and not along_axes_of(pair[0])
    ready._parameterNode.alignment = type(ready._parameterNode.alignment).CENTER
    ready.onRegister()
    wait(ready)
    return ready, before


def test_the_slices_lie_along_the_fixed_volume_and_one_click_takes_the_views_back(shown, pair, app):
    """Fault 13."""
    ready, before = shown
    assert along_axes_of(pair[0])
    assert all(background == pair[0].GetID() for background, *_ in layers())
    for button in (ready.ui.flickerButton, ready.ui.sideBySideButton, ready.ui.gridButton):
        button.click()
    ready.ui.restoreViewsButton.click()
    for now, then in zip(planes(), before[0], strict=True):
        assert now == pytest.approx(then)
    assert layers() == before[1] and app.views.layout == 3
    assert not any(button.checked for button in ready._toggles)
    ready.ui.beforeButton.click()
    assert along_axes_of(pair[0])
    ready.onUndo()
    assert layers() == before[1]


def test_one_click_takes_the_views_back_after_a_second_registration_too(shown):
    """It put back what they showed after the first one."""
    ready, before = shown
    ready.onRegister()
    wait(ready)
    assert ready._outcome is not None, ready.ui.messageLabel.text
    ready.ui.restoreViewsButton.click()
    for now, then in zip(planes(), before[0], strict=True):
        assert now == pytest.approx(then)
    assert layers() == before[1]


def test_a_run_that_ends_while_another_module_is_shown_leaves_its_views_alone(ready, pair):
    """Fault 14."""
    from DivRegNetModule import views

    views.show_layers(pair[1], None, 0.0)
    ready.onRegister()
    ready.exit()
    ready.parent.isEntered = False
    before = planes(), layers()
    wait(ready)
    assert ready._outcome is not None and layers() == before[1]
    for now, then in zip(planes(), before[0], strict=True):
        assert now == pytest.approx(then)
    ready.parent.isEntered = True
    ready.enter()
    assert layers() != before[1] and ready.ui.resultCollapsibleButton.visible


def test_side_by_side_shows_both_in_linked_views_with_the_same_field_of_view(shown, pair, app):
    import slicer

    ready, _ = shown
    ready.ui.sideBySideButton.click()
    assert app.views.layout == slicer.vtkMRMLLayoutNode.SlicerLayoutSideBySideView
    composites = {v.GetLayoutName(): v for v in slicer.util.getNodesByClass("vtkMRMLSliceCompositeNode")}
    nodes = {v.GetLayoutName(): v for v in slicer.util.getNodesByClass("vtkMRMLSliceNode")}
    assert composites["Red"].GetBackgroundVolumeID() == pair[0].GetID()
    assert composites["Yellow"].GetBackgroundVolumeID() == ready._outcome.registration.warped_node.GetID()
    assert composites["Red"].GetLinkedControl() and composites["Yellow"].GetLinkedControl()
    settle(app)
    assert nodes["Red"].GetFieldOfView() == pytest.approx(nodes["Yellow"].GetFieldOfView())
    bounds = [0.0] * 6
    pair[0].GetSliceBounds(bounds, nodes["Red"].GetSliceToRAS())
    for axis in (0, 1):  # all of the volume is seen, though the view has become narrow
        assert nodes["Red"].GetFieldOfView()[axis] >= 0.99 * (bounds[2 * axis + 1] - bounds[2 * axis])
    one, other = (slicer.util.arrayFromVTKMatrix(nodes[name].GetSliceToRAS()) for name in ("Red", "Yellow"))
    assert one == pytest.approx(other)
    ready.ui.sideBySideButton.click()
    settle(app)
    assert app.views.layout == 3 and all(node.GetDimensions()[1] == 330 for node in nodes.values())
    heights = [node.GetFieldOfView()[1] for node in nodes.values()]
    assert max(heights) < 1.5 * min(heights)  # none is left as it was for another size


def test_the_checkerboard_of_a_fixed_volume_under_a_non_linear_transform(ready, pair):
    """Fault 22: its voxels are on another grid than those of the warped volume."""
    put_under(pair[0], bump((0, 0, 0), 9, 40), "bent")
    ready.onRegister()
    wait(ready)
    assert ready._outcome is not None, ready.ui.messageLabel.text
    ready.ui.checkerboardButton.click()
    wait_for(lambda: not ready._comparison.busy)
    assert "wrong" not in ready.ui.messageLabel.text and ready._comparison._shown is not None


def test_maps_of_the_deformation_are_volumes_with_a_color_scale_and_are_undone(ready, pair):
    import slicer

    before = census()
    ready.onRegister()
    wait(ready)
    transform = ready._outcome.registration.transform_node
    for button in (ready.ui.displacementMapButton, ready.ui.jacobianMapButton):
        button.click()
        wait_for(lambda: not ready._task.running)
    length, jacobian = (
        slicer.util.getNode(f"moving to fixed: {n}") for n in ("displacement (mm)", "Jacobian determinant")
    )
    field = slicer.util.arrayFromGridTransform(transform)
    assert slicer.util.arrayFromVolume(length) == pytest.approx(np.linalg.norm(field, axis=-1), abs=1e-5)
    matrix = length.GetDisplayNode().GetColorNodeID(), jacobian.GetDisplayNode().GetColorNodeID()
    assert matrix == ("vtkMRMLColorTableNodeFileViridis.txt", "vtkMRMLColorTableNodeFileDivergingBlueRed.txt")
    assert slicer.util.arrayFromVolume(jacobian).mean() == pytest.approx(1, abs=0.05)
    assert any(foreground == jacobian.GetID() for _, foreground, *_ in layers())
    bounds = [[0.0] * 6 for _ in range(2)]
    length.GetRASBounds(bounds[0])
    pair[0].GetRASBounds(bounds[1])
    assert bounds[0] == pytest.approx(bounds[1])
    ready.onUndo()
    assert census() == before


def test_the_map_of_the_expected_error_is_added_and_shown_when_it_is_asked_for(ready, pair):
    import slicer

    from DivRegNetLib.quality.expected_error import calibration

    before = census()
    ready.onRegister()
    wait(ready)
    outcome = ready._outcome
    assert not [n for n in census() if "expected error" in slicer.mrmlScene.GetNodeByID(n).GetName()]  # off by default
    ready.ui.errorMapButton.click()
    wait_for(lambda: not ready._task.running)
    node = slicer.util.getNode("moving to fixed: expected error (mm)")
    values = slicer.util.arrayFromVolume(node)
    inside = values > 0
    expected = judge(outcome.quality).expected_error_mm
    assert values[inside].mean() == pytest.approx(expected, rel=0.3) and 0.02 < inside.mean() < 0.9
    background, foreground, opacity, _ = layers()[0]
    assert (background, foreground) == (pair[0].GetID(), node.GetID()) and 0 < opacity < 1
    display = node.GetDisplayNode()
    assert display.GetColorNodeID() == "vtkMRMLColorTableNodeFileInferno.txt"
    assert display.GetApplyThreshold() and display.GetLowerThreshold() > 0  # nothing is drawn where nothing is known
    red = calibration().limits(outcome.quality["evidence"])[1]
    assert display.GetWindowLevelMin() == 0
    assert display.GetWindowLevelMax() == pytest.approx(max(red, values.max()))
    lies, fixed_lies = [0.0] * 6, [0.0] * 6
    node.GetRASBounds(lies)
    pair[0].GetRASBounds(fixed_lies)
    assert (np.array(lies)[::2] < np.array(fixed_lies)[::2] + 8).all()
    assert (np.array(lies)[1::2] > np.array(fixed_lies)[1::2] - 8).all()
    middle = np.array(fixed_lies).reshape(3, 2).mean(1)  # of the blob
    matrix = slicer.util.arrayFromVTKMatrix(ijk_to_ras(node))
    i, j, k = np.rint(np.linalg.solve(matrix, [*middle, 1]))[:3].astype(int)
    assert inside[k, j, i]
    ready.onUndo()
    assert census() == before


def ijk_to_ras(node):
    import vtk

    matrix = vtk.vtkMatrix4x4()
    node.GetIJKToRASMatrix(matrix)
    return matrix


def test_air_stays_black_under_the_color_of_the_upper_volume(app):
    """With a table that begins with white, everything outside the head turned gray."""
    import slicer
    from DivRegNetModule.comparison import TINT

    scene, logic, colors = slicer.vtkMRMLScene(), slicer.vtkMRMLColorLogic(), []
    logic.SetMRMLScene(scene)
    table = scene.GetNodeByID(TINT)
    for i in (0, table.GetNumberOfColors() - 1):
        colors.append([0.0] * 4)
        table.GetColor(i, colors[-1])
    logic.SetMRMLScene(None)
    assert colors == [[0, 0, 0, 1], [1, 0, 0, 1]]


def test_nodes_that_are_drawn_for_looking_are_offered_nowhere(ready, pair):
    ready.onRegister()
    wait(ready)
    ready.ui.checkerboardButton.click()
    wait_for(lambda: not ready._comparison.busy)
    for selector in (ready.ui.fixedSelector, ready.ui.movingSelector, ready.ui.warpedSelector):
        names = [selector.nodeFromIndex(i).GetName() for i in range(selector.nodeCount())]
        assert set(names) <= {"fixed", "moving", "moving warped to fixed"} and len(names) == len(set(names))


def test_other_volumes_loaded_meanwhile_survive_an_undo(ready, pair):
    """What the user adds during a run is the user's."""
    import slicer

    ready.onRegister()
    mine = add_blob("mine", (5, 6, 7), 0.0)
    wait(ready)
    ready.onUndo()
    assert slicer.mrmlScene.IsNodePresent(mine)
