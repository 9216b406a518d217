"""One registration, from two images to a warped volume, transforms and a quality card.

Data flows one way: check -> affine -> sample -> predict -> refine -> physical -> outputs.
"""

import time
from dataclasses import dataclass, field

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor

from DivRegNetLib import affine, fields, metrics, models, physical
from DivRegNetLib.check import check_image, check_mask
from DivRegNetLib.errors import Cancelled, DeviceError, InputError, is_out_of_memory
from DivRegNetLib.geometry import Grid, affine_matrix, apply_matrix
from DivRegNetLib.intensity import normalise
from DivRegNetLib.options import INTERPOLATIONS, STAGES, Options, Progress
from DivRegNetLib.refine import refine

# Share of the time that each stage takes, for the progress bar.
STAGE_END = dict(zip(STAGES, (0.02, 0.35, 0.45, 0.6, 0.75, 0.9, 1.0), strict=True))


@dataclass(frozen=True)
class Result:
    """What a registration gives back.

    warped: the moving volume on the fixed grid, in full resolution, with the moving volume's pixel type.
    transform: displacement field on the fixed grid that maps fixed to moving points (LPS, mm), the initial alignment
        included; resampling the moving volume with it gives ``warped``.
    inverse: displacement field on the moving grid that maps moving to fixed points.
    initial: (4, 4) LPS matrix of the initial alignment, fixed -> moving.
    quality: see :func:`DivRegNetLib.metrics.quality`.
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


def pick_device(name: str) -> torch.device:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N`` as a device that is there.

    Raises:
        DeviceError: it is not there; InputError: no such name.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device is auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device is auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            f"device {name!r} is not there: torch finds {torch.cuda.device_count()} CUDA devices; use cpu"
        )
    return device


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
    warnings: list[str] = field(default_factory=list)

    def run(self) -> Result:
        for stage in STAGES:
            self.stage = stage
            self.report(0.0)
            started = time.perf_counter()
            try:
                with torch.inference_mode(False), torch.no_grad():
                    getattr(self, stage)()
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                spacing = f" than {self.grid.spacing[0]:g} mm" if hasattr(self, "grid") else ""
                raise DeviceError(
                    f"the memory ran out in step {stage!r}: choose a coarser spacing{spacing}, or device cpu"
                ) from error
            self.timings[stage] = time.perf_counter() - started
        self.report(1.0)
        return self.result

    def report(self, fraction: float) -> None:
        """Tells how far the present stage is, 0 to 1."""
        if self.progress is None:
            return
        end = STAGE_END[self.stage]
        start = max((e for e in STAGE_END.values() if e < end), default=0.0)
        if self.progress(self.stage, start + (end - start) * fraction) is False:
            raise Cancelled(f"cancelled in step {self.stage!r}")

    def check(self) -> None:
        self.fixed = check_image(self.fixed, "fixed")
        self.moving = check_image(self.moving, "moving")
        self.fixed_mask = check_mask(self.fixed_mask, self.fixed, "fixed")
        self.moving_mask = check_mask(self.moving_mask, self.moving, "moving")
        self.device = pick_device(self.options.device)
        self.model = self.model or models.load(self.options.model, self.device)
        self.model.regnet.to(self.device)
        spacing = self.options.spacing or self.model.card.spacing_mm
        self.grid = Grid.of(self.fixed).working_grid(spacing, multiple=self.model.regnet.config.multiple)
        if self.grid.spacing[0] > spacing * 1.001:
            self.warnings.append(
                f"the fixed image is so large that the working resolution was lowered from {spacing:g} to "
                f"{self.grid.spacing[0]:.2g} mm"
            )

    def affine(self) -> None:
        align = self.options.align
        if isinstance(align, sitk.Transform):
            self.initial = affine_matrix(align)
        else:
            self.initial = affine.align(
                self.fixed,
                self.moving,
                align,
                fixed_mask=self.fixed_mask,
                moving_mask=self.moving_mask,
                device=self.device,
                progress=self.report,
            )
        centres = Grid.of(self.fixed).to_physical(_lattice(self.fixed))
        if not Grid.of(self.moving).contains(apply_matrix(self.initial, centres)).any():
            raise InputError(
                "fixed and moving image do not overlap in physical space"
                + (" after the initial alignment" if align != "none" else "; choose an initial alignment")
            )

    def sample(self) -> None:
        self.f = self.on_working_grid(self.fixed, np.eye(4))
        self.f_mask = self.mask_on_working_grid(self.fixed_mask, np.eye(4))
        self.report(0.5)
        self.m = self.on_working_grid(self.moving, self.initial)
        self.m_mask = self.mask_on_working_grid(self.moving_mask, self.initial)

    def predict(self) -> None:
        """RegNet sees nothing outside the masks."""
        f, m = (x if mask is None else x * mask for x, mask in ((self.f, self.f_mask), (self.m, self.m_mask)))
        f, m = (x.contiguous(memory_format=torch.channels_last_3d) for x in (f, m))
        self.u = self.model.regnet(f, m).contiguous()

    def refine(self) -> None:
        if self.options.refine:
            self.u = refine(
                self.f,
                self.m,
                self.u,
                self.model.kldivnet,
                steps=self.options.refine,
                mask=self.f_mask,
                progress=self.report,
            )

    def physical(self) -> None:
        """On the CPU: full-resolution fields in double precision are large."""
        self.inverse_u = fields.invert(self.u)
        self.report(0.2)
        u, inverse_u = self.u.cpu(), self.inverse_u.cpu()
        self.transform = physical.forward_transform(u, self.grid, self.initial, Grid.of(self.fixed))
        self.report(0.5)
        self.inverse = physical.inverse_transform(u, inverse_u, self.grid, self.initial, Grid.of(self.moving))

    def outputs(self) -> None:
        default = self.options.default_value
        if default is None:
            default = -1024.0 if _minimum(self.moving) <= -900 else 0.0
        warped = physical.resample(
            self.moving, self.fixed, self.transform, INTERPOLATIONS[self.options.interpolation], default
        )
        self.report(0.5)
        quality = metrics.quality(
            self.f,
            self.on_working_grid(self.moving, np.eye(4)),
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
            warnings=tuple(self.warnings),
            card=self.model.card,
        )

    def on_working_grid(self, image: sitk.Image, matrix: np.ndarray) -> Tensor:
        """An image through a (4, 4) LPS map, normalised, (1, 1, D, H, W) on the device."""
        return normalise(self.tensor(physical.resample_smooth(image, self.grid, matrix)), self.model.card.normalisation)

    def mask_on_working_grid(self, mask: sitk.Image | None, matrix: np.ndarray) -> Tensor | None:
        """A mask through a (4, 4) LPS map, (1, 1, D, H, W) bool on the device; None stays None."""
        return None if mask is None else self.tensor(physical.resample_mask(mask, self.grid, matrix)) > 0.5

    def tensor(self, image: sitk.Image) -> Tensor:
        """An image on the working grid as (1, 1, D, H, W) float32 on the device."""
        array = sitk.GetArrayFromImage(image).astype(np.float32, copy=False)
        return torch.from_numpy(array)[None, None].to(self.device)


def _lattice(image: sitk.Image, n: int = 12) -> np.ndarray:
    """Up to n^3 voxel indices spread evenly over an image, (n^3, 3)."""
    axes = [np.linspace(0, size - 1, n) for size in image.GetSize()]
    return np.stack(np.meshgrid(*axes), -1).reshape(-1, 3)


def _minimum(image: sitk.Image) -> float:
    return float(sitk.GetArrayViewFromImage(image).min())
