"""What the user asks for: the one table of options that the library, the command line and the Slicer module share.

Each field of :class:`Options` carries its type, default, range and help. :func:`table` lists them; the command line, the
panel's tooltips and the documents take what they say from there. No torch here.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from DivRegNetLib.core.grid import affine_matrix
from DivRegNetLib.errors import InputError
from DivRegNetLib.models import DEFAULT

ALIGNMENTS = ("none", "center", "rigid", "affine")
LANDMARK_ALIGNMENTS = {
    "landmarks": "rigid",
    "landmarks-rigid": "rigid",
    "landmarks-similarity": "similarity",
    "landmarks-affine": "affine",
}
"""Initial alignments of files that come with landmarks -> kind of the transform that is fitted to these."""
INTERPOLATIONS = {"linear": sitk.sitkLinear, "nearest": sitk.sitkNearestNeighbor, "bspline": sitk.sitkBSpline3}
EFFORTS = ("fast", "usual", "thorough")
METHOD_CHOICES = ("auto", "variational", "discrete+variational", "regnet", "variational+regnet", "none")
STAGES = ("check", "align", "sample", "deform", "refine", "fields", "outputs")

Progress = Callable[[str, float], bool | None]
"""Called with the stage and the fraction of the whole that is done (0 to 1); returning False cancels."""


@dataclass(frozen=True)
class Option:
    """One row of the table.

    kind: ``str``, ``int``, ``float``, ``bool``, or ``object`` for what has checks of its own.
    default: None where the value is worked out from the images; ``default_help`` then says how.
    choices: the values that are possible; empty: any.
    low, high: smallest and largest number, both included.
    unit: of a number.
    help: a sentence for the user.
    """

    name: str
    kind: type
    default: object
    help: str
    choices: tuple[str, ...] = ()
    low: float = -math.inf
    high: float = math.inf
    unit: str = ""
    default_help: str = ""

    @property
    def flag(self) -> str:
        """Its name on the command line."""
        return "--" + self.name.replace("_", "-")

    def check(self, value: object) -> None:
        """Raises InputError where the value has the wrong type or is out of range; None passes where it is the default."""
        if value is None and self.default is None:
            return
        if self.choices:
            if value not in self.choices:
                raise InputError(f"{self.name} is one of {', '.join(self.choices)}, got {value!r}")
        elif self.kind is str:
            if not isinstance(value, str) or not value:
                raise InputError(f"{self.name} is {self.help[0].lower()}{self.help[1:].rstrip('.')}, got {value!r}")
        elif self.kind is bool:
            if not isinstance(value, bool):
                raise InputError(f"{self.name} is true or false, got {value!r}")
        elif not _is_number(value, self.kind) or not self.low <= value <= self.high:
            what = "a whole number" if self.kind is int else "a number"
            raise InputError(f"{self.name} is {what}{self._limits()}, got {value!r}")

    def _limits(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        if math.isfinite(self.low) and math.isfinite(self.high):
            return f" from {self.low:g} to {self.high:g}{unit}"
        return f" of at least {self.low:g}{unit}" if math.isfinite(self.low) else f" of{unit}" if unit else ""


@dataclass(frozen=True)
class Options:
    """How to register. :func:`table` describes each field.

    ``align`` may also be a linear SimpleITK transform that maps fixed points to moving points (LPS, mm); it is used as
    it is. For registrations of files it may be one of LANDMARK_ALIGNMENTS.
    """

    model: str = field(
        default=DEFAULT,
        metadata={"help": "The name of a bundled model or one of your own, or the path of its card."},
    )
    method: str = field(
        default="auto",
        metadata={
            "help": "What computes the deformation: the variational method, if wanted after a discrete start that searches "
            "every shift of some voxels, RegNet or both, one after the other; auto takes what the model's card says, none "
            "only aligns.",
            "choices": METHOD_CHOICES,
        },
    )
    device: str = field(
        default="auto",
        metadata={"help": "Where to compute: auto (a graphics card if there is one that works), cpu, cuda or cuda:N."},
    )
    align: "str | sitk.Transform" = field(
        default="affine",
        metadata={
            "help": "Initial alignment: none, center (a shift), rigid, affine, or a linear transform that maps fixed points "
            "to moving points.",
            "kind": object,
        },
    )
    effort: str = field(
        default="usual",
        metadata={
            "help": "How much time the deformation may take: fast leaves descriptors and the last, finest steps out; usual "
            "takes some seconds for a head; thorough makes more steps on a finer grid and takes minutes.",
            "choices": EFFORTS,
        },
    )
    refine: int = field(
        default=0,
        metadata={
            "help": "Largest number of further steps of the variational method; they end when the similarity gain no longer "
            "exceeds the elastic penalty.",
            "low": 0,
        },
    )
    stiffness: float | None = field(
        default=None,
        metadata={
            "help": "Stiffness of the deformation as a factor of the model's: above 1 it is stiffer, below 1 looser.",
            "low": 0.01,
            "high": 1000,
            "default_help": "the model's, or no deformation where the images agree better without one",
        },
    )
    interpolation: str = field(
        default="linear",
        metadata={"help": "Interpolation of the warped volume.", "choices": tuple(INTERPOLATIONS)},
    )
    default_value: float | None = field(
        default=None,
        metadata={
            "help": "Value of the warped volume outside the moving volume.",
            "default_help": "0, or -1024 for a CT in Hounsfield units",
        },
    )
    spacing: float | None = field(
        default=None,
        metadata={"help": "Working resolution.", "low": 0.1, "high": 50, "unit": "mm", "default_help": "the model's"},
    )
    memory: float | None = field(
        default=None,
        metadata={
            "help": "Main memory that the process may use. Where it is too little, the working resolution is lowered.",
            "low": 0.001,
            "unit": "GB",
            "default_help": "what the computer has",
        },
    )
    error_map: bool = field(
        default=False,
        metadata={"help": "Also make a map of the expected error in mm."},
    )

    def __post_init__(self) -> None:
        """Raises InputError for an invalid value."""
        if isinstance(self.model, Path):
            object.__setattr__(self, "model", str(self.model))
        for option in table().values():
            if option.kind is not object:
                option.check(getattr(self, option.name))
        _check_alignment(self.align)

    @classmethod
    def of(cls, **values: object) -> "Options":
        """Options from keyword arguments.

        Raises:
            InputError: an invalid value, or a name that is no option.
        """
        if unknown := sorted(set(values) - set(table())):
            raise InputError(f"unknown option {unknown[0]!r}; options are {', '.join(table())}")
        return cls(**values)

    def as_arguments(self) -> dict:
        """The options as keyword arguments of :func:`DivRegNetLib.registration.pipeline.register`."""
        return {name: getattr(self, name) for name in table()}

    def as_dict(self) -> dict:
        """Plain values for records; a given transform becomes its 4x4 matrix (LPS, mm)."""
        align = self.align if isinstance(self.align, str) else affine_matrix(self.align).tolist()
        return self.as_arguments() | {"align": align}


def table() -> dict[str, Option]:
    """Name -> row, in the order in which options are shown."""
    return _TABLE


def _row(f) -> Option:
    about = dict(f.metadata)
    kind = about.pop("kind", None) or (type(f.default) if f.default is not None else float)
    return Option(f.name, kind, f.default, about.pop("help"), **about)


_TABLE = {f.name: _row(f) for f in fields(Options)}


def _check_alignment(align: object) -> None:
    if isinstance(align, str):
        if align not in (*ALIGNMENTS, *LANDMARK_ALIGNMENTS):
            raise InputError(f"align is one of {', '.join(ALIGNMENTS)} or a transform, got {align!r}")
        return
    if not isinstance(align, sitk.Transform):
        raise InputError(f"align is one of {', '.join(ALIGNMENTS)} or a SimpleITK transform, got {align!r}")
    if align.GetDimension() != 3 or not align.IsLinear():
        raise InputError("the initial transform must be linear and three-dimensional (rigid, similarity or affine)")
    matrix = affine_matrix(align)
    if not np.isfinite(matrix).all() or abs(np.linalg.det(matrix[:3, :3])) <= 1e-6:
        raise InputError("the initial transform is not finite or cannot be inverted; choose one with an inverse")


def _is_number(value: object, kind: type) -> bool:
    allowed = int if kind is int else int | float
    return isinstance(value, allowed) and not isinstance(value, bool) and math.isfinite(value)
