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
        if name in ("minimumSizeHint", "sizeHint") or (name == "text" and isinstance(self, QtWidgets.QProgressBar)):
            return super().__getattribute__(name)  # virtual: Qt asks here for an override, and would come back for ever
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
        QtWidgets.QPlainTextEdit,
        QtWidgets.QTableWidget,
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


class _SortFilterProxyModel:
    """``qMRMLSortFilterProxyModel``, as far as it is used."""

    def __init__(self, selector) -> None:
        self._selector, self._hidden = weakref.ref(selector), []

    @property
    def hiddenNodeIDs(self) -> tuple[str, ...]:
        return tuple(self._hidden)

    @hiddenNodeIDs.setter
    def hiddenNodeIDs(self, ids) -> None:
        self._hidden = list(ids)
        self._selector()._fill()


class qMRMLNodeComboBox(PythonQt, QtWidgets.QWidget):
    """Lists the nodes of its types that are in the scene and not hidden.

    What it does when nodes come and go is taken from Slicer's sources:

    * qMRMLSceneModel.cxx, onMRMLSceneNodeAboutToBeRemoved: the row of a node goes; QComboBox then shows the row that has
      taken its place, which is the next node, and qMRMLNodeComboBox.cxx, emitCurrentNodeChanged, tells of it.
    * qMRMLSceneModel.cxx, onMRMLSceneImported and updateScene: when an import ends all rows are removed and made again. The
      selection is lost, and the loss is told of as a change to None.
    * qMRMLNodeComboBox.cxx, setCurrentNodeIDInternal: a node that is not listed cannot be chosen.
    """

    currentNodeChanged = Signal(object)

    noneEnabled = _kept(bool, "noneEnabled", False)
    addEnabled = _kept(bool, "addEnabled", True)
    removeEnabled = _kept(bool, "removeEnabled", True)
    renameEnabled = _kept(bool, "renameEnabled", False)
    showChildNodeTypes = _kept(bool, "showChildNodeTypes", True)
    baseName = _kept(str, "baseName", "")

    def __init__(self, parent=None) -> None:
        super().__init__(parent)
        self._box = self._new_box()
        layout = QtWidgets.QHBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self._box)
        self._scene, self._types, self._none, self._ids = None, [], "None", []
        self._observed, self._proxy = [], _SortFilterProxyModel(self)
        self._box.currentIndexChanged.connect(self._changed)

    def _new_box(self) -> QtWidgets.QComboBox:
        return QtWidgets.QComboBox(self)

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

    def sortFilterProxyModel(self) -> _SortFilterProxyModel:
        return self._proxy

    def setMRMLScene(self, scene) -> None:
        self._scene = scene
        itself = weakref.ref(self)  # the scene must not keep a widget alive

        def call(method: str):
            def observer(*_) -> None:
                if (widget := itself()) is not None and shiboken6.isValid(widget):
                    getattr(widget, method)()

            return observer

        for event, method in (
            (scene.NodeAddedEvent, "_fill"),
            (scene.NodeRemovedEvent, "_fill"),
            (scene.EndImportEvent, "_update_scene"),
            (scene.EndCloseEvent, "_update_scene"),
        ):
            self._observed.append(scene.AddObserver(event, call(method)))
        self._fill()

    def release(self) -> None:
        """Lets go of the scene; to be called before the widget goes."""
        for tag in self._observed:
            self._scene.RemoveObserver(tag)
        self._observed, self._scene = [], None

    def _listed(self) -> list:
        """The nodes that are offered."""
        nodes = [self._scene.GetNthNode(i) for i in range(self._scene.GetNumberOfNodes())]
        return [
            node
            for node in nodes
            if any(node.IsA(t) if self.showChildNodeTypes else node.GetClassName() == t for t in self._types)
            and not node.GetHideFromEditors()
            and node.GetID() not in self._proxy.hiddenNodeIDs
        ]

    def _update_scene(self) -> None:
        """qMRMLSceneModel::updateScene."""
        if self._scene is None:
            return
        had = self._current_id()
        blocked = self._box.blockSignals(True)
        self._box.setCurrentIndex(-1)
        self._box.blockSignals(blocked)
        self._fill()
        if had is not None:
            self.currentNodeChanged.emit(None)

    def _fill(self) -> None:
        if self._scene is None or self._scene.IsImporting():
            return
        current, row = self._current_id(), self._box.currentIndex()
        blocked = self._box.blockSignals(True)
        self._box.clear()
        self._ids = []
        if self.noneEnabled:
            self._box.addItem(self._none)
            self._ids.append(None)
        for node in self._listed():
            self._box.addItem(node.GetName() or "")
            self._ids.append(node.GetID())
        if current in self._ids:
            self._box.setCurrentIndex(self._ids.index(current))
        else:  # the row that has taken the place of the one that is gone
            self._box.setCurrentIndex(min(max(row, 0), len(self._ids) - 1))
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


class _CheckableBox(QtWidgets.QComboBox):
    """Paints the names of what is checked, and paints again only when it is told to: ctkCheckableComboBox.cpp has no
    ``update()`` where its list of checked items changes, so that after a change by a program the old text stays."""

    painted = ""

    def paintEvent(self, event) -> None:
        self.painted = self.parent().names()
        painter, option = QtWidgets.QStylePainter(self), QtWidgets.QStyleOptionComboBox()
        self.initStyleOption(option)
        option.currentText = self.painted
        painter.drawComplexControl(QtWidgets.QStyle.CC_ComboBox, option)
        painter.drawControl(QtWidgets.QStyle.CE_ComboBoxLabel, option)


class qMRMLCheckableNodeComboBox(qMRMLNodeComboBox):
    """Nodes can be checked, any number."""

    checkedNodesChanged = Signal()

    def __init__(self, parent=None) -> None:
        super().__init__(parent)
        self._checked = set()

    def _new_box(self) -> QtWidgets.QComboBox:
        return _CheckableBox(self)

    def names(self) -> str:
        checked = [i for i in self._ids if i in self.__dict__.get("_checked", ())]
        return ", ".join(self._scene.GetNodeByID(i).GetName() for i in checked) or "None"

    def checkState(self, node):
        return QtCore.Qt.Checked.value if node.GetID() in self._checked else QtCore.Qt.Unchecked.value

    def _update_scene(self) -> None:
        """All rows are made again, unchecked."""
        if self._checked:
            self._checked = set()
            self.checkedNodesChanged.emit()
        super()._update_scene()

    def _fill(self) -> None:
        super()._fill()
        if self.__dict__.get("_checked") and not self._checked <= set(self._ids):
            self._checked &= set(self._ids)
            self.checkedNodesChanged.emit()

    def check(self, node) -> None:
        if node.GetID() in self._ids:
            self._checked.add(node.GetID())
            self.checkedNodesChanged.emit()

    def uncheck(self, node) -> None:
        self._checked.discard(node.GetID())
        self.checkedNodesChanged.emit()


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
        QtCore.QUrl,
        QtGui.QColor,
        QtGui.QDesktopServices,
        QtGui.QIcon,
        QtWidgets.QApplication,
        QtWidgets.QFileDialog,
        QtWidgets.QHeaderView,
        QtWidgets.QMessageBox,
        QtWidgets.QTableWidgetItem,
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
