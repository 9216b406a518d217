"""BrainWeb's head, from which the head cohort, the sample pair and pairs of the benchmark are made."""

from pathlib import Path

import numpy as np
import SimpleITK as sitk

from DivRegNetLib.core.grid import Grid
from DivRegNetLib.core.intensity import percentile_window
from DivRegNetLib.io.images import read_image, read_labels

CONTRASTS = ("T1", "T2", "PD")
TISSUE_SMOOTHING_MM2 = 0.3  # variance of the Gaussian filter before tissues are classified


def brainweb(data: Path, contrast: str) -> sitk.Image:
    """BrainWeb's T1, T2 or PD, 1 mm, all on one grid."""
    return read_image(data / f"brain_t1t2pd/brainweb_{contrast}.nii.gz")


def aal(data: Path) -> sitk.Image:
    """The AAL regions on BrainWeb's grid."""
    return read_labels(data / "brain_t1t2pd/aal_labels.nii.gz")


def brain_mask(t1: sitk.Image, cortex: sitk.Image) -> sitk.Image:
    """The inside of the skull of BrainWeb's T1: the largest component of eroded tissue, dilated again and closed.

    Args:
        cortex: a label map that lies inside the brain, such as AAL's.
    """
    tissue_like = sitk.Cast((t1 > 70) & (t1 < 200), sitk.sitkUInt8)
    parts = sitk.RelabelComponent(sitk.ConnectedComponent(sitk.BinaryErode(tissue_like, [3] * 3)))
    grown = sitk.BinaryDilate(sitk.Cast(parts == 1, sitk.sitkUInt8), [4] * 3) | sitk.Cast(cortex > 0, sitk.sitkUInt8)
    return sitk.BinaryFillhole(sitk.BinaryMorphologicalClosing(grown, [6] * 3))


def tissues(t1: sitk.Image, brain: sitk.Image) -> sitk.Image:
    """Fluid (1), gray matter (2) and white matter (3) by k-means of a T1 inside a brain mask; 0 elsewhere."""
    smooth = sitk.DiscreteGaussian(sitk.Cast(t1, sitk.sitkFloat32), TISSUE_SMOOTHING_MM2)
    values = sitk.GetArrayViewFromImage(smooth)[sitk.GetArrayViewFromImage(brain) > 0]
    low, high = percentile_window(values, 1, 99)
    means = np.quantile(values, [0.1, 0.45, 0.85])
    for _ in range(50):
        edges = (means[1:] + means[:-1]) / 2
        classes = np.digitize(values, edges)
        means = np.array([values[classes == i].clip(low, high).mean() for i in range(3)])
    array = np.digitize(sitk.GetArrayFromImage(smooth), (means[1:] + means[:-1]) / 2) + 1
    return Grid.of(t1).image((array * (sitk.GetArrayViewFromImage(brain) > 0)).astype(np.uint8))


def to_unit(image: sitk.Image) -> np.ndarray:
    """Intensities (D, H, W) divided by their 99.8th percentile and clipped to [0, 1]."""
    array = sitk.GetArrayFromImage(image).astype(float)
    return np.clip(array / np.percentile(array, 99.8), 0, 1)


def to_uint8(image: sitk.Image) -> np.ndarray:
    """The same on 0 to 255."""
    return (to_unit(image) * 255).astype(np.uint8)
