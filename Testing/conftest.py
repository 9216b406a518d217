"""Fixtures for all tests: rotated, anisotropic grids, a head that can be evaluated at any point, a tiny model."""

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import settings

from DivRegNetLib import models
from DivRegNetLib.core import fields
from DivRegNetLib.core.grid import Grid, apply_matrix
from DivRegNetLib.registration.regnet import RegNet, RegNetConfig
from DivRegNetLib.registration.variational import DEFAULT, REFINEMENT
from DivRegNetLib.similarity.kldivnet import KLDivNet, KLDivNetConfig

settings.register_profile("divregnet", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("divregnet")

TESTING = Path(__file__).resolve().parent

HEAD_CENTER = np.array([31.0, -47.0, 112.0])
HEAD_RADIUS = 50.0
# Center and width (radii), height. Nothing is symmetric, so that every rotation can be told from every other.
STRUCTURES = (
    ((0.30, 0.35, 0.15), 0.28, 0.50),
    ((-0.35, 0.20, -0.30), 0.20, 0.40),
    ((0.05, -0.50, 0.30), 0.25, -0.35),
    ((-0.25, -0.15, 0.45), 0.15, 0.45),
    ((0.45, -0.25, -0.35), 0.18, -0.30),
)


def pytest_collection_modifyitems(items) -> None:
    """Marks each test with the name of its folder, so that ``pytest -m unit`` runs those of one."""
    for item in items:
        item.add_marker(item.path.relative_to(TESTING).parts[0])


def _rotation(degrees) -> np.ndarray:
    euler = sitk.Euler3DTransform()
    euler.SetRotation(*np.radians(degrees).tolist())
    return np.reshape(euler.GetMatrix(), (3, 3))


def _grid_about(center, size, spacing, direction) -> Grid:
    matrix = np.eye(4)
    matrix[:3, :3] = direction * np.asarray(spacing, float)
    matrix[:3, 3] = center - matrix[:3, :3] @ ((np.asarray(size) - 1) / 2)
    return Grid(size, matrix)


@pytest.fixture(scope="session")
def sample_data() -> Path:
    """The folder of the bundled pairs."""
    return Path(__file__).resolve().parent.parent / "Resources" / "SampleData"


@pytest.fixture(scope="session")
def grid() -> Grid:
    """The default grid: rotated, anisotropic, off-center, three different sides; the phantom is inside."""
    return _grid_about((33.0, -48.5, 113.0), (20, 26, 18), (6.0, 5.0, 7.5), _rotation((12, -8, 25)))


@pytest.fixture(scope="session")
def moving_grid() -> Grid:
    """Another grid over the phantom that shares nothing with the default one: left-handed, axes exchanged."""
    exchanged = np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]) @ np.diag([1.0, 1.0, -1.0])
    return _grid_about((28.0, -45.0, 116.0), (27, 17, 23), (5.0, 8.0, 6.0), _rotation((-15, 10, 8)) @ exchanged)


@pytest.fixture(scope="session")
def grid_about():
    """``(center, size, spacing, degrees) -> Grid``: centered on an LPS point, rotated by angles about x, y and z."""
    return lambda center, size, spacing, degrees=(0, 0, 0): _grid_about(center, size, spacing, _rotation(degrees))


@pytest.fixture(scope="session")
def rigid():
    """``(degrees, shift=(0, 0, 0)) -> (4, 4)``: rotation about the middle of the phantom, then a shift in mm, LPS."""

    def build(degrees, shift=(0.0, 0.0, 0.0)) -> np.ndarray:
        matrix = np.eye(4)
        matrix[:3, :3] = _rotation(degrees)
        matrix[:3, 3] = HEAD_CENTER - matrix[:3, :3] @ HEAD_CENTER + shift
        return matrix

    return build


@pytest.fixture(scope="session")
def phantom():
    """A head of about 50 mm radius: ``points (..., 3) in LPS mm -> intensities (...)``, smooth, 0 to about 1."""

    def head(points) -> np.ndarray:
        x = (np.asarray(points, float) - HEAD_CENTER) / HEAD_RADIUS
        tissue = 0.45 + sum(
            height * np.exp(-((x - center) ** 2).sum(-1) / (2 * width**2)) for center, width, height in STRUCTURES
        )
        return tissue / (1 + np.exp(-12 * (1 - np.linalg.norm(x / (0.95, 1.1, 1.0), axis=-1))))

    return head


@pytest.fixture(scope="session")
def other_contrast():
    """A smooth intensity map that is not monotone: what was dark, middling and bright becomes dark, bright, gray."""
    return lambda values: 0.8 * np.sin(np.pi * values) + 0.2 * values


@pytest.fixture(scope="session")
def paint(phantom):
    """``(grid, to_phantom=None, contrast=None) -> image``: the phantom on a grid, evaluated exactly, as float32.

    to_phantom: (4, 4) LPS map, or a function of points (n, 3), from the grid's points to the phantom's.
    contrast: function of the intensities.
    """

    def image(grid: Grid, to_phantom=None, contrast=None) -> sitk.Image:
        k, j, i = np.indices(grid.shape)
        points = grid.to_physical(np.stack([i, j, k], -1))
        if callable(to_phantom):
            points = to_phantom(points.reshape(-1, 3)).reshape(points.shape)
        elif to_phantom is not None:
            points = apply_matrix(to_phantom, points)
        values = phantom(points)
        return grid.image((values if contrast is None else contrast(values)).astype(np.float32))

    return image


@pytest.fixture(scope="session")
def landmarks() -> np.ndarray:
    """Points inside the phantom, (27, 3) LPS mm."""
    axes = [np.array([-25.0, 0.0, 25.0])] * 3
    return HEAD_CENTER + np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)


@pytest.fixture
def tiny_model(tmp_path, monkeypatch) -> str:
    """The name of a saved model of two channels per level whose random field is of about a voxel, found by name."""
    folder = tmp_path / "models"
    monkeypatch.setenv(models.ENVIRONMENT, str(folder))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        regnet = RegNet(RegNetConfig(channels=(2, 2, 2, 2)))
        torch.nn.init.normal_(regnet.head.weight, std=0.05)
        kldivnet = KLDivNet(KLDivNetConfig(channels=4))
    card = models.Card(
        name="tiny",
        version="1.0",
        summary="Untrained, for tests",
        modalities=["T1", "T2"],
        anatomy="phantom",
        skull="not applicable",
        spacing_mm=6.0,
        normalization="robust",
        methods=["regnet"],
        variational=DEFAULT.as_dict(),
        refinement=REFINEMENT.as_dict(),
        regnet=regnet.config.as_dict(),
        kldivnet=kldivnet.config.as_dict(),
        training={"data": "none"},
        scores={},
        license="Apache-2.0",
        sha256="",
    )
    models.save(folder, card, regnet, kldivnet)
    return card.name


@pytest.fixture(scope="session")
def write_cohort():
    """``(folder, volumes, spacing=4.0, **about) -> folder``: a prepared cohort, as training/data/cohort.py reads it.

    volumes: name -> arrays of its file and ``subject``, ``role``, ``split``, ``contrasts``, where they are not its name,
    ``both``, ``train`` and ``image``.
    """

    def write(folder: Path, volumes: dict[str, dict], spacing: float = 4.0, **about) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        entries = []
        for name, volume in volumes.items():
            arrays = {k: np.asarray(v) for k, v in volume.items() if k in ("images", "labels", "brain")}
            np.savez(folder / f"{name}.npz", **arrays)
            rest = {k: v for k, v in volume.items() if k not in arrays}
            entries.append(
                {"name": name, "subject": name, "role": "both", "split": "train", "contrasts": ["image"]} | rest
            )
        listed = {"format": 2, "spacing": spacing, "shape": next(iter(arrays.values())).shape[-3:], "origin": [1, -2, 3],
                  "normalization": "robust", "volumes": entries} | about  # fmt: skip
        (folder / "cohort.json").write_text(json.dumps(listed))
        return folder

    return write


@pytest.fixture(scope="session")
def anatomy():
    """``(shape, seed=0) -> (images (3, D, H, W) float16, labels uint8, brain bool)``: T1, T2 and PD of a small head.

    Each seed bends the same head otherwise.
    """

    def build(shape: tuple[int, int, int], seed: int = 0):
        random = torch.Generator().manual_seed(0)
        coarse = torch.rand(1, 1, 6, 7, 6, generator=random)
        axes = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in shape), indexing="ij")
        inside = (sum(x.square() for x in axes).sqrt() < 0.8)[None, None].float()
        texture = torch.nn.functional.interpolate(coarse, size=shape, mode="trilinear")
        if seed:
            knots = torch.randn(1, 3, 4, 4, 4, generator=random.manual_seed(seed)) * 0.05 * min(shape)
            bent = torch.nn.functional.interpolate(knots, size=shape, mode="trilinear")
            inside, texture = fields.warp(inside, bent, mode="nearest"), fields.warp(texture, bent)
        t1 = (0.2 + texture) * inside
        t1 = t1 / t1.max()
        labels = (1 + (texture * 3).floor().clamp(0, 2)) * inside
        images = torch.cat((t1, 0.9 * torch.sin(torch.pi * t1), inside * (1 - t1 / 2)), 1)[0]
        return images.half().numpy(), labels[0, 0].byte().numpy(), inside[0, 0].bool().numpy()

    return build


@pytest.fixture(scope="session")
def tiny_cohort(tmp_path_factory, write_cohort, anatomy) -> Path:
    """Two kinds of images of seven subjects, 16 x 32 x 16 voxels of 4 mm: three to train on, two and two held out."""
    volumes = {}
    for i, split in enumerate(("train",) * 3 + ("validation",) * 2 + ("test",) * 2):
        images, labels, _ = anatomy((16, 32, 16), seed=i + 1)
        volumes[f"v{i}"] = {"images": images[:2], "labels": labels, "split": split, "contrasts": ["T1", "T2"]}
    return write_cohort(tmp_path_factory.mktemp("tiny") / "cohort", volumes)


@pytest.fixture(scope="session")
def head_cohort(tmp_path_factory, write_cohort, anatomy) -> Path:
    """What phantoms and synthesis need: a template of three contrasts and a label map, 32 x 32 x 32 voxels of 4 mm."""
    volumes = {}
    for name, seed in (("template", 0), ("map", 1)):
        images, labels, brain = anatomy((32, 32, 32), seed)
        volumes[name] = {"labels": labels, "brain": brain, "contrasts": []}
        if name == "template":
            volumes[name] |= {"images": images, "contrasts": ["T1", "T2", "PD"]}
    folder = tmp_path_factory.mktemp("head") / "cohort"
    return write_cohort(folder, volumes, tissues=["background", "white", "gray", "fluid"])
