"""One registration of nodes, in short steps: the request, the worker while it runs, the nodes it makes, and undoing these."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import slicer
import slicer.util

from DivRegNetLib.core.grid import Grid, affine_transform
from DivRegNetLib.errors import Cancelled, InputError
from DivRegNetLib.quality.references import References
from DivRegNetLib.registration.landmark_alignment import align_landmarks
from DivRegNetLib.run.worker import Event, Standby, Worker
from DivRegNetModule import _, mrml
from DivRegNetModule.mrml.carrying import copy_steps, earlier_copy, place_copy
from DivRegNetModule.mrml.checks import check_carried, check_nodes
from DivRegNetModule.mrml.geometry import ijk_to_ras, matrix_to_world
from DivRegNetModule.mrml.markups import pairs
from DivRegNetModule.mrml.registration import content_of_files, fill_nodes, images_from_nodes_steps
from DivRegNetModule.mrml.scene import Changes, all_or_nothing, name_of
from DivRegNetModule.mrml.segments import segments_steps
from DivRegNetModule.steps import Steps

PREPARED, COMPUTED, RECEIVED = 0.03, 0.92, 0.96  # of the whole, for the progress bar
STEP_SECONDS = 0.04  # that a call of poll may take
LANDMARKS = "landmarks-"  # before the kind of a transform: the initial alignment is fitted to the landmarks
STANDBY = Standby()
"""The process that registers for the panel, for sequences and for scripts, one after another."""


@dataclass
class Request:
    """What the user asked for, taken from the panel when Register was pressed.

    fixed, moving: scalar volume nodes.
    warped, transform: nodes that take the outputs; None makes new ones.
    inverse: None: not wanted; True: a new node; or a node that takes it.
    also: nodes that belong to the moving volume; deformed copies are made.
    options: the rest of :func:`DivRegNetModule.mrml.images_from_nodes`; ``align`` may also be ``landmarks-rigid``,
        ``landmarks-similarity`` or ``landmarks-affine``.
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
        return node is self.fixed or node is self.moving

    def check(self) -> None:
        """Raises InputError for what would be refused after the registration, too; names the node and the remedy."""
        check_nodes(self.fixed, self.moving, **self.outputs)
        for node in self.also:
            check_carried(node, self.fixed.GetScene(), self.transform)
            if node is self.fixed or node is self.warped:
                text = _("{name} is the fixed volume or the output itself; leave it out of those to carry along")
                raise InputError(text.format(name=name_of(node)))


@dataclass
class Outcome:
    """What a run has put into the scene.

    fixed, moving: the volume nodes.
    quality: the card, with ``dice``, ``segments``, ``landmark_error_mm`` and ``landmarks`` where they could be measured.
    pairs: the landmarks that were measured, or None.
    notes: sentences for the user.
    seconds: from start to end.
    settings, timings, initial: see :class:`DivRegNetLib.result.Result`.
    error_map: voxels and index-to-RAS matrix of the map of the expected error, which is not in the scene;
        :func:`DivRegNetModule.maps.error_map_steps` puts it there.
    changes: to the scene.
    """

    fixed: object
    moving: object
    registration: mrml.Registration
    carried: list
    quality: dict
    pairs: "object | None"
    notes: list[str]
    seconds: float
    settings: dict
    timings: dict
    initial: np.ndarray
    error_map: "tuple | None"
    changes: Changes = field(repr=False)

    def undo(self) -> None:
        """Removes the nodes that the run made, and gives those it filled their former content."""
        self.changes.undo()


class Run:
    """A registration under way. ``start``, ``poll`` until ``running`` is False, then ``finish``; or ``cancel`` at any time.

    No call takes longer than a fraction of a second, however large the volumes are. The scene is only read until
    ``finish``, which changes it at once.
    """

    def __init__(self, request: Request) -> None:
        """Checks the nodes; nothing is started yet.

        Raises:
            InputError: a node, mask or option that cannot be used; the message says which, why and what to do.
        """
        self.request = request
        request.check()
        self.running = False
        self.log: list[str] = []
        self._steps: Steps | None = None
        self._worker: Worker | None = None
        self._error: BaseException | None = None
        self._finished = None
        self._events: list[Event] = []
        self._notes: list[str] = []
        self._started = 0.0

    @property
    def pid(self) -> int | None:
        """Of the worker's process, None before it is there."""
        return None if self._worker is None else self._worker.pid

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._started

    def needs(self, node) -> bool:
        """Whether the run cannot go on without this node."""
        return self.request.needs(node)

    def start(self) -> None:
        """Begins; what goes wrong is raised by ``finish``."""
        self._started, self.running = time.monotonic(), True
        self._steps = self._work()

    def poll(self) -> list[Event]:
        """Does a little of the work; returns what happened since the last call."""
        until = time.monotonic() + STEP_SECONDS
        try:
            while self.running and next(self._steps) is None and time.monotonic() < until:
                pass
        except StopIteration as stop:
            self.running, self._finished = False, stop.value
        except Exception as error:
            self.running, self._error = False, error
            self._close()
        events, self._events = self._events, []
        return events

    def cancel(self) -> None:
        """Ends the process and all of its children. The scene was not touched."""
        if self.running:
            self.running, self._error = False, Cancelled("cancelled")
        if self._steps is not None:
            self._steps.close()
        self._close()

    def finish(self) -> Outcome:
        """Puts the result into the scene: all of it or, if anything is raised, nothing.

        A node that cannot be carried along, or an output that cannot be used any more, does not cost the registration: it
        is named in ``notes``.

        Raises:
            InputError, ModelError, DeviceError, Cancelled, WorkerDied: the reason why there is no result.
        """
        if self._error is not None:
            raise self._error
        content, files, copies = self._finished
        request, scene = self.request, slicer.mrmlScene
        outputs, notes = self._usable_outputs()
        targets = {id(node): earlier_copy(node, request.fixed) for node, _copy in copies}
        overwritten = [*outputs.values(), *(target for target in targets.values() if target is not None)]
        with all_or_nothing(scene, overwritten) as changes:
            registration = fill_nodes(content, request.fixed, request.moving, **outputs)
            carried = [place_copy(copy, node, request.fixed, targets[id(node)]) for node, copy in copies]
        return Outcome(
            fixed=request.fixed,
            moving=request.moving,
            registration=registration,
            carried=carried,
            quality=content.quality,
            pairs=self._pairs,
            notes=[*self._changed(), *files.warnings, *self._notes, *notes],
            seconds=self.seconds,
            settings=files.settings,
            timings=files.timings,
            initial=files.initial,
            error_map=content.error_map,
            changes=changes,
        )

    def _close(self) -> None:
        if self._worker is not None:
            self._worker.cancel()
            self._worker.close()

    def _report(self, stage: str, fraction: float) -> None:
        self._events.append(Event("progress", stage, fraction))

    def _work(self) -> Iterator:
        """All that comes before the scene is changed. Yields None after a step, WAIT where there is nothing to do."""
        request = self.request
        self._before = {node: _state(node) for node in (request.fixed, request.moving)}
        self._report("prepare", 0.0)
        self._pairs = pairs(*request.landmarks) if None not in request.landmarks else None
        if self._pairs is not None:
            self._notes += self._pairs.notes
        inputs = yield from images_from_nodes_steps(request.fixed, request.moving, **self._options())
        references = yield from self._references()
        inverse = request.inverse is not None
        options = {"error_map": True} | inputs.options
        worker = Worker(
            inputs.fixed,
            inputs.moving,
            references=references,
            keep_files=True,
            inverse=inverse,
            standby=STANDBY,
            **options,
        )
        self._worker = worker
        del inputs, references  # large
        yield
        yield from worker.starting()
        try:
            while worker.running:
                for event in worker.poll():
                    if event.kind == "progress":
                        self._report(event.stage, PREPARED + (COMPUTED - PREPARED) * event.fraction)
                yield WAIT
        finally:
            self.log = list(worker.log)
        files = worker.files
        self._report("receive", COMPUTED)
        scalar_type = request.moving.GetImageData().GetScalarType()
        content = yield from content_of_files(files, scalar_type, inverse=inverse)
        self._report("carry", RECEIVED)
        copies = []
        grid = files.grid("warped")
        for i, node in enumerate(request.also):
            copies += yield from self._copy(node, content.forward.GetInverse(), grid)
            self._report("carry", RECEIVED + (1 - RECEIVED) * (i + 1) / len(request.also))
        yield from worker.closing()
        self._report("carry", 1.0)
        return content, files, copies

    def _options(self) -> dict:
        """The options with landmarks turned into the transform that fits them."""
        options = dict(self.request.options)
        align = options.get("align")
        if isinstance(align, str) and align.startswith(LANDMARKS):
            if self._pairs is None:
                raise InputError(_("alignment by landmarks needs a list of landmarks in both volumes"))
            kind = align.removeprefix(LANDMARKS)
            options["align"] = affine_transform(align_landmarks(self._pairs.fixed, self._pairs.moving, kind))
        return options

    def _references(self) -> Steps[References | None]:
        """What the result is measured with."""
        references = References()
        if None not in self.request.segmentations:
            fixed = yield from segments_steps(self.request.segmentations[0])
            moving = yield from segments_steps(self.request.segmentations[1])
            references = replace(references, fixed_segments=fixed, moving_segments=moving)
        if self._pairs is not None and self._pairs.labels:
            points = {"fixed_points": self._pairs.fixed, "moving_points": self._pairs.moving}
            references = replace(references, **points, labels=self._pairs.labels)
        measured = references.fixed_segments is not None or references.fixed_points is not None
        return references if measured else None

    def _copy(self, node, transform, grid: Grid) -> Steps[list]:
        """[(node, its moved copy)], or [] and a note where it could not be carried along."""
        if not slicer.mrmlScene.IsNodePresent(node):
            self._notes.append(_("A node that was to be carried along was deleted."))
            return []
        try:
            check_carried(node, slicer.mrmlScene, self.request.transform)
            return [(node, (yield from copy_steps(node, transform, grid)))]
        except Exception as error:  # whatever it is, it is no reason to lose the registration
            text = _("'{name}' was not carried along: {error}.")
            self._notes.append(text.format(name=node.GetName(), error=error))
            return []

    def _usable_outputs(self) -> tuple[dict, list[str]]:
        """The output nodes, new ones instead of those that cannot be used any more; and sentences about these."""
        request, usable, notes = self.request, {}, []
        for name, node in request.outputs.items():
            try:
                check_nodes(request.fixed, request.moving, **{name: node})
                usable[name] = node
            except InputError as error:
                usable[name] = True if name == "inverse_node" else None
                notes.append(_("A new node was made for an output: {error}.").format(error=error))
        return usable, notes

    def _changed(self) -> list[str]:
        """Sentences about volumes that are no longer what was registered."""
        notes = []
        for node, (voxels, place) in self._before.items():
            voxels_now, place_now = _state(node)
            if voxels != voxels_now:
                text = _(
                    "'{name}' was edited during the registration. The result belongs to its former state; register again."
                )
                notes.append(text.format(name=node.GetName()))
            if place != place_now:
                text = _(
                    "'{name}' was moved during the registration. The result belongs to its former place; register again."
                )
                notes.append(text.format(name=node.GetName()))
        return notes


WAIT = "wait"


def _state(node) -> tuple[object, object]:
    """What changes when the voxels of a volume are edited, and when it is moved."""
    parent = node.GetParentTransformNode()
    place = ijk_to_ras(node)
    if parent is None:
        return node.GetImageData().GetMTime(), place.tolist()
    if parent.IsTransformToWorldLinear():
        return node.GetImageData().GetMTime(), (matrix_to_world(parent) @ place).tolist()
    return node.GetImageData().GetMTime(), (place.tolist(), parent.GetTransformToWorldMTime())
