"""Renders slice views before and after a registration, as Slicer shows them, to a PNG.

    python Testing/tools/render_slices.py FIXED MOVING WARPED OUTPUT.png [--transform TRANSFORM.h5]
        [--error-map ERROR_MAP.nii.gz] [--at R A S]

Three rows (axial, coronal, sagittal, through the middle of the fixed volume or the point ``--at``) of: fixed with moving
half-faded; fixed with warped half-faded; where a transform (fixed to moving points, as ITK writes it) is given, warped with
the grid that Slicer draws of it; and where a map of the expected error is given, fixed with the map half-faded, in the colors
of the panel (0 mm is black, RED_MM or the largest error is yellow). Layers are blended by Slicer's slice logic and the grid is drawn by its displayable manager, on
real MRML nodes (``slicer-core``), off screen; on Linux without a display this takes the system's OSMesa (libosmesa6).
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
from vtk.util.numpy_support import numpy_to_vtk, vtk_to_numpy

from DivRegNetLib.core.intensity import percentile_window

SIDE = 400  # pixels of a view
ORIENTATIONS = ("Axial", "Coronal", "Sagittal")
RED_MM = 4.0  # smallest expected error of a red verdict
GRID_LINES = 20  # across the longest side of the fixed volume
GRID_MANAGER = "vtkMRMLTransformsDisplayableManager2D"


def load_volume(scene, file: Path):
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
    display.SetAndObserveColorNodeID("vtkMRMLColorTableNodeGrey")
    display.AutoWindowLevelOff()
    low, high = percentile_window(sitk.GetArrayViewFromImage(image), 1, 99.5)
    display.SetWindowLevelMinMax(float(low), float(high))
    return node


def load_error_map(scene, file: Path):
    """A map of the expected error, colored as DivRegNetModule.maps does."""
    node = load_volume(scene, file)
    largest = float(slicer.util.arrayFromVolume(node).max())
    display = node.GetDisplayNode()
    colors = scene.AddNewNodeByClass("vtkMRMLColorTableNode", "Inferno")  # slicer-core has no files of colors
    colors.SetTypeToUser()
    colors.SetNumberOfColors(256)
    for i, (red, green, blue, _) in enumerate(colormaps["inferno"](np.arange(256))):
        colors.SetColor(i, f"{i}", red, green, blue, 1.0)
    display.SetAndObserveColorNodeID(colors.GetID())
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
    node.CreateDefaultDisplayNodes()
    display = node.GetDisplayNode()
    display.SetVisualizationMode(display.VIS_MODE_GRID)
    display.SetGridSpacingMm(line_spacing)
    display.SetGridResolutionMm(line_spacing / 4)
    display.SetAndObserveRegionNode(region)
    return node


class View:
    """One slice view off screen."""

    def __init__(self, scene, application, orientation: str) -> None:
        self.logic = slicer.vtkMRMLSliceLogic()
        self.logic.SetMRMLApplicationLogic(application)
        self.logic.SetMRMLScene(scene)
        application.GetSliceLogics().AddItem(self.logic)
        self.node = self.logic.AddSliceNode(orientation)
        self.node.SetOrientation(orientation)
        self.node.SetDimensions(SIDE, SIDE, 1)
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
        self.window.SetSize(SIDE, SIDE)
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
        """Background with foreground half-faded, and what the displayable manager draws; (SIDE, SIDE, 3) uint8."""
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
        return pixels.reshape(SIDE, SIDE, -1)[::-1, :, :3].copy()


def save(picture: np.ndarray, file: Path) -> None:
    """An array (height, width, 3) of uint8, first row at the top, as PNG."""
    image = vtk.vtkImageData()
    image.SetDimensions(picture.shape[1], picture.shape[0], 1)
    image.GetPointData().SetScalars(numpy_to_vtk(picture[::-1].reshape(-1, 3), deep=1))
    file.parent.mkdir(parents=True, exist_ok=True)
    writer = vtk.vtkPNGWriter()
    writer.SetFileName(str(file))
    writer.SetInputData(image)
    writer.Write()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("fixed", "moving", "warped", "output"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--transform", type=Path)
    parser.add_argument("--error-map", type=Path)
    parser.add_argument(
        "--at", type=float, nargs=3, metavar=("R", "A", "S"), help="point that the slices go through, mm"
    )
    args = parser.parse_args()

    scene = slicer.vtkMRMLScene()
    slicer.vtkMRMLSliceNode.AddDefaultSliceOrientationPresets(scene)
    application = slicer.vtkMRMLApplicationLogic()
    application.SetMRMLScene(scene)
    application.SetSliceLogics(vtk.vtkCollection())
    colors = slicer.vtkMRMLColorLogic()
    colors.SetMRMLScene(scene)
    fixed, moving, warped = (load_volume(scene, file) for file in (args.fixed, args.moving, args.warped))
    bounds = np.zeros(6)
    fixed.GetRASBounds(bounds)
    extent = (bounds[1::2] - bounds[::2]).max()
    transform = load_transform(scene, args.transform, fixed, extent / GRID_LINES) if args.transform else None
    error_map = load_error_map(scene, args.error_map) if args.error_map else None
    rows = []
    for orientation in ORIENTATIONS:
        view = View(scene, application, orientation)
        view.node.SetFieldOfView(extent * 1.02, extent * 1.02, 1.0)
        view.node.JumpSliceByCentering(*bounds.reshape(3, 2).mean(1))
        if args.at:
            view.node.JumpSliceByOffsetting(*args.at)
        row = [view.picture(fixed, moving), view.picture(fixed, warped)]
        if transform is not None:
            display = transform.GetDisplayNode()
            display.SetVisibility2D(True)
            display.SetVisibility(True)
            row.append(view.picture(warped))
            display.SetVisibility(False)
        if error_map is not None:
            row.append(view.picture(fixed, error_map))
        rows.append(np.concatenate(row, 1))
    save(np.concatenate(rows, 0), args.output)


if __name__ == "__main__":
    main()
