"""``divregnet register``: one pair of volumes, or a cohort."""

import argparse
from collections.abc import Callable
from pathlib import Path

from DivRegNetLib.errors import InputError
from DivRegNetLib.options import ALIGNMENTS, LANDMARK_ALIGNMENTS, Option, Options, table
from DivRegNetLib.presets import PRESETS, preset
from DivRegNetLib.quality.verdict import AMBER, LEVELS, RED
from DivRegNetLib.run.cli.evaluate import add_comparison_arguments
from DivRegNetLib.run.cli.output import ProgressBar, show
from DivRegNetLib.run.cohort import TABLE, Pair, frames, read_pairs, register_pairs

DESCRIPTION = "Register the moving to the fixed volume."
FAILED_VERDICT = 3  # exit code


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("fixed", metavar="FIXED", type=Path, nargs="?", help="fixed volume: a file or a DICOM folder")
    parser.add_argument(
        "moving", metavar="MOVING", type=Path, nargs="?", help="moving volume: a file or a DICOM folder"
    )
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="folder for the results")
    parser.add_argument(
        "--pairs", metavar="CSV", type=Path, help="table of a cohort, with the columns fixed, moving, ..."
    )
    parser.add_argument(
        "--dask",
        metavar="ADDRESS",
        help="register a cohort on the workers of a Dask scheduler (tcp://HOST:PORT), or in N processes here (local:N)",
    )
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default="general",
        help="named options for a purpose; options given as well take precedence",
    )
    for option in table().values():
        add_option(parser, option)
    for side in ("fixed", "moving"):
        parser.add_argument(
            f"--{side}-mask",
            metavar="FILE",
            type=Path,
            help=f"volume that is not 0 where the {side} volume is compared",
        )
    parser.add_argument("--overwrite", action="store_true", help="replace results in the folder")
    parser.add_argument("--no-preview", action="store_true", help="do not draw preview.png")
    parser.add_argument(
        "--fail-on",
        choices=(RED, AMBER),
        help="exit with code 3 where the verdict is red, or with amber where it is not green; in a cohort, of any pair",
    )
    add_comparison_arguments(parser)


def add_option(parser: argparse.ArgumentParser, option: Option) -> None:
    """Adds a row of the table of options as an argument. It is None where it is not given."""
    if option.kind is bool:
        parser.add_argument(option.flag, action="store_true", default=None, help=option.help)
        return
    metavar = (
        None if option.choices else (option.unit or {int: "N", float: "VALUE"}.get(option.kind, option.name)).upper()
    )
    default = option.default_help or option.default
    more = f" Or {', '.join(LANDMARK_ALIGNMENTS)}: fitted to the landmark files." if option.name == "align" else ""
    parser.add_argument(
        option.flag,
        type=str if option.kind is object else option.kind,
        choices=option.choices or None,
        metavar=metavar,
        help=f"{option.help}{more} Default: {default}.",
    )


def run(args: argparse.Namespace) -> int:
    if (args.pairs is None) == (args.fixed is None or args.moving is None):
        raise InputError("give FIXED and MOVING, or --pairs and a table")
    if args.dask is not None and args.pairs is None:
        raise InputError("--dask is for a cohort: give --pairs and a table")
    given = {name: getattr(args, name) for name in table() if getattr(args, name) is not None}
    if "align" in given:
        given["align"] = _alignment(args.align)
    options = Options.of(**(preset(args.preset).options | given))
    if args.pairs is None:
        from DivRegNetLib.run.cohort.register_files import register_files

        names = (f"{side}{what}" for what in ("", "_mask", "_labels", "_landmarks") for side in ("fixed", "moving"))
        pair = Pair(**{name: getattr(args, name) for name in names})
        if frames.is_4d(pair.moving):
            return _register_frames(args, pair, options)
        with ProgressBar(quiet=args.json) as progress:
            report = register_files(pair, args.output, options, **_choices(args), progress=progress)
        show(args, report, _summary(report, args.output))
        return _exit_code(args, [report["verdict"]["level"]])
    return _register_all(args, read_pairs(args.pairs), options)


def _register_frames(args: argparse.Namespace, pair: Pair, options: Options) -> int:
    """Registers each frame of a moving 4D file, and joins the warped frames. Returns the exit code."""
    pairs = frames.split(pair, args.output)
    code = _register_all(args, pairs, options)
    frames.join_warped(list(pairs), args.output)
    return code


def _register_all(args: argparse.Namespace, pairs: dict[str, Pair], options: Options) -> int:
    """Registers pairs into folders of their names, and a table. Returns the exit code.

    Raises:
        InputError: some of them failed.
    """
    from tqdm import tqdm

    with tqdm(total=len(pairs), desc="pairs", unit="pair", disable=args.json or None) as bar:
        rows = register_pairs(pairs, args.output, options, **_choices(args), dask=args.dask, finished=bar.update)
    failed = [row for row in rows if row["status"] != "ok"]
    results = args.output / TABLE
    show(args, rows, f"{len(rows) - len(failed)} of {len(rows)} pairs registered: {results}")
    if failed:
        raise InputError(f"{len(failed)} of {len(rows)} pairs failed, see {results}; the first: {failed[0]['message']}")
    return _exit_code(args, [row["verdict"] for row in rows])


def _choices(args: argparse.Namespace) -> dict[str, bool]:
    """Arguments of :func:`register_files` and :func:`register_pairs`."""
    return {"overwrite": args.overwrite, "preview": not args.no_preview}


def _exit_code(args: argparse.Namespace, verdicts: list[str]) -> int:
    """What ``--fail-on`` makes of some verdicts; an empty one is of a pair that an earlier version registered."""
    limit = LEVELS.index(args.fail_on) if args.fail_on else len(LEVELS)
    return FAILED_VERDICT if any(LEVELS.index(level) >= limit for level in verdicts if level) else 0


def _alignment(align: str):
    """The initial alignment that ``--align`` names: a name that :class:`Options` knows, or a transform from a file."""
    if align in ALIGNMENTS or align in LANDMARK_ALIGNMENTS:
        return align
    from DivRegNetLib.io import transforms

    return transforms.read_transform(align)


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
    verdict = report["verdict"]
    error = f", expected error {verdict['error']}" if verdict["error"] else ""
    lines += [
        f"verdict: {verdict['level'].upper()}{error}. {verdict['headline']}",
        *(f"  {reason}" for reason in verdict["reasons"]),
        f"folded voxels {quality['folded_percent']:.4f} %, largest displacement "
        f"{quality['largest_displacement_mm']:.1f} mm, inverse consistency "
        f"{quality['inverse_consistency_mm']['mean']:.3f} mm",
        f"{sum(report['seconds'].values()):.1f} s on {report['settings']['device']} "
        f"(forward pass {report['seconds']['deform']:.2f} s); results in {output}",
    ]
    return "\n".join(lines + [f"warning: {w}" for w in report["warnings"]])
