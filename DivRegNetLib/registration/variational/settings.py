"""Settings of the variational registration, stored in a model card. No torch here.

The defaults were chosen on BrainWeb phantoms, MS07, IXI012, label maps, and crops of the hippocampus, the abdomen and limbs;
the notebook of the experiments has the comparisons.
"""

import math
from dataclasses import MISSING, asdict, dataclass, fields, replace

MASKS = ("multiply", "exclude")


@dataclass(frozen=True)
class Smoothness:
    """Regularization of one Gauss-Newton step.

    window: standard deviation of the Gaussian that forces and information are averaged with, in voxels of the level's
        images; >= 0. As the smoothing of update fields in the demons algorithm (Thirion, Medical Image Analysis 1998).
    fluid: weight of the squared gradient of the step itself, in units of the mean information; >= 0. Small values allow
        large local changes in one step. Christensen et al., IEEE TIP 1996.
    elastic: weight of the squared gradient of the whole displacement, in nats per squared voxel; >= 0. Half of it is what
        a squared gradient of the displacement costs at a voxel. "Diffusion regularization" of Fischer and Modersitzki, 2002.
    """

    window: float
    fluid: float
    elastic: float


@dataclass(frozen=True)
class Level:
    """One resolution of the images.

    shrink: the images are averaged over cubes of this many voxels a side; 1 leaves them as they are.
    share: fraction of all steps that are made at this level; the last level makes the steps that remain.
    block: side of the cubes in which joint histograms are counted, in voxels of the level's images; rounded down to a
        multiple of ``stride``.
    momentum: fraction of the previous step that is added to each step, 0 to below 1 (heavy ball; Polyak, 1964).
    descriptors: fraction of ``descriptor_weight`` that the descriptors have at this level; 0 leaves them out.
    all_voxels: every step samples all voxels of the level's images; else one for each voxel of the displacement's grid.
    """

    shrink: int
    share: float
    block: int
    momentum: float
    descriptors: float = 1.0
    all_voxels: bool = False


@dataclass(frozen=True)
class VariationalSettings:
    """All settings of a variational registration. A voxel is one of the level's images unless stated otherwise.

    Course:

    steps: Gauss-Newton steps in all, over all levels.
    stride: voxels of a level's images per voxel of its displacement's grid, along each axis: 1 or 2.
    levels: coarsest first; see :class:`Level`.
    min_steps: with fewer steps than this only the last level is used.
    min_voxels: a coarser level is left out unless both images were measured in as many voxels of its displacement's grid.
    more_voxels: the first level is made once more with half the resolution, before all others and with as many steps, and so
        on for as long as both images were measured in as many voxels of that grid: finer images get more levels, and start as
        coarse as others. None: no level is added.
    first_smoothness: of all steps of the coarser levels and of the first step of the last level.
    last_smoothness: of the last step of the last level; the steps between are interpolated linearly.
    min_gain: gain of the objective (mean pointwise mutual information less the energies of features and of elasticity, in
        nats per voxel) that is required of each round of ``stride ** 3`` steps; a round that gains less is undone and ends
        the level. None: every step is kept and the objective is not evaluated.
    masks: ``multiply``: images are set to 0 outside their masks and counted there; ``exclude``: they stay as they are, and
        voxels outside a mask are ignored like voxels that were not measured.
    validity_threshold: a voxel counts where at least this fraction of it (after averaging or interpolation) was measured.

    Joint histograms (Zhuang et al., "A nonrigid registration framework using spatially encoded mutual information and
    free-form deformations", IEEE TMI 2011):

    bins: per image, for intensities in [0, 1].
    parzen_sigma: standard deviation of the Gaussian Parzen window, in bins.
    block_sigma: standard deviation of the Gaussian with which the histograms of neighboring blocks are added, in blocks.
    global_weight: weight of the histogram of the whole images relative to that of a block's neighborhood.
    independence_weight: weight of the product of the marginals that is mixed into each joint distribution, 0 to 1, so that
        intensity pairs that were hardly observed carry little information (shrinkage towards independence).
    epsilon: voxels in an empty cell of a joint histogram: too few to matter, but enough to divide by.

    Classes (:mod:`DivRegNetLib.similarity.classes`):

    class_weight: of the squared differences of the classes' probabilities at a voxel of the displacement's grid, in nats; 0
        leaves them out. Models without a class network have none.
    class_temperature: softmax temperature of the probabilities, see
        :meth:`DivRegNetLib.registration.variational.features.Features.of_classes`; 1 leaves them as they are.
    class_window: factor of the ``window`` of both smoothnesses where classes take part: they say more of a place than the
        joint histogram does, so that less is averaged.

    Descriptors (MIND-SSC, :mod:`DivRegNetLib.similarity.descriptors`):

    descriptor_weight: of the squared differences of the descriptors at a voxel of the displacement's grid, in nats, in a pair
        whose descriptors differ as they usually do; 0 leaves them out. See
        :meth:`DivRegNetLib.registration.variational.features.FeatureEquations.trust_regions` for other pairs, and for ...
    descriptor_trust: ... how much less a region counts where they differ by more than in the rest of the image; 0: all
        regions count alike.
    descriptor_region: standard deviation of the Gaussian that a region is, in voxels of the descriptors' grid.
    descriptor_floor: a voxel's mean patch distance is taken for no less than this fraction of the image's mean, so that the
        descriptors of surroundings without contrast, which would be those of noise, are all alike.
    descriptor_parts: into which the 12 channels are divided; each step uses one part of them.

    Linear system of a step (Modersitzki, "FAIR", SIAM 2009):

    information_floor: added to the mean information that ``fluid`` is multiplied by, per squared voxel of the
        displacement's grid, so that rounding errors in images without contrast are not amplified.
    tikhonov: added to the diagonal of the information matrix at every voxel, in the same unit: voxels without information
        do not move (Tikhonov regularization).
    cg_iterations: iterations of the preconditioned conjugate gradients.
    frequencies: fraction of the cosine frequencies along each axis, the lowest, that a step consists of.
    max_step: longest vector of a step, in voxels of the displacement's grid.
    max_gradient: largest absolute gradient of a step along an axis, summed over its components; below 1 a step cannot fold.
    """

    steps: int = 29
    stride: int = 2
    levels: tuple[Level, ...] = (
        Level(4, 8 / 29, 8, 0.0), Level(2, 9 / 29, 8, 0.5), Level(1, 7 / 29, 8, 0.6), Level(1, 5 / 29, 8, 0.6, all_voxels=True)
    )  # fmt: skip
    min_steps: int = 4
    min_voxels: int = 200
    more_voxels: int | None = 300
    first_smoothness: Smoothness = Smoothness(2.8, 2.0, 0.6)
    last_smoothness: Smoothness = Smoothness(1.4, 0.4, 0.15)
    min_gain: float | None = None
    masks: str = "multiply"
    validity_threshold: float = 0.99
    bins: int = 32
    parzen_sigma: float = 1.2
    block_sigma: float = 0.6
    global_weight: float = 0.05
    independence_weight: float = 0.12
    epsilon: float = 1e-9
    class_weight: float = 300.0
    class_temperature: float = 0.33
    class_window: float = 0.5
    descriptor_weight: float = 2.0
    descriptor_trust: float = 3.0
    descriptor_region: float = 7.0
    descriptor_floor: float = 1.0
    descriptor_parts: int = 2
    information_floor: float = 0.05
    tikhonov: float = 1e-3
    cg_iterations: int = 4
    frequencies: float = 0.6
    max_step: float = 2.0
    max_gradient: float = 0.7

    def __post_init__(self) -> None:
        """Raises ValueError that names the field that is invalid."""
        levels = (_level(f"levels[{i}]", level) for i, level in enumerate(self.levels))  # a file has mappings
        object.__setattr__(self, "levels", tuple(levels))
        for name, low, high in _RANGES:
            _check_number(self, name, low, high)
        for name in ("first_smoothness", "last_smoothness"):
            _check_kind(name, getattr(self, name), Smoothness)
            for part in _names(Smoothness):
                _check_number(getattr(self, name), part, 0.0, math.inf, f"{name}.{part}")
        if not self.levels:
            raise ValueError("levels: at least one level is required")
        for i, level in enumerate(self.levels):
            _check_kind(f"levels[{i}]", level, Level)
            for part, low, high in _LEVEL_RANGES:
                _check_number(level, part, low, high, f"levels[{i}].{part}")
            if level.block < self.stride:
                raise ValueError(f"levels[{i}].block: at least the stride, {self.stride}, got {level.block}")
            if not isinstance(level.all_voxels, bool):
                raise ValueError(f"levels[{i}].all_voxels: true or false is required, got {level.all_voxels!r:.80}")
        if self.min_gain is not None:
            _check_number(self, "min_gain", 0.0, math.inf)
        if self.more_voxels is not None:
            _check_number(self, "more_voxels", 1, 10**9)
        if self.masks not in MASKS:
            raise ValueError(f"masks: one of {', '.join(MASKS)}, got {self.masks!r}")

    @property
    def multiple(self) -> int:
        """Images are padded to a multiple of this number of voxels per axis, which all of ``levels`` divide."""
        return math.lcm(*(self.stride * level.shrink for level in self.levels))

    @property
    def output_stride(self) -> int:
        """Voxels of the images per voxel of the grid of the displacement that comes out, the last level's."""
        return self.stride * self.levels[-1].shrink

    def with_effort(self, effort: str) -> "VariationalSettings":
        """The settings for one of :data:`DivRegNetLib.options.EFFORTS`: ``fast`` has neither descriptors nor levels that sample
        all voxels; ``thorough`` makes twice as many steps."""
        if effort == "thorough":
            return replace(self, steps=2 * self.steps)
        if effort != "fast":
            return self
        kept = tuple(level for level in self.levels if not level.all_voxels) or self.levels
        steps = self.steps - sum(round(level.share * self.steps) for level in self.levels if level not in kept)
        shares = self.steps / steps
        levels = (replace(level, share=min(level.share * shares, 1.0)) for level in kept)
        return replace(self, steps=steps, levels=tuple(levels), descriptor_weight=0.0)

    def as_dict(self) -> dict:
        """For JSON; :meth:`from_dict` is the inverse."""
        return asdict(self) | {"levels": [asdict(level) for level in self.levels]}

    def with_classes(self) -> "VariationalSettings":
        """The settings of a registration in which classes take part: those of the effort ``fast``, with narrower windows.
        Beside classes descriptors add nothing, and steps on a finer grid follow what errs in them (docs/experiments.md, Class
        networks)."""
        smoothnesses = ("first_smoothness", "last_smoothness")
        narrower = {k: replace(s := getattr(self, k), window=s.window * self.class_window) for k in smoothnesses}
        return replace(self.with_effort("fast"), **narrower)

    @classmethod
    def from_dict(cls, values: dict) -> "VariationalSettings":
        """Settings of a dictionary as :meth:`as_dict` makes it; keys that are absent have their default.

        Raises:
            ValueError: names the key that is unknown, or whose value has the wrong type or is out of range.
        """
        values = dict(_mapping("settings", values, _names(cls)))
        for key in ("first_smoothness", "last_smoothness"):
            if key in values and not isinstance(values[key], Smoothness):
                default = asdict(next(f.default for f in fields(cls) if f.name == key))
                values[key] = Smoothness(**default | _mapping(key, values[key], _names(Smoothness)))
        if "levels" in values:
            if not isinstance(values["levels"], list | tuple):
                raise ValueError(f"levels: a list is required, got {values['levels']!r:.80}")
            values["levels"] = tuple(_level(f"levels[{i}]", level) for i, level in enumerate(values["levels"]))
        return cls(**values)


# Field, smallest and largest value; whole numbers where the limits are.
_RANGES = (
    ("steps", 1, 100_000), ("stride", 1, 2), ("min_steps", 0, 100_000), ("min_voxels", 0, 10**9), ("bins", 4, 256),
    ("cg_iterations", 1, 1000), ("validity_threshold", 0.0, 1.0), ("parzen_sigma", 0.01, 100.0),
    ("block_sigma", 0.01, 100.0), ("global_weight", 0.0, math.inf), ("independence_weight", 0.0, 1.0),
    ("epsilon", 1e-30, 1e-3), ("class_weight", 0.0, math.inf), ("class_temperature", 0.01, 100.0), ("class_window", 0.0, 10.0),
    ("descriptor_weight", 0.0, math.inf), ("descriptor_trust", 0.0, 100.0), ("descriptor_region", 0.1, 1000.0),
    ("descriptor_floor", 1e-6, 1e3), ("descriptor_parts", 1, 12),
    ("information_floor", 0.0, math.inf), ("tikhonov", 0.0, math.inf),
    ("frequencies", 0.01, 1.0), ("max_step", 0.0, math.inf), ("max_gradient", 0.0, math.inf),
)  # fmt: skip
_LEVEL_RANGES = (
    ("shrink", 1, 64), ("share", 0.0, 1.0), ("block", 1, 1024), ("momentum", 0.0, 0.999),
    ("descriptors", 0.0, math.inf),
)  # fmt: skip


def _check_number(owner: object, name: str, low: float, high: float, shown: str | None = None) -> None:
    """Raises ValueError for a value out of range; replaces a whole number by a float where a float is meant."""
    value, shown = getattr(owner, name), shown or name
    whole = isinstance(low, int)
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise ValueError(f"{shown}: a {'whole ' if whole else ''}number is required, got {value!r:.80}")
    if not low <= value <= high or not math.isfinite(value):
        raise ValueError(f"{shown}: from {low:g} to {high:g}, got {value!r}")
    if not whole:
        object.__setattr__(owner, name, float(value))


def _check_kind(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{name}: keys and values ({', '.join(_names(kind))}) are required, got {value!r:.80}")


def _mapping(name: str, values: object, known: tuple[str, ...]) -> dict:
    if not isinstance(values, dict):
        raise ValueError(f"{name}: keys and values ({', '.join(known)}) are required, got {values!r:.80}")
    if unknown := sorted(str(key) for key in values if key not in known):
        raise ValueError(f"{name}: unknown key {unknown[0]!r}; known are {', '.join(known)}")
    return values


def _level(name: str, values: object) -> Level:
    if isinstance(values, Level):
        return values
    known = _names(Level)
    values = _mapping(name, values, known)
    required = [f.name for f in fields(Level) if f.default is MISSING]
    if missing := [key for key in required if key not in values]:
        raise ValueError(f"{name}: {missing[0]!r} is missing")
    return Level(**values)


def _names(kind: type) -> tuple[str, ...]:
    return tuple(f.name for f in fields(kind))


DEFAULT = VariationalSettings()
"""Registration from the identity."""

FAST = DEFAULT.with_effort("fast")
"""The same without descriptors and without the level that samples all voxels."""

REFINEMENT = VariationalSettings(
    steps=16,
    levels=(Level(1, 1.0, 12, 0.6),),
    first_smoothness=Smoothness(2.8, 1.0, 0.4),
    last_smoothness=Smoothness(2.8, 1.0, 0.4),
    parzen_sigma=0.8,  # sharper than before, as the images are nearly aligned
    independence_weight=0.01,
    min_gain=1e-4,
    masks="exclude",
)
"""Further steps from an existing displacement, for as long as the objective rises."""
