"""For tests of the panel: the stand-in for Slicer, two volumes, a model card, and waiting for a run."""

import os
import time

import numpy as np
import pytest

from DivRegNetLib import models


def card(**changes) -> models.Card:
    """A model card for tests, with some fields changed."""
    values = {
        "name": "test", "version": "1", "summary": "a test", "modalities": ["T1", "T2"], "anatomy": "head",
        "skull": "either", "spacing_mm": 2.0, "normalization": "robust",
        "methods": ["regnet"], "variational": {}, "refinement": {},
        "regnet": {"channels": [2, 2, 2, 2], "stride": 2}, "kldivnet": None, "training": {"data": "noise"}, "scores": {},
        "license": "Apache-2.0", "sha256": "",
    }  # fmt: skip
    return models.Card(**(values | changes))


def stand_in():
    """The stand-in for Slicer, as a context manager; skips the test where it cannot run."""
    try:
        from slicer_stand_in import running
        from slicer_stand_in import widgets as _widgets  # noqa: F401 -- needs PySide6 and its system libraries
    except ImportError as error:
        pytest.skip(f"PySide6, slicer-core or a system library that they need is not there: {error}")
    return running()


def add_blob(name: str, size, shift: float):
    """A volume node with a round blob on an oblique grid; ``shift`` in mm along the first axis."""
    import slicer

    k, j, i = np.indices(size[::-1])
    middle = (np.array(size) - 1) / 2
    r = np.sqrt((3 * (i - middle[0] - shift / 3)) ** 2 + (3 * (j - middle[1])) ** 2 + (3.5 * (k - middle[2])) ** 2)
    array = (600 / (1 + np.exp((r - 25) / 3)) + 200 / (1 + np.exp((r - 12) / 3))).astype(np.int16)
    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", name)
    slicer.util.updateVolumeFromArray(node, array)
    matrix = np.eye(4)
    angle = 0.2
    matrix[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    matrix[:3, :3] = matrix[:3, :3] @ np.diag([3.0, 3.0, 3.5])
    matrix[:3, 3] = -matrix[:3, :3] @ middle
    node.SetIJKToRASMatrix(slicer.util.vtkMatrixFromArray(matrix))
    node.CreateDefaultDisplayNodes()
    return node


def wait(widget, seconds: float = 120.0, until=lambda: False) -> None:
    """Turns the event loop, which the widget's own timer polls the worker from, until the run is over."""
    import slicer

    end = time.monotonic() + seconds
    while widget._running is not None and not until():
        assert time.monotonic() < end, "the run does not end"
        slicer.app.processEvents()
        time.sleep(0.01)


def census() -> set[str]:
    """The ids of all nodes in the scene."""
    import slicer

    return {slicer.mrmlScene.GetNthNode(i).GetID() for i in range(slicer.mrmlScene.GetNumberOfNodes())}


def alive(pid: int) -> bool:
    """Whether there is a process of this id."""
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def worker_pid(widget) -> int:
    """The process of the widget's run, once it has been started."""
    wait(widget, until=lambda: widget._run.pid is not None)
    return widget._run.pid


def wait_for(condition, seconds: float = 60.0) -> None:
    """Turns the event loop until a condition holds."""
    import slicer

    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come"
        slicer.app.processEvents()
        time.sleep(0.005)


def layers() -> list[tuple]:
    """Background, foreground, opacity and link of each slice view."""
    import slicer

    return [
        (
            view.GetBackgroundVolumeID(),
            view.GetForegroundVolumeID(),
            view.GetForegroundOpacity(),
            view.GetLinkedControl(),
        )
        for view in slicer.util.getNodesByClass("vtkMRMLSliceCompositeNode")
    ]
