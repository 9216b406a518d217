"""Exports a training run as a model: weights and card, in a folder where ``divregnet models`` and Slicer find them.

    python training/export.py --run build/training/NAME [--models DIR]

``train.py`` does this at its end. This program exports the best weights so far of a run that is still in progress.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from lightning_fabric import Fabric

from DivRegNetLib import models
from DivRegNetLib.registration.variational import REFINEMENT
from training import config as configs
from training.classes.export import anonymous, entries, load
from training.classes.trainer import BEST as CLASSES
from training.data import cohort as cohorts
from training.data.sources import Source, source_of
from training.report import commit
from training.trainer import BEST, LAST, Trainer


def export_model(trainer: Trainer, run: Path, folder: Path, classes: dict | None = None) -> Path:
    """Writes the best weights of a run and a model card, and registers a held-out pair with the model.

    All processes of a training have to call this, as they share the validation; the first one writes.

    Args:
        run: the folder that :func:`training.trainer.fit` wrote.
        folder: where the model is written.
        classes: the class network that took part, see :meth:`training.classes.trainer.ClassTrainer.weights`.
    Returns:
        The file of the card.
    Raises:
        ValueError: an unknown key under ``card``.
    """
    config, cohort = trainer.config, trainer.source.cohort
    best = torch.load(run / BEST, map_location=trainer.fabric.device, weights_only=True)
    trainer.objective.load_state_dict(best["objective"])
    if trainer.ema is not None:
        trainer.ema.load_state_dict(best["ema"])
    contrasts = sorted({c for v in cohort.volumes for c in v.contrasts})
    about = {
        "version": "1.0",
        "summary": f"{config.name}, trained on {len(cohort.volumes)} volumes",
        "modalities": contrasts,
        "anatomy": "not stated",
        "skull": "not applicable",
        "license": "not stated",
        "training": {},
    } | config.card
    split = "test" if any(True for _ in trainer.source.held_out("test")) else "validation"
    scores = {name: round(value, 4) for name, value in trainer.validate(split).items()}
    scores |= {f"{name} at the start": round(v, 4) for name, v in trainer.validate(split, start=True).items()}
    settings = config.as_dict()
    del settings["card"], settings["steps"]  # the card has the number of steps already
    settings["data"]["cohort"] = Path(config.data.cohort).name  # without the folders of this machine
    settings["classes"] = anonymous(settings["classes"])
    about["training"] = about["training"] | {
        "steps": best["step"],
        "volumes": {s: len(cohort.split(s)) for s in cohorts.SPLITS},
        "scores of": split,
        "git": commit(),
        "torch": torch.__version__,
        "configuration": settings,
    }
    kldivnet = trainer.objective.kldivnet
    known = {
        "name": config.name,
        "spacing_mm": float(cohort.spacing),
        "normalization": cohort.normalization,
        "methods": list(config.methods),
        "variational": config.variational.as_dict(),
        "refinement": REFINEMENT.as_dict(),
        "regnet": None if trainer.ema is None else config.regnet.as_dict(),
        "kldivnet": None if kldivnet is None else config.kldivnet.as_dict(),
        "scores": scores,
        "sha256": "",
    }
    if classes is not None:
        of_classes = entries(classes)
        known |= of_classes | {"scores": scores | of_classes["scores"]}
    try:
        card = models.Card(**(known | about))
    except TypeError as error:
        known = "version, summary, modalities, anatomy, skull, spacing_mm, license, good_for, limits, training"
        raise ValueError(f"card: {error}; known are {known}") from error
    if not trainer.fabric.is_global_zero:
        return folder / f"{card.name}.json"
    file = models.save(folder, card, trainer.ema, kldivnet, trainer.classnet)
    _try_out(file, trainer.source, split)
    return file


def _try_out(file: Path, source: Source, split: str) -> None:
    """Loads the model and registers a held-out pair with it, through the pipeline that users run."""
    try:
        import SimpleITK as sitk
    except ImportError:
        print("SimpleITK is not installed: the model was not tried on a pair", file=sys.stderr)
        return
    from DivRegNetLib.registration.pipeline import register

    cohort = source.cohort
    _, pair = next(iter(source.held_out(split)))
    images = []
    for tensor in (pair.fixed, pair.moving):
        image = sitk.GetImageFromArray(tensor[0, 0].float().cpu().numpy())
        image.SetSpacing([cohort.spacing] * 3)
        image.SetOrigin(cohort.origin)
        images.append(image)
    quality = register(*images, model=models.load(str(file)), align="none", device="cpu").quality
    print(f"tried on a held-out pair: NMI {quality['nmi']['before']:.3f} -> {quality['nmi']['after']:.3f}, "
          f"{quality['folded_percent']:.2g} % folded")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="the --output of training/train.py")
    parser.add_argument("--models", type=Path, help="default: your own folder of models")
    args = parser.parse_args()
    try:
        settings = torch.load(args.run / LAST, map_location="cpu", weights_only=True)["config"]
        config = configs.build(settings)
        net, classes = load(args.run) if (args.run / CLASSES).exists() else (None, None)
        trainer = Trainer(config, source_of(config), Fabric(accelerator="cpu", devices=1), net)
        file = export_model(trainer, args.run, args.models or models.own_folder(), classes)
    except (ValueError, FileNotFoundError) as error:
        print(f"export.py: {error}", file=sys.stderr)
        return 2
    print(file, json.dumps(models.read_card(file).scores, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
