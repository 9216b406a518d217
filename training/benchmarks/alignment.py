"""The initial alignment measured against what users would pick instead, on pairs whose alignment is known.

    python training/benchmark.py --alignment --data DIR [--methods NAME ...] [--families NAME ...] [--split "held out"]
    python training/benchmark.py --alignment --data DIR --before CHECKOUT    # beside an older version of this project

A case is right where the mean distance to the truth over the fixed foreground is below its limit: 5 mm for heads, less for
smaller fields of view, more where the reference between two subjects is itself known to some mm only; see
``misalignments.py`` for the kinds. Each method gets the two volumes as files and gives a matrix; it runs in a process of its
own that stays for all cases, with one thread, and its seconds are CPU seconds without reading the files.

Rows are kept as they are done, so the same command goes on after an interruption. Methods may be measured one after the other,
on few or many cases: ``--methods`` says what is measured, and the report is of all rows that are kept.
"""

import argparse
import json
import os
import queue
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from matplotlib.figure import Figure

HERE = Path(__file__).resolve()
ROWS = "alignment-rows.jsonl"
TIMEOUT_S = 3600.0
BEFORE = "DivRegNet before"
OURS = "DivRegNet"


# Methods: each is ``(fixed, moving) -> (4, 4)``, fixed to moving points (LPS, mm).


def divregnet() -> Callable:
    """The first two stages of a registration, in the mode that it runs in."""
    import torch

    from DivRegNetLib.options import Options
    from DivRegNetLib.registration import pipeline

    torch.set_num_threads(1)
    options = Options(align="affine", device="cpu")

    @torch.inference_mode()
    def register(fixed: sitk.Image, moving: sitk.Image) -> np.ndarray:
        inputs = pipeline.check(fixed, moving, None, None, options)
        return pipeline.align(inputs, options, progress=lambda fraction: None).matrix

    return register


def ants(exhaustive: bool) -> Callable:
    """``Affine``, from the centers of mass or from an ``affine_initializer`` over all angles (Avants et al., 2011)."""
    import ants as package

    def convert(image: sitk.Image):
        direction = np.reshape(image.GetDirection(), (3, 3))
        array = np.ascontiguousarray(sitk.GetArrayFromImage(image).astype(np.float32).T)
        return package.from_numpy(array, origin=image.GetOrigin(), spacing=image.GetSpacing(), direction=direction)

    def register(fixed: sitk.Image, moving: sitk.Image) -> np.ndarray:
        there = [convert(_coarse(x)) for x in (fixed, moving)]
        start = None
        if exhaustive:
            coarse = [convert(_coarse(x, 8.0, 20)) for x in (fixed, moving)]
            start = package.affine_initializer(
                *coarse, search_factor=45, radian_fraction=1.0, use_principal_axis=False, local_search_iterations=10
            )
        found = package.registration(*there, "Affine", initial_transform=start, aff_metric="mattes")
        matrix = np.eye(4)
        for path in found["fwdtransforms"]:  # applied to points from the first on
            matrix = _matrix(sitk.ReadTransform(path)) @ matrix
        return matrix

    return register


def _coarse(image: sitk.Image, mm: float = 3.0, voxels: int = 48) -> sitk.Image:
    """Averaged in blocks to about ``mm``, or to ``voxels`` along the shortest side of a small field of view."""
    grid_mm = min(mm, min(n * s for n, s in zip(image.GetSize(), image.GetSpacing(), strict=True)) / voxels)
    return sitk.BinShrink(
        sitk.Cast(image, sitk.sitkFloat32), [max(int(grid_mm / s + 0.25), 1) for s in image.GetSpacing()]
    )


def _matrix(transform: sitk.Transform) -> np.ndarray:
    origin = np.array(transform.TransformPoint((0.0, 0.0, 0.0)))
    matrix = np.eye(4)
    matrix[:3, :3] = np.stack([np.array(transform.TransformPoint(e.tolist())) - origin for e in np.eye(3)], 1)
    matrix[:3, 3] = origin
    return matrix


def simple_itk() -> Callable:
    """Centers of mass, then rigid and affine under Mattes MI, levels of 4, 2 and 1."""

    def register(fixed: sitk.Image, moving: sitk.Image) -> np.ndarray:
        fixed, moving = _coarse(fixed), _coarse(moving)
        start = sitk.CenteredTransformInitializer(
            fixed, moving, sitk.Euler3DTransform(), sitk.CenteredTransformInitializerFilter.MOMENTS
        )
        for transform in (start, None):
            if transform is None:
                rigid = sitk.Euler3DTransform(start)
                transform = sitk.AffineTransform(3)
                transform.SetCenter(rigid.GetCenter())
                transform.SetMatrix(rigid.GetMatrix())
                transform.SetTranslation(rigid.GetTranslation())
            method = sitk.ImageRegistrationMethod()
            method.SetMetricAsMattesMutualInformation(32)
            method.SetMetricSamplingStrategy(method.RANDOM)
            method.SetMetricSamplingPercentage(0.2, 1)
            method.SetInterpolator(sitk.sitkLinear)
            method.SetOptimizerAsGradientDescent(1.0, 200, 1e-6, 10)
            method.SetOptimizerScalesFromPhysicalShift()
            method.SetShrinkFactorsPerLevel([4, 2, 1])
            method.SetSmoothingSigmasPerLevel([2, 1, 0])
            method.SetInitialTransform(transform, inPlace=True)
            method.Execute(fixed, moving)
        return _matrix(transform)

    return register


def elastix() -> Callable:
    """Default parameter maps rigid and affine, started from the centers of gravity (Klein et al., IEEE TMI 2010)."""
    import itk

    def convert(image: sitk.Image):
        converted = itk.image_from_array(sitk.GetArrayFromImage(image).astype(np.float32))
        converted.SetSpacing(image.GetSpacing())
        converted.SetOrigin(image.GetOrigin())
        converted.SetDirection(itk.matrix_from_array(np.reshape(image.GetDirection(), (3, 3))))
        return converted

    def register(fixed: sitk.Image, moving: sitk.Image) -> np.ndarray:
        parameters = itk.ParameterObject.New()
        for name in ("rigid", "affine"):
            map_ = dict(itk.ParameterObject.GetDefaultParameterMap(name, 4))
            map_["AutomaticTransformInitialization"] = ["true"]
            map_["AutomaticTransformInitializationMethod"] = ["CenterOfGravity"]
            parameters.AddParameterMap(map_)
        there = [convert(_coarse(x)) for x in (fixed, moving)]
        _, found = itk.elastix_registration_method(*there, parameter_object=parameters, log_to_console=False)
        with tempfile.TemporaryDirectory() as folder:
            points = Path(folder) / "points.txt"
            at = np.array([[0, 0, 0], [100, 0, 0], [0, 100, 0], [0, 0, 100]], float) * _unit(fixed)
            points.write_text("point\n4\n" + "\n".join(" ".join(map(repr, p.tolist())) for p in at))
            transformix = itk.TransformixFilter.New(there[1])
            transformix.SetTransformParameterObject(found)
            transformix.SetFixedPointSetFileName(str(points))
            transformix.SetOutputDirectory(folder)
            transformix.UpdateLargestPossibleRegion()
            text = (Path(folder) / "outputpoints.txt").read_text()
        out = np.array([[float(v) for v in line.split("OutputPoint = [")[1].split("]")[0].split()]
                        for line in text.splitlines() if "OutputPoint" in line])  # fmt: skip
        matrix = np.eye(4)
        matrix[:3, :3] = ((out[1:] - out[0]) / np.diag(at[1:])[:, None]).T
        matrix[:3, 3] = out[0]
        return matrix

    return register


def _unit(image: sitk.Image) -> float:
    return min(image.GetSpacing())


METHODS: dict[str, tuple[str, Callable[[], Callable]]] = {
    "as the images lie": ("nothing is done", lambda: lambda fixed, moving: np.eye(4)),
    BEFORE: ("affine, of the version that --before points at", divregnet),
    OURS: ("affine", divregnet),
    "ANTs Affine": ("centers of mass, then Affine, Mattes MI; images of 3 mm", lambda: ants(False)),
    "ANTs initializer + Affine": (
        "affine_initializer on images of 8 mm, steps of 45 degrees over all angles, then Affine, Mattes MI; images of 3 mm",
        lambda: ants(True),
    ),
    "SimpleITK": (
        "centers of mass (moments), then rigid and affine, Mattes MI of 32 bins, three levels; images of 3 mm",
        simple_itk,
    ),
    "elastix": ("center of gravity, then default rigid and affine, four resolutions; images of 3 mm", elastix),
}


def work(method: str) -> None:
    """Registers the pairs whose folders come line by line; answers a line of JSON each."""
    register = METHODS[method][1]()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print does not get between the answers
    for line in sys.stdin:
        folder = Path(line.strip())
        fixed, moving = (sitk.ReadImage(str(folder / f"{n}.mha")) for n in ("fixed", "moving"))
        started, used = time.perf_counter(), _cpu()
        try:
            answer = {"matrix": np.asarray(register(fixed, moving)).tolist()}
        except Exception as error:  # a method that fails on a pair has failed on this pair only
            answer = {"failed": str(error).strip().splitlines()[-1][:200] if str(error) else type(error).__name__}
        answer |= {"seconds": _cpu() - used, "wall": time.perf_counter() - started}
        print(json.dumps(answer), file=answers, flush=True)


def _cpu() -> float:
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


class Worker:
    """A method's process."""

    def __init__(self, method: str, checkout: Path) -> None:
        threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS")
        environment = os.environ | dict.fromkeys(threads, "1") | {"PYTHONPATH": str(checkout)}
        self.command = [sys.executable, str(HERE), "--worker", method]
        self.how = {"env": environment, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE,
                    "stderr": subprocess.DEVNULL, "text": True}  # fmt: skip
        self.process = None

    def ask(self, folder: Path) -> dict:
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(self.command, **self.how)
        self.process.stdin.write(f"{folder}\n")
        self.process.stdin.flush()
        answers: queue.Queue = queue.Queue()
        threading.Thread(target=lambda p=self.process: answers.put(p.stdout.readline()), daemon=True).start()
        try:
            line = answers.get(timeout=TIMEOUT_S)
        except queue.Empty:
            self.close()
            return {"failed": f"more than {TIMEOUT_S:g} s", "seconds": TIMEOUT_S}
        return json.loads(line) if line else {"failed": "the process ended", "seconds": None}

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def score(answer: dict, truth: np.ndarray, points: np.ndarray, limit: float) -> dict:
    """Mean distance (mm) between where a method and the truth take the points, and whether that is below the limit."""
    from DivRegNetLib.core.grid import apply_matrix

    row = {"limit mm": limit, "seconds": answer["seconds"], "wall": answer.get("wall")}
    if "failed" in answer:
        return row | {"failed": answer["failed"], "right": False}
    found = apply_matrix(np.array(answer["matrix"]), points)
    error = float(np.linalg.norm(found - apply_matrix(truth, points), axis=1).mean())
    return row | {"error mm": error, "right": bool(error < limit), "matrix": answer["matrix"]}


def write(case, data: Path, folder: Path) -> tuple[np.ndarray, np.ndarray, float]:
    """Writes the two images of a case to a folder, if they are not there; returns its truth, points and limit."""
    about = folder / "truth.npz"
    if not about.exists():
        folder.mkdir(parents=True, exist_ok=True)
        fixed, moving, truth, points, limit = case.make(data)
        for name, image in (("fixed", fixed), ("moving", moving)):
            sitk.WriteImage(image, f"{folder}/{name}.mha")
        np.savez(about, truth=truth, points=points, limit=limit)
    with np.load(about) as kept:
        return kept["truth"], kept["points"], float(kept["limit"])


def kept_rows(output: Path, cases: set[str] | None = None) -> list[dict]:
    """The rows that were measured before; of some cases only, or of all."""
    file = output / ROWS
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [r for r in rows if cases is None or r["case"] in cases]


def run(chosen, methods: list[str], data: Path, output: Path, checkouts: dict[str, Path],
        pairs: Path | None = None, say=print) -> list[dict]:  # fmt: skip
    """A row per case and method; those in ``output`` are not done again."""
    output.mkdir(parents=True, exist_ok=True)
    rows = kept_rows(output)
    done = {(r["method"], r["case"]) for r in rows}
    workers = {m: Worker(m, checkouts.get(m, HERE.parents[2])) for m in methods}
    try:
        with open(output / ROWS, "a") as file:
            for case in chosen:
                missing = [m for m in methods if (m, case.name) not in done]
                if not missing:
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    folder = Path(folder) if pairs is None else pairs / case.name
                    truth, points, limit = write(case, data, folder)
                    for method in missing:
                        row = {"method": method, "case": case.name, "family": case.family, "scene": case.scene,
                               "kind": case.kind, "split": case.split}  # fmt: skip
                        row |= score(workers[method].ask(folder), truth, points, limit)
                        rows.append(row)
                        file.write(json.dumps(row) + "\n")
                        file.flush()
                        off = row.get("error mm", float("nan"))
                        say(f"{method}: {case.name}: {off:.3g} of {limit:.3g} mm, {row['seconds'] or 0:.2f} s")
    finally:
        for worker in workers.values():
            worker.close()
    names = {c.name for c in chosen}
    return [r for r in rows if r["case"] in names and r["method"] in methods]


GROUPS = {
    "as it is": ("as it is",),
    "turned by 10 to 60 degrees, or thick slices": ("turned 10-60", "thick slices", "small"),
    "turned by 60 to 180 degrees": ("turned 60-120", "turned 120-180", "turned 90", "turned 180", "axis order"),
    "far away": ("far",),
    "wrong scale or slice spacing": ("scale 0.6-1.6", "slice spacing"),
    "slab or crop": ("slab", "crop"),
    "scale, slab or crop, turned by 90 to 180": ("scale, turned 90-180", "slab, turned 90-180", "crop, turned 90-180"),
}
"""What the kinds of misplacement are summed up as."""
ONE, TWO = "one subject", "two subjects, or CT and MR"


def pair_of(row: dict) -> str:
    """Whether both images of a row show one subject, so that the truth is known."""
    return TWO if row["family"].startswith("two") or " to " in row["family"] else ONE


def group_of(row: dict) -> str:
    return next(group for group, kinds in GROUPS.items() if row["kind"] in kinds)


def table(rows: list[dict], by: dict[str, Callable[[dict], str]]) -> list[dict]:
    """Right cases of all cases, of each method.

    Args:
        by: what rows are sorted by, name -> function of a row.
    """
    methods = [m for m in METHODS if any(r["method"] == m for r in rows)]
    keys = {id(r): tuple(of(r) for of in by.values()) for r in rows}
    found = []
    for key in dict.fromkeys(keys.values()):
        row = dict(zip(by, key, strict=True))
        for method in methods:
            these = [r for r in rows if r["method"] == method and keys[id(r)] == key]
            row[method] = f"{sum(r['right'] for r in these)}/{len(these)}" if these else ""
        found.append(row)
    return found


BY_FAMILY = {"pair": pair_of, "family": lambda row: row["family"]}
BY_GROUP = {"pair": pair_of, "misplaced": group_of}
BY_KIND = {"split": lambda row: row["split"], **BY_FAMILY, "kind": lambda row: row["kind"]}


def in_common(rows: list[dict]) -> list[dict]:
    """The rows of the cases that every method has been measured on."""
    methods = {r["method"] for r in rows}
    of = {c: {r["method"] for r in rows if r["case"] == c} for c in dict.fromkeys(r["case"] for r in rows)}
    return [r for r in rows if of[r["case"]] == methods]


def ordered(rows: list[dict]) -> list[dict]:
    """Sorted as pairs and groups are named."""
    return sorted(rows, key=lambda r: ((ONE, TWO).index(pair_of(r)), list(GROUPS).index(group_of(r))))


def seconds(rows: list[dict]) -> list[dict]:
    """Median CPU seconds of each method."""
    found = []
    for family in dict.fromkeys(r["family"] for r in rows):
        row = {"family": family}
        for method in METHODS:
            these = [r["seconds"] for r in rows if r["method"] == method and r["family"] == family and r["seconds"]]
            if these:
                row[method] = round(float(np.median(these)), 2)
        found.append(row)
    return found


def plot(rows: list[dict]) -> Figure:
    """Share of right cases by what was done to the images, a bar per method."""
    methods = [m for m in METHODS if any(r["method"] == m for r in rows)]
    colors = dict(zip(METHODS, ("0.75", "0.5", "C3", "#8fbce6", "C0", "C2", "C1"), strict=True))
    rows = ordered(rows)
    groups = [g for g in GROUPS if any(group_of(r) == g for r in rows)]
    figure = Figure(figsize=(8, 0.9 + 0.16 * len(groups) * (len(methods) + 1)), layout="constrained")
    axes, high = figure.subplots(), 0.8 / len(methods)
    for n, method in enumerate(methods):
        for at, group in enumerate(groups):
            these = [r["right"] for r in rows if r["method"] == method and group_of(r) == group]
            if these:
                place = at + high * (n - (len(methods) - 1) / 2)
                axes.barh(place, 100 * np.mean(these), high, color=colors[method], label=method if at == 0 else None)
                axes.text(100 * np.mean(these) + 1, place, f"{sum(these)} of {len(these)}", va="center", fontsize=7)
    axes.set(
        yticks=range(len(groups)),
        yticklabels=groups,
        xlim=(0, 112),
        xlabel="right cases, %",
        ylim=(len(groups) - 0.5, -0.5),
    )
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(methods), fontsize=8, frameon=False
    )
    return figure


def write_report(rows: list[dict], output: Path, about: dict) -> str:
    """Writes the report ``alignment`` with its plot; returns its main tables."""
    from DivRegNetLib.io import atomic
    from training import report

    rows = ordered(rows)
    common = in_common(rows)
    same = common or rows
    sections = [
        f"## The same {len({r['case'] for r in same})} cases by every method" if common else "## All rows",
        report.table(table(same, BY_GROUP)), "![Share of right cases](alignment.png)",
        "## All that was measured", report.table(table(rows, BY_GROUP)), report.table(table(rows, BY_FAMILY)),
        "## CPU seconds, median", report.table(seconds(rows)),
    ]  # fmt: skip
    wrong = [
        f"- {r['method']}: {r['case']}: " + (f"{r['error mm']:.3g} mm" if "error mm" in r else r["failed"])
        for r in rows if r["method"] == OURS and not r["right"]
    ]  # fmt: skip
    sections += ["## Where DivRegNet is wrong", "\n".join(wrong) or "nowhere"]
    intro = "Right cases of all cases: the mean distance to the truth over the fixed foreground is below the limit of the case."
    note = "\n\n".join((intro, *sections, "## By kind"))
    report.write(output, "alignment", table(rows, BY_KIND), about | {"note": note})
    drawn = plot(same)
    atomic.write_atomically(output / "alignment.png", lambda part: drawn.savefig(part, dpi=110, format="png"))
    return "\n\n".join(sections)


def main(words: list[str]) -> int:
    """``training/benchmark.py --alignment``.

    Args:
        words: of the command line, without ``--alignment``.
    """
    from training.benchmarks import misalignments

    everything = misalignments.cases()
    families = list(dict.fromkeys(c.family for c in everything))
    kinds = list(dict.fromkeys(c.kind for c in everything))
    parser = argparse.ArgumentParser(
        "benchmark.py --alignment", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with brain_labelmaps, hippocampus, ...")
    parser.add_argument("--methods", nargs="*", default=[m for m in METHODS if m != BEFORE], choices=METHODS)
    parser.add_argument("--families", nargs="+", default=families, choices=families, metavar="FAMILY")
    parser.add_argument("--kinds", nargs="+", default=kinds, choices=kinds, metavar="KIND")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="every N-th of these cases only")
    parser.add_argument("--split", choices=("fitted", "held out"), help="default: both")
    parser.add_argument("--before", type=Path, help="checkout of an older version, which is measured as well")
    parser.add_argument("--output", type=Path, default=Path("build/alignment"))
    parser.add_argument("--pairs", type=Path, help="folder in which the pairs (some 20 GB) are kept for other runs")
    args = parser.parse_args(words)
    methods = args.methods + [BEFORE] * bool(args.before and BEFORE not in args.methods)
    chosen = [
        c for c in everything
        if c.family in args.families and c.kind in args.kinds and args.split in (None, c.split)
    ]  # fmt: skip
    started = time.time()
    checkouts = {BEFORE: args.before} if args.before else {}
    run(chosen[:: args.every], methods, args.data, args.output, checkouts, args.pairs)
    rows = kept_rows(args.output, {c.name for c in chosen})
    about = {"preset": args.split or "fitted and held out", "seeds": "of the names of the cases",
             "device": "cpu, one thread", "seconds": round(time.time() - started)}  # fmt: skip
    about |= {f"{m} with": METHODS[m][0] for m in METHODS if any(r["method"] == m for r in rows)}
    print(write_report(rows, args.output, about))
    return 0


if __name__ == "__main__":
    work(sys.argv[sys.argv.index("--worker") + 1])
