"""One registration of nodes: the request, the worker while it runs, the nodes it makes, and undoing these."""

import time
from dataclasses import dataclass, field

import slicer

from DivRegNetLib.run.worker import Event, Worker
from DivRegNetModule import mrml, reference
from DivRegNetModule.mrml.scene import Changes, all_or_nothing


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
        return any(node is needed for needed in (self.fixed, self.moving, *self.outputs.values()))


@dataclass
class Outcome:
    """What a run has put into the scene.

    fixed: the fixed volume node.
    quality: the card, with ``dice`` and ``landmark_error_mm`` where they could be measured.
    notes: sentences for the user.
    seconds: from start to end.
    changes: to the scene.
    """

    fixed: object
    registration: mrml.Registration
    carried: list
    quality: dict
    notes: list[str]
    seconds: float
    changes: Changes = field(repr=False)

    def undo(self) -> None:
        """Removes the nodes that the run made, and gives those it filled their former content."""
        self.changes.undo()


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
        """Raises WorkerDied if no process can be started."""
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
        with all_or_nothing(slicer.mrmlScene, request.outputs.values()) as changes:
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
        seconds = time.monotonic() - self._started
        return Outcome(request.fixed, registration, carried, quality, notes, seconds, changes)
