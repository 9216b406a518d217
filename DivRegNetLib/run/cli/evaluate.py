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

    from DivRegNetLib.io import images, landmarks, transforms
    from DivRegNetLib.quality import metrics

    transform = sitk.Transform() if args.transform is None else transforms.read_transform(args.transform)
    stages = {"before": sitk.Transform()} | ({"after": transform} if args.transform else {})
    scores: dict = {}
    if args.fixed_labels and args.moving_labels:
        fixed, moving = images.read_labels(args.fixed_labels), images.read_labels(args.moving_labels)
        scores["labels"] = {
            name: metrics.label_overlap(fixed, sitk.Resample(moving, fixed, t, sitk.sitkNearestNeighbor, 0))
            for name, t in stages.items()
        }
    if args.fixed_landmarks and args.moving_landmarks:
        fixed, moving = (landmarks.read_landmarks(p) for p in (args.fixed_landmarks, args.moving_landmarks))
        errors = {name: metrics.landmark_error(fixed.points, moving.points, t) for name, t in stages.items()}
        scores["landmarks_mm"] = {n: {"mean": float(e.mean()), "largest": float(e.max())} for n, e in errors.items()}
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
    show(args, scores, "\n".join(lines))
