"""The configuration of a training of the class network, see :mod:`training.layers` for how it is read."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "classes"
KINDS = ("images", "paint", "nothing", "shapes")
PRECISIONS = ("auto", "32", "bf16")


@dataclass(frozen=True)
class Source:
    """A prepared cohort that the network learns from.

    cohort: its folder.
    kind: ``images`` looks at its images, ``paint`` paints its label maps (those without images, if
        there are any) in random contrasts, ``nothing`` looks at its
        images, of which everything is background: anatomy that the network is not to know. ``shapes`` does the same with
        random shapes in random contrasts on the cohort's grid.
    share: how often a step is made with its volumes, relative to the other sources.
    shape, spacing: of the images that are looked at, where they are not those of the training, see :class:`ClassTraining`.
    classes: label -> name of its class, or names joined by ``|`` where the label covers several of them. A label that is
        not listed is part of what is not labeled. None: every label is a class of its own, called by its number.
    elsewhere: classes that may be also where the volumes have no label, although some of their labels name them.
    cases: only so many volumes with labels are trained on, the first by name; 0: all.
    absent: what a label means that no voxel of a volume has: ``unknown`` (it was perhaps not drawn), or ``background``.
    """

    cohort: str = ""
    kind: str = "images"
    share: float = 1.0
    shape: list[int] = field(default_factory=list)
    spacing: tuple[float, float] = (0.0, 0.0)
    classes: dict[int, str] | None = None
    elsewhere: list[str] = field(default_factory=list)
    cases: int = 0
    absent: str = "unknown"

    def __post_init__(self) -> None:
        _one_of("kind", self.kind, KINDS)
        _one_of("absent", self.absent, ("unknown", "background"))
        if self.share <= 0:
            raise ValueError(f"share is above 0, got {self.share}")


@dataclass(frozen=True)
class Augmentation:
    """How an image that is looked at differs from the one on disk; chances are from 0 to 1.

    degrees: rotation about each axis, uniform up to plus or minus this.
    scale: logarithm of the size, uniform likewise; ``stretch``: of each axis by itself; ``shear``: likewise.
    shift: of the middle, as a share of the sides.
    elastic: standard deviation of a free-form deformation's control points, as a share of their distance, from 0 to this.
    control: their distance, in voxels, from and to.
    mirror: chance that left and right are exchanged. 0 where labels tell left from right.
    crop: chance that a part of the field of view is cut off on some sides.
    gamma: binary logarithm of the exponent of intensities, uniform up to plus or minus this.
    contrast: chance of a random contrast curve.
    bias: largest standard deviation of the bias field's logarithm.
    blur: largest standard deviation of a Gaussian, in voxels.
    thick: chance of slices two or three voxels thick.
    noise: largest standard deviation of the noise.
    """

    degrees: float = 15.0
    scale: float = 0.15
    stretch: float = 0.1
    shear: float = 0.1
    shift: float = 0.1
    elastic: float = 0.15
    control: tuple[float, float] = (8.0, 20.0)
    mirror: float = 0.0
    crop: float = 0.25
    gamma: float = 0.5
    contrast: float = 0.05
    bias: float = 0.3
    blur: float = 0.7
    thick: float = 0.1
    noise: float = 0.06


@dataclass(frozen=True)
class Painting:
    """How label maps are painted (as in Billot et al., "SynthSeg", Medical Image Analysis 2023).

    known_contrast: share of images with tissues as bright as in T1, T2 or PD; in the others every label has any brightness.
    alike: chance that a label looks like another one, so that not every border is seen.
    texture: largest standard deviation within a label.
    strip: share of images without skull.
    """

    known_contrast: float = 0.35
    alike: float = 0.1
    texture: float = 0.1
    strip: float = 0.2


@dataclass(frozen=True)
class ClassTraining:
    """A training of the class network. Lengths of time are in steps.

    steps: 0: there is no class network.
    names: of the classes but background, in their order; empty: those that the sources name, in the order of their labels. A
        source that has no ``classes`` has one label for each name, in ascending order.
    sources: what is learned from.
    shape: sides (D, H, W) of the images that are looked at, in voxels; empty: those of the source's cohort. Smaller ones are
        parts that may lie anywhere.
    spacing: mm of their voxels, from and to, drawn anew each time; 0: that of the source's cohort.
    normalization: of the images, a key of :data:`DivRegNetLib.core.intensity.SCHEMES`; "": that of the first source's cohort.
    channels, stride, subvoxel: see :class:`DivRegNetLib.similarity.classes.ClassNetConfig`.
    batch: images per step.
    learning_rate: largest, reached after ``warmup`` steps, falling to a hundredth by a cosine.
    weight_decay: of AdamW.
    ema: decay of the averaged weights, which are what is validated and exported.
    dice: weight of 1 - Dice beside the cross entropy.
    precision: ``32``, ``bf16`` (of the network's pass; weights are kept in full), or ``auto``: the latter where the processor
        or the GPU has instructions for it.
    """

    name: str = "classes"
    seed: int = 1
    names: list[str] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)
    shape: list[int] = field(default_factory=list)
    spacing: tuple[float, float] = (0.0, 0.0)
    normalization: str = ""
    channels: list[int] = field(default_factory=lambda: [32, 64, 64])
    stride: int = 2
    subvoxel: bool = False
    steps: int = 0
    batch: int = 4
    learning_rate: float = 3e-3
    warmup: int = 100
    weight_decay: float = 1e-2
    ema: float = 0.998
    dice: float = 1.0
    precision: str = "auto"
    checkpoint_every: int = 100
    validate_every: int = 500
    augmentation: Augmentation = field(default_factory=Augmentation)
    painting: Painting = field(default_factory=Painting)

    def __post_init__(self) -> None:
        for name, least in (("steps", 0), ("batch", 1), ("checkpoint_every", 1), ("validate_every", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is at least {least}, got {getattr(self, name)}")
        _one_of("precision", self.precision, PRECISIONS)
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate is above 0, got {self.learning_rate}")

    def as_dict(self) -> dict:
        """Plain values."""
        return asdict(self)


def _one_of(key: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{key} is one of {', '.join(known)}, got {value!r}")
