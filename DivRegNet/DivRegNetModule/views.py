"""The slice views: what they show, remembered and put back; layers, planes and layout."""

import slicer
import slicer.util
import vtk


class SliceViews:
    """What the slice views showed when this object was made: layers, planes, fields of view, links and the layout."""

    def __init__(self) -> None:
        composites = slicer.util.getNodesByClass("vtkMRMLSliceCompositeNode")
        self._layers = [
            (
                view,
                (view.GetBackgroundVolumeID(), view.GetForegroundVolumeID(), view.GetLabelVolumeID()),
                view.GetForegroundOpacity(),
                view.GetLinkedControl(),
            )
            for view in composites
        ]
        self._planes = []
        for view in slicer.util.getNodesByClass("vtkMRMLSliceNode"):
            plane = vtk.vtkMatrix4x4()
            plane.DeepCopy(view.GetSliceToRAS())
            self._planes.append((view, plane, view.GetFieldOfView(), view.GetXYZOrigin()))
        self._layout = layout()

    def restore(self) -> None:
        """Everything as it was; views and volumes that were removed meanwhile are left out."""
        scene = slicer.mrmlScene
        set_layout(self._layout)
        for view, volumes, opacity, linked in self._layers:
            if not scene.IsNodePresent(view):
                continue
            view.SetLinkedControl(linked)
            background, foreground, label = (v if v and scene.GetNodeByID(v) else None for v in volumes)
            view.SetBackgroundVolumeID(background)
            view.SetForegroundVolumeID(foreground)
            view.SetLabelVolumeID(label)
            view.SetForegroundOpacity(opacity)
        for view, plane, field, origin in self._planes:
            if scene.IsNodePresent(view):
                view.GetSliceToRAS().DeepCopy(plane)
                view.SetFieldOfView(*field)
                view.SetXYZOrigin(origin)
                view.UpdateMatrices()


def show_layers(background, foreground, opacity: float, *, view: str = "") -> None:
    """The layers of all slice views, or of the one that is named; the label layer is left alone.

    Args:
        background, foreground: volume nodes, or None.
        opacity: of the foreground.
    """
    ids = [None if node is None else node.GetID() for node in (background, foreground)]
    for composite in slicer.util.getNodesByClass("vtkMRMLSliceCompositeNode"):
        if not view or composite.GetLayoutName() == view:
            composite.SetBackgroundVolumeID(ids[0])
            composite.SetForegroundVolumeID(ids[1])
            composite.SetForegroundOpacity(opacity)


def set_opacity(opacity: float) -> None:
    """The opacity of the foreground in all slice views."""
    for composite in slicer.util.getNodesByClass("vtkMRMLSliceCompositeNode"):
        composite.SetForegroundOpacity(opacity)


def along(volume) -> None:
    """Turns the slice views into the planes of a volume that are nearest to them, and fits them to what they show."""
    parent = volume.GetParentTransformNode()
    if parent is None or parent.IsTransformToWorldLinear():
        for view in slicer.util.getNodesByClass("vtkMRMLSliceNode"):
            view.RotateToVolumePlane(volume)
    fit()


def fit() -> None:
    """Fits the slice views to their background."""
    manager = slicer.app.layoutManager()
    if manager is not None:
        logics = manager.mrmlSliceLogics()
        for i in range(logics.GetNumberOfItems()):
            logics.GetItemAsObject(i).FitSliceToBackground()


def layout() -> int | None:
    """The layout of the views; None without a main window."""
    manager = slicer.app.layoutManager()
    return None if manager is None else manager.layout


def set_layout(number: int | None) -> None:
    """Changes the layout of the views, if there are any and it is another one."""
    manager = slicer.app.layoutManager()
    if manager is not None and number is not None and manager.layout != number:
        manager.setLayout(number)


def side_by_side(left, right) -> None:
    """Two volumes in two linked axial views with the same plane and field of view."""
    set_layout(slicer.vtkMRMLLayoutNode.SlicerLayoutSideBySideView)
    names = ("Red", "Yellow")  # the views of that layout
    for name, volume in zip(names, (left, right), strict=True):
        show_layers(volume, None, 0.0, view=name)
    for view in slicer.util.getNodesByClass("vtkMRMLSliceNode"):
        if view.GetLayoutName() in names:
            view.SetOrientation("Axial")
    for composite in slicer.util.getNodesByClass("vtkMRMLSliceCompositeNode"):
        if composite.GetLayoutName() in names:
            composite.SetLinkedControl(True)
    along(left)


def jump_to(position_ras) -> None:
    """Moves all slice views so that a point, RAS mm, is in their middle."""
    slicer.vtkMRMLSliceNode.JumpAllSlices(slicer.mrmlScene, *position_ras, slicer.vtkMRMLSliceNode.CenteredJumpSlice)
