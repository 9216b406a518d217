"""Comparing fixed, moving and warped volume in the slice views.

Nothing that is drawn for this is saved with a scene: the nodes made here are hidden and not saved, and only the foreground of
a view ever shows one of them, so that a scene which is saved meanwhile opens with the fixed volume in its views. (Slicer has
no event before a scene is saved: vtkMRMLScene declares StartSaveEvent, and nothing invokes it.) The attribute SHOWN of the
transform is saved, by which the panel lays the warped volume over the fixed one again.
"""

from collections.abc import Callable

import numpy as np
import qt
import slicer
import slicer.util
import vtk

from DivRegNetLib.core.intensity import percentile_window, stretch, subsample
from DivRegNetLib.quality.preview import checkerboard
from DivRegNetModule import _, views
from DivRegNetModule.background import Task
from DivRegNetModule.mrml.geometry import ijk_to_ras, vtk_image_steps
from DivRegNetModule.mrml.scene import automatic_levels_off, remove_with_display
from DivRegNetModule.mrml.volumes import volume_image_steps
from DivRegNetModule.steps import Steps, slabs

OVERLAY, BEFORE, FLICKER, CHECKERBOARD, SIDE_BY_SIDE = "overlay", "before", "flicker", "checkerboard", "side by side"
MODES = (OVERLAY, BEFORE, FLICKER, CHECKERBOARD, SIDE_BY_SIDE)
FLICKER_MS = 500
LAYOUT_MS = 100  # after which views have the size that a change of the layout gives them
SHOWN = "DivRegNet.Shown"  # attribute of a transform while its result is compared, so that a saved scene tells
SQUARES = 8  # of the checkerboard, along the longest side
BOARD_BYTES = 32  # a voxel while the checkerboard is made
GRID_LINES = 20  # across the longest side
OPACITY = 0.5
TINT = (
    "vtkMRMLColorTableNodeWarmShade1"  # black to red, so that air stays black: of what lies over the gray fixed volume
)
GRID_COLOR = (1.0, 0.75, 0.3)


class Comparison:
    """How one registration is shown.

    Args:
        fixed, moving, warped: volume nodes; the warped one is on the world grid of the fixed one.
        transform: transform node, may be None.
        failed: called with an exception where something could not be shown.
        before: the views to put back; None: as they are now.
    """

    def __init__(
        self,
        fixed,
        moving,
        warped,
        transform,
        failed: Callable[[Exception], None],
        before: "views.SliceViews | None" = None,
    ) -> None:
        self.fixed, self.moving, self.warped, self.transform = fixed, moving, warped, transform
        self.mode = ""
        self._failed = failed
        self.before = before or views.SliceViews()
        self._shown = None  # the node that lies over the fixed volume, made here
        self._grid: list = []
        self._task: Task | None = None
        self._warped_on_top = True
        self._timer = qt.QTimer()
        self._timer.setInterval(FLICKER_MS)
        self._timer.timeout.connect(self._flip)

    @staticmethod
    def was_saved(transform) -> bool:
        """Whether the result of a transform was compared when its scene was saved, or is."""
        return transform.GetAttribute(SHOWN) is not None

    @staticmethod
    def forget_saved(transform) -> None:
        """The result of a transform is not compared."""
        transform.RemoveAttribute(SHOWN)

    def needs(self, node) -> bool:
        """Whether the comparison makes no sense without this node."""
        return node is self.fixed or node is self.warped

    @property
    def busy(self) -> bool:
        """Whether something is still being prepared to be shown."""
        return self._task is not None and self._task.running

    def show(self, mode: str) -> None:
        """Shows the registration in one of MODES, instead of the present one."""
        if self._gone(self.fixed, self.warped) or (mode == BEFORE and self._gone(self.moving)):
            return
        if not self.mode:
            views.along(self.fixed)
        if not self._gone(self.transform):
            self.transform.SetAttribute(SHOWN, "1")
        self._end_mode()
        self.mode = mode
        if mode in (OVERLAY, BEFORE):
            self._lay_over(self._twin(self.warped if mode == OVERLAY else self.moving), OPACITY)
        elif mode == FLICKER:
            views.show_layers(self.fixed, self.warped, 1.0)
            self._warped_on_top = True
            self._timer.start()
        elif mode == CHECKERBOARD:
            self._task = Task(self._board_steps(), lambda board: self._lay_over(board, 1.0), self._failed)
        else:
            views.side_by_side(self.fixed, self.warped)
            self._fit_later()

    def grid(self, on: bool) -> None:
        """The deformation as a warped grid, in slice views."""
        for node in self._grid:
            if not self._gone(node):
                slicer.mrmlScene.RemoveNode(node)
        self._grid = []
        if not on or self._gone(self.transform, self.fixed):
            return
        scene = slicer.mrmlScene
        color = scene.AddNewNodeByClass("vtkMRMLProceduralColorNode", _("Deformation grid"))
        color.GetColorTransferFunction().AddRGBPoint(0.0, *GRID_COLOR)
        display = scene.AddNewNodeByClass("vtkMRMLTransformDisplayNode")
        for node in (color, display):
            node.SetSaveWithScene(False)
            node.SetHideFromEditors(True)
        bounds = [0.0] * 6
        self.fixed.GetRASBounds(bounds)
        longest = max(bounds[1] - bounds[0], bounds[3] - bounds[2], bounds[5] - bounds[4])
        display.SetAndObserveColorNodeID(color.GetID())  # or Slicer makes one, which stays in the scene
        display.SetVisualizationMode(display.VIS_MODE_GRID)
        display.SetGridSpacingMm(longest / GRID_LINES)
        display.SetGridResolutionMm(longest / GRID_LINES / 4)
        display.SetAndObserveRegionNode(self.fixed)
        display.SetVisibility3D(False)
        display.SetVisibility2D(True)
        display.SetVisibility(True)
        self._grid = [display, color]
        self.transform.AddAndObserveDisplayNodeID(display.GetID())

    def clear(self) -> None:
        """Takes everything away that is drawn here; also where nodes were removed. The views are left as they are."""
        self._end_mode()
        self.grid(False)
        if not self._gone(self.transform):
            self.forget_saved(self.transform)

    def restore(self) -> None:
        """Puts the slice views back as they were when this object was made."""
        self.clear()
        self.before.restore()

    def _end_mode(self) -> None:
        mode, self.mode = self.mode, ""
        self._timer.stop()
        if self._task is not None:
            self._task.stop()
            self._task = None
        if mode == SIDE_BY_SIDE:
            self.before.restore()
            if not self._gone(self.fixed):
                views.along(self.fixed)
            self._fit_later()
        shown, self._shown = self._shown, None
        if shown is not None:
            if not self._gone(self.fixed, self.warped):
                views.show_layers(self.fixed, self.warped, 0.0)
            remove_with_display(shown)

    def _fit_later(self) -> None:
        """Fits the views once more when the layout has changed their sizes: each keeps the height of its field of view then,
        whatever its new width shows (vtkMRMLSliceLogic::ResizeSliceNode)."""
        qt.QTimer.singleShot(LAYOUT_MS, self._fit)

    def _fit(self) -> None:
        if self.mode and not self._gone(self.fixed):
            views.fit()

    def _lay_over(self, node, opacity: float) -> None:
        """Shows a node that was made here over the fixed volume."""
        self._shown = node
        views.show_layers(self.fixed, node, opacity)

    def _flip(self) -> None:
        if self._gone(self.fixed, self.warped):
            self._timer.stop()
            return
        self._warped_on_top = not self._warped_on_top
        views.set_opacity(1.0 if self._warped_on_top else 0.0)

    def _twin(self, volume):
        """A volume in another color, which shares the voxels."""
        twin = self._new_volume(volume.GetName())
        twin.SetIJKToRASMatrix(slicer.util.vtkMatrixFromArray(ijk_to_ras(volume)))
        twin.SetAndObserveTransformNodeID(volume.GetTransformNodeID())
        display = twin.GetDisplayNode()
        if volume.GetDisplayNode() is not None:
            display.CopyContent(volume.GetDisplayNode())
            automatic_levels_off(display)
        display.SetAndObserveColorNodeID(TINT)
        self._unsaved(display)
        twin.SetAndObserveImageData(volume.GetImageData())
        return twin

    def _board_steps(self) -> Steps:
        """A volume with fixed and warped volume in alternate blocks."""
        warped = slicer.util.arrayFromVolume(self.warped)
        fixed = yield from self._on_warped_grid()
        windows = [percentile_window(subsample(array), 1, 99) for array in (fixed, warped)]
        board = np.empty(warped.shape, np.uint8)
        side = max(-(-max(board.shape) // SQUARES), 1)
        for start, end in slabs(len(board), BOARD_BYTES * board[0].size):
            parts = (stretch(a[start:end], window) for a, window in zip((fixed, warped), windows, strict=True))
            board[start:end] = 255 * checkerboard(*parts, side=side, first=start)
            yield
        image = yield from vtk_image_steps(board, vtk.VTK_UNSIGNED_CHAR)
        node = self._new_volume(_("Fixed-warped checkerboard"))
        node.SetIJKToRASMatrix(slicer.util.vtkMatrixFromArray(ijk_to_ras(self.warped)))
        automatic_levels_off(node.GetDisplayNode())
        node.GetDisplayNode().SetWindowLevelMinMax(0.0, 255.0)
        node.SetAndObserveImageData(image)
        return node

    def _on_warped_grid(self) -> Steps[np.ndarray]:
        """The voxels of the fixed volume on the grid of the warped one; under a transform that is not linear, they are
        others than those of its node."""
        parent = self.fixed.GetParentTransformNode()
        if parent is None or parent.IsTransformToWorldLinear():
            return slicer.util.arrayFromVolume(self.fixed)
        import SimpleITK as sitk

        return sitk.GetArrayFromImage((yield from volume_image_steps(self.fixed)))

    def _new_volume(self, name: str):
        node = slicer.vtkMRMLScalarVolumeNode()
        node.SetName(name)
        self._unsaved(node)  # before selectors see it
        slicer.mrmlScene.AddNode(node)
        node.CreateDefaultDisplayNodes()
        self._unsaved(node.GetDisplayNode())
        return node

    @staticmethod
    def _unsaved(node) -> None:
        node.SetSaveWithScene(False)
        node.SetHideFromEditors(True)

    @staticmethod
    def _gone(*nodes) -> bool:
        """Whether a node is None or no longer in the scene."""
        return any(node is None or not slicer.mrmlScene.IsNodePresent(node) for node in nodes)
