"""``divregnet report``: the results of a registration as one HTML page."""

import argparse
import json
from pathlib import Path

from DivRegNetLib.errors import InputError
from DivRegNetLib.run.cli.output import show

DESCRIPTION = "Write the results of a registration as one HTML page with pictures."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", metavar="DIR", type=Path, help="folder that divregnet register wrote")
    parser.add_argument(
        "--output", metavar="FILE", type=Path, help="file that is written; default: report.html in that folder"
    )
    for side in ("fixed", "moving"):
        parser.add_argument(
            f"--{side}", metavar="FILE", type=Path, help=f"the {side} volume, if it was moved elsewhere"
        )


def run(args: argparse.Namespace) -> None:
    import numpy as np
    import SimpleITK as sitk

    from DivRegNetLib.io.images import read_image
    from DivRegNetLib.quality.preview import field_displacement
    from DivRegNetLib.quality.report import Registration, write_report

    try:
        record = json.loads((args.results / "quality.json").read_text(encoding="utf-8"))
        inputs = {name: Path(path) for name, path in record["inputs"].items()}
        quality, initial = record["quality"], np.array(record["initial_alignment_lps"], float).reshape(4, 4)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{args.results}: holds no results of divregnet register ({error})") from error
    paths = [args.fixed or inputs["fixed"], args.moving or inputs["moving"]]
    fixed, moving = (read_image(path) for path in paths)
    landmarks = []
    if "landmarks_mm" in quality:
        labels = quality.get("landmark_labels", [])
        errors = [quality["landmarks_mm"][stage]["each"] for stage in ("before", "after")]
        landmarks = list(zip(labels, *errors, strict=False))
    output = args.output or args.results / "report.html"
    field = sitk.Cast(read_image(args.results / "displacement.nii.gz"), sitk.sitkVectorFloat64)
    registration = Registration(
        fixed=fixed,
        moving=moving,
        warped=read_image(args.results / "warped.nii.gz"),
        displacement=field_displacement(field),
        initial=initial,
        quality=quality,
        settings=record["settings"],
        seconds=record["seconds"],
        warnings=tuple(record["warnings"]),
        names=(paths[0].name, paths[1].name),
        landmarks=landmarks,
    )
    write_report(registration, output)
    show(args, {"report": str(output)}, str(output))
