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
    done = subprocess.run([*script, *files, "--transform", str(tmp_path / "t.h5")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    picture = sitk.GetArrayFromImage(sitk.ReadImage(tmp_path / "out.png")).astype(int)
    assert picture.shape == (1200, 1200, 3)
    before, after, grid = picture[:400, :400], picture[:400, 400:800], picture[:400, 800:]
    assert len(np.unique(after)) > 1 and np.abs(before - after).max() > 50
    colored = [(np.ptp(view, axis=-1) > 60).sum() for view in (after, grid)]
    assert colored[0] == 0 and colored[1] > 500  # the lines of the grid are colored by displacement


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
    assert (tmp_path / "panel.png").stat().st_size > 20_000
