"""``divregnet apply``: a volume, label map or landmarks from moving to fixed space."""

import argparse
import os
from pathlib import Path

from DivRegNetLib.errors import InputError
from DivRegNetLib.options import INTERPOLATIONS
from DivRegNetLib.run.cli.output import show

DESCRIPTION = "Map a volume, label map or landmarks from moving to fixed space."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("transform", metavar="TRANSFORM", type=Path, help="file of a transform, such as transform.h5")
    parser.add_argument(
        "moving", metavar="MOVING", type=Path, help="volume, label map or landmarks (.mrk.json, .fcsv, .csv)"
    )
    parser.add_argument(
        "--reference", metavar="FIXED", type=Path, help="volume whose grid the result has; not for landmarks"
    )
    parser.add_argument("--output", metavar="FILE", type=Path, required=True, help="file that is written")
    parser.add_argument(
        "--labels", action="store_true", help="MOVING is a label map, for nearest-neighbor interpolation"
    )
    parser.add_argument("--interpolation", choices=INTERPOLATIONS, default="linear", help="interpolation of a volume")
    parser.add_argument(
        "--default-value", metavar="VALUE", type=float, default=0.0, help="value outside the moving volume"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")


def run(args: argparse.Namespace) -> None:
    from DivRegNetLib.core import resampling
    from DivRegNetLib.core.points import invert_points
    from DivRegNetLib.io import images, landmarks, transforms
    from DivRegNetLib.registration.check import check_default

    if args.output.exists() and not args.overwrite:
        raise InputError(f"{args.output}: exists already; choose another file, or --overwrite")
    inputs = {os.path.realpath(p) for p in (args.transform, args.moving, args.reference) if p is not None}
    if os.path.realpath(args.output) in inputs:
        raise InputError(f"{args.output}: is an input of this command; choose another file")
    transform = transforms.read_transform(args.transform)
    if landmarks.is_landmarks(args.moving):
        moving = landmarks.read_landmarks(args.moving)
        in_fixed = landmarks.Landmarks(invert_points(transform, moving.points), moving.labels)
        landmarks.write_landmarks(in_fixed, args.output)
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
    show(args, {"output": str(args.output)}, str(args.output))
