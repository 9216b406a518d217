"""Sentences of the library that a user interface can translate, though the library itself has nothing to translate with.

    _ = marker("quality.verdict")                     # folder and file, as Slicer's translation tools name a context
    text = _("{n} voxels are folded.").format(n=3)

``text`` is a string like any other; it remembers its template, which a translator has seen, and the values.
"""

from collections.abc import Callable


class Text(str):
    """A string made of a template and values.

    context: where the template is, as Slicer's translation tools name it.
    template: what is translated.
    values: what is filled into the template; empty where nothing is.
    """

    context: str
    template: str
    values: dict

    def __new__(cls, template: str, context: str, values: dict | None = None) -> "Text":
        made = super().__new__(cls, template.format(**values) if values else template)
        made.template, made.context, made.values = template, context, values or {}
        return made

    def format(self, **values) -> "Text":
        """The text with values filled in."""
        return Text(self.template, self.context, values)

    def __getnewargs__(self) -> tuple:
        """So that it can be pickled and copied."""
        return self.template, self.context, self.values


def marker(context: str) -> Callable[[str], Text]:
    """The function ``_`` of a file: marks a string as one that can be translated."""
    return lambda template: Text(template, context)
