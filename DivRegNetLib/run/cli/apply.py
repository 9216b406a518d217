"""``divregnet apply``: a volume, label map or landmarks from moving to fixed space."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from DivRegNetLib.errors import InputError
from DivRegNetLib.options import INTERPOLATIONS
from DivRegNetLib.run.cli.output import show

if TYPE_CHECKING:
    import SimpleITK as sitk

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
    from DivRegNetLib.core.points import invert_points
    from DivRegNetLib.io import landmarks, transforms
    from DivRegNetLib.run.comparison import not_inverted

    if args.output.exists() and not args.overwrite:
        raise InputError(f"{args.output}: exists already; choose another file, or --overwrite")
    inputs = {os.path.realpath(p) for p in (args.transform, args.moving, args.reference) if p is not None}
    if os.path.realpath(args.output) in inputs:
        raise InputError(f"{args.output}: is an input of this command; choose another file")
    transform = transforms.read_transform(args.transform)
    if landmarks.is_landmarks(args.moving):
        moving = landmarks.read_landmarks(args.moving)
        inverted = invert_points(transform, moving.points)
        notes = not_inverted(moving.labels, inverted)
        in_fixed = landmarks.Landmarks(inverted.points, moving.labels)
        if not in_fixed.defined.any():
            raise InputError(f"{args.moving}: {notes[0] if notes else 'no landmark is defined'}")
        landmarks.write_landmarks(in_fixed, args.output)
    else:
        notes = _apply_to_volume(args, transform)
    for note in notes:
        print(f"divregnet: warning: {note}", file=sys.stderr)
    show(args, {"output": str(args.output)} | ({"warnings": notes} if notes else {}), str(args.output))


def _apply_to_volume(args: argparse.Namespace, transform: "sitk.Transform") -> list[str]:
    """Resamples a volume, label map or segmentation and writes it. Returns sentences for the user."""
    import SimpleITK as sitk

    from DivRegNetLib.core import resampling
    from DivRegNetLib.core.grid import Grid
    from DivRegNetLib.io import images, segmentations
    from DivRegNetLib.registration.check import check_default
    from DivRegNetLib.run.comparison import check_covered

    if args.reference is None:
        raise InputError("--reference FIXED is needed: the volume whose grid the result is on")
    moving, reference = images.read_image(args.moving), images.read_image(args.reference)
    metadata = segmentations.metadata_of(moving)
    if args.labels or metadata:
        moving = segmentations.read_segmentation(args.moving)
    how = INTERPOLATIONS["nearest" if args.labels or metadata else args.interpolation]
    if moving.GetDimension() != 3 or reference.GetDimension() != 3:
        raise InputError(f"{args.moving} and {args.reference} must both be 3D volumes")
    check_default(args.default_value, moving)
    values = sitk.GetArrayViewFromImage(moving)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise InputError(f"{args.moving}: holds voxels that are NaN or infinite; replace them")
    check_covered(transform, Grid.of(reference), str(args.reference))
    warped = resampling.resample(moving, reference, transform, how, args.default_value)
    segmentations.write_segmentation(warped, metadata, args.output)
    if metadata and not args.output.name.lower().endswith(segmentations.NRRD_SUFFIXES):
        return [f"{args.output}: this format has no names and colors of segments; a file that ends in .seg.nrrd has"]
    return []
