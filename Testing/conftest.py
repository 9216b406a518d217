"""What all tests stand on: grids that are never convenient, a head that can be evaluated anywhere, a tiny model."""

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import settings

from DivRegNetLib import models
from DivRegNetLib.geometry import Grid, apply_matrix
from DivRegNetLib.regnet import RegNet, RegNetConfig
from DivRegNetLib.similarity import KLDivNet, KLDivNetConfig

settings.register_profile("divregnet", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("divregnet")

HEAD_CENTRE = np.array([31.0, -47.0, 112.0])
HEAD_RADIUS = 50.0
# Centre and width (radii), height. Nothing is symmetric, so that every rotation can be told from every other.
STRUCTURES = (
    ((0.30, 0.35, 0.15), 0.28, 0.50),
    ((-0.35, 0.20, -0.30), 0.20, 0.40),
    ((0.05, -0.50, 0.30), 0.25, -0.35),
    ((-0.25, -0.15, 0.45), 0.15, 0.45),
    ((0.45, -0.25, -0.35), 0.18, -0.30),
)


def _rotation(degrees) -> np.ndarray:
    euler = sitk.Euler3DTransform()
    euler.SetRotation(*np.radians(degrees).tolist())
    return np.reshape(euler.GetMatrix(), (3, 3))


def _grid_about(centre, size, spacing, direction) -> Grid:
    matrix = np.eye(4)
    matrix[:3, :3] = direction * np.asarray(spacing, float)
    matrix[:3, 3] = centre - matrix[:3, :3] @ ((np.asarray(size) - 1) / 2)
    return Grid(size, matrix)


@pytest.fixture(scope="session")
def sample_data() -> Path:
    """The folder of the bundled pairs."""
    return Path(__file__).resolve().parent.parent / "Resources" / "SampleData"


@pytest.fixture(scope="session")
def grid() -> Grid:
    """The default grid: rotated, anisotropic, off-centre, three different sides; the phantom is inside."""
    return _grid_about((33.0, -48.5, 113.0), (20, 26, 18), (6.0, 5.0, 7.5), _rotation((12, -8, 25)))


@pytest.fixture(scope="session")
def moving_grid() -> Grid:
    """Another grid over the phantom that shares nothing with the default one: left-handed, axes exchanged."""
    exchanged = np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]) @ np.diag([1.0, 1.0, -1.0])
    return _grid_about((28.0, -45.0, 116.0), (27, 17, 23), (5.0, 8.0, 6.0), _rotation((-15, 10, 8)) @ exchanged)


@pytest.fixture(scope="session")
def grid_about():
    """``(centre, size, spacing, degrees) -> Grid``: centred on an LPS point, rotated by angles about x, y and z."""
    return lambda centre, size, spacing, degrees=(0, 0, 0): _grid_about(centre, size, spacing, _rotation(degrees))


@pytest.fixture(scope="session")
def rigid():
    """``(degrees, shift=(0, 0, 0)) -> (4, 4)``: rotation about the middle of the phantom, then a shift in mm, LPS."""

    def build(degrees, shift=(0.0, 0.0, 0.0)) -> np.ndarray:
        matrix = np.eye(4)
        matrix[:3, :3] = _rotation(degrees)
        matrix[:3, 3] = HEAD_CENTRE - matrix[:3, :3] @ HEAD_CENTRE + shift
        return matrix

    return build


@pytest.fixture(scope="session")
def phantom():
    """A head of about 50 mm radius: ``points (..., 3) in LPS mm -> intensities (...)``, smooth, 0 to about 1."""

    def head(points) -> np.ndarray:
        x = (np.asarray(points, float) - HEAD_CENTRE) / HEAD_RADIUS
        tissue = 0.45 + sum(
            height * np.exp(-((x - centre) ** 2).sum(-1) / (2 * width**2)) for centre, width, height in STRUCTURES
        )
        return tissue / (1 + np.exp(-12 * (1 - np.linalg.norm(x / (0.95, 1.1, 1.0), axis=-1))))

    return head


@pytest.fixture(scope="session")
def other_contrast():
    """A smooth intensity map that is not monotone: what was dark, middling and bright becomes dark, bright, grey."""
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
    return HEAD_CENTRE + np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)


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
        normalisation="robust",
        regnet=regnet.config.as_dict(),
        kldivnet=kldivnet.config.as_dict(),
        training={"data": "none"},
        scores={},
        licence="Apache-2.0",
        sha256="",
    )
    models.save(folder, card, regnet, kldivnet)
    return card.name
