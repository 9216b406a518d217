"""Comparing fixed and warped volume in the slice views: blended, in turn, as a checkerboard, with a deformation grid."""

import numpy as np
import qt
import slicer

from DivRegNetLib.core.intensity import percentile_window, stretch
from DivRegNetLib.quality.preview import checkerboard
from DivRegNetModule import _

FLICKER_MS = 500
GRID_LINES = 20  # across the longest side
HALF = 0.5


class Comparison:
    """How one registration is shown. At most one of flicker and checkerboard is on; ``clear`` turns all of them off.

    Args:
        fixed, warped: volume nodes on one grid.
        transform: transform node, may be None.
    """

    def __init__(self, fixed, warped, transform) -> None:
        self.fixed, self.warped, self.transform = fixed, warped, transform
        self._board = None
        self._grid_state = None
        self._timer = qt.QTimer()
        self._timer.setInterval(FLICKER_MS)
        self._timer.timeout.connect(self._flip)
        self._flickers, self._shown = False, True
        self._before = [
            (view, view.GetBackgroundVolumeID(), view.GetForegroundVolumeID(), view.GetForegroundOpacity())
            for view in slicer.util.getNodesByClass("vtkMRMLSliceCompositeNode")
        ]

    def needs(self, node) -> bool:
        """Whether the comparison makes no sense without this node."""
        return node is self.fixed or node is self.warped

    def restore(self) -> None:
        """Slice views as they were when this object was made."""
        self.clear()
        for view, background, foreground, opacity in self._before:
            view.SetBackgroundVolumeID(background)
            view.SetForegroundVolumeID(foreground)
            view.SetForegroundOpacity(opacity)

    def blend(self) -> None:
        """Fixed with warped half-faded, in all slice views."""
        if self._gone(self.fixed, self.warped):
            return
        slicer.util.setSliceViewerLayers(background=self.fixed, foreground=self.warped, foregroundOpacity=HALF)

    def flicker(self, on: bool) -> None:
        """Fixed and warped in turn, twice a second."""
        if on:
            self.checkerboard(False)
            self.blend()
            self._timer.start()
            self._flickers = True
        elif self._flickers:
            self._timer.stop()
            self._flickers = False
            self.blend()

    def _flip(self) -> None:
        if self._gone(self.fixed, self.warped):
            self._timer.stop()
            return
        self._shown = not self._shown
        slicer.util.setSliceViewerLayers(foregroundOpacity=1.0 if self._shown else 0.0)

    def checkerboard(self, on: bool) -> None:
        """Fixed and warped in alternate blocks: a volume that is not saved, and is removed when this is turned off."""
        if on:
            if self._gone(self.fixed, self.warped):
                return
            self.flicker(False)
            arrays = (slicer.util.arrayFromVolume(node) for node in (self.fixed, self.warped))
            array = checkerboard(*(stretch(a, percentile_window(a, 1, 99)) for a in arrays)).astype(np.float32)
            board = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", _("Fixed-warped checkerboard"))
            board.SetSaveWithScene(False)
            board.CopyOrientation(self.warped)
            slicer.util.updateVolumeFromArray(board, array)
            board.CreateDefaultDisplayNodes()
            board.GetDisplayNode().SetSaveWithScene(False)
            board.GetDisplayNode().AutoWindowLevelOff()
            board.GetDisplayNode().SetWindowLevelMinMax(0.0, 1.0)
            self._board = board
            slicer.util.setSliceViewerLayers(background=board, foreground=None)
        elif self._board is not None:
            if not self._gone(self._board):
                slicer.mrmlScene.RemoveNode(self._board.GetDisplayNode())
                slicer.mrmlScene.RemoveNode(self._board)
            self._board = None
            self.blend()

    def grid(self, on: bool) -> None:
        """The deformation as a warped grid, in slice views."""
        if self._gone(self.transform) or (not on and self._grid_state is None):
            return
        self.transform.CreateDefaultDisplayNodes()
        display = self.transform.GetDisplayNode()
        if on:
            self._grid_state = display.GetVisibility(), display.GetVisibility2D(), display.GetVisibility3D()
            bounds = [0.0] * 6
            self.fixed.GetRASBounds(bounds)
            longest = max(bounds[1] - bounds[0], bounds[3] - bounds[2], bounds[5] - bounds[4])
            display.SetVisualizationMode(display.VIS_MODE_GRID)
            display.SetGridSpacingMm(longest / GRID_LINES)
            display.SetGridResolutionMm(longest / GRID_LINES / 4)
            display.SetAndObserveRegionNode(self.fixed)
            display.SetVisibility3D(False)
            display.SetVisibility2D(True)
            display.SetVisibility(True)
        else:
            visible, in_2d, in_3d = self._grid_state
            display.SetVisibility(visible)
            display.SetVisibility2D(in_2d)
            display.SetVisibility3D(in_3d)
            self._grid_state = None

    def clear(self) -> None:
        """Turns everything off; also where nodes were removed."""
        self.flicker(False)
        self.checkerboard(False)
        self.grid(False)

    @staticmethod
    def _gone(*nodes) -> bool:
        """Whether a node is None or no longer in the scene."""
        return any(node is None or not slicer.mrmlScene.IsNodePresent(node) for node in nodes)
