"""Renders slice views as the panel shows a registration in Slicer, to a PNG.

    python Testing/tools/render_slices.py FIXED MOVING WARPED OUTPUT.png [--transform TRANSFORM.h5]
        [--error-map ERROR_MAP.nii.gz] [--columns before after checkerboard grid error]
        [--rows Axial Coronal Sagittal] [--at R A S] [--side 400]

The rows are planes through the middle of the fixed volume, or through the point ``--at`` (mm); the columns what the buttons
of the panel show: the moving volume before, and the warped volume after the registration, in color and half transparent
over the fixed one; blocks of both; the grid that Slicer draws of the transform (fixed to moving points, as ITK writes it);
and the map of the expected error over the fixed volume. Layers are blended by Slicer's slice logic and the grid is drawn by
its displayable manager, on real MRML nodes (``slicer-core``), off screen; on Linux without a display this takes the
system's OSMesa (libosmesa6). The picture has 128 colors, which keeps it small.
"""

import argparse
import os
import sys
from pathlib import Path

if sys.platform == "linux" and not os.environ.get("DISPLAY"):
    os.environ.setdefault("VTK_DEFAULT_OPENGL_WINDOW", "vtkOSOpenGLRenderWindow")

import numpy as np
import SimpleITK as sitk
import slicer
import slicer.util
import vtk
from matplotlib import colormaps
from PIL import Image
from vtk.util.numpy_support import vtk_to_numpy

from DivRegNetLib.core.intensity import percentile_window, stretch
from DivRegNetLib.quality.preview import checkerboard

SIDE = 400  # pixels of a view
ORIENTATIONS = ("Axial", "Coronal", "Sagittal")
COLUMNS = ("before", "after", "checkerboard", "grid", "error")
RED_MM = 4.0  # smallest expected error of a red verdict
# As in DivRegNetModule/comparison.py, which needs Slicer's application:
SQUARES = 8  # of the checkerboard, along the longest side
GRID_LINES = 20  # across the longest side of the fixed volume
GRID_COLOR = (1.0, 0.75, 0.3)
GRAY, TINT = "vtkMRMLColorTableNodeGrey", "vtkMRMLColorTableNodeWarmShade1"
GRID_MANAGER = "vtkMRMLTransformsDisplayableManager2D"


def load_volume(scene, file: Path, color: str):
    """A volume node, windowed to what it shows."""
    image = sitk.ReadImage(str(file))
    matrix = np.eye(4)
    matrix[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    matrix[:3, 3] = image.GetOrigin()
    node = scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", file.name.split(".")[0])
    slicer.util.updateVolumeFromArray(node, sitk.GetArrayFromImage(image))
    node.SetIJKToRASMatrix(slicer.util.vtkMatrixFromArray(np.diag([-1.0, -1.0, 1.0, 1.0]) @ matrix))
    node.CreateDefaultDisplayNodes()
    display = node.GetDisplayNode()
    display.SetAndObserveColorNodeID(color)
    display.AutoWindowLevelOff()
    low, high = percentile_window(sitk.GetArrayViewFromImage(image), 1, 99.5)
    display.SetWindowLevelMinMax(float(low), float(high))
    return node


def add_checkerboard(scene, fixed, warped):
    """A volume node of the fixed and the warped volume, which are on one grid, in alternate blocks."""
    arrays = [slicer.util.arrayFromVolume(node) for node in (fixed, warped)]
    board = checkerboard(
        *(stretch(a, percentile_window(a, 1, 99)) for a in arrays), side=-(-max(arrays[0].shape) // SQUARES)
    )
    node = scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "checkerboard")
    slicer.util.updateVolumeFromArray(node, np.ascontiguousarray(255 * board).astype(np.uint8))
    node.CopyOrientation(fixed)
    node.CreateDefaultDisplayNodes()
    node.GetDisplayNode().SetAndObserveColorNodeID(GRAY)
    node.GetDisplayNode().AutoWindowLevelOff()
    node.GetDisplayNode().SetWindowLevelMinMax(0.0, 255.0)
    return node


def load_error_map(scene, file: Path):
    """A map of the expected error, colored as DivRegNetModule.maps does."""
    colors = scene.AddNewNodeByClass("vtkMRMLColorTableNode", "Inferno")  # slicer-core has no files of colors
    colors.SetTypeToUser()
    colors.SetNumberOfColors(256)
    for i, color in enumerate(colormaps["inferno"](np.arange(256))):
        colors.SetColor(i, f"{i}", *color)
    node = load_volume(scene, file, colors.GetID())
    largest, display = float(slicer.util.arrayFromVolume(node).max()), node.GetDisplayNode()
    display.SetWindowLevelMinMax(0.0, max(largest, RED_MM))
    display.SetThreshold(1e-6, max(largest, 2e-6))
    display.ApplyThresholdOn()
    return node


def load_transform(scene, file: Path, region, line_spacing: float):
    """A transform node that is shown as a grid in slice views, ``line_spacing`` mm apart."""
    node = scene.AddNewNodeByClass("vtkMRMLTransformNode", "deformation")
    storage = scene.AddNewNodeByClass("vtkMRMLTransformStorageNode")
    storage.SetFileName(str(file))
    if not storage.ReadData(node):
        raise SystemExit(f"{file}: Slicer cannot read this transform")
    color = scene.AddNewNodeByClass("vtkMRMLProceduralColorNode", "grid")
    color.GetColorTransferFunction().AddRGBPoint(0.0, *GRID_COLOR)
    display = scene.AddNewNodeByClass("vtkMRMLTransformDisplayNode")
    display.SetAndObserveColorNodeID(color.GetID())
    node.SetAndObserveDisplayNodeID(display.GetID())
    display.SetVisualizationMode(display.VIS_MODE_GRID)
    display.SetGridSpacingMm(line_spacing)
    display.SetGridResolutionMm(line_spacing / 4)
    display.SetAndObserveRegionNode(region)
    return node


class View:
    """One slice view off screen."""

    def __init__(self, scene, application, orientation: str, side: int) -> None:
        self.side = side
        self.logic = slicer.vtkMRMLSliceLogic()
        self.logic.SetMRMLApplicationLogic(application)
        self.logic.SetMRMLScene(scene)
        application.GetSliceLogics().AddItem(self.logic)
        self.node = self.logic.AddSliceNode(orientation)
        self.node.SetOrientation(orientation)
        self.node.SetDimensions(side, side, 1)
        self.composite = self.logic.GetSliceCompositeNode()

        self.mapper = vtk.vtkImageMapper()
        self.mapper.SetColorWindow(255)
        self.mapper.SetColorLevel(127.5)
        actor = vtk.vtkActor2D()
        actor.SetMapper(self.mapper)
        actor.GetProperty().SetDisplayLocationToBackground()
        self.renderer = vtk.vtkRenderer()
        self.renderer.AddViewProp(actor)
        self.window = vtk.vtkRenderWindow()
        self.window.SetOffScreenRendering(1)
        self.window.SetSize(side, side)
        self.window.AddRenderer(self.renderer)
        interactor = vtk.vtkGenericRenderWindowInteractor()
        interactor.SetRenderWindow(self.window)
        factory = slicer.vtkMRMLSliceViewDisplayableManagerFactory.GetInstance()
        factory.SetMRMLApplicationLogic(application)
        if not factory.IsDisplayableManagerRegistered(GRID_MANAGER):
            factory.RegisterDisplayableManager(GRID_MANAGER)
        self.managers = factory.InstantiateDisplayableManagers(self.renderer)
        self.managers.SetMRMLDisplayableNode(self.node)

    def picture(self, background, foreground=None) -> np.ndarray:
        """Background with foreground half-faded, and what the displayable manager draws; (side, side, 3) uint8."""
        self.composite.SetBackgroundVolumeID(background.GetID())
        self.composite.SetForegroundVolumeID(foreground.GetID() if foreground is not None else None)
        self.composite.SetForegroundOpacity(0.5)
        self.logic.UpdatePipeline()
        self.mapper.SetInputConnection(self.logic.GetImageDataConnection())
        self.window.Render()
        grab = vtk.vtkWindowToImageFilter()
        grab.SetInput(self.window)
        grab.ReadFrontBufferOff()
        grab.Update()
        pixels = vtk_to_numpy(grab.GetOutput().GetPointData().GetScalars())
        return pixels.reshape(self.side, self.side, -1)[::-1, :, :3].copy()


def save(picture: np.ndarray, file: Path) -> None:
    """An array (height, width, 3) of uint8, first row at the top, as PNG."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).quantize(128, dither=Image.Dither.NONE).save(file, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("fixed", "moving", "warped", "output"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--transform", type=Path, help="needed for the column grid")
    parser.add_argument("--error-map", type=Path, help="needed for the column error")
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, help="default: all that can be drawn")
    parser.add_argument("--rows", nargs="+", choices=ORIENTATIONS, default=ORIENTATIONS)
    parser.add_argument(
        "--at", type=float, nargs=3, metavar=("R", "A", "S"), help="point that the slices go through, mm"
    )
    parser.add_argument("--side", type=int, default=SIDE, help="width and height of a view in pixels")
    args = parser.parse_args()
    files = {"grid": args.transform, "error": args.error_map}
    columns = args.columns or [column for column in COLUMNS if files.get(column, True)]
    if missing := [column for column in columns if not files.get(column, True)]:
        parser.error(f"there is no file for the column {missing[0]}")

    scene = slicer.vtkMRMLScene()
    slicer.vtkMRMLSliceNode.AddDefaultSliceOrientationPresets(scene)
    application = slicer.vtkMRMLApplicationLogic()
    application.SetMRMLScene(scene)
    application.SetSliceLogics(vtk.vtkCollection())
    colors = slicer.vtkMRMLColorLogic()
    colors.SetMRMLScene(scene)
    colors_of = ((args.fixed, GRAY), (args.moving, TINT), (args.warped, TINT))
    fixed, moving, warped = (load_volume(scene, file, color) for file, color in colors_of)
    over = {"before": moving, "after": warped, "grid": warped}
    if "checkerboard" in columns:
        over["checkerboard"] = add_checkerboard(scene, fixed, warped)
    if args.error_map:
        over["error"] = load_error_map(scene, args.error_map)
    bounds = np.zeros(6)
    fixed.GetRASBounds(bounds)
    extent = (bounds[1::2] - bounds[::2]).max()
    transform = load_transform(scene, args.transform, fixed, extent / GRID_LINES) if args.transform else None
    rows = []
    for orientation in args.rows:
        view = View(scene, application, orientation, args.side)
        view.node.SetFieldOfView(extent * 1.02, extent * 1.02, 1.0)
        view.node.JumpSliceByCentering(*bounds.reshape(3, 2).mean(1))
        if args.at:
            view.node.JumpSliceByOffsetting(*args.at)
        row = []
        for column in columns:
            if transform is not None:
                transform.GetDisplayNode().SetVisibility2D(column == "grid")
                transform.GetDisplayNode().SetVisibility(column == "grid")
            layers = (over[column],) if column == "checkerboard" else (fixed, over[column])
            row.append(view.picture(*layers))
        rows.append(np.concatenate(row, 1))
    save(np.concatenate(rows, 0), args.output)


if __name__ == "__main__":
    main()
