"""``slicer.parameterNodeWrapper`` for the types and controls that DivRegNet's panel uses.

As in Slicer's: values are kept in a vtkMRMLScriptedModuleNode, validated when written; a control is bound to the
parameter that its property ``SlicerParameterName`` names, or through a connector; a combination of control and type
that is not known is an error.
"""

import enum
import typing

import ctk  # noqa: F401 -- as Slicer's needs it, so that a missing one is noticed
import qt
import slicer
import slicer.util
import vtk

PROPERTY = "SlicerParameterName"


class WithinRange:
    def __init__(self, minimum, maximum) -> None:
        self.minimum, self.maximum = minimum, maximum

    def validate(self, value) -> None:
        if not self.minimum <= value <= self.maximum:
            raise ValueError(f"Value must be within range [{self.minimum}, {self.maximum}], is {value}")


class GuiConnector:
    def __init__(self) -> None:
        self._callback = None

    def onChanged(self, callback) -> None:
        self._callback = callback
        self._disconnect() if callback is None else self._connect()

    def changed(self) -> None:
        if self._callback:
            self._callback()


def _split(annotated) -> tuple:
    """A type and the annotations it carries."""
    if typing.get_origin(annotated) is typing.Annotated:
        kind, *annotations = typing.get_args(annotated)
        return kind, annotations
    return annotated, []


def _node_types(kind) -> list:
    """The node classes of a node type or a union of such and None; empty for any other type."""
    kinds = typing.get_args(kind) if typing.get_origin(kind) is typing.Union else (kind,)
    found = [k for k in kinds if isinstance(k, type) and issubclass(k, slicer.vtkMRMLNode)]
    return found if len(found) == len([k for k in kinds if k is not type(None)]) else []


class _Parameter:
    """One parameter: its type, its default, and how it is read and written."""

    def __init__(self, name: str, annotated, default) -> None:
        self.name, self.annotated = name, annotated
        self.kind, self.validators = _split(annotated)
        self.nodes = _node_types(self.kind)
        self.listed = typing.get_origin(self.kind) is list and _node_types(typing.get_args(self.kind)[0])
        if not (self.nodes or self.listed or self.kind in (int, float, bool, str) or issubclass(self.kind, enum.Enum)):
            raise TypeError(f"no serializer for {annotated}")
        if default is None and not self.nodes:
            default = [] if self.listed else next(iter(self.kind)) if issubclass(self.kind, enum.Enum) else self.kind()
        self.default = default

    def check(self, value) -> None:
        if self.listed:
            bad = [v for v in value if v is not None and not isinstance(v, tuple(self.listed))]
        elif self.nodes:
            bad = [] if value is None or isinstance(value, tuple(self.nodes)) else [value]
        else:
            kinds = (int, float) if self.kind is float else self.kind
            bad = [] if isinstance(value, kinds) else [value]
        if bad:
            raise ValueError(f"{self.name}: {bad[0]!r} is no {self.kind}")
        for validator in self.validators:
            validator.validate(value)

    def write(self, node, value) -> None:
        self.check(value)
        with slicer.util.NodeModify(node):
            if self.listed:
                for i in range(int(node.GetParameter(f"{self.name}.len") or 0)):
                    node.RemoveNodeReferenceIDs(f"{self.name}.{i}")
                for i, item in enumerate(value):
                    node.SetNodeReferenceID(f"{self.name}.{i}", item.GetID() if item else None)
                node.SetParameter(f"{self.name}.len", str(len(value)))
            elif self.nodes:
                node.SetParameter(self.name, "")
                node.SetNodeReferenceID(self.name, value.GetID() if value is not None else None)
            else:
                node.SetParameter(self.name, value.name if isinstance(value, enum.Enum) else str(value))

    def read(self, node):
        if self.listed:
            count = int(node.GetParameter(f"{self.name}.len"))
            return [node.GetNodeReference(f"{self.name}.{i}") for i in range(count)]
        if self.nodes:
            return node.GetNodeReference(self.name)
        text = node.GetParameter(self.name)
        if self.kind is bool:
            return text == "True"
        if issubclass(self.kind, enum.Enum):
            if text not in self.kind.__members__:  # EnumSerializer.read, parameterNodeWrapper/serializers.py
                raise ValueError(f"Found {text!r} in parameter node but it is not a name in {self.kind!r}")
            return self.kind[text]
        return self.kind(text)

    def exists(self, node) -> bool:
        return bool(node.HasParameter(f"{self.name}.len" if self.listed else self.name))


class _Wrapper:
    """What ``parameterNodeWrapper`` adds to a class."""

    def __init__(self, parameterNode) -> None:
        self.parameterNode = parameterNode
        self._gui, self._updating = {}, False
        for parameter in self.allParameters.values():
            if not parameter.exists(parameterNode):
                parameter.write(parameterNode, parameter.default)

    def getValue(self, name: str):
        return self.allParameters[name].read(self.parameterNode)

    def setValue(self, name: str, value) -> None:
        self.allParameters[name].write(self.parameterNode, value)

    def StartModify(self):
        return self.parameterNode.StartModify()

    def EndModify(self, was) -> None:
        self.parameterNode.EndModify(was)

    def AddObserver(self, event, callback, priority=0.0):
        return self.parameterNode.AddObserver(event, callback, priority)

    def RemoveObserver(self, tag) -> None:
        self.parameterNode.RemoveObserver(tag)

    def connectGui(self, ui) -> int:
        named = {}
        for widget in vars(ui).values():
            if name := widget.property(PROPERTY):
                if name not in self.allParameters:
                    raise ValueError(f"Cannot find a param with the given name: {name}")
                named[name] = _connector(widget, self.allParameters[name])
        return self.connectParametersToGui(named)

    def connectParametersToGui(self, mapping: dict) -> int:
        for name, connector in mapping.items():
            connector.write(self.getValue(name))
            connector.onChanged(lambda name=name, connector=connector: self._take(name, connector))
        tag = self.AddObserver(vtk.vtkCommand.ModifiedEvent, lambda *_: self._give())
        self._gui[tag] = mapping
        return tag

    def disconnectGui(self, tag: int) -> None:
        for connector in self._gui.pop(tag, {}).values():
            connector.onChanged(None)
        self.RemoveObserver(tag)

    def _take(self, name: str, connector) -> None:
        if not self._updating:
            with slicer.util.NodeModify(self):
                self.setValue(name, connector.read())

    def _give(self) -> None:
        if self._updating:
            return
        self._updating = True
        try:
            for mapping in self._gui.values():
                for name, connector in mapping.items():
                    connector.write(self.getValue(name))
        finally:
            self._updating = False


def parameterNodeWrapper(kind: type) -> type:
    parameters = {
        name: _Parameter(name, annotated, getattr(kind, name, None))
        for name, annotated in typing.get_type_hints(kind, include_extras=True).items()
    }
    members = {
        name: property(lambda self, n=name: self.getValue(n), lambda self, v, n=name: self.setValue(n, v))
        for name in parameters
    }
    return type(kind.__name__, (_Wrapper,), {"__doc__": kind.__doc__, "allParameters": parameters, **members})


class _Simple(GuiConnector):
    """A control with a value in one Qt property and a signal that tells of its change."""

    def __init__(self, widget, attribute: str, signal: str) -> None:
        super().__init__()
        self._widget, self._attribute, self._signal = widget, attribute, getattr(widget, signal)

    def _connect(self) -> None:
        self._signal.connect(self.changed)

    def _disconnect(self) -> None:
        self._signal.disconnect(self.changed)

    def read(self):
        return getattr(self._widget, self._attribute)

    def write(self, value) -> None:
        setattr(self._widget, self._attribute, value)


class _Enumeration(_Simple):
    def __init__(self, widget, kind) -> None:
        super().__init__(widget, "currentIndex", "currentIndexChanged")
        self._members = list(kind)
        widget.clear()
        for member in self._members:
            widget.addItem(member.label() if hasattr(member, "label") else member.name)

    def read(self):
        return self._members[super().read()]

    def write(self, value) -> None:
        super().write(self._members.index(value))


class _Node(_Simple):
    def __init__(self, widget, kinds) -> None:
        super().__init__(widget, "", "currentNodeChanged")
        widget.nodeTypes = [kind().GetClassName() for kind in kinds]

    def read(self):
        return self._widget.currentNode()

    def write(self, value) -> None:
        self._widget.setCurrentNode(value)


def _connector(widget, parameter: _Parameter) -> GuiConnector:
    """Raises RuntimeError where Slicer has no connector for this control and this type, exact classes as there."""
    kind, control = parameter.kind, type(widget)
    if control is qt.QCheckBox and kind is bool:
        return _Simple(widget, "checked", "stateChanged")
    if (control is qt.QSpinBox and kind is int) or (control is qt.QDoubleSpinBox and kind is float):
        limits = next(v for v in parameter.validators if isinstance(v, WithinRange))
        widget.setRange(limits.minimum, limits.maximum)
        return _Simple(widget, "value", "valueChanged")
    if control is qt.QComboBox and isinstance(kind, type) and issubclass(kind, enum.Enum):
        return _Enumeration(widget, kind)
    if control is slicer.qMRMLNodeComboBox and parameter.nodes:
        return _Node(widget, parameter.nodes)
    raise RuntimeError(f"Unable to create GUI connector from datatype '{kind}' to widget type '{control}'.")
