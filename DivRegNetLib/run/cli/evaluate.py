"""``divregnet evaluate``: labels or landmarks compared before and after a transform."""

import argparse
from pathlib import Path

from DivRegNetLib.errors import InputError
from DivRegNetLib.run.cli.output import show

DESCRIPTION = "Compare labels or landmarks, before and after a transform."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--transform",
        metavar="FILE",
        type=Path,
        help="transform that maps fixed points to moving points; default: identity",
    )
    add_comparison_arguments(parser)


def add_comparison_arguments(parser: argparse.ArgumentParser) -> None:
    """The labels and landmarks of both images."""
    for what, contents in (("labels", "label map"), ("landmarks", "landmarks (.mrk.json, .fcsv, .csv)")):
        for side in ("fixed", "moving"):
            help_text = f"{contents} of the {side} volume, to measure the result with"
            parser.add_argument(f"--{side}-{what}", metavar="FILE", type=Path, help=help_text)


def run(args: argparse.Namespace) -> None:
    import SimpleITK as sitk

    from DivRegNetLib.io.transforms import read_transform
    from DivRegNetLib.run.comparison import LabelMaps, LandmarkLists

    stages = {"before": sitk.Transform()} | ({"after": read_transform(args.transform)} if args.transform else {})
    scores, notes = {}, []
    if labels := LabelMaps.read(args.fixed_labels, args.moving_labels):
        scores["labels"], _ = labels.compare(stages)
        notes += labels.notes
    if landmarks := LandmarkLists.read(args.fixed_landmarks, args.moving_landmarks):
        scores["landmarks_mm"] = landmarks.compare(stages)
        notes += landmarks.pairs.notes
    if not scores:
        raise InputError(
            "give --fixed-labels and --moving-labels, or --fixed-landmarks and --moving-landmarks, or both"
        )
    lines = []
    for stage in stages:
        if "labels" in scores:
            mean = scores["labels"][stage]["mean"]
            means = ", ".join(f"{k} {'-' if v is None else f'{v:.3f}'}" for k, v in mean.items())
            lines.append(f"{stage}: labels {means}")
        if "landmarks_mm" in scores:
            error = scores["landmarks_mm"][stage]
            lines.append(f"{stage}: landmark error mean {error['mean']:.2f} mm, largest {error['largest']:.2f} mm")
    show(args, scores | ({"notes": notes} if notes else {}), "\n".join([*lines, *(f"note: {note}" for note in notes)]))
