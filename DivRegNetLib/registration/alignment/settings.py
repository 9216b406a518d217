"""Settings of the initial alignment. No torch here."""

from dataclasses import dataclass

Rounds = tuple[tuple[int, int], ...]
"""Rounds of an optimization, each of so many starts and steps."""


@dataclass(frozen=True)
class AlignmentSettings:
    """Every constant of the initial alignment, in units that do not depend on the size of what is imaged.

    The *content* of an image is what it shows beside air. Its *extent* is the side of a cube as large as the box around it.
    Lengths are shares of the smaller extent of the two images (of the *radius* where said so), or voxels of a level, so that
    a head and an embryo are treated alike. Chosen on the ``fitted`` cases of training/benchmarks/misalignments.py.

    Resolution and sampling
        coarse_voxels: voxels along the extent at the coarse level (8 mm for a head); the fine one has twice as many.
        radius: shared unit of length of both images, in extents; a turn of 1/radius moves a point there by 1.
        window: percentiles of the intensities between which an image is looked at.
        search_points, coarse_points, fine_points: sampled in each of the two images for the similarity of each stage.
        search_bins, coarse_bins, fine_bins: of the joint histogram, per image.
        margin: share by which the box around the content is enlarged before points are put into it.
    Field of view
        air: distance from the background's value, in windows, within which a voxel is taken for background.
        content: the same beyond which it is taken for content.
        open_face: share of a face of the field of view that must be background for the image to be taken to go on as
            background beyond that face.
        overlap: share of the smaller content that must be inside the other image.
        overlap_power: in the search, NMI - 1 is multiplied by this power of the share that is inside, so that a small
            overlap is not taken for a good one.
    Search
        rotations: spread evenly over all, beside the 24 that take axes to axes, in the first search. The searches after it are
            made where no place stands out after those before.
        more_rotations: of a second search about the same centers, for images that end in air all around.
        most_stretch: of a start that gives both contents the same spread, which is done where both images end in air all around
            or where the content of both makes up more than the share ``filled``.
        alike: ratio of sizes of the contents up to which the scale is taken for 1 and held back to it.
        scales: isotropic scales of the last search, where scale is free.
        correlation_voxels: cells along the extent in which the directions of edges are correlated, at two levels, where images
            are cut off; correlation_cells: of the larger image and what is around it, at most; correlation_sigma: of the
            Gaussian that blurs them, in cells; correlation_every: one in so many points of the smaller image is looked at.
        correlated: rounds of the optimization of that correlation, one at each level; correlation_reach: longest first step,
            in cells.
        apart: mean distance at the radius, in radii, below which two starts are the same.
        rough, more_rough: rounds of the rough optimization, each of so many starts and steps; of the first searches, and of
            those after them.
        survivors, more_survivors: of these, the ones that are optimized further at the coarse level; coarse_steps: per kind of
            map.
        edge_every: after each round, the best are chosen by one in so many points on edges, and the similarity.
        stretched: of these, the ones that are optimized as similarities and as affine maps.
        sure: agreement of edges after the best map, and what its merit exceeds those of all other places by, from which on
            there is no further search; elsewhere: mean distance at the radius, in radii, beyond which a place is another one.
        finalists: optimized at the fine level, at most; rival: what the merit of the best exceeds theirs by, at most;
            fine_steps: per kind of map.
        reach, rough_reach: longest first step, in voxels of the level, and of the rough optimization.
        tolerance: length of a step, in radii, at which an optimization has converged.
        stretch_penalty: NMI that a log-scale or shear of 1 costs, squared.
    Choice
        edge_share: share of the content's voxels that are its strongest edges, for their surroundings.
        edge_surroundings: standard deviation, voxels of the fine level, of the Gaussian that makes the surroundings.
        edge_points: of these, looked at in each image.
        edge_floor: share of the strength of strong edges below which a gradient has no direction.
        similarity_weight: of NMI - 1 at the fine level, times the share that is inside, beside the agreement of edges.
        mirrors: planes at which the moving image is mirrored in the end; mirror_rough: rounds as above; mirror_margin: what
            the merit of a mirror image must exceed that of the result by to be mentioned.
    Words
        large_degrees, large_scale: rotation, and ratio of sizes, beyond which the user is told.
    """

    coarse_voxels: float = 22.0
    radius: float = 0.4
    window: tuple[float, float] = (0.5, 99.8)
    search_points: int = 1000
    rough_points: int = 600
    coarse_points: int = 2000
    fine_points: int = 12_000
    search_bins: int = 16
    rough_bins: int = 12
    coarse_bins: int = 16
    fine_bins: int = 32
    margin: float = 0.08

    air: float = 0.08
    content: float = 0.12
    open_face: float = 0.65
    overlap: float = 0.25
    overlap_power: float = 1.0

    rotations: int = 500
    more_rotations: int = 1000
    most_stretch: float = 2.2
    filled: float = 0.95
    alike: float = 1.1
    scales: tuple[float, ...] = (0.65, 0.8, 1.25, 1.55)
    correlation_voxels: tuple[float, float] = (7.0, 12.0)
    correlation_cells: int = 60_000
    correlation_sigma: float = 0.7
    correlation_every: int = 4
    correlation_reach: float = 0.7
    correlated: Rounds = ((120, 4), (48, 6))
    apart: float = 0.2
    rough: Rounds = ((200, 2), (48, 4))
    more_rough: Rounds = ((500, 3), (150, 3))
    survivors: int = 12
    more_survivors: int = 24
    edge_every: int = 8
    coarse_steps: int = 10
    stretched: int = 8
    sure: float = 0.55
    elsewhere: float = 0.4
    finalists: int = 3
    rival: float = 0.15
    fine_steps: int = 30
    reach: float = 1.5
    rough_reach: float = 2.5
    tolerance: float = 1e-5
    stretch_penalty: float = 0.5

    edge_share: float = 0.3
    edge_surroundings: float = 4.0
    edge_points: int = 4000
    similarity_weight: float = 1.5
    edge_floor: float = 0.25
    mirrors: int = 64
    mirror_rough: Rounds = ((16, 6),)
    mirror_margin: float = 0.03

    large_degrees: float = 60.0
    large_scale: float = 1.2
