"""Puts the stand-in in place and takes it away again."""

import ctypes
import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import slicer
import slicer.util
import vtk

VIEW_SIZE, BESIDE_SIZE = (420, 330), (420, 700)  # px, of a slice view in the usual layout, and of two side by side
SLICER_PYTHON = "DIVREGNET_SLICER_PYTHON"


class Application:
    """``slicer.app``, as far as it is used; ``shown`` collects what message boxes would have said, ``answers`` are given.

    answers: what the next confirmations return; True where there are none left.
    """

    applicationName, applicationVersion = "Slicer", "stand-in"

    def __init__(self) -> None:
        self.testing = False
        self.shown: list[str] = []
        self.answers: list[bool] = []
        self.connections: dict[str, list] = {}
        self.views: LayoutManager | None = None
        self.window: object | None = Window()

    def testingEnabled(self) -> bool:
        return self.testing

    def connect(self, signal: str, slot) -> None:
        self.connections.setdefault(signal, []).append(slot)

    def disconnect(self, signal: str, slot) -> None:
        self.connections[signal].remove(slot)

    def moduleManager(self) -> "Application":
        return self

    def layoutManager(self) -> "LayoutManager | None":
        return self.views

    def clipboard(self):
        return self.qt.clipboard()

    def topLevelWidgets(self) -> list:
        return []

    def translate(self, context: str, text: str) -> str:
        return text

    def processEvents(self) -> None:
        from PySide6.QtWidgets import QApplication

        QApplication.processEvents()

    def select_module(self, name: str) -> None:
        """``slicer.util.selectModule``: leaves the module DivRegNet, or enters it."""
        widget = slicer.modules.divregnet.widgetRepresentation().self()
        widget.parent.isEntered = name == "DivRegNet"
        (widget.enter if widget.parent.isEntered else widget.exit)()

    def confirm(self, text: str, *_args, **_kwargs) -> bool:
        """In testing mode there is no dialog, and the answer is yes (Base/Python/slicer/util.py, _messageDisplay)."""
        if self.testing:
            return True
        self.shown.append(text)
        return self.answers.pop(0) if self.answers else True

    def display(self, text: str, *_args, **_kwargs) -> None:
        """In testing mode there is no dialog."""
        if not self.testing:
            self.shown.append(text)


class Window:
    """The main window: a status bar."""

    def statusBar(self) -> "Window":
        return self

    def showMessage(self, text: str, duration: int = 0) -> None:
        pass


class LayoutManager:
    """``slicer.app.layoutManager()``: Slicer's own slice nodes and slice logics, which nothing draws.

    A change of the layout resizes the views when Qt's events are processed, not before (qMRMLSliceWidget.cxx,
    setSliceViewSize, which is connected to the signal of the view's resize event).
    """

    NAMES = ("Red", "Green", "Yellow")

    def __init__(self, scene) -> None:
        self.layout = slicer.vtkMRMLLayoutNode.SlicerLayoutFourUpView
        self._logics, self._collection = [], vtk.vtkCollection()
        for name in self.NAMES:
            logic = slicer.vtkMRMLSliceLogic()
            logic.SetMRMLScene(scene)
            logic.AddSliceNode(name)
            self._logics.append(logic)
            self._collection.AddItem(logic)
        self._resize()

    def setLayout(self, layout: int) -> None:
        from PySide6.QtCore import QTimer

        self.layout = layout
        QTimer.singleShot(0, self._resize)

    def _resize(self) -> None:
        beside = self.layout == slicer.vtkMRMLLayoutNode.SlicerLayoutSideBySideView
        for name, logic in zip(self.NAMES, self._logics, strict=True):
            if logic.GetSliceNode() is not None:
                logic.ResizeSliceNode(*(BESIDE_SIZE if beside and name != "Green" else VIEW_SIZE))

    def sliceViewNames(self) -> tuple[str, ...]:
        return self.NAMES

    def mrmlSliceLogics(self):
        return self._collection


def _keep_none() -> None:
    """PySide6 takes None for immortal, as it is since Python 3.12: on older ones each call of a method that returns nothing
    takes a reference away, until None itself would be freed and the process ends."""
    if sys.version_info < (3, 12):
        ctypes.c_ssize_t.from_address(id(None)).value += 10**9


@contextmanager
def running() -> Iterator[Application]:
    """``qt``, ``ctk`` and the rest of ``slicer`` can be imported inside, with an empty ``slicer.mrmlScene``; not outside.

    Raises:
        ImportError: PySide6 or a system library it needs is not there.
    """
    os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
    from PySide6.QtWidgets import QApplication

    from slicer_stand_in import files, widgets

    _keep_none()
    qt_application = QApplication.instance() or QApplication([])
    app = Application()
    app.qt = qt_application
    before_modules = dict(sys.modules)
    before_names = {name: getattr(slicer, name) for name in dir(slicer)}
    util_before = {
        n: getattr(slicer.util, n)
        for n in (
            "confirmOkCancelDisplay",
            "confirmYesNoDisplay",
            "errorDisplay",
            "mainWindow",
            "selectModule",
            "loadVolume",
            "loadSegmentation",
            "loadMarkups",
            "saveScene",
            "loadScene",
        )
    }
    scene = slicer.vtkMRMLScene()
    # What observes the scene in Slicer, too: the Markups module gives a new list a display, which is shown.
    logic, markups = slicer.vtkMRMLApplicationLogic(), slicer.vtkSlicerMarkupsLogic()
    sequences = slicer.vtkSlicerSequencesLogic()
    logics = (logic, markups, sequences)
    for each in logics:  # the first makes the selection and the interaction node
        each.SetMRMLScene(scene)
    try:
        sys.modules["qt"], sys.modules["ctk"] = widgets.qt_module(), widgets.ctk_module()
        slicer.app, slicer.mrmlScene = app, scene
        app.views = LayoutManager(scene)
        slicer.modules = types.SimpleNamespace()
        for kind in (widgets.qMRMLWidget, widgets.qMRMLNodeComboBox, widgets.qMRMLCheckableNodeComboBox):
            setattr(slicer, kind.__name__, kind)
        for name in ("qMRMLSliderWidget", "qMRMLSpinBox", "qMRMLRangeWidget"):  # only compared with
            setattr(slicer, name, type(name, (), {}))
        slicer.util.confirmOkCancelDisplay = slicer.util.confirmYesNoDisplay = app.confirm
        slicer.util.errorDisplay = app.display
        slicer.util.loadVolume, slicer.util.loadMarkups = files.load_volume, files.load_markups
        slicer.util.loadSegmentation = files.load_segmentation
        sys.modules["SampleData"] = importlib.import_module("slicer_stand_in.SampleData")
        slicer.util.mainWindow = lambda verbose=True: app.window
        slicer.util.saveScene, slicer.util.loadScene = files.save_scene, files.load_scene
        slicer.util.selectModule = app.select_module
        for name in ("i18n", "parameterNodeWrapper", "ScriptedLoadableModule"):
            module = _slicers_own(name) or importlib.import_module(f"slicer_stand_in.{name}")
            sys.modules[f"slicer.{name}"] = module
            setattr(slicer, name, module)
        yield app
    finally:
        widgets.destroy()
        for name in set(sys.modules) - set(before_modules):
            if name.split(".")[0] in (
                "qt",
                "ctk",
                "slicer",
                "SampleData",
                "DivRegNet",
                "DivRegNetModule",
                "slicer_stand_in",
            ):
                del sys.modules[name]
                package, _, module = name.rpartition(".")
                if package in sys.modules and hasattr(sys.modules[package], module):
                    delattr(sys.modules[package], module)
        for name in set(dir(slicer)) - set(before_names):
            delattr(slicer, name)
        for name, value in before_names.items():
            setattr(slicer, name, value)
        for name, value in util_before.items():
            setattr(slicer.util, name, value)
        for each in reversed(logics):
            each.SetMRMLScene(None)
        app.views = None
        scene.Clear(1)


def _slicers_own(name: str):
    """A module of Slicer's sources, where the environment names them; else None."""
    folder = os.environ.get(SLICER_PYTHON)
    if not folder:
        return None
    path = Path(folder) / "slicer" / name
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    locations = [str(path)] if path.is_dir() else None
    spec = importlib.util.spec_from_file_location(f"slicer.{name}", file, submodule_search_locations=locations)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
