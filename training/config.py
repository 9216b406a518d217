"""What a training run is: one YAML file, checked key by key."""

from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path

import yaml

from DivRegNetLib.regnet import RegNetConfig
from DivRegNetLib.similarity import KLDivNetConfig
from training.synthesis import Recipe


@dataclass(frozen=True)
class Weights:
    """What the loss adds up; each is 0 to leave it out.

    similarity: S of KLDivNet (nats).
    diffusion: smoothness of the displacement, where nothing but S says how to deform; ``diffusion_known`` where the
        true deformation is known.
    known: distance to the true deformation of pairs made from one subject, in voxels.
    labels: 1 - soft Dice of pairs of label maps.
    """

    similarity: float = 1.0
    diffusion: float = 2.0
    diffusion_known: float = 0.2
    known: float = 1.0
    labels: float = 1.0


@dataclass(frozen=True)
class Config:
    """A training run. Lengths of time are in steps.

    cohort: a folder that training/prepare_head.py wrote.
    warmup: steps in which KLDivNet learns alone.
    single_pass: steps after that before the network is applied ``regnet.passes`` times.
    ema: decay of the averaged weights, which are what is exported.
    samples: patches that KLDivNet looks at in a step.
    card: what the model card says beside what is known anyway.
    """

    name: str
    cohort: str
    seed: int = 1
    steps: int = 10_000
    warmup: int = 400
    single_pass: int = 0
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-4
    similarity_learning_rate: float = 3e-3
    ema: float = 0.999
    samples: int = 16384
    checkpoint_every: int = 100
    validate_every: int = 250
    regnet: RegNetConfig = field(default_factory=RegNetConfig)
    kldivnet: KLDivNetConfig = field(default_factory=KLDivNetConfig)
    weights: Weights = field(default_factory=Weights)
    recipe: Recipe = field(default_factory=Recipe)
    card: dict = field(default_factory=dict)

    def as_dict(self) -> dict:
        return asdict(self) | {"regnet": self.regnet.as_dict(), "kldivnet": self.kldivnet.as_dict()}


def load(file: Path) -> Config:
    """Reads a configuration.

    Raises:
        ValueError: names the file and the key that is unknown, missing or of the wrong type.
    """
    try:
        values = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{file}: cannot be read as YAML: {error}") from error
    return _build(Config, values, str(file))


def _build(kind: type, values: object, where: str):
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected keys and values, got {values!r}")
    known = {f.name: f for f in fields(kind)}
    if unknown := sorted(str(key) for key in values if key not in known):
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(known)}")
    built = {}
    for key, value in values.items():
        wanted = known[key].type
        if is_dataclass(wanted):
            built[key] = _build(wanted, value, f"{where}: {key}")
        elif wanted is float and isinstance(value, int | float) and not isinstance(value, bool):
            built[key] = float(value)
        elif (wanted in (int, str, bool, dict) and type(value) is not wanted) or wanted is float:
            raise ValueError(f"{where}: {key} must be {wanted.__name__}, got {value!r}")
        else:
            built[key] = value
    try:
        return kind(**built)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
