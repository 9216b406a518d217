"""Measures the head model through the very pipeline that users run, on pairs it was not trained on.

    python training/evaluate.py --data DIR [--refine N] [--output build/evaluation]

*AAL phantoms* (arXiv 1908.08767, Table 2): BrainWeb at 1 mm; the fixed image is T2 after a free-form deformation (20 mm
control points, N(0, 6 mm)) with a seed of its own; the moving image is the undeformed T1, PD or T2. Dice, ASD and HD are
of the union of the AAL labels, the error is that of the displacement inside it, in mm.

*MS07 to BrainWeb*: another person, real scans, skull-stripped, T2 to T1 and T1 to T2. There is no truth; cerebrospinal
fluid, gray and white matter are told apart on the T1 of each person, which the registration does not see as a pair.
"""

import argparse
import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import SimpleITK as sitk
from tqdm import tqdm

from DivRegNetLib import models
from DivRegNetLib.core.grid import Grid, affine_transform
from DivRegNetLib.io import images
from DivRegNetLib.quality import metrics
from DivRegNetLib.registration.pipeline import Result, register
from training.benchmarks.cases import FIRST_SEED, free_form_deformation, on_grid, tissues
from training.data.phantoms import TASKS
from training.data.prepare_head import brain_mask
from training.experiments import report


def phantom_scores(result: Result | None, truth: sitk.Image, fixed_labels: sitk.Image, labels: sitk.Image) -> dict:
    """Scores of one phantom registration; of no registration where ``result`` is None."""
    grid = Grid.of(fixed_labels)
    transform = sitk.Transform() if result is None else result.transform
    warped = sitk.Resample(labels, fixed_labels, transform, sitk.sitkNearestNeighbor, 0)
    inside, found = (sitk.GetArrayViewFromImage(x) > 0 for x in (fixed_labels, warped))
    field = 0.0 if result is None else sitk.GetArrayFromImage(result.transform.GetDisplacementField())
    error = np.linalg.norm(field - sitk.GetArrayFromImage(truth), axis=-1)[inside]
    return {
        "Dice": metrics.dice(inside, found),
        **{k.upper(): v for k, v in metrics.surface_distances(inside, found, grid).items()},
        "error mm": float(error.mean()),
        "folded %": 0.0 if result is None else result.quality["folded_percent"],
        "seconds": 0.0 if result is None else sum(result.timings.values()),
    }


def phantoms(data: Path, count: int, settings: dict) -> list[dict]:
    """A row per task and method, means over ``count`` phantoms."""
    image = {c: images.read_image(data / f"brain_t1t2pd/brainweb_{c}.nii.gz") for c in ("T1", "T2", "PD")}
    labels = images.read_labels(data / "brain_t1t2pd/aal_labels.nii.gz")
    rows: dict[tuple[str, str], list[dict]] = {}
    for seed in tqdm(range(FIRST_SEED, FIRST_SEED + count), desc="phantoms"):
        deformation = free_form_deformation(labels, seed)
        fixed_labels = sitk.Resample(labels, labels, deformation, sitk.sitkNearestNeighbor, 0)
        truth = on_grid(deformation, Grid.of(labels))
        for task in TASKS:
            moving, fixed = task.split("-")
            deformed = sitk.Resample(image[fixed], labels, deformation, sitk.sitkLinear, 0)
            result = register(deformed, image[moving], align="none", **settings)
            for method, of in (("start", None), ("DivRegNet", result)):
                scores = phantom_scores(of, truth, fixed_labels, labels)
                rows.setdefault((task, method), []).append(scores)
    return [
        {"task": task, "method": method} | {k: float(np.mean([s[k] for s in scores])) for k in scores[0]}
        for (task, method), scores in rows.items()
    ]


def real_pairs(data: Path, settings: dict) -> list[dict]:
    """A row per pairing and stage: Dice of the tissues of another person."""
    brainweb = {c: images.read_image(data / f"brain_t1t2pd/brainweb_{c}.nii.gz") for c in ("T1", "T2")}
    ms07 = {c: images.read_image(data / f"brain_multicontrast/ms07_{c}.nii.gz") for c in ("T1", "T2")}
    brain = brain_mask(brainweb["T1"], images.read_labels(data / "brain_t1t2pd/aal_labels.nii.gz"))
    fixed_tissues = tissues(brainweb["T1"], brain)
    moving_tissues = tissues(ms07["T1"], sitk.Cast(sitk.BinaryFillhole(ms07["T1"] > 30), sitk.sitkUInt8))
    rows = []
    for fixed, moving, stripped in (("T1", "T2", False), ("T1", "T2", True), ("T2", "T1", True)):
        mask = brain if stripped else None
        result = register(brainweb[fixed], ms07[moving], fixed_mask=mask, **settings)
        for stage, transform in (("affine", affine_transform(result.initial)), ("DivRegNet", result.transform)):
            warped = sitk.Resample(moving_tissues, fixed_tissues, transform, sitk.sitkNearestNeighbor, 0)
            f, w = (sitk.GetArrayViewFromImage(x) for x in (fixed_tissues, warped))
            scores = {name: metrics.dice(f == i, w == i) for i, name in ((1, "fluid"), (2, "gray"), (3, "white"))}
            deformed = stage == "DivRegNet"
            rows.append(
                {"pair": f"ms07 {moving} to BrainWeb {fixed}" + (", brain" if stripped else ""), "stage": stage}
                | scores
                | {"folded %": result.quality["folded_percent"] if deformed else 0.0}
                | {"seconds": sum(result.timings.values()) if deformed else result.timings["align"]}
            )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with brain_t1t2pd and brain_multicontrast")
    parser.add_argument("--model", default=models.DEFAULT)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--refine", type=int, default=0)
    parser.add_argument("--phantoms", type=int, default=10, help="deformations per task")
    parser.add_argument("--output", type=Path, default=Path("build/evaluation"))
    args = parser.parse_args()
    settings = {"model": args.model, "device": args.device, "refine": args.refine}
    for name, rows in (
        ("ms07", real_pairs(args.data, settings)),
        ("phantoms", phantoms(args.data, args.phantoms, settings)),
    ):
        file = args.output / f"{name}-refine{args.refine}.csv"
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        print(f"\n{report.table(rows)}\n\n{file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
