"""``slicer.util.loadVolume`` and its like, by MRML's own storage nodes: Slicer's need the application's readers."""

import tempfile

import slicer
import slicer.util


def _load(kind: str, storage: str, file: str):
    node = slicer.mrmlScene.AddNewNodeByClass(kind)
    reader = slicer.mrmlScene.AddNewNodeByClass(storage)
    reader.SetFileName(file)
    if not reader.ReadData(node):
        raise RuntimeError(f"Failed to load node from file: {file}")
    if node.GetDisplayNode() is None:
        node.CreateDefaultDisplayNodes()
    return node


def load_volume(file: str, properties=None):
    node = _load("vtkMRMLScalarVolumeNode", "vtkMRMLVolumeArchetypeStorageNode", file)
    node.SetName((properties or {}).get("name", node.GetName()))
    return node


def load_segmentation(file: str, properties=None):
    labels = _load("vtkMRMLLabelMapVolumeNode", "vtkMRMLVolumeArchetypeStorageNode", file)
    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", (properties or {}).get("name", "Segmentation"))
    slicer.vtkSlicerSegmentationsModuleLogic.ImportLabelmapToSegmentationNode(labels, node)
    node.CreateDefaultDisplayNodes()
    slicer.mrmlScene.RemoveNode(labels)
    return node


def load_markups(file: str):
    return _load("vtkMRMLMarkupsFiducialNode", "vtkMRMLMarkupsJsonStorageNode", file)


def save_scene(file: str, properties=None) -> bool:
    """As a bundle, ``.mrb``."""
    return bool(slicer.mrmlScene.WriteToMRB(file, None))


def load_scene(file: str, properties=None) -> bool:
    """Adds a bundle to the scene."""
    with tempfile.TemporaryDirectory() as folder:
        cache, manager = slicer.vtkCacheManager(), slicer.vtkDataIOManager()
        cache.SetRemoteCacheDirectory(folder)
        manager.SetCacheManager(cache)
        slicer.mrmlScene.SetDataIOManager(manager)
        try:
            return bool(slicer.mrmlScene.ReadFromMRB(file, False))
        finally:
            slicer.mrmlScene.SetDataIOManager(None)
