"""What a registration gives back: the one dataclass that comes out. No torch here."""

from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk

from DivRegNetLib.models.card import Card
from DivRegNetLib.quality.verdict import Verdict, judge


@dataclass(frozen=True)
class Result:
    """A registration of a moving to a fixed image.

    warped: the moving volume on the fixed grid, at full resolution, in the moving volume's pixel type.
    transform: maps fixed points to moving points (LPS, mm); resampling the moving volume with it gives ``warped``. The
        composite of the initial alignment and a displacement field, which covers the fixed grid and fades out around it
        (see :mod:`DivRegNetLib.core.composites`). Where memory does not allow a displacement at every voxel, there
        is one at every n-th.
    inverse: maps moving points to fixed points, likewise, with a field on the moving grid; None where it was not asked for.
    initial: (4, 4) matrix of the initial alignment; maps fixed points to moving points (LPS, mm).
    quality: see :func:`DivRegNetLib.quality.metrics.quality`.
    timings: seconds per stage, by the names of :data:`DivRegNetLib.options.STAGES`.
    settings: the options, with the values that ``auto`` and None stood for.
    warnings: sentences the user should read.
    card: of the model.
    error_map: expected error (mm) at every voxel of the working grid, float32, 0 where nothing is known; None unless it was
        asked for. :func:`DivRegNetLib.quality.expected_error.on_grid` brings it to another grid.
    """

    warped: sitk.Image
    transform: sitk.CompositeTransform
    inverse: sitk.CompositeTransform | None
    initial: np.ndarray
    quality: dict
    timings: dict[str, float]
    settings: dict
    warnings: tuple[str, ...]
    card: Card
    error_map: sitk.Image | None = None

    @property
    def verdict(self) -> Verdict:
        """What the quality card means: a level, the expected error in mm, and reasons."""
        return judge(self.quality)
