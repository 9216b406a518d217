"""One registration, from two images to a warped volume, transforms and a quality card.

Data flows one way, each value made by a function of those before it::

    images -> Inputs -> Alignment -> Sampled -> displacement -> Fields -> Result
           check     align              sample    deform, refine    fields    outputs

:func:`register` runs these stages. Where the memory runs out, it goes on with the smaller
:class:`~DivRegNetLib.registration.resources.Resources` that :mod:`DivRegNetLib.registration.resources` allows.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor

from DivRegNetLib import models
from DivRegNetLib.core import fields, physical_fields, resampling, torch_resampling
from DivRegNetLib.core.device import free_memory
from DivRegNetLib.core.foreground import covered_region
from DivRegNetLib.core.grid import Grid, affine_matrix
from DivRegNetLib.core.intensity import AIR_HU, normalize
from DivRegNetLib.core.recording import SPARE
from DivRegNetLib.core.torch_resampling import Resampling
from DivRegNetLib.core.torch_state import default_state
from DivRegNetLib.errors import Cancelled, DivRegNetError, InputError, is_out_of_memory
from DivRegNetLib.options import INTERPOLATIONS, LANDMARK_ALIGNMENTS, STAGES, Options, Progress
from DivRegNetLib.quality import evidence, expected_error, metrics
from DivRegNetLib.quality.evidence import Evidence
from DivRegNetLib.registration import alignment, memory, methods, selection
from DivRegNetLib.registration.alignment import Alignment
from DivRegNetLib.registration.check import check_default, check_image, check_mask
from DivRegNetLib.registration.methods import Images
from DivRegNetLib.registration.resources import Load, Resources, no_memory
from DivRegNetLib.registration.selection import Choice
from DivRegNetLib.result import Result
from DivRegNetLib.similarity.kldivnet import patches

MINIMUM_PATCHES = 4  # that a similarity can be estimated from
AIR_IN_CT = -900.0  # Hounsfield units; an image that holds lower values is taken for a CT
# Fraction of the whole that is done when each stage ends, for the progress bar.
STAGE_END = dict(zip(STAGES, (0.02, 0.35, 0.45, 0.6, 0.75, 0.9, 1.0), strict=True))


@default_state()
def register(
    fixed: sitk.Image,
    moving: sitk.Image,
    *,
    fixed_mask: sitk.Image | None = None,
    moving_mask: sitk.Image | None = None,
    progress: Progress | None = None,
    model: models.Model | str | None = None,
    load: Load = models.load,
    inverse: bool = True,
    **options,
) -> Result:
    """Registers the moving to the fixed image.

    Args:
        fixed, moving: 3D scalar images, each on a grid of its own.
        fixed_mask, moving_mask: non-zero where the image is compared, on any grid.
        progress: called with the stage and the fraction that is done; returning False cancels.
        model: name, path of a card, or a :class:`~DivRegNetLib.models.Model` already loaded, which is not changed.
        load: how a model is loaded by name; that of a :class:`~DivRegNetLib.models.Cache` keeps it for the next time.
        inverse: False leaves the inverse transform out, which takes as long, and as much memory, as the transform itself.
        options: fields of :class:`~DivRegNetLib.options.Options`.
    Raises:
        InputError: an image, mask or option that cannot be used; the message says which and why.
        ModelError: the model cannot be used.
        DeviceError: the device is not there or its memory is too small.
        Cancelled: the progress callback returned False.
    """
    loaded = model if isinstance(model, models.Model) else None
    if model is not None:
        options["model"] = loaded.card.name if loaded else model
    options = Options.of(**options)
    stages = Stages(progress)
    try:
        inputs = stages.run("check", check, fixed, moving, fixed_mask, moving_mask, options)
        resources = stages.run("check", Resources.choose, options, inputs.fixed, inputs.moving, loaded, load)
    except OutOfMemory as error:
        raise no_memory(error.stage) from error
    aligned = None
    while True:
        try:
            if aligned is None:
                aligned = stages.run("align", align, inputs, options, progress=True)
                resources = stages.run("align", cover, inputs, aligned.matrix, resources)
            return _deform_and_warp(inputs, aligned, resources, options, inverse, stages)
        except OutOfMemory as error:
            stage = error.stage
        # The exception, and with it the memory of the attempt, is released here.
        memory.give_back()
        resources = resources.smaller(stage)


@dataclass(frozen=True)
class Inputs:
    """Images and masks that were checked; masks are uint8 of 0 and 1, or None."""

    fixed: sitk.Image
    moving: sitk.Image
    fixed_mask: sitk.Image | None
    moving_mask: sitk.Image | None


@dataclass(frozen=True)
class Sampled:
    """Both images on the working grid.

    grid: isotropic, in fixed space.
    images: the input of the methods.
    unaligned: (1, 1, D, H, W) the moving image without the initial alignment.
    """

    grid: Grid
    images: Images
    unaligned: Tensor


@dataclass(frozen=True)
class Fields:
    """The deformation in both directions.

    displacement, inverse_displacement: (1, 3, D, H, W) in voxels of the working grid, without the initial alignment.
    transform, inverse: in physical space, see :class:`~DivRegNetLib.result.Result`.
    warped: the moving volume on the fixed grid, where it was resampled along; otherwise None.
    """

    displacement: Tensor
    inverse_displacement: Tensor
    transform: sitk.CompositeTransform
    inverse: sitk.CompositeTransform | None
    warped: sitk.Image | None


def _deform_and_warp(
    inputs: Inputs, aligned: Alignment, resources: Resources, options: Options, inverse: bool, stages: "Stages"
) -> Result:
    """The stages after the alignment, with the device and the grids that ``resources`` names.

    Raises:
        OutOfMemory: names the stage.
    """
    matrix = aligned.matrix
    sampled = stages.run("sample", sample, inputs, matrix, resources, progress=True)
    chosen = stages.run("deform", deform, sampled, resources, options, progress=True)
    displacement = stages.run("refine", refine, sampled, chosen, resources, options, progress=True)
    default = default_value(options, inputs.moving)
    along = partial(_resampled_along, inputs, matrix, resources, options, default)
    both = stages.run(
        "fields", to_physical, displacement, sampled.grid, matrix, resources, along, inverse, progress=True
    )
    warped = stages.run("outputs", warp, inputs, both, options, default)
    quality, known = stages.run("outputs", measure, sampled, both, resources.model, progress=True)
    if options.method != "none":
        quality["deformation"] = chosen.as_dict()
    stages.finish()
    return Result(
        warped=warped,
        transform=both.transform,
        inverse=both.inverse,
        initial=matrix,
        quality=quality,
        timings=stages.seconds,
        settings=options.as_dict() | resources.settings() | {"default_value": default},
        warnings=(*aligned.warnings, *resources.compromises()),
        card=resources.model.card,
        error_map=map_error(known, sampled.grid) if options.error_map else None,
    )


# --- the stages


def check(
    fixed: sitk.Image,
    moving: sitk.Image,
    fixed_mask: sitk.Image | None,
    moving_mask: sitk.Image | None,
    options: Options,
) -> Inputs:
    """Raises InputError for an image, a mask or a default value that cannot be used."""
    fixed, moving = check_image(fixed, "fixed"), check_image(moving, "moving")
    masks = check_mask(fixed_mask, fixed, "fixed"), check_mask(moving_mask, moving, "moving")
    if options.default_value is not None:
        check_default(options.default_value, moving)
    return Inputs(fixed, moving, *masks)


def align(inputs: Inputs, options: Options, *, progress: Callable[[float], None]) -> Alignment:
    """The initial alignment: that of the options, or the one that the images suggest.

    Raises:
        InputError: the images do not overlap after it.
    """
    if isinstance(options.align, sitk.Transform):
        aligned = Alignment(affine_matrix(options.align))
    elif options.align in LANDMARK_ALIGNMENTS:
        raise InputError(
            f"the initial alignment {options.align!r} needs landmarks, which only files come with; fit a transform to yours "
            "(DivRegNetLib.registration.landmark_alignment) and give it instead"
        )
    else:
        aligned = alignment.find(
            inputs.fixed,
            inputs.moving,
            options.align,
            fixed_mask=inputs.fixed_mask,
            moving_mask=inputs.moving_mask,
            progress=progress,
        )
    moving = Grid.of(inputs.moving)
    if not Grid.of(inputs.fixed).overlaps(Grid(moving.size, np.linalg.inv(aligned.matrix) @ moving.matrix)):
        remedy = "; choose an initial alignment" if options.align == "none" else " after the initial alignment"
        raise InputError("fixed and moving image do not overlap in physical space" + remedy)
    return aligned


def cover(inputs: Inputs, matrix: np.ndarray, resources: Resources) -> Resources:
    """The resources with a working grid that covers what the fixed image shows, and not the air around it."""
    masks = inputs.fixed_mask, inputs.moving_mask
    return resources.covering(covered_region(inputs.fixed, inputs.moving, matrix, *masks))


def sample(inputs: Inputs, matrix: np.ndarray, resources: Resources, *, progress: Callable[[float], None]) -> Sampled:
    """Both images and masks on the working grid, normalized, and what the model's class network sees in them.

    Raises:
        InputError: on the working grid an image is constant, or a mask too small.
    """
    grid, model, unmoved = resources.working, resources.model, np.eye(4)
    on_grid = partial(_on_working_grid, grid=grid, scheme=model.card.normalization, device=resources.device)
    mask_on_grid = partial(_mask_on_working_grid, grid=grid, device=resources.device)
    ((fixed, fixed_valid),) = on_grid(inputs.fixed, [unmoved])
    fixed_mask = mask_on_grid(inputs.fixed_mask, unmoved)
    progress(0.5)
    matrices = [matrix] if np.array_equal(matrix, unmoved) else [matrix, unmoved]
    (moving, moving_valid), *others = on_grid(inputs.moving, matrices)
    unaligned = others[0][0] if others else moving
    moving_mask = mask_on_grid(inputs.moving_mask, matrix)
    _check_sampled("fixed", fixed, fixed_mask, grid, model)
    _check_sampled("moving", moving, moving_mask, grid, model)
    valid, measured = (fixed_valid, moving_valid), int((fixed_valid & moving_valid).sum())
    images = Images(fixed, moving, fixed_mask, moving_mask, valid, measured)
    if model.classnet is not None and model.card.classes_cover(grid):
        images = methods.with_classes(images, model.classnet)
    return Sampled(grid, images, unaligned)


def deform(sampled: Sampled, resources: Resources, options: Options, *, progress: Callable[[float], None]) -> Choice:
    """The deformation that the methods compute, with the stiffness of the options or the one that suits the pair.

    Raises:
        InputError: the option ``method`` asks for a network that the model does not have.
    """
    if options.method == "none":
        return selection.no_deformation(sampled.images)
    card = resources.model.card
    names = tuple(card.methods if options.method == "auto" else options.method.split("+"))
    if "regnet" in names and resources.model.regnet is None:
        raise InputError(f"method {options.method!r} needs a RegNet, which model {card.name!r} does not have")
    run = methods.deform
    if resources.device.type == "cuda":
        room = free_memory(resources.device) > SPARE * resources.estimate().device
        run = methods.recorded_deform(resources.model.recorder(), room=room)
    settings, regnet = card.variational_settings.with_effort(options.effort), resources.model.regnet
    how = {"thorough": options.effort == "thorough", "run": run, "progress": progress}
    return selection.deform(sampled.images, names, settings, regnet, options.stiffness, **how)


def refine(
    sampled: Sampled, chosen: Choice, resources: Resources, options: Options, *, progress: Callable[[float], None]
) -> Tensor:
    """The displacement (1, 3, D, H, W) in voxels of the working grid after refinement, if the options ask for it, there is a
    deformation, and it improves the objective."""
    if not options.refine or chosen.candidate.name == selection.NO_DEFORMATION:
        return chosen.displacement
    settings = replace(resources.model.card.refinement_settings, steps=options.refine)
    settings = selection.stiffened(settings, chosen.candidate.stiffness or 1.0)
    return methods.refine(sampled.images, chosen.displacement, settings, progress)


def to_physical(
    displacement: Tensor,
    grid: Grid,
    matrix: np.ndarray,
    resources: Resources,
    resampling_along: Callable[[], Resampling | None],
    with_inverse: bool,
    *,
    progress: Callable[[float], None],
) -> Fields:
    """Displacement fields in mm, composed with the initial alignment, and the moving volume resampled along with the forward
    one. They are kept in main memory: at full resolution in double precision they are large."""
    back = fields.invert(displacement)
    progress(0.2)
    grids = resources.grids
    along = resampling_along()
    transform = physical_fields.forward_transform(displacement, grid, matrix, grids.fixed, along)
    warped = None if along is None else along.warped
    del along  # it holds the moving volume once more
    progress(0.6)
    inverse = None
    if with_inverse:
        inverse = physical_fields.inverse_transform(displacement, back, grid, matrix, grids.moving)
    return Fields(displacement, back, transform, inverse, warped)


def _resampled_along(
    inputs: Inputs, matrix: np.ndarray, resources: Resources, options: Options, default: float
) -> Resampling | None:
    """What resamples the moving volume while its displacements are computed; None where that has to be left to SimpleITK: for
    other interpolations and some types of pixels, where there is no displacement for every voxel, and where the graphics
    card has no memory for it."""
    fixed, device = Grid.of(inputs.fixed), resources.device
    linear = INTERPOLATIONS[options.interpolation] == sitk.sitkLinear
    if not linear or resources.grids.fixed != fixed or not torch_resampling.can_resample(inputs.moving):
        return None
    if device.type == "cuda":
        room = free_memory(device) * memory.SPARE
        if torch_resampling.memory(inputs.moving, fixed, device) > room:
            return None
    return Resampling(inputs.moving, inputs.fixed, matrix, default, device)


def default_value(options: Options, moving: sitk.Image) -> float:
    """The value of the warped volume outside the moving one: that of the options, or air for a CT, or 0."""
    if options.default_value is not None:
        return options.default_value
    return AIR_HU if float(sitk.GetArrayViewFromImage(moving).min()) <= AIR_IN_CT else 0.0


def warp(inputs: Inputs, both: Fields, options: Options, default: float) -> sitk.Image:
    """The moving volume on the fixed grid.

    Raises:
        InputError: the warped volume is constant.
    """
    warped = both.warped
    if warped is None:
        interpolator = INTERPOLATIONS[options.interpolation]
        warped = resampling.resample(inputs.moving, inputs.fixed, both.transform, interpolator, default)
    values = sitk.GetArrayViewFromImage(warped)
    if values.min() == values.max():
        raise InputError(
            "the warped moving image is empty inside the fixed image: the two have too little in common; choose another "
            "initial alignment, or crop the larger one"
        )
    return warped


def measure(
    sampled: Sampled, both: Fields, model: models.Model, *, progress: Callable[[float], None]
) -> tuple[dict, Evidence | None]:
    """The quality card, see :func:`DivRegNetLib.quality.metrics.quality`, with the numbers of the evidence."""
    progress(0.5)
    images = sampled.images
    quality = metrics.quality(
        images.fixed,
        sampled.unaligned,
        images.moving,
        both.displacement,
        both.inverse_displacement,
        sampled.grid.spacing[0],
        model.kldivnet,
        mask=images.fixed_mask,
    )
    progress(0.8)
    known = gather_evidence(sampled, both.displacement)
    return quality | {"evidence": None if known is None else known.numbers}, known


def gather_evidence(sampled: Sampled, displacement: Tensor) -> Evidence | None:
    """The evidence of how well a displacement (1, 3, D, H, W), in voxels of the working grid, aligns the images; None where
    they have next to nothing in common after it."""
    images = sampled.images
    fixed_valid, moving_valid = images.measured_in_masks() or (torch.ones_like(images.fixed, dtype=torch.bool),) * 2
    both = fields.warp(torch.cat((images.moving, moving_valid.to(images.moving.dtype)), 1), displacement)
    valid = fixed_valid & (both[:, 1:] > evidence.MEASURED)
    return evidence.measure(images.fixed, both[:, :1], sampled.grid, valid=valid, displacement=displacement)


def map_error(known: Evidence | None, grid: Grid) -> sitk.Image:
    """The expected error (mm) on a grid, float32; 0 where nothing is known."""
    if known is None:
        return grid.empty_image()
    return expected_error.error_map(known.numbers, known.cells, known.grid, grid)


# --- sampling


def _on_working_grid(
    image: sitk.Image, matrices: list[np.ndarray], *, grid: Grid, scheme: str, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """An image through each of some (4, 4) LPS maps, normalized, and where it was measured (bool); both
    (1, 1, D, H, W) on the device."""
    pairs = []
    for matrix, resampled in zip(matrices, resampling.resample_smooth(image, grid, *matrices), strict=True):
        inside = resampling.field_of_view(Grid.of(image), grid, matrix)
        valid = torch.from_numpy(inside)[None, None].to(device)
        pairs.append((normalize(_tensor(resampled, device), scheme, valid), valid))
    return pairs


def _mask_on_working_grid(
    mask: sitk.Image | None, matrix: np.ndarray, *, grid: Grid, device: torch.device
) -> Tensor | None:
    """A mask through a (4, 4) LPS map, (1, 1, D, H, W) bool on the device; None for None."""
    return None if mask is None else _tensor(resampling.resample_mask(mask, grid, matrix), device) > 0.5


def _tensor(image: sitk.Image, device: torch.device) -> Tensor:
    """An image on the working grid as (1, 1, D, H, W) float32 on the device."""
    array = sitk.GetArrayFromImage(image).astype(np.float32, copy=False)
    return torch.from_numpy(array)[None, None].to(device)


def _check_sampled(name: str, image: Tensor, mask: Tensor | None, grid: Grid, model: models.Model) -> None:
    """Raises InputError where an image (1, 1, D, H, W), inside its mask, is flat or too small on the working grid."""
    mm = grid.spacing[0]
    if mask is not None and model.kldivnet is not None:
        side = model.kldivnet.config.patch
        count = int(patches(mask, side).all(-1).sum())
        if count < MINIMUM_PATCHES:
            raise InputError(
                f"the {name} mask covers {count} blocks of {side} voxels of {mm:.3g} mm, too few to compare; draw a larger "
                "mask or choose a finer spacing"
            )
    inside = image if mask is None else image[mask]
    if not inside.numel() or inside.min() == inside.max():
        where = " inside its mask" if mask is not None else ""
        where += " where the fixed one is" if name == "moving" else ""
        raise InputError(
            f"at {mm:.3g} mm the {name} image is flat{where}; choose a finer spacing, a larger mask or another initial "
            "alignment"
        )


# --- running stages


class OutOfMemory(Exception):
    """The memory ran out in a stage."""

    def __init__(self, stage: str) -> None:
        super().__init__(stage)
        self.stage = stage


class Stages:
    """Runs stages: measures their time, reports progress, and says in which one the memory ran out.

    seconds: per stage, of all attempts together.
    """

    def __init__(self, progress: Progress | None) -> None:
        self.seconds: dict[str, float] = {}
        self._progress, self._reported = progress, 0.0

    def run(self, stage: str, function: Callable, *arguments, progress: bool = False):
        """Runs ``function(*arguments)`` and returns its result.

        Args:
            progress: the function has a keyword ``progress``, which it calls with the fraction of the stage that is done.
        Raises:
            OutOfMemory: the memory ran out in it.
            Cancelled: the progress callback returned False.
        """
        self.report(stage, 0.0)
        keywords = {"progress": partial(self.report, stage)} if progress else {}
        started = time.perf_counter()
        try:
            # Inference mode is faster than no_grad alone. But a model that is loaded in inference mode could never be
            # trained.
            with torch.no_grad(), torch.inference_mode(stage != "check"):
                return function(*arguments, **keywords)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, DivRegNetError) or not is_out_of_memory(error):
                raise
            raise OutOfMemory(stage) from error
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started

    def report(self, stage: str, fraction: float) -> None:
        """Reports how far a stage is, 0 to 1. The reported fraction of the whole never falls, not even when a stage is
        repeated."""
        if self._progress is None:
            return
        end = STAGE_END[stage]
        start = max((e for e in STAGE_END.values() if e < end), default=0.0)
        self._reported = max(self._reported, start + (end - start) * fraction)
        if self._progress(stage, self._reported) is False:
            raise Cancelled(f"cancelled in step {stage!r}")

    def finish(self) -> None:
        """Reports that all is done."""
        self.report(STAGES[-1], 1.0)
