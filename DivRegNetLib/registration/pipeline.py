"""One registration, from two images to a warped volume, transforms and a quality card.

Data flows one way: check -> affine -> sample -> predict -> refine -> physical -> outputs.
"""

import time
from dataclasses import dataclass, field, replace

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor

from DivRegNetLib import models
from DivRegNetLib.core import fields, physical_fields, resampling
from DivRegNetLib.core.grid import Grid, affine_matrix
from DivRegNetLib.core.intensity import normalize
from DivRegNetLib.errors import Cancelled, DeviceError, DivRegNetError, InputError, is_out_of_memory
from DivRegNetLib.options import INTERPOLATIONS, STAGES, Options, Progress
from DivRegNetLib.quality import metrics
from DivRegNetLib.registration import alignment, methods
from DivRegNetLib.registration.check import check_default, check_image, check_mask
from DivRegNetLib.run import memory
from DivRegNetLib.run.device import CPU, free_memory, pick_device, why_not_cuda
from DivRegNetLib.similarity.kldivnet import patches

FEWEST_PATCHES = 4  # that a similarity can be estimated from
AGAIN = STAGES[STAGES.index("sample") :]  # what is done again at another resolution or on another device
# Share of the time that each stage takes, for the progress bar.
STAGE_END = dict(zip(STAGES, (0.02, 0.35, 0.45, 0.6, 0.75, 0.9, 1.0), strict=True))


@dataclass(frozen=True)
class Result:
    """What a registration gives back.

    warped: the moving volume on the fixed grid, in full resolution, with the moving volume's pixel type.
    transform: displacement field on the fixed grid that maps fixed to moving points (LPS, mm), the initial alignment
        included; resampling the moving volume with it gives ``warped``. Where there is not the memory for every voxel,
        on every n-th.
    inverse: displacement field on the moving grid that maps moving to fixed points, likewise.
    initial: (4, 4) LPS matrix of the initial alignment, fixed -> moving.
    quality: see :func:`DivRegNetLib.quality.metrics.quality`.
    timings: seconds per stage.
    settings: the options, and what ``auto`` and defaults came to.
    warnings: sentences the user should read.
    card: of the model.
    """

    warped: sitk.Image
    transform: sitk.DisplacementFieldTransform
    inverse: sitk.DisplacementFieldTransform
    initial: np.ndarray
    quality: dict
    timings: dict[str, float]
    settings: dict
    warnings: tuple[str, ...]
    card: models.Card


def register(
    fixed: sitk.Image,
    moving: sitk.Image,
    *,
    fixed_mask: sitk.Image | None = None,
    moving_mask: sitk.Image | None = None,
    progress: Progress | None = None,
    model: models.Model | str | None = None,
    **options,
) -> Result:
    """Registers the moving to the fixed image.

    Args:
        fixed, moving: 3D scalar images, each on a grid of its own.
        fixed_mask, moving_mask: non-zero where the image is to be looked at, on any grid.
        progress: called with stage and fraction; returning False cancels.
        model: name, path of a card, or a :class:`~DivRegNetLib.models.Model` already loaded.
        options: fields of :class:`~DivRegNetLib.options.Options`.
    Raises:
        InputError: an image, mask or option that cannot be used; the message says which and why.
        ModelError: the model cannot be used.
        DeviceError: the device is not there or its memory too small.
        Cancelled: the progress callback returned False.
    """
    loaded = model if isinstance(model, models.Model) else None
    if loaded is not None:
        options["model"] = loaded.card.name
    elif model is not None:
        options["model"] = model
    try:
        asked = Options(**options)
    except TypeError as error:
        raise InputError(f"unknown option: {error}; options are {', '.join(Options.__dataclass_fields__)}") from error
    return _Registration(asked, fixed, moving, fixed_mask, moving_mask, progress, loaded).run()


@dataclass
class _Registration:
    """The steps, in order; each reads what those before left and is named in STAGES."""

    options: Options
    fixed: sitk.Image
    moving: sitk.Image
    fixed_mask: sitk.Image | None
    moving_mask: sitk.Image | None
    progress: Progress | None
    model: models.Model | None
    timings: dict[str, float] = field(default_factory=dict)
    told: float = 0.0
    device: torch.device = CPU

    def run(self) -> Result:
        waiting = list(STAGES)
        while waiting:
            if self.perform(waiting[0]):
                del waiting[0]
            else:
                self.fall_back()
                waiting = [stage for stage in STAGES if stage in waiting or stage in AGAIN]
        self.report(1.0)
        return self.result

    def perform(self, stage: str) -> bool:
        """Does a step; False where the memory ran out, and what the step had taken is free again."""
        self.stage = stage
        self.report(0.0)
        started = time.perf_counter()
        try:
            # Faster than no_grad alone. But a model loaded in it could never be trained, and the alignment takes gradients.
            with torch.no_grad(), torch.inference_mode(stage not in ("check", "affine")):
                getattr(self, stage)()
            return True
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, DivRegNetError) or not is_out_of_memory(error):
                raise
            return False
        finally:
            self.timings[stage] = self.timings.get(stage, 0.0) + time.perf_counter() - started

    def fall_back(self) -> None:
        """After the memory ran out: coarser, then on the CPU.

        Raises:
            DeviceError: neither is left.
        """
        for name in ("f", "m", "unaligned", "f_mask", "m_mask", "valid", "u", "inverse_u", "transform", "inverse"):
            vars(self).pop(name, None)
        memory.give_back()
        at = f", the last time at {self.grid.spacing[0]:.3g} mm" if self.stage in AGAIN else ""
        finest = self.grid.spacing[0] * memory.COARSER**2 if at else np.inf
        if finest <= max(self.asked, memory.COARSEST * self.usual):
            self.plan(finest)
        elif self.device != CPU and self.stage != "check":
            torch.cuda.empty_cache()
            self.use(CPU)
            self.plan(self.asked)
        else:
            raise DeviceError(
                f"the memory ran out in step {self.stage!r}{at}: choose a coarser spacing, or device cpu, close other "
                "programs, or use a computer with more memory"
            )

    def report(self, fraction: float) -> None:
        """Tells how far the present stage is, 0 to 1."""
        if self.progress is None:
            return
        end = STAGE_END[self.stage]
        start = max((e for e in STAGE_END.values() if e < end), default=0.0)
        self.told = max(self.told, start + (end - start) * fraction)  # what is done again is not told again
        if self.progress(self.stage, self.told) is False:
            raise Cancelled(f"cancelled in step {self.stage!r}")

    def check(self) -> None:
        self.fixed = check_image(self.fixed, "fixed")
        self.moving = check_image(self.moving, "moving")
        self.fixed_mask = check_mask(self.fixed_mask, self.fixed, "fixed")
        self.moving_mask = check_mask(self.moving_mask, self.moving, "moving")
        if self.options.default_value is not None:
            check_default(self.options.default_value, self.moving)
        self.chosen = pick_device(self.options.device)
        self.model = self.model or models.load(self.options.model, self.chosen)
        self.use(self.chosen)
        self.usual = self.model.card.working_spacing(Grid.of(self.fixed), Grid.of(self.moving))
        self.asked = self.options.spacing or self.usual
        self.plan(self.asked)

    def use(self, device: torch.device) -> None:
        self.device = device
        for network in (self.model.regnet, self.model.kldivnet):
            if network is not None:
                network.to(device)

    def plan(self, finest: float) -> None:
        """Chooses the grids: as fine as asked for where there is the memory for it, and no finer than ``finest`` mm.

        Raises:
            DeviceError: there is not even the memory for the coarsest.
        """
        room = memory.room(self.options.memory, self.fixed, self.moving)
        on_device = free_memory(self.device) * memory.SPARE if self.device != CPU else None

        def fits(needed: memory.Estimate) -> bool:
            if on_device is None:
                return needed.cpu <= room
            return needed.host <= room and needed.device <= on_device

        grids = Grid.of(self.fixed), Grid.of(self.moving)
        try:
            self.grids = memory.plan(self.model.card, *grids, finest, self.options.refine, fits)
        except DeviceError:
            if self.device == CPU:
                raise
            self.use(CPU)
            self.plan(self.asked)
        self.grid = self.grids.working

    def compromises(self) -> list[str]:
        """What was done otherwise than asked for, and why."""
        found, fixed = [], Grid.of(self.fixed)
        fine = memory.working_grid(self.model.card, fixed, self.asked).spacing[0]
        coarse = self.grid.spacing[0]
        if coarse > self.asked * 1.001:
            reason = "the fixed image is so large" if coarse < fine * 1.001 else "there is so little memory"
            found.append(f"{reason} that the working resolution was lowered from {self.asked:g} to {coarse:.2g} mm")
        if self.grids.fixed != fixed or self.grids.moving != Grid.of(self.moving):
            spacing = max(self.grids.fixed.spacing)
            found.append(
                f"there is so little memory that the transforms hold a displacement every {spacing:.2g} mm only"
            )
        if self.device != self.chosen:
            found.append("the memory of the graphics card was too small, so that the CPU was used")
        elif self.options.device == "auto" and self.device == CPU and torch.cuda.device_count():
            found.append(f"the CPU was used: {why_not_cuda()}")
        return found

    def affine(self) -> None:
        align = self.options.align
        if isinstance(align, sitk.Transform):
            self.initial = affine_matrix(align)
        else:
            self.initial = alignment.align(
                self.fixed,
                self.moving,
                align,
                fixed_mask=self.fixed_mask,
                moving_mask=self.moving_mask,
                device=self.device,
                progress=self.report,
            )
        moving = Grid.of(self.moving)
        if not Grid.of(self.fixed).overlaps(Grid(moving.size, np.linalg.inv(self.initial) @ moving.matrix)):
            raise InputError(
                "fixed and moving image do not overlap in physical space"
                + (" after the initial alignment" if align != "none" else "; choose an initial alignment")
            )

    def sample(self) -> None:
        here = np.eye(4)
        ((self.f, seen),) = self.on_working_grid(self.fixed, here)
        self.f_mask = self.mask_on_working_grid(self.fixed_mask, here)
        self.report(0.5)
        maps = [self.initial] if np.array_equal(self.initial, here) else [self.initial, here]
        (self.m, also_seen), *others = self.on_working_grid(self.moving, *maps)
        self.unaligned = others[0][0] if others else self.m
        self.m_mask = self.mask_on_working_grid(self.moving_mask, self.initial)
        self.valid = seen, also_seen
        self.check_seen("fixed", self.f, self.f_mask)
        self.check_seen("moving", self.m, self.m_mask)

    def check_seen(self, name: str, image: Tensor, mask: Tensor | None) -> None:
        """Raises InputError where an image (1, 1, D, H, W), inside its mask, is flat or too small on the working grid."""
        seen = image if mask is None else image[mask]
        similarity = self.model.kldivnet
        if mask is not None and similarity is not None:
            blocks = int(patches(mask, similarity.config.patch).all(-1).sum())
            if blocks < FEWEST_PATCHES:
                raise InputError(
                    f"the {name} mask covers {blocks} blocks of {similarity.config.patch} voxels of "
                    f"{self.grid.spacing[0]:.3g} mm, too few to compare; draw a larger mask or choose a finer spacing"
                )
        if not seen.numel() or seen.min() == seen.max():
            where = (" inside its mask" if mask is not None else "") + (
                " where the fixed one is" if name == "moving" else ""
            )
            raise InputError(
                f"at {self.grid.spacing[0]:.3g} mm the {name} image is flat{where}; choose a finer spacing, a larger mask "
                "or another initial alignment"
            )

    def images(self) -> methods.Images:
        return methods.Images(self.f, self.m, self.f_mask, self.m_mask, self.valid)

    def predict(self) -> None:
        card = self.model.card
        self.u = methods.deform(
            self.images(), tuple(card.methods), card.variational_settings, self.model.regnet, self.report
        )

    def refine(self) -> None:
        if self.options.refine:
            settings = replace(self.model.card.refinement_settings, steps=self.options.refine)
            self.u = methods.refine(self.images(), self.u, settings, self.report)

    def physical(self) -> None:
        """On the CPU: full-resolution fields in double precision are large."""
        self.inverse_u = fields.invert(self.u)
        self.report(0.2)
        u, inverse_u = self.u.cpu(), self.inverse_u.cpu()
        self.transform = physical_fields.forward_transform(u, self.grid, self.initial, self.grids.fixed)
        self.report(0.5)
        self.inverse = physical_fields.inverse_transform(u, inverse_u, self.grid, self.initial, self.grids.moving)

    def outputs(self) -> None:
        default = self.options.default_value
        if default is None:
            default = -1024.0 if _minimum(self.moving) <= -900 else 0.0
        warped = resampling.resample(
            self.moving, self.fixed, self.transform, INTERPOLATIONS[self.options.interpolation], default
        )
        shown = sitk.GetArrayViewFromImage(warped)
        if shown.min() == shown.max():
            raise InputError(
                "nothing of the moving image is left where the fixed one is: they have too little in common; choose another "
                "initial alignment, or crop the larger one"
            )
        self.report(0.5)
        quality = metrics.quality(
            self.f,
            self.unaligned,
            self.m,
            self.u,
            self.inverse_u,
            self.grid.spacing[0],
            self.model.kldivnet,
            mask=self.f_mask,
        )
        settings = self.options.as_dict() | {
            "device": str(self.device),
            "default_value": default,
            "spacing": self.grid.spacing[0],
            "working_size": list(self.grid.size),
            "model_version": self.model.card.version,
        }
        self.result = Result(
            warped=warped,
            transform=self.transform,
            inverse=self.inverse,
            initial=self.initial,
            quality=quality,
            timings=self.timings,
            settings=settings,
            warnings=tuple(self.compromises()),
            card=self.model.card,
        )

    def on_working_grid(self, image: sitk.Image, *matrices: np.ndarray) -> list[tuple[Tensor, Tensor]]:
        """An image through each of some (4, 4) LPS maps, normalized, and where it was measured (bool); both
        (1, 1, D, H, W) on the device."""
        found = []
        for matrix, resampled in zip(matrices, resampling.resample_smooth(image, self.grid, *matrices), strict=True):
            inside = resampling.field_of_view(Grid.of(image), self.grid, matrix)
            seen = torch.from_numpy(inside)[None, None].to(self.device)
            found.append((normalize(self.tensor(resampled), self.model.card.normalization, seen), seen))
        return found

    def mask_on_working_grid(self, mask: sitk.Image | None, matrix: np.ndarray) -> Tensor | None:
        """A mask through a (4, 4) LPS map, (1, 1, D, H, W) bool on the device; None stays None."""
        return None if mask is None else self.tensor(resampling.resample_mask(mask, self.grid, matrix)) > 0.5

    def tensor(self, image: sitk.Image) -> Tensor:
        """An image on the working grid as (1, 1, D, H, W) float32 on the device."""
        array = sitk.GetArrayFromImage(image).astype(np.float32, copy=False)
        return torch.from_numpy(array)[None, None].to(self.device)


def _minimum(image: sitk.Image) -> float:
    return float(sitk.GetArrayViewFromImage(image).min())
