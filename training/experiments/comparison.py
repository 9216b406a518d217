"""Comparison of methods on the same test pairs, as in Tables 2 to 4 and Figure 4 of arXiv 1908.08767.

An :class:`Experiment` describes a table; :func:`run` trains the networks, registers the pairs, and writes the table and the
figures. Finished rows are kept and trainings resume, so the same command continues after an interruption.
"""

import argparse
import json
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from lightning_fabric import Fabric
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from DivRegNetLib import models
from DivRegNetLib.core import fields
from DivRegNetLib.io import atomic
from DivRegNetLib.quality import metrics
from DivRegNetLib.registration import methods
from DivRegNetLib.registration.variational import DEFAULT
from training import config as configs
from training import pictures, report, scoring
from training.benchmarks.methods import REFINE_STEPS
from training.data.sources import Source, source_of
from training.experiments import semi
from training.trainer import LAST, fit

FROM_NEWTON = (
    "methods=[variational,regnet]", "regnet.guided=true", "regnet.velocity=true", "regnet.symmetric=true",
    "loss.diffusion=6.0", "kldivnet.frequencies=3",
)  # fmt: skip
SUPERVISED = "RegNet from Newton steps and known deformations"
NETWORKS = {
    "RegNet + LNCC": ("loss.similarity=lncc", "loss.diffusion=0.5"),
    "RegNet + MI 16": ("loss.similarity=mi", "loss.bins=16"),
    "RegNet + MI 64": ("loss.similarity=mi", "loss.bins=64"),
    "RegNet + MI 256": ("loss.similarity=mi", "loss.bins=256"),
    "DivRegNet": (),
    "DivRegNet from Newton steps": FROM_NEWTON,
    SUPERVISED: (*FROM_NEWTON, "loss.weight=0", "loss.known=1", "warmup=0"),
}
"""Row -> overrides of the experiment's configuration. SUPERVISED needs pairs with a known deformation."""

INTERRUPTED = 130  # exit code
BUNDLED = "bundled model, refined"
METHODS = ("affine", "FFD+SEMI", *list(NETWORKS)[:-2], "Newton steps alone", *list(NETWORKS)[-2:], BUNDLED)


@dataclass(frozen=True)
class Experiment:
    """A table of the paper.

    name: name of the report.
    config: file name in training/configs.
    tasks: groups of rows.
    overrides: function from tasks to overrides of the configuration.
    paper: (method, task) -> Dice, ASD mm and HD mm in the paper.
    note: text above the table.
    truth: whether the true deformation of the pairs is known.
    """

    name: str
    config: str
    tasks: tuple[str, ...]
    paper: dict[tuple[str, str], tuple[float, float, float]]
    note: str
    truth: bool = False
    overrides: Callable[[Sequence[str]], tuple[str, ...]] = field(default=lambda tasks: ())

    @property
    def methods(self) -> tuple[str, ...]:
        return METHODS if self.truth else tuple(m for m in METHODS if m != SUPERVISED)


def add_arguments(parser: argparse.ArgumentParser, experiment: Experiment) -> None:
    """The options of :func:`run`, except ``cohort``."""
    parser.add_argument("--preset", default="quick", help="one of the configuration's (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=50, help="test pairs per task, at most (default: %(default)s)")
    parser.add_argument("--tasks", nargs="+", default=list(experiment.tasks), choices=experiment.tasks)
    parser.add_argument("--joint", action="store_true", help="train one network per row for all tasks, not one each")
    parser.add_argument(
        "--methods", nargs="+", default=list(experiment.methods), choices=experiment.methods, metavar="METHOD"
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--output", type=Path, default=Path("build/experiments") / experiment.name)
    parser.add_argument(
        "--jobs", type=int, default=1, help="networks that are trained at a time, each in a process of its own"
    )
    parser.add_argument("--train-only", action="store_true", help="register nothing")
    parser.add_argument(
        "--unfinished", action="store_true", help="register with trainings that are not finished as they are"
    )
    parser.add_argument(
        "--override", dest="overrides", nargs="+", default=[], metavar="KEY=VALUE", help="of the configuration"
    )


def run(experiment: Experiment, settings: argparse.Namespace) -> list[dict]:
    """Computes the rows that are not finished yet, and writes ``NAME.md``, ``.csv``, ``.json`` and a PNG per task.

    The report has all rows in the output folder, including those of earlier calls with other tasks and methods.

    Returns:
        The rows of the table; none with ``settings.train_only``.
    Raises:
        ValueError, FileNotFoundError: the configuration or the cohort is invalid.
        FloatingPointError: a training diverged.
    """
    started = time.time()
    wanted = [(task, method) for task in settings.tasks for method in settings.methods]
    for task in settings.tasks:
        if next(_tested(experiment, task, settings).held_out("test"), None) is None:
            raise ValueError(f"{settings.cohort}: the split 'test' has no fixed and moving volume to make a pair of")
    todo = [(task, method) for task, method in wanted if not _finished(experiment, task, method, settings)]
    if settings.jobs > 1:
        _train_side_by_side(experiment, todo, settings)
    elif settings.train_only:
        for task, method in todo:
            _method(experiment, task, method, settings, Fabric(accelerator=settings.device, devices=1))
    if settings.train_only:
        return []
    for task, method in tqdm(wanted, desc="rows"):
        _row(experiment, task, method, settings)
    done = {task: [m for m in METHODS if _kept(settings, task, m).exists()] for task in experiment.tasks}
    rows = [json.loads(_kept(settings, task, m).read_text()) for task, methods in done.items() for m in methods]
    about = {
        "preset": settings.preset,
        "seeds": f"training {_config(experiment, experiment.tasks, 'DivRegNet', settings).seed}; test pairs as in "
        "training/data/sources.py",
        "pairs": settings.pairs,
        "overrides": " ".join(settings.overrides) or "none",
        "networks": "one per row, for all tasks" if settings.joint else "one per row and task",
        "device": settings.device,
        "seconds": round(time.time() - started),
        "note": experiment.note,
    }
    report.write(settings.output, experiment.name, rows, about)
    for task in settings.tasks:
        drawn = figure(experiment, task, done[task], settings)
        file = settings.output / f"{experiment.name}-{task}.png"
        atomic.write_atomically(file, lambda part, drawn=drawn: drawn.savefig(part, dpi=110, format="png"))
    return rows


def _train_side_by_side(experiment: Experiment, todo: Sequence[tuple[str, str]], settings: argparse.Namespace) -> None:
    """Trains the networks of rows in ``settings.jobs`` processes at a time, each of which is this command for one row.

    What a process prints goes to ``NAME.log`` beside its run. An interrupt reaches all processes, as they are of one group;
    their checkpoints remain.

    Raises:
        ValueError: a training failed; names its log.
    """
    rows = {_trained(experiment, task, m, settings).name: (task, m) for task, m in todo if m in NETWORKS}

    def train(name: str) -> int:
        row = ("--tasks", rows[name][0], "--methods", rows[name][1], "--jobs", "1", "--train-only")
        with (settings.output / "runs" / f"{name}.log").open("w") as log:
            command = [sys.executable, *sys.argv, *row]
            return subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode

    (settings.output / "runs").mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(settings.jobs) as pool:
        failed = [name for name, code in zip(rows, pool.map(train, rows), strict=True) if code]
    if failed:
        raise ValueError(f"{settings.output / 'runs' / failed[0]}.log says why this training did not finish")


def figure(experiment: Experiment, task: str, methods: list[str], settings: argparse.Namespace) -> Figure:
    """Methods side by side on the first test pair: the warped image with the outline of the fixed labels, and below it the
    error, if the true deformation is known, or else the outline of the warped labels on the fixed image."""
    source = _tested(experiment, task, settings)
    _, pair = next(source.held_out("test"))
    drawn = Figure(figsize=(1.9 * (len(methods) + 1), 4.8), layout="constrained")
    axes = drawn.subplots(2, len(methods) + 1)
    pictures.show(axes[0, 0], pair.fixed, "fixed", pair.fixed_labels)
    pictures.show(axes[1, 0], pair.moving, "moving", pair.moving_labels)
    shown = None
    for i, method in enumerate(methods, 1):
        with np.load(_kept(settings, task, method).with_suffix(".npz")) as kept:
            displacement = torch.from_numpy(kept["displacement"]).float()
        labels = fields.warp(pair.moving_labels.float(), displacement, mode="nearest", padding="zeros")
        warped = fields.warp(pair.moving, displacement)
        pictures.show(axes[0, i], warped, textwrap.fill(method, 20), pair.fixed_labels)
        dice = metrics.dice(*((x > 0).numpy() for x in (pair.fixed_labels, labels)))
        if pair.truth is None:
            pictures.show(axes[1, i], pair.fixed, f"Dice {dice:.3f}", labels)
        else:
            error = fields.length(displacement - pair.truth) * source.cohort.spacing
            shown = axes[1, i].imshow(pictures.plane(error * (pair.fixed_labels > 0)), cmap="magma", vmin=0, vmax=6)
            axes[1, i].set_title(f"Dice {dice:.3f}", fontsize=9)
            axes[1, i].set_axis_off()
    if shown is not None:
        drawn.colorbar(shown, ax=axes[1, :], shrink=0.8, label="error, mm")
    below = (
        "outline of the warped labels on the fixed image" if pair.truth is None else "distance to the true deformation"
    )
    drawn.suptitle(f"{task}. Above: warped images, outline of the fixed labels. Below: {below}", fontsize=10)
    return drawn


def _config(experiment: Experiment, tasks: Sequence[str], method: str, settings: argparse.Namespace) -> configs.Config:
    """The configuration that a row is trained with."""
    return configs.load(
        configs.CONFIGS / experiment.config,
        preset=settings.preset,
        overrides=[*experiment.overrides(tasks), *NETWORKS[method], *settings.overrides],
        name="_".join([*tasks, method]).replace(" + ", "_").replace(" ", "_"),
        data={"cohort": str(settings.cohort)},
    )


def _trained(experiment: Experiment, task: str, method: str, settings: argparse.Namespace) -> configs.Config:
    """The configuration of the network of a row."""
    return _config(experiment, experiment.tasks if settings.joint else [task], method, settings)


def _tested(experiment: Experiment, task: str, settings: argparse.Namespace) -> Source:
    """The source of the test pairs."""
    config = _config(experiment, [task], "DivRegNet", settings).as_dict()
    config["data"]["held_out"] = settings.pairs
    return source_of(configs.build(config))


def _kept(settings: argparse.Namespace, task: str, method: str) -> Path:
    return settings.output / "rows" / f"{task} {method}.json"


def _steps(experiment: Experiment, task: str, method: str, settings: argparse.Namespace) -> int | None:
    """Steps of the training of a row: all, or with ``settings.unfinished`` those of its checkpoint. None: it has no training.

    Raises:
        ValueError: there is no checkpoint.
    """
    if method not in NETWORKS:
        return None
    config = _trained(experiment, task, method, settings)
    if not settings.unfinished:
        return config.steps
    checkpoint = settings.output / "runs" / config.name / LAST
    if not checkpoint.exists():
        raise ValueError(f"{checkpoint} is missing: the training of {method} for {task} was not begun")
    return torch.load(checkpoint, map_location="cpu", weights_only=True)["step"]


def _finished(experiment: Experiment, task: str, method: str, settings: argparse.Namespace) -> bool:
    """Whether a row was computed, from a training of as many steps."""
    kept = _kept(settings, task, method)
    if not kept.exists():
        return False
    return json.loads(kept.read_text()).get("steps") == _steps(experiment, task, method, settings)


def _row(experiment: Experiment, task: str, method: str, settings: argparse.Namespace) -> dict:
    """A row of the table, means over the test pairs; it is kept on disk together with the displacement of the first pair."""
    kept = _kept(settings, task, method)
    if _finished(experiment, task, method, settings):
        return json.loads(kept.read_text())
    fabric = Fabric(accelerator=settings.device, devices=1)
    register = _method(experiment, task, method, settings, fabric)
    source = _tested(experiment, task, settings)
    scores, seconds = [], 0.0
    for _, pair in source.held_out("test"):
        fixed, moving = pair.fixed.to(fabric.device), pair.moving.to(fabric.device)
        started = time.perf_counter()
        with torch.set_grad_enabled(method == "FFD+SEMI"):
            displacement = register(fixed, moving).detach().cpu()
        seconds += time.perf_counter() - started
        if not scores:
            atomic.write_atomically(kept.with_suffix(".npz"), lambda part, field=displacement: _save(part, field))
        scores.append(scoring.of_displacement(pair, displacement, source.cohort.spacing, union=True, surfaces=True))
    row = {"task": task, "method": method} | {k: float(np.mean([s[k] for s in scores])) for k in scores[0]}
    row["seconds"] = seconds / len(scores)
    row["steps"] = _steps(experiment, task, method, settings)
    paper = experiment.paper.get((method, task), (None,) * 3)
    row |= dict(zip(("paper Dice", "paper ASD", "paper HD"), paper, strict=True))
    atomic.write_json(row, kept)
    return row


def _method(
    experiment: Experiment, task: str, method: str, settings: argparse.Namespace, fabric: Fabric
) -> Callable[[Tensor, Tensor], Tensor]:
    """A method, trained if necessary: (fixed, moving) -> displacement in voxels."""
    if method == "affine":
        return lambda fixed, moving: torch.zeros_like(fixed).repeat(1, 3, 1, 1, 1)
    if method == "FFD+SEMI":
        return lambda fixed, moving: semi.register(fixed, moving)
    if method == "Newton steps alone":
        return lambda fixed, moving: methods.deform(methods.Images(fixed, moving), ("variational",), DEFAULT, None)
    if method == BUNDLED:
        return _refined(models.load("general", fabric.device))
    config = _trained(experiment, task, method, settings)
    config = replace(config, steps=_steps(experiment, task, method, settings))
    run = settings.output / "runs" / config.name
    return fit(config, source_of(config, fabric.device), run, fabric, resume=True).predict


def _refined(model: models.Model) -> Callable[[Tensor, Tensor], Tensor]:
    """The methods of a model, and REFINE_STEPS steps after them."""
    card, settings = model.card, replace(model.card.refinement_settings, steps=REFINE_STEPS)

    def register(fixed: Tensor, moving: Tensor) -> Tensor:
        images = methods.Images(fixed, moving)
        displacement = methods.deform(images, tuple(card.methods), card.variational_settings, model.regnet)
        return methods.refine(images, displacement, settings)

    return register


def _save(part: Path, displacement: Tensor) -> None:
    with part.open("wb") as stream:
        np.savez_compressed(stream, displacement=displacement.half().numpy())
