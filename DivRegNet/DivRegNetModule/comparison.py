"""Looking at a result: half-faded layers, flicker, checkerboard and deformation grid, each leaving nothing behind."""

import numpy as np
import qt
import slicer

from DivRegNetModule import _

FLICKER_MS = 500
SQUARES = 8  # along the longest side
GRID_LINES = 20  # across the longest side
HALF = 0.5


def checkerboard(one: np.ndarray, other: np.ndarray, squares: int = SQUARES) -> np.ndarray:
    """Two arrays (D, H, W) of equal shape in alternate blocks, each stretched from its 1st-99th percentile to [0, 1].

    Args:
        squares: blocks along the longest side; blocks have the same number of voxels along each axis.
    Returns:
        (D, H, W) float32.
    Raises:
        ValueError: the shapes differ.
    """
    if one.shape != other.shape:
        raise ValueError(f"a checkerboard needs arrays of one shape, got {one.shape} and {other.shape}")
    side = max(-(-max(one.shape) // squares), 1)
    parity = sum(np.ix_(*(np.arange(n) // side for n in one.shape))) % 2
    return np.where(parity == 0, _stretch(one), _stretch(other)).astype(np.float32)


def _stretch(array: np.ndarray) -> np.ndarray:
    low, high = np.percentile(array, [1, 99])
    return np.clip((array - low) / max(high - low, 1e-6), 0, 1)


class Comparison:
    """What is shown of one registration. At most one of flicker and checkerboard is on; ``clear`` turns all off.

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
        return any(node is mine for mine in (self.fixed, self.warped))

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
        """Fixed and warped in alternate blocks, as a volume that is not saved and goes when turned off."""
        if on:
            if self._gone(self.fixed, self.warped):
                return
            self.flicker(False)
            array = checkerboard(slicer.util.arrayFromVolume(self.fixed), slicer.util.arrayFromVolume(self.warped))
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
        """Turns everything off; safe when nodes are gone."""
        self.flicker(False)
        self.checkerboard(False)
        self.grid(False)

    @staticmethod
    def _gone(*nodes) -> bool:
        """Whether a node is None or no longer in the scene."""
        return any(node is None or not slicer.mrmlScene.IsNodePresent(node) for node in nodes)
