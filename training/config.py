"""The configuration of a training run: a YAML file with presets, and overrides from the command line.

OmegaConf merges the values and checks them against the types of the dataclasses below; ranges are checked by their
``__post_init__``. Every error names the file and the key.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from DivRegNetLib.registration.methods import check_methods
from DivRegNetLib.registration.regnet import RegNetConfig
from DivRegNetLib.registration.variational import VariationalSettings
from DivRegNetLib.similarity.kldivnet import KLDivNetConfig
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
    warmup: steps in which only KLDivNet learns.
    single_pass: steps after the warm-up in which the network is applied once, before ``regnet.passes`` takes effect.
    learning_rate: learning rate of RegNet; it falls along a cosine to ``final_learning_rate``.
        ``similarity_learning_rate``: that of KLDivNet, which falls in proportion.
    ema: decay of the exponential moving average of the weights. The averaged weights are validated and exported.
    precision: a precision of Lightning Fabric: ``32-true``, ``bf16-mixed``, ``16-mixed`` or ``64-true``.
    methods: the methods that the model runs, in order. ``regnet`` is trained, starting from the result of those before it.
    variational: settings of the method of that name, and of the guidance of a guided RegNet.
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
        if self.methods not in (("regnet",), ("variational", "regnet")):
            raise ValueError(f"methods to train with are [regnet] or [variational, regnet], got {list(self.methods)}")
        if self.starts_from_variational and self.variational.stride != self.regnet.stride:
            raise ValueError(
                f"variational.stride is that of regnet, {self.regnet.stride}, got {self.variational.stride}"
            )

    @property
    def starts_from_variational(self) -> bool:
        """Whether RegNet continues from the variational displacement."""
        return "variational" in self.methods

    def as_dict(self) -> dict:
        sections = {name: getattr(self, name).as_dict() for name in ("variational", "regnet", "kldivnet")}
        return asdict(self) | sections | {"methods": list(self.methods)}


def load(file: Path, *, preset: str | None = None, overrides: Sequence[str] = (), **values: object) -> Config:
    """Reads a configuration file.

    Args:
        preset: the name of one of the file's ``presets``, which replaces values of the rest of the file.
        overrides: ``key=value`` or ``section.key=value`` with the value in YAML; they replace values of the preset.
        values: top-level keys, which replace everything before.
    Raises:
        ValueError: names the file and the key that is unknown, missing, of the wrong type or out of range.
    """
    try:
        content = OmegaConf.load(file)
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise ValueError(f"{file}: cannot be read as YAML: {error}") from error
    if not isinstance(content, DictConfig):
        raise ValueError(f"{file}: expected keys and values, got {content}")
    presets = content.pop("presets", None) or {}
    if not isinstance(presets, DictConfig | dict) or not all(isinstance(p, DictConfig) for p in presets.values()):
        raise ValueError(f"{file}: presets: expected a name with keys and values for each, got {presets}")
    layers = [content]
    if preset is not None:
        if preset not in presets:
            raise ValueError(f"{file}: has no preset {preset!r}; it has {', '.join(presets) or 'none'}")
        layers.append(presets[preset])
    return _checked([*layers, *map(_parsed, overrides), values], str(file))


def build(values: dict, where: str = "configuration") -> Config:
    """A configuration from plain values, as :meth:`Config.as_dict` returns them.

    Raises:
        ValueError: names the key that is unknown, missing, of the wrong type or out of range.
    """
    return _checked([values], where)


def _parsed(override: str) -> DictConfig:
    key, equals, _ = override.partition("=")
    if not key or not equals:
        raise ValueError(f"{override!r}: an override is KEY=VALUE, such as loss.diffusion=1.5")
    try:
        return OmegaConf.from_dotlist([override])
    except (YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"{override!r}: the value is not YAML") from error


def _checked(layers: Sequence[DictConfig | dict], where: str) -> Config:
    """The configuration that results when each layer replaces values of those before it."""
    config = OmegaConf.structured(Config)
    try:
        for layer in layers:
            if not isinstance(layer, DictConfig | dict):
                raise ValueError(f"expected keys and values, got {layer!r}")
            config = _merged(config, layer)
        for section in (f.name for f in fields(Config) if is_dataclass(f.type)):
            _section(config, section)
        return OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ValueError(f"{where}: {_explained(error)}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _section(config: DictConfig, name: str) -> None:
    """Raises ValueError for a value out of range in a section; names the section."""
    try:
        OmegaConf.to_object(config[name])
    except OmegaConfBaseException:
        raise
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error


def _merged(config: DictConfig, layer: DictConfig | dict) -> DictConfig:
    """OmegaConf's merge; where its error does not say which key it is about, the key is searched for."""
    try:
        return OmegaConf.merge(config, layer)
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        if getattr(error, "full_key", None):
            raise
        key, value = _misfit(config, OmegaConf.to_container(OmegaConf.create(layer)))
        raise ValueError(f"{key}: {value!r} is of the wrong type") from error


def _misfit(config: DictConfig, values: dict, above: str = "") -> tuple[str, object]:
    """The dotted key, and its value, that cannot be merged into ``config``; the values as a whole cannot."""
    for key, value in values.items():
        try:
            OmegaConf.merge(config, {key: value})
        except (OmegaConfBaseException, TypeError, ValueError):
            if isinstance(value, dict) and OmegaConf.is_dict(config.get(key)):
                return _misfit(config[key], value, f"{above}{key}.")
            return f"{above}{key}", value
    return above.rstrip("."), values


def _explained(error: OmegaConfBaseException) -> str:
    """OmegaConf's message in one line, with the key first, and the known keys after an unknown one."""
    message = str(error).splitlines()[0]
    if isinstance(error, ConfigKeyError) and is_dataclass(error.object_type):
        message += f"; known are {', '.join(f.name for f in fields(error.object_type))}"
    return f"{error.full_key}: {message}" if error.full_key else message


def _one_of(key: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{key} is one of {', '.join(known)}, got {value!r}")
