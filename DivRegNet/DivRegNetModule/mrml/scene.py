"""Nodes of a scene: finding, adding, naming them, and taking back what was done to a scene."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import slicer
import slicer.util


def is_a(node, kind: str) -> bool:
    """Whether something is an MRML node of a class, or of one derived from it."""
    return isinstance(node, slicer.vtkMRMLNode) and bool(node.IsA(kind))


def name_of(node) -> str:
    """A node's name in quotes, for messages; anything else as Python writes it."""
    return repr(node.GetName() or node.GetID()) if isinstance(node, slicer.vtkMRMLNode) else repr(node)[:80]


def all_nodes(scene) -> list:
    """Every node of a scene, in its order."""
    return [scene.GetNthNode(i) for i in range(scene.GetNumberOfNodes())]


def add_node(scene, kind: str, name: str):
    """Adds a node of a class with a name that no other node has."""
    return scene.AddNewNodeByClass(kind, scene.GenerateUniqueName(name))


def display_nodes(node) -> list:
    """The display nodes of a node, empty for a node that cannot have any."""
    if not is_a(node, "vtkMRMLDisplayableNode"):
        return []
    displays = (node.GetNthDisplayNode(i) for i in range(node.GetNumberOfDisplayNodes()))
    return [display for display in displays if display is not None]


def remove_with_display(node) -> None:
    """Removes a node and its display nodes, also those that were made later, from the scene that it is in, if any.

    The display nodes last: Slicer gives a volume that is shown in a slice view and has none a new one.
    """
    scene = node.GetScene()
    if scene is not None and scene.IsNodePresent(node):
        displays = display_nodes(node)
        for each in (node, *displays):
            if scene.IsNodePresent(each):
                scene.RemoveNode(each)


def copy_display(node, model) -> None:
    """Gives a node display nodes like those of another node, colors included.

    A volume gets the present window and level of the other, so that the two can be compared.
    """
    scene = node.GetScene()
    for shown in display_nodes(model):
        display = scene.AddNewNodeByClass(shown.GetClassName())
        display.CopyContent(shown)
        display.CopyReferences(shown)
        if is_a(display, "vtkMRMLScalarVolumeDisplayNode"):
            automatic_levels_off(display)
        node.AddAndObserveDisplayNodeID(display.GetID())


def automatic_levels_off(display) -> None:
    """Keeps Slicer from computing window and level from all voxels, which takes long in a large volume; to be called before
    a display node is given its image."""
    display.AutoWindowLevelOff()
    display.AutoThresholdOff()


def parent_transforms(node) -> list:
    """The transform nodes that a node is under, nearest first."""
    parents = []
    while (node := node.GetParentTransformNode()) is not None and node not in parents:
        parents.append(node)
    return parents


@dataclass
class Changes:
    """What was done to a scene: nodes added to it, and the former content of nodes that were overwritten.

    added: nodes.
    overwritten: pairs (node, a node outside of the scene that shares its former content).
    """

    scene: object
    added: list = field(default_factory=list)
    overwritten: list[tuple] = field(default_factory=list)

    def undo(self) -> None:
        """Removes the added nodes with their display nodes, and gives the overwritten ones their former content."""
        for node, backup in self.overwritten:
            if self.scene.IsNodePresent(node):
                with slicer.util.NodeModify(node):
                    node.CopyContent(backup, False)
                    node.CopyReferences(backup)
        for node in self.added:
            remove_with_display(node)


@contextmanager
def all_or_nothing(scene, overwritten: Iterable = ()) -> Iterator[Changes]:
    """Records what the body does to a scene, and takes it back if the body raises.

    Args:
        overwritten: nodes whose content the body replaces (without changing images or transforms in place); anything in
            it that is no node is ignored.
    Yields:
        the changes; ``added`` is filled when the body ends.
    """
    before = {node.GetID() for node in all_nodes(scene)}
    changes = Changes(scene)
    for node in overwritten:
        if is_a(node, "vtkMRMLNode"):
            backup = node.CreateNodeInstance()
            backup.CopyContent(node, False)
            backup.CopyReferences(node)
            changes.overwritten.append((node, backup))

    def new_nodes() -> list:
        return [node for node in all_nodes(scene) if node.GetID() not in before]

    try:
        yield changes
    except BaseException:
        changes.added += new_nodes()
        changes.undo()
        raise
    changes.added += new_nodes()
