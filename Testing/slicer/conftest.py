"""Fixtures of the Slicer module's tests: a scene of real MRML nodes, and the panel on the stand-in for Slicer."""

import gc

import pytest
import SimpleITK as sitk
from panel import add_blob, card, stand_in

from DivRegNetLib import models

OPTIONS = {"model": "bold", "device": "cpu", "align": "none"}


# --- nodes in a scene


@pytest.fixture
def scene():
    slicer = pytest.importorskip("slicer")
    return slicer.vtkMRMLScene()


@pytest.fixture
def fixed(scene, grid, paint):
    from mrml_scenes import add_volume

    return add_volume(scene, paint(grid), "T1 head")


@pytest.fixture
def moving(scene, moving_grid, paint, other_contrast):
    from mrml_scenes import add_volume

    image = paint(moving_grid, contrast=other_contrast)
    return add_volume(scene, sitk.Cast(image * 1000 + 200, sitk.sitkInt16), "T2 head")


@pytest.fixture
def center(grid):
    """Middle of the fixed volume, RAS mm."""
    from mrml_scenes import RAS

    return grid.center * RAS


@pytest.fixture
def register(tiny_model):
    """``register_nodes`` with a tiny model that moves things by several mm, no initial alignment."""
    from DivRegNetModule import mrml
    from mrml_scenes import save_bold_model

    save_bold_model(tiny_model, "bold")
    return lambda fixed, moving, **options: mrml.register_nodes(fixed, moving, **(OPTIONS | options))


@pytest.fixture
def registered(fixed, moving, register, center):
    """A registration of a moving volume that is under a transform of its own."""
    from mrml_scenes import put_under, turned

    put_under(moving, turned(8, center, (2, -1, 1)), "own")
    return register(fixed, moving, inverse_node=True)


# --- the panel


@pytest.fixture
def app():
    """Slicer's application. What a test leaves is never collected: VTK would call observers that Python's collector has
    taken apart already, which ends the process."""
    gc.disable()
    with stand_in() as application:
        yield application
    gc.freeze()
    gc.enable()


@pytest.fixture
def prepared() -> list[dict]:
    """Options of the processes that the panel asked for in advance; none is started, as each would cost seconds."""
    return []


@pytest.fixture
def module(app, tmp_path, monkeypatch, prepared):
    """The module file, as Slicer loads it; with a tiny model of random weights as the only one."""
    import torch
    from render_panel import load_module

    from DivRegNetLib.registration.regnet import RegNet, RegNetConfig

    torch.manual_seed(0)
    config = RegNetConfig(channels=(2, 2, 2, 2))
    folder = tmp_path / "models"
    for name in (models.DEFAULT, "other"):
        models.save(folder, card(name=name, regnet=config.as_dict(), spacing_mm=4.0), RegNet(config), None)
    monkeypatch.setenv(models.ENVIRONMENT, str(folder))
    loaded = load_module(app)
    from DivRegNetModule.run import STANDBY

    monkeypatch.setattr(STANDBY, "prepare", lambda **options: prepared.append(options))
    yield loaded
    STANDBY.close()


@pytest.fixture
def widget(module):
    from render_panel import make_widget

    made = make_widget(module)
    yield made
    made.cleanup()


@pytest.fixture
def pair(app):
    """Two blobs on unlike oblique grids, in the scene."""
    return add_blob("fixed", (30, 26, 22), 0.0), add_blob("moving", (24, 30, 26), 3.0)


@pytest.fixture
def ready(widget, pair):
    """The widget with two volumes chosen, no initial alignment (the fastest), on the CPU."""
    p = widget._parameterNode
    p.fixedVolume, p.movingVolume = pair
    p.alignment = type(p.alignment).NONE
    p.device = "cpu"
    return widget


@pytest.fixture
def without_torch(monkeypatch, module):
    from DivRegNetModule import first_use

    there = {"version": ""}
    monkeypatch.setattr(first_use, "torch_version", lambda: there["version"])
    return there
