"""A sequence of volumes registered frame by frame to one fixed volume, in short steps."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import slicer

from DivRegNetLib.errors import Cancelled, DivRegNetError, InputError
from DivRegNetLib.quality.verdict import Verdict, judge
from DivRegNetLib.run.worker import Event, Worker
from DivRegNetModule import _, mrml
from DivRegNetModule.mrml import transforms, volumes
from DivRegNetModule.mrml.checks import check_volume, is_scalar_volume
from DivRegNetModule.mrml.geometry import is_empty
from DivRegNetModule.mrml.registration import content_of_files
from DivRegNetModule.mrml.scene import Changes, all_or_nothing, is_a, name_of
from DivRegNetModule.run import STANDBY, STEP_SECONDS, WAIT
from DivRegNetModule.steps import Steps

LARGEST_BYTES = 2e9  # of all displacement fields together, beyond which they are not kept


@dataclass
class Frame:
    """What became of one volume of the sequence.

    index: its value of the sequence's index, as text.
    verdict, quality: None where the registration failed.
    error: why it failed.
    """

    index: str
    verdict: Verdict | None = None
    quality: dict | None = None
    error: str = ""


@dataclass
class SequenceOutcome:
    """What was put into the scene.

    warped, transforms: sequence nodes; the second is None where the fields would take too much memory.
    browser: the sequence browser node that shows them.
    fixed: the volume node that they were registered to.
    """

    frames: list[Frame]
    warped: object
    transforms: object
    browser: object
    seconds: float
    changes: Changes = field(repr=False)
    fixed: object = None

    def undo(self) -> None:
        """Removes the nodes that were made."""
        self.changes.undo()


def check_sequence(fixed, sequence) -> None:
    """Raises InputError unless all volumes of a sequence can be registered to the fixed volume."""
    check_volume(fixed, "fixed")
    if not is_a(sequence, "vtkMRMLSequenceNode"):
        raise InputError(_("there is no moving sequence; choose one"))
    count = sequence.GetNumberOfDataNodes()
    nodes = [sequence.GetNthDataNode(i) for i in range(count)]
    if not count or not all(is_scalar_volume(node) and not is_empty(node.GetImageData()) for node in nodes):
        text = _("{name} is no sequence of scalar volumes; choose another")
        raise InputError(text.format(name=name_of(sequence)))


class SequenceRun:
    """Registers every volume of a sequence; used like :class:`DivRegNetModule.run.Run`."""

    def __init__(self, fixed, sequence, *, fixed_mask=None, **options) -> None:
        """
        Args:
            fixed: scalar volume node.
            sequence: sequence node of scalar volumes, each in world coordinates.
            fixed_mask: as of :func:`DivRegNetModule.mrml.images_from_nodes`.
            options: fields of :class:`DivRegNetLib.options.Options`.
        Raises:
            InputError: a node that cannot be used.
        """
        check_sequence(fixed, sequence)
        self.fixed, self.sequence = fixed, sequence
        self.frames: list[Frame] = []
        self.running = False
        self.log: list[str] = []
        self._mask, self._options = fixed_mask, options
        self._worker: Worker | None = None
        self._steps: Iterator | None = None
        self._error: BaseException | None = None
        self._events: list[Event] = []
        self._finished = None

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._started

    def needs(self, node) -> bool:
        """Whether the run cannot go on without this node."""
        return node is self.fixed or node is self.sequence

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
        """Ends the process; the scene was not touched."""
        if self.running:
            self.running, self._error = False, Cancelled("cancelled")
        if self._steps is not None:
            self._steps.close()
        self._close()

    def finish(self) -> SequenceOutcome:
        """Puts the sequences into the scene.

        Raises:
            InputError, Cancelled, ...: the reason why there is no result; a frame that failed is none, unless all did.
        """
        if self._error is not None:
            raise self._error
        warped, fields = self._finished
        if all(frame.verdict is None for frame in self.frames):
            raise InputError(_("no frame could be registered: {error}").format(error=self.frames[0].error))
        scene = slicer.mrmlScene
        browser = _browser_of(self.sequence)
        with all_or_nothing(scene, [browser]) as changes:
            if browser is None:
                browser = scene.AddNewNodeByClass(
                    "vtkMRMLSequenceBrowserNode", _("{name} browser").format(name=self.sequence.GetName())
                )
                browser.SetAndObserveMasterSequenceNodeID(self.sequence.GetID())
            added = []
            for node in (warped, fields):
                if node is not None:
                    node.SetName(scene.GenerateUniqueName(node.GetName()))
                    added.append(scene.AddNode(node))
                    browser.AddSynchronizedSequenceNode(added[-1])
        transform_sequence = added[1] if len(added) > 1 else None
        return SequenceOutcome(self.frames, added[0], transform_sequence, browser, self.seconds, changes, self.fixed)

    def _close(self) -> None:
        if self._worker is not None:
            self._worker.cancel()
            self._worker.close()

    def _work(self) -> Steps:
        """All frames; the two sequence nodes, which are in no scene yet."""
        count = self.sequence.GetNumberOfDataNodes()
        fixed = yield from volumes.volume_image_steps(self.fixed)
        mask = yield from volumes.mask_image_steps(self._mask, self.fixed.GetScene())
        masks = {} if mask is None else {"fixed_mask": mask}
        names = (self.sequence.GetName(), self.fixed.GetName())
        warped = self._new_sequence(_("{moving} warped to {fixed}").format(moving=names[0], fixed=names[1]))
        keep = 12.0 * self.fixed.GetImageData().GetNumberOfPoints() * count <= LARGEST_BYTES
        fields = self._new_sequence(_("{moving} to {fixed}").format(moving=names[0], fixed=names[1])) if keep else None
        for i in range(count):
            frame = Frame(self.sequence.GetNthIndexValue(i))
            self._events.append(Event("progress", "frame", i / count))
            try:
                content = yield from self._register(i, count, fixed, masks)
            except Cancelled:
                raise
            except DivRegNetError as error:
                frame.error = str(error)
            else:
                frame.quality, frame.verdict = content.quality, judge(content.quality)
                yield from self._keep(frame.index, content, warped, fields, i)
            self.frames.append(frame)
            yield
        self._events.append(Event("progress", "frame", 1.0))
        return warped, fields

    def _register(self, i: int, count: int, fixed, masks: dict) -> Steps["mrml.registration.Content"]:
        node = self.sequence.GetNthDataNode(i)
        moving = yield from volumes.volume_image_steps(node)
        arguments = {"keep_files": True, "inverse": False, "standby": STANDBY} | masks | self._options
        self._worker = worker = Worker(fixed, moving, **arguments)
        yield from worker.starting()
        while worker.running:
            for event in worker.poll():
                if event.kind == "progress":
                    self._events.append(Event("progress", "frame", (i + event.fraction) / count))
            yield WAIT
        self.log += worker.log
        content = yield from content_of_files(worker.files, node.GetImageData().GetScalarType(), inverse=False)
        yield from worker.closing()
        return content

    def _keep(self, index: str, content, warped, fields, i: int) -> Steps[None]:
        """Adds a frame to the sequences; these make copies of what they are given."""
        node = slicer.vtkMRMLScalarVolumeNode()
        node.SetName(self.sequence.GetNthDataNode(i).GetName())
        volumes.fill_volume(node, content.warped, content.matrix)
        warped.SetDataNodeAtValue(node, index)
        yield
        if fields is not None:
            transform = slicer.vtkMRMLTransformNode()
            transform.SetAndObserveTransformFromParent(content.forward)
            for name, value in content.attributes.items():
                transform.SetAttribute(transforms.ATTRIBUTE + name, value)
            fields.SetDataNodeAtValue(transform, index)
            yield

    def _new_sequence(self, name: str):
        sequence = slicer.vtkMRMLSequenceNode()
        sequence.SetName(name)
        sequence.SetIndexName(self.sequence.GetIndexName())
        sequence.SetIndexUnit(self.sequence.GetIndexUnit())
        sequence.SetIndexType(self.sequence.GetIndexType())
        return sequence


def _browser_of(sequence):
    """The sequence browser node that shows a sequence; None if there is none."""
    for browser in slicer.util.getNodesByClass("vtkMRMLSequenceBrowserNode"):
        if browser.IsSynchronizedSequenceNode(sequence, True):
            return browser
    return None
