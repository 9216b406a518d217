"""Goes through the module in a real 3D Slicer, with its windows, and prints a table of what happened.

From a checkout, with one command:

    Slicer --additional-module-paths DivRegNet --python-script Testing/slicer/run_in_slicer.py

With ``--keep-open`` after a further ``--``, Slicer stays open. Nothing of this is saved, but for a scene in a temporary
folder. PyTorch must be installed (press Register once, and agree). The exit code is 1 if a step failed.

Each step is a function below; it returns a remark for the table, or raises. While a step runs, a timer that fires every 10 ms
measures for how long the window did not answer. Drawing counts there too, so that this is more than the module's own slots.
"""

import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import qt
import slicer
import slicer.util

WAIT_SECONDS = 600.0
NARROWEST = 400  # px
LONGEST_BLOCK = 1.0  # seconds, drawing and this script's own work included


class Heartbeat:
    """The longest time for which the window's timers were not served."""

    def __init__(self) -> None:
        self.longest, self._last = 0.0, time.monotonic()
        self._timer = qt.QTimer()
        self._timer.setInterval(10)
        self._timer.timeout.connect(self._beat)
        self._timer.start()

    def _beat(self) -> None:
        now = time.monotonic()
        self.longest, self._last = max(self.longest, now - self._last), now

    def restart(self) -> None:
        self.longest, self._last = 0.0, time.monotonic()

    def stop(self) -> None:
        self._timer.stop()


class Walk:
    """The steps, in the order of their definition. They share the widget and the sample data."""

    spacing = 0.0  # mm of the working grid; 0: the model's

    def __init__(self, folder: Path, heartbeat: Heartbeat) -> None:
        self.folder, self.heartbeat = folder, heartbeat
        self.widget = None
        self.data: list = []

    # --- help

    def wait(self, condition, what: str) -> None:
        until = time.monotonic() + WAIT_SECONDS
        while not condition():
            if time.monotonic() > until:
                raise TimeoutError(f"{what} did not come within {WAIT_SECONDS:g} s")
            slicer.app.processEvents()
            time.sleep(0.005)

    def pause(self) -> None:
        """Lets the views take the sizes of a new layout."""
        until = time.monotonic() + 0.5
        self.wait(lambda: time.monotonic() > until, "the new layout")

    def load(self) -> None:
        """A new scene with the sample pair, chosen in the panel."""
        from DivRegNetModule import samples

        slicer.mrmlScene.Clear()
        slicer.app.processEvents()
        self.data = samples.load(Path(slicer.modules.divregnet.path).parent)
        p = self.widget._parameterNode
        p.fixedVolume, p.movingVolume = self.data[:2]
        p.device, p.workingSpacing = "cpu", self.spacing

    def register(self) -> None:
        assert self.widget.ui.registerButton.enabled, self.widget.ui.registerButton.toolTip
        self.heartbeat.restart()
        self.widget.ui.registerButton.click()
        self.wait(lambda: self.widget._running is None, "the end of the registration")
        assert self.widget._outcome is not None, self.widget.ui.messageLabel.text

    def of_kind(self, kind: str) -> list:
        return [node for node in self.data if node.IsA(kind)]

    @property
    def composites(self) -> list:
        return slicer.util.getNodesByClass("vtkMRMLSliceCompositeNode")

    # --- steps

    def open_the_panel(self) -> str:
        before = "torch" in sys.modules
        slicer.util.selectModule("DivRegNet")
        self.widget = slicer.modules.divregnet.widgetRepresentation().self()
        slicer.app.processEvents()
        assert ("torch" in sys.modules) == before, "opening the panel has imported torch"
        from DivRegNetModule import first_use

        missing = first_use.missing()
        assert not missing, f"not installed: {', '.join(missing)}; press Register once and agree"
        return f"Slicer {slicer.app.applicationVersion}"

    def panel_is_narrow(self) -> str:
        hint = self.widget.parent.minimumSizeHint  # a property in PythonQt, a method elsewhere
        width = (hint() if callable(hint) else hint).width()
        assert width <= NARROWEST, f"{width} px"
        return f"{width} px"

    def sample_data(self) -> str:
        import SampleData
        from DivRegNetModule import samples

        sources = slicer.modules.sampleDataSources[samples.CATEGORY]
        assert len(sources) == len(samples.PAIRS), f"{len(sources)} entries"
        assert SampleData is not None
        self.load()
        return f"{len(self.data)} nodes"

    def register_and_look(self) -> str:
        self.load()
        self.register()
        outcome = self.widget._outcome
        for button in self.widget._toggles:
            button.click()
            self.wait(lambda: not self.widget._comparison.busy, "the comparison")
            slicer.app.processEvents()
            button.click()
        level = self.widget.ui.verdictLabel.text
        color = next(word for word in ("GREEN", "AMBER", "RED") if word in level)
        return f"{color}, NMI {outcome.quality['nmi']['before']:.3f} to {outcome.quality['nmi']['after']:.3f}"

    def result_is_in_sight(self) -> str:
        label = self.widget.ui.verdictLabel
        assert label.visible and not label.visibleRegion().isEmpty(), "the verdict is below the fold"
        return ""

    def slices_lie_along_the_fixed_volume(self) -> str:
        import vtk

        matrix = vtk.vtkMatrix4x4()
        self.data[0].GetIJKToRASDirectionMatrix(matrix)
        axes = slicer.util.arrayFromVTKMatrix(matrix)[:3, :3]
        for view in slicer.util.getNodesByClass("vtkMRMLSliceNode"):
            normal = slicer.util.arrayFromVTKMatrix(view.GetSliceToRAS())[:3, 2]
            assert np.abs(axes.T @ normal).max() > 0.999, view.GetLayoutName()
        return ""

    def views_side_by_side_have_the_same_field_of_view(self) -> str:
        button = self.widget.ui.sideBySideButton
        button.click()
        self.pause()
        names = ("Red", "Yellow")
        views = [v for v in slicer.util.getNodesByClass("vtkMRMLSliceNode") if v.GetLayoutName() in names]
        fields = [view.GetFieldOfView()[:2] for view in views]
        button.click()
        self.pause()
        assert np.allclose(*fields, rtol=0.02), fields
        return " x ".join(f"{mm:.0f}" for mm in fields[0]) + " mm"

    def maps(self) -> str:
        for button in (
            self.widget.ui.displacementMapButton,
            self.widget.ui.jacobianMapButton,
            self.widget.ui.errorMapButton,
        ):
            button.click()
            self.wait(lambda: not self.widget._task.running, "the map")
        slicer.app.processEvents()
        return ""

    def undo(self) -> str:
        names = {node.GetName() for node in self.data}
        self.widget.ui.undoButton.click()
        slicer.app.processEvents()
        left = [n for n in slicer.util.getNodesByClass("vtkMRMLVolumeNode") if n.GetName() not in names]
        left += [n for n in slicer.util.getNodesByClass("vtkMRMLTransformNode") if not n.GetHideFromEditors()]
        colors = [n for n in slicer.util.getNodesByClass("vtkMRMLProceduralColorNode") if "Displacement" in n.GetName()]
        assert not left + colors, [n.GetName() for n in left + colors]
        return ""

    def cancel(self) -> str:
        before = slicer.mrmlScene.GetNumberOfNodes()
        self.widget.ui.registerButton.click()
        self.wait(lambda: self.widget._run is None or self.widget._run.pid is not None, "the worker")
        started = time.monotonic()
        self.widget.ui.cancelButton.click()
        seconds = time.monotonic() - started
        assert self.widget._run is None and slicer.mrmlScene.GetNumberOfNodes() == before
        return f"{seconds:.2f} s"

    def segmentation_scores_and_landmarks(self) -> str:
        self.load()
        p = self.widget._parameterNode
        p.fixedSegmentation, p.movingSegmentation = self.of_kind("vtkMRMLSegmentationNode")
        p.fixedLandmarks, p.movingLandmarks = self.of_kind("vtkMRMLMarkupsNode")
        p.alsoApplyTo = [p.movingSegmentation, p.movingLandmarks]
        self.register()
        quality, outcome = self.widget._outcome.quality, self.widget._outcome
        assert quality["dice"]["after"] > quality["dice"]["before"]
        for copy, source in zip(outcome.carried, (p.movingSegmentation, p.movingLandmarks), strict=True):
            assert copy.GetNumberOfDisplayNodes() == 1, copy.GetName()
            assert copy.GetDisplayNode().GetVisibility() == source.GetDisplayNode().GetVisibility(), copy.GetName()
        rows = self.widget.ui.landmarksTable.rowCount
        assert rows == len(quality["landmarks"]) > 0
        self.widget.onLandmark(0, 0)
        count = len(quality["segments"])
        return f"{count} segments, Dice {quality['dice']['after']:.3f}, error {quality['landmark_error_mm']['after']:.2f} mm"

    def register_again_overwrites(self) -> str:
        names = sorted(n.GetName() for n in slicer.util.getNodesByClass("vtkMRMLTransformableNode"))
        self.register()
        again = sorted(n.GetName() for n in slicer.util.getNodesByClass("vtkMRMLTransformableNode"))
        assert names == again, set(again) - set(names)
        return ""

    def save_while_comparing_and_reopen(self) -> str:
        self.widget._parameterNode.refineSteps = 3
        before = self.parameters()
        self.widget.ui.checkerboardButton.click()
        self.wait(lambda: not self.widget._comparison.busy, "the checkerboard")
        self.widget.ui.gridButton.click()
        slicer.app.processEvents()
        file = str(self.folder / "scene.mrb")
        assert slicer.util.saveScene(file)
        slicer.mrmlScene.Clear()
        slicer.app.processEvents()
        slicer.util.loadScene(file)
        slicer.app.processEvents()
        after = self.parameters()
        assert after == before, {k: (before[k], after[k]) for k in before if before[k] != after[k]}
        for view in self.composites:
            volume = slicer.mrmlScene.GetNodeByID(view.GetBackgroundVolumeID() or "")
            assert volume is not None, f"{view.GetLayoutName()} is black"
            over = slicer.mrmlScene.GetNodeByID(view.GetForegroundVolumeID() or "")
            assert over is not None, f"{view.GetLayoutName()} shows the fixed volume alone"
        assert not any(n.GetVisibility() for n in slicer.util.getNodesByClass("vtkMRMLTransformDisplayNode")), (
            "the grid is on"
        )
        assert self.widget.ui.verdictLabel.visible, "the verdict has not come back with the scene"
        assert not self.widget.ui.undoButton.enabled
        self.widget._parameterNode.refineSteps = 0
        return ""

    def parameters(self) -> dict:
        from DivRegNetModule import inputs

        p = self.widget._parameterNode
        names = {name: getattr(p.getValue(name), "GetName", lambda: None)() for name in inputs.NODES}
        return names | {"also": sorted(n.GetName() for n in p.alsoApplyTo if n), "refine": p.refineSteps}

    def report(self) -> str:
        from DivRegNetModule import report
        from DivRegNetModule.steps import finish

        self.load()
        self.register()
        file = finish(report.report_steps(self.widget._outcome, self.folder / "report.html"))
        return f"{file.stat().st_size / 1e3:.0f} kB"

    def close_during_a_run(self) -> str:
        self.widget.ui.registerButton.click()
        self.wait(lambda: self.widget._run is None or self.widget._run.pid is not None, "the worker")
        slicer.mrmlScene.Clear()
        slicer.app.processEvents()
        assert self.widget._run is None and "closed" in self.widget.ui.messageLabel.text
        return ""

    def another_module_keeps_its_views(self) -> str:
        self.load()
        self.widget.ui.registerButton.click()
        slicer.util.selectModule("Data")
        slicer.app.processEvents()
        before = [(v.GetBackgroundVolumeID(), v.GetForegroundVolumeID()) for v in self.composites]
        self.wait(lambda: self.widget._running is None, "the end of the registration")
        after = [(v.GetBackgroundVolumeID(), v.GetForegroundVolumeID()) for v in self.composites]
        slicer.util.selectModule("DivRegNet")
        slicer.app.processEvents()
        assert before == after
        return ""

    def sequence(self) -> str:
        self.load()
        moving = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSequenceNode", "frames")
        for i in range(2):
            moving.SetDataNodeAtValue(self.data[1], str(i))
        self.widget._parameterNode.movingSequence = moving
        self.heartbeat.restart()
        self.widget.ui.registerSequenceButton.click()
        self.wait(lambda: self.widget._running is None, "the end of the sequence")
        outcome = self.widget._sequenceOutcome
        assert outcome is not None, self.widget.ui.messageLabel.text
        assert outcome.warped.GetNumberOfDataNodes() == 2
        self.widget.onFrame(1, 0)
        slicer.app.processEvents()
        frame = outcome.browser.GetProxyNode(outcome.warped)
        assert all(view.GetForegroundVolumeID() == frame.GetID() for view in self.composites)
        self.widget.ui.undoButton.click()
        assert not slicer.mrmlScene.IsNodePresent(outcome.warped)
        return ", ".join(frame.verdict.level for frame in outcome.frames)

    def self_tests(self) -> str:
        import unittest

        module = sys.modules[type(self.widget).__module__]
        result = unittest.TestResult()
        unittest.defaultTestLoader.loadTestsFromTestCase(module.DivRegNetTest).run(result)
        problems = [text for _test, text in result.errors + result.failures]
        assert not problems, problems[0]
        return f"{result.testsRun} run, {len(result.skipped)} skipped"


def steps() -> list[str]:
    """The names of the steps."""
    help_ = {"spacing", "wait", "pause", "load", "register", "of_kind", "composites", "parameters"}
    return [name for name in vars(Walk) if not name.startswith("_") and name not in help_]


def main() -> int:
    """Walks, prints the table, and returns the exit code."""
    heartbeat, rows = Heartbeat(), []
    with tempfile.TemporaryDirectory() as folder:
        walk = Walk(Path(folder), heartbeat)
        for name in steps():
            heartbeat.restart()
            started = time.monotonic()
            try:
                remark, state = getattr(walk, name)(), "ok"
            except Exception as error:
                traceback.print_exc()
                remark, state = f"{type(error).__name__}: {error}".splitlines()[0], "FAILED"
            slicer.app.processEvents()
            rows.append((name.replace("_", " "), state, time.monotonic() - started, heartbeat.longest, remark))
    heartbeat.stop()
    print(f"\n{'step':40}{'':8}{'seconds':>9}{'blocked':>9}  remark")
    for name, state, seconds, blocked, remark in rows:
        slow = " (long)" if blocked > LONGEST_BLOCK else ""
        print(f"{name:40}{state:8}{seconds:9.1f}{blocked:9.2f}  {remark}{slow}")
    failed = [row for row in rows if row[1] != "ok"]
    print(f"\n{len(rows) - len(failed)} of {len(rows)} steps passed")
    return int(bool(failed))


if __name__ == "__main__":
    code = main()
    if "--keep-open" not in sys.argv:
        slicer.util.exit(code)
