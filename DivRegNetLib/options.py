"""What the user asked for: the one dataclass that enters :func:`DivRegNetLib.registration.pipeline.register`. No torch here."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from DivRegNetLib.core.grid import affine_matrix
from DivRegNetLib.errors import InputError
from DivRegNetLib.models import DEFAULT

ALIGNMENTS = ("none", "center", "rigid", "affine")
INTERPOLATIONS = {"linear": sitk.sitkLinear, "nearest": sitk.sitkNearestNeighbor, "bspline": sitk.sitkBSpline3}
STAGES = ("check", "affine", "sample", "predict", "refine", "physical", "outputs")

Progress = Callable[[str, float], bool | None]
"""Called with the stage and the fraction of the whole that is done (0 to 1); returning False cancels."""


@dataclass(frozen=True)
class Options:
    """How to register.

    model: name of a bundled or user model, or the path of its card.
    device: ``auto`` (CUDA where there is one), ``cpu``, ``cuda`` or ``cuda:N``.
    align: initial alignment: ``none``, ``center``, ``rigid``, ``affine``, or a linear SimpleITK transform from fixed to
        moving points (LPS, mm), which is used as it is.
    refine: steps of optimization for this very pair after the network's forward pass; 0 leaves it out.
    interpolation: of the warped volume: ``linear``, ``nearest`` or ``bspline``.
    default_value: what the warped volume holds where the moving image has nothing; None: 0, or -1024 for images that
        reach down to air in Hounsfield units.
    spacing: working resolution in mm; None: the model's.
    memory: GB that the whole process may take in main memory; None: what the computer has. Where that is too little, the
        working resolution is lowered.
    """

    model: str = DEFAULT
    device: str = "auto"
    align: "str | sitk.Transform" = "affine"
    refine: int = 0
    interpolation: str = "linear"
    default_value: float | None = None
    spacing: float | None = None
    memory: float | None = None

    def __post_init__(self) -> None:
        """Raises InputError for a value that cannot be meant."""
        if isinstance(self.model, Path):
            object.__setattr__(self, "model", str(self.model))
        if not isinstance(self.model, str) or not self.model:
            raise InputError(f"model is the name of a model, got {self.model!r}")
        if isinstance(self.align, str) and self.align not in ALIGNMENTS:
            raise InputError(f"align is one of {', '.join(ALIGNMENTS)} or a transform, got {self.align!r}")
        if not isinstance(self.align, str | sitk.Transform):
            raise InputError(f"align is one of {', '.join(ALIGNMENTS)} or a SimpleITK transform, got {self.align!r}")
        if isinstance(self.align, sitk.Transform) and (self.align.GetDimension() != 3 or not self.align.IsLinear()):
            raise InputError("the initial transform must be linear and three-dimensional (rigid, similarity or affine)")
        if isinstance(self.align, sitk.Transform) and not _is_invertible(affine_matrix(self.align)):
            raise InputError(
                "the initial transform is not finite or takes space to a plane; choose one with an inverse"
            )
        if isinstance(self.refine, bool) or not isinstance(self.refine, int) or self.refine < 0:
            raise InputError(f"refine is a number of steps, 0 or more, got {self.refine!r}")
        if self.interpolation not in INTERPOLATIONS:
            raise InputError(f"interpolation is one of {', '.join(INTERPOLATIONS)}, got {self.interpolation!r}")
        if self.default_value is not None and not _is_finite(self.default_value):
            raise InputError(f"default_value is a finite number, got {self.default_value!r}")
        if self.spacing is not None and not (_is_finite(self.spacing) and 0.1 <= self.spacing <= 50):
            raise InputError(f"spacing is a number of millimeters from 0.1 to 50, got {self.spacing!r}")
        if self.memory is not None and not (_is_finite(self.memory) and self.memory > 0):
            raise InputError(f"memory is a number of gigabytes, got {self.memory!r}")
        if not isinstance(self.device, str):
            raise InputError(f"device is auto, cpu, cuda or cuda:N, got {self.device!r}")

    def as_arguments(self) -> dict:
        """The options as keyword arguments of :func:`DivRegNetLib.registration.pipeline.register`."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def as_dict(self) -> dict:
        """Plain values, for records; a given transform is named by its matrix (LPS, mm)."""
        align = self.align if isinstance(self.align, str) else affine_matrix(self.align).tolist()
        return self.as_arguments() | {"align": align}


def _is_invertible(matrix: np.ndarray) -> bool:
    return bool(np.isfinite(matrix).all()) and abs(np.linalg.det(matrix[:3, :3])) > 1e-6


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
