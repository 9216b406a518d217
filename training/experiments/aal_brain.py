"""AAL Brain (arXiv 1908.08767, Table 2 and Figure 4): comparison of methods on phantoms with a known deformation.

    python training/data/prepare_head.py --data DIR --template --output build/cohorts/aal
    python training/experiments/aal_brain.py --cohort build/cohorts/aal --preset paper

Every method registers the same test phantoms on the cohort's grid. The networks are trained by this command without
supervision, one per task and row. Run again, it continues where it was interrupted. ``--preset reduced --pairs 3`` takes less
time, with small networks that are trained on parts of the phantoms.
"""

import argparse
import sys
from pathlib import Path

from training import report
from training.data import phantoms
from training.experiments import comparison

START = (0.9039, 1.34, 9.84)
EXPERIMENT = comparison.Experiment(
    name="aal-brain",
    config="aal-brain.yaml",
    truth=True,
    tasks=phantoms.TASKS,
    overrides=lambda tasks: (f"data.tasks=[{', '.join(tasks)}]",),
    paper={
        ("affine", "T1-T2"): START, ("affine", "PD-T2"): START, ("affine", "T2-T2"): START,
        ("FFD+SEMI", "T1-T2"): (0.9288, 1.06, 9.14), ("FFD+SEMI", "PD-T2"): (0.9281, 1.04, 9.04),
        ("FFD+SEMI", "T2-T2"): (0.9293, 1.04, 9.47),
        ("RegNet + LNCC", "T1-T2"): (0.8709, 1.52, 9.90), ("RegNet + LNCC", "PD-T2"): (0.9164, 1.18, 9.50),
        ("RegNet + LNCC", "T2-T2"): (0.9499, 0.80, 9.47),
        ("RegNet + MI 16", "T1-T2"): (0.9296, 1.02, 9.84), ("RegNet + MI 16", "PD-T2"): (0.9306, 1.01, 9.71),
        ("RegNet + MI 16", "T2-T2"): (0.9477, 0.82, 9.52),
        ("RegNet + MI 64", "T1-T2"): (0.9524, 0.75, 9.70), ("RegNet + MI 64", "PD-T2"): (0.9484, 0.80, 9.71),
        ("RegNet + MI 64", "T2-T2"): (0.9575, 0.69, 9.62),
        ("RegNet + MI 256", "T1-T2"): (0.9527, 0.75, 9.78), ("RegNet + MI 256", "PD-T2"): (0.9491, 0.78, 9.74),
        ("RegNet + MI 256", "T2-T2"): (0.9575, 0.69, 9.46),
        ("DivRegNet", "T1-T2"): (0.9546, 0.72, 9.60), ("DivRegNet", "PD-T2"): (0.9501, 0.78, 9.73),
        ("DivRegNet", "T2-T2"): (0.9585, 0.67, 9.41),
    },
    note="Dice, ASD and HD are of the union of the AAL labels; the error is the distance to the true deformation inside "
    "it. Columns `paper` are Table 2 of arXiv 1908.08767, whose phantoms are others of the same kind.",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cohort", type=Path, required=True, help="the folder that training/data/prepare_head.py wrote"
    )
    comparison.add_arguments(parser, EXPERIMENT)
    try:
        if rows := comparison.run(EXPERIMENT, parser.parse_args()):
            print(report.table(rows))
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        print(f"aal_brain.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("aal_brain.py: interrupted; the same command continues from the last checkpoints", file=sys.stderr)
        return comparison.INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
