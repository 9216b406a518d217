"""Turns a training run into a model: weights and card, where ``divregnet models`` and Slicer find them.

python training/export.py --run build/training/head-mr --models Resources/Models
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from DivRegNetLib import models
from training import cohort as cohorts
from training import config as configs
from training.train import Trainer


def export(trainer: Trainer, folder: Path) -> Path:
    """Writes the averaged weights with a card filled from the configuration, and loads them back as a check.

    Returns:
        The card's file.
    """
    config = trainer.config
    about = dict(config.card)
    card = models.Card(
        name=config.name,
        version=about.pop("version", "1.0"),
        summary=about.pop("summary", ""),
        modalities=about.pop("modalities", []),
        anatomy=about.pop("anatomy", ""),
        skull=about.pop("skull", "not applicable"),
        spacing_mm=trainer.cohort.spacing,
        normalisation="robust",
        regnet=config.regnet.as_dict(),
        kldivnet=config.kldivnet.as_dict(),
        training=about.pop("training", {}) | {"steps": trainer.step_number, "configuration": config.as_dict()},
        scores={name: round(value, 4) for name, value in trainer.validate().items()},
        licence=about.pop("licence", ""),
        sha256="",
    )
    if about:
        raise ValueError(f"unknown key {sorted(about)[0]!r} under card; known are version, summary, modalities, "
                         "anatomy, skull, training and licence")  # fmt: skip
    card.training["configuration"].pop("card")
    file = models.save(folder, card, trainer.ema, trainer.kldivnet)
    models.load(str(file))
    return file


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="the --output of training/train.py")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True, help="folder the model goes to")
    args = parser.parse_args()
    config = configs.load(args.config)
    trainer = Trainer(config, cohorts.load(Path(config.cohort)), torch.device("cpu"))
    trainer.restore(torch.load(args.run / "last.pt", map_location="cpu", weights_only=True))
    file = export(trainer, args.models)
    print(file, json.dumps(asdict(models.read_card(file))["scores"], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
