"""Trains the class network that a model's registrations are guided by, alone.

    python training/classes/train.py --config training/configs/classes/heads.yaml --output DIR [--resume] [KEY=VALUE ...]
    python training/classes/train.py --cohort PREPARED --output DIR

``python training/train.py --labels ...`` does this as part of a whole training; this command is for label maps that are
painted, several cohorts at once, and experiments. Interrupted, the same command with ``--resume`` goes on from the last
checkpoint, bit by bit on a CPU.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from DivRegNetLib.core.device import pick_device
from DivRegNetLib.errors import DivRegNetError
from DivRegNetLib.io.output_folder import exclusive
from training import layers
from training.classes import subjects
from training.classes.config import CONFIGS, ClassTraining
from training.classes.trainer import fit, steps_begun, steps_in

INTERRUPTED = 130


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIGS / "cohort.yaml", help="default: %(default)s")
    parser.add_argument("--cohort", type=Path, help="a prepared cohort with labels, in place of the configuration's")
    parser.add_argument("--preset", help="one of those in the configuration, such as quick")
    parser.add_argument("--output", type=Path, required=True, help="checkpoints and log")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted training")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--minutes", type=float, help="of training: as many steps as this device makes in them")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the configuration")
    args = parser.parse_intermixed_args()
    try:
        values = {"sources": [{"cohort": str(args.cohort)}]} if args.cohort else {}
        config = layers.load(ClassTraining, args.config, preset=args.preset, overrides=args.overrides, **values)
        device = pick_device(args.device)
        with exclusive(args.output):
            read = subjects.load(config, device)
            if args.minutes:
                config = replace(config, steps=steps_begun(args.output) or steps_in(60 * args.minutes, config, read))
            trainer = fit(config, read, args.output, resume=args.resume)
        print(f"{args.output}: step {trainer.step_number}, best Dice {trainer.best:.4f} of {', '.join(read.names[1:])}")
    except (ValueError, OSError, FloatingPointError, DivRegNetError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train.py: interrupted; the same command with --resume goes on from the last checkpoint", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
