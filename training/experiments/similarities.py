"""Comparison of training signals for a general model: S of KLDivNet with or without a summary of the pair, MI of the pair,
labels, the known displacement, and combinations.

    python training/experiments/similarities.py --preset reduced

It needs no data: the pairs are random shapes with random contrasts, deformations and artifacts
(:mod:`training.data.synthesis`), whose labels and deformation are known. One small network is trained per signal and seed,
all for the same number of steps on the same pairs, and tested on the same other pairs. Run again, the command continues where
it was interrupted.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from lightning_fabric import Fabric
from matplotlib.figure import Figure
from tqdm import tqdm

from DivRegNetLib.core import fields
from DivRegNetLib.io import atomic
from DivRegNetLib.similarity.kldivnet import KLDivNet
from DivRegNetLib.similarity.mutual_information import parzen_mi
from training import config as configs
from training import report, scoring
from training.data.cohort import Cohort
from training.data.pairs import Pair
from training.data.randomness import Random
from training.data.synthesis import Recipe, make_pair
from training.trainer import Trainer, fit

ALONE = ("loss.weight=0",)
KNOWN = ("loss.known=1", "loss.labels=1")
MI = ("loss.similarity=mi",)
SIGNALS = {
    "KLDivNet, conditional": (),
    "KLDivNet": ("kldivnet.context=0",),
    "MI of the pair": MI,
    "labels": (*MI, *ALONE, "loss.labels=1"),
    "displacement": (*MI, *ALONE, "loss.known=1"),
    "displacement, labels": (*MI, *ALONE, *KNOWN),
    "KLDivNet, conditional, displacement, labels": KNOWN,
    "MI of the pair, displacement, labels": (*MI, *KNOWN),
}
"""Training signal -> overrides of training/configs/similarities.yaml."""

STARTS = {
    "the images": (),
    "Newton steps": ("methods=[variational,regnet]", "variational.steps=7", "regnet.guided=true"),
}
"""What RegNet starts from -> overrides."""

ALONE_FIRST = {"quick": 2, "reduced": 700}
"""Preset -> steps in which only KLDivNet learns, before RegNet; it needs many to know any contrast."""

UNTRAINED = "nothing"
SIDE, SPACING_MM = 48, 2.0
FIRST = {"validation": 5_000_000, "test": 6_000_000}
"""Split -> the first seed of its pairs; training has other seeds."""


@dataclass(frozen=True)
class Shapes:
    """Pairs of random shapes, as a :class:`training.data.sources.Source`."""

    recipe: Recipe
    count: int
    side: int = SIDE

    @property
    def cohort(self) -> Cohort:
        return Cohort((), SPACING_MM, (self.side,) * 3, (0.0,) * 3, "balanced")

    def draw(self, random: Random) -> Pair:
        return make_pair(self.cohort, self.recipe, random)

    def held_out(self, split: str) -> Iterator[tuple[str, Pair]]:
        for number in range(self.count):
            yield "shapes", self.draw(Random(FIRST[split] + number))


def run(settings: argparse.Namespace) -> list[dict]:
    """Trains and tests the networks that are not finished yet; writes ``similarities.md``, ``.csv``, ``.json``, ``.png``.

    Raises:
        ValueError: the preset is unknown.
        FloatingPointError: a training diverged.
    """
    started, single = time.time(), []
    for start in settings.starts:
        single.append(_single(start, UNTRAINED, 0, settings))
    todo = [
        (start, signal, seed) for seed in settings.seeds for start in settings.starts for signal in settings.signals
    ]
    for start, signal, seed in tqdm(todo, desc="networks"):
        single.append(_single(start, signal, seed, settings))
    rows = [_together(start, signal, single) for start in settings.starts for signal in (UNTRAINED, *settings.signals)]
    config = _config(settings.starts[0], UNTRAINED, 0, settings)
    about = {
        "preset": settings.preset,
        "seeds": f"training {' '.join(map(str, settings.seeds))}; test pairs from {FIRST['test']} on",
        "steps": f"{config.steps}, each of {config.batch} pairs; KLDivNet alone {ALONE_FIRST[settings.preset]} before",
        "pairs": f"{config.data.held_out} of {SIDE}^3 voxels of {SPACING_MM} mm",
        "device": settings.device,
        "seconds": round(time.time() - started),
        "note": "Error inside the labels and mean Dice over them, on held-out pairs of random shapes and contrasts; `sd` "
        "is that of the means of the seeds. `gain` is by how much the error is smaller than the untrained network's, pair "
        "by pair, `se` the standard error of that over the pairs. `S and MI` is the correlation, over the held-out pairs "
        "as they are and truly aligned, of KLDivNet's estimate with the MI of a histogram.",
    }
    report.write(settings.output, "similarities", rows, about)
    drawn = figure(rows, single)
    atomic.write_atomically(
        settings.output / "similarities.png", lambda part: drawn.savefig(part, dpi=110, format="png")
    )
    return rows


def agreement(kldivnet: KLDivNet, pairs: list[Pair]) -> float:
    """Correlation of S with the MI of a 64-bin histogram, over the pairs before and after the true alignment."""
    values = []
    for i, pair in enumerate(pairs):
        for moving in (pair.moving, fields.warp(pair.moving, pair.truth)):
            s = kldivnet(pair.fixed, moving, samples=65536, generator=torch.Generator().manual_seed(i))
            values.append((s.item(), parzen_mi(pair.fixed, moving, bins=64).item()))
    return float(np.corrcoef(np.array(values).T)[0, 1])


def figure(rows: list[dict], single: list[dict]) -> Figure:
    """The error of each signal, one dot per seed."""
    drawn = Figure(figsize=(8, 0.32 * len(rows) + 1), layout="constrained")
    axes = drawn.subplots()
    names = [f"{row['trained by']} (from {row['from']})" for row in rows]
    for i, row in enumerate(rows):
        own = [s["error mm"] for s in single if (s["from"], s["trained by"]) == (row["from"], row["trained by"])]
        axes.plot(own, [i] * len(own), "o", color="tab:gray" if row["trained by"] == UNTRAINED else "tab:blue")
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.4)
    axes.set_xlabel("error on held-out pairs, mm")
    return drawn


def _config(start: str, signal: str, seed: int, settings: argparse.Namespace) -> configs.Config:
    config = configs.load(
        configs.CONFIGS / "similarities.yaml",
        preset=settings.preset,
        overrides=[*STARTS[start], *SIGNALS.get(signal, MI)],
        seed=seed,
        name="_".join(f"{signal} from {start} {seed}".replace(",", "").split()),
    )
    if config.loss.similarity != "kldiv":
        return config
    alone = ALONE_FIRST[settings.preset]
    return replace(config, warmup=alone, steps=alone + config.steps)


def _single(start: str, signal: str, seed: int, settings: argparse.Namespace) -> dict:
    """The scores of one network, which are kept on disk."""
    config = _config(start, signal, seed, settings)
    kept = settings.output / "rows" / f"{config.name}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    fabric = Fabric(accelerator=settings.device, devices=1)
    source = Shapes(config.data.recipe, config.data.held_out)
    if signal == UNTRAINED:
        trainer = Trainer(config, source, fabric)
    else:
        trainer = fit(config, source, settings.output / "runs" / config.name, fabric, resume=True)
    pairs = [pair.to(trainer.dtype) for _, pair in source.held_out("test")]
    with torch.no_grad():
        scores = [scoring.of_displacement(p, trainer.predict(p.fixed, p.moving), SPACING_MM) for p in pairs]
    errors, dice, folded = ([s[name] for s in scores] for name in ("error mm", "Dice", "folded %"))
    row = {"from": start, "trained by": signal, "errors mm": errors}
    row |= {"error mm": float(np.mean(errors)), "Dice": float(np.nanmean(dice)), "folded %": float(np.mean(folded))}
    if trainer.objective.kldivnet is not None:
        with torch.no_grad():
            row["S and MI"] = agreement(trainer.objective.kldivnet, pairs)
    atomic.write_json(row, kept)
    return row


def _together(start: str, signal: str, single: list[dict]) -> dict:
    """The row of a signal: means over its seeds, and their standard deviation."""

    def of(signal: str, name: str) -> np.ndarray:
        own = (row for row in single if (row["from"], row["trained by"]) == (start, signal))
        return np.array([row[name] for row in own if name in row], float)

    row: dict = {"from": start, "trained by": signal}
    for name in ("error mm", "Dice", "folded %", "S and MI"):
        values = of(signal, name)
        row[name] = float(values.mean()) if len(values) else None
        if name == "error mm":
            row["sd"] = float(values.std(ddof=1)) if len(values) > 1 else None
            gain = (of(UNTRAINED, "errors mm") - of(signal, "errors mm")).mean(0)
            row["gain mm"], row["se"] = float(gain.mean()), float(gain.std(ddof=1) / np.sqrt(len(gain)))
    return row


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="quick", choices=ALONE_FIRST)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--starts", nargs="+", default=list(STARTS), choices=STARTS, metavar="START")
    parser.add_argument("--signals", nargs="+", default=list(SIGNALS), choices=SIGNALS, metavar="SIGNAL")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--output", type=Path, default=Path("build/experiments/similarities"))
    try:
        print(report.table(run(parser.parse_args(arguments))))
    except (ValueError, FloatingPointError) as error:
        print(f"similarities.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
