"""What a training run is: one YAML file, checked key by key, with presets and overrides from the command line."""

import re
import typing
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path

import yaml

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
    """What is trained on.

    cohort: the folder of a prepared cohort.
    pairs: ``cohort`` (two volumes of it), ``phantoms`` (AAL Brain of the paper) or ``synthesis`` (made on the fly).
    tasks: of phantoms, moving-fixed.
    held_out: pairs that validation looks at (of phantoms, per task).
    part: side in voxels of the part of each pair that is trained on, at random, a multiple of 16; 0: all of it. Whole images
        are validated on.
    parts: how many of each pair that is drawn, one after the other: where making a pair takes longer than learning from it.
    augmentation: of cohort and phantoms.
    recipe: of synthesis.
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
        _one_of("data.pairs", self.pairs, PAIRS)
        for task in self.tasks:
            _one_of("data.tasks", task, TASKS)
        if self.held_out < 1:
            raise ValueError(f"data.held_out is at least 1, got {self.held_out}")
        if self.part < 0 or self.part % 16:
            raise ValueError(f"data.part is a multiple of 16, got {self.part}")
        if self.parts < 1 or (self.parts > 1 and not self.part):
            raise ValueError(f"data.parts is at least 1, and 1 for whole images (data.part: 0), got {self.parts}")


@dataclass(frozen=True)
class Loss:
    """What the loss adds up, each weight 0 to leave it out.

    similarity: ``kldiv`` (S of a KLDivNet trained along), ``mi`` (Parzen windows) or ``lncc``.
    weight: of the similarity.
    margin: voxels along every border that the similarity does not look at, as what moves into a part is missing there.
    samples: patches (``kldiv``) or voxels (``mi``) looked at in a step, at random.
    bins: of ``mi``.
    window: of ``lncc``, side in voxels.
    diffusion: smoothness of the displacement (mean squared gradient, voxels of the network's output grid), where the true
        deformation is not known or not used; ``diffusion_known`` where it is.
    known: distance to the true deformation, in voxels, of pairs where it is known. 0: unsupervised, as in the paper.
    labels: 1 - soft Dice of pairs of label maps. 0: labels are for validation only.
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
        _one_of("loss.similarity", self.similarity, SIMILARITIES)


@dataclass(frozen=True)
class Config:
    """A training run. Lengths of time are in steps.

    start: a bundled model, or the path of a card, whose weights and architecture training starts from; "" for none.
    similarity_start: the same, for the weights of KLDivNet alone.
    batch: pairs per step, over all processes; ``micro_batch``: pairs at a time in one process, gradients
        accumulated; the network's batch statistics are over those that go together in all processes.
    warmup: steps in which KLDivNet learns alone.
    single_pass: steps after that before the network is applied ``regnet.passes`` times.
    learning_rate: of RegNet, falling by a cosine to ``final_learning_rate``; ``similarity_learning_rate``: of KLDivNet.
    ema: decay of the averaged weights, which are what is validated and exported.
    precision: of Lightning Fabric: ``32-true``, ``bf16-mixed``, ``16-mixed``, ``64-true``.
    methods: that the model runs, in order; ``regnet`` is trained, from what the methods before it make of a pair.
    variational: settings of the method of that name, and of the guidance of a guided RegNet.
    card: what the model card says beside what is known anyway: version, summary, modalities, anatomy, skull, license,
        good_for, limits, training.
    """

    name: str
    seed: int = 1
    start: str = ""
    similarity_start: str = ""
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
                raise ValueError(f"{name} is above 0, got {getattr(self, name)}")
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
    """Reads a configuration.

    Args:
        preset: one of those the file has under ``presets``, laid over the rest of it.
        overrides: ``key=value`` or ``section.key=value``, the value in YAML; laid over that.
        values: top-level keys, laid over all.
    Raises:
        ValueError: names the file and the key that is unknown, missing or of the wrong type.
    """
    try:
        read = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{file}: cannot be read as YAML: {error}") from error
    if not isinstance(read, dict):
        raise ValueError(f"{file}: expected keys and values, got {read!r}")
    presets = read.pop("presets", None) or {}
    if not isinstance(presets, dict) or not all(isinstance(laid, dict) for laid in presets.values()):
        raise ValueError(f"{file}: presets: expected a name and its keys and values for each, got {presets!r}")
    if preset is not None:
        if preset not in presets:
            raise ValueError(f"{file}: has no preset {preset!r}; it has {', '.join(presets) or 'none'}")
        read = _merge(read, presets[preset])
    for override in overrides:
        read = _merge(read, _parse(override))
    return build(_merge(read, values), str(file))


def build(values: dict, where: str = "configuration") -> Config:
    """A configuration of plain values, as :meth:`Config.as_dict` gives them.

    Raises:
        ValueError: names the key that is unknown, missing or of the wrong type.
    """
    return _build(Config, values, where)


def _parse(override: str) -> dict:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ValueError(f"{override!r}: an override is KEY=VALUE, such as loss.diffusion=1.5")
    try:
        nested = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"{override!r}: the value is not YAML") from error
    for part in reversed(key.split(".")):
        nested = {part: nested}
    return nested


def _merge(below: dict, above: dict) -> dict:
    merged = dict(below)
    for key, value in above.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if nested else value
    return merged


def _build(kind: type, values: object, where: str):
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected keys and values, got {values!r}")
    known = {f.name: f.type for f in fields(kind)}
    if unknown := sorted(str(key) for key in values if key not in known):
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(known)}")
    built = {key: _check(known[key], value, f"{where}: {key}") for key, value in values.items()}
    try:
        return kind(**built)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _check(wanted: type, value: object, where: str):
    """The value as the wanted type: int, float, str, bool, dict, a list or tuple of one of these, or a dataclass."""
    if wanted is VariationalSettings:
        try:
            return wanted.from_dict(value)
        except ValueError as error:
            raise ValueError(f"{where}.{error}") from error
    if is_dataclass(wanted):
        return _build(wanted, value, where)
    if wanted is float and type(value) is int:
        return float(value)
    if wanted is float and isinstance(value, str) and re.fullmatch(r"[-+]?\d+e[-+]?\d+", value, re.IGNORECASE):
        return float(value)  # 1e-3, which YAML 1.1 takes for text
    if typing.get_origin(wanted) in (list, tuple):
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where} must be a list, got {value!r}")
        made = [_check(typing.get_args(wanted)[0], v, where) for v in value]
        return typing.get_origin(wanted)(made)
    if type(value) is not wanted:
        raise ValueError(f"{where} must be {wanted.__name__}, got {value!r}")
    return value


def _one_of(key: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{key} is one of {', '.join(known)}, got {value!r}")
