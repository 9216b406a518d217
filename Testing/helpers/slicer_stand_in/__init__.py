"""As much of the 3D Slicer application as the DivRegNet panel needs, on PySide6 and on slicer-core's real MRML.

MRML nodes, the scene, events and ``slicer.util`` are Slicer's own. Made here, after reading Slicer's sources: ``qt`` and
``ctk`` (PySide6 dressed as PythonQt), ``slicer.app``, the MRML node selectors, ``slicer.ScriptedLoadableModule`` and
``slicer.parameterNodeWrapper``. Where the environment variable ``DIVREGNET_SLICER_PYTHON`` names the folder
``Base/Python`` of Slicer's sources, the last two and ``slicer.i18n`` are Slicer's own as well.

What it cannot show:

* that PythonQt wraps a call as PySide6 does: argument conversions, enumerations, lifetime of objects, and methods that
  PythonQt does not export;
* that Slicer's widgets have the properties and signals that the selectors here have been given, and their looks;
* slice views: layers are set on real composite nodes, but nothing draws them;
* module discovery, the module panel, the extensions manager, the Sample Data module, pip and PyTorchUtils;
* translation, and Slicer's own Python and its environment variables in which the worker process runs.
"""

from slicer_stand_in.application import Application, running

__all__ = ["Application", "running"]
