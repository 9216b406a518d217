"""What each part of the variational method is worth: the same pairs, registered with and without it.

    python training/experiments/ablation.py --data DIR [--pairs development|held-back] [--variants NAME ...]

The pairs of ``development`` are of subjects that settings may be chosen on: hippocampus crops and label maps that are not
held out, phantoms of seeds that the benchmark does not have, and the pairs that the benchmark calls seen. Those of
``held-back`` are pairs of the benchmark that no choice of settings has used. A pair is aligned and resampled as for the
benchmark, and registered without the network and without further alignment.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor

from DivRegNetLib import models
from DivRegNetLib.core import fields, physical_fields
from DivRegNetLib.core.grid import Grid, affine_transform
from DivRegNetLib.errors import DivRegNetError
from DivRegNetLib.io.images import read_labels
from DivRegNetLib.options import Options
from DivRegNetLib.quality import metrics
from DivRegNetLib.registration import alignment, discrete, methods, pipeline
from DivRegNetLib.registration.discrete import DiscreteSettings
from DivRegNetLib.registration.resources import Resources
from DivRegNetLib.registration.variational import VariationalSettings
from training import report
from training.benchmarks import cases
from training.benchmarks.cases import FAMILIES, Material, Prepared, prepare_pair
from training.data import hippocampus, label_maps
from training.data.brainweb import brainweb
from training.scoring import displacement_on


@dataclass(frozen=True)
class Case:
    """A pair.

    family: name of the kind of pair, which the table has a row for.
    load: reads it from the data folder.
    spacing: of the grid that it is prepared on, mm.
    align: the alignment before all variants.
    judged: ``Dice`` or ``error mm``.
    """

    family: str
    name: str
    load: Callable[[Path], Material]
    spacing: float
    align: str
    judged: str


def _of_benchmark(family: str, names: Iterable[str]) -> list[Case]:
    about = FAMILIES[family]
    return [Case(family, name, about.cases[name], about.spacing, about.align, about.judged) for name in names]


def _thick(data: Path, task: str, millimeters: int = 3) -> Material:
    """A phantom whose moving image has thick slices."""
    material = cases.phantom(data, task, 7000)
    return replace(material, moving=sitk.BinShrink(material.moving, [1, 1, millimeters]))


HEADS_MM = 2.0  # of the grid that heads are prepared on, as in the benchmark
HOUNSFIELD = {"white": 29, "gray": 37, "fluid": 10}
BONE, FAT = (515, 516), (507, 508)  # of the classes outside the brain; the others are like muscle, or small
CT_WINDOW = (-20.0, 100.0)  # Hounsfield units, that of the brain


def _painted_ct(data: Path, heads: tuple[int, ...], seed: int, bend: int) -> Material:
    """A CT painted from label maps, of one head or the mean of several that are aligned to the first, and BrainWeb's T1 under
    a deformation with the seed ``bend``."""
    random, images, tissues = np.random.default_rng(seed), [], []
    reference = None
    for i, head in enumerate(heads):
        labels = cases.cropped(read_labels(label_maps.file_of(data, f"training_seg_{head:02d}")))
        mr = cases.painted_image(labels, "T1", np.random.default_rng(1 + i))
        reference = reference or (labels, mr)
        grid, to = reference[0], affine_transform(alignment.align(reference[1], mr, "affine") if i else np.eye(4))
        array = sitk.GetArrayViewFromImage(labels)
        means = np.array(
            [HOUNSFIELD.get(label_maps.tissue(n), 40 if n > 500 else 30) for n in range(int(array.max()) + 1)]
        )
        for classes, value in ((BONE, 1000), (FAT, -90), ((0,), -1000)):
            means[list(classes)] = value
        ct = sitk.DiscreteGaussian(Grid.of(labels).image(means[array].astype(np.float32)), 0.7)
        images.append(sitk.GetArrayFromImage(sitk.Resample(ct, grid, to, sitk.sitkLinear, -1000.0)))
        groups = [tuple(n for n in label_maps.BRAIN if label_maps.tissue(n) == t) for t in ("fluid", "gray", "white")]
        map_ = sitk.Resample(cases.relabeled(labels, groups), grid, to, sitk.sitkNearestNeighbor, 0)
        tissues.append([sitk.GetArrayViewFromImage(map_) == n for n in (1, 2, 3)])
    ct = np.mean(images, 0) + random.normal(0, 1, images[0].shape)
    priors, like = np.mean(tissues, 0), Grid.of(reference[0])
    labels = like.image(((priors.argmax(0) + 1) * (priors.max(0) > 0.5)).astype(np.uint8))
    moving = like.image(ct.clip(*CT_WINDOW).astype(np.float32))
    fixed_tissues, brain = cases.brainweb_tissues(data)
    return cases.deformed(Material(brainweb(data, "T1"), moving, fixed_tissues, labels, inside=brain), bend)


def _heads() -> list[Case]:
    """Pairs of painted heads of subjects that may be learned from."""
    pairs = (("01", "02", ("T2", "T1")), ("05", "06", ("any", "any")))
    return [
        Case(
            "painted heads", f"{m} to {f}",
            partial(cases.painted, fixed=f"training_seg_{f}", moving=f"training_seg_{m}", contrasts=c, seed=7500 + i),
            HEADS_MM, "affine", "Dice",
        )
        for i, (f, m, c) in enumerate(pairs)
    ]  # fmt: skip


DEVELOPMENT = [
    *_heads(),
    *(Case("hippocampus", f"{m} to {f}", partial(cases.hippocampus_crops, fixed=f, moving=m, among=hippocampus.learned), 1.0,
           "affine", "Dice")
      for f, m in ((0, 1), (40, 41), (80, 82), (120, 123))),
    *(Case("AAL phantoms", task, partial(cases.phantom, task=task, seed=7000), 2.0, "none", "error mm")
      for task in ("T1-T2", "PD-T2")),
    *(Case("thick slices, AAL phantoms", task, partial(_thick, task=task), 2.0, "none", "error mm")
      for task in ("T1-T2", "PD-T2")),
    *_of_benchmark("aligned pairs", ("T1 to T2", "PD to T2")),
    *_of_benchmark("MS07 to BrainWeb", ("T2 to T1", "T1POST to T2")),
    *_of_benchmark("IXI012 to BrainWeb", ("T1 to T1", "T1 to T2")),
    *(Case("painted CT to MR", f"{len(heads)}", partial(_painted_ct, heads=heads, seed=7700 + i, bend=7000 + i), 2.0,
           "affine", "Dice") for i, heads in enumerate((tuple(range(3, 11)), (11,)))),
    *_of_benchmark("brain CT to MR", ("CT to T1, 5100",)),
    *_of_benchmark("liver MR to CT", ("T2 to CT", "CT to T2")),
    *_of_benchmark("abdomen CT", ("CT, 5600",)),
    *_of_benchmark("limb CT to MR", ("001", "005")),
]  # fmt: skip
"""Pairs that settings may be chosen on."""

HELD_BACK = [
    case
    for family, count in {
        "painted heads": 4, "hippocampus": 8, "MS07 phantoms": 2, "IXI015 phantoms": 2, "aligned pairs": 2,
    }.items()
    for case in _of_benchmark(family, [n for n in FAMILIES[family].cases if n not in FAMILIES[family].seen][:count])
]  # fmt: skip
"""Pairs that they are reported on."""

PAIRS = {"development": DEVELOPMENT, "held-back": HELD_BACK}


DESCRIPTORS = {"descriptor_weight": VariationalSettings().descriptor_weight}


@dataclass(frozen=True)
class Variant:
    """A way to register.

    settings: fields of the variational settings that differ from those of the bundled model.
    spacing: working resolution, mm; None: the model's.
    discrete: fields of the settings of a discrete start, which the variational method goes on from; None: no such start.
    """

    settings: dict
    spacing: float | None = None
    discrete: dict | None = None


VARIANTS = {
    "mutual information alone": Variant(VariationalSettings().with_effort("fast").as_dict()),
    "with descriptors": Variant(VariationalSettings().with_effort("fast").as_dict() | DESCRIPTORS),
    "as bundled": Variant({}),
    "after a discrete start": Variant({}, discrete={}),
}


def changed(settings: VariationalSettings, values: dict) -> VariationalSettings:
    """Settings with some fields, and fields within them, replaced."""
    plain = settings.as_dict()
    for key, value in values.items():
        plain[key] = plain[key] | value if isinstance(plain.get(key), dict) and isinstance(value, dict) else value
    return VariationalSettings.from_dict(plain)


def sampled(pair: Prepared, variant: Variant, model: models.Model) -> tuple[pipeline.Sampled, Resources]:
    """The pair on the working grid."""
    images = [sitk.ReadImage(str(pair.folder / f"{name}.mha"), sitk.sitkFloat32) for name in ("fixed", "moving")]
    options = Options(align="none", device="cpu", spacing=variant.spacing)
    inputs = pipeline.check(*images, None, None, options)
    resources = Resources.choose(options, *images, model)
    return pipeline.sample(inputs, np.eye(4), resources, progress=lambda fraction: None), resources


@torch.inference_mode()
def registered(pair: Prepared, variant: Variant, model: models.Model) -> tuple[sitk.Transform, Tensor, float]:
    """The transform of a variant, its displacement in voxels of the working grid, and the CPU seconds that this took."""
    on_grid, resources = sampled(pair, variant, model)
    images, started = on_grid.images, time.process_time()
    settings = methods.settings_for(images, changed(model.card.variational_settings, variant.settings))
    start = None
    if variant.discrete is not None:
        start = discrete.register(*images.multiplied(), DiscreteSettings(**variant.discrete), valid=images.valid)
        start = fields.coarsen(start, settings.output_stride, settings.multiple)
    displacement = methods.variational_steps(images, settings, start)
    displacement = fields.upsample(displacement, settings.output_stride, images.fixed.shape[2:])
    seconds = time.process_time() - started
    transform = physical_fields.forward_transform(displacement, on_grid.grid, np.eye(4), resources.grids.fixed)
    return sitk.CompositeTransform([affine_transform(pair.initial), transform]), displacement, seconds


def score(case: Case, pair: Prepared, variant: Variant, model: models.Model) -> dict:
    """The score of a variant on a pair, its folded voxels in % and the CPU seconds of the deformation."""
    transform, displacement, seconds = registered(pair, variant, model)
    if case.judged == "Dice":
        value = _dice(transform, pair)
    else:
        truth = pair.truth
        if pair.unbent is not None:
            before = registered(pair.unbent, variant, model)[0]
            bend = sitk.DisplacementFieldTransform(sitk.Cast(truth, sitk.sitkVectorFloat64))
            truth = displacement_on(sitk.CompositeTransform([before, bend]), Grid.of(pair.fixed))
        error = sitk.GetArrayFromImage(displacement_on(transform, Grid.of(pair.fixed)))
        error -= sitk.GetArrayViewFromImage(truth)
        value = float(np.linalg.norm(error, axis=-1)[pair.inside].mean())
    folded = metrics.jacobian_statistics(displacement)["folded_percent"]
    return {"value": value, "folded %": folded, "seconds": seconds}


def _dice(transform: sitk.Transform, pair: Prepared) -> float:
    """Mean Dice of the labels of the fixed image."""
    warped = sitk.Resample(pair.moving_labels, pair.fixed_labels, transform, sitk.sitkNearestNeighbor, 0)
    fixed, moving = (sitk.GetArrayViewFromImage(x) for x in (pair.fixed_labels, warped))
    labels = [n for n in np.unique(fixed) if n]
    return float(np.mean([metrics.dice(fixed == n, moving == n) for n in labels]))


def rows_of(results: dict[tuple[Case, str], dict], variants: list[str]) -> list[dict]:
    """A row per family: the mean of each variant, and its standard error where there are several pairs."""
    rows = []
    for family in dict.fromkeys(case.family for case, _ in results):
        among = list(dict.fromkeys(case for case, _ in results if case.family == family))
        row = {"family": family, "pairs": len(among), "judged by": among[0].judged}
        for name in variants:
            values = [results[case, name]["value"] for case in among]
            error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.4f}" if len(values) > 1 else ""
            row[name] = f"{statistics.mean(values):.4f}{error}"
        rows.append(row)
    for key in ("folded %", "seconds"):
        row = {"family": f"{key}, {'most' if key == 'folded %' else 'mean'}", "pairs": "", "judged by": ""}
        how = max if key == "folded %" else statistics.mean
        rows.append(row | {n: f"{how(r[key] for (_, v), r in results.items() if v == n):.3g}" for n in variants})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--pairs", choices=PAIRS, default="development")
    parser.add_argument("--first", type=int, help="only the first so many pairs of each family")
    parser.add_argument("--families", nargs="+", metavar="NAME", help="default: all; the beginning of a name is enough")
    parser.add_argument("--variants", nargs="*", metavar="NAME", help=f"of {', '.join(VARIANTS)}; default: all")
    parser.add_argument(
        "--try", dest="more", nargs=2, action="append", default=[], metavar=("NAME", "JSON"),
        help='another variant, such as --try softer \'{"spacing": 1.6, "last_smoothness": {"elastic": 0.05}}\'',
    )  # fmt: skip
    parser.add_argument(
        "--heads",
        type=float,
        default=HEADS_MM,
        metavar="MM",
        help="grid that heads are prepared on, 3 for a quick look, 1 for images that are finer than the working grid "
        "(default: %(default)g)",
    )
    parser.add_argument("--model", default=models.DEFAULT)
    parser.add_argument("--output", type=Path, default=Path("build/ablation"))
    parser.add_argument("--write", action="store_true", help="a report in --output, beside the printed table")
    args = parser.parse_args()
    started = time.time()
    try:
        model = models.load(args.model, torch.device("cpu"))
        variants = {name: VARIANTS[name] for name in (VARIANTS if args.variants is None else args.variants)}
        for name, text in args.more:
            values = json.loads(text)
            about = {key: values.pop(key, None) for key in ("spacing", "discrete")}
            variants[name] = Variant(values, **about)
        chosen = [c for c in PAIRS[args.pairs] if args.families is None or c.family.startswith(tuple(args.families))]
        if args.first:
            chosen = [c for c in chosen if [d for d in chosen if d.family == c.family].index(c) < args.first]
        chosen = [replace(case, spacing=args.heads) if case.spacing == HEADS_MM else case for case in chosen]
        results = {}
        for case in chosen:
            folder = args.output / "pairs" / f"{case.spacing:g} mm" / case.family / case.name
            pair = prepare_pair(partial(case.load, args.data), case.spacing, folder, case.align)
            for name, variant in variants.items():
                results[case, name] = score(case, pair, variant, model)
                print(f"{case.family}: {case.name}, {name}: {results[case, name]}", file=sys.stderr, flush=True)
        rows = rows_of(results, list(variants))
        print(report.table(rows))
        if args.write:
            about = {"preset": args.pairs, "seeds": "fixed", "device": "cpu", "seconds": round(time.time() - started)}
            report.write(args.output, f"ablation-{args.pairs}", rows, about)
    except (DivRegNetError, OSError, ValueError) as error:
        print(f"ablation.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
