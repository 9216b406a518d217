"""Configurations: a dataclass, filled from a YAML file, one of its presets, and overrides from the command line.

OmegaConf merges the layers and checks them against the types of the dataclass; ranges are checked by ``__post_init__``. Every
error names the file and the key.
"""

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

T = TypeVar("T")


def load(kind: type[T], file: Path, *, preset: str | None = None, overrides: Sequence[str] = (), **values: object) -> T:
    """Reads a configuration file.

    Args:
        kind: the dataclass that the configuration is.
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
    return _checked(kind, [*layers, *map(_parsed, overrides), values], str(file))


def build(kind: type[T], values: dict, where: str = "configuration") -> T:
    """A configuration from plain values.

    Raises:
        ValueError: names the key that is unknown, missing, of the wrong type or out of range.
    """
    return _checked(kind, [values], where)


def _parsed(override: str) -> DictConfig:
    key, equals, _ = override.partition("=")
    if not key or not equals:
        raise ValueError(f"{override!r}: an override is KEY=VALUE, such as loss.diffusion=1.5")
    try:
        return OmegaConf.from_dotlist([override])
    except (YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"{override!r}: the value is not YAML") from error


def _checked(kind: type[T], layers: Sequence[DictConfig | dict], where: str) -> T:
    """The configuration that results when each layer replaces values of those before it."""
    config = OmegaConf.structured(kind)
    try:
        for layer in layers:
            if not isinstance(layer, DictConfig | dict):
                raise ValueError(f"expected keys and values, got {layer!r}")
            config = _merged(config, layer)
        for section in (f.name for f in fields(kind) if is_dataclass(f.type)):
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
