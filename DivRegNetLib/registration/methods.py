"""Methods that turn two sampled images into a displacement, one after the other: "discrete", "variational" and "regnet"."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from DivRegNetLib.core import fields
from DivRegNetLib.core.recording import Recorder
from DivRegNetLib.registration import METHODS, discrete
from DivRegNetLib.registration.regnet import RegNet
from DivRegNetLib.registration.variational.equations import Valid
from DivRegNetLib.registration.variational.features import Features
from DivRegNetLib.registration.variational.method import register
from DivRegNetLib.registration.variational.schedule import schedule
from DivRegNetLib.registration.variational.settings import VariationalSettings
from DivRegNetLib.similarity.classes import ClassNet, are_known, shared

Progress = Callable[[float], None]
Deform = Callable[..., Tensor]
"""A function such as :func:`deform`."""


@dataclass(frozen=True, eq=False)
class Images:
    """What every method gets. All tensors are on one grid, the working grid.

    fixed, moving: (N, 1, D, H, W) in [0, 1], normalized; the moving image initially aligned.
    fixed_mask, moving_mask: (N, 1, D, H, W) bool, or None: everything.
    valid: where the fixed and the moving image were measured, two (N, 1, D, H, W) bool; None: everywhere.
    measured: number of voxels that were measured in both, of the pair that has the fewest; None: not counted yet.
    classes: how probable each anatomical class is in both images, which the variational method brings together beside the
        intensities, see :func:`with_classes`; its weight is that of the settings. None: not known.
    """

    fixed: Tensor
    moving: Tensor
    fixed_mask: Tensor | None = None
    moving_mask: Tensor | None = None
    valid: Valid | None = None
    measured: int | None = None
    classes: Features | None = None

    def multiplied(self) -> tuple[Tensor, Tensor]:
        """Both images, 0 outside their masks, in the memory format of fast convolutions."""
        pairs = ((self.fixed, self.fixed_mask), (self.moving, self.moving_mask))
        images = (image if mask is None else image * mask for image, mask in pairs)
        return tuple(x.contiguous(memory_format=torch.channels_last_3d) for x in images)

    def taken_apart(self) -> "tuple[list[Tensor | None], Callable[[list[Tensor | None]], Images]]":
        """The tensors, and a function that makes images of the same kind of others."""
        valid = self.valid or (None, None)
        classes = (None, None) if self.classes is None else (self.classes.fixed, self.classes.moving)

        def rebuild(tensors: list[Tensor | None]) -> Images:
            fixed, moving, fixed_mask, moving_mask, *valid, of_fixed, of_moving = tensors
            features = None if self.classes is None else replace(self.classes, fixed=of_fixed, moving=of_moving)
            valid = None if self.valid is None else tuple(valid)
            return Images(fixed, moving, fixed_mask, moving_mask, valid, self.measured, features)

        return [self.fixed, self.moving, self.fixed_mask, self.moving_mask, *valid, *classes], rebuild

    def measured_in_masks(self) -> Valid | None:
        """Where the images were measured, without what is outside their masks."""
        masks = self.fixed_mask, self.moving_mask
        if all(mask is None for mask in masks):
            return self.valid
        measured = self.valid or (torch.ones_like(self.fixed, dtype=torch.bool),) * 2
        return tuple(v if mask is None else v & mask for v, mask in zip(measured, masks, strict=True))


def with_classes(images: Images, classnet: ClassNet) -> Images:
    """The images, and how probable each class that they share is at every voxel of them, in the network's eyes; without
    classes where the network does not know what they show, see :func:`~DivRegNetLib.similarity.classes.are_known`."""
    inside = images.measured_in_masks() or (None, None)
    pairs = zip((images.fixed, images.moving), inside, strict=True)
    probabilities = (classnet.probabilities(image, where) for image, where in pairs)
    both = shared(*probabilities)
    if not are_known(*both):
        return images
    return replace(images, classes=Features(*both, stride=classnet.config.output_stride))


def deform(
    images: Images,
    names: tuple[str, ...],
    variational: VariationalSettings,
    regnet: RegNet | None,
    progress: Progress = lambda fraction: None,
) -> Tensor:
    """Runs methods in order, each from the displacement of the one before.

    RegNet and the discrete start get the images multiplied by their masks, and know of no masks beside that; so does the
    variational method unless ``variational.masks`` is ``exclude``. The discrete start knows of no displacement before it.

    Args:
        names: of METHODS, at least one.
        regnet: for the method "regnet"; not needed without it.
        progress: called with the fraction that is done; what it raises ends the registration.
    Returns:
        (N, 3, D, H, W) in voxels of the working grid.
    Raises:
        ValueError: an unknown method, none, or "regnet" without a network.
    """
    check_methods(names)
    if "regnet" in names and regnet is None:
        raise ValueError("method 'regnet' needs a network")
    variational = settings_for(images, variational)
    displacement, grid, shape = None, None, images.fixed.shape[2:]
    for i, name in enumerate(names):

        def report(fraction: float, i: int = i) -> None:
            progress((i + fraction) / len(names))

        before, grid = grid, _output_grid(name, variational, regnet)
        if before not in (None, grid):
            displacement = fields.coarsen(fields.upsample(displacement, before[0], shape), *grid)
        if name == "discrete":
            displacement = fields.coarsen(discrete_start(images, report), *grid)
        elif name == "variational":
            displacement = variational_steps(images, variational, displacement, report)
        else:
            report(0.0)
            displacement = regnet.register(*images.multiplied(), displacement, images.valid)
            report(1.0)
    return fields.upsample(displacement, grid[0], shape).contiguous()


def recorded_deform(recorder: Recorder, *, room: bool) -> Deform:
    """:func:`deform`, on a CUDA device as recordings that are played again for images of the same shape.

    Args:
        recorder: belongs to the network.
        room: whether there is memory to keep recordings.
    """

    def recorded(
        images: Images,
        names: tuple[str, ...],
        variational: VariationalSettings,
        regnet: RegNet | None,
        progress: Progress = lambda fraction: None,
    ) -> Tensor:
        if images.fixed.device.type != "cuda" or not is_recordable(images, names, variational):
            return deform(images, names, variational, regnet, progress)
        tensors, rebuild = images.taken_apart()
        present = tuple(t is not None for t in tensors)
        stages = tuple(schedule(variational, images.measured)) if "variational" in names else ()

        def displacement(*given: Tensor) -> Tensor:
            rest = iter(given)
            return deform(rebuild([next(rest) if there else None for there in present]), names, variational, regnet)

        progress(0.0)
        key = names, variational, stages, present
        given = (t for t in tensors if t is not None)
        moved = recorder(key, displacement, *given, room=room)
        progress(1.0)
        return moved

    return recorded


def is_recordable(images: Images, names: tuple[str, ...], settings: VariationalSettings) -> bool:
    """Whether the operations of :func:`deform` depend on nothing but shapes: no voxels are counted, and no gain is measured."""
    if "variational" not in names:
        return True
    excluded = settings.masks == "exclude" and (images.fixed_mask is not None or images.moving_mask is not None)
    return images.measured is not None and settings.min_gain is None and not excluded


def refine(
    images: Images,
    displacement: Tensor,
    settings: VariationalSettings,
    progress: Progress = lambda fraction: None,
) -> Tensor:
    """Variational steps from a displacement.

    With the settings :data:`~DivRegNetLib.registration.variational.settings.REFINEMENT` the images are not multiplied by
    their masks; voxels outside a mask are ignored instead.

    Args:
        displacement: (N, 3, D, H, W) in voxels of the working grid.
    Returns:
        (N, 3, D, H, W) likewise; with ``settings.min_gain`` the displacement that was given, where no round of steps gained
        enough.
    """
    settings = settings_for(images, settings)
    start = fields.coarsen(displacement, settings.output_stride, settings.multiple)
    refined = variational_steps(images, settings, start, progress)
    if refined is start and settings.min_gain is not None:
        return displacement
    return fields.upsample(refined, settings.output_stride, displacement.shape[2:])


def check_methods(names: tuple[str, ...]) -> None:
    """Raises ValueError for an unknown method, or for none."""
    if not names or any(name not in METHODS for name in names):
        raise ValueError(f"methods: one or more of {', '.join(METHODS)}, got {', '.join(map(str, names)) or 'none'}")


def variational_steps(
    images: Images,
    settings: VariationalSettings,
    start: Tensor | None = None,
    progress: Progress = lambda fraction: None,
) -> Tensor:
    """The variational method alone, with the masks and the classes of the images as the settings say, see :func:`settings_for`.

    Arguments and result as of :func:`DivRegNetLib.registration.variational.method.register`.
    """
    measured = images.measured
    if settings.masks == "exclude":
        fixed, moving, valid = images.fixed, images.moving, images.measured_in_masks()
        measured = measured if valid is images.valid else None
    else:
        (fixed, moving), valid = images.multiplied(), images.valid
    features = ()
    if _guided(images, settings):
        features = (images.classes.of_classes(settings.class_weight, settings.class_temperature),)
    return register(
        fixed, moving, settings, start=start, valid=valid, measured=measured, features=features, progress=progress
    )


def settings_for(images: Images, settings: VariationalSettings) -> VariationalSettings:
    """The settings, or those that suit classes where the images have some that count."""
    return settings.with_classes() if _guided(images, settings) else settings


def _guided(images: Images, settings: VariationalSettings) -> bool:
    return images.classes is not None and settings.class_weight > 0


def discrete_start(images: Images, progress: Progress = lambda fraction: None) -> Tensor:
    """The displacement of :func:`DivRegNetLib.registration.discrete.register`, (N, 3, D, H, W) in voxels of the working grid,
    with the masks of the images: a candidate for where the variational method starts."""
    return discrete.register(*images.multiplied(), valid=images.valid, progress=progress)


def _output_grid(name: str, variational: VariationalSettings, regnet: RegNet | None) -> tuple[int, int]:
    """Stride of a method's output grid, and the multiple that it pads images to."""
    if name in ("discrete", "variational"):
        return variational.output_stride, variational.multiple
    return regnet.config.stride, regnet.config.multiple
