"""Makes a model of a trained class network alone: variational registration, guided by what the network sees.

    python training/classes/export.py --run DIR --name NAME [--models DIR] [KEY=VALUE ...]

DIR is the ``--output`` of ``training/classes/train.py``; KEY=VALUE are entries of the model card, such as ``anatomy=head`` or
``variational.class_weight=300``. ``training/train.py`` writes networks of all kinds into one model.
"""

import argparse
import sys
from pathlib import Path

import torch
from omegaconf import OmegaConf

from DivRegNetLib import models
from DivRegNetLib.errors import DivRegNetError
from DivRegNetLib.registration.variational import DEFAULT, REFINEMENT
from DivRegNetLib.similarity.classes import ClassNet, ClassNetConfig
from training.classes.trainer import BEST
from training.report import commit


def load(run: Path) -> tuple[ClassNet, dict]:
    """The best weights of a training, and what else :meth:`ClassTrainer.weights` keeps.

    Raises:
        FileNotFoundError: there are none yet.
    """
    kept = torch.load(run / BEST, map_location="cpu", weights_only=True)
    return network(kept), kept


def network(kept: dict) -> ClassNet:
    """The network whose weights and architecture are given, ready for inference."""
    net = ClassNet(ClassNetConfig(**kept["classnet"]))
    net.load_state_dict(kept["net"])
    return net.eval().requires_grad_(False)


def entries(kept: dict) -> dict:
    """What a model card says of a class network: ``classnet``, ``classes``, and ``scores`` of the validation."""
    scores = {f"segmentation {k}": round(v, 4) for k, v in kept["scores"].items() if k.startswith("Dice")}
    return {"classnet": kept["classnet"], "classes": kept["names"], "scores": scores}


def export(run: Path, name: str, folder: Path, about: dict) -> Path:
    """Writes weights and card; returns the card's file.

    Args:
        about: entries of the card; nested ones are laid over what is there.
    Raises:
        FileNotFoundError: nothing was validated yet; ValueError: an unknown key, or a value that cannot be.
    """
    net, kept = load(run)
    spacings = {mm for stock in kept["spacing"] for mm in stock}
    values = {
        "name": name,
        "version": "1.0",
        "summary": f"{name}: guided by {len(kept['names']) - 1} classes",
        "modalities": ["any"],
        "anatomy": "not stated",
        "skull": "not applicable",
        "spacing_mm": spacings.pop() if len(spacings) == 1 else 0.0,
        "normalization": kept["normalization"],
        "methods": ["variational"],
        "variational": DEFAULT.as_dict(),
        "refinement": REFINEMENT.as_dict(),
        "regnet": None,
        "kldivnet": None,
        "training": {"steps": kept["step"], "volumes": kept["volumes"], "git": commit()}
        | {"classes": anonymous(kept["config"])},
        "license": "not stated",
        "sha256": "",
    } | entries(kept)  # fmt: skip
    try:
        card = models.Card(**OmegaConf.to_container(OmegaConf.merge(OmegaConf.create(values), about)))
    except TypeError as error:
        raise ValueError(f"card: {error}") from error
    file = models.save(folder, card, None, None, net)
    models.load(str(file))
    return file


def anonymous(config: dict) -> dict:
    """A configuration without the folders of this machine."""
    sources = [source | {"cohort": Path(source["cohort"]).name} for source in config["sources"]]
    return config | {"sources": sources}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--name", required=True, help="of the model")
    parser.add_argument("--models", type=Path, help=f"default: {models.own_folders()[0]}")
    parser.add_argument("about", nargs="*", metavar="KEY=VALUE", help="entries of the model card")
    args = parser.parse_intermixed_args()
    try:
        about = OmegaConf.to_container(OmegaConf.from_dotlist(args.about))
        print(export(args.run, args.name, args.models or models.own_folders()[0], about))
    except (ValueError, OSError, DivRegNetError) as error:
        print(f"export.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
