"""Displacement and velocity fields on a voxel grid: warp, compose, integrate, invert, resize, Jacobian, smoothness.

Conventions, everywhere in this file:

* A field is a tensor (N, 3, D, H, W). Its three components are along x, y, z, that is along W, H, D, in **voxels** of
  the grid it lives on.
* A displacement u stands for the map ``x -> x + u(x)``. Warping an image with it *pulls*: ``warped(x) = image(x + u(x))``.
* Voxels are cells: voxel centers lie at whole numbers and the image extends half a voxel beyond the first and the last
  (``align_corners=False``), so halving the resolution doubles the spacing exactly and keeps the extent.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.nn import functional as F

from DivRegNetLib.core.determinants import determinant
from DivRegNetLib.core.torch_state import computed_in_parts, threads_share_parts

CACHED_MATRICES = 128  # per function
CACHED_GRIDS = 8  # per function; as large as a field, so only those of one registration (three levels use seven)
SLAB_VOXELS = 120_000  # that a CPU computes at a time, so that what is made of them stays in its cache
SAMPLED_AT_ONCE = 45_000  # points of a table, where threads share parts
SAMPLING_PARTS = 16  # into which the points of one image are divided, so that the threads of a CPU share them
MULTILEVEL_SIDE = 16  # shortest side, in voxels, from which on an inversion starts from half the resolution
TRUNCATION = 2.5  # radius of a Gaussian kernel in standard deviations


def cached(make: Callable[..., Tensor], *, size: int = CACHED_MATRICES) -> Callable[..., Tensor]:
    """Caches the last results of a function of numbers and ``like``, which gives its result dtype and device of ``like``.

    Making a small matrix takes longer than using it, and on a GPU numbers that come from Python have to be waited for. The
    results must not be written to.
    """

    @functools.lru_cache(size)
    def cached_make(numbers: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return make(*numbers, like=torch.empty(0, dtype=dtype, device=device))

    @functools.wraps(make)
    def lookup(*numbers: float, like: Tensor) -> Tensor:
        if (kept := _kept.get()) is None:
            return cached_make(numbers, like.dtype, like.device)
        results, complete = kept
        key = make, numbers, like.dtype, like.device
        if key not in results:
            if complete:
                raise RuntimeError(f"{make.__name__}{numbers} was not needed before")
            results[key] = cached_make(*key[1:])
        return results[key]

    return lookup


_kept: ContextVar[tuple[dict, bool] | None] = ContextVar("kept", default=None)  # of each thread


@contextlib.contextmanager
def keeping_cached(results: dict, *, complete: bool = False) -> Iterator[None]:
    """Keeps what this thread needs meanwhile of :func:`cached` functions in a dictionary, and takes it from there.

    Args:
        complete: ``results`` holds all that is needed; anything else is an error (RuntimeError).
    """
    token = _kept.set((results, complete))
    try:
        yield
    finally:
        _kept.reset(token)


@cached
def constants(*numbers: float, like: Tensor) -> Tensor:
    """(n,): numbers as a tensor."""
    return like.new_tensor(numbers)


def slices_at_once(voxels: int, *, like: Tensor, multiple: int = 1) -> int:
    """How many slices to compute at a time; on a GPU all of any image.

    Args:
        voxels: of a slice.
        multiple: that the number is to be of.
    """
    return 2**31 if like.is_cuda else multiple * max(SLAB_VOXELS // (multiple * voxels), 1)


def joined(parts: list[Tensor], dim: int) -> Tensor:
    """``torch.cat``, which a single part is not copied for."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def identity(shape: tuple[int, int, int], *, like: Tensor) -> Tensor:
    """Voxel coordinates of a (D, H, W) grid as a field (1, 3, D, H, W), with dtype and device of ``like``."""
    axes = [torch.arange(n, dtype=like.dtype, device=like.device) for n in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1])[None]


def _identity(depth: int, height: int, width: int, *, like: Tensor) -> Tensor:
    return identity((depth, height, width), like=like)


_identity = cached(_identity, size=CACHED_GRIDS)


def sample(image: Tensor, points: Tensor, *, mode: str = "bilinear", padding: str = "border") -> Tensor:
    """Values of an image (N, C, D, H, W) at voxel coordinates (N, 3, d, h, w) in x, y, z order.

    Args:
        mode: ``bilinear`` (trilinear in 3D) or ``nearest``.
        padding: ``border`` repeats the outermost voxel outside, ``zeros`` gives 0.
    Returns:
        (N, C, d, h, w).
    """
    size = constants(*image.shape[:1:-1], like=points).view(1, 3, 1, 1, 1)
    grid = (points * 2 + 1) / size - 1  # in this order the image's border is met exactly, beyond which ``zeros`` begins
    return _grid_sample(image, grid.permute(0, 2, 3, 4, 1), mode, padding)


class Sampler:
    """An image (N, C, D, H, W) that is sampled again and again; the border is repeated. Nothing here is differentiated.

    For one image on a CPU this is up to four times as fast as torch's grid_sample for volumes, which reads number by number:
    the values of a voxel and of the next one along x are a row of a table, and four of its rows are added in one operation for
    each point.
    """

    def __init__(self, image: Tensor) -> None:
        self.image, self._table = image, None
        if len(image) == 1 and not image.is_cuda:
            values = F.pad(image, (0, 2, 0, 1, 0, 1), mode="replicate")[0]
            self._table = torch.cat((values[..., :-1], values[..., 1:])).flatten(1).T.contiguous()

    def displaced(self, displacement: Tensor, stride: int = 1) -> Tensor:
        """As :func:`sample_displaced` of the image."""
        if self._table is None:
            return sample_displaced(self.image, displacement, stride)
        return self((_identity(*displacement.shape[2:], like=displacement) + displacement).mul_(stride))

    def __call__(self, points: Tensor) -> Tensor:
        """(N, C, d, h, w) at voxel coordinates (N, 3, d, h, w), as :func:`sample`."""
        if self._table is None:
            return sample(self.image, points)
        flat = points.flatten(2)
        parts = flat.split(SAMPLED_AT_ONCE if threads_share_parts() else flat.shape[2], 2)
        return joined(computed_in_parts(self._at, parts), 1).unflatten(1, points.shape[2:])[None]

    def _at(self, points: Tensor) -> Tensor:
        """(C, n) at (1, 3, n), by the table."""
        _, channels, depth, height, width = self.image.shape
        last = constants(width - 1, height - 1, depth - 1, like=points).view(3, 1)
        at = points[0].clamp_min(0).minimum(last)
        low = at.int().clamp_min_(0)  # what is NaN has a row as well, and gives NaN
        x, y, z = (at - low).unbind()
        first = low[0] + (width + 1) * (low[1] + (height + 1) * low[2])
        # Written in place: stacking takes twice as long.
        rows, weights = first.new_empty(len(first), 4), x.new_empty(len(x), 4)
        for row, offset in zip(rows.unbind(1), (0, 1, height + 1, height + 2), strict=True):
            torch.add(first, (width + 1) * offset, out=row)
        neither, only_y, only_z, both = weights.unbind(1)
        torch.mul(y, z, out=both)
        torch.sub(y, both, out=only_y)
        torch.sub(z, both, out=only_z)
        torch.sub(1 - y, only_z, out=neither)
        here, next_one = F.embedding_bag(rows, self._table, per_sample_weights=weights, mode="sum").T.chunk(2)
        return torch.lerp(here, next_one, x, out=at.new_empty(channels, len(x)))


def sample_displaced(image: Tensor, displacement: Tensor, stride: int = 1) -> Tensor:
    """Values of an image at ``stride * (x + u(x))``; beyond the border, the border's. :func:`sample` with fewer operations.

    Args:
        image: (N, C, D, H, W).
        displacement: (N, 3, D/stride, H/stride, W/stride) in voxels of its own grid.
    Returns:
        (N, C, D/stride, H/stride, W/stride).
    """
    scale = constants(*(2 * stride / n for n in image.shape[:1:-1]), like=displacement)
    centers = _centers(*displacement.shape[2:], stride, like=displacement)
    return _grid_sample(image, torch.addcmul(centers, displacement.permute(0, 2, 3, 4, 1), scale), "bilinear", "border")


def _centers(depth: int, height: int, width: int, stride: int, *, like: Tensor) -> Tensor:
    """(1, d, h, w, 3): every ``stride``-th voxel of a grid in the coordinates of torch's grid_sample, from -1 to 1."""
    size = constants(width * stride, height * stride, depth * stride, like=like).view(1, 3, 1, 1, 1)
    grid = (identity((depth, height, width), like=like) * (2 * stride) + 1) / size - 1
    return grid.permute(0, 2, 3, 4, 1).contiguous()


_centers = cached(_centers, size=CACHED_GRIDS)


def _grid_sample(image: Tensor, grid: Tensor, mode: str, padding: str) -> Tensor:
    """torch's grid_sample, (N, C, D, H, W) at (N, d, h, w, 3), by all threads of a CPU."""
    options = {"mode": mode, "padding_mode": padding, "align_corners": False}
    if len(grid) > 1 or grid.is_cuda or image.requires_grad:
        return F.grid_sample(image, grid, **options)
    # On a CPU, threads share the images of a batch but not the points of one image: the points are made a batch.
    points = grid.reshape(-1, 3)
    count = len(points)
    points = F.pad(points, (0, 0, 0, -count % SAMPLING_PARTS)) if count % SAMPLING_PARTS else points
    images = image.expand(SAMPLING_PARTS, -1, -1, -1, -1)
    values = F.grid_sample(images, points.view(SAMPLING_PARTS, 1, 1, -1, 3), **options)
    return values.transpose(0, 1).flatten(1)[:, :count].unflatten(1, grid.shape[1:4])[None]


def sample_along(image: Tensor, dim: int, at: Tensor) -> Tensor:
    """Linear interpolation of a tensor at positions (n,), in voxels, along one dimension; the border is repeated."""
    last, dims = image.shape[dim] - 1, image.dim()
    shape = [-1 if d == dim else 1 for d in range(dims)]
    at = at.clamp(0, last)
    low = at.floor().long()

    def take(index: Tensor) -> Tensor:
        if dim < dims - 1:
            return image.index_select(dim, index)
        return image.gather(dim, index.expand(*image.shape[:-1], -1))  # five times as fast on a CPU along the last axis

    return take(low).lerp_(take((low + 1).clamp_max(last)), (at - low).view(shape).to(image.dtype))


def shifted(image: Tensor, *by: float) -> Tensor:
    """Values of an image (N, C, D, H, W) at ``x + by``, with ``by`` in voxels along x, y and z; the border is repeated."""
    sizes = zip(image.shape[:1:-1], by, strict=True)
    return along_axes(image, *(_shift(n, distance, like=image) if distance else None for n, distance in sizes))


@cached
def _shift(n: int, distance: float, *, like: Tensor) -> Tensor:
    """(n, n): maps the values on a line to those ``distance`` voxels further."""
    at = torch.arange(n, device=like.device, dtype=like.dtype) + distance
    return sample_along(torch.eye(n, device=like.device, dtype=like.dtype), 0, at)


def warp(image: Tensor, displacement: Tensor, *, mode: str = "bilinear", padding: str = "border") -> Tensor:
    """``image(x + u(x))`` for an image (N, C, D, H, W) and a displacement (N, 3, D, H, W) on the same grid."""
    if (mode, padding) == ("bilinear", "border"):
        return sample_displaced(image, displacement)
    points = identity(displacement.shape[2:], like=displacement) + displacement
    return sample(image, points, mode=mode, padding=padding)


def compose(outer: Tensor, inner: Tensor) -> Tensor:
    """Displacement of ``x -> outer(inner(x))``: first ``inner``, then ``outer``, both (N, 3, D, H, W)."""
    return inner + warp(outer, inner)


def integrate(velocity: Tensor, steps: int = 6) -> Tensor:
    """Displacement of the flow of a stationary velocity field at time 1, by ``steps`` squarings.

    Source: Arsigny et al., "A log-Euclidean framework for statistics on diffeomorphisms", MICCAI 2006.
    """
    displacement = velocity / 2**steps
    for _ in range(steps):
        displacement = compose(displacement, displacement)
    return displacement


def invert(displacement: Tensor, *, iterations: int = 30, tolerance: float = 4e-2) -> Tensor:
    """Displacement v with ``(x + v) + u(x + v) = x``, by fixed-point iteration ``v <- -u(x + v)``.

    Converges where u is a contraction; elsewhere the result is the last iterate. Starts from the inverse at half the
    resolution. A voxel whose update is at most ``tolerance`` voxels is finished; the others are iterated further.
    Source: Chen et al., "A simple fixed-point approach to invert a deformation field", Med. Phys. 2008.
    """
    shape = displacement.shape[2:]
    inverse = -displacement
    if min(shape) >= MULTILEVEL_SIDE:
        half = resize(displacement, tuple((n + 1) // 2 for n in shape))
        inverse = resize(invert(half, iterations=iterations, tolerance=tolerance), shape)
    inverse, x = inverse.flatten(2), identity(shape, like=inverse).flatten(2)
    active, v = None, inverse  # None: all voxels
    for i in range(iterations):
        residual = v + sample(displacement, (x + v)[..., None, None]).flatten(2)
        v = v - (0.75 if i else 1.0) * residual  # damped after the first: stable where the gradient of u is steep
        inverse = v if active is None else inverse.index_copy(2, active, v)
        unfinished = (residual.abs().amax((0, 1)) > tolerance).nonzero()[:, 0]
        if not len(unfinished):
            break
        active = unfinished if active is None else active[unfinished]
        x, v = x[..., unfinished], v[..., unfinished]
    return inverse.view_as(displacement)


def resize(displacement: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """The same deformation on a (D, H, W) grid of the same extent; lengths are rescaled to voxels of the new grid."""
    if tuple(displacement.shape[2:]) == tuple(shape):
        return displacement
    ratio = constants(*[n / o for n, o in zip(shape, displacement.shape[2:], strict=True)][::-1], like=displacement)
    resized = F.interpolate(displacement, size=tuple(shape), mode="trilinear", align_corners=False)
    return resized * ratio.view(1, 3, 1, 1, 1)


def padded(image: Tensor, multiple: int, mode: str = "replicate") -> Tensor:
    """(N, C, D, H, W) extended at the far end of D, H and W to multiples of a number of voxels.

    Args:
        mode: ``replicate`` repeats the border, ``constant`` adds zeros.
    """
    return extended(image, [-n % multiple for n in image.shape[2:]], mode)


def extended(image: Tensor, voxels: list[int], mode: str = "replicate") -> Tensor:
    """(N, C, D, H, W) with so many more voxels at the far end of D, H and W; ``mode`` as in :func:`padded`."""
    return F.pad(image, [n for side in reversed(voxels) for n in (0, side)], mode=mode) if any(voxels) else image


def upsample(displacement: Tensor, stride: int, shape: tuple[int, int, int]) -> Tensor:
    """A displacement on a grid whose voxels are ``stride`` times as long, brought to a grid of ``shape`` (D, H, W).

    Args:
        displacement: (N, 3, d, h, w) in voxels of its grid, which may reach beyond ``shape`` at the far ends, as it does
            for padded images.
    Returns:
        (N, 3, D, H, W) in voxels of the finer grid.
    """
    fine = resize(displacement, tuple(n * stride for n in displacement.shape[2:]))
    return fine[:, :, : shape[0], : shape[1], : shape[2]]


def coarsen(displacement: Tensor, stride: int, multiple: int) -> Tensor:
    """The reverse of :func:`upsample`: to the grid of the images padded to a multiple and coarsened by ``stride``."""
    fine = padded(displacement, multiple)
    return resize(fine, tuple(n // stride for n in fine.shape[2:]))


def length(field: Tensor) -> Tensor:
    """Length of the vectors of a field (N, 3, D, H, W), in its unit: (N, 1, D, H, W)."""
    return field.square().sum(1, keepdim=True).sqrt()


def smooth(field: Tensor, *sigma: float) -> Tensor:
    """Gaussian smoothing of (N, C, D, H, W), the border repeated.

    Args:
        sigma: standard deviation in voxels; one, or one each along x, y, z. 0 leaves an axis as it is.
    """
    sizes = zip(field.shape[:1:-1], sigma * (3 // len(sigma)), strict=True)
    return along_axes(field, *(gaussian(n, s, like=field) if s else None for n, s in sizes))


def along_axes(field: Tensor, x: Tensor | None, y: Tensor | None, z: Tensor | None) -> Tensor:
    """(N, C, D, H, W) with the values along each axis multiplied by a matrix (to, from); None leaves an axis as it is."""
    if x is not None:
        field = F.linear(field, x)
    if y is not None:
        field = y @ field
    if z is not None:
        field = (z @ field.flatten(3)).unflatten(3, field.shape[3:])
    return field


@cached
def gaussian(n: int, sigma: float, *, like: Tensor) -> Tensor:
    """(n, n): smoothing along an axis of n voxels by a Gaussian whose standard deviation is ``sigma`` voxels. What would
    fall beyond the border is added to the border's weight."""
    radius = max(round(TRUNCATION * sigma), 1)
    offsets = torch.arange(-radius, radius + 1, device=like.device)
    kernel = torch.exp(-0.5 * (offsets.double() / sigma) ** 2)
    columns = (torch.arange(n, device=like.device)[:, None] + offsets).clamp_(0, n - 1)
    # In double precision, so that the order in which a GPU adds at the border makes no difference after rounding.
    matrix = kernel.new_zeros(n, n).scatter_add_(1, columns, (kernel / kernel.sum()).expand(n, -1))
    return matrix.to(like.dtype)


def differences(image: Tensor, out: Tensor | None = None) -> Tensor:
    """``image(x + 1) - image(x - 1)`` of (N, C, D, H, W) along x, y, z: (N, 3, C, D, H, W); 0 at the border.

    Args:
        out: (N, 3, C, D, H, W) that is 0 at the border, to be written to and returned.
    """
    out = image.new_zeros(len(image), 3, *image.shape[1:]) if out is None else out
    for axis, dim in enumerate((4, 3, 2)):
        inner = image.shape[dim] - 2
        if inner > 0:
            to = out[:, axis].narrow(dim, 1, inner)
            torch.sub(image.narrow(dim, 2, inner), image.narrow(dim, 0, inner), out=to)
    return out


def gradients(field: Tensor) -> list[Tensor]:
    """Forward differences of a field along x, y and z, each (N, C, ...) one voxel shorter along its own axis."""
    return [field.diff(dim=d) for d in (4, 3, 2)]


def bending(field: Tensor) -> Tensor:
    """Mean squared second difference along each axis (unmixed bending energy), a scalar; 0 for affine maps."""
    return sum(field.diff(n=2, dim=d).square().mean() for d in (2, 3, 4))


def diffusion(field: Tensor) -> Tensor:
    """Mean squared first difference, summed over the axes: the smoothness term of VoxelMorph, a scalar."""
    return sum(g.square().mean() for g in gradients(field))


def jacobian_determinant(displacement: Tensor) -> Tensor:
    """det of the Jacobian of ``x -> x + u(x)`` by forward differences, (N, D-1, H-1, W-1); <= 0 where it folds."""
    u = displacement
    columns = []  # d(x + u)/dx, d/dy, d/dz
    for axis, dim in enumerate((4, 3, 2)):
        difference = u.diff(dim=dim)
        crop = [slice(None), slice(None)] + [slice(0, -1) if d != dim else slice(None) for d in (2, 3, 4)]
        column = list(difference[tuple(crop)].unbind(1))
        column[axis] = column[axis] + 1
        columns.append(column)
    return determinant([*zip(*columns, strict=True)])
