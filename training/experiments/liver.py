"""LiTS Liver (arXiv 1908.08767, Table 3: CT to CT) and Hospital Liver (Table 4: MR to CT) on your own data.

    python training/experiments/liver.py lits --cohort DIR --preset paper
    python training/experiments/liver.py hospital --fixed CT --moving MR --fixed-labels CT_LIVER --moving-labels MR_LIVER

LiTS (131 CT, 70/30/31) is public, see https://competitions.codalab.org/competitions/17094. Hospital Liver (14 CT, 19 MR) is
private; any cohort with the same layout can take its place. Volumes are brought into a common space by an affine alignment.
The label map of the liver is used for scores only, not for training.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from DivRegNetLib.errors import DivRegNetError
from training import report
from training.data import layouts, prepare
from training.experiments import comparison

EXPERIMENTS = {
    "lits": comparison.Experiment(
        name="lits-liver",
        config="liver.yaml",
        tasks=("CT-CT",),
        paper={
            ("affine", "CT-CT"): (0.7682, 8.02, 51.06), ("FFD+SEMI", "CT-CT"): (0.7905, 7.34, 49.22),
            ("RegNet + LNCC", "CT-CT"): (0.8777, 5.86, 45.53), ("RegNet + MI 64", "CT-CT"): (0.9016, 4.98, 42.37),
            ("DivRegNet", "CT-CT"): (0.9030, 4.97, 42.69),
        },
        note="Dice, ASD and HD of the liver. Columns `paper` are Table 3 of arXiv 1908.08767.",
    ),
    "hospital": comparison.Experiment(
        name="hospital-liver",
        config="liver.yaml",
        tasks=("MR-CT",),
        paper={
            ("affine", "MR-CT"): (0.8084, 5.35, 44.29), ("FFD+SEMI", "MR-CT"): (0.8304, 4.81, 43.73),
            ("RegNet + LNCC", "MR-CT"): (0.8247, 5.12, 43.11), ("RegNet + MI 64", "MR-CT"): (0.8348, 4.77, 44.09),
            ("DivRegNet", "MR-CT"): (0.8351, 4.72, 43.88),
        },
        note="Dice, ASD and HD of the liver, MR to CT. Columns `paper` are Table 4 of arXiv 1908.08767.",
    ),
}  # fmt: skip
SPLITS = {"lits": (70, 30, 31), "hospital": (6, 4, 4, 10, 4, 5)}
"""Numbers of subjects in the paper; a cohort of another size is split by the usual shares."""


def prepared(which: str, args: argparse.Namespace) -> Path:
    """The folder of the prepared cohort.

    Raises:
        ValueError: no cohort is named, or volumes lack a label map.
    """
    sources = layouts.from_arguments(args)
    if sources is None:
        raise ValueError("name the volumes: --cohort DIR (LiTS), or --fixed DIR --moving DIR with their labels")
    if bare := [source.name for source in sources if source.labels is None]:
        raise ValueError(
            f"{bare[0]} and {len(bare) - 1} more have no label map, which is needed for the scores of the liver"
        )
    preparation = prepare.from_arguments(args, seed=1)
    subjects = len({source.subject for source in sources})
    if args.split == prepare.Preparation.fractions and subjects == sum(SPLITS[which]):
        preparation = replace(preparation, fractions=SPLITS[which])
    return prepare.prepare_cohort(sources, args.output / "cohort", preparation).parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    experiments = parser.add_subparsers(dest="which", required=True)
    for which, experiment in EXPERIMENTS.items():
        one = experiments.add_parser(which, description=experiment.note)
        layouts.add_arguments(one)
        prepare.add_arguments(one)
        comparison.add_arguments(one, experiment)
    args = parser.parse_args()
    try:
        args.cohort = prepared(args.which, args)
        if rows := comparison.run(EXPERIMENTS[args.which], args):
            print(report.table(rows))
    except (ValueError, OSError, FloatingPointError, DivRegNetError) as error:
        print(f"liver.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("liver.py: interrupted; the same command continues from the last checkpoints", file=sys.stderr)
        return comparison.INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
