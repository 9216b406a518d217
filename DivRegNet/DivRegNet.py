"""DivRegNet for 3D Slicer: the classes that Slicer looks for. The work is done by DivRegNetModule and DivRegNetLib."""

import enum
import importlib
import logging
import sys
import time
from pathlib import Path
from typing import Annotated, Union

import qt
import slicer
import vtk
from slicer import (
    vtkMRMLLabelMapVolumeNode,
    vtkMRMLMarkupsFiducialNode,
    vtkMRMLScalarVolumeNode,
    vtkMRMLSegmentationNode,
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
POLL_MS = 100
COARSER = 1.5  # times the spacing: memory divided by 3.4


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
        parent.title = "DivRegNet"
        parent.categories = [translate("qSlicerAbstractCoreModule", "Registration")]
        parent.dependencies = []
        parent.contributors = ["DivRegNet contributors"]
        parent.helpText = _(
            "Deformable registration of images of different kinds (T1-T2, PD-T2, CT-MR) and of the same kind, in seconds. "
            "Choose a fixed and a moving volume, press Register, and read the verdict before you use the result."
        )
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
    """Initial alignment; values as in DivRegNetLib.options.ALIGNMENTS, and a transform of the scene."""

    NONE = "none"
    CENTER = "center"
    RIGID = "rigid"
    AFFINE = "affine"
    TRANSFORM = "transform"

    def label(self) -> str:
        return {
            Alignment.NONE: _("None"),
            Alignment.CENTER: _("Centers"),
            Alignment.RIGID: _("Rigid"),
            Alignment.AFFINE: _("Affine"),
            Alignment.TRANSFORM: _("A transform of the scene"),
        }[self]


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


Mask = Union[vtkMRMLSegmentationNode, vtkMRMLLabelMapVolumeNode, None]  # noqa: UP007 -- Slicer 5.10 reads no other form


@parameterNodeWrapper
class DivRegNetParameterNode:
    """The settings, saved with the scene. Empty nodes mean: none, or a new one where it is an output.

    fixedSegment, movingSegment: id of the segment, where the mask is a segmentation.
    model, device: as in DivRegNetLib.options.Options; empty is the default.
    workingSpacing: mm; 0 is the model's.
    """

    fixedVolume: vtkMRMLScalarVolumeNode
    movingVolume: vtkMRMLScalarVolumeNode
    alignment: Alignment = Alignment.AFFINE
    initialTransform: vtkMRMLTransformNode
    fixedMask: Mask
    fixedSegment: str
    movingMask: Mask
    movingSegment: str
    model: str
    warpedVolume: vtkMRMLScalarVolumeNode
    transform: vtkMRMLTransformNode
    giveInverse: bool = False
    inverse: vtkMRMLTransformNode
    alsoApplyTo: list[vtkMRMLTransformableNode]
    device: str
    refineSteps: Annotated[int, WithinRange(0, 1000)] = 0
    workingSpacing: Annotated[float, WithinRange(0, 20)] = 0.0
    interpolation: Interpolation = Interpolation.LINEAR
    fillAutomatic: bool = True
    fillValue: Annotated[float, WithinRange(-100000, 100000)] = 0.0
    fixedSegmentation: vtkMRMLSegmentationNode
    movingSegmentation: vtkMRMLSegmentationNode
    fixedLandmarks: vtkMRMLMarkupsFiducialNode
    movingLandmarks: vtkMRMLMarkupsFiducialNode


class DivRegNetWidget(ScriptedLoadableModuleWidget, VTKObservationMixin):
    """The panel."""

    def __init__(self, parent=None) -> None:
        ScriptedLoadableModuleWidget.__init__(self, parent)
        VTKObservationMixin.__init__(self)
        self.logic = None
        self._parameterNode = None
        self._guiTags = []
        self._run = None
        self._outcome = None
        self._comparison = None

    def setup(self) -> None:
        from DivRegNetModule.connectors import connectors

        ScriptedLoadableModuleWidget.setup(self)
        panel = slicer.util.loadUI(self.resourcePath("UI/DivRegNet.ui"))
        self.layout.addWidget(panel)
        self.ui = slicer.util.childWidgetVariables(panel)
        panel.setMRMLScene(slicer.mrmlScene)
        self.logic = DivRegNetLogic()
        self._connectors = connectors(self.ui)

        self._timer = qt.QTimer()
        self._timer.setInterval(POLL_MS)
        self._timer.timeout.connect(self.onPoll)

        self.ui.registerButton.connect("clicked(bool)", self.onRegister)
        self.ui.cancelButton.connect("clicked(bool)", self.onCancel)
        self.ui.retryCoarserButton.connect("clicked(bool)", self.onRetryCoarser)
        self.ui.retryCpuButton.connect("clicked(bool)", self.onRetryCpu)
        self.ui.flickerButton.connect("toggled(bool)", self.onFlicker)
        self.ui.checkerboardButton.connect("toggled(bool)", self.onCheckerboard)
        self.ui.gridButton.connect("toggled(bool)", self.onGrid)
        self.ui.undoButton.connect("clicked(bool)", self.onUndo)

        scene = slicer.mrmlScene
        self.addObserver(scene, scene.StartCloseEvent, self.onSceneStartClose)
        self.addObserver(scene, scene.EndCloseEvent, self.onSceneEndClose)
        self.addObserver(scene, scene.NodeRemovedEvent, self.onNodeRemoved)
        self._forgetOutcome()
        self._offerChoices()
        self.initializeParameterNode()

    def cleanup(self) -> None:
        """The module is unloaded or the application closes: ends the run and removes all observers."""
        self._stop()
        self._forgetOutcome()
        self.setParameterNode(None)
        self.removeObservers()

    def enter(self) -> None:
        self._offerChoices()
        self.initializeParameterNode()

    def exit(self) -> None:
        """Another module is opened: a run continues, but the panel no longer follows the parameters."""
        self.ui.flickerButton.setChecked(False)
        self._disconnectParameterNode()

    def onSceneStartClose(self, caller, event) -> None:
        self._stop()
        self._forgetOutcome()
        self._say("")
        self.setParameterNode(None)

    def onSceneEndClose(self, caller, event) -> None:
        if self.parent.isEntered:
            self.initializeParameterNode()

    @vtk.calldata_type(vtk.VTK_OBJECT)
    def onNodeRemoved(self, caller, event, node) -> None:
        if self._run is not None and self._run.request.needs(node):
            self._stop()
            text = _("'{name}' was deleted, so the registration was stopped. Nothing else was changed.")
            self._say(text.format(name=node.GetName()), error=True)
        elif self._comparison is not None and self._comparison.needs(node):
            self._forgetOutcome()

    # --- parameters

    def initializeParameterNode(self) -> None:
        """Follows the parameter node of the scene, and chooses the first two volumes if none are chosen."""
        self.setParameterNode(self.logic.getParameterNode())
        p = self._parameterNode
        if not p.fixedVolume and not p.movingVolume:
            nodes = slicer.util.getNodesByClass("vtkMRMLScalarVolumeNode")
            volumes = [node for node in nodes if node.GetClassName() == "vtkMRMLScalarVolumeNode"]
            if len(volumes) >= 2:
                p.fixedVolume, p.movingVolume = volumes[:2]

    def setParameterNode(self, parameterNode: "DivRegNetParameterNode | None") -> None:
        self._disconnectParameterNode()
        self._parameterNode = parameterNode
        if parameterNode:
            self._guiTags = [
                parameterNode.connectGui(self.ui),
                parameterNode.connectParametersToGui(self._connectors),
            ]
            self.addObserver(parameterNode, vtk.vtkCommand.ModifiedEvent, self._refresh)
        self._refresh()

    def _disconnectParameterNode(self) -> None:
        if self._parameterNode:
            for tag in self._guiTags:
                self._parameterNode.disconnectGui(tag)
            self._guiTags = []
            if self.hasObserver(self._parameterNode, vtk.vtkCommand.ModifiedEvent, self._refresh):
                self.removeObserver(self._parameterNode, vtk.vtkCommand.ModifiedEvent, self._refresh)

    def _offerChoices(self) -> None:
        """Offers the models and devices that are available now."""
        from DivRegNetModule import devices, inputs

        from DivRegNetLib.models import DEFAULT

        models = inputs.models()
        self._connectors["model"].offer(models or [(_("{name} (not found)").format(name=DEFAULT), DEFAULT)])
        self._connectors["device"].offer(devices.devices())

    def _refresh(self, caller=None, event=None) -> None:
        """Updates the panel after any change of the parameters or of the run."""
        from DivRegNetModule import inputs

        p, running = self._parameterNode, self._run is not None
        reason = inputs.why_not(p)
        self.ui.registerButton.enabled = not running and not reason
        self.ui.registerButton.toolTip = reason or _("Registers the moving volume to the fixed volume.")
        self.ui.cancelButton.enabled = running
        self.ui.progressBar.visible = running
        if p is None:
            return
        self.ui.initialTransformSelector.enabled = p.alignment == Alignment.TRANSFORM
        self.ui.inverseSelector.enabled = p.giveInverse
        self.ui.fillSpinBox.enabled = not p.fillAutomatic
        for connector, combo, node in (
            ("fixedSegment", self.ui.fixedSegmentComboBox, p.fixedMask),
            ("movingSegment", self.ui.movingSegmentComboBox, p.movingMask),
        ):
            self._offerSegments(connector, combo, node)
        self._describe()

    def _offerSegments(self, parameter: str, combo, node) -> None:
        """Offers the segments of a mask that is a segmentation, and chooses the first if none of them is chosen."""
        from DivRegNetModule import mrml

        segments = mrml.segments(node)
        combo.visible = combo.enabled = bool(segments)
        ids = [segment for _name, segment in segments]
        chosen = self._parameterNode.getValue(parameter)
        if ids and chosen not in ids:
            self._parameterNode.setValue(parameter, ids[0])  # comes back here
            return
        if not ids and chosen:
            self._parameterNode.setValue(parameter, "")
            return
        self._connectors[parameter].offer(segments)

    def _describe(self) -> None:
        """Shows the model's card, how the volumes differ from it, and the memory."""
        from DivRegNetModule import fit, inputs
        from DivRegNetModule.mrml.geometry import local_grid

        from DivRegNetLib.registration import memory

        p = self._parameterNode
        self.ui.cardLabel.text, self.ui.cardLabel.toolTip = inputs.card_lines(p.model)
        card = inputs.card(p.model)
        complaints, needed = [], _("Choose two volumes first.")
        if card and not inputs.why_not(p):
            complaints = fit.complaints(card, inputs.facts(p.fixedVolume), inputs.facts(p.movingVolume))
            grids = (local_grid(volume) for volume in (p.fixedVolume, p.movingVolume))
            estimate = memory.estimate(card, *grids, spacing=p.workingSpacing or None, refine=p.refineSteps)
            needed = _("About {device} on the device and {host} in main memory ({size} voxels)").format(
                device=memory.text(estimate.device),
                host=memory.text(estimate.host),
                size=" x ".join(map(str, estimate.working)),
            )
        self.ui.fitLabel.text = "\n".join(complaints)
        self.ui.fitLabel.visible = bool(complaints)
        self.ui.memoryLabel.text = needed

    # --- the run

    def onRegister(self, checked: bool = False) -> None:
        from DivRegNetModule import first_use, inputs
        from DivRegNetModule.run import Run

        from DivRegNetLib.errors import DivRegNetError

        if self._run is not None:
            return
        self._say("")
        try:
            first_use.ensure()
            run = Run(inputs.request(self._parameterNode))
            run.start()
        except (DivRegNetError, first_use.NotReady) as error:
            self._say(str(error), error=True)
            return
        self._run = run
        self.ui.progressBar.setValue(0)
        self.ui.progressBar.setFormat(_("Starting"))
        self._timer.start()
        self._refresh()

    def onPoll(self) -> None:
        """Called by a timer while a registration runs."""
        from DivRegNetLib.errors import DivRegNetError

        run = self._run
        if run is None:
            self._timer.stop()
            return
        for event in run.poll():
            if event.kind == "progress":
                self.ui.progressBar.setValue(round(1000 * event.fraction))
                self.ui.progressBar.setFormat(stageName(event.stage))
        if run.running:
            return
        self._timer.stop()
        self._run = None  # before nodes come and go
        try:
            outcome = run.finish()
        except DivRegNetError as error:
            self._fail(error)
        except Exception as error:
            logging.exception("DivRegNet")
            self._fail(error)
        else:
            self._show(outcome)
        self._refresh()

    def onCancel(self, checked: bool = False) -> None:
        if self._run is not None:
            self._stop()
            self._say(_("Cancelled. The scene is as it was."))

    def onRetryCoarser(self, checked: bool = False) -> None:
        from DivRegNetModule import inputs

        p = self._parameterNode
        card, volumes = inputs.card(p.model), [inputs.facts(v) for v in (p.fixedVolume, p.movingVolume)]
        spacing = p.workingSpacing or (card.working_spacing(*volumes) if card else 2.0)
        p.workingSpacing = min(round(spacing * COARSER, 1), 20.0)
        self.onRegister()

    def onRetryCpu(self, checked: bool = False) -> None:
        self._parameterNode.device = "cpu"
        self.onRegister()

    def _stop(self) -> None:
        """Ends a running registration; the scene was not touched."""
        self._timer.stop()
        run, self._run = self._run, None
        if run is not None:
            run.cancel()
        self._refresh()

    def _fail(self, error: Exception) -> None:
        from DivRegNetLib.errors import Cancelled, DeviceError
        from DivRegNetLib.run.worker import WorkerDied

        if isinstance(error, Cancelled):
            self._say(_("Cancelled. The scene is as it was."))
            return
        retry = isinstance(error, (DeviceError, WorkerDied))
        self._say(str(error), error=True, retry=retry)
        if not self.parent.isEntered:
            slicer.util.errorDisplay(_("DivRegNet: the registration failed.\n\n{error}").format(error=error))

    def _say(self, text: str, *, error: bool = False, retry: bool = False) -> None:
        """A message below the buttons; ``retry`` offers a coarser resolution and the CPU."""
        text = text[:1].upper() + text[1:]  # the library's sentences start small
        if error:
            logging.error(f"DivRegNet: {text}")
        self.ui.messageLabel.text = text
        self.ui.messageLabel.visible = bool(text)
        self.ui.messageLabel.setStyleSheet("color: #c62828" if error else "")
        self.ui.retryCoarserButton.visible = retry
        self.ui.retryCpuButton.visible = (
            retry and self._parameterNode is not None and self._parameterNode.device != "cpu"
        )

    # --- the result

    def _show(self, outcome) -> None:
        from DivRegNetModule import verdict
        from DivRegNetModule.comparison import Comparison

        from DivRegNetLib.quality.verdict import judge

        self._forgetOutcome()
        self._outcome = outcome
        registration = outcome.registration
        self._comparison = Comparison(outcome.fixed, registration.warped_node, registration.transform_node)
        self._comparison.blend()
        self.ui.verdictLabel.text = verdict.as_html(judge(outcome.quality))
        device = registration.result.settings.get("device", "")
        self.ui.qualityLabel.text = verdict.table(verdict.rows(outcome.quality, outcome.seconds, device))
        self.ui.resultCollapsibleButton.visible = True
        self.ui.resultCollapsibleButton.collapsed = False
        self._say("\n".join(outcome.notes))
        slicer.util.showStatusMessage(_("DivRegNet: done in {s:.1f} s").format(s=outcome.seconds), 5000)

    def _forgetOutcome(self) -> None:
        comparison, self._comparison, self._outcome = self._comparison, None, None
        if comparison is not None:
            comparison.clear()
        for button in (self.ui.flickerButton, self.ui.checkerboardButton, self.ui.gridButton):
            button.setChecked(False)
        self.ui.resultCollapsibleButton.visible = False

    def onFlicker(self, on: bool) -> None:
        if self._comparison is not None:
            if on:
                self.ui.checkerboardButton.setChecked(False)
            self._comparison.flicker(on)

    def onCheckerboard(self, on: bool) -> None:
        if self._comparison is not None:
            if on:
                self.ui.flickerButton.setChecked(False)
            self._comparison.checkerboard(on)

    def onGrid(self, on: bool) -> None:
        if self._comparison is not None:
            self._comparison.grid(on)

    def onUndo(self, checked: bool = False) -> None:
        outcome, comparison = self._outcome, self._comparison
        if outcome is None:
            return
        self._forgetOutcome()
        comparison.restore()
        outcome.undo()
        self._say(_("The outputs of the last registration were removed."))


def stageName(stage: str) -> str:
    """A stage of DivRegNetLib.options.STAGES as a progress text."""
    names = {
        "check": _("Checking the images"),
        "align": _("Initial alignment"),
        "sample": _("Sampling"),
        "deform": _("Computing the deformation"),
        "refine": _("Refining"),
        "fields": _("Computing displacements in mm"),
        "outputs": _("Warping and measuring"),
    }
    return names.get(stage, stage) + " (%p %)"


class DivRegNetLogic(ScriptedLoadableModuleLogic):
    """Registration without a panel."""

    def getParameterNode(self) -> DivRegNetParameterNode:
        return DivRegNetParameterNode(super().getParameterNode())

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
                time.sleep(0.02)
            return run.finish()
        finally:
            run.cancel()


class DivRegNetTest(ScriptedLoadableModuleTest):
    """Self-tests in a real Slicer. Those that compute are skipped where PyTorch or the model is not installed."""

    def setUp(self) -> None:
        slicer.mrmlScene.Clear()

    def runTest(self) -> None:
        for name in sorted(n for n in dir(self) if n.startswith("test_")):
            self.setUp()
            self.delayDisplay(name)
            try:
                getattr(self, name)()
            except Exception as error:
                if type(error).__name__ != "SkipTest":
                    raise
                self.delayDisplay(f"{name}: skipped, {error}")

    def load(self) -> list:
        from DivRegNetModule import samples

        return samples.load(MODULE_FOLDER)

    def needTorch(self) -> None:
        from DivRegNetModule import first_use

        from DivRegNetLib.models import DEFAULT, card_files

        if missing := first_use.missing():
            self.skipTest(f"not installed: {', '.join(missing)}")
        if DEFAULT not in card_files():
            self.skipTest(f"model {DEFAULT} is not there")

    def test_SampleDataIsInTheSampleDataModule(self) -> None:
        import SampleData
        from DivRegNetModule import samples

        registerSampleData()
        names = [source.sampleName for source in slicer.modules.sampleDataSources[samples.CATEGORY]]
        self.assertEqual(names, list(samples.PAIRS))
        self.assertTrue(SampleData.SampleDataLogic.sampleDataSourcesByCategory(samples.CATEGORY))

    def test_SampleDataLoadsOffline(self) -> None:
        fixed, moving, *others = self.load()
        self.assertTrue(fixed.GetImageData() and moving.GetImageData())
        self.assertEqual(len(others), 4)

    def test_OpeningTheModuleDoesNotImportTorch(self) -> None:
        before = "torch" in sys.modules
        slicer.util.selectModule("DivRegNet")
        self.assertEqual("torch" in sys.modules, before)

    def test_WithoutTorchRegisterSaysWhatIsMissing(self) -> None:
        from DivRegNetModule import first_use

        fixed, moving, *_others = self.load()
        nodes = slicer.mrmlScene.GetNumberOfNodes()
        there, first_use.missing = first_use.missing, lambda: ["torch>=2.5"]
        try:
            with self.assertRaisesRegex(first_use.NotReady, "torch"):
                DivRegNetLogic().process(fixed, moving)
            slicer.util.selectModule("DivRegNet")
            widget = slicer.modules.divregnet.widgetRepresentation().self()
            widget._parameterNode.fixedVolume, widget._parameterNode.movingVolume = fixed, moving
            widget.onRegister()
            self.assertIn("torch", widget.ui.messageLabel.text)
            self.assertTrue(widget.ui.registerButton.enabled)
        finally:
            first_use.missing = there
        self.assertGreaterEqual(nodes + 1, slicer.mrmlScene.GetNumberOfNodes())  # at most the parameter node

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
        slicer.util.selectModule("DivRegNet")
        widget = slicer.modules.divregnet.widgetRepresentation().self()
        widget._parameterNode.fixedVolume, widget._parameterNode.movingVolume = fixed, moving
        self.assertTrue(widget.ui.registerButton.enabled)
        widget.onRegister()
        until = time.monotonic() + 300
        while widget._run is not None and time.monotonic() < until:
            slicer.app.processEvents()
            time.sleep(0.05)
        self.assertIsNotNone(widget._outcome, widget.ui.messageLabel.text)
        for button in (widget.ui.checkerboardButton, widget.ui.flickerButton, widget.ui.gridButton):
            button.setChecked(True)
            slicer.app.processEvents()
            button.setChecked(False)
        widget.onUndo()
        self.assertEqual(len(slicer.util.getNodesByClass("vtkMRMLScalarVolumeNode")), 2)

    def test_CancelLeavesTheSceneAsItWas(self) -> None:
        self.needTorch()
        from DivRegNetLib.errors import Cancelled

        fixed, moving, *_others = self.load()
        nodes = slicer.mrmlScene.GetNumberOfNodes()
        with self.assertRaises(Cancelled):
            DivRegNetLogic().process(fixed, moving, progress=lambda stage, fraction: False)
        self.assertEqual(slicer.mrmlScene.GetNumberOfNodes(), nodes)
