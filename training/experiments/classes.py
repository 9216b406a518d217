"""What knowing the anatomy is worth: hippocampus crops registered with and without what a class network sees.

    python training/experiments/classes.py --data DIR --model NAME [--output training/results]
    python training/experiments/classes.py --data DIR --cases 5 20 60 168 --steps 2000 --output build/classes

DIR holds ``hippocampus``. The first command registers 30 pairs of the last twenty crops by name, which no training may have
seen, writes a table, and draws the worst pair; the second trains a class network on so few labeled cases first (or goes on
with it where it was interrupted), as ``training/train.py --labels`` does with all of them. Dice is that of the anterior and
the posterior part, on the grid of the fixed image. Without classes a pair is registered with the usual settings.
"""

import argparse
import csv
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import SimpleITK as sitk
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from DivRegNetLib import models
from DivRegNetLib.core.device import pick_device
from DivRegNetLib.core.grid import Grid, affine_transform
from DivRegNetLib.errors import DivRegNetError
from DivRegNetLib.io.images import read_image, read_labels
from DivRegNetLib.quality import metrics
from DivRegNetLib.registration.pipeline import register
from training import layers
from training.classes import subjects
from training.classes.config import CONFIGS, ClassTraining
from training.classes.export import export
from training.classes.trainer import fit
from training.data import cohort as cohorts
from training.data import hippocampus, prepare, prepare_hippocampus
from training.pictures import show

NAME = "hippocampus-classes"


def pairs(data: Path) -> list[tuple[str, str]]:
    """File names (fixed, moving) of the pairs that are registered."""
    held = hippocampus.held_out(data)
    return [(held[fixed], held[moving]) for fixed, moving in hippocampus.pairs()]


@dataclass(frozen=True)
class Row:
    """Mean Dice of a pair: aligned, registered without and with classes; folded voxels of the last in %."""

    fixed: str
    moving: str
    affine: float
    without: float
    classes: float
    folded: float


Registered = tuple[sitk.Transform, float, float]
"""Without a class network: the alignment; Dice after it, and after the registration."""


def registered(
    data: Path, fixed: str, moving: str, model: models.Model, device: str, before: dict[tuple, Registered]
) -> Row:
    """Registers a pair with the class network of a model and, with the usual settings, without, from one alignment.

    Args:
        before: results without class network; those of the same pair on the same grid are not computed again.
    """
    images, labels = _read(data, fixed, moving)
    key = (fixed, moving, model.card.spacing_mm)
    if key not in before:
        without = register(*images, model=_without_classes(model), device=device)
        start = affine_transform(without.initial)
        before[key] = start, *(_dice(labels, transform) for transform in (start, without.transform))
    start, affine, usual = before[key]
    found = register(*images, model=model, device=device, align=start)
    return Row(fixed, moving, affine, usual, _dice(labels, found.transform), found.quality["folded_percent"])


def _read(data: Path, fixed: str, moving: str) -> tuple[list[sitk.Image], list[sitk.Image]]:
    """The images and the labels of a pair."""
    folder, pair = data / "hippocampus", (fixed, moving)
    return [read_image(folder / "images" / name) for name in pair], [
        read_labels(folder / "labels" / name) for name in pair
    ]


def _without_classes(model: models.Model) -> models.Model:
    """The model without its class network."""
    return replace(model, classnet=None)


def _dice(labels: list[sitk.Image], transform: sitk.Transform) -> float:
    overlap = metrics.label_overlap(labels[0], _warped(labels, transform))["labels"]
    return statistics.mean(scores["dice"] for scores in overlap.values())


def _warped(labels: list[sitk.Image], transform: sitk.Transform) -> sitk.Image:
    """The moving labels on the grid of the fixed ones."""
    fixed, moving = labels
    warped = sitk.Resample(moving, Grid.of(fixed).empty_image(), transform, sitk.sitkNearestNeighbor, 0)
    return sitk.Cast(warped, fixed.GetPixelID())


def evaluate(data: Path, model: models.Model, device: str, count: int, before: dict[tuple, Registered]) -> list[Row]:
    return [registered(data, *pair, model, device, before) for pair in tqdm(pairs(data)[:count], desc=model.card.name)]


def picture_of_worst(data: Path, rows: list[Row], model: models.Model, device: str) -> Figure:
    """The pair with the least Dice: the fixed image with its labels, and with those of the moving image after the alignment,
    without, and with classes; in the axial slice with most labels."""
    row = min(rows, key=lambda row: row.classes)
    images, labels = _read(data, row.fixed, row.moving)
    without = register(*images, model=_without_classes(model), device=device)
    start = affine_transform(without.initial)
    found = register(*images, model=model, device=device, align=start)
    shown = {"labels of the fixed image": labels[0], f"aligned {row.affine:.3f}": _warped(labels, start)}
    shown |= {f"without classes {row.without:.3f}": _warped(labels, without.transform)}
    shown |= {f"with classes {row.classes:.3f}": _warped(labels, found.transform)}
    fixed = torch.from_numpy(sitk.GetArrayFromImage(images[0]).astype("float32"))[None, None]
    outlines = [torch.from_numpy(sitk.GetArrayFromImage(x).astype("uint8"))[None, None] for x in shown.values()]
    most = int((outlines[0] > 0).sum((0, 1, 3, 4)).argmax())
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    for axes, title, outline in zip(figure.subplots(1, len(shown)), shown, outlines, strict=True):
        show(axes, fixed, title, outline, most / max(fixed.shape[2] - 1, 1))
    figure.suptitle(f"{row.moving} to {row.fixed}: Dice", fontsize=9)
    return figure


def line(name: str, rows: list[Row]) -> list[str]:
    """A line of the table: means over the pairs, and the standard error of what classes add."""
    gains = [row.classes - row.without for row in rows]
    error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
    means = [statistics.mean(getattr(row, key) for row in rows) for key in ("affine", "without", "classes")]
    return [
        name,
        str(len(rows)),
        *(f"{value:.3f}" for value in means),
        f"{statistics.mean(gains):+.3f} ± {error:.3f}",
        f"{sum(gain > 0 for gain in gains)} of {len(gains)}",
        f"{max(row.folded for row in rows):.2g}",
    ]


def prepared(data: Path, args: argparse.Namespace) -> Path:
    """The folder of a prepared cohort whose training and validation cases are not held out here.

    Raises:
        ValueError: the cohort that the command names trains on a case that is held out.
    """
    if args.cohort:
        used = {v.name for v in cohorts.load(args.cohort).volumes if v.split != "test"}
        test = {name.removesuffix(".nii.gz") for name in hippocampus.held_out(data)}
        if seen := sorted(used & test):
            raise ValueError(f"{args.cohort}: trains on {seen[0]}, which is held out for the test")
        return args.cohort
    cohort = args.output / "cohort"
    preparation = prepare.Preparation(spacing_mm=prepare_hippocampus.SPACING_MM, workers=args.workers)
    prepare.prepare_cohort(prepare_hippocampus.sources(data), cohort, preparation)
    return cohort


def trained(data: Path, count: int, args: argparse.Namespace) -> models.Model:
    """A model whose class network has learned from the first ``count`` cases alone."""
    cohort = prepared(data, args)
    run, steps = args.output / f"cases-{count}", {"steps": args.steps} if args.steps else {}
    source = {"cohort": str(cohort), "cases": count, "classes": {1: "anterior", 2: "posterior"}}
    file, name = CONFIGS / "cohort.yaml", f"{NAME}-{count}"
    config = layers.load(ClassTraining, file, overrides=args.overrides, name=name, sources=[source], **steps)
    fit(config, subjects.load(config, pick_device(args.device)), run, resume=True)
    return models.load(str(export(run, config.name, args.output / "models", {"license": "CC-BY-SA-4.0"})))


def write(lines: list[list[str]], rows: dict[str, list[Row]], output: Path) -> None:
    """``classes.md`` and, pair by pair, ``classes.csv``."""
    output.mkdir(parents=True, exist_ok=True)
    head = ["model", "pairs", "affine", "without classes", "with classes", "gain", "better", "folded %, most"]
    table = [head, ["---"] * len(head), *lines]
    (output / "classes.md").write_text(
        "# Hippocampus with and without a class network\n\nMean Dice of the anterior and posterior part.\n\n"
        + "".join("| " + " | ".join(cells) + " |\n" for cells in table)
    )
    with (output / "classes.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["model", *Row.__dataclass_fields__])
        for name, found in rows.items():
            for row in found:
                cells = vars(row).values()
                writer.writerow([name, *(f"{v:.4f}" if isinstance(v, float) else v for v in cells)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", nargs="*", default=[], help="names or cards of models with a class network")
    parser.add_argument("--cases", nargs="*", type=int, default=[], help="numbers of labeled cases to train on")
    parser.add_argument("--steps", type=int, help="of these trainings (default: those of the configuration)")
    parser.add_argument("--cohort", type=Path, help="prepared already; none of the last twenty crops may be trained on")
    parser.add_argument("--pairs", type=int, default=30, help="that are registered; default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("build/classes"))
    parser.add_argument("--workers", type=int, default=0, help="processes of the preparation (default: one per CPU)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of training/configs/classes/cohort.yaml")
    args = parser.parse_intermixed_args()
    try:
        lines, rows, before = [], {}, {}
        for name, load in [
            *((Path(name).stem, lambda name=name: models.load(name)) for name in args.model),
            *((f"{count} cases", lambda count=count: trained(args.data, count, args)) for count in args.cases),
        ]:
            model = load()
            rows[name] = evaluate(args.data, model, args.device, args.pairs, before)
            lines.append(line(name, rows[name]))
            write(lines, rows, args.output)
            figure = picture_of_worst(args.data, rows[name], model, args.device)
            figure.savefig(args.output / f"classes-worst-{name.replace(' ', '-')}.png")
            print(" | ".join(lines[-1]))
    except (ValueError, OSError, FloatingPointError, DivRegNetError) as error:
        print(f"classes.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
