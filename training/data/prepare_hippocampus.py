"""Prepares the hippocampus cohort: crops of the Medical Segmentation Decathlon with both parts of the hippocampus, at 1 mm.

    python training/data/prepare_hippocampus.py --data DIR --output build/cohorts/hippocampus

DIR holds ``hippocampus``. The last twenty crops by name are for tests alone, and every fifteenth of the others validates.
"""

import argparse
from pathlib import Path

from training.data import hippocampus, layouts, prepare

VALIDATED = 15
FIRST = 7  # that validates
SPACING_MM = 1.0


def sources(data: Path) -> list[layouts.Source]:
    """The crops, with the split that each is in."""
    crops = hippocampus.names(data)
    splits = ["validation" if i % VALIDATED == FIRST else "train" for i in range(len(hippocampus.learned(data)))]
    splits += ["test"] * (len(crops) - len(splits))
    return [
        layouts.Source(
            name.removesuffix(".nii.gz"), name, (data / "hippocampus/images" / name,), ("MR",),
            data / "hippocampus/labels" / name, split=split,
        )
        for name, split in zip(crops, splits, strict=True)
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with hippocampus")
    parser.add_argument("--output", type=Path, default=Path("build/cohorts/hippocampus"))
    parser.add_argument("--workers", type=int, default=0, help="processes (default: one per CPU)")
    args = parser.parse_args()
    prepare.prepare_cohort(
        sources(args.data), args.output, prepare.Preparation(spacing_mm=SPACING_MM, workers=args.workers)
    )


if __name__ == "__main__":
    main()
