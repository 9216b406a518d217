"""Prepares the pairs in Resources/SampleData from BrainWeb, AAL and MS07.

    python training/data/prepare_sample.py --data DIR

The true deformation of the first pair is known: the fixed volume is BrainWeb's T1, the moving one its T2 after a free-form
deformation (control points 20 mm apart, N(0, 6 mm)) and a rotation, sampled on a rotated, anisotropic grid. The labels are
AAL's. The landmarks are the middles of some AAL regions, and the same deformation carries them to the moving volume. The
moving volume of the second pair is another person's T2, skull-stripped (MS07), whose true deformation is unknown.
"""

import argparse
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from DivRegNetLib.core.grid import Grid, affine_matrix
from DivRegNetLib.core.points import invert_points
from DivRegNetLib.io import images, landmarks
from training.data.brainweb import aal, brainweb, to_uint8
from training.data.free_form import ffd_transform

SEED = 20
LANDMARK_REGIONS = (1, 2, 9, 10, 31, 32, 37, 38, 43, 44, 71, 72, 77, 78, 81, 82)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with brain_t1t2pd and brain_multicontrast")
    parser.add_argument("--output", type=Path, default=Path("Resources/SampleData"))
    args = parser.parse_args()
    source = args.data / "brain_t1t2pd"
    t1, t2, regions = brainweb(args.data, "T1"), brainweb(args.data, "T2"), aal(args.data)
    fixed_grid = Grid.of(t1).axis_aligned(1.5)

    center = Grid.of(t1).center.tolist()
    rotation = sitk.Euler3DTransform(center, *np.radians([9.0, -7.0, 12.0]).tolist(), [12.0, -9.0, 7.0])
    # Maps moving points to template points; a composite applies its last transform first.
    to_template = sitk.CompositeTransform([ffd_transform(t1, SEED), rotation.GetInverse()])
    turned = Grid(t1.GetSize(), affine_matrix(rotation) @ Grid.of(t1).matrix)
    spacing = (1.4, 1.6, 3.0)
    size = [int(np.ceil(n * s / m)) for n, s, m in zip(turned.size, turned.spacing, spacing, strict=True)]
    moving_grid = Grid.build(size, spacing, turned.origin, turned.direction)

    here = sitk.Transform()
    for name, image, labels, grid, transform in (
        ("fixed_T1", t1, regions, fixed_grid, here),
        ("moving_T2", t2, regions, moving_grid, to_template),
    ):
        smooth = sitk.DiscreteGaussian(sitk.Cast(image, sitk.sitkFloat32), 0.3)
        volume = sitk.Resample(smooth, grid.empty_image(), transform, sitk.sitkLinear, 0.0)
        images.write_image(grid.image(to_uint8(volume)), args.output / f"{name}.nii.gz")
        on_grid = sitk.Resample(labels, grid.empty_image(), transform, sitk.sitkNearestNeighbor, 0.0)
        images.write_image(sitk.Cast(on_grid, sitk.sitkUInt8), args.output / f"{name}_labels.nii.gz")

    names = dict(line.split()[:2] for line in (source / "aal.nii.txt").read_text().splitlines() if line.strip())
    template = sitk.GetArrayFromImage(regions)
    in_template = []
    for region in LANDMARK_REGIONS:
        voxels = np.argwhere(template == region)
        middle = voxels[np.linalg.norm(voxels - voxels.mean(0), axis=1).argmin()]  # inside it, however curved it is
        in_template.append(Grid.of(regions).to_physical(middle[::-1]))
    labels = tuple(names[str(region)] for region in LANDMARK_REGIONS)
    fixed = landmarks.Landmarks(np.array(in_template), labels)
    moving = landmarks.Landmarks(invert_points(to_template, fixed.points), labels)
    landmarks.write_landmarks(fixed, args.output / "fixed_T1.mrk.json")
    landmarks.write_landmarks(moving, args.output / "moving_T2.mrk.json")

    other = images.read_image(args.data / "brain_multicontrast/ms07_T2.nii.gz")
    grid = Grid.of(other).axis_aligned(2.0)
    smooth = sitk.DiscreteGaussian(sitk.Cast(other, sitk.sitkFloat32), 0.6)
    volume = sitk.Clamp(sitk.Resample(smooth, grid.empty_image(), here, sitk.sitkLinear, 0.0), lowerBound=0)
    images.write_image(grid.image(to_uint8(volume)), args.output / "other_T2.nii.gz")


if __name__ == "__main__":
    main()
