"""PySide6 widgets dressed as PythonQt's, and Slicer's own widgets as far as the panel uses them."""

import re
import types
import weakref

import shiboken6
from PySide6 import QtCore, QtGui, QtUiTools, QtWidgets
from PySide6.QtCore import Property, Signal

HEADER = 24


class PythonQt:
    """A Qt property is an attribute with a value, as in PythonQt; and signals connect by their C++ signature."""

    def __getattribute__(self, name: str):
        if name == "connect":  # PySide6 hands out its own QObject.connect before any other
            return types.MethodType(PythonQt.connect, self)
        if not name.startswith("_") and super().__getattribute__("metaObject")().indexOfProperty(name) >= 0:
            return super().__getattribute__("property")(name)
        return super().__getattribute__(name)

    def __setattr__(self, name: str, value) -> None:
        if not name.startswith("_") and self.metaObject().indexOfProperty(name) >= 0:
            self.setProperty(name, value)
        else:
            super().__setattr__(name, value)

    @property
    def name(self) -> str:
        return self.objectName

    def connect(self, signal: str, slot) -> None:
        getattr(self, signal.split("(")[0]).connect(slot)


def _dressed(kind: type) -> type:
    return type(kind.__name__, (PythonQt, kind), {})


PLAIN = {
    kind.__name__: _dressed(kind)
    for kind in (
        QtWidgets.QCheckBox,
        QtWidgets.QComboBox,
        QtWidgets.QDoubleSpinBox,
        QtWidgets.QFrame,
        QtWidgets.QLabel,
        QtWidgets.QLineEdit,
        QtWidgets.QProgressBar,
        QtWidgets.QPushButton,
        QtWidgets.QSlider,
        QtWidgets.QSpinBox,
        QtWidgets.QTextEdit,
        QtWidgets.QToolButton,
        QtWidgets.QWidget,
        QtCore.QTimer,
    )
}


class qMRMLWidget(PythonQt, QtWidgets.QWidget):
    isEntered = True

    def setMRMLScene(self, scene) -> None:
        """Hands the scene to every selector, as the connections in a .ui file do in Slicer."""
        for child in self.findChildren(qMRMLNodeComboBox):
            child.setMRMLScene(scene)


class ctkCollapsibleButton(PythonQt, QtWidgets.QWidget):
    """A bar with a text; what is below it goes when it is collapsed."""

    def __init__(self, parent=None) -> None:
        super().__init__(parent)
        self._text, self._collapsed, self._put_away = "", False, []
        self.setContentsMargins(0, HEADER, 0, 0)

    def _set_text(self, text: str) -> None:
        self._text = text

    def _set_collapsed(self, collapsed: bool) -> None:
        self._collapsed = collapsed
        self._apply()

    def _apply(self) -> None:
        if self._collapsed:
            children = self.findChildren(QtWidgets.QWidget, options=QtCore.Qt.FindDirectChildrenOnly)
            self._put_away = [child for child in children if not child.isHidden()]
        for child in self._put_away:
            child.setVisible(not self._collapsed)
        self.setMaximumHeight(HEADER + 2 if self._collapsed else 16777215)

    def showEvent(self, event) -> None:
        """The children come after the property has been set."""
        if self._collapsed:
            self._apply()
        super().showEvent(event)

    def paintEvent(self, event) -> None:
        option = QtWidgets.QStyleOptionButton()
        option.initFrom(self)
        option.rect = QtCore.QRect(0, 0, self.width, HEADER)
        option.text = f"{'▸' if self._collapsed else '▾'}  {self._text}"
        QtWidgets.QStylePainter(self).drawControl(QtWidgets.QStyle.CE_PushButton, option)

    text = Property(str, lambda self: self._text, _set_text)
    collapsed = Property(bool, lambda self: self._collapsed, _set_collapsed)


def _kept(kind, name: str, default):
    private = f"_{name}"
    return Property(
        kind, lambda self: self.__dict__.get(private, default), lambda self, v: self.__dict__.update({private: v})
    )


class qMRMLNodeComboBox(PythonQt, QtWidgets.QWidget):
    """Lists the nodes of its types that are in the scene and not hidden."""

    currentNodeChanged = Signal(object)

    noneEnabled = _kept(bool, "noneEnabled", False)
    addEnabled = _kept(bool, "addEnabled", True)
    removeEnabled = _kept(bool, "removeEnabled", True)
    renameEnabled = _kept(bool, "renameEnabled", False)
    showChildNodeTypes = _kept(bool, "showChildNodeTypes", True)
    baseName = _kept(str, "baseName", "")

    def __init__(self, parent=None) -> None:
        super().__init__(parent)
        self._box = QtWidgets.QComboBox(self)
        layout = QtWidgets.QHBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self._box)
        self._scene, self._types, self._none, self._ids = None, [], "None", []
        self._observed = []
        self._box.currentIndexChanged.connect(self._changed)

    def _changed(self, _index: int) -> None:
        self.currentNodeChanged.emit(self.currentNode())

    def _set_types(self, types_) -> None:
        self._types = list(types_)
        self._fill()

    def _set_none(self, text: str) -> None:
        self._none = text
        self._fill()

    nodeTypes = Property("QStringList", lambda self: self._types, _set_types)
    noneDisplay = Property(str, lambda self: self._none, _set_none)

    def setMRMLScene(self, scene) -> None:
        self._scene = scene
        itself = weakref.ref(self)  # the scene must not keep a widget alive

        def fill(*_) -> None:
            if (widget := itself()) is not None and shiboken6.isValid(widget):
                widget._fill()

        for event in (scene.NodeAddedEvent, scene.NodeRemovedEvent, scene.EndCloseEvent):
            self._observed.append(scene.AddObserver(event, fill))
        self._fill()

    def release(self) -> None:
        """Lets go of the scene; to be called before the widget goes."""
        for tag in self._observed:
            self._scene.RemoveObserver(tag)
        self._observed, self._scene = [], None

    def _fill(self) -> None:
        if self._scene is None:
            return
        current = self._current_id()
        blocked = self._box.blockSignals(True)
        self._box.clear()
        self._ids = []
        if self.noneEnabled:
            self._box.addItem(self._none)
            self._ids.append(None)
        for i in range(self._scene.GetNumberOfNodes()):
            node = self._scene.GetNthNode(i)
            shown = (
                any(node.IsA(t) if self.showChildNodeTypes else node.GetClassName() == t for t in self._types)
                and not node.GetHideFromEditors()
            )
            if shown:
                self._box.addItem(node.GetName() or "")
                self._ids.append(node.GetID())
        self._box.setCurrentIndex(self._ids.index(current) if current in self._ids else 0)
        self._box.blockSignals(blocked)
        if current != self._current_id():
            self.currentNodeChanged.emit(self.currentNode())

    def _current_id(self):
        index = self._box.currentIndex()
        return self._ids[index] if 0 <= index < len(self._ids) else None

    def currentNode(self):
        name = self._current_id()
        return self._scene.GetNodeByID(name) if self._scene is not None and name else None

    def setCurrentNode(self, node) -> None:
        wanted = node.GetID() if node else None
        if wanted in self._ids:
            self._box.setCurrentIndex(self._ids.index(wanted))

    def nodeCount(self) -> int:
        return len([i for i in self._ids if i])

    def nodeFromIndex(self, index: int):
        return self._scene.GetNodeByID([i for i in self._ids if i][index])


class qMRMLCheckableNodeComboBox(qMRMLNodeComboBox):
    """Nodes can be checked, any number."""

    checkedNodesChanged = Signal()

    def __init__(self, parent=None) -> None:
        super().__init__(parent)
        self._checked = set()

    def checkState(self, node):
        return QtCore.Qt.Checked.value if node.GetID() in self._checked else QtCore.Qt.Unchecked.value

    def _fill(self) -> None:
        super()._fill()
        if self.__dict__.get("_checked") and not self._checked <= set(self._ids):
            self._checked &= set(self._ids)
            self.checkedNodesChanged.emit()
        self._show()

    def check(self, node) -> None:
        self._checked.add(node.GetID())
        self._show()
        self.checkedNodesChanged.emit()

    def uncheck(self, node) -> None:
        self._checked.discard(node.GetID())
        self._show()
        self.checkedNodesChanged.emit()

    def _show(self) -> None:
        names = [self._scene.GetNodeByID(i).GetName() for i in self._ids if i in self.__dict__.get("_checked", ())]
        self._box.setPlaceholderText(", ".join(names) or "None")
        blocked = self._box.blockSignals(True)
        self._box.setCurrentIndex(-1)
        self._box.blockSignals(blocked)


SLICERS = {k.__name__: k for k in (qMRMLWidget, ctkCollapsibleButton, qMRMLNodeComboBox, qMRMLCheckableNodeComboBox)}


class Loader(QtUiTools.QUiLoader):
    """Makes the dressed classes; raises for a class that is neither plain Qt nor one of Slicer's above."""

    def __init__(self) -> None:
        super().__init__()
        self._made = []  # PySide6 forgets the Python side of a widget that nobody holds

    def createWidget(self, kind: str, parent=None, name: str = ""):
        made = (SLICERS.get(kind) or PLAIN[kind])(parent)
        made.setObjectName(name)
        self._made.append(made)
        return made

    def load(self, file):
        """Leaves out the connections, which are between signals of classes that are not there."""
        text = re.sub(rb"<connections>.*</connections>", b"", file.readAll().data(), flags=re.DOTALL)
        buffer = QtCore.QBuffer()
        buffer.setData(text)
        widget = super().load(buffer)
        widget._made = self._made
        return widget


def destroy() -> None:
    """Every window there is, at once: what the garbage collector finds later, Qt may have destroyed before."""
    for window in QtWidgets.QApplication.topLevelWidgets():
        if not shiboken6.isValid(window) or QtWidgets.QWidget.parentWidget(window) is not None:
            continue  # a list of a combo box, which goes with it
        for selector in window.findChildren(qMRMLNodeComboBox):
            selector.release()
        window.hide()
        shiboken6.delete(window)


def qt_module() -> types.ModuleType:
    module = types.ModuleType("qt")
    vars(module).update(PLAIN)
    module.QUiLoader = Loader
    module.QFile = _dressed(QtCore.QFile)
    for kind in (
        QtCore.QSettings,
        QtCore.Qt,
        QtGui.QColor,
        QtGui.QIcon,
        QtWidgets.QApplication,
        QtWidgets.QMessageBox,
        QtWidgets.QVBoxLayout,
        QtWidgets.QHBoxLayout,
    ):
        setattr(module, kind.__name__, kind)
    return module


def ctk_module() -> types.ModuleType:
    module = types.ModuleType("ctk")
    module.ctkCollapsibleButton = ctkCollapsibleButton
    for name in (
        "ctkCheckBox",
        "ctkCheckablePushButton",
        "ctkSliderWidget",
        "ctkDoubleSlider",
        "ctkDoubleSpinBox",
        "ctkComboBox",
        "ctkRangeWidget",
        "ctkDoubleRangeSlider",
        "ctkPathLineEdit",
        "ctkDirectoryButton",
        "ctkColorPickerButton",
    ):  # Slicer's parameterNodeWrapper compares with them
        setattr(module, name, type(name, (), {}))
    return module
