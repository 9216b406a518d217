"""Binds controls of the panel to parameters where Slicer's own connectors cannot: lists that change while shown.

Such a control carries the property ``DivRegNetParameterName`` in the .ui file instead of ``SlicerParameterName``.
"""

import slicer
from slicer.parameterNodeWrapper import GuiConnector

from DivRegNetModule import _

PROPERTY = "DivRegNetParameterName"


def connectors(ui) -> dict:
    """Parameter name -> connector, for every control of ``slicer.util.childWidgetVariables`` that has the property."""
    made = {}
    for widget in list(vars(ui).values()):
        name = widget.property(PROPERTY)
        if name:
            kind = CheckedNodes if isinstance(widget, slicer.qMRMLCheckableNodeComboBox) else Choices
            made[str(name)] = kind(widget)
    return made


def boxes_in(selector) -> list:
    """The combo box inside a node selector, whose own access to it Python cannot call (it is protected)."""
    return [child for child in selector.children() if child.inherits("QComboBox")]


class Choices(GuiConnector):
    """A QComboBox whose items come and go <-> the string behind the current item (not the text shown).

    A string that is not among the items, as in a scene from another computer, is added and shown as missing.
    """

    @staticmethod
    def canRepresent(widget, datatype) -> bool:
        return False  # made by hand, never chosen by Slicer

    @staticmethod
    def create(widget, datatype):
        return None

    def __init__(self, widget) -> None:
        super().__init__()
        self._widget = widget

    def offer(self, items: list[tuple[str, str]]) -> None:
        """Replaces the items, each (text, value); the present value stays selected where it is among them."""
        value = self.read()
        blocked = self._widget.blockSignals(True)
        self._widget.clear()
        for text, item in items:
            self._widget.addItem(text, item)
        self.write(value)
        self._widget.blockSignals(blocked)

    def _connect(self) -> None:
        self._widget.currentIndexChanged.connect(self.changed)

    def _disconnect(self) -> None:
        self._widget.currentIndexChanged.disconnect(self.changed)

    def widget(self):
        return self._widget

    def read(self) -> str:
        value = self._widget.itemData(self._widget.currentIndex) if self._widget.count else None
        return "" if value is None else str(value)

    def write(self, value: str) -> None:
        index = self._widget.findData(value) if value else min(self._widget.count, 1) - 1  # empty: the first, if any
        if value and index < 0:
            self._widget.addItem(_("{name} (not found)").format(name=value), value)
            index = self._widget.count - 1
        self._widget.setCurrentIndex(index)


class CheckedNodes(GuiConnector):
    """A qMRMLCheckableNodeComboBox <-> the list of the nodes that are checked."""

    @staticmethod
    def canRepresent(widget, datatype) -> bool:
        return False

    @staticmethod
    def create(widget, datatype):
        return None

    def __init__(self, widget) -> None:
        super().__init__()
        self._widget = widget

    def _connect(self) -> None:
        self._widget.checkedNodesChanged.connect(self.changed)

    def _disconnect(self) -> None:
        self._widget.checkedNodesChanged.disconnect(self.changed)

    def widget(self):
        return self._widget

    def _nodes(self) -> list:
        return [self._widget.nodeFromIndex(i) for i in range(self._widget.nodeCount())]

    def read(self) -> list:
        return [node for node in self._nodes() if node and self._widget.checkState(node)]

    def write(self, value) -> None:
        wanted = {node.GetID() for node in value if node}
        for node in self._nodes():
            if node and bool(self._widget.checkState(node)) != (node.GetID() in wanted):
                (self._widget.check if node.GetID() in wanted else self._widget.uncheck)(node)
        for box in boxes_in(self._widget):
            box.update()  # ctkCheckableComboBox does not paint what a program has checked
