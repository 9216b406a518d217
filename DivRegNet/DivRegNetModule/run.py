"""One registration of nodes: the request, the worker while it runs, the nodes it gives, and taking these back."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import slicer
import slicer.util

from DivRegNetLib.run.worker import Event, Worker
from DivRegNetModule import mrml, reference


@dataclass
class Request:
    """What the user asked for, taken from the panel when Register was pressed.

    fixed, moving: scalar volume nodes.
    warped, transform: nodes that take the outputs; None makes new ones.
    inverse: None: not wanted; True: a new node; or a node that takes it.
    also: nodes that belong to the moving volume; deformed copies are made.
    options: the rest of :func:`DivRegNetModule.mrml.images_from_nodes`.
    segmentations, landmarks: (fixed, moving) nodes to measure the result with; both or none of a pair.
    """

    fixed: object
    moving: object
    warped: object = None
    transform: object = None
    inverse: object = None
    also: list = field(default_factory=list)
    options: dict = field(default_factory=dict)
    segmentations: tuple = (None, None)
    landmarks: tuple = (None, None)

    @property
    def outputs(self) -> dict:
        return {"warped_node": self.warped, "transform_node": self.transform, "inverse_node": self.inverse}

    def needs(self, node) -> bool:
        """Whether the run cannot go on without this node."""
        return any(node is mine for mine in (self.fixed, self.moving, *self.outputs.values()))


@dataclass
class Outcome:
    """What a run has put into the scene.

    fixed: the fixed volume node.
    quality: the card, with ``dice`` and ``landmark_error_mm`` where they could be measured.
    notes: sentences for the user.
    seconds: from start to end.
    """

    fixed: object
    registration: mrml.Registration
    carried: list
    quality: dict
    notes: list[str]
    seconds: float
    _added: list = field(default_factory=list, repr=False)
    _backups: list = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Removes the nodes that the run made, and gives those it filled their former content."""
        scene = slicer.mrmlScene
        for node, backup in self._backups:
            if scene.IsNodePresent(node):
                with slicer.util.NodeModify(node):
                    node.CopyContent(backup)
                    node.CopyReferences(backup)
        for node in self._added:
            if scene.IsNodePresent(node):
                shown = node.GetNumberOfDisplayNodes() if node.IsA("vtkMRMLDisplayableNode") else 0
                for display in [node.GetNthDisplayNode(i) for i in range(shown)]:  # those made later, too
                    if display is not None:
                        scene.RemoveNode(display)
                scene.RemoveNode(node)


class Run:
    """A registration that is under way in a worker process.

    ``start``, ``poll`` until ``running`` is False, then ``finish``, or ``cancel`` at any time.
    """

    def __init__(self, request: Request) -> None:
        """Reads the nodes; nothing is started yet.

        Raises:
            InputError: a node, mask or option that cannot be used; the message says which, why and what to do.
        """
        self.request = request
        mrml.check_nodes(request.fixed, request.moving, **request.outputs)
        inputs = mrml.images_from_nodes(request.fixed, request.moving, **request.options)
        self._worker = Worker(inputs.fixed, inputs.moving, **inputs.options)
        self._started = 0.0

    def start(self) -> None:
        """Raises WorkerDied if there is no process to be had."""
        self._started = time.monotonic()
        self._worker.start()

    @property
    def running(self) -> bool:
        return self._worker.running

    def poll(self) -> list[Event]:
        """What happened since the last call; returns at once."""
        return self._worker.poll()

    def cancel(self) -> None:
        """Ends the process and all of its children. The scene was not touched."""
        self._worker.cancel()

    def finish(self) -> Outcome:
        """Puts the result into the scene: all of it or, if anything is raised, nothing.

        Raises:
            InputError, ModelError, DeviceError, Cancelled, WorkerDied: what the registration or the nodes gave.
        """
        request, result = self.request, self._worker.result()
        with _undone_if_raised(request) as (added, backups):
            registration = mrml.nodes_from_result(result, request.fixed, request.moving, **request.outputs)
            also = [node for node in request.also if slicer.mrmlScene.IsNodePresent(node)]
            carried = mrml.apply_to(registration.transform_node, also, reference_node=request.fixed) if also else []
            quality, notes = dict(registration.quality), list(result.warnings)
            for measure, pair in ((reference.dice, request.segmentations), (reference.landmarks, request.landmarks)):
                if all(node is not None and slicer.mrmlScene.IsNodePresent(node) for node in pair):
                    try:
                        quality |= measure(*pair, result)
                    except ValueError as error:  # what cannot be measured is no reason to lose the registration
                        notes.append(str(error))
        return Outcome(
            request.fixed, registration, carried, quality, notes, time.monotonic() - self._started, added, backups
        )


@contextmanager
def _undone_if_raised(request: Request) -> Iterator[tuple[list, list]]:
    """Lists of the nodes that the body adds to the scene, and of (node, backup) of those it fills; undoes both if it
    raises. Both are filled when the body ends."""
    scene = slicer.mrmlScene
    before = {node.GetID() for node in _nodes(scene)}
    added, backups = [], []
    for node in request.outputs.values():
        if node is not None and node is not True:
            backup = node.CreateNodeInstance()
            backup.CopyContent(node)
            backup.CopyReferences(node)
            backups.append((node, backup))

    def new() -> list:
        return [node for node in _nodes(scene) if node.GetID() not in before]

    try:
        yield added, backups
    except BaseException:
        Outcome(None, None, [], {}, [], 0.0, new(), backups).undo()
        raise
    added += new()


def _nodes(scene) -> list:
    return [scene.GetNthNode(i) for i in range(scene.GetNumberOfNodes())]
