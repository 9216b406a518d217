"""Named sets of options for common purposes. The command line knows them as ``--preset NAME``, the Slicer module by label.

Options that a preset does not name keep their defaults, and single options can be changed after a preset was chosen.
"""

from dataclasses import dataclass

from DivRegNetLib.errors import InputError
from DivRegNetLib.options import table
from DivRegNetLib.words import Text, marker

_ = marker("DivRegNetLib.presets")


@dataclass(frozen=True)
class Preset:
    """Options for one purpose.

    name: on the command line.
    label: in the panel.
    help: when to choose it, a sentence or two.
    options: fields of :class:`~DivRegNetLib.options.Options` that differ from their defaults.
    """

    name: str
    label: Text
    help: Text
    options: dict

    def value(self, option: str) -> object:
        """What the preset sets an option to."""
        return self.options.get(option, table()[option].default)


_ALL = (
    Preset(
        "general",
        _("General"),
        _("For any two images that show the same kind of anatomy: affine alignment, then the deformation."),
        {},
    ),
    Preset(
        "same-contrast",
        _("Same patient, same contrast"),
        _("For follow-up images of one patient, or phases of one examination: rigid alignment, then the deformation."),
        {"align": "rigid"},
    ),
    Preset(
        "ct-mr",
        _("Same patient, CT-MR"),
        _(
            "For images of one patient from different scanners or of different contrasts: rigid alignment, refined deformation."
        ),
        {"align": "rigid", "refine": 16},
    ),
    Preset(
        "brains",
        _("Two patients, brain"),
        _("For brains of two persons, or a brain and an atlas: affine alignment, refined deformation."),
        {"align": "affine", "refine": 16},
    ),
    Preset(
        "align-only",
        _("Only align"),
        _("Rotates and shifts the moving volume as a whole, without any deformation."),
        {"align": "rigid", "method": "none"},
    ),
    Preset(
        "fast",
        _("Fast"),
        _("For a first look, or many volumes: affine alignment, then a deformation in about half of the usual time."),
        {"effort": "fast"},
    ),
    Preset(
        "thorough",
        _("Thorough"),
        _(
            "For difficult images, if time does not matter: a finer grid, more steps, and as many refinement steps as help."
        ),
        {"align": "affine", "effort": "thorough", "refine": 100},
    ),
)
PRESETS = {preset.name: preset for preset in _ALL}
"""Name -> preset, in the order in which they are offered."""
VARIED = tuple(sorted({option for preset in _ALL for option in preset.options}))
"""The options that differ between presets."""


def preset(name: str) -> Preset:
    """Raises InputError for a name that is no preset."""
    if name not in PRESETS:
        raise InputError(f"unknown preset {name!r}; presets are {', '.join(PRESETS)}")
    return PRESETS[name]


def matching(values: dict) -> Preset | None:
    """The preset that sets the varied options to these values; None if no preset does."""
    for candidate in _ALL:
        if all(values[option] == candidate.value(option) for option in VARIED):
            return candidate
    return None
