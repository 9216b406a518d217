"""Compares DivRegNet with other registration methods, on the same pairs and after the same initial alignment.

    python training/benchmark.py --data DIR [--preset quick]
    python training/benchmark.py --scaling
    python training/benchmark.py --alignment --data DIR ...   # initial alignments, see training/benchmarks/alignment.py

Every pair is aligned once by DivRegNet's affine alignment (except phantoms and limbs, whose images share a frame) and
resampled onto one isotropic grid, with intensities from 0 to 1 after clipping the outermost 0.5 %. Every method gets only
these two volumes and the same number of threads, and runs in a process of its own. The methods and their settings are in
training/benchmarks/methods.py, the pairs in cases.py.

ANTs SyN, elastix, ConvexAdam and greedy run if they are installed: ``pip install -e ".[benchmark]"``. NiftyReg is built from
source and needs a compiler: ``CMAKE_POLICY_VERSION_MINIMUM=3.5 pip install niftyreg``.

Prepared pairs and finished rows are kept, so the same command continues after an interruption. A row is measured again when
its settings have changed or, for DivRegNet, its weights or its code; ``--again METHOD`` measures a method again in any case.
"""

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from DivRegNetLib import models
from DivRegNetLib.core import fields
from DivRegNetLib.errors import DivRegNetError, InputError
from DivRegNetLib.io import atomic
from training import pictures, report
from training.benchmarks import alignment, measure, scaling, tables
from training.benchmarks.cases import FAMILIES, FIRST_SEED, Family, Prepared, prepare_pair, stored
from training.benchmarks.measure import Settings
from training.benchmarks.methods import DEFAULT, METHODS, missing, version


def compare(
    families: dict[str, Family], data: Path, settings: Settings, output: Path, quick: bool = False,
    chosen: tuple[str, ...] = tuple(METHODS),
) -> list[dict]:  # fmt: skip
    """One row per case and method; rows that are kept in ``output`` are not measured again.

    Args:
        quick: only the first case of each family, on its coarse grid.
        chosen: methods; those that are not installed are left out.
    Raises:
        InputError: a folder that a family needs is missing.
    """
    for name, family in families.items():
        if absent := [f for f in family.folders if not (data / f).is_dir()]:
            raise InputError(f"{data}: has no folder {absent[0]}, which {name} needs; choose other --families")
    rows, present = [], [m for m in chosen if missing(m) is None]
    todo = [(n, c) for n, family in families.items() for c in list(family.cases)[: 1 if quick else None]]
    for name, case in tqdm(todo, desc="pairs"):
        family = families[name]
        spacing, folder = spacing_of(family, quick), folder_of(output, family, name, case, quick)
        pair = prepare_pair(lambda load=family.cases[case]: load(data), spacing, folder, family.align)
        for method in present:
            scores = measure.row(pair, method, settings, folder / method)
            rows.append({"family": name, "set": tables.set_of(name, case), "case": case, "method": method} | scores)
        shown = [m for m in present if (folder / m / "displacement.mha").exists()]
        drawn = picture(pair, shown, f"{name}: {case}")
        atomic.write_atomically(
            folder / "pair.png", lambda part, drawn=drawn: drawn.savefig(part, dpi=110, format="png")
        )
    return rows


def spacing_of(family: Family, quick: bool) -> float:
    """The spacing in mm of the grid of a family's pairs."""
    return family.quick_spacing if quick else family.spacing


def folder_of(output: Path, family: Family, name: str, case: str, quick: bool) -> Path:
    """Where a pair is kept."""
    return output / f"{spacing_of(family, quick):g} mm" / name / case


def left_out(chosen: tuple[str, ...]) -> list[str]:
    """One sentence for each method that cannot be run."""
    return [f"{name} is left out: {reason}" for name in chosen if (reason := missing(name))]


def plot_scaling(rows: list[dict]) -> Figure:
    """Time and memory against the number of voxels."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    done = [r for r in rows if "failed" not in r]
    voxels = [float(np.prod([float(n) for n in r["size"].split(" x ")])) for r in done]
    for axes, key, label in zip(figure.subplots(1, 2), ("total s", "peak MiB"), ("seconds", "peak MiB"), strict=True):
        axes.plot(voxels, [r[key] for r in done], "o-", color="C3")
        axes.set(xscale="log", yscale="log", xlabel="voxels of each volume", ylabel=label)
        axes.grid(alpha=0.3, which="both")
    return figure


def picture(pair: Prepared, done: list[str], title: str) -> Figure:
    """The middle slice of a pair and of the moving image warped by each method, with the outline of the fixed labels."""
    figure = Figure(figsize=(2.2 * (len(done) + 2), 2.8), layout="constrained")
    draw(figure.subplots(1, len(done) + 2), pair, done)
    figure.suptitle(title, fontsize=10)
    return figure


def picture_of_worst(worst: list[dict], families: dict[str, Family], output: Path, quick: bool) -> Figure:
    """The pairs of :func:`training.benchmarks.tables.worst`, each with the best other method and with DivRegNet."""
    figure = Figure(figsize=(8.8, 2.6 * len(worst)), layout="constrained")
    for axes, row in zip(figure.subplots(len(worst), 4, squeeze=False), worst, strict=True):
        folder = folder_of(output, families[row["family"]], row["family"], row["case"], quick)
        draw(axes, stored(folder), [row["best other"], DEFAULT])
        axes[0].set_ylabel(f"{row['family']}\n{row['case']}", fontsize=8)
    return figure


def draw(axes: np.ndarray, pair: Prepared, done: list[str]) -> None:
    """Draws fixed image, moving image after the affine alignment, and warped images, into a row of axes."""
    fixed, moving = (_tensor(sitk.ReadImage(str(pair.folder / f"{n}.mha"))) for n in ("fixed", "moving"))
    labels = _tensor(pair.fixed_labels)
    inside = np.flatnonzero((labels[0, 0] > 0).flatten(1).any(1).numpy())
    at = (inside[len(inside) // 2] + 0.5) / max(labels.shape[2] - 1, 1)
    pictures.show(axes[0], fixed, "fixed", labels, at)
    pictures.show(axes[1], moving, "affine", labels, at)
    for i, method in enumerate(done, 2):
        field = sitk.ReadImage(str(pair.folder / method / "displacement.mha"), sitk.sitkVectorFloat32)
        u = torch.from_numpy(np.moveaxis(sitk.GetArrayFromImage(field), -1, 0).copy())[None] / field.GetSpacing()[0]
        pictures.show(axes[i], fields.warp(moving, u), method, labels, at)


def _tensor(image: sitk.Image) -> torch.Tensor:
    return torch.from_numpy(sitk.GetArrayFromImage(image).astype(np.float32))[None, None]


def about(settings: Settings, preset: str, started: float, more: dict) -> dict:
    """How the benchmark was run, for the report."""
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    return {
        "preset": preset,
        "seeds": f"deformations from {FIRST_SEED} on, see training/benchmarks/cases.py",
        "device": settings.device,
        "seconds": round(time.time() - started),
        "model": models.load(settings.model, torch.device("cpu")).card.name,
        "processor": cpu,
        **more,
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def write(rows: list[dict], settings: Settings, output: Path, preset: str, started: float, notes: list[str]) -> str:
    """Writes the reports ``benchmark`` (tables, plot) and ``benchmark-pairs`` (every pair); returns the main tables.

    Args:
        notes: sentences about methods that were left out.
    """
    means = tables.means(rows)
    accuracy, against, aims = tables.accuracy(means), tables.against(rows), tables.aims(rows)
    worst = tables.worst(rows)
    ran = [name for name in METHODS if any(r["method"] == name for r in rows)]
    with_ = {f"{n} with": METHODS[n].settings for n in ran}
    packages = dict.fromkeys(METHODS[n].package for n in ran if METHODS[n].package)
    run = about(settings, preset, started, {p: version(p) for p in packages} | with_)
    failed = [f"{r['method']} failed on {r['family']}, {r['case']}: {r['failed']}" for r in rows if "failed" in r]
    kinds = "\n".join(
        f"- **{n}**: {FAMILIES[n].note}." for n in dict.fromkeys(r["family"] for r in rows) if n in FAMILIES
    )
    sections = [
        "## Accuracy", report.table(accuracy),
        *(["## DivRegNet against other methods, pair by pair", report.table(against)] if against else []),
        *(["## Aims", report.table(aims)] if aims else []),
        *(["## The worst pairs", report.table(worst), "![The worst pairs](benchmark-worst.png)"] if worst else []),
    ]  # fmt: skip
    note = "\n\n".join(filter(None, [
        "*Held back* are pairs whose images no training and no choice of settings has used; *seen* are all others. Values "
        "are means over pairs and their standard errors, which treat pairs that share an image as independent. The best "
        "method of a row is in bold type. A positive gain means that DivRegNet is better.",
        "Seconds are those of the registration, without the initial alignment (which has a row of its own), imports and "
        "loading a model. Deformation s are those of the deformation alone, without resampling, inverse, displacements of "
        "all voxels, warped volume and quality card. CPU s are summed over all cores; other work on the machine hardly "
        "changes them. Dice, ASD and HD95 are means over labels. Memory is the maximum: peak is that of the process with its "
        "libraries, above start is without them.",
        "Quick: coarse grids, one pair per family. It shows that everything runs, not how accurate it is."
        * (preset == "quick"),
        kinds, "\n\n".join(notes + failed), *sections, "![Accuracy against time](benchmark.png)", "## All scores",
    ]))  # fmt: skip
    report.write(output, "benchmark-pairs", rows, run)
    report.write(output, "benchmark", means, run | {"note": note})
    figures = {"benchmark": tables.plot(rows)}
    if worst:
        figures["benchmark-worst"] = picture_of_worst(worst, FAMILIES, output, preset == "quick")
    for name, drawn in figures.items():
        atomic.write_atomically(output / f"{name}.png", lambda part, f=drawn: f.savefig(part, dpi=110, format="png"))
    return "\n\n".join([*sections, *notes, *failed])


def scale(settings: Settings, output: Path, most: int, started: float) -> str:
    """Writes the report ``scaling`` with a plot; returns the table."""
    sizes = [s for s in scaling.SIZES if np.prod(s, dtype=float) <= most]
    folder = output / "scaling" / f"{settings.device} {settings.threads}"
    rows = [scaling.row(s, settings, folder / f"{'x'.join(map(str, s))}.json") for s in tqdm(sizes, desc="sizes")]
    note = (
        f"The bundled pair stretched over volumes of {scaling.SPACING_MM:g} mm: seconds of each stage of the second run, "
        "affine alignment included.\n\n![Seconds and memory](scaling.png)"
    )
    report.write(output, "scaling", rows, about(settings, "full", started, {"note": note}))
    drawn = plot_scaling(rows)
    atomic.write_atomically(output / "scaling.png", lambda part: drawn.savefig(part, dpi=110, format="png"))
    return report.table(rows)


def main() -> int:
    if "--alignment" in sys.argv[1:]:
        return alignment.main([word for word in sys.argv[1:] if word != "--alignment"])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("."), help="folder with brain_t1t2pd, hippocampus, ...")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES, metavar="FAMILY")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="METHOD")
    parser.add_argument(
        "--again", nargs="+", default=[], choices=METHODS, metavar="METHOD", help="measure this method again"
    )
    parser.add_argument("--preset", default="full", choices=("full", "quick"))
    parser.add_argument("--model", default=models.DEFAULT)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count() or 1, help="threads of each method (default: %(default)s)"
    )
    parser.add_argument(
        "--refine", type=int, default=measure.Settings.refine, help="refinement steps (default: %(default)s)"
    )
    parser.add_argument("--scaling", action="store_true", help="measure time and memory against volume size instead")
    parser.add_argument(
        "--alignment",
        action="store_true",
        help="compare initial alignments instead, with options of its own (--alignment -h)",
    )
    parser.add_argument("--largest", type=float, default=1e9, help="largest number of voxels, for --scaling")
    parser.add_argument("--output", type=Path, default=Path("build/benchmark"))
    args = parser.parse_args()
    settings = Settings(args.model, args.device, args.threads, args.refine)
    torch.set_num_threads(args.threads)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(args.threads)
    started, chosen = time.time(), tuple(args.methods)
    for method in args.again:
        for folder in args.output.glob(f"* mm/*/*/{method}"):
            shutil.rmtree(folder)
    try:
        if args.scaling:
            print(scale(settings, args.output, int(args.largest), started))
            return 0
        notes = left_out(chosen)
        for sentence in notes:
            print(sentence, file=sys.stderr)
        families = {name: FAMILIES[name] for name in args.families}
        rows = compare(families, args.data, settings, args.output, args.preset == "quick", chosen)
        print(write(rows, settings, args.output, args.preset, started, notes))
    except (DivRegNetError, OSError) as error:
        print(f"benchmark.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
