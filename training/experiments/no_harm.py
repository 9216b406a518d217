"""No harm: the stiffness that is chosen for a pair, against all fixed ones and no deformation.

    python training/experiments/no_harm.py --data DIR

Pairs are those of the benchmark (:mod:`training.benchmarks.cases`), and two contrasts of one head that are aligned already, at
several resolutions. Each is aligned and sampled once; then it is deformed with each fixed stiffness, and with the one that
:mod:`DivRegNetLib.registration.selection` chooses. The constants of that module were chosen on the pairs that the column
``held out`` calls no. Writes ``no-harm.md``, ``.csv`` and ``.json``. What a pair came to is kept in the work folder: run again,
the command continues where it was interrupted.
"""

import argparse
import json
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor

from DivRegNetLib import models
from DivRegNetLib.core import physical_fields
from DivRegNetLib.core.grid import Grid
from DivRegNetLib.io import atomic
from DivRegNetLib.io.images import read_labels
from DivRegNetLib.options import Options
from DivRegNetLib.quality import metrics
from DivRegNetLib.registration import pipeline, selection
from DivRegNetLib.registration.resources import Resources
from training import report, scoring
from training.benchmarks import cases
from training.benchmarks.cases import Material
from training.data import label_maps
from training.data.free_form import SD_MM

FIXED = (3.0, 1.0, 0.3, 0.1)
VOXELS, MM, DICE = "voxels", "mm", "Dice"
MOST_VOXELS = 128  # of aligned pairs: a part of a head at 1 mm
HEADS = tuple(label_maps.HELD_OUT)[:2]
FITTED_HEADS = tuple(f"training_seg_0{n}" for n in (1, 2, 3))
SLIGHT = 0.25  # size of a slight deformation, of the usual one


@dataclass(frozen=True)
class Case:
    """A pair.

    family: kind of pair; its rows are averaged.
    held_out: its subjects had no part in the choice of constants.
    load: the images from the data folder.
    unit: of the score: VOXELS (of the working grid) or MM of error, or DICE.
    align: initial alignment.
    spacing: of the working grid, mm; None: the model's.
    """

    name: str
    family: str
    held_out: bool
    load: Callable[[Path], Material]
    unit: str = DICE
    align: str = "affine"
    spacing: float | None = None


def all_cases() -> list[Case]:
    """The cases, quick and telling ones first."""
    found = []
    for mm in (3, 2, 1):
        for moving, fixed in (("T1", "T2"), ("PD", "T2")):
            load = partial(thinned, load=partial(cases.aligned, moving=moving, fixed=fixed), mm=mm)
            found.append(Case(f"{moving} to {fixed}", f"aligned, {mm} mm", False, load, VOXELS, "none", mm))
        for name in (*FITTED_HEADS, *HEADS):
            load = partial(painted, fixed=name, moving=name, mm=mm)
            found.append(Case(f"label map {name}", f"aligned, {mm} mm", name in HEADS, load, VOXELS, "none", mm))
    for family, mm, share, spacing in (
        ("phantoms", 2, 1.0, None),
        ("slight phantoms, 2 mm", 2, SLIGHT, 2),
        ("slight phantoms, 1 mm", 1, SLIGHT, 1),
    ):
        made = partial(phantom, share=share)
        for moving, fixed, held_out in (("T1", "T2", False), ("PD", "T2", False), ("MS07 T1POST", "MS07 FLAIR", True)):
            load = partial(thinned, load=partial(cases.aligned, moving=moving, fixed=fixed), mm=mm)
            load = partial(made, load=load, seed=5000)
            found.append(Case(f"{moving} to {fixed}", family, held_out, load, MM, "none", spacing))
        for name in HEADS:
            load = partial(made, load=partial(painted, fixed=name, moving=name, mm=mm), seed=6000)
            found.append(Case(f"label map {name}", family, True, load, MM, "none", spacing))
    crops = list(cases.HIPPOCAMPUS.items())[:9]
    found += [Case(name, "hippocampus", i >= 3, load) for i, (name, load) in enumerate(crops)]
    found.append(Case("CT to MR", "livers", False, cases.liver_reversed))
    found.append(Case("MR to CT", "livers", True, cases.liver))
    found.append(Case("T1 to T1", "IXI012 to BrainWeb", False, partial(cases.ixi012, fixed="T1")))
    found.append(Case("T1 to T2", "IXI012 to BrainWeb", True, partial(cases.ixi012, fixed="T2")))
    found += [
        Case(name, "MS07 to BrainWeb", True, partial(cases.ms07, moving=moving, fixed=fixed))
        for name, (moving, fixed) in list(cases.MS07.items())[:2]
    ]
    found.append(
        Case(" and ".join(HEADS), "painted heads", True, partial(painted, fixed=HEADS[0], moving=HEADS[1], mm=2))
    )
    found += [Case(name, "abdomen CT", True, load, MM, "none") for name, load in list(cases.ABDOMENS.items())[:1]]
    return found


def thinned(data: Path, load: Callable[[Path], Material], mm: int) -> Material:
    """A pair averaged to voxels of so many mm, and no more than the middle MOST_VOXELS of it along each axis."""
    pair = load(data)
    factors = [max(round(mm / s), 1) for s in pair.fixed.GetSpacing()]
    return replace(pair, **{k: _middle(sitk.BinShrink(getattr(pair, k), factors)) for k in ("fixed", "moving")})


def _middle(image: sitk.Image) -> sitk.Image:
    size = [min(n, MOST_VOXELS) for n in image.GetSize()]
    start = [(n - m) // 2 for n, m in zip(image.GetSize(), size, strict=True)]
    return sitk.RegionOfInterest(image, size, start)


def painted(data: Path, fixed: str, moving: str, mm: int) -> Material:
    """Images generated from the label maps of two heads, or of one, with random contrasts, on voxels of so many mm."""
    random = np.random.default_rng(7000 + mm)
    maps = [
        sitk.Shrink(cases.cropped(read_labels(label_maps.file_of(data, name))), [mm] * 3) for name in (fixed, moving)
    ]
    maps = [_middle(labels) for labels in maps] if fixed == moving else maps
    images = [cases.painted_image(labels, "any", random) for labels in maps]
    brain = [(n,) for n in sorted(label_maps.BRAIN)]
    return Material(*images, *(cases.relabeled(labels, brain) for labels in maps), truth=sitk.Transform())


def phantom(data: Path, load: Callable[[Path], Material], seed: int, share: float = 1.0) -> Material:
    """A pair whose images are aligned, the fixed one under a known deformation, of a share of the usual size."""
    pair = load(data)
    inside = sitk.Resample(pair.fixed_labels, pair.fixed, sitk.Transform(), sitk.sitkNearestNeighbor, 0)
    pair = replace(pair, fixed_labels=inside, moving_labels=inside, inside=inside)
    return cases.deformed(pair, seed, sd_mm=share * SD_MM)


def measure(case: Case, data: Path, model: models.Model) -> dict:
    """The row of a case."""
    pair = case.load(data)
    options = Options.of(align=case.align, device="cpu", spacing=case.spacing)
    inputs = pipeline.check(pair.fixed, pair.moving, None, None, options)
    resources = Resources.choose(options, inputs.fixed, inputs.moving, model)
    matrix = pipeline.align(inputs, options, progress=_nothing).matrix
    resources = pipeline.cover(inputs, matrix, resources)
    with torch.inference_mode():
        sampled = pipeline.sample(inputs, matrix, resources, progress=_nothing)
        score = Score(pair, case.unit, sampled.grid, matrix)
        row = {
            "pair": case.name,
            "family": case.family,
            "held out": "yes" if case.held_out else "no",
            "score": case.unit,
        }
        row["none"] = score(selection.no_deformation(sampled.images).displacement)
        seconds = {}
        for factor in (*FIXED, None):
            started = time.process_time()
            chosen = pipeline.deform(sampled, resources, replace(options, stiffness=factor), progress=_nothing)
            seconds[factor] = time.process_time() - started
            row["chosen" if factor is None else f"x {factor:g}"] = score(chosen.displacement)
        # The last one was chosen by evidence.
        row["choice"] = (
            chosen.candidate.name if chosen.candidate.stiffness is None else f"x {chosen.candidate.stiffness:g}"
        )
        row["time"] = seconds[None] / seconds[1.0]
    return row


class Score:
    """What a displacement on the working grid comes to: error inside the pair's region, or mean Dice of its labels."""

    def __init__(self, pair: Material, unit: str, grid: Grid, matrix: np.ndarray) -> None:
        self.unit, self.grid, self.matrix = unit, grid, matrix
        self.fixed_labels, self.moving_labels = pair.fixed_labels, pair.moving_labels
        if unit != DICE:
            inside = pair.inside if pair.inside is not None else pair.fixed_labels > 0
            inside = sitk.Resample(
                sitk.Cast(inside, sitk.sitkUInt8), grid.empty_image(), sitk.Transform(), sitk.sitkNearestNeighbor, 0
            )
            self.inside = sitk.GetArrayFromImage(inside) > 0
            self.truth = sitk.GetArrayFromImage(scoring.displacement_on(pair.truth, grid))[self.inside]

    def __call__(self, displacement: Tensor) -> float:
        if self.unit != DICE:
            u = displacement[0].permute(1, 2, 3, 0).numpy()[self.inside] @ self.grid.matrix[:3, :3].T
            error = float(np.linalg.norm(u - self.truth, axis=-1).mean())
            return error if self.unit == MM else error / self.grid.spacing[0]
        transform = physical_fields.forward_transform(displacement, self.grid, self.matrix, self.grid)
        warped = sitk.Resample(self.moving_labels, self.fixed_labels, transform, sitk.sitkNearestNeighbor, 0)
        fixed, warped = (sitk.GetArrayFromImage(x) for x in (self.fixed_labels, warped))
        return float(np.mean([metrics.dice(fixed == n, warped == n) for n in np.unique(fixed).tolist() if n]))


def _nothing(fraction: float) -> None:
    pass


def summaries(rows: list[dict]) -> list[dict]:
    """Means of the rows of each family, those of fitted and of held-out subjects apart, and how much worse the choice is than
    the best fixed stiffness."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["family"], row["held out"]), []).append(row)
    found = []
    for (family, held_out), some in groups.items():
        mean = {
            k: float(np.mean([r[k] for r in some])) for k in ("none", *(f"x {f:g}" for f in FIXED), "chosen", "time")
        }
        unit = some[0]["score"]
        best = (max if unit == DICE else min)([mean[f"x {f:g}"] for f in FIXED])
        worse = best - mean["chosen"] if unit == DICE else mean["chosen"] - best
        choices = ", ".join(r["choice"] for r in some)
        about = {"family": family, "held out": held_out, "pairs": len(some), "score": unit}
        found.append(about | {k: v for k, v in mean.items() if k != "time"} | {
            "worse than the best fixed": worse, "choices": choices, "time": mean["time"],
        })  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("build/no-harm"), help="folder of what is done already")
    parser.add_argument("--output", type=Path, default=Path("training/results"))
    parser.add_argument("--model", default=models.DEFAULT)
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="families whose names begin so")
    args = parser.parse_args()
    started, model, rows = time.time(), models.load(args.model), []
    for case in all_cases():
        file = args.work / f"{zlib.crc32(f'{case.family}, {case.name}'.encode()):08x}.json"
        if not file.exists() and any(case.family.startswith(text) for text in args.only):
            atomic.write_json(measure(case, args.data, model), file)
            print(file.read_text(), flush=True)
        if file.exists():
            rows.append(json.loads(file.read_text()))
    note = (
        "Error in voxels of the working grid or in mm, or mean Dice, of each fixed stiffness (a factor of the elastic weight) "
        "and of the one that is chosen. Time: processor time of the deformation with a choice, as a multiple of that with the "
        "usual stiffness."
    )
    about = {"preset": args.model, "seeds": "the cases'", "device": "cpu", "seconds": round(time.time() - started)}
    report.write(args.output, "no-harm", summaries(rows), about | {"note": note})
    print(report.table(summaries(rows)))


if __name__ == "__main__":
    main()
