"""The command line: ``divregnet register | apply | evaluate | models``."""

import argparse
import json
import os
import sys
import textwrap
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from DivRegNetLib import __version__
from DivRegNetLib.errors import DivRegNetError, InputError, ModelError, missing_package
from DivRegNetLib.options import ALIGNMENTS, INTERPOLATIONS, Option, Options, table

BAD_INPUT, UNEXPECTED, INTERRUPTED = 2, 1, 130


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0, 2 for what the user can put right, 1 for what should not happen."""
    args = _parser().parse_args(arguments)
    try:
        args.run(args)
        return 0
    except KeyboardInterrupt:
        return _complain(args, "interrupted", INTERRUPTED)
    except DivRegNetError as error:
        return _complain(args, str(error), BAD_INPUT)
    except ImportError as error:
        return _complain(args, missing_package(error), BAD_INPUT)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _complain(args, f"{error.filename}: {error.strerror or error}", BAD_INPUT)
    except Exception as error:
        return _complain(args, f"unexpected {type(error).__name__}: {error} (--debug shows where)", UNEXPECTED)


def _complain(args: argparse.Namespace, message: str, code: int) -> int:
    if args.debug:
        raise
    print(f"divregnet: {' '.join(message.split())}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="divregnet", description="Deformable registration of medical images.")
    parser.add_argument("--version", action="version", version=f"divregnet {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None], help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.add_argument("--json", action="store_true", help="print results as JSON")
        sub.set_defaults(run=run)
        return sub

    _register_arguments(command("register", _register, "Register the moving to the fixed volume."))

    apply = command("apply", _apply, "Carry a volume, label map or landmarks from moving to fixed space.")
    apply.add_argument("transform", metavar="TRANSFORM", type=Path, help="transform.h5 or displacement.nii.gz")
    apply.add_argument("moving", metavar="MOVING", type=Path, help="volume, or landmarks (.mrk.json, .fcsv, .csv)")
    apply.add_argument("--reference", metavar="FIXED", type=Path, help="volume whose grid is taken (not for landmarks)")
    apply.add_argument("--output", metavar="FILE", type=Path, required=True)
    apply.add_argument("--labels", action="store_true", help="MOVING is a label map: nearest neighbor")
    apply.add_argument("--interpolation", choices=INTERPOLATIONS, default="linear")
    apply.add_argument("--default-value", type=float, default=0.0, help="where the moving volume has nothing")
    apply.add_argument("--overwrite", action="store_true", help="replace FILE if it is there")

    evaluate = command("evaluate", _evaluate, "Compare labels or landmarks, before and after a transform.")
    evaluate.add_argument("--transform", metavar="FILE", type=Path, help="from fixed to moving points; default: none")
    _comparison_arguments(evaluate)

    command("models", _models, "List the bundled models and your own.")
    return parser


def _register_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("fixed", metavar="FIXED", type=Path, nargs="?", help="volume or DICOM folder")
    parser.add_argument("moving", metavar="MOVING", type=Path, nargs="?", help="volume or DICOM folder")
    parser.add_argument("--output", metavar="DIR", type=Path, required=True)
    parser.add_argument("--pairs", metavar="CSV", type=Path, help="a cohort: table with columns fixed, moving, ...")
    parser.add_argument(
        "--dask",
        metavar="ADDRESS",
        help="register a cohort on the workers of a Dask scheduler (tcp://HOST:PORT), or in N processes here (local:N)",
    )
    for option in table().values():
        add_option(parser, option)
    parser.add_argument("--fixed-mask", metavar="FILE", type=Path)
    parser.add_argument("--moving-mask", metavar="FILE", type=Path)
    parser.add_argument("--overwrite", action="store_true", help="replace results that are there")
    _comparison_arguments(parser)


def add_option(parser: argparse.ArgumentParser, option: Option) -> None:
    """Adds a row of the table of options as an argument."""
    metavar = (
        None if option.choices else (option.unit or {int: "N", float: "VALUE"}.get(option.kind, option.name)).upper()
    )
    default = option.default_help or option.default
    parser.add_argument(
        option.flag,
        default=option.default,
        type=str if option.kind is object else option.kind,
        choices=option.choices or None,
        metavar=metavar,
        help=f"{option.help} Default: {default}.",
    )


def _comparison_arguments(parser: argparse.ArgumentParser) -> None:
    for what in ("labels", "landmarks"):
        for side in ("fixed", "moving"):
            parser.add_argument(f"--{side}-{what}", metavar="FILE", type=Path)


def _register(args: argparse.Namespace) -> None:
    if (args.pairs is None) == (args.fixed is None or args.moving is None):
        raise InputError("give FIXED and MOVING, or --pairs and a table")
    if args.dask is not None and args.pairs is None:
        raise InputError("--dask is for a cohort: give --pairs and a table")
    align = args.align
    if align not in ALIGNMENTS:
        from DivRegNetLib.io import transforms

        align = transforms.read_transform(align)
    values = {name: getattr(args, name) for name in table()}
    options = Options.of(**(values | {"align": align}))
    from DivRegNetLib.run import cohort

    if args.pairs is None:
        names = (f"{side}{what}" for what in ("", "_mask", "_labels", "_landmarks") for side in ("fixed", "moving"))
        pair = cohort.Pair(**{name: getattr(args, name) for name in names})
        with _Progress(quiet=args.json) as progress:
            report = cohort.register_files(pair, args.output, options, overwrite=args.overwrite, progress=progress)
        _show(args, report, _summary(report, args.output))
        return
    from tqdm import tqdm

    pairs = cohort.read_pairs(args.pairs)
    with tqdm(total=len(pairs), desc="pairs", unit="pair", disable=args.json or None) as bar:
        rows = cohort.register_pairs(
            pairs, args.output, options, overwrite=args.overwrite, dask=args.dask, finished=bar.update
        )
    failed = [row for row in rows if row["status"] != "ok"]
    results = args.output / cohort.TABLE
    _show(args, rows, f"{len(rows) - len(failed)} of {len(rows)} pairs registered: {results}")
    if failed:
        raise InputError(f"{len(failed)} of {len(rows)} pairs failed, see {results}; the first: {failed[0]['message']}")


def _summary(report: dict, output: Path) -> str:
    quality = report["quality"]
    lines = [f"{'':28}{'before':>10}{'aligned':>10}{'after':>10}"]

    def row(name: str, values: dict, pick: Callable[[object], float | None] = lambda v: v, digits: int = 3) -> None:
        cells = (pick(values[stage]) for stage in ("before", "aligned", "after"))
        lines.append(f"{name:28}" + "".join(f"{'-' if c is None else f'{c:.{digits}f}':>10}" for c in cells))

    if "labels" in quality:
        for measure, digits in (("dice", 3), ("asd", 2), ("hd", 1), ("hd95", 1)):
            name = {"dice": "Dice (mean of labels)", "asd": "ASD mm", "hd": "HD mm", "hd95": "HD95 mm"}[measure]
            row(name, quality["labels"], lambda v, m=measure: v["mean"][m], digits)
    if "landmarks_mm" in quality:
        row("landmark error mm", quality["landmarks_mm"], lambda v: v["mean"], 2)
    row("NMI", quality["nmi"])
    if quality["similarity"]:
        row("S (nats)", quality["similarity"])
    lines += [
        f"folded voxels {quality['folded_percent']:.4f} %, largest displacement "
        f"{quality['largest_displacement_mm']:.1f} mm, inverse consistency "
        f"{quality['inverse_consistency_mm']['mean']:.3f} mm",
        f"{sum(report['seconds'].values()):.1f} s on {report['settings']['device']} "
        f"(forward pass {report['seconds']['deform']:.2f} s); results in {output}",
    ]
    return "\n".join(lines + [f"warning: {w}" for w in report["warnings"]])


def _apply(args: argparse.Namespace) -> None:
    from DivRegNetLib.core import resampling
    from DivRegNetLib.io import images, landmarks, transforms
    from DivRegNetLib.registration.check import check_default

    if args.output.exists() and not args.overwrite:
        raise InputError(f"{args.output}: is there already; choose another file, or --overwrite")
    inputs = {os.path.realpath(p) for p in (args.transform, args.moving, args.reference) if p is not None}
    if os.path.realpath(args.output) in inputs:
        raise InputError(f"{args.output}: is an input of this command; choose another file")
    transform = transforms.read_transform(args.transform)
    if landmarks.is_landmarks(args.moving):
        moving = landmarks.read_landmarks(args.moving)
        found = landmarks.Landmarks(transforms.invert_points(transform, moving.points), moving.labels)
        landmarks.write_landmarks(found, args.output)
    else:
        if args.reference is None:
            raise InputError("--reference FIXED is needed: the volume whose grid the result is on")
        moving = images.read_labels(args.moving) if args.labels else images.read_image(args.moving)
        how = INTERPOLATIONS["nearest" if args.labels else args.interpolation]
        reference = images.read_image(args.reference)
        if moving.GetDimension() != 3 or reference.GetDimension() != 3:
            raise InputError(f"{args.moving} and {args.reference} must both be 3D volumes")
        check_default(args.default_value, moving)
        images.write_image(resampling.resample(moving, reference, transform, how, args.default_value), args.output)
    _show(args, {"output": str(args.output)}, str(args.output))


def _evaluate(args: argparse.Namespace) -> None:
    import SimpleITK as sitk

    from DivRegNetLib.io import images, landmarks, transforms
    from DivRegNetLib.quality import metrics

    transform = sitk.Transform() if args.transform is None else transforms.read_transform(args.transform)
    stages = {"before": sitk.Transform()} | ({"after": transform} if args.transform else {})
    found: dict = {}
    if args.fixed_labels and args.moving_labels:
        fixed, moving = images.read_labels(args.fixed_labels), images.read_labels(args.moving_labels)
        found["labels"] = {
            name: metrics.label_overlap(fixed, sitk.Resample(moving, fixed, t, sitk.sitkNearestNeighbor, 0))
            for name, t in stages.items()
        }
    if args.fixed_landmarks and args.moving_landmarks:
        fixed, moving = (landmarks.read_landmarks(p) for p in (args.fixed_landmarks, args.moving_landmarks))
        errors = {name: metrics.landmark_error(fixed.points, moving.points, t) for name, t in stages.items()}
        found["landmarks_mm"] = {n: {"mean": float(e.mean()), "largest": float(e.max())} for n, e in errors.items()}
    if not found:
        raise InputError(
            "give --fixed-labels and --moving-labels, or --fixed-landmarks and --moving-landmarks, or both"
        )
    lines = []
    for stage in stages:
        if "labels" in found:
            mean = found["labels"][stage]["mean"]
            scores = ", ".join(f"{k} {'-' if v is None else f'{v:.3f}'}" for k, v in mean.items())
            lines.append(f"{stage}: labels {scores}")
        if "landmarks_mm" in found:
            error = found["landmarks_mm"][stage]
            lines.append(f"{stage}: landmark error mean {error['mean']:.2f} mm, largest {error['largest']:.2f} mm")
    _show(args, found, "\n".join(lines))


def _models(args: argparse.Namespace) -> None:
    from DivRegNetLib import models

    found, lines = [], []
    for name, file in models.card_files().items():
        try:
            card = models.read_card(file)
        except ModelError as error:
            found.append({"name": name, "error": str(error)})
            lines.append(f"{name}: cannot be used: {error}")
            continue
        found.append(asdict(card) | {"card": str(file)})
        modalities = ", ".join(map(str, card.modalities))
        spacing = f"{card.spacing_mm:g} mm" if card.spacing_mm else "any resolution"
        lines.append(f"{name} {card.version}: {card.summary} ({card.anatomy}; {modalities}; {spacing})\n  {file}")
        said = {"good for": card.good_for, "limits": card.limits}
        lines += [
            textwrap.fill(f"{k}: {v}", 100, initial_indent="  ", subsequent_indent="    ") for k, v in said.items() if v
        ]
    _show(args, found, "\n".join(lines) or "no models")


def _show(args: argparse.Namespace, value: object, text: str) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False) if args.json else text)


class _Progress:
    """A bar on a terminal, a line a stage elsewhere, nothing if quiet."""

    def __init__(self, *, quiet: bool) -> None:
        self.bar, self.stage, self.quiet = None, None, quiet

    def __enter__(self) -> "_Progress":
        if not self.quiet and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=100, bar_format="{desc:10}{bar}{n:3.0f} % {elapsed}", leave=False)
        return self

    def __call__(self, stage: str, fraction: float) -> None:
        if self.bar is not None:
            self.bar.set_description(stage, refresh=False)
            self.bar.update(100 * fraction - self.bar.n)
        elif not self.quiet and stage != self.stage:
            print(f"{stage} ...", file=sys.stderr, flush=True)
        self.stage = stage

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()


if __name__ == "__main__":
    sys.exit(main())
