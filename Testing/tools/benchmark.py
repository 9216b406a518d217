"""Seconds per stage and peak memory of a registration on this machine.

    python Testing/tools/benchmark.py [--device cpu] [--refine N]
    python Testing/tools/benchmark.py --memory [SIZE@MM ...]
    python Testing/tools/benchmark.py --operations [--device cpu]
    python Testing/tools/benchmark.py --table [--device cuda] [--data DIR]

Two pairs: the bundled one, and the same on 256 x 256 x 180 voxels of 1 mm. Each runs in a process of its own, twice; the
second run is timed (the first loads libraries), memory is the process's peak, libraries included.

With ``--memory`` the peak of ``divregnet register``, libraries and writing included, is compared with the estimate that
registrations are planned by, for volumes of as many voxels of as many millimeters: 96x96x96@2.

With ``--operations`` the operations of a forward pass (the methods of the bundled model, after alignment and sampling) are
counted: those that compute (each starts a kernel on a GPU), all calls that torch.profiler sees, with views and the parts of
composite ones, and those at which a GPU would be waited for; and its milliseconds are measured.

With ``--table`` all that matters of a device is printed, see ``device_table.py``.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "Resources" / "SampleData"
LARGE = (256, 256, 180)
MEMORY_CASES = ("64x64x48@2", "96x96x96@2", "160x192x160@1", "256x256x180@1", "320x320x320@1")
COMMAND_AND_PEAK = """
import sys
from DivRegNetLib.io.images import read_image
from DivRegNetLib.run.cli import main
from training.benchmarks.methods import peak
code = main(sys.argv[1:])
print(peak())
sys.exit(code)
"""


def peak_and_estimate(case: str, *arguments: str, refine: int = 0) -> tuple[float, float]:
    """Bytes at the peak of one registration by the command line, and what was estimated.

    Args:
        case: size and spacing, as 96x96x96@2.
        arguments: of the command.
    """
    import numpy as np
    import SimpleITK as sitk

    from DivRegNetLib import models
    from DivRegNetLib.core.grid import Grid
    from DivRegNetLib.registration import memory

    size, spacing = [int(n) for n in case.split("@")[0].split("x")], float(case.split("@")[1])
    with tempfile.TemporaryDirectory() as folder:
        names = [f"{folder}/{name}.nrrd" for name in ("fixed", "moving")]
        for name, bend in zip(names, (0.0, 2.0), strict=True):
            k, j, i = np.ogrid[: size[2], : size[1], : size[0]]
            waves = np.sin(i / 9 + bend) * np.cos(j / 7) * np.cos(k / 8)
            image = sitk.GetImageFromArray((500 + 200 * waves).astype(np.int16))
            image.SetSpacing([spacing] * 3)
            sitk.WriteImage(image, name)
        command = ["-c", COMMAND_AND_PEAK, "register", *names, "--output", f"{folder}/out", "--device", "cpu"]
        command += ["--align", "center", "--memory", "1000", "--refine", str(refine), *arguments]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{case}: the registration ended with exit code {done.returncode}: {done.stderr[-500:]}")
        settings = json.loads(Path(f"{folder}/out/quality.json").read_text())["settings"]
    card, grid = models.read_card(models.find(settings["model"])), Grid.of(image)
    estimate = memory.estimate(card, grid, grid, spacing=settings["spacing"], refine=refine)
    return float(done.stdout.split()[-1]), memory.held(image, image) + estimate.cpu


def compare_memory(cases: list[str], refine: int) -> None:
    print(f"{'volumes':18}{'peak MB':>10}{'estimated':>11}{'estimate / peak':>17}")
    for case in cases or MEMORY_CASES:
        peak, estimated = peak_and_estimate(case, refine=refine)
        print(f"{case:18}{peak / 1e6:10.0f}{estimated / 1e6:11.0f}{estimated / peak:17.2f}", flush=True)


def count_operations(device: str) -> None:
    import time
    from functools import partial

    import torch
    from torch.profiler import ProfilerActivity, profile

    from DivRegNetLib import models
    from DivRegNetLib.core.device import pick_device
    from DivRegNetLib.registration import methods

    sys.path.insert(0, str(ROOT / "Testing" / "helpers"))
    from operators import AsOnGpu, operators
    from textures import deformed

    device = pick_device(device)
    model = models.load(models.DEFAULT, device)
    print(f"{torch.get_num_threads()} threads, device {device}, model {model.card.name} {model.card.version}")
    print(f"{'grid':16}{'methods':22}{'compute':>9}{'of which matrix products':>26}{'calls':>8}{'waits':>7}{'ms':>8}")
    for shape in ((96, 112, 96), (160, 192, 160)):
        moving, fixed, _ = (x.to(device) for x in deformed(shape, 2.0, seed=0))
        valid = (torch.ones_like(fixed, dtype=torch.bool),) * 2
        images = methods.Images(fixed, moving, valid=valid, measured=fixed.numel())
        tensors, rebuild = images.taken_apart()
        as_on_gpu = rebuild([None if t is None else t.as_subclass(AsOnGpu) for t in tensors])
        for names in (("variational",), ("discrete", "variational")):

            def run(images=images, names=names) -> None:
                methods.deform(images, names, model.card.variational_settings, model.regnet)
                if device.type == "cuda":
                    torch.cuda.synchronize()

            milliseconds = []
            with torch.inference_mode():
                for _ in range(4):  # the first is slower
                    started = time.perf_counter()
                    run()
                    milliseconds.append(1e3 * (time.perf_counter() - started))
            counted = operators(partial(run, as_on_gpu))
            with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU]) as profiled:
                run()
            calls = sum(event.name.startswith("aten::") for event in profiled.events())
            products = sum(counted.kernels[name] for name in ("addmm", "baddbmm", "bmm", "mm"))
            print(
                f"{'x'.join(map(str, shape)):16}{' + '.join(names):22}{sum(counted.kernels.values()):9}{products:26}"
                f"{calls:8}{sum(counted.waits.values()):7}{min(milliseconds):8.0f}"
            )


def measure(case: str, device: str, refine: int) -> dict:
    """Runs one case in this process."""
    import torch

    from DivRegNetLib import models
    from DivRegNetLib.core.device import pick_device
    from DivRegNetLib.registration.pipeline import register
    from training.benchmarks.methods import peak

    fixed, moving = volumes(case)
    model = models.load(models.DEFAULT, pick_device(device))
    result = None
    for _ in range(2):
        del result
        result = register(fixed, moving, model=model, device=device, refine=refine)
    cuda = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None
    return {
        "size": " x ".join(map(str, fixed.GetSize())),
        "seconds": result.timings,
        "device": result.settings["device"],
        "threads": torch.get_num_threads(),
        "peak_mib": peak() / 2**20,
        "gpu_mib": cuda,
    }


def volumes(case: str) -> tuple:
    """Fixed and moving image: the bundled pair, or for ``large`` the same on LARGE voxels of 1 mm."""
    import SimpleITK as sitk

    from DivRegNetLib.core.grid import Grid
    from DivRegNetLib.io.images import read_image

    fixed, moving = (read_image(SAMPLE / f"{name}.nii.gz") for name in ("fixed_T1", "moving_T2"))
    if case == "large":
        images = []
        for image in (fixed, moving):
            grid = Grid.of(image)
            origin = grid.center - grid.matrix[:3, :3] / grid.spacing @ ([(n - 1) / 2 for n in LARGE])
            large = Grid.build(LARGE, (1, 1, 1), origin, grid.direction)
            images.append(sitk.Resample(image, large.empty_image(), sitk.Transform(), sitk.sitkLinear, 0.0))
        fixed, moving = (sitk.Cast(image, sitk.sitkInt16) for image in images)
    return fixed, moving


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--refine", type=int, default=0)
    parser.add_argument("--memory", nargs="*", metavar="SIZE@MM", help="compare peaks with the estimate")
    parser.add_argument("--operations", action="store_true", help="count those of a forward pass")
    parser.add_argument("--table", action="store_true", help="all that matters of the device")
    parser.add_argument("--data", type=Path, help="for --table: folder with hippocampus and brain_multicontrast")
    parser.add_argument("--case", choices=("demo", "large"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(args.case, args.device, args.refine)))
        return 0
    if args.memory is not None:
        compare_memory(args.memory, args.refine)
        return 0
    if args.operations:
        count_operations(args.device)
        return 0
    if args.table:
        from device_table import table

        table(args.device, args.data)
        return 0
    rows = []
    for case in ("demo", "large"):
        print(f"{case} ...", file=sys.stderr)
        command = [sys.executable, __file__, "--case", case, "--device", args.device, "--refine", str(args.refine)]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    stages = list(rows[0]["seconds"])
    print(f"{os.cpu_count()} cores, {rows[0]['threads']} threads, device {rows[0]['device']}, refine {args.refine}")
    print(
        f"{'pair':18}" + "".join(f"{stage:>10}" for stage in stages) + f"{'total s':>10}{'peak MiB':>10}{'GPU MiB':>10}"
    )
    for row in rows:
        seconds = "".join(f"{row['seconds'][stage]:10.2f}" for stage in stages)
        gpu = "-" if row["gpu_mib"] is None else f"{row['gpu_mib']:.0f}"
        print(f"{row['size']:18}{seconds}{sum(row['seconds'].values()):10.2f}{row['peak_mib']:10.0f}{gpu:>10}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
