"""Trains a model on a cohort: prepares the volumes, trains, and adds the model to Slicer's list of models.

    python training/train.py --images DIR [--labels DIR] --name my-model      one kind of image, all pairs
    python training/train.py --fixed DIR --moving DIR --name my-model         two kinds, such as CT and MR
    python training/train.py --config training/configs/NAME.yaml              an experiment
    torchrun --nproc_per_node=2 training/train.py ...                         several processes, GPUs or machines

Every value of the configuration can be replaced by KEY=VALUE, such as loss.diffusion=1.5. See docs/training.md.
"""

import argparse
import os
import sys
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy

from DivRegNetLib import models
from DivRegNetLib.errors import DivRegNetError
from DivRegNetLib.io.output_folder import exclusive
from training import config as configs
from training.classes.export import network
from training.classes.trainer import fit_to_cohort
from training.config import CONFIGS
from training.data import layouts, prepare
from training.data.sources import source_of
from training.export import export_model
from training.trainer import fit

INTERRUPTED = 130
PATIENCE = timedelta(days=7)
"""How long a process waits for the others, which may be preparing a large cohort. The default, minutes, is too short for
that. A process that fails does not have to be waited for: torchrun then ends the others."""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    layouts.add_arguments(made)
    prepare.add_arguments(made)
    group = made.add_argument_group("training")
    group.add_argument("--config", type=Path, help="YAML file (default: training/configs/retrain.yaml)")
    group.add_argument("--preset", help="a preset of the configuration, such as quick or paper")
    group.add_argument("--name", help="name of the model")
    group.add_argument("--from", dest="start", metavar="MODEL", help="fine-tune this model")
    group.add_argument("--steps", type=int)
    group.add_argument("--output", type=Path, help="folder of checkpoints and log (default: build/training/NAME)")
    group.add_argument("--models", type=Path, help="folder of the model (default: your own folder of models)")
    group.add_argument("--resume", action="store_true", help="continue an interrupted training")
    group.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    made.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="values of the configuration")
    return made


def configuration(args: argparse.Namespace) -> configs.Config:
    """The configuration that results from file, preset and command line."""
    values: dict = {k: v for k, v in (("name", args.name), ("steps", args.steps)) if v is not None}
    if args.start:
        card = models.read_card(models.find(args.start))
        values["start"] = args.start
        values |= {k: getattr(card, k) for k in ("regnet", "kldivnet") if getattr(card, k) is not None}
    file = args.config or CONFIGS / "retrain.yaml"
    return configs.load(file, preset=args.preset, overrides=args.overrides, **values)


def fabric_of(device: str, precision: str) -> Fabric:
    """Fabric for this process alone, or for all processes that torchrun started."""
    here, world = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), int(os.environ.get("WORLD_SIZE", 1))
    # RegNet has no gradient while KLDivNet warms up.
    strategy = DDPStrategy(find_unused_parameters=True, timeout=PATIENCE) if world > 1 else "auto"
    fabric = Fabric(accelerator=device, strategy=strategy, devices=here, num_nodes=world // here, precision=precision)
    fabric.launch()
    return fabric


def prepared(args: argparse.Namespace, config: configs.Config, output: Path) -> Path | None:
    """The folder of the cohort, prepared from the volumes that the command line names; None if it names none."""
    sources = layouts.from_arguments(args)
    if not sources:
        return None
    preparation = prepare.from_arguments(args, config.seed)
    if preparation.spacing_mm is None and config.start:
        preparation = replace(preparation, spacing_mm=models.read_card(models.find(config.start)).spacing_mm or None)
    return prepare.prepare_cohort(sources, output / "cohort", preparation).parent


def class_network(config: configs.Config, output: Path, device: torch.device, resume: bool) -> dict | None:
    """The class network of the model, see :func:`training.classes.export.network`: trained on the cohort's labels; without
    labels, that of the model that is fine-tuned; None if there is none."""
    kept = fit_to_cohort(config.classes, Path(config.data.cohort), output, device, resume=resume)
    if kept is None and config.start and (model := models.load(config.start)).classnet is not None:
        kept = {
            "net": model.classnet.state_dict(),
            "classnet": model.card.classnet,
            "names": model.card.classes,
            "scores": {},
        }
    return kept


def main() -> int:
    args = parser().parse_intermixed_args()
    try:
        if args.name is None and args.config is None:
            raise ValueError("give a --name for the model, or the --config of an experiment")
        config = configuration(args)
        output = args.output or Path("build/training") / config.name
        fabric = fabric_of(args.device, config.precision)
        with exclusive(output) if fabric.is_global_zero else nullcontext():
            cohort = prepared(args, config, output) if fabric.is_global_zero else None
            if cohort := fabric.broadcast(cohort):
                config = replace(config, data=replace(config.data, cohort=str(cohort)))
            source = source_of(config, fabric.device)
            kept = class_network(config, output, fabric.device, args.resume) if fabric.is_global_zero else None
            kept = fabric.broadcast(kept)
            classnet = None if kept is None else network(kept)
            trainer = fit(config, source, output, fabric, classnet=classnet, resume=args.resume)
            fabric.print(export_model(trainer, output, args.models or models.own_folder(), kept))
            fabric.barrier()
    except (ValueError, OSError, FloatingPointError, DivRegNetError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "train.py: interrupted; the same command with --resume continues from the last checkpoint", file=sys.stderr
        )
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
