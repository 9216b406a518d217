"""The programs that render the panel and slice views."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from panel import stand_in

SMALL = ["--side", "200", "--rows", "Axial"]
ROOT = Path(__file__).resolve().parents[2]


def test_slice_views_are_rendered_and_differ_between_fixed_on_moving_and_fixed_on_warped(tmp_path):
    import ctypes.util

    import SimpleITK as sitk

    if sys.platform != "linux" or not (os.environ.get("DISPLAY") or ctypes.util.find_library("OSMesa")):
        pytest.skip("there is neither a display nor OSMesa to render with")
    k, j, i = np.indices((20, 24, 28))
    for name, shift in (("fixed", 0), ("moving", 6)):
        array = 100.0 * ((i - 14 - shift) ** 2 + (j - 12) ** 2 + (k - 10) ** 2 < 50)
        sitk.WriteImage(sitk.GetImageFromArray(array.astype(np.float32)), tmp_path / f"{name}.nii.gz")
    sitk.WriteTransform(sitk.TranslationTransform(3, (6.0, 0.0, 0.0)), tmp_path / "t.h5")
    files = [str(tmp_path / name) for name in ("fixed.nii.gz", "moving.nii.gz", "fixed.nii.gz", "out.png")]
    script = [sys.executable, str(ROOT / "Testing" / "tools" / "render_slices.py")]
    done = subprocess.run(
        [*script, *files, "--transform", str(tmp_path / "t.h5"), *SMALL], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    picture = sitk.GetArrayFromImage(sitk.ReadImage(tmp_path / "out.png")).astype(int)
    assert picture.shape == (200, 800, 3)
    before, after, board, grid = np.split(picture, 4, axis=1)
    assert len(np.unique(after)) > 1 and np.abs(before - after).max() > 50
    assert after[0].max() < 20  # air stays black
    orange = [(np.abs(view - (255, 191, 77)).max(-1) < 40).sum() for view in (after, board, grid)]
    assert orange[0] == orange[1] == 0 and orange[2] > 200  # the lines of the grid
    assert (np.ptp(after, axis=-1) > 60).any() and not (
        np.ptp(board, axis=-1) > 60
    ).any()  # the upper volume is in color


def test_the_panel_is_rendered(tmp_path, monkeypatch):
    stages = {"before": 1.0, "aligned": 1.1, "after": 1.2}
    quality = {
        "nmi": stages,
        "labels": {s: {"mean": {"dice": 0.5}} for s in stages},
        "landmarks_mm": {s: {"mean": 2.0} for s in stages},
    }
    report = {"quality": quality, "seconds": {"deform": 1.5}, "settings": {"device": "cpu"}}
    (tmp_path / "quality.json").write_text(json.dumps(report))
    with stand_in():
        pass
    spec = importlib.util.find_spec("render_panel")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(tmp_path, tmp_path / "panel.png")
    assert (tmp_path / "panel.png").stat().st_size > 8_000
