"""Is this an image that can be registered? If not, say which it is, what is wrong and what to do."""

import numpy as np
import SimpleITK as sitk

from DivRegNetLib.errors import InputError

LARGEST_SPACING_MM = 200.0


def check_image(image: sitk.Image, name: str) -> sitk.Image:
    """The image, if it is 3D, scalar, real, finite, not constant and of sane geometry.

    Args:
        name: ``fixed`` or ``moving``, or a file, for the message.
    Raises:
        InputError: otherwise.
    """
    if not isinstance(image, sitk.Image):
        raise InputError(f"the {name} image must be a SimpleITK image, got {type(image).__name__}")
    if image.GetDimension() != 3:
        raise InputError(f"the {name} image has {image.GetDimension()} dimensions, 3 are needed; pick one volume of it")
    if image.GetNumberOfComponentsPerPixel() != 1:
        components = image.GetNumberOfComponentsPerPixel()
        raise InputError(f"the {name} image has {components} components per voxel, 1 is needed; pick or convert one")
    if "complex" in image.GetPixelIDTypeAsString():
        raise InputError(f"the {name} image is complex; take its magnitude")
    if "label" in image.GetPixelIDTypeAsString():
        raise InputError(f"the {name} image is a run-length label map; convert it to an image")
    check_geometry(image, name)
    values = sitk.GetArrayViewFromImage(image)
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        count = int((~np.isfinite(values)).sum())
        raise InputError(f"the {name} image holds {count} voxels that are NaN or infinite; replace them")
    if low == high:
        raise InputError(f"the {name} image is constant ({low:g} everywhere): there is nothing to register")
    return image


def check_mask(mask: sitk.Image | None, image: sitk.Image, name: str) -> sitk.Image | None:
    """The mask as uint8 of 0 and 1, if it is a 3D scalar image that covers something of the image; None stays None.

    Raises:
        InputError: otherwise.
    """
    if mask is None:
        return None
    if not isinstance(mask, sitk.Image) or mask.GetDimension() != 3 or mask.GetNumberOfComponentsPerPixel() != 1:
        raise InputError(f"the {name} mask must be a 3D scalar image")
    check_geometry(mask, f"{name} mask")
    mask = sitk.Cast(sitk.Cast(mask, sitk.sitkFloat32) != 0, sitk.sitkUInt8)
    on_image = sitk.Resample(mask, image, sitk.Transform(), sitk.sitkNearestNeighbor, 0)
    if not sitk.GetArrayViewFromImage(on_image).any():
        raise InputError(f"the {name} mask is empty where the {name} image is; draw it there or leave it out")
    return mask


def check_geometry(image: sitk.Image, name: str) -> None:
    """Raises InputError unless spacing, origin and direction are finite, and no axis lies in the plane of the others."""
    numbers = (*image.GetSpacing(), *image.GetOrigin(), *image.GetDirection())
    if not np.isfinite(numbers).all():
        raise InputError(f"the {name} has a spacing, origin or direction that is not finite; repair its header")
    if max(image.GetSpacing()) > LARGEST_SPACING_MM:
        raise InputError(f"the {name} has a spacing of {max(image.GetSpacing()):g} mm; repair its header")
    if abs(np.linalg.det(np.reshape(image.GetDirection(), (3, 3)))) < 1e-3:
        raise InputError(f"the {name} has axes that do not span space; repair its header")
