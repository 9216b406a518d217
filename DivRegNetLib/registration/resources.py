"""What a registration computes with: the device, the model on it, and grids that fit into the memory.

This is the only place that falls back: to a coarser working resolution, and from a graphics card to the CPU.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import SimpleITK as sitk
import torch

from DivRegNetLib import models
from DivRegNetLib.core.device import CPU, free_memory, pick_device, why_not_cuda
from DivRegNetLib.core.grid import Grid
from DivRegNetLib.errors import DeviceError
from DivRegNetLib.models.card import WORKING_VOXELS
from DivRegNetLib.options import STAGES, Options
from DivRegNetLib.registration import memory

Load = Callable[[str, torch.device], models.Model]
"""Loads the model of a name onto a device, as :func:`DivRegNetLib.models.load` does."""
ON_WORKING_GRID = STAGES[STAGES.index("sample") :]  # stages that take less memory on a coarser working grid

THOROUGH = 3.4  # times the voxels of the working grid, two thirds of the spacing, where time does not matter


@dataclass(frozen=True)
class Resources:
    """Device, model and grids of one attempt at a registration.

    fixed, moving: the images; they are in memory already, which the plan takes into account.
    given_model: as it was given or loaded; it is not changed.
    model: the same, its networks on ``device``.
    region: the part of fixed space that the working grid covers.
    first_device: the device that the options name.
    device: where this attempt computes.
    grids: the working grid, and the grids of the displacement field and its inverse.
    """

    options: Options
    fixed: sitk.Image
    moving: sitk.Image
    given_model: models.Model
    model: models.Model
    region: Grid
    first_device: torch.device
    device: torch.device
    grids: memory.Plan

    @classmethod
    def choose(
        cls,
        options: Options,
        fixed: sitk.Image,
        moving: sitk.Image,
        model: models.Model | None,
        load: Load = models.load,
    ) -> "Resources":
        """The device that the options name, or the CPU if its memory is too small, and the finest grids that fit.

        Args:
            model: already loaded; None: the one that the options name, which ``load`` loads.
        Raises:
            DeviceError: the device cannot be used, or not even the coarsest grids fit.
            ModelError: the model cannot be used.
        """
        device = pick_device(options.device)
        model = model or load(options.model, device)
        region = Grid.of(fixed)
        unplanned = cls(options, fixed, moving, model, model, region, device, device, memory.Plan(*[region] * 3))
        return unplanned._on(device)

    def covering(self, region: Grid) -> "Resources":
        """The same, with a working grid that covers a part of fixed space: as many voxels as before, which are smaller.

        Raises:
            DeviceError: as :meth:`choose`.
        """
        return self if region == self.region else replace(self, region=region)._on(self.device)

    @property
    def working(self) -> Grid:
        """The working grid."""
        return self.grids.working

    @property
    def usual_spacing(self) -> float:
        """The model's own working resolution for this pair, mm."""
        voxels = WORKING_VOXELS * (THOROUGH if self.options.effort == "thorough" else 1)
        return self.given_model.card.working_spacing(self.region, Grid.of(self.moving), voxels)

    @property
    def requested_spacing(self) -> float:
        """The working resolution that the options ask for, mm."""
        return self.options.spacing or self.usual_spacing

    def estimate(self) -> memory.Estimate:
        """The memory of this attempt."""
        grids = Grid.of(self.fixed), Grid.of(self.moving)
        spacing = self.working.spacing[0]
        return memory.estimate(self.model.card, *grids, spacing=spacing, refine=self.options.refine)

    def smaller(self, stage: str) -> "Resources":
        """The resources of the next attempt after the memory ran out in a stage: a coarser working grid, then the CPU.

        Raises:
            DeviceError: neither is left.
        """
        mm = self.working.spacing[0]
        coarser = mm * memory.COARSER**2
        if stage in ON_WORKING_GRID and coarser <= max(self.requested_spacing, memory.COARSEST * self.usual_spacing):
            return self._planned(coarser)
        if self.device != CPU:
            torch.cuda.empty_cache()
            return self._on(CPU)
        raise no_memory(stage, f", the last time at {mm:.3g} mm" if stage in ON_WORKING_GRID else "")

    def compromises(self) -> list[str]:
        """Sentences on how the registration deviates from the options, and why."""
        sentences, fixed, asked = [], Grid.of(self.fixed), self.requested_spacing
        fine, coarse = memory.working_grid(self.model.card, self.region, asked).spacing[0], self.working.spacing[0]
        if coarse > asked * 1.001:
            reason = "the fixed image is so large" if coarse < fine * 1.001 else "there is so little memory"
            sentences.append(f"{reason} that the working resolution was lowered from {asked:g} to {coarse:.2g} mm")
        if self.grids.fixed != fixed or self.grids.moving != Grid.of(self.moving):
            spacing = max(self.grids.fixed.spacing)
            sentences.append(
                f"there is so little memory that the transforms hold a displacement every {spacing:.2g} mm only"
            )
        if self.device != self.first_device:
            sentences.append("the memory of the graphics card was too small, so that the CPU was used")
        elif self.options.device == "auto" and self.device == CPU and torch.cuda.device_count():
            sentences.append(f"the CPU was used: {why_not_cuda()}")
        return sentences

    def settings(self) -> dict:
        """For records: the values that ``auto`` and defaults were replaced by."""
        return {
            "device": str(self.device),
            "spacing": self.working.spacing[0],
            "working_size": list(self.working.size),
            "model_version": self.model.card.version,
        }

    def _on(self, device: torch.device) -> "Resources":
        """The same on a device, at the requested resolution; on the CPU if the memory of the device is too small."""
        placed = replace(self, device=device, model=self.given_model.on(device))
        try:
            return placed._planned(self.requested_spacing)
        except DeviceError:
            if device == CPU:
                raise
            return self._on(CPU)

    def _planned(self, finest: float) -> "Resources":
        """The same with the finest grids that fit into the memory, no finer than ``finest`` mm.

        Raises:
            DeviceError: not even the coarsest fit.
        """
        room = memory.room(self.options.memory, self.fixed, self.moving)
        on_device = None if self.device == CPU else free_memory(self.device) * memory.SPARE

        def fits(needed: memory.Estimate) -> bool:
            if on_device is None:
                return needed.cpu <= room
            return needed.host <= room and needed.device <= on_device

        grids = Grid.of(self.fixed), Grid.of(self.moving)
        return replace(self, grids=memory.plan(self.model.card, *grids, finest, self.options.refine, fits, self.region))


def no_memory(stage: str, where: str = "") -> DeviceError:
    """The error that is raised when no smaller resources are left to try."""
    return DeviceError(
        f"the memory ran out in step {stage!r}{where}: choose a coarser spacing, or device cpu, close other programs, or "
        "use a computer with more memory"
    )
