"""The configuration of a training run: a YAML file with presets, and overrides from the command line.

See :mod:`training.layers` for how it is read.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from DivRegNetLib.registration.methods import check_methods
from DivRegNetLib.registration.regnet import RegNetConfig
from DivRegNetLib.registration.variational import VariationalSettings
from DivRegNetLib.similarity.kldivnet import KLDivNetConfig
from training import layers
from training.classes.config import ClassTraining
from training.data.pairs import Augmentation
from training.data.phantoms import TASKS
from training.data.synthesis import Recipe

CONFIGS = Path(__file__).resolve().parent / "configs"
SIMILARITIES = ("kldiv", "mi", "lncc")
PAIRS = ("cohort", "phantoms", "synthesis")


@dataclass(frozen=True)
class Data:
    """The training data.

    cohort: the folder of a prepared cohort.
    pairs: ``cohort`` (two volumes of it), ``phantoms`` (the AAL Brain experiment of the paper) or ``synthesis`` (generated
        pairs).
    tasks: the contrasts of phantoms, as moving-fixed.
    held_out: number of validation pairs; for phantoms, per task.
    part: side in voxels of a random cube of each pair that training sees, a multiple of 16; 0 is the whole pair.
        Validation always sees whole images.
    parts: number of cubes cut from each pair before the next one is drawn; useful where generating a pair takes longer
        than a training step.
    augmentation: for ``cohort`` and ``phantoms``.
    recipe: for ``synthesis``.
    """

    cohort: str = ""
    pairs: str = "cohort"
    tasks: list[str] = field(default_factory=lambda: list(TASKS))
    held_out: int = 10
    part: int = 0
    parts: int = 1
    augmentation: Augmentation = field(default_factory=Augmentation)
    recipe: Recipe = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        _one_of("pairs", self.pairs, PAIRS)
        for task in self.tasks:
            _one_of("tasks", task, TASKS)
        if self.held_out < 1:
            raise ValueError(f"held_out is at least 1, got {self.held_out}")
        if self.part < 0 or self.part % 16:
            raise ValueError(f"part is a multiple of 16, got {self.part}")
        if self.parts < 1 or (self.parts > 1 and not self.part):
            raise ValueError(f"parts is at least 1, and 1 for whole images (data.part: 0), got {self.parts}")


@dataclass(frozen=True)
class Loss:
    """The terms of the loss; a weight of 0 leaves a term out.

    similarity: ``kldiv`` (S of a KLDivNet that is trained at the same time), ``mi`` (Parzen windows) or ``lncc``.
    weight: weight of the similarity.
    margin: width in voxels of a border that the similarity leaves out, because what moves into a part of an image from
        outside is missing there.
    samples: number of random patches (``kldiv``) or voxels (``mi``) that a step uses.
    bins: histogram bins per image, for ``mi``.
    window: side of the window in voxels, for ``lncc``.
    diffusion: weight of the mean squared gradient of the displacement (in voxels of the network's output grid), for pairs
        whose true deformation is unknown or not used; ``diffusion_known`` is the weight for the others.
    known: weight of the distance in voxels to the true deformation, where it is known. 0 is unsupervised, as in the paper.
    labels: weight of 1 - soft Dice, where both images have label maps. With 0, labels serve validation only.
    """

    similarity: str = "kldiv"
    weight: float = 1.0
    margin: int = 0
    samples: int = 16384
    bins: int = 64
    window: int = 9
    diffusion: float = 2.0
    diffusion_known: float = 0.2
    known: float = 0.0
    labels: float = 0.0

    def __post_init__(self) -> None:
        _one_of("similarity", self.similarity, SIMILARITIES)


@dataclass(frozen=True)
class Config:
    """A training run. Durations are in steps.

    start: a bundled model, or the path of a model card, whose weights and architecture training starts from; "" for none.
    batch: pairs per step, over all processes. ``micro_batch``: pairs that go through the network together in one process;
        their gradients are accumulated, and the network's batch statistics are over the micro-batches of all processes.
    warmup: steps in which only KLDivNet learns, at a constant rate; without RegNet it learns alone after them, too.
    single_pass: steps after the warm-up in which the network is applied once, before ``regnet.passes`` takes effect.
    learning_rate: learning rate of RegNet; it falls along a cosine to ``final_learning_rate``.
        ``similarity_learning_rate``: that of KLDivNet, which falls in proportion.
    ema: decay of the exponential moving average of the weights. The averaged weights are validated and exported.
    precision: a precision of Lightning Fabric: ``32-true``, ``bf16-mixed``, ``16-mixed`` or ``64-true``.
    methods: the methods that the model runs, in order. ``regnet`` is trained, starting from the result of those before it;
        without it KLDivNet is trained alone, which measures the similarity of the results.
    variational: settings of the method of that name, and of the guidance of a guided RegNet.
    classes: training of a class network on the labels of the cohort, before RegNet; with ``classes.steps`` 0 there is none.
    card: fields of the model card that training cannot know: version, summary, modalities, anatomy, skull, license,
        good_for, limits, training.
    """

    name: str
    seed: int = 1
    start: str = ""
    steps: int = 10_000
    batch: int = 1
    micro_batch: int = 1
    warmup: int = 200
    single_pass: int = 0
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-4
    similarity_learning_rate: float = 5e-3
    ema: float = 0.999
    precision: str = "32-true"
    checkpoint_every: int = 100
    validate_every: int = 250
    data: Data = field(default_factory=Data)
    loss: Loss = field(default_factory=Loss)
    methods: tuple[str, ...] = ("regnet",)
    variational: VariationalSettings = field(default_factory=VariationalSettings)
    regnet: RegNetConfig = field(default_factory=RegNetConfig)
    kldivnet: KLDivNetConfig = field(default_factory=KLDivNetConfig)
    classes: ClassTraining = field(default_factory=ClassTraining)
    card: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("learning_rate", "similarity_learning_rate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be greater than 0, got {getattr(self, name)}")
        for name in ("steps", "batch", "micro_batch", "checkpoint_every", "validate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, got {getattr(self, name)}")
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ValueError(f"name becomes a file name: letters, digits, '_', '-' and '.', got {self.name!r}")
        check_methods(self.methods)
        if self.methods not in (("regnet",), ("variational", "regnet"), ("variational",)):
            known = "[regnet], [variational, regnet] or, to train KLDivNet alone, [variational]"
            raise ValueError(f"methods to train with are {known}, got {list(self.methods)}")
        if not self.trains_regnet and self.loss.similarity != "kldiv":
            other = self.loss.similarity
            raise ValueError(f"methods: [variational] train KLDivNet alone: loss.similarity is kldiv, got {other!r}")
        if self.starts_from_variational and self.variational.stride != self.regnet.stride:
            raise ValueError(
                f"variational.stride is that of regnet, {self.regnet.stride}, got {self.variational.stride}"
            )

    @property
    def trains_regnet(self) -> bool:
        """Whether the model has a RegNet; else KLDivNet is trained alone."""
        return "regnet" in self.methods

    @property
    def starts_from_variational(self) -> bool:
        """Whether RegNet continues from the variational displacement."""
        return self.trains_regnet and "variational" in self.methods

    def as_dict(self) -> dict:
        sections = {name: getattr(self, name).as_dict() for name in ("variational", "regnet", "kldivnet")}
        return asdict(self) | sections | {"methods": list(self.methods), "classes": self.classes.as_dict()}


def load(file: Path, *, preset: str | None = None, overrides: Sequence[str] = (), **values: object) -> Config:
    """Reads a configuration file, see :func:`training.layers.load`."""
    return layers.load(Config, file, preset=preset, overrides=overrides, **values)


def build(values: dict, where: str = "configuration") -> Config:
    """A configuration from plain values, as :meth:`Config.as_dict` returns them, see :func:`training.layers.build`."""
    return layers.build(Config, values, where)


def _one_of(key: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{key} is one of {', '.join(known)}, got {value!r}")
