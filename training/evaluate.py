"""Evaluates a model through the pipeline that users run, on pairs of the benchmark with their own grids and resolution.

    python training/evaluate.py --data DIR [--families FAMILY ...] [--refine N] [--output build/evaluation]

The families are those of ``training/benchmarks/cases.py``. The default is AAL phantoms (arXiv 1908.08767, Table 2) and
another person's scans (MS07) to BrainWeb. ``benchmark.py`` compares methods on a common grid instead.
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from tqdm import tqdm

from DivRegNetLib import models
from DivRegNetLib.core.grid import Grid, affine_transform
from DivRegNetLib.errors import DivRegNetError
from DivRegNetLib.registration.pipeline import register
from training import report, scoring
from training.benchmarks.cases import FAMILIES, FIRST_SEED, Family, Material, phantom_cases

PHANTOMS = "AAL phantoms"


def evaluated(material: Material, align: str, settings: dict) -> list[dict]:
    """Scores of a pair after the initial alignment and after the registration."""
    result = register(material.fixed, material.moving, align=align, **settings)
    known: dict = {"landmarks": material.landmarks}
    if material.truth is not None:
        known["truth"] = scoring.displacement_on(material.truth, Grid.of(material.fixed))
        if material.inside is not None:
            known["inside"] = sitk.GetArrayFromImage(material.inside) > 0
    rows = []
    for stage, transform in (("aligned", affine_transform(result.initial)), ("registered", result.transform)):
        scores = scoring.of_transform(transform, material.fixed_labels, material.moving_labels, each=True, **known)
        rows.append({"stage": stage} | scores)
    rows[1] |= {"folded %": result.quality["folded_percent"], "seconds": sum(result.timings.values())}
    return rows


def evaluate(families: dict[str, Family], data: Path, settings: dict) -> list[dict]:
    """One row for each family, task and stage: the means over the cases of a task.

    The task is the name of a case up to the first comma.
    """
    groups: dict[tuple[str, str, str], list[dict]] = {}
    cases = [(name, case) for name, family in families.items() for case in family.cases]
    for name, case in tqdm(cases, desc="pairs"):
        for row in evaluated(families[name].cases[case](data), families[name].align, settings):
            groups.setdefault((name, case.split(",")[0], row.pop("stage")), []).append(row)
    return [
        {"family": family, "task": task, "stage": stage, "pairs": len(rows)}
        | {key: float(np.mean([r[key] for r in rows if key in r])) for key in {k: None for r in rows for k in r}}
        for (family, task, stage), rows in groups.items()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with brain_t1t2pd, brain_multicontrast, ...")
    parser.add_argument("--families", nargs="+", default=[PHANTOMS, "MS07 to BrainWeb"], choices=FAMILIES)
    parser.add_argument("--phantoms", type=int, default=10, help="deformations per task (default: %(default)s)")
    parser.add_argument("--model", default=models.DEFAULT)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--refine", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("build/evaluation"))
    args = parser.parse_args()
    started = time.monotonic()
    families = {name: FAMILIES[name] for name in args.families}
    if PHANTOMS in families:
        seeds = range(FIRST_SEED, FIRST_SEED + args.phantoms)
        families[PHANTOMS] = replace(families[PHANTOMS], cases=phantom_cases(seeds))
    settings = {"model": args.model, "device": args.device, "refine": args.refine}
    try:
        rows = evaluate(families, args.data, settings)
        about = {"preset": "full", "seeds": f"phantoms from {FIRST_SEED} on", "device": args.device}
        name = f"evaluation-refine{args.refine}"
        report.write(args.output, name, rows, about | {"seconds": round(time.monotonic() - started)} | settings)
    except (DivRegNetError, OSError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    print(f"\n{report.table(rows)}\n\n{args.output / name}.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
