"""Models on disk: weights as safetensors, and a card (JSON) beside them that says what they are for.

A model is two files, ``NAME.safetensors`` and ``NAME.json``, in ``Resources/Models`` or in a folder of the user's own: those
that the environment variable ``DIVREGNET_MODELS`` names (separated as in PATH), else ``.divregnet/models`` in the home
folder. Cards can be read without torch.
"""

import copy
import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from DivRegNetLib.errors import ModelError
from DivRegNetLib.io.atomic import staging_folder
from DivRegNetLib.models.card import FORMAT, Card, read_card

if TYPE_CHECKING:
    import torch

    from DivRegNetLib.registration.regnet import RegNet
    from DivRegNetLib.similarity.classes import ClassNet
    from DivRegNetLib.similarity.kldivnet import KLDivNet

DEFAULT = "general"
ENVIRONMENT = "DIVREGNET_MODELS"
LARGEST_WEIGHTS_BYTES = 500_000_000


@dataclass(frozen=True)
class Model:
    """A loaded model, ready for inference."""

    card: Card
    regnet: "RegNet | None"
    kldivnet: "KLDivNet | None"
    classnet: "ClassNet | None" = None

    def on(self, device: "torch.device") -> "Model":
        """The same model with its networks on a device: copies, unless they are there already. This one stays as it is."""

        def placed(network):
            if network is None or all(p.device == device for p in network.parameters()):
                return network
            return copy.deepcopy(network).to(device)

        return Model(self.card, placed(self.regnet), placed(self.kldivnet), placed(self.classnet))


def bundled_folder() -> Path:
    """Where the models that ship are: beside the library in a checkout and in a wheel, or in Slicer's extension."""
    here = Path(__file__).resolve().parents[1]
    candidates = (here / "Resources" / "Models", here.parent / "Resources" / "Models")
    return next((c for c in candidates if c.is_dir()), candidates[-1])


def own_folders() -> list[Path]:
    """The user's own folders of models, whether they exist or not; trained models go to the first."""
    named = [Path(entry).expanduser() for entry in os.environ.get(ENVIRONMENT, "").split(os.pathsep) if entry]
    return named or [Path.home() / ".divregnet" / "models"]


def folders() -> list[Path]:
    """Folders that are searched, the user's own first."""
    return [*own_folders(), bundled_folder()]


def card_files() -> dict[str, Path]:
    """Name -> card file of every model found; the first folder wins. Cards are not read."""
    found: dict[str, Path] = {}
    for folder in folders():
        for file in sorted(folder.glob("*.json")) if folder.is_dir() else []:
            found.setdefault(file.stem, file)
    return found


def find(name: str | Path) -> Path:
    """The card file of a model, by its name or by the path of its card.

    Raises:
        ModelError: there is none of that name; lists those there are.
    """
    known, name = card_files(), str(name)
    if name in known:
        return known[name]
    if name.endswith(".json") and Path(name).is_file():
        return Path(name)
    where = ", ".join(str(f) for f in folders())
    raise ModelError(f"no model {name!r}; known are {', '.join(sorted(known)) or 'none'} (searched {where})")


def checksum(file: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def load(name: str | Path, device: "torch.device | str" = "cpu") -> Model:
    """Loads a model by name (see :func:`find`), its checksum verified.

    Raises:
        ModelError: card or weights are missing, damaged, do not fit each other or are not finite.
    """
    import safetensors
    import torch
    from safetensors.torch import load_file

    from DivRegNetLib.core.intensity import SCHEMES
    from DivRegNetLib.registration.regnet import RegNet, RegNetConfig
    from DivRegNetLib.similarity.classes import ClassNet, ClassNetConfig
    from DivRegNetLib.similarity.kldivnet import KLDivNet, KLDivNetConfig

    file = find(name)
    card = read_card(file)
    weights = file.with_suffix(".safetensors")
    if card.normalization not in SCHEMES:
        raise ModelError(f"{file}: unknown normalization {card.normalization!r}, known are {', '.join(SCHEMES)}")
    if not weights.is_file():
        raise ModelError(f"{weights}: the weights of model {card.name!r} are missing")
    if weights.stat().st_size > LARGEST_WEIGHTS_BYTES:
        raise ModelError(f"{weights}: weights of more than {LARGEST_WEIGHTS_BYTES} bytes are refused")
    if checksum(weights) != card.sha256:
        raise ModelError(
            f"{weights}: the checksum is not the one in its card: damaged or exchanged; get both files again"
        )
    try:
        tensors = load_file(weights)
        regnet = None if card.regnet is None else RegNet(RegNetConfig(**card.regnet), card.variational_settings)
        kldivnet = None if card.kldivnet is None else KLDivNet(KLDivNetConfig(**card.kldivnet))
        classnet = None if card.classnet is None else ClassNet(ClassNetConfig(**card.classnet))
        parts = {"regnet": regnet, "kldivnet": kldivnet, "classnet": classnet}
        networks = {prefix: network for prefix, network in parts.items() if network is not None}
        for prefix, network in networks.items():
            own = {k.removeprefix(f"{prefix}."): v for k, v in tensors.items() if k.startswith(f"{prefix}.")}
            network.load_state_dict(own)
    except (TypeError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"{weights}: the weights do not fit the card: {reason}") from error
    if stray := sorted(k for k in tensors if k.split(".")[0] not in networks):
        raise ModelError(f"{weights}: unknown tensor {stray[0]!r}")
    if bad := [k for k, v in tensors.items() if not torch.isfinite(v).all()]:
        raise ModelError(f"{weights}: tensor {bad[0]!r} holds values that are not finite")
    for network in networks.values():
        network.eval().requires_grad_(False).to(device)
    if regnet is not None:
        regnet.to(memory_format=torch.channels_last_3d)
    return Model(card, **parts)


def save(
    folder: Path, card: Card, regnet: "RegNet | None", kldivnet: "KLDivNet | None", classnet: "ClassNet | None" = None
) -> Path:
    """Writes weights and card, each atomically; the card's sha256 is filled in. Returns the card's file."""
    from safetensors.torch import save_file

    tensors = {}
    for prefix, network in (("regnet", regnet), ("kldivnet", kldivnet), ("classnet", classnet)):
        if network is not None:
            tensors |= {f"{prefix}.{k}": v.detach().cpu().contiguous() for k, v in network.state_dict().items()}
    weights, file = folder / f"{card.name}.safetensors", folder / f"{card.name}.json"

    folder.mkdir(parents=True, exist_ok=True)
    with staging_folder(folder) as staging:
        save_file(tensors, staging / weights.name)
        (staging / weights.name).chmod(0o644)  # safetensors makes it readable for its owner alone
        values = asdict(card) | {"sha256": checksum(staging / weights.name), "format": FORMAT}
        (staging / file.name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        for target in (weights, file):
            os.replace(staging / target.name, target)
    return file
