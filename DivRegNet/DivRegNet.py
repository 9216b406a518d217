"""DivRegNet for 3D Slicer: the classes that Slicer looks for. The work is done by DivRegNetModule and DivRegNetLib."""

import enum
import functools
import importlib
import logging
import re
import sys
import time
import traceback
from pathlib import Path
from typing import Annotated, Union

import qt
import slicer
import vtk
from slicer import (
    vtkMRMLLabelMapVolumeNode,
    vtkMRMLMarkupsFiducialNode,
    vtkMRMLMarkupsROINode,
    vtkMRMLScalarVolumeNode,
    vtkMRMLSegmentationNode,
    vtkMRMLSequenceNode,
    vtkMRMLTransformableNode,
    vtkMRMLTransformNode,
)
from slicer.i18n import tr as _
from slicer.i18n import translate
from slicer.parameterNodeWrapper import WithinRange, parameterNodeWrapper
from slicer.ScriptedLoadableModule import (
    ScriptedLoadableModule,
    ScriptedLoadableModuleLogic,
    ScriptedLoadableModuleTest,
    ScriptedLoadableModuleWidget,
)
from slicer.util import VTKObservationMixin

MODULE_FOLDER = Path(__file__).resolve().parent
POLL_MS = 20  # between two steps of a run, see DivRegNetModule.run.STEP_SECONDS
MOST_STEPS = 200  # of refinement
LAYOUT_MS = 50  # after which the panel has made room for a result
COARSER = 1.5  # times the spacing: memory divided by 3.4
HELP = "https://github.com/DivRegNet/DivRegNet/blob/main/docs/guide.md"
LAST = -100.0  # priority of an observer that is called after those of Slicer's own widgets


def _find_packages() -> None:
    """Imports DivRegNetLib from beside this file (an installed extension), from the folder above (a checkout whose module
    folder was given to Slicer), or else from where pip has put it; and DivRegNetModule, which needs it, from beside."""
    for name, folders in (
        ("DivRegNetLib", [MODULE_FOLDER, MODULE_FOLDER.parent]),
        ("DivRegNetModule", [MODULE_FOLDER]),
    ):
        folder = next((str(f) for f in folders if (f / name / "__init__.py").is_file()), None)
        if folder:
            sys.path.insert(0, folder)
        try:
            importlib.import_module(name)
        finally:
            if folder:
                sys.path.remove(folder)


_find_packages()


class DivRegNet(ScriptedLoadableModule):
    """The module's title, category, help and acknowledgment."""

    def __init__(self, parent) -> None:
        ScriptedLoadableModule.__init__(self, parent)
        parent.title = _("Deformable Registration (DivRegNet)")
        parent.categories = [translate("qSlicerAbstractCoreModule", "Registration")]
        parent.dependencies = []
        parent.contributors = ["DivRegNet contributors"]
        text = _(
            "Deformable registration of images of different kinds (T1-T2, PD-T2, CT-MR) and of the same kind, in seconds. "
            "Choose a fixed and a moving volume, press Register, and read the verdict before you use the result. "
            "See more in the {start}user guide{end}."
        )
        parent.helpText = text.format(start=f'<a href="{HELP}">', end="</a>")
        parent.acknowledgementText = _(
            "Method: Huang et al., KLDivNet: An unsupervised neural network for multi-modality image registration, "
            "arXiv 1908.08767. Not a medical device; for research."
        )
        slicer.app.connect("startupCompleted()", registerSampleData)


def registerSampleData() -> None:
    """Adds the bundled pairs to the Sample Data module."""
    from DivRegNetModule import samples

    samples.register(MODULE_FOLDER)


class Alignment(enum.Enum):
    """Initial alignment; values as in DivRegNetLib.options.ALIGNMENTS, a transform of the scene, or fitted to landmarks."""

    NONE = "none"
    CENTER = "center"
    RIGID = "rigid"
    AFFINE = "affine"
    TRANSFORM = "transform"
    LANDMARKS_RIGID = "landmarks-rigid"
    LANDMARKS_SIMILARITY = "landmarks-similarity"
    LANDMARKS_AFFINE = "landmarks-affine"
    CENTRE = "center"  # the name of CENTER in scenes that version 0.1 saved

    def label(self) -> str:
        return {
            Alignment.NONE: _("None"),
            Alignment.CENTER: _("Centers"),
            Alignment.RIGID: _("Rigid"),
            Alignment.AFFINE: _("Affine"),
            Alignment.TRANSFORM: _("A transform of the scene"),
            Alignment.LANDMARKS_RIGID: _("Landmarks, rigid"),
            Alignment.LANDMARKS_SIMILARITY: _("Landmarks, rigid and scaled"),
            Alignment.LANDMARKS_AFFINE: _("Landmarks, affine"),
        }[self]


class Method(enum.Enum):
    """What computes the deformation; values as in DivRegNetLib.options.METHOD_CHOICES."""

    AUTO = "auto"
    VARIATIONAL = "variational"
    DISCRETE = "discrete+variational"
    REGNET = "regnet"
    BOTH = "variational+regnet"
    NONE = "none"

    def label(self) -> str:
        return {
            Method.AUTO: _("Automatic"),
            Method.VARIATIONAL: _("Variational"),
            Method.DISCRETE: _("Discrete start, then variational"),
            Method.REGNET: _("RegNet"),
            Method.BOTH: _("Variational, then RegNet"),
            Method.NONE: _("None (only align)"),
        }[self]


class Effort(enum.Enum):
    """How much time the deformation may take; values as in DivRegNetLib.options.EFFORTS."""

    FAST = "fast"
    USUAL = "usual"
    THOROUGH = "thorough"

    def label(self) -> str:
        return {Effort.FAST: _("Fast"), Effort.USUAL: _("Usual"), Effort.THOROUGH: _("Thorough")}[self]


class Interpolation(enum.Enum):
    """Interpolation of the warped volume; values as in DivRegNetLib.options.INTERPOLATIONS."""

    LINEAR = "linear"
    NEAREST = "nearest"
    BSPLINE = "bspline"

    def label(self) -> str:
        return {
            Interpolation.LINEAR: _("Linear"),
            Interpolation.NEAREST: _("Nearest neighbor"),
            Interpolation.BSPLINE: _("Cubic B-spline"),
        }[self]


Mask = Union[vtkMRMLSegmentationNode, vtkMRMLLabelMapVolumeNode, vtkMRMLMarkupsROINode, None]  # noqa: UP007 -- Slicer 5.10 reads no other form


@parameterNodeWrapper
class DivRegNetParameterNode:
    """The settings, saved with the scene. Empty nodes mean: none, or a new one where it is an output.

    fixedSegment, movingSegment: id of the segment, where the mask is a segmentation.
    model, device: as in DivRegNetLib.options.Options; empty is the default.
    workingSpacing: mm; 0 is the model's.
    """

    fixedVolume: vtkMRMLScalarVolumeNode
    movingVolume: vtkMRMLScalarVolumeNode
    movingSequence: vtkMRMLSequenceNode
    alignment: Alignment = Alignment.AFFINE
    initialTransform: vtkMRMLTransformNode
    fixedMask: Mask
    fixedSegment: str
    movingMask: Mask
    movingSegment: str
    model: str
    method: Method = Method.AUTO
    effort: Effort = Effort.USUAL
    warpedVolume: vtkMRMLScalarVolumeNode
    transform: vtkMRMLTransformNode
    giveInverse: bool = False
    inverse: vtkMRMLTransformNode
    alsoApplyTo: list[vtkMRMLTransformableNode]
    device: str
    refineSteps: Annotated[int, WithinRange(0, MOST_STEPS)] = 0
    workingSpacing: Annotated[float, WithinRange(0, 20)] = 0.0
    interpolation: Interpolation = Interpolation.LINEAR
    fillAutomatic: bool = True
    fillValue: Annotated[float, WithinRange(-100000, 100000)] = 0.0
    fixedSegmentation: vtkMRMLSegmentationNode
    movingSegmentation: vtkMRMLSegmentationNode
    fixedLandmarks: vtkMRMLMarkupsFiducialNode
    movingLandmarks: vtkMRMLMarkupsFiducialNode


def guarded(slot):
    """A slot or observer of the widget whose exceptions are shown to the user: PythonQt and VTK only print them."""

    @functools.wraps(slot)
    def call(self, *arguments):
        try:
            return slot(self, *arguments)
        except Exception as error:
            self._unexpected(error)

    return call


class DivRegNetWidget(ScriptedLoadableModuleWidget, VTKObservationMixin):
    """The panel."""

    def __init__(self, parent=None) -> None:
        ScriptedLoadableModuleWidget.__init__(self, parent)
        VTKObservationMixin.__init__(self)
        self.logic = None
        self._parameterNode = None
        self._guiTags = []
        self._run = None
        self._sequenceRun = None
        self._outcome = None
        self._sequenceOutcome = None
        self._undoable = None  # the last outcome, of a pair or of a sequence
        self._comparison = None
        self._task = None
        self._landmarkRows = []
        self._tableItems = {}
        self._messageOfRun = False
        self._refreshing = False

    def setup(self) -> None:
        from DivRegNetModule.connectors import connectors
        from DivRegNetModule.devices import Devices

        ScriptedLoadableModuleWidget.setup(self)
        panel = slicer.util.loadUI(self.resourcePath("UI/DivRegNet.ui"))
        self.layout.addWidget(panel)
        self.ui = slicer.util.childWidgetVariables(panel)
        self._narrowSelectors()
        panel.setMRMLScene(slicer.mrmlScene)
        self.logic = DivRegNetLogic()
        self._connectors = connectors(self.ui)
        self._devices = Devices()

        self._timer = qt.QTimer()
        self._timer.setInterval(POLL_MS)
        self._timer.timeout.connect(self.onPoll)
        self._deviceTimer = qt.QTimer()
        self._deviceTimer.setInterval(100)
        self._deviceTimer.timeout.connect(self.onDevicesPoll)

        for button, slot in (
            (self.ui.registerButton, self.onRegister),
            (self.ui.cancelButton, self.onCancel),
            (self.ui.retryCoarserButton, self.onRetryCoarser),
            (self.ui.retryCpuButton, self.onRetryCpu),
            (self.ui.swapButton, self.onSwap),
            (self.ui.helpButton, self.onHelp),
            (self.ui.restoreViewsButton, self.onRestoreViews),
            (self.ui.undoButton, self.onUndo),
            (self.ui.reportButton, self.onReport),
            (self.ui.displacementMapButton, self.onDisplacementMap),
            (self.ui.jacobianMapButton, self.onJacobianMap),
            (self.ui.errorMapButton, self.onErrorMap),
            (self.ui.registerSequenceButton, self.onRegisterSequence),
            (self.ui.copyLogButton, self.onCopyLog),
        ):
            button.connect("clicked(bool)", slot)
        for button, slot in (
            (self.ui.beforeButton, self.onBefore),
            (self.ui.flickerButton, self.onFlicker),
            (self.ui.checkerboardButton, self.onCheckerboard),
            (self.ui.sideBySideButton, self.onSideBySide),
            (self.ui.gridButton, self.onGrid),
        ):
            button.connect("toggled(bool)", slot)
        self.ui.presetComboBox.connect("activated(int)", self.onPreset)
        for table, slot in ((self.ui.landmarksTable, self.onLandmark), (self.ui.sequenceTable, self.onFrame)):
            table.connect("cellClicked(int,int)", slot)
            table.connect("cellActivated(int,int)", slot)  # the Enter key

        scene = slicer.mrmlScene
        self.addObserver(scene, scene.StartCloseEvent, self.onSceneStartClose)
        self.addObserver(scene, scene.StartBatchProcessEvent, self.onSceneStartBatch)
        self.addObserver(scene, scene.EndBatchProcessEvent, self.onSceneEndBatch, priority=LAST)
        self.addObserver(scene, scene.NodeAddedEvent, self.onNodeAdded, priority=LAST)
        self.addObserver(scene, scene.NodeAboutToBeRemovedEvent, self.onNodeAboutToBeRemoved)
        self.addObserver(scene, scene.NodeRemovedEvent, self.onNodeRemoved, priority=LAST)
        self._offerPresets()
        self._forgetOutcome()
        self._offerChoices()
        self.initializeParameterNode()

    def _narrowSelectors(self) -> None:
        """Long names of nodes must not make the panel wide: selectors shorten them, as the other lists do by the .ui file."""
        from DivRegNetModule.connectors import boxes_in

        for widget in list(vars(self.ui).values()):
            if isinstance(widget, (slicer.qMRMLNodeComboBox, slicer.qMRMLCheckableNodeComboBox)):
                for box in boxes_in(widget):
                    box.setSizeAdjustPolicy(qt.QComboBox.AdjustToMinimumContentsLengthWithIcon)

    def cleanup(self) -> None:
        """The module is unloaded or the application closes: ends the run and removes all observers."""
        from DivRegNetModule.run import STANDBY

        self._stop()
        self._deviceTimer.stop()
        self._devices.stop()
        STANDBY.close()
        self._forgetOutcome()
        self._forgetSequence()
        self.setParameterNode(None)
        self.removeObservers()

    @guarded
    def enter(self) -> None:
        self._offerChoices()
        self.initializeParameterNode()
        if self._outcome is not None and self._comparison is None:
            self._compare()  # of a run that ended meanwhile

    def exit(self) -> None:
        """Another module is opened: a run continues, but the panel no longer follows the parameters."""
        self.ui.flickerButton.setChecked(False)
        self._disconnectParameterNode()

    # --- the scene

    @guarded
    def onSceneStartClose(self, caller, event) -> None:
        running = self._running is not None
        self._stop()
        self._forgetOutcome(restore=False)
        self._forgetSequence()
        self._say(_("The scene was closed, so the registration was stopped.") if running else "")
        self.setParameterNode(None)

    @guarded
    def onSceneStartBatch(self, caller, event) -> None:
        """A scene is imported or closed, or many nodes come at once. Until it ends Slicer's selectors show other nodes than
        the parameters say, and would write them there (qMRMLSceneModel::updateScene, at EndImportEvent)."""
        self.setParameterNode(None)

    @guarded
    def onSceneEndBatch(self, caller, event) -> None:
        if self.parent.isEntered:
            self.initializeParameterNode()

    @guarded
    @vtk.calldata_type(vtk.VTK_OBJECT)
    def onNodeAdded(self, caller, event, node) -> None:
        if node.IsA("vtkMRMLVolumeNode") and self.parent.isEntered and not slicer.mrmlScene.IsBatchProcessing():
            qt.QTimer.singleShot(0, self.onVolumesLoaded)  # a node is added first and filled then

    @guarded
    def onVolumesLoaded(self) -> None:
        """Chooses volumes that were loaded while the panel is open, if none are chosen."""
        if self._parameterNode is not None and self._running is None and self.parent.isEntered:
            self._chooseVolumes()
            self._refresh()

    @guarded
    @vtk.calldata_type(vtk.VTK_OBJECT)
    def onNodeAboutToBeRemoved(self, caller, event, node) -> None:
        """Takes a node out of the parameters before a selector shows, and chooses, the one that was listed after it."""
        from DivRegNetModule import inputs

        p = self._parameterNode
        if p is None or slicer.mrmlScene.IsClosing():
            return
        for name in inputs.NODES:
            if p.getValue(name) is node:
                p.setValue(name, None)
        if any(member is node for member in p.alsoApplyTo):
            p.alsoApplyTo = [member for member in p.alsoApplyTo if member is not node]

    @guarded
    @vtk.calldata_type(vtk.VTK_OBJECT)
    def onNodeRemoved(self, caller, event, node) -> None:
        if self._running is not None and self._running.needs(node):
            self._stop()
            text = _("'{name}' was deleted, so the registration was stopped. Nothing else was changed.")
            self._say(text.format(name=node.GetName()), error=True)
        elif self._comparison is not None and self._comparison.needs(node):
            self._forgetOutcome(restore=False)

    # --- parameters

    @property
    def _running(self):
        """The run of a pair or of a sequence that is under way, or None."""
        return self._run or self._sequenceRun

    def initializeParameterNode(self) -> None:
        """Follows the parameter node of the scene, and chooses volumes if none are chosen."""
        self.setParameterNode(self.logic.getParameterNode())
        self._chooseVolumes()
        if self.parent.isEntered:
            self._restore()

    def _chooseVolumes(self) -> None:
        from DivRegNetModule import inputs

        p = self._parameterNode
        volumes = [v for v in inputs.registrable(slicer.mrmlScene) if v not in (p.fixedVolume, p.movingVolume)]
        if not p.fixedVolume and not p.movingVolume and len(volumes) >= 2:
            with slicer.util.NodeModify(p):
                p.fixedVolume, p.movingVolume = volumes[:2]
        elif bool(p.fixedVolume) != bool(p.movingVolume) and len(volumes) == 1:
            p.setValue("movingVolume" if p.fixedVolume else "fixedVolume", volumes[0])

    def setParameterNode(self, parameterNode: "DivRegNetParameterNode | None") -> None:
        self._disconnectParameterNode()
        self._parameterNode = parameterNode
        if parameterNode:
            self._guiTags = [
                parameterNode.connectGui(self.ui),
                parameterNode.connectParametersToGui(self._connectors),
            ]
            self.addObserver(parameterNode, vtk.vtkCommand.ModifiedEvent, self.onParametersModified)
        self._refresh()

    def _disconnectParameterNode(self) -> None:
        if self._parameterNode:
            for tag in self._guiTags:
                self._parameterNode.disconnectGui(tag)
            self._guiTags = []
            if self.hasObserver(self._parameterNode, vtk.vtkCommand.ModifiedEvent, self.onParametersModified):
                self.removeObserver(self._parameterNode, vtk.vtkCommand.ModifiedEvent, self.onParametersModified)

    def _offerChoices(self) -> None:
        """Offers the models and devices that are available now; graphics cards when their driver has answered."""
        from DivRegNetModule import inputs

        from DivRegNetLib.models import DEFAULT

        models = inputs.models()
        self._connectors["model"].offer(models or [(_("{name} (not found)").format(name=DEFAULT), DEFAULT)])
        self._connectors["device"].offer(self._devices.offered())
        self._devices.ask()
        if self._devices.asking:
            self._deviceTimer.start()

    @guarded
    def onDevicesPoll(self) -> None:
        if self._devices.poll():
            self._connectors["device"].offer(self._devices.offered())
        if not self._devices.asking:
            self._deviceTimer.stop()

    @guarded
    def onParametersModified(self, caller=None, event=None) -> None:
        if self._running is None and not self._messageOfRun:
            self._say("")  # what it was about has been changed
        self._messageOfRun = False
        self._refresh()

    def _refresh(self) -> None:
        """Updates the panel after any change of the parameters or of the run."""
        from DivRegNetModule import inputs

        if self._refreshing:
            return
        self._refreshing = True
        try:
            p, running = self._parameterNode, self._running is not None
            problems = inputs.problems(p)
            self.ui.registerButton.enabled = not running and not problems
            self.ui.registerButton.toolTip = (
                "\n".join(problems) if problems else _("Registers the moving volume to the fixed volume.")
            )
            of_sequence = inputs.sequence_problems(p)
            self.ui.registerSequenceButton.enabled = not running and not of_sequence
            self.ui.registerSequenceButton.toolTip = (
                of_sequence[0] if of_sequence else _("Registers each volume of the sequence to the fixed volume.")
            )
            self.ui.cancelButton.enabled = running
            self.ui.undoButton.enabled = not running and self._undoable is not None
            self.ui.progressBar.visible = self.ui.timeLabel.visible = running
            chosen = p is not None and p.fixedVolume and p.movingVolume
            self.ui.problemLabel.text = "\n".join(problems) if chosen else ""
            self.ui.problemLabel.visible = bool(chosen and problems)
            self.ui.swapButton.enabled = p is not None and not running
            if p is None:
                return
            self._offerNodes()
            self.ui.initialTransformSelector.enabled = p.alignment == Alignment.TRANSFORM
            self.ui.inverseSelector.enabled = p.giveInverse
            self.ui.fillSpinBox.enabled = not p.fillAutomatic
            for parameter, combo, node in (
                ("fixedSegment", self.ui.fixedSegmentComboBox, p.fixedMask),
                ("movingSegment", self.ui.movingSegmentComboBox, p.movingMask),
            ):
                self._offerSegments(parameter, combo, node)
            if not running:
                for name in inputs.foreign_outputs(p):
                    p.setValue(name, None)
            self._showPreset()
            self._describe(bool(problems))
            if not running and not (problems and of_sequence):
                self._prepare()
        finally:
            self._refreshing = False

    def _offerNodes(self) -> None:
        """Hides from the selectors what would be refused."""
        from DivRegNetModule import inputs

        for name, ids in inputs.hidden_from(self._parameterNode, slicer.mrmlScene).items():
            model = getattr(self.ui, name).sortFilterProxyModel()
            if sorted(model.hiddenNodeIDs) != ids:
                selector, blocked = getattr(self.ui, name), getattr(self.ui, name).blockSignals(True)
                model.hiddenNodeIDs = ids
                selector.blockSignals(blocked)

    def _offerSegments(self, parameter: str, combo, node) -> None:
        """Offers the segments of a mask that is a segmentation, and chooses the first if none of them is chosen."""
        from DivRegNetModule import mrml

        segments = mrml.segments(node)
        combo.visible = combo.enabled = bool(segments)
        ids = [segment for _name, segment in segments]
        chosen = self._parameterNode.getValue(parameter)
        if chosen not in ids:
            chosen = ids[0] if ids else ""
        if chosen != self._parameterNode.getValue(parameter):
            self._parameterNode.setValue(parameter, chosen)
        self._connectors[parameter].offer(segments)
        self._connectors[parameter].write(chosen)

    def _describe(self, problems: bool) -> None:
        """Shows the model's card, how the volumes differ from it, and the memory."""
        from DivRegNetModule import fit, inputs

        p = self._parameterNode
        self.ui.cardLabel.text, self.ui.cardLabel.toolTip = inputs.card_lines(p.model)
        card = inputs.card(p.model)
        complaints, needed = [], _("Choose two volumes first.")
        if card and not problems:
            complaints = fit.complaints(card, inputs.facts(p.fixedVolume), inputs.facts(p.movingVolume))
            needed = fit.memory_text(card, p.fixedVolume, p.movingVolume, p.workingSpacing, p.refineSteps)
        self.ui.fitLabel.text = "\n".join(complaints)
        outcome = self._outcome  # of these volumes: then there is a verdict instead
        judged = outcome is not None and (outcome.fixed, outcome.moving) == (p.fixedVolume, p.movingVolume)
        self.ui.fitLabel.visible = bool(complaints) and not judged
        self.ui.memoryLabel.text = needed

    def _prepare(self) -> None:
        """Starts the process that will register, so that it is ready when Register is pressed."""
        from DivRegNetModule import first_use
        from DivRegNetModule.run import STANDBY

        if self.parent.isEntered and STANDBY.pid is None and not first_use.missing():
            STANDBY.prepare(model=self._parameterNode.model, device=self._parameterNode.device)

    # --- purpose

    def _offerPresets(self) -> None:
        from DivRegNetModule import translated

        from DivRegNetLib.presets import PRESETS

        for preset in PRESETS.values():
            self.ui.presetComboBox.addItem(translated(preset.label), preset.name)
            self.ui.presetComboBox.setItemData(
                self.ui.presetComboBox.count - 1, translated(preset.help), qt.Qt.ToolTipRole
            )
        self.ui.presetComboBox.addItem(_("Custom"), "")

    def _showPreset(self) -> None:
        """The preset whose options are chosen, or Custom."""
        from DivRegNetLib.presets import matching

        p = self._parameterNode
        options = {"align": p.alignment, "method": p.method, "effort": p.effort}
        preset = matching({name: choice.value for name, choice in options.items()} | {"refine": p.refineSteps})
        self.ui.presetComboBox.setCurrentIndex(self.ui.presetComboBox.findData(preset.name if preset else ""))

    @guarded
    def onPreset(self, index: int) -> None:
        from DivRegNetLib.presets import PRESETS

        p, preset = self._parameterNode, PRESETS.get(self.ui.presetComboBox.itemData(index))
        if preset is None or p is None:
            self._refresh()
            return
        with slicer.util.NodeModify(p):
            p.alignment = Alignment(preset.value("align"))
            p.method = Method(preset.value("method"))
            p.effort = Effort(preset.value("effort"))
            p.refineSteps = preset.value("refine")

    @guarded
    def onSwap(self, checked: bool = False) -> None:
        from DivRegNetModule import inputs

        p = self._parameterNode
        with slicer.util.NodeModify(p):
            for names in inputs.SWAPPED:
                values = [p.getValue(name) for name in names]
                for name, value in zip(names, reversed(values), strict=True):
                    p.setValue(name, value)

    @guarded
    def onHelp(self, checked: bool = False) -> None:
        if not qt.QDesktopServices.openUrl(qt.QUrl(HELP)):
            self._say(_("No browser could be opened. The user guide is at {address}").format(address=HELP))

    # --- the run

    @guarded
    def onRegister(self, checked: bool = False) -> None:
        from DivRegNetModule import inputs
        from DivRegNetModule.run import Run

        if self._running is None:
            self._run = self._begin(lambda: Run(inputs.request(self._parameterNode)))
            self._refresh()

    @guarded
    def onRegisterSequence(self, checked: bool = False) -> None:
        from DivRegNetModule import inputs
        from DivRegNetModule.sequences import SequenceRun

        def make():
            p = self._parameterNode
            mask = inputs.mask(p.fixedMask, p.fixedSegment)
            values = inputs.options(p) | {"align": p.alignment.value}
            return SequenceRun(p.fixedVolume, p.movingSequence, fixed_mask=mask, **values)

        if self._running is None:
            self._forgetSequence()
            self._sequenceRun = self._begin(make)
            self._refresh()

    def _begin(self, make):
        """Starts a run that ``make`` returns; None, and a message, where it cannot be."""
        from DivRegNetModule import first_use, inputs

        from DivRegNetLib.errors import DivRegNetError

        self._say("")
        try:
            first_use.ensure()
            run = make()
            run.start()
        except (DivRegNetError, first_use.NotReady) as error:
            self._say(inputs.sentence(str(error)), error=True)
            return None
        self.ui.progressBar.setValue(0)
        self.ui.progressBar.setFormat(_("Starting"))
        self.ui.timeLabel.text = ""
        self._log(_("Registration started."))
        self._timer.start()
        return run

    @guarded
    def onPoll(self) -> None:
        """Called by a timer while a registration runs. Each call takes a fraction of a second."""
        run = self._running
        if run is None:
            self._timer.stop()
            return
        for event in run.poll():
            if event.kind == "progress":
                if self.ui.progressBar.format != progressFormat(event.stage):
                    self._log(stageName(event.stage))
                self.ui.progressBar.setValue(round(1000 * event.fraction))
                self.ui.progressBar.setFormat(progressFormat(event.stage))
        self.ui.timeLabel.text = timeText(run.seconds, self.ui.progressBar.value / 1000)
        if run.running:
            return
        self._timer.stop()
        sequence, self._run, self._sequenceRun = run is self._sequenceRun, None, None  # before nodes come and go
        for line in run.log:
            self._log(line)
        try:
            outcome = run.finish()
        except Exception as error:
            self._fail(error)
        else:
            (self._showSequence if sequence else self._show)(outcome)
        self._refresh()

    @guarded
    def onCancel(self, checked: bool = False) -> None:
        if self._running is not None:
            self._stop()
            self._say(_("Cancelled. The scene is as it was."))

    @guarded
    def onRetryCoarser(self, checked: bool = False) -> None:
        from DivRegNetModule import inputs

        p = self._parameterNode
        card, volumes = inputs.card(p.model), [inputs.facts(v) for v in (p.fixedVolume, p.movingVolume)]
        spacing = p.workingSpacing or (card.working_spacing(*volumes) if card else 2.0)
        p.workingSpacing = min(round(spacing * COARSER, 1), 20.0)
        self.onRegister()

    @guarded
    def onRetryCpu(self, checked: bool = False) -> None:
        self._parameterNode.device = "cpu"
        self.onRegister()

    def _stop(self) -> None:
        """Ends a running registration; the scene was not touched."""
        self._timer.stop()
        run, self._run, self._sequenceRun = self._running, None, None
        if run is not None:
            run.cancel()
            self._log(_("Registration stopped."))
        self._refresh()

    def _fail(self, error: Exception) -> None:
        from DivRegNetModule import inputs

        from DivRegNetLib.errors import Cancelled, DeviceError, DivRegNetError
        from DivRegNetLib.run.worker import WorkerDied

        if isinstance(error, Cancelled):
            self._say(_("Cancelled. The scene is as it was."))
            return
        if not isinstance(error, DivRegNetError):
            self._unexpected(error)
            return
        self._say(inputs.sentence(str(error)), error=True, retry=isinstance(error, (DeviceError, WorkerDied)))
        if not self.parent.isEntered:
            slicer.util.errorDisplay(_("DivRegNet: the registration failed.\n\n{error}").format(error=error))

    def _unexpected(self, error: Exception) -> None:
        """An error that should not happen: in the panel, in a dialog with its details, and in the log."""
        details = traceback.format_exc()
        logging.error(details)
        text = _("Something went wrong: {error}").format(error=f"{type(error).__name__}: {error}")
        self._say(text, error=True)
        self._log(details)
        slicer.util.errorDisplay(text, windowTitle="DivRegNet", detailedText=details)

    def _say(self, text: str, *, error: bool = False, retry: bool = False) -> None:
        """A message below the buttons; ``retry`` offers a coarser resolution and, if a GPU computed, the CPU."""
        if text:
            self._log(text)
        if error:
            logging.error(f"DivRegNet: {text}")
        self._messageOfRun = False
        self.ui.messageLabel.text = text
        self.ui.messageLabel.visible = bool(text)
        self.ui.messageLabel.setStyleSheet("color: #c62828" if error else "")
        self.ui.retryCoarserButton.visible = retry
        device = "cpu" if self._parameterNode is None else self._parameterNode.device
        on_gpu = device.startswith("cuda") or (device in ("", "auto") and self._devices.has_gpu)
        self.ui.retryCpuButton.visible = retry and on_gpu

    def _log(self, text: str) -> None:
        self.ui.logText.appendPlainText(f"{time.strftime('%H:%M:%S')} {text}")

    @guarded
    def onCopyLog(self, checked: bool = False) -> None:
        slicer.app.clipboard().setText(self.ui.logText.toPlainText())

    # --- the result

    def _show(self, outcome) -> None:
        """Shows the result of a run that has ended."""
        comparison, earlier = self._comparison, self._outcome
        again = earlier is not None and (earlier.fixed, earlier.moving) == (outcome.fixed, outcome.moving)
        before = comparison.before if again and comparison is not None and comparison.mode else None
        self._forgetOutcome(restore=False)
        judgment = self._present(outcome)
        self._undoable = outcome
        registration, p = outcome.registration, self._parameterNode
        if p is not None:
            with slicer.util.NodeModify(p):  # what was made is overwritten next time, unless another output is chosen
                p.warpedVolume, p.transform = registration.warped_node, registration.transform_node
                if registration.inverse_node is not None:
                    p.inverse = registration.inverse_node
        if self.parent.isEntered:
            self._compare(before=before)
        self._say("\n".join(outcome.notes))
        self._messageOfRun = True
        self._log(f"{judgment.level}: {judgment.headline} {outcome.quality}")
        slicer.util.showStatusMessage(_("DivRegNet: done in {s:.1f} s").format(s=outcome.seconds), 5000)

    def _present(self, outcome):
        """Shows verdict, quality card and landmarks of a result in the panel; returns the verdict."""
        from DivRegNetModule import landmarks, verdict

        from DivRegNetLib.quality.verdict import judge

        self._outcome = outcome
        judgment = judge(outcome.quality)
        names = outcome.moving.GetName(), outcome.fixed.GetName()
        self.ui.pairLabel.text = verdict.pair(*names)
        self.ui.pairLabel.toolTip = verdict.pair(*names, shortened=False)
        self.ui.verdictLabel.text = verdict.as_html(judgment)
        device = outcome.settings.get("device", "")
        self.ui.resultCollapsibleButton.visible = True
        self.ui.resultCollapsibleButton.collapsed = False
        self.ui.qualityLabel.text = verdict.table(verdict.rows(outcome.quality, outcome.seconds, device))
        self.ui.qualityLabel.adjustSize()
        self.ui.errorMapButton.enabled = outcome.error_map is not None
        self._fillLandmarks(landmarks.rows(outcome.pairs, outcome.quality))
        qt.QTimer.singleShot(LAYOUT_MS, self.onResultShown)
        return judgment

    @guarded
    def onResultShown(self) -> None:
        """Scrolls the module panel (qSlicerModulePanel has a QScrollArea) to the result, wherever one was in it."""
        area = self.parent
        while area is not None and not area.inherits("QScrollArea"):
            area = area.parent()
        if area is not None:
            area.ensureWidgetVisible(self.ui.verdictLabel)

    def _restore(self) -> None:
        """Shows the result that was saved with the scene, if none is shown; in the views, too, if it was compared there."""
        from DivRegNetModule import restored
        from DivRegNetModule.comparison import Comparison

        if self._outcome is not None or self._running is not None or self._parameterNode is None:
            return
        outcome = restored.outcome_of(self._parameterNode)
        if outcome is not None:
            self._present(outcome)
            self._compare(show=Comparison.was_saved(outcome.registration.transform_node))
            self._refresh()

    def _compare(self, *, show: bool = True, before=None) -> None:
        """Makes the comparison of the result in the slice views, and shows it.

        Args:
            before: the views that it will put back, as they were before an earlier comparison; None: the present ones.
        """
        from DivRegNetModule.comparison import OVERLAY, Comparison

        outcome = self._outcome
        nodes = (outcome.registration.warped_node, outcome.registration.transform_node)
        self._comparison = Comparison(outcome.fixed, outcome.moving, *nodes, self._unexpected, before)
        if show:
            self._comparison.show(OVERLAY)

    def _fillLandmarks(self, rows) -> None:
        self._landmarkRows = rows
        self._fillTable(
            self.ui.landmarksTable, [_("Landmark"), _("Before (mm)"), _("After (mm)")], [r[:3] for r in rows], wide=0
        )

    def _fillTable(self, table, titles: list[str], rows, *, wide: int) -> None:
        """Fills a table; ``wide`` is the column that takes the width that the others leave."""
        items = self._tableItems[table.name] = []  # Python's own references: the table does not hold them
        table.setRowCount(len(rows))
        table.setHorizontalHeaderLabels(titles)
        header = table.horizontalHeader()
        for column in range(len(titles)):
            mode = qt.QHeaderView.Stretch if column == wide else qt.QHeaderView.ResizeToContents
            header.setSectionResizeMode(column, mode)
        table.verticalHeader().setVisible(False)
        for i, row in enumerate(rows):
            for j, text in enumerate(row):
                items.append(qt.QTableWidgetItem(text))
                items[-1].setToolTip(text)
                table.setItem(i, j, items[-1])
        table.visible = bool(rows)
        table.resizeRowsToContents()

    @guarded
    def onLandmark(self, row: int, column: int) -> None:
        from DivRegNetModule import views

        views.jump_to(self._landmarkRows[row][3])

    def _showSequence(self, outcome) -> None:
        from DivRegNetModule import translated, verdict

        self._sequenceOutcome = self._undoable = outcome
        rows = []
        for frame in outcome.frames:
            if frame.verdict is None:
                rows.append((frame.index, _("FAILED"), "", frame.error))
            else:
                shown = verdict.word(frame.verdict), translated(frame.verdict.error)
                rows.append((frame.index, *shown, translated(frame.verdict.reasons[0])))
        titles = [_("Frame"), _("Verdict"), _("Expected error"), _("Reason")]
        self._fillTable(self.ui.sequenceTable, titles, rows, wide=3)
        self.ui.sequenceCollapsibleButton.collapsed = False
        failed = sum(frame.verdict is None for frame in outcome.frames)
        text = _("{n} frames were registered, {failed} failed.")
        self._say(text.format(n=len(outcome.frames) - failed, failed=failed), error=bool(failed))
        self._messageOfRun = True

    @guarded
    def onFrame(self, row: int, column: int) -> None:
        """Shows a frame, warped, in color over the fixed volume."""
        from DivRegNetModule import views
        from DivRegNetModule.comparison import OPACITY, TINT

        outcome, scene = self._sequenceOutcome, slicer.mrmlScene
        if outcome is None or not all(map(scene.IsNodePresent, (outcome.browser, outcome.warped, outcome.fixed))):
            return
        outcome.browser.SetSelectedItemNumber(row)
        frame = outcome.browser.GetProxyNode(outcome.warped)  # a volume, whose content follows the selected item
        if frame is not None:
            if frame.GetDisplayNode() is not None:
                frame.GetDisplayNode().SetAndObserveColorNodeID(TINT)
            views.show_layers(outcome.fixed, frame, OPACITY)

    def _forgetSequence(self) -> None:
        if self._undoable is self._sequenceOutcome:
            self._undoable = None
        self._sequenceOutcome = None
        self._fillTable(self.ui.sequenceTable, [], [], wide=0)

    def _forgetOutcome(self, *, restore: bool = True) -> None:
        """Takes the last result off the panel; ``restore`` puts the views back, too."""
        if self._task is not None:
            self._task.stop()
            self._task = None
        if self._undoable is self._outcome:
            self._undoable = None
        comparison, self._comparison, self._outcome = self._comparison, None, None
        if comparison is not None:
            (comparison.restore if restore else comparison.clear)()
        for button in self._toggles:
            blocked = button.blockSignals(True)
            button.setChecked(False)
            button.blockSignals(blocked)
        self._fillLandmarks([])
        self.ui.undoButton.enabled = self._undoable is not None and self._running is None
        self.ui.resultCollapsibleButton.visible = False

    @property
    def _toggles(self) -> tuple:
        ui = self.ui
        return (ui.beforeButton, ui.flickerButton, ui.checkerboardButton, ui.sideBySideButton, ui.gridButton)

    def _toggle(self, button, mode: str, on: bool) -> None:
        """Shows the result in a mode while its button is down; at most one is."""
        from DivRegNetModule.comparison import OVERLAY

        if self._comparison is None:
            return
        if on:
            for other in self._toggles[:-1]:
                if other is not button:
                    blocked = other.blockSignals(True)
                    other.setChecked(False)
                    other.blockSignals(blocked)
        self._comparison.show(mode if on else OVERLAY)

    @guarded
    def onBefore(self, on: bool) -> None:
        self._toggle(self.ui.beforeButton, "before", on)

    @guarded
    def onFlicker(self, on: bool) -> None:
        self._toggle(self.ui.flickerButton, "flicker", on)

    @guarded
    def onCheckerboard(self, on: bool) -> None:
        self._toggle(self.ui.checkerboardButton, "checkerboard", on)

    @guarded
    def onSideBySide(self, on: bool) -> None:
        self._toggle(self.ui.sideBySideButton, "side by side", on)

    @guarded
    def onGrid(self, on: bool) -> None:
        if self._comparison is not None:
            self._comparison.grid(on)

    @guarded
    def onRestoreViews(self, checked: bool = False) -> None:
        if self._comparison is not None:
            self._comparison.restore()
            for button in self._toggles:
                blocked = button.blockSignals(True)
                button.setChecked(False)
                button.blockSignals(blocked)

    @guarded
    def onDisplacementMap(self, checked: bool = False) -> None:
        from DivRegNetModule import maps

        self._addMap(maps.LENGTH)

    @guarded
    def onJacobianMap(self, checked: bool = False) -> None:
        from DivRegNetModule import maps

        self._addMap(maps.JACOBIAN)

    @guarded
    def onErrorMap(self, checked: bool = False) -> None:
        from DivRegNetModule import maps

        self._addMap(maps.ERROR)

    def _addMap(self, kind: str) -> None:
        from DivRegNetModule import maps, views
        from DivRegNetModule.comparison import OPACITY

        outcome = self._outcome

        def done(node) -> None:
            outcome.changes.added.append(node)  # Undo takes it back, too
            views.show_layers(outcome.fixed, node, OPACITY)

        of_transform = outcome.registration.transform_node, kind
        self._work(maps.error_map_steps(outcome) if kind == maps.ERROR else maps.map_steps(*of_transform), done)

    @guarded
    def onReport(self, checked: bool = False) -> None:
        from DivRegNetModule import report

        title, kinds = _("Save report"), _("Web page (*.html)")
        pair = f"{self._outcome.moving.GetName()} to {self._outcome.fixed.GetName()}"
        name = re.sub(r'[\\/:*?"<>|]', "_", pair) + ".html"
        path = qt.QFileDialog.getSaveFileName(self.parent, title, name, kinds)
        path = path[0] if isinstance(path, tuple) else path
        if path:
            self._work(
                report.report_steps(self._outcome, Path(path)),
                lambda written: self._say(_("The report was saved to {path}.").format(path=written)),
            )

    def _work(self, steps, done) -> None:
        """Does something about the result in steps; what goes wrong is said."""
        from DivRegNetModule.background import Task

        if self._task is not None:
            self._task.stop()
        self._task = Task(steps, done, self._fail)

    @guarded
    def onUndo(self, checked: bool = False) -> None:
        from DivRegNetModule.comparison import Comparison

        outcome, comparison = self._undoable, self._comparison
        if outcome is None:
            return
        if outcome is self._sequenceOutcome:
            self._forgetSequence()
        else:
            self._forgetOutcome(restore=comparison is not None)
        outcome.undo()
        if self._parameterNode is not None and self._parameterNode.transform is not None:
            Comparison.forget_saved(self._parameterNode.transform)  # it has its former content again
        self._say(_("The outputs of the last registration were removed."))
        self._messageOfRun = True
        self._refresh()


def stageName(stage: str) -> str:
    """A stage of DivRegNetLib.options.STAGES, or of DivRegNetModule.run, in words."""
    names = {
        "prepare": _("Preparing the volumes"),
        "check": _("Checking the images"),
        "align": _("Initial alignment"),
        "sample": _("Sampling"),
        "deform": _("Computing the deformation"),
        "refine": _("Refining"),
        "fields": _("Computing displacements in mm"),
        "outputs": _("Warping and measuring"),
        "receive": _("Reading the result"),
        "carry": _("Carrying nodes along"),
        "frame": _("Registering the frames"),
    }
    return names.get(stage, stage)


def progressFormat(stage: str) -> str:
    """The format of the progress bar in a stage; Qt puts the percentage in the place of ``%p``."""
    return _("{stage} (%p %)").format(stage=stageName(stage))


def timeText(seconds: float, fraction: float) -> str:
    """How long a run has taken, and, once that can be told, about how long it will still take."""
    if fraction < 0.1 or seconds < 2:
        return _("{elapsed:.0f} s elapsed").format(elapsed=seconds)
    left = seconds * (1 - fraction) / fraction
    return _("{elapsed:.0f} s elapsed, about {left:.0f} s left").format(elapsed=seconds, left=left)


class DivRegNetLogic(ScriptedLoadableModuleLogic):
    """Registration without a panel."""

    def getParameterNode(self) -> DivRegNetParameterNode:
        """The settings in the scene; where another version saved a value that this one does not know, the default."""
        node = super().getParameterNode()
        for name, kind in (
            ("alignment", Alignment),
            ("method", Method),
            ("effort", Effort),
            ("interpolation", Interpolation),
        ):
            value = node.GetParameter(name)
            if value and value not in kind.__members__:  # Slicer's wrapper raises at every access (EnumSerializer.read)
                text = _("DivRegNet: the scene has the unknown value {value} for {name}; the default is used.")
                logging.warning(text.format(value=repr(value), name=name))
                node.UnsetParameter(name)
        steps = node.GetParameter("refineSteps")
        if steps and steps.isdigit() and int(steps) > MOST_STEPS:  # version 0.1 allowed 1000
            node.SetParameter("refineSteps", str(MOST_STEPS))
        return DivRegNetParameterNode(node)

    def process(
        self,
        fixedVolume,
        movingVolume,
        *,
        warpedVolume=None,
        transform=None,
        inverse=None,
        alsoApplyTo=(),
        segmentations=(None, None),
        landmarks=(None, None),
        progress=None,
        **options,
    ):
        """Registers the moving to the fixed volume, in a process of its own, and waits for it.

        Args:
            fixedVolume, movingVolume: vtkMRMLScalarVolumeNode of the scene; their parent transforms count.
            warpedVolume, transform: nodes that take the outputs; None makes new ones.
            inverse: None: no inverse; True: a new node; or a node that takes it.
            alsoApplyTo: segmentations, markups, models, volumes that belong to the moving volume; copies are deformed.
            segmentations, landmarks: (fixed, moving) nodes to measure Dice and landmark error with.
            progress: called with stage and fraction (0 to 1); returning False cancels.
            options: of DivRegNetModule.mrml.images_from_nodes: fixed_mask, moving_mask, align, model, device, refine, ...
        Returns:
            DivRegNetModule.run.Outcome: ``registration.warped_node``, ``.transform_node``, ``.inverse_node``;
            ``carried``, the copies; ``quality``; ``undo()``.
        Raises:
            NotReady: PyTorch is not installed.
            InputError, ModelError, DeviceError, WorkerDied, Cancelled: the message says why; the scene is as it was.
        """
        from DivRegNetModule import first_use
        from DivRegNetModule.run import Request, Run

        from DivRegNetLib.errors import Cancelled

        request = Request(
            fixedVolume,
            movingVolume,
            warpedVolume,
            transform,
            inverse,
            list(alsoApplyTo),
            options,
            tuple(segmentations),
            tuple(landmarks),
        )
        run = Run(request)
        if missing := first_use.missing():
            text = _("Not installed: {names}. Open the module DivRegNet and press Register once to install it.")
            raise first_use.NotReady(text.format(names=", ".join(missing)))
        run.start()
        try:
            while run.running:
                for event in run.poll():
                    if event.kind == "progress" and progress and progress(event.stage, event.fraction) is False:
                        raise Cancelled(_("Cancelled. The scene is as it was."))
                time.sleep(0.005)
            return run.finish()
        finally:
            run.cancel()


class DivRegNetTest(ScriptedLoadableModuleTest):
    """Self-tests in a real Slicer, in any order. Those that compute are skipped where PyTorch or the model is not installed."""

    def setUp(self) -> None:
        slicer.mrmlScene.Clear()

    def runTest(self) -> None:
        """Runs all tests, also after one that failed; fails at the end if one did."""
        failed = []
        for name in sorted(n for n in dir(self) if n.startswith("test_")):
            self.setUp()
            self.delayDisplay(name)
            try:
                getattr(self, name)()
            except Exception as error:
                if type(error).__name__ == "SkipTest":
                    self.delayDisplay(f"{name}: skipped, {error}")
                    continue
                logging.exception(f"DivRegNet: {name}")
                failed.append(f"{name}: {type(error).__name__}: {error}")
        if failed:
            raise AssertionError("\n".join(failed))

    def load(self) -> list:
        from DivRegNetModule import samples

        return samples.load(MODULE_FOLDER)

    def openPanel(self):
        """The widget of the module, shown."""
        if slicer.util.mainWindow() is None:
            self.skipTest("there is no main window")
        slicer.util.selectModule("DivRegNet")
        return slicer.modules.divregnet.widgetRepresentation().self()

    def needTorch(self) -> None:
        from DivRegNetModule import first_use

        from DivRegNetLib.models import DEFAULT, card_files

        if missing := first_use.missing():
            self.skipTest(f"not installed: {', '.join(missing)}")
        if DEFAULT not in card_files():
            self.skipTest(f"model {DEFAULT} is not there")

    def wait(self, condition, seconds: float = 300.0) -> None:
        until = time.monotonic() + seconds
        while not condition() and time.monotonic() < until:
            slicer.app.processEvents()
            time.sleep(0.02)
        self.assertTrue(condition())

    def test_SampleDataIsInTheSampleDataModuleOnce(self) -> None:
        from DivRegNetModule import samples

        for _again in range(2):
            registerSampleData()
        names = [source.sampleName for source in slicer.modules.sampleDataSources[samples.CATEGORY]]
        self.assertEqual(names, list(samples.PAIRS))

    def test_SampleDataLoadsOffline(self) -> None:
        fixed, moving, *others = self.load()
        self.assertTrue(fixed.GetImageData() and moving.GetImageData())
        self.assertEqual(len(others), 4)

    def test_OpeningTheModuleDoesNotImportTorch(self) -> None:
        before = "torch" in sys.modules
        self.openPanel()
        self.assertEqual("torch" in sys.modules, before)

    def test_WithoutTorchRegisterSaysWhatIsMissing(self) -> None:
        from DivRegNetModule import first_use

        fixed, moving, *_others = self.load()
        nodes = slicer.mrmlScene.GetNumberOfNodes()
        there, ask = first_use.missing, first_use._ask
        first_use.missing = lambda: ["safetensors>=99"]

        def decline(question, declined):
            raise first_use.NotReady(declined)

        first_use._ask = decline  # no dialog, whether or not Slicer runs in testing mode
        try:
            with self.assertRaisesRegex(first_use.NotReady, "safetensors"):
                DivRegNetLogic().process(fixed, moving)
            self.assertEqual(slicer.mrmlScene.GetNumberOfNodes(), nodes)
            widget = self.openPanel()
            widget._parameterNode.fixedVolume, widget._parameterNode.movingVolume = fixed, moving
            widget.onRegister()
            self.assertIn("safetensors", widget.ui.messageLabel.text)
            self.assertTrue(widget.ui.registerButton.enabled)
        finally:
            first_use.missing, first_use._ask = there, ask

    def test_WrongInputsAreRefusedInWords(self) -> None:
        from DivRegNetLib.errors import InputError

        fixed, moving, *_others = self.load()
        for pair in ((None, moving), (fixed, None), (fixed, fixed)):
            with self.assertRaises(InputError):
                DivRegNetLogic().process(*pair)

    def test_LogicRegistersTheSamplePair(self) -> None:
        self.needTorch()
        fixed, moving, *others = self.load()
        segmentations = [n for n in others if n.IsA("vtkMRMLSegmentationNode")]
        landmarks = [n for n in others if n.IsA("vtkMRMLMarkupsNode")]
        outcome = DivRegNetLogic().process(
            fixed,
            moving,
            inverse=True,
            alsoApplyTo=[segmentations[1]],
            segmentations=segmentations,
            landmarks=landmarks,
        )
        self.assertEqual(
            outcome.registration.warped_node.GetImageData().GetDimensions(), fixed.GetImageData().GetDimensions()
        )
        self.assertGreater(outcome.quality["dice"]["after"], outcome.quality["dice"]["before"])
        self.assertLess(outcome.quality["landmark_error_mm"]["after"], outcome.quality["landmark_error_mm"]["before"])
        outcome.undo()
        self.assertFalse(slicer.mrmlScene.IsNodePresent(outcome.registration.warped_node))

    def test_WidgetRegistersTheSamplePairAndTakesItBack(self) -> None:
        self.needTorch()
        fixed, moving, *_others = self.load()
        widget = self.openPanel()
        widget._parameterNode.fixedVolume, widget._parameterNode.movingVolume = fixed, moving
        self.assertTrue(widget.ui.registerButton.enabled, widget.ui.registerButton.toolTip)
        before = slicer.mrmlScene.GetNumberOfNodes()
        widget.onRegister()
        self.wait(lambda: widget._run is None)
        self.assertIsNotNone(widget._outcome, widget.ui.messageLabel.text)
        for button in widget._toggles:
            button.setChecked(True)
            self.wait(lambda: not widget._comparison.busy)
            button.setChecked(False)
        widget.onUndo()
        self.assertEqual(slicer.mrmlScene.GetNumberOfNodes(), before)

    def test_CancelLeavesTheSceneAsItWas(self) -> None:
        self.needTorch()
        from DivRegNetLib.errors import Cancelled

        fixed, moving, *_others = self.load()
        nodes = slicer.mrmlScene.GetNumberOfNodes()
        with self.assertRaises(Cancelled):
            DivRegNetLogic().process(fixed, moving, progress=lambda stage, fraction: False)
        self.assertEqual(slicer.mrmlScene.GetNumberOfNodes(), nodes)
