"""Time and memory of a registration against the size of its volumes; each size runs in a process of its own.

The bundled pair is stretched over a volume with the spacing SPACING_MM, so that a larger volume has a larger field of view
and not just smaller voxels. The second run is timed, as in a cohort; the peak memory is that of the process.

    python -m training.benchmarks.scaling WIDTH HEIGHT DEPTH MODEL DEVICE
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from DivRegNetLib import models
from DivRegNetLib.core.device import pick_device
from DivRegNetLib.core.grid import Grid
from DivRegNetLib.io import atomic, images
from DivRegNetLib.registration import pipeline
from training.benchmarks import methods
from training.benchmarks.cases import SAMPLE
from training.benchmarks.measure import MIB, Settings

SIZES = ((64, 64, 64), (128, 128, 128), (192, 192, 192), (256, 256, 256), (512, 512, 200), (512, 512, 400))
SPACING_MM = 0.8  # of a CT of 512 x 512 pixels over 410 mm


def stretched(image: sitk.Image, size: tuple[int, int, int]) -> sitk.Image:
    """An image stretched over ``size`` voxels of SPACING_MM, int16."""
    here, there = Grid.of(image), Grid.build(size, [SPACING_MM] * 3)
    scale = np.diag([n * s / (m * SPACING_MM) for n, s, m in zip(here.size, here.spacing, size, strict=True)])
    transform = sitk.AffineTransform(3)
    directions = here.matrix[:3, :3] / here.spacing
    matrix = directions @ scale
    transform.SetMatrix(matrix.ravel().tolist())
    transform.SetTranslation((here.center - matrix @ there.center).tolist())
    return sitk.Cast(sitk.Resample(image, there.empty_image(), transform, sitk.sitkLinear, 0.0), sitk.sitkInt16)


def measure_size(size: tuple[int, int, int], model: str, device: str) -> dict:
    """Registers volumes of ``size`` voxels twice in this process, and measures the second run."""
    fixed, moving = (
        stretched(images.read_image(SAMPLE / f"{name}.nii.gz"), size) for name in ("fixed_T1", "moving_T2")
    )
    loaded = models.load(model, pick_device(device))
    before = methods.reset_peak()
    for _ in range(2):
        result = None
        result = pipeline.register(fixed, moving, model=loaded, device=device)
    gpu = methods.gpu_peak()
    return {
        "size": " x ".join(map(str, size)),
        "working size": " x ".join(map(str, result.settings["working_size"])),
        "working mm": result.settings["spacing"],
        **{f"{stage} s": seconds for stage, seconds in result.timings.items() if stage != "check"},
        "total s": sum(result.timings.values()),
        "peak MiB": methods.peak() / MIB,
        "above start MiB": (methods.peak() - before) / MIB,
        "GPU MiB": None if gpu is None else gpu / MIB,
    }


def row(size: tuple[int, int, int], settings: Settings, kept: Path) -> dict:
    """The result of :func:`measure_size` in a process of its own, or the one in the file ``kept``."""
    if kept.exists():
        return json.loads(kept.read_text())
    command = [sys.executable, "-m", "training.benchmarks.scaling", *map(str, size), settings.model, settings.device]
    done = subprocess.run(command, capture_output=True, text=True, env=settings.environment())
    if done.returncode:
        message = (done.stderr.strip() or f"ended with {done.returncode}").splitlines()[-1]
        return {"size": " x ".join(map(str, size)), "failed": message[:200]}
    measured = json.loads(done.stdout.splitlines()[-1])
    atomic.write_json(measured, kept)
    return measured


if __name__ == "__main__":
    *numbers, name, where = sys.argv[1:]
    print(json.dumps(measure_size(tuple(map(int, numbers)), name, where)))
