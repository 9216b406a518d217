"""What the DivRegNet module of 3D Slicer is made of, beside the classes in DivRegNet.py that Slicer looks for.

``mrml`` needs MRML (``slicer-core``) alone; ``fit`` and ``verdict`` need neither Qt nor Slicer; nothing here imports torch.
"""

import re

from DivRegNetLib.words import Text

try:
    from slicer.i18n import tr as _
    from slicer.i18n import translate
except ImportError:  # outside the Slicer application there is nothing to translate with

    def _(text: str) -> str:
        """The text as it is."""
        return text

    def translate(context: str, text: str) -> str:
        """The text as it is."""
        return text


PLACEHOLDER = re.compile(r"\{(\w*)")


def translated(text: str) -> str:
    """A text of the library in the language of the application; any other string as it is."""
    if not isinstance(text, Text):
        return text
    template = translate(text.context, text.template)
    if set(PLACEHOLDER.findall(template)) != set(PLACEHOLDER.findall(text.template)):
        return str(text)  # a translation that lost a value
    return template.format(**text.values) if text.values else template


__all__ = ["_", "translated"]
