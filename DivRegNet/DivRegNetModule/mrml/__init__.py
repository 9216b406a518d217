"""MRML nodes in, nodes out: between 3D Slicer's scene and the library. Works in Slicer and on ``slicer-core``.

Everything is done in world coordinates. A volume's grid is its IJKToRAS matrix under all of its parent transforms;
linear parents are folded into the matrix, a volume under a non-linear one is first resampled in world coordinates.

The outputs are in world coordinates too, that is without a parent transform:

* the warped volume lies on the world grid of the fixed volume;
* the transform node takes the moving image's world to the fixed image's world. Its transform *from* parent is a
  displacement on the fixed grid (RAS, mm) that maps fixed points to moving points: what resampling needs. A moving
  volume without a parent is put under the node as it is. If the moving volume has parents, the topmost of these is put
  under it, as the registration comes last;
* the inverse node, where one is asked for, takes fixed to moving: the fixed volume is put under it. Its displacement
  lies on the moving grid.

Both transform nodes reference the volumes in Slicer's own roles, and have the attributes ``DivRegNet.Model``,
``DivRegNet.ModelVersion``, and, as JSON, ``DivRegNet.Settings``, ``DivRegNet.Quality`` and ``DivRegNet.Initial`` (the initial
alignment: a 4x4 matrix that maps fixed points to moving points, LPS, mm).
"""

from DivRegNetModule.mrml.carrying import apply_to
from DivRegNetModule.mrml.checks import check_nodes
from DivRegNetModule.mrml.registration import (
    Inputs,
    Registration,
    images_from_nodes,
    nodes_from_result,
    register_nodes,
)
from DivRegNetModule.mrml.segments import segment_image, segments

__all__ = [
    "Inputs",
    "Registration",
    "apply_to",
    "check_nodes",
    "images_from_nodes",
    "nodes_from_result",
    "register_nodes",
    "segment_image",
    "segments",
]
