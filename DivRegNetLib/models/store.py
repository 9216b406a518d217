"""Models on disk: weights as safetensors, and beside them a card (JSON) that describes them.

A model is two files, ``NAME.safetensors`` and ``NAME.json``, in ``Resources/Models`` or in a folder of the user's own: those
that the environment variable ``DIVREGNET_MODELS`` names (separated as in PATH), else ``.divregnet/models`` in the home
folder. Cards can be read without torch.
"""

import contextlib
import copy
import glob
import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from DivRegNetLib.errors import ModelError
from DivRegNetLib.io.atomic import staging_folder
from DivRegNetLib.models.card import FORMAT, Card, read_card

if TYPE_CHECKING:
    import torch

    from DivRegNetLib.core.recording import Recorder
    from DivRegNetLib.registration.regnet import RegNet
    from DivRegNetLib.similarity.classes import ClassNet
    from DivRegNetLib.similarity.kldivnet import KLDivNet

DEFAULT = "general"
ENVIRONMENT = "DIVREGNET_MODELS"
LARGEST_WEIGHTS_BYTES = 500_000_000
SUFFIX = ".safetensors"
ATTEMPTS = 3  # to read a card and the weights that belong to it
ABANDONED_SECONDS = 3600.0  # age of weights that no card refers to, after which they are removed


@dataclass(frozen=True)
class Model:
    """A loaded model, ready for inference."""

    card: Card
    regnet: "RegNet | None"
    kldivnet: "KLDivNet | None"
    classnet: "ClassNet | None" = None
    kept: dict = field(default_factory=dict, compare=False, repr=False)

    def on(self, device: "torch.device") -> "Model":
        """The same model with its networks on a device: copies, unless they are there already. This model is not changed."""

        def is_there(network) -> bool:
            places = {p.device for p in network.parameters()}
            return all(p.type == device.type and device.index in (None, p.index) for p in places)

        networks = (self.regnet, self.kldivnet, self.classnet)
        if all(network is None or is_there(network) for network in networks):
            return self
        copies = (None if network is None else copy.deepcopy(network).to(device) for network in networks)
        return Model(self.card, *copies)

    def recorder(self) -> "Recorder":
        """Keeps the recordings of the methods on a GPU."""
        from DivRegNetLib.core.recording import Recorder

        return self.kept.setdefault("recorder", Recorder())


def bundled_folder() -> Path:
    """The folder of the bundled models: beside the library in a checkout, in a wheel or in Slicer's extension."""
    here = Path(__file__).resolve().parents[1]
    candidates = (here / "Resources" / "Models", here.parent / "Resources" / "Models")
    return next((c for c in candidates if c.is_dir()), candidates[-1])


def own_folders() -> list[Path]:
    """The user's own folders of models, whether they exist or not; none where none is named and the user has no home."""
    named = [os.path.expanduser(entry) for entry in os.environ.get(ENVIRONMENT, "").split(os.pathsep) if entry]
    try:
        return [Path(entry) for entry in named] or [Path.home() / ".divregnet" / "models"]
    except RuntimeError:
        return []


def own_folder() -> Path:
    """Where trained models go.

    Raises:
        ModelError: no folder is named, and the user has no home.
    """
    if folders := own_folders():
        return folders[0]
    raise ModelError(
        f"there is no home folder for the model: name a folder, or set the environment variable {ENVIRONMENT}"
    )


def folders() -> list[Path]:
    """Folders that are searched, the user's own first."""
    return [*own_folders(), bundled_folder()]


def card_files() -> dict[str, Path]:
    """Name -> card file of every model; where a name occurs in several folders, the first folder counts. Cards are not read."""
    files: dict[str, Path] = {}
    for folder in folders():
        for file in sorted(folder.glob("*.json")) if folder.is_dir() else []:
            files.setdefault(file.stem, file)
    return files


def find(name: str | Path) -> Path:
    """The card file of a model, by its name or by the path of its card.

    Raises:
        ModelError: there is no model of that name; the message lists the models.
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
    import torch

    from DivRegNetLib.core.torch_state import default_state

    file = find(name)
    card, weights, content = _read(file)
    with default_state(), torch.random.fork_rng(devices=[]):  # new networks draw numbers that the weights then replace
        return _build(file, card, weights, content, device)


class Cache:
    """Loads models as :func:`load` does and keeps the last one, which it gives again while name, device and files are the
    same. For a process that does one registration after another; not for several threads at once."""

    def __init__(self) -> None:
        self._key: object = None
        self._model: Model | None = None

    def load(self, name: str | Path, device: "torch.device | str" = "cpu") -> Model:
        """The model; see :func:`load`. Its files are read and compared with their checksum each time."""
        file = find(name)
        key = (file, _read(file)[0], str(device))
        if self._model is None or key != self._key:
            self._model = None  # not two models at once
            self._model, self._key = load(name, device), key
        return self._model


def _read(file: Path) -> tuple[Card, Path, bytes]:
    """A card, the file of its weights and their content, also while another process replaces them.

    Raises:
        ModelError: they are missing, damaged or do not belong together.
    """
    for last in (*[False] * (ATTEMPTS - 1), True):
        card = read_card(file)
        usual = file.with_suffix(SUFFIX)
        for weights in (usual, _fresh(file, card.sha256)):
            try:
                if weights.stat().st_size > LARGEST_WEIGHTS_BYTES:
                    raise ModelError(f"{weights}: weights of more than {LARGEST_WEIGHTS_BYTES} bytes are refused")
                content = weights.read_bytes() if weights.is_file() else None
            except OSError as error:
                if not isinstance(error, FileNotFoundError):
                    raise ModelError(f"{weights}: cannot be read ({error.strerror or error})") from error
                continue
            if content is not None and hashlib.sha256(content).hexdigest() == card.sha256:
                return card, weights, content
        if last and not usual.is_file():
            raise ModelError(f"{usual}: the weights of model {card.name!r} are missing")
    raise ModelError(f"{usual}: the checksum is not the one in its card: damaged or exchanged; get both files again")


def _fresh(file: Path, sha256: str) -> Path:
    """Where the weights of a card are until they have replaced those of the card before."""
    return file.with_name(f"{file.stem}.{sha256[:12]}{SUFFIX}")


def _build(file: Path, card: Card, weights: Path, content: bytes, device: "torch.device | str") -> Model:
    """The networks of a card with these weights."""
    import safetensors
    import torch
    from safetensors.torch import load as load_tensors

    from DivRegNetLib.core.intensity import SCHEMES
    from DivRegNetLib.registration.regnet import RegNet, RegNetConfig
    from DivRegNetLib.similarity.classes import ClassNet, ClassNetConfig
    from DivRegNetLib.similarity.kldivnet import KLDivNet, KLDivNetConfig

    if card.normalization not in SCHEMES:
        raise ModelError(f"{file}: unknown normalization {card.normalization!r}, known are {', '.join(SCHEMES)}")
    try:
        tensors = load_tensors(content)
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
    """Writes weights and card; the card's sha256 is filled in. Returns the card's file.

    A model of that name is replaced in one step, by the card: before it the old weights are in place, and from then on the
    new ones are found under a name of their own, until they have theirs.
    """
    from safetensors.torch import save_file

    tensors = {}
    for prefix, network in (("regnet", regnet), ("kldivnet", kldivnet), ("classnet", classnet)):
        if network is not None:
            tensors |= {f"{prefix}.{k}": v.detach().cpu().contiguous() for k, v in network.state_dict().items()}
    file = folder / f"{card.name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    with staging_folder(folder) as staging:
        weights = staging / f"weights{SUFFIX}"
        save_file(tensors, weights)
        weights.chmod(0o644)  # safetensors makes it readable for its owner alone
        values = asdict(card) | {"sha256": checksum(weights), "format": FORMAT}
        (staging / file.name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        fresh = _fresh(file, values["sha256"])
        os.replace(weights, fresh)
        os.replace(staging / file.name, file)
    os.replace(fresh, file.with_suffix(SUFFIX))
    for left in folder.glob(f"{glob.escape(card.name)}.{'[0-9a-f]' * 12}{SUFFIX}"):  # of a process that was killed
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > ABANDONED_SECONDS:
                left.unlink()
    return file
