"""What the DivRegNet module of 3D Slicer is made of, beside the classes in DivRegNet.py that Slicer looks for.

``fit``, ``verdict`` and ``checkerboard`` in ``comparison`` need neither Qt nor Slicer; nothing here imports
torch.
"""

try:
    from slicer.i18n import tr as _
except ImportError:  # outside the Slicer application there is nothing to translate with

    def _(text: str) -> str:
        """The text as it is."""
        return text


__all__ = ["_"]
