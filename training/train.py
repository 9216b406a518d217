"""Trains a model on a cohort, from raw volumes to a model in Slicer's list.

    python training/train.py --images DIR [--labels DIR] --name my-model      one kind of image, all pairs
    python training/train.py --fixed DIR --moving DIR --name my-model         two kinds, such as CT and MR
    python training/train.py --config training/configs/NAME.yaml              an experiment
    torchrun --nproc_per_node=2 training/train.py ...                         several processes, GPUs or machines

Any value of the configuration can be given as KEY=VALUE, such as loss.diffusion=1.5. See training/README.md.
"""

import argparse
import os
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy

from DivRegNetLib import models
from DivRegNetLib.errors import DivRegNetError
from DivRegNetLib.io.output_folder import exclusive
from training import config as configs
from training.config import CONFIGS
from training.data import layouts, prepare
from training.data.sources import source_of
from training.export import export
from training.trainer import fit

INTERRUPTED = 130


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    layouts.add_arguments(made)
    prepare.add_arguments(made)
    training = made.add_argument_group("training")
    training.add_argument("--config", type=Path, help="YAML file (default: training/configs/retrain.yaml)")
    training.add_argument("--preset", help="one of those in the configuration, such as quick or paper")
    training.add_argument("--name", help="of the model")
    training.add_argument("--from", dest="start", metavar="MODEL", help="fine-tune this model instead of a new one")
    training.add_argument("--steps", type=int)
    training.add_argument("--output", type=Path, help="checkpoints and log (default: build/training/NAME)")
    training.add_argument("--models", type=Path, help=f"where the model goes (default: {models.own_folders()[0]})")
    training.add_argument("--resume", action="store_true", help="go on with an interrupted training")
    training.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    made.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the configuration")
    return made


def configuration(args: argparse.Namespace) -> configs.Config:
    """The run that the command line asks for."""
    values: dict = {k: v for k, v in (("name", args.name), ("steps", args.steps)) if v is not None}
    if args.start:
        card = models.read_card(models.find(args.start))
        values |= {"start": args.start, "regnet": card.regnet}
        if card.kldivnet is not None:
            values["kldivnet"] = card.kldivnet
    file = args.config or CONFIGS / "retrain.yaml"
    return configs.load(file, preset=args.preset, overrides=args.overrides, **values)


def fabric_of(device: str, precision: str) -> Fabric:
    """One process, or as many as torchrun started."""
    here, world = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), int(os.environ.get("WORLD_SIZE", 1))
    # While KLDivNet warms up, RegNet has no gradient.
    strategy = DDPStrategy(find_unused_parameters=True) if world > 1 else "auto"
    fabric = Fabric(accelerator=device, strategy=strategy, devices=here, num_nodes=world // here, precision=precision)
    fabric.launch()
    return fabric


def prepared(args: argparse.Namespace, config: configs.Config, output: Path) -> Path | None:
    """Prepares the raw volumes that the command line names; None where it names none."""
    sources = layouts.from_arguments(args)
    if not sources:
        return None
    preparation = prepare.from_arguments(args, config.seed)
    if preparation.spacing_mm is None and config.start:
        preparation = replace(preparation, spacing_mm=models.read_card(models.find(config.start)).spacing_mm or None)
    return prepare.prepare(sources, output / "cohort", preparation).parent


def main() -> int:
    args = parser().parse_intermixed_args()
    try:
        if args.name is None and args.config is None:
            raise ValueError("give the model a --name, or an experiment's --config")
        config = configuration(args)
        output = args.output or Path("build/training") / config.name
        fabric = fabric_of(args.device, config.precision)
        with exclusive(output) if fabric.is_global_zero else nullcontext():
            cohort = prepared(args, config, output) if fabric.is_global_zero else None
            if cohort := fabric.broadcast(cohort):
                config = replace(config, data=replace(config.data, cohort=str(cohort)))
            trainer = fit(config, source_of(config, fabric.device), output, fabric, resume=args.resume)
            if fabric.is_global_zero:
                print(export(trainer, output, args.models or models.own_folders()[0]))
            fabric.barrier()
    except (ValueError, OSError, FloatingPointError, DivRegNetError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train.py: interrupted; the same command with --resume goes on from the last checkpoint", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
