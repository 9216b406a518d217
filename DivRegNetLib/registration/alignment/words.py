"""What an alignment did, in words."""

import numpy as np

AXES = ("left-right", "front-back", "head-foot")
MIRRORED = (
    "a mirror image of the moving image fits better than the moving image itself; one of the two images may be mirrored, for "
    "instance with left and right exchanged"
)


def remarks(matrix: np.ndarray, large_degrees: float, large_scale: float) -> list[str]:
    """Sentences about a (4, 4) LPS map, fixed -> moving, that turns or stretches more than a header should be wrong.

    Args:
        large_degrees: rotation beyond which it is mentioned.
        large_scale: ratio of sizes along any axis beyond which it is mentioned.
    """
    found = []
    turn, stretches, axes = polar(matrix[:3, :3])
    degrees, axis = angle_and_axis(turn)
    if degrees > large_degrees:
        found.append(
            f"the moving image had to be turned by {degrees:.0f} degrees about {_axis_name(axis)} against what its header "
            "says; the header of one of the two images may be wrong, or it may be the wrong file"
        )
    ratios = 1 / stretches  # of the moving image's size to what would fit, along its own axes
    if max(ratios.max(), 1 / ratios.min()) > large_scale:
        if ratios.max() / ratios.min() < 1.1:
            ratio = float(np.prod(ratios)) ** (1 / 3)
            found.append(
                f"the moving image had to be made {ratio:.2g} times as large as its header says; the voxel spacing of one of "
                "the two images may be wrong, or it may be the wrong file"
            )
        else:
            worst = int(np.abs(np.log(ratios)).argmax())
            found.append(
                f"the moving image had to be stretched by a factor of {ratios[worst]:.2g} along {_axis_name(axes[:, worst])} "
                "(of the fixed image); the slice spacing of one of the two images may be wrong"
            )
    return found


def polar(linear: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rotation (3, 3), stretches (3,) and their axes (3, 3, columns) with ``linear = rotation @ axes @ diag @ axes.T``."""
    u, stretches, v = np.linalg.svd(linear)
    return u @ v, stretches, v.T


def angle_and_axis(rotation: np.ndarray) -> tuple[float, np.ndarray]:
    """Degrees from 0 to 180 and unit vector of a (3, 3) rotation."""
    degrees = float(np.degrees(np.arccos(np.clip((np.trace(rotation) - 1) / 2, -1, 1))))
    # The axis is the eigenvector of the symmetric part with the largest eigenvalue; its sense is in the skew part.
    axis = np.linalg.eigh(rotation + rotation.T)[1][:, -1]
    skew = np.array([rotation[2, 1] - rotation[1, 2], rotation[0, 2] - rotation[2, 0], rotation[1, 0] - rotation[0, 1]])
    return degrees, axis if skew @ axis >= 0 else -axis


def _axis_name(axis: np.ndarray) -> str:
    """Of a unit vector in LPS: one of the body's axes where it lies within 20 degrees of it."""
    nearest = int(np.abs(axis).argmax())
    if abs(axis[nearest]) > np.cos(np.radians(20)):
        return f"the {AXES[nearest]} axis"
    x, y, z = axis
    return f"an oblique axis (L {x:.2f}, P {y:.2f}, S {z:.2f})"
