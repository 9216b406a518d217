"""Scenes that are saved and opened again."""

import numpy as np
import pytest

pytest.importorskip("slicer")

import slicer
from DivRegNetModule import mrml
from mrml_scenes import RAS, array, inside_image, put_registered, resampled_by_slicer, world_grid


@pytest.mark.parametrize("kind", ["mrml", "mrb"])
def test_a_saved_scene_comes_back_whole(scene, fixed, moving, registered, tmp_path, kind, landmarks):
    transform = registered.transform_node
    if kind == "mrb":
        file = str(tmp_path / "scene.mrb")
        assert scene.WriteToMRB(file, None)
        loaded = slicer.vtkMRMLScene()
        cache, manager = slicer.vtkCacheManager(), slicer.vtkDataIOManager()
        cache.SetRemoteCacheDirectory(str(tmp_path / "cache"))
        manager.SetCacheManager(cache)
        loaded.SetDataIOManager(manager)
        assert loaded.ReadFromMRB(file, True)
    else:
        for i in range(scene.GetNumberOfNodes()):
            node = scene.GetNthNode(i)
            if node.IsA("vtkMRMLStorableNode") and node.AddDefaultStorageNode():
                storage = node.GetStorageNode()
                extension = storage.GetDefaultWriteFileExtension()
                storage.SetFileName(str(tmp_path / f"{node.GetID()}.{extension}"))
                assert storage.WriteData(node)
        scene.SetRootDirectory(str(tmp_path))
        scene.SetURL(str(tmp_path / "scene.mrml"))
        assert scene.Commit()
        loaded = slicer.vtkMRMLScene()
        loaded.SetURL(str(tmp_path / "scene.mrml"))
        assert loaded.Connect()
    again = loaded.GetFirstNodeByName(transform.GetName())
    assert again.GetClassName() == "vtkMRMLTransformNode"
    for name in ("Model", "ModelVersion", "Settings", "Quality"):
        assert again.GetAttribute(f"DivRegNet.{name}") == transform.GetAttribute(f"DivRegNet.{name}")
    assert again.GetNodeReference(again.GetFixedNodeReferenceRole()).GetName() == "T1 head"
    assert again.GetNodeReference(again.GetMovingNodeReferenceRole()).GetName() == "T2 head"
    for point in (landmarks * RAS).tolist():
        for direction in ("GetTransformFromParent", "GetTransformToParent"):
            before, after = (getattr(node, direction)().TransformPoint(point) for node in (transform, again))
            assert after == pytest.approx(before, abs=0.02 if "To" in direction else 1e-4)
    warped, read = registered.warped_node, loaded.GetFirstNodeByName(registered.warped_node.GetName())
    assert np.array_equal(array(read), array(warped))
    assert array(read).dtype == array(warped).dtype
    assert world_grid(read) == world_grid(warped)
    moved = loaded.GetFirstNodeByName("T2 head")
    put_registered(moved, again)
    inside = inside_image(registered.result.transform, mrml.images_from_nodes(fixed, moving).moving, warped)
    assert np.abs(resampled_by_slicer(moved, read) - array(read))[inside].max() <= 1
