"""Prepares the head cohort: BrainWeb's T1, T2 and PD with AAL labels, and whole-head label maps, on one grid of 2 mm.

    python training/data/prepare_head.py --data DIR --output build/cohorts/head

DIR holds ``brain_t1t2pd`` and ``brain_labelmaps``. Three label maps are for validation and tests
(training/data/label_maps.py). Each label map is aligned to BrainWeb by the affine alignment that a
registration starts with. ``--template`` prepares BrainWeb alone. Interrupted, the same command goes on: label maps that are in
the output on the same grid are kept.
"""

import argparse
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from tqdm import tqdm

from DivRegNetLib.core.grid import Grid, affine_transform
from DivRegNetLib.io.atomic import write_atomically, write_json
from DivRegNetLib.registration import alignment
from training.data.brainweb import CONTRASTS, aal, brain_mask, brainweb, to_unit
from training.data.cohort import FORMAT
from training.data.label_maps import BRAIN, HELD_OUT, tissue

SPACING_MM = 2.0
MULTIPLE = 16
T1_OF_TISSUE = {"white": 0.55, "gray": 0.4, "fluid": 0.18, "other": 0.35, "background": 0.0}


def entry(name: str, contrasts: tuple[str, ...], split: str = "train") -> dict:
    """A volume's entry in cohort.json. BrainWeb is trained on, as its validation uses deformations of its own."""
    return {"name": name, "subject": name, "role": "both", "split": split, "contrasts": list(contrasts)}


def is_there(file: Path, shape: tuple[int, int, int]) -> bool:
    """Whether a label map was prepared on a grid of this shape (D, H, W)."""
    if not file.exists():
        return False
    with np.load(file) as arrays:
        return arrays["labels"].shape == shape


def write(file: Path, **arrays: np.ndarray) -> None:
    def save(part: Path) -> None:
        with part.open("wb") as stream:
            np.savez_compressed(stream, **arrays)

    write_atomically(file, save)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with brain_t1t2pd and brain_labelmaps")
    parser.add_argument("--output", type=Path, default=Path("build/cohorts/head"))
    parser.add_argument(
        "--spacing", type=float, default=SPACING_MM, help="spacing of the grid in mm (default: %(default)s)"
    )
    parser.add_argument("--template", action="store_true", help="BrainWeb alone, for the phantoms of AAL Brain")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    template = {c: brainweb(args.data, c) for c in CONTRASTS}
    regions = aal(args.data)
    grid = Grid.of(template["T1"]).axis_aligned(args.spacing, multiple=MULTIPLE)
    reference = grid.empty_image()

    def on_grid(image: sitk.Image, transform: sitk.Transform, how: int = sitk.sitkNearestNeighbor) -> sitk.Image:
        if how == sitk.sitkLinear:  # smoothed to the resolution of the grid, so that the resampled image does not alias
            image = sitk.DiscreteGaussian(sitk.Cast(image, sitk.sitkFloat32), 0.15 * args.spacing**2)
        return sitk.Resample(image, reference, transform, how, 0.0)

    same = sitk.Transform()
    volumes = [entry("brainweb", CONTRASTS)]
    write(
        args.output / "brainweb.npz",
        images=np.stack([to_unit(on_grid(template[c], same, sitk.sitkLinear)) for c in CONTRASTS]).astype(np.float16),
        labels=sitk.GetArrayFromImage(on_grid(regions, same)),
        brain=sitk.GetArrayFromImage(on_grid(brain_mask(template["T1"], regions), same)) > 0,
    )
    files = [] if args.template else sorted((args.data / "brain_labelmaps").glob("*.nii.gz"))
    maps = [sitk.Cast(sitk.ReadImage(str(file)), sitk.sitkInt32) for file in files]
    classes = sorted({0} | {int(v) for m in maps for v in np.unique(sitk.GetArrayViewFromImage(m))})
    index = np.zeros(max(classes) + 1, np.uint8)
    index[classes] = range(len(classes))
    for file, labels in zip(tqdm(files, desc="label maps"), maps, strict=True):
        name = file.name.removesuffix(".nii.gz")
        volumes.append(entry(name, (), HELD_OUT.get(name, "train")))
        prepared = args.output / f"{name}.npz"
        if is_there(prepared, grid.shape):
            continue
        values = np.array([T1_OF_TISSUE[tissue(v)] for v in range(max(classes) + 1)], np.float32)
        looks_like_t1 = Grid.of(labels).image(values[sitk.GetArrayFromImage(labels)])
        to_subject = affine_transform(alignment.align(template["T1"], looks_like_t1, "affine"))
        array = sitk.GetArrayFromImage(on_grid(labels, to_subject))
        write(prepared, labels=index[array], brain=np.isin(array, sorted(BRAIN)))
    about = {
        "format": FORMAT,
        "spacing": args.spacing,
        "shape": grid.shape,
        "origin": grid.origin,
        "normalization": "balanced",
        "volumes": volumes,
        "classes": classes,
        "tissues": [tissue(c) for c in classes],
    }
    write_json(about, args.output / "cohort.json")


if __name__ == "__main__":
    main()
