"""How many steps of refinement are worth their time: the score of a few seen pairs after none, and after more and more.

    python training/experiments/refinement.py --data DIR [--steps 16 50 100 200] [--cases 0 1 ...]

The pairs are those of the benchmark (training/benchmarks/cases.py), on its grids. Refinement starts from the same
deformation each time, and ends by itself when a round of steps gains too little.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch

from DivRegNetLib import models
from DivRegNetLib.core.grid import Grid
from DivRegNetLib.core.physical_fields import forward_transform
from DivRegNetLib.core.points import map_points
from DivRegNetLib.options import Options
from DivRegNetLib.quality.metrics import dice, landmark_error
from DivRegNetLib.registration import pipeline
from DivRegNetLib.registration.resources import Resources
from training.benchmarks.cases import FAMILIES, Material

CASES = (
    ("sample pair", 0),
    ("AAL phantoms", 0),
    ("liver MR to CT", 0),
    ("liver MR to CT", 1),
    ("hippocampus", 0),
    ("MS07 to BrainWeb", 0),
    ("IXI012 to BrainWeb", 1),
)
POINTS = 2000  # at which the error of a known deformation is measured


def score(pair: Material, transform: sitk.Transform) -> tuple[str, float]:
    """What the pair is judged by, and its value: the landmark error or that of the known deformation in mm, or Dice."""
    if pair.landmarks is not None:
        return "landmarks mm", float(landmark_error(*pair.landmarks, transform).mean())
    if pair.truth is not None:
        inside = sitk.GetArrayViewFromImage(pair.inside if pair.inside is not None else pair.fixed_labels) > 0
        indices = np.argwhere(inside)[:, ::-1]
        some = indices[np.random.default_rng(0).choice(len(indices), min(POINTS, len(indices)), replace=False)]
        points = Grid.of(pair.fixed).to_physical(some)
        return "error mm", float(
            np.linalg.norm(map_points(transform, points) - map_points(pair.truth, points), axis=1).mean()
        )
    warped = sitk.Resample(pair.moving_labels, pair.fixed_labels, transform, sitk.sitkNearestNeighbor, 0)
    fixed, moved = (sitk.GetArrayViewFromImage(labels) for labels in (pair.fixed_labels, warped))
    return "Dice", float(np.mean([dice(fixed == label, moved == label) for label in np.unique(fixed) if label]))


def rows(pair: Material, align: str, spacing: float, steps: list[int]) -> Iterator[tuple[int, str, float, float]]:
    """(steps, what the score is, its value, seconds of refinement), first without refinement."""
    options = Options.of(align=align, spacing=spacing, device="cpu")
    inputs = pipeline.check(pair.fixed, pair.moving, None, None, options)
    resources = Resources.choose(options, inputs.fixed, inputs.moving, models.load(models.DEFAULT, "cpu"))

    def nothing(fraction: float) -> None:
        pass

    matrix = pipeline.align(inputs, options, progress=nothing).matrix
    with torch.inference_mode():
        sampled = pipeline.sample(inputs, matrix, resources, progress=nothing)
        start = pipeline.deform(sampled, resources, options, progress=nothing)
        for count in (0, *steps):
            began = time.process_time()
            refined = pipeline.refine(sampled, start, resources, replace(options, refine=count), progress=nothing)
            seconds = time.process_time() - began
            yield count, *score(pair, forward_transform(refined, sampled.grid, matrix, resources.grids.fixed)), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("."))
    parser.add_argument("--steps", type=int, nargs="+", default=[16, 50, 100, 200])
    parser.add_argument("--cases", type=int, nargs="+", default=list(range(len(CASES))), help="numbers, from 0")
    args = parser.parse_args()
    for family, number in (CASES[i] for i in args.cases):
        name = list(FAMILIES[family].cases)[number]
        pair = FAMILIES[family].cases[name](args.data)
        for count, what, value, seconds in rows(pair, FAMILIES[family].align, FAMILIES[family].spacing, args.steps):
            print(f"{family}, {name}: {count:4} steps, {what} {value:.4f}, {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
