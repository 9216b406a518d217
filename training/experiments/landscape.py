"""The metric landscape (arXiv 1908.08767, Fig. 3): each similarity over translations in x and y of an aligned pair.

    python training/experiments/landscape.py --data DIR [--preset quick|paper] [--output build/experiments/landscape]

DIR/brain_t1t2pd holds BrainWeb's T1 and T2 and the AAL labels, which are aligned. T1 and T2 are translated against the fixed
T2, ``M'(p) = M(p + (x, y, 0))``, with linear interpolation and 0 outside. The metrics are S of KLDivNet with either shuffle,
Parzen-window MI with 64 bins, LNCC, and Dice of the union of the AAL labels.

*S needs a trained D*: one per pair and shuffle, trained on the pair under small random translations and deformations, as in
joint training. As in the paper, the landscape is that of this D; far from its training data it may be below 0, although mutual
information is not. ``--refit N`` adds the landscape of the supremum in Eq. 8, for which D is trained for another N steps at
every translation.

*A slab of axial slices* through the middle of the labels represents the volume, because translations in x and y do not mix
slices. All metrics use all of its voxels.

*Steps of whole voxels*: translations by a whole number of voxels are exact, while others blur the moving image, which causes
local optima in every metric. Optima are counted with and without the latter.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from DivRegNetLib.core import fields
from DivRegNetLib.core.device import pick_device
from DivRegNetLib.core.grid import Grid
from DivRegNetLib.io import atomic, images
from DivRegNetLib.similarity.kldivnet import KLDivNet
from DivRegNetLib.similarity.lncc import lncc
from DivRegNetLib.similarity.mutual_information import parzen_mi
from training import report

PAIRS = (("T2", "T2"), ("T1", "T2"))  # moving, fixed
CONTROL_POINTS_MM = 20.0
NOTE = """Similarity of BrainWeb/AAL pairs (moving-fixed) over translations in x and y. It tests the claim of arXiv 1908.08767,
Fig. 3, that S is smoother than MI and has fewer local optima. An optimum is a point, or a plateau of equal values, that none
of its eight neighbors exceeds; optima at the border of the grid are counted separately, as the metric may rise further
outside. *Whole voxels* counts only translations by whole voxels, which need no interpolation. *Captured* is the share of the
grid from which steepest ascent over eight neighbors ends at the highest optimum; the *capture range* is the distance from it
within which every start does. S and MI are in nats."""


@dataclass(frozen=True)
class Settings:
    """Settings of the experiment.

    spacing: voxel size, mm.
    slices: number of axial slices of the slab.
    reach, step: translations in x and in y range from -reach to reach in steps of this size, mm.
    steps, samples, learning_rate: training of D: number of Adam steps, patches per step, learning rate.
    misalignment: standard deviation in mm of the translations and control points that D is trained with.
    refit: additional training steps of D at every translation for the refitted landscape; 0 leaves it out.
    seed: seed of D's weights, its training data and the shuffle.
    """

    spacing: float = 2.0
    slices: int = 10
    reach: float = 20.0
    step: float = 1.0
    steps: int = 300
    samples: int = 16384
    learning_rate: float = 0.01
    misalignment: float = 3.0
    refit: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError unless the grid of translations has the aligned position in its middle and neighbors around it."""
        ratio = self.reach / self.step
        if ratio < 1 or abs(ratio - round(ratio)) > 1e-6:
            raise ValueError(f"reach is a whole number of steps, got {self.reach} mm in steps of {self.step} mm")

    @property
    def offsets(self) -> np.ndarray:
        """Translations along one axis in mm, ascending, with 0 in the middle."""
        n = round(self.reach / self.step)
        return np.arange(-n, n + 1) * self.step


PRESETS = {"quick": Settings(spacing=4, slices=16, reach=16, step=4, steps=100, samples=4096), "paper": Settings()}


def load(data: Path, settings: Settings, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """``T1``, ``T2`` and ``labels`` (1 inside the union of the AAL labels), each (1, 1, slices, H, W) float32.

    The grid is along the LPS axes, so that W is x and H is y. Images are smoothed to the resolution of the grid.

    Raises:
        InputError: a file is missing or cannot be read.
    """
    folder = data / "brain_t1t2pd"
    labels = images.read_labels(folder / "aal_labels.nii.gz")
    reference = Grid.of(labels).axis_aligned(settings.spacing).empty_image()
    union = sitk.GetArrayFromImage(
        sitk.Resample(sitk.Cast(labels > 0, sitk.sitkUInt8), reference, sitk.Transform(), sitk.sitkNearestNeighbor)
    )
    inside = union.any((1, 2)).nonzero()[0]
    first = max((inside[0] + inside[-1] + 1 - settings.slices) // 2, 0)
    volumes = {"labels": union}
    for contrast in ("T1", "T2"):
        image = sitk.Cast(images.read_image(folder / f"brainweb_{contrast}.nii.gz"), sitk.sitkFloat32)
        smooth = sitk.DiscreteGaussian(image, (0.4 * settings.spacing) ** 2)
        volumes[contrast] = sitk.GetArrayFromImage(
            sitk.Resample(smooth, reference, sitk.Transform(), sitk.sitkLinear, 0.0)
        )
    slab = slice(first, first + settings.slices)
    return {k: torch.from_numpy(v[slab].astype(np.float32))[None, None].to(device) for k, v in volumes.items()}


def shifted(image: Tensor, x: float, y: float) -> Tensor:
    """``image(p + (x, y, 0))`` for an image (1, 1, D, H, W) and a translation in voxels; 0 outside."""
    points = fields.identity(image.shape[2:], like=image) + image.new_tensor([x, y, 0]).view(1, 3, 1, 1, 1)
    return fields.sample(image, points, padding="zeros")


def misaligned(image: Tensor, settings: Settings, generator: torch.Generator) -> Tensor:
    """The image (1, 1, D, H, W) under a random translation and free-form deformation (linear between control points)."""
    shape = image.shape[2:]
    points = [max(round(n * settings.spacing / CONTROL_POINTS_MM), 1) + 1 for n in shape]
    coarse = torch.randn(1, 3, *points, generator=generator) + torch.randn(1, 3, 1, 1, 1, generator=generator)
    voxels = (coarse * (settings.misalignment / settings.spacing)).to(image)
    smooth = F.interpolate(voxels, size=shape, mode="trilinear", align_corners=True)
    return fields.warp(image, smooth, padding="zeros")


def train(fixed: Tensor, moving: Tensor, settings: Settings, shuffle: str) -> KLDivNet:
    """A KLDivNet trained on a pair (1, 1, D, H, W) whose moving image is :func:`misaligned`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        net = KLDivNet().to(fixed.device)
    generator = torch.Generator().manual_seed(settings.seed)
    return _ascend(
        net, fixed, lambda: misaligned(moving, settings, generator), settings.steps, settings, shuffle, generator
    )


@torch.enable_grad()
def _ascend(
    net: KLDivNet,
    fixed: Tensor,
    moving: Callable[[], Tensor],
    steps: int,
    settings: Settings,
    shuffle: str,
    generator: torch.Generator,
) -> KLDivNet:
    """Maximizes S by Adam; the learning rate falls to 0 along a cosine, so that the last steps add no noise."""
    optimizer = torch.optim.Adam(net.requires_grad_(True).parameters(), lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    for _ in range(steps):
        optimizer.zero_grad()
        s = net(fixed, moving(), samples=settings.samples, shuffle=shuffle, generator=generator)
        (-s).backward()
        optimizer.step()
        schedule.step()
    return net.requires_grad_(False)


def s_value(net: KLDivNet, fixed: Tensor, moving: Tensor, shuffle: str, seed: int) -> float:
    """S over all patches; the shuffle depends only on the seed."""
    generator = torch.Generator().manual_seed(seed)
    return net(fixed, moving, samples=fixed.numel(), shuffle=shuffle, generator=generator).item()


@torch.no_grad()
def landscapes(
    fixed: Tensor, moving: Tensor, labels: Tensor, settings: Settings, progress: Callable[[], object] = lambda: None
) -> dict[str, np.ndarray]:
    """Every metric over the translations of ``moving`` against ``fixed``.

    Args:
        fixed, moving: (1, 1, D, H, W), aligned, with W along x and H along y.
        labels: (1, 1, D, H, W), 1 inside and 0 outside, of both.
        progress: called after every translation.
    Returns:
        name of the metric -> (offsets in y, offsets in x). Dice is that of interpolated labels,
        ``2 sum f m / (sum f + sum m)``.
    """
    nets = {shuffle: train(fixed, moving, settings, shuffle) for shuffle in ("patches", "voxels")}

    def refitted(m: Tensor) -> float:
        generator = torch.Generator().manual_seed(settings.seed)
        net = _ascend(copy.deepcopy(nets["patches"]), fixed, lambda: m, settings.refit, settings, "patches", generator)
        return s_value(net, fixed, m, "patches", settings.seed)

    metrics = {
        "S, patches shuffled": lambda m: s_value(nets["patches"], fixed, m, "patches", settings.seed),
        "S, voxels shuffled": lambda m: s_value(nets["voxels"], fixed, m, "voxels", settings.seed),
        **({"S, patches, refitted": refitted} if settings.refit else {}),
        "MI, 64 bins": lambda m: parzen_mi(fixed, m, bins=64, chunk=4096).item(),
        "LNCC": lambda m: lncc(fixed, m).item(),
    }
    n = len(settings.offsets)
    found = {name: np.empty((n, n)) for name in (*metrics, "Dice")}
    for j, y in enumerate(settings.offsets):
        for i, x in enumerate(settings.offsets):
            m, inside = (shifted(image, x / settings.spacing, y / settings.spacing) for image in (moving, labels))
            for name, metric in metrics.items():
                found[name][j, i] = metric(m)
            found["Dice"][j, i] = (2 * (labels * inside).sum() / (labels.sum() + inside.sum())).item()
            progress()
    return found


def local_optima(values: np.ndarray) -> tuple[int, int]:
    """Local maxima of a landscape (n_y, n_x) under the 8-neighborhood: (inside, on the border).

    A plateau of equal values that no neighbor exceeds is one optimum. It is on the border if any of its points is; a border
    point is compared with the neighbors that it has.
    """
    image = sitk.GetImageFromArray(np.asarray(values, float))
    maxima = sitk.RegionalMaxima(image, backgroundValue=0, foregroundValue=1, fullyConnected=True, flatIsMaxima=True)
    plateaus = sitk.GetArrayFromImage(sitk.ConnectedComponent(sitk.Cast(maxima, sitk.sitkUInt8), True))
    rim = np.concatenate([plateaus[0], plateaus[-1], plateaus[:, 0], plateaus[:, -1]])
    border = len(set(rim.tolist()) - {0})
    return int(plateaus.max()) - border, border


def captured(values: np.ndarray) -> np.ndarray:
    """Starts from which steepest ascent over the 8-neighborhood ends at the highest value; (n_y, n_x) bool.

    On a plateau the ascent stops.
    """
    n, m = values.shape
    padded = np.pad(values, 1, constant_values=-np.inf)
    steps = sorted(((j, i) for j in (-1, 0, 1) for i in (-1, 0, 1)), key=lambda step: step != (0, 0))  # staying first
    around = np.stack([padded[1 + j : 1 + j + n, 1 + i : 1 + i + m] for j, i in steps])
    uphill = np.array([j * m + i for j, i in steps])[around.argmax(0)].ravel() + np.arange(n * m)
    for _ in range(n * m):  # each iteration doubles the length of the paths; it ends long before
        if np.array_equal(doubled := uphill[uphill], uphill):
            break
        uphill = doubled
    return (values.ravel()[uphill] == values.max()).reshape(n, m)


def describe(values: np.ndarray, settings: Settings) -> dict:
    """The row of one landscape (offsets in y, offsets in x) in the table."""
    offsets = settings.offsets
    j, i = np.unravel_index(values.argmax(), values.shape)
    every = max(round(settings.spacing / settings.step), 1)
    start = len(offsets) // 2 % every
    whole = values[start::every, start::every]
    inside, border = local_optima(values)
    reached = captured(values)
    distance = np.hypot(*np.meshgrid(offsets - offsets[i], offsets - offsets[j]))
    return {
        "optimum x mm": float(offsets[i]),
        "optimum y mm": float(offsets[j]),
        "local optima": inside,
        "on the border": border,
        "local optima, whole voxels": local_optima(whole)[0],
        "captured %": 100 * float(reached.mean()),
        "capture range mm": float(min(distance[~reached].min(initial=np.inf), settings.reach)),
        "value at optimum": float(values.max()),
        "value at far corner": float(values[-1, -1]),
    }


def figure(found: dict[str, dict[str, np.ndarray]], settings: Settings, path: Path) -> None:
    """Draws a surface and its contours for each pair (row) and metric (column), as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    x, y = np.meshgrid(settings.offsets, settings.offsets)
    columns = max(map(len, found.values()))
    drawing = Figure(figsize=(3.9 * columns, 3.9 * len(found)))
    drawing.subplots_adjust(left=0.01, right=0.98, bottom=0.03, top=0.95, wspace=0.08, hspace=0.1)
    for row, (pair, metrics) in enumerate(found.items()):
        for column, (name, values) in enumerate(metrics.items()):
            axes = drawing.add_subplot(len(found), columns, row * columns + column + 1, projection="3d")
            low, high = values.min(), values.max()
            floor = low - 0.6 * max(high - low, 1e-6)
            axes.plot_surface(x, y, values, cmap="viridis", rcount=60, ccount=60, linewidth=0.15, edgecolor="#00000040")
            axes.contour(x, y, values, 14, cmap="viridis", offset=floor, linewidths=1)
            j, i = np.unravel_index(values.argmax(), values.shape)
            axes.plot([x[j, i]], [y[j, i]], [floor], marker="+", color="crimson", markersize=9, zorder=10)
            axes.set(zlim=(floor, high), xlabel="x, mm", ylabel="y, mm")
            axes.set_zticks([tick for tick in axes.get_zticks() if low <= tick <= high])
            inside, _ = local_optima(values)
            unit = ", nats" if name.startswith(("S", "MI")) else ""
            axes.set_title(
                f"{pair}: {name}{unit}\n{inside} local optim{'um' if inside == 1 else 'a'}", fontsize=11, y=0.96
            )
            axes.tick_params(labelsize=8, pad=1)
            axes.view_init(elev=24, azim=-55)
            axes.set_box_aspect((1, 1, 0.95), zoom=0.92)
    FigureCanvasAgg(drawing)
    atomic.write_atomically(path, lambda part: drawing.savefig(part, dpi=130))


def run(
    data: Path, output: Path, settings: Settings, device: torch.device | str = "cpu", preset: str = "own"
) -> list[dict]:
    """The whole experiment: ``landscape.md``, ``.csv``, ``.json``, ``.png`` and ``.npz`` (all values) in ``output``.

    Returns:
        The rows of the table, one per pair and metric.
    """
    started = time.monotonic()
    volumes = load(data, settings, device)
    found = {}
    with tqdm(total=len(PAIRS) * len(settings.offsets) ** 2, desc="translations") as bar:
        for moving, fixed in PAIRS:
            pair = (volumes[fixed], volumes[moving], volumes["labels"])
            found[f"{moving}-{fixed}"] = landscapes(*pair, settings, progress=bar.update)
    rows = [
        {"pair": pair, "metric": name} | describe(values, settings)
        for pair, metrics in found.items()
        for name, values in metrics.items()
    ]
    figure(found, settings, output / "landscape.png")
    arrays = {f"{pair}: {name}": values for pair, metrics in found.items() for name, values in metrics.items()}
    atomic.write_atomically(
        output / "landscape.npz", lambda part: np.savez(part, offsets_mm=settings.offsets, **arrays)
    )
    about = {"preset": preset, "settings": asdict(settings), "seeds": [settings.seed], "device": str(device)}
    about |= {"shape": list(volumes["T2"].shape[2:]), "seconds": round(time.monotonic() - started, 1), "note": NOTE}
    report.write(output, "landscape", rows, about)
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with brain_t1t2pd")
    parser.add_argument(
        "--preset", choices=PRESETS, default="quick", help="quick: 9x9, a minute; paper: 41x41 every mm"
    )
    parser.add_argument(
        "--refit",
        type=int,
        default=0,
        metavar="N",
        help="also compute S with D trained for N more steps at every translation",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, default=Path("build/experiments/landscape"))
    args = parser.parse_args(arguments)
    settings = replace(PRESETS[args.preset], refit=args.refit, seed=args.seed)
    rows = run(args.data, args.output, settings, pick_device(args.device), args.preset)
    print(f"\n{report.table(rows)}\n\n{args.output / 'landscape.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
