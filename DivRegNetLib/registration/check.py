"""Checks of images and masks; an error names the image, the fault and the remedy."""

import numpy as np
import SimpleITK as sitk

from DivRegNetLib.errors import InputError

LARGEST_SPACING_MM = 200.0
FARTHEST_ORIGIN_MM = 1_000_000.0  # farther out, single precision in file headers and Slicer's fields is off by 0.1 mm


def check_image(image: sitk.Image, name: str) -> sitk.Image:
    """A copy of the image, if it is 3D, scalar, real, finite, not constant and has a valid geometry.

    What was checked is what is registered, even if the program changes its image meanwhile.

    Args:
        name: ``fixed`` or ``moving``, or a file, for the message.
    Raises:
        InputError: otherwise.
    """
    _check_kind(image, f"{name} image")
    # A view first copies the voxels that its image shares with another one. Two threads that view one such image crash the
    # process, so the program's image itself is not viewed.
    image = sitk.Image(image)
    check_geometry(image, f"{name} image")
    values = sitk.GetArrayViewFromImage(image)
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        count = int((~np.isfinite(values)).sum())
        raise InputError(f"the {name} image holds {count} voxels that are NaN or infinite; replace them")
    if low == high:
        raise InputError(f"the {name} image is constant ({low:g} everywhere): there is nothing to register")
    single, largest = np.finfo(np.float32), max(abs(low), abs(high))
    if not max(float(single.tiny), 100 * float(single.eps) * largest) < high - low < float(single.max):
        raise InputError(
            f"the {name} image holds values from {low:.9g} to {high:.9g}, which single precision cannot hold or "
            "distinguish; shift and scale them to a range such as 0 to 1000"
        )
    return image


def check_mask(mask: sitk.Image | None, image: sitk.Image, name: str) -> sitk.Image | None:
    """The mask as uint8 of 0 and 1, if it is a 3D scalar image that covers a part of the image; None for None.

    Raises:
        InputError: otherwise.
    """
    if mask is None:
        return None
    _check_kind(mask, f"{name} mask")
    mask = sitk.Image(mask)  # as in check_image
    check_geometry(mask, f"{name} mask")
    values = sitk.GetArrayViewFromImage(mask)
    if np.isnan(values.max()):
        raise InputError(f"the {name} mask holds {int(np.isnan(values).sum())} voxels that are NaN; replace them by 0")
    inside = sitk.GetImageFromArray((values != 0).astype(np.uint8))
    inside.CopyInformation(mask)
    on_image = sitk.Resample(inside, image, sitk.Transform(), sitk.sitkNearestNeighbor, 0)
    if not sitk.GetArrayViewFromImage(on_image).any():
        raise InputError(f"the {name} mask is empty where the {name} image is; draw it there or leave it out")
    return inside


def check_default(value: float, image: sitk.Image) -> None:
    """Raises InputError unless the pixel type of the image can hold the default value."""
    pixel = sitk.GetArrayViewFromImage(image).dtype
    limits = np.iinfo(pixel) if pixel.kind in "iu" else np.finfo(pixel)
    if not limits.min <= value <= limits.max:
        raise InputError(
            f"the default value {value:g} does not fit into the voxels of the moving image ({pixel.name}); "
            f"choose one from {limits.min:.9g} to {limits.max:.9g}"
        )


def check_geometry(image: sitk.Image, name: str) -> None:
    """Raises InputError unless spacing, origin and direction are finite and plausible and the axes span space."""
    numbers = (*image.GetSpacing(), *image.GetOrigin(), *image.GetDirection())
    if not np.isfinite(numbers).all():
        raise InputError(f"the {name} has a spacing, origin or direction that is not finite; repair its header")
    if max(image.GetSpacing()) > LARGEST_SPACING_MM:
        raise InputError(f"the {name} has a spacing of {max(image.GetSpacing()):g} mm; repair its header")
    if (far := max(map(abs, image.GetOrigin()))) > FARTHEST_ORIGIN_MM:
        raise InputError(
            f"the {name} lies {far / 1e6:g} km from the origin of its coordinates, where single precision is off by more "
            "than 0.1 mm; move its origin nearer"
        )
    if abs(np.linalg.det(np.reshape(image.GetDirection(), (3, 3)))) < 1e-3:
        raise InputError(f"the {name} has axes that do not span space; repair its header")


def _check_kind(image: sitk.Image, name: str) -> None:
    """Raises InputError unless it is a 3D image of one real number per voxel."""
    if not isinstance(image, sitk.Image):
        raise InputError(f"the {name} must be a SimpleITK image, got {type(image).__name__}")
    if image.GetDimension() != 3:
        raise InputError(f"the {name} has {image.GetDimension()} dimensions, 3 are needed; pick one volume of it")
    if image.GetNumberOfComponentsPerPixel() != 1:
        components = image.GetNumberOfComponentsPerPixel()
        raise InputError(f"the {name} has {components} components per voxel, 1 is needed; pick or convert one")
    if "complex" in image.GetPixelIDTypeAsString():
        raise InputError(f"the {name} is complex; take its magnitude")
    if "label" in image.GetPixelIDTypeAsString():
        raise InputError(f"the {name} is a run-length label map; convert it to an image")
