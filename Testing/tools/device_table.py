"""What a device takes, in one table: stages, forward pass, alignment, outputs, training, and how far it is from the CPU.

    python Testing/tools/benchmark.py --table [--device cuda] [--data DIR]

* Stages of the bundled pair and of the same on 256 x 256 x 180 voxels of 1 mm: the first registration of the process, and
  the third. On a GPU the third plays the forward pass that was recorded in the second.
* Forward pass of the bundled model on 96 x 112 x 96 and 160 x 192 x 160 voxels: operations that compute, waits, on a GPU
  started kernels and the milliseconds that it was busy, milliseconds as they come and recorded.
* Training steps a second of the bundled model and of RegNet alone as in arXiv 1908.08767, on volumes of random shapes on the
  grid of AAL Brain at 2 mm.
* The distance in mm between the transforms of the device and of the CPU, of the bundled pair and, with ``--data``, of a pair
  of hippocampus crops and MS07.

Milliseconds depend on what else the machine does: let nothing else run.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "Testing" / "helpers"), str(ROOT / "Testing" / "tools")]

SHAPES = ((96, 112, 96), (160, 192, 160))
REPEATED = 4  # forward passes, of which the fastest counts
AAL = (91, 109, 91)  # voxels of AAL Brain at 2 mm, D, H, W
TRAINING_SECONDS = 20.0  # of steps that are timed, at most
PAIRS = {
    "hippocampus": ("hippocampus/images/hippocampus_309.nii.gz", "hippocampus/images/hippocampus_310.nii.gz"),
    "MS07 T2 to T1": ("brain_multicontrast/ms07_T1.nii.gz", "brain_multicontrast/ms07_T2.nii.gz"),
}
"""Name -> fixed and moving file in ``--data``."""


def synchronize(device) -> None:
    """Waits for what a GPU has been asked for."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def stages(device) -> None:
    from benchmark import volumes

    from DivRegNetLib import models
    from DivRegNetLib.registration.pipeline import register

    model = models.load(models.DEFAULT, device)
    print(f"{'registration':28}{'call':>6}" + "".join(f"{s:>9}" for s in STAGES) + f"{'total s':>9}{'GPU MiB':>9}")
    for case in ("demo", "large"):
        fixed, moving = volumes(case)
        for call in (1, 2, 3):
            times = register(fixed, moving, model=model, device=str(device)).timings
            if call != 2:
                size = " x ".join(map(str, fixed.GetSize()))
                values = "".join(f"{times[s]:9.3f}" for s in STAGES)
                print(f"{size:28}{call:6}{values}{sum(times.values()):9.2f}{_peak(device):>9}", flush=True)


STAGES = ("check", "align", "sample", "deform", "fields", "outputs")


def _peak(device) -> str:
    import torch

    return f"{torch.cuda.max_memory_allocated(device) / 2**20:.0f}" if device.type == "cuda" else "-"


def forward_passes(device) -> None:
    import torch
    from operators import operators
    from textures import deformed
    from torch.profiler import ProfilerActivity, profile

    from DivRegNetLib import models
    from DivRegNetLib.registration import methods

    model = models.load(models.DEFAULT, device)
    arguments = tuple(model.card.methods), model.card.variational_settings, model.regnet
    titles = ("computing", "waits", "launches", "busy ms", "ms", "recorded ms", "voxels apart")
    print(f"\n{'forward pass':28}" + "".join(f"{title:>13}" for title in titles))
    for shape in SHAPES:
        moving, fixed, _ = (x.to(device) for x in deformed(shape, 2.0, seed=0))
        valid = (torch.ones_like(fixed, dtype=torch.bool),) * 2
        images = methods.Images(fixed, moving, valid=valid, measured=fixed.numel())

        def run(images=images):
            return methods.deform(images, *arguments)

        def recorded(images=images):
            return methods.recorded_deform(model.recorder(), room=True)(images, *arguments)

        with torch.inference_mode():
            plain, played = (_milliseconds(function, device) for function in (run, recorded))
            apart = (recorded() - run()).abs().max().item()
        counted, launches, busy = operators(run), "-", "-"
        if device.type == "cuda":
            with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
                run()
                synchronize(device)
            launches = sum("LaunchKernel" in event.name for event in profiled.events())
            busy = f"{sum(event.self_device_time_total for event in profiled.key_averages()) / 1e3:.1f}"
        row = (
            sum(counted.kernels.values()),
            sum(counted.waits.values()),
            launches,
            busy,
            f"{plain:.1f}",
            f"{played:.1f}",
            f"{apart:.4f}",
        )
        print(f"{' x '.join(map(str, shape)):28}" + "".join(f"{value:>13}" for value in row), flush=True)


def _milliseconds(function, device) -> float:
    """Of the fastest of some calls after the first two."""
    times = []
    for _ in range(2 + REPEATED):
        synchronize(device)
        started = time.perf_counter()
        function()
        synchronize(device)
        times.append(1e3 * (time.perf_counter() - started))
    return min(times[2:])


def training(device) -> None:
    from lightning_fabric import Fabric

    from training import config as configs
    from training.data.sources import source_of
    from training.trainer import Trainer

    folder = ROOT / "training" / "configs"
    with tempfile.TemporaryDirectory() as place:
        cohort = _cohort(Path(place) / "cohort")
        general = configs.load(folder / "general.yaml", overrides=["warmup=0", f"data.cohort={cohort}"])
        paper = configs.load(folder / "aal-brain.yaml", overrides=["warmup=0", f"data.cohort={cohort}"])
        print(f"\n{'training':52}{'steps a second':>16}")
        for name, config in (("the bundled model", general), (f"{paper.name}, {' x '.join(map(str, AAL))}", paper)):
            kind = "cuda" if device.type == "cuda" else "cpu"
            fabric = Fabric(accelerator=kind, devices=1, precision=config.precision)
            fabric.launch()
            trainer = Trainer(config, source_of(config, fabric.device), fabric)
            for _ in range(2):
                trainer.step()
            synchronize(fabric.device)
            started, steps = time.perf_counter(), 0
            while steps < 50 and time.perf_counter() - started < TRAINING_SECONDS:
                trainer.step()
                steps += 1
            synchronize(fabric.device)
            print(f"{name:52}{steps / (time.perf_counter() - started):16.2f}", flush=True)


def _cohort(folder: Path) -> Path:
    """A cohort of one head with three contrasts and one label map, both of random blobs."""
    import torch

    random = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, 4, 10, 12, 10, generator=random)
    noise = torch.nn.functional.interpolate(coarse, size=AAL, mode="trilinear")[0]
    axes = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in AAL), indexing="ij")
    inside = sum(x.square() for x in axes) < 0.7
    labels = ((1 + noise.argmax(0)) * inside).byte().numpy()
    images = (noise[:3].sigmoid() * inside).half().numpy()
    folder.mkdir(parents=True)
    brain = inside.numpy()
    np.savez(folder / "head.npz", images=images, labels=labels, brain=brain)
    np.savez(folder / "map.npz", labels=labels, brain=brain)
    volumes = [
        {"name": name, "subject": name, "role": "both", "split": "train", "contrasts": contrasts}
        for name, contrasts in (("head", ["T1", "T2", "PD"]), ("map", []))
    ]
    about = {"format": 2, "spacing": 2.0, "shape": AAL, "origin": [0, 0, 0], "normalization": "robust"}
    tissues = ["background", "white", "gray", "fluid", "other"]
    (folder / "cohort.json").write_text(json.dumps(about | {"volumes": volumes, "tissues": tissues}))
    return folder


def differences(device, data: Path | None) -> None:
    from benchmark import SAMPLE

    from DivRegNetLib.core.composites import displacement_on
    from DivRegNetLib.core.grid import Grid
    from DivRegNetLib.io.images import read_image
    from DivRegNetLib.registration.pipeline import register

    pairs = {"the bundled pair": [SAMPLE / f"{name}.nii.gz" for name in ("fixed_T1", "moving_T2")]}
    if data is not None:
        pairs |= {name: [data / file for file in files] for name, files in PAIRS.items()}
    print(f"\n{f'from the CPU to {device}':28}{'mean mm':>10}{'largest mm':>12}{'again':>10}")
    for name, files in pairs.items():
        fixed, moving = map(read_image, files)
        import SimpleITK as sitk

        fields = [
            sitk.GetArrayFromImage(displacement_on(register(fixed, moving, device=where).transform, Grid.of(fixed)))
            for where in ("cpu", str(device), str(device))
        ]
        apart = np.linalg.norm(fields[1] - fields[0], axis=-1)
        again = np.abs(fields[2] - fields[1]).max()
        print(f"{name:28}{apart.mean():10.4f}{apart.max():12.4f}{again:10.4f}", flush=True)


def table(name: str, data: Path | None) -> None:
    """Prints all of it for a device."""
    import torch

    from DivRegNetLib.core.device import pick_device

    device = pick_device(name)
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {device}, {what}\n")
    stages(device)
    forward_passes(device)
    training(device)
    differences(device, data)
