"""Seconds per stage and peak memory of a registration on this machine.

    python Testing/benchmark.py [--device cpu] [--refine N]

Two pairs: the bundled one, and the same on 256 x 256 x 180 voxels of 1 mm. Each runs in a process of its own, twice; the
second run is timed (the first loads libraries), memory is the process's peak, libraries included.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

SAMPLE = Path(__file__).resolve().parent.parent / "Resources" / "SampleData"
LARGE = (256, 256, 180)


def measure(case: str, device: str, refine: int) -> dict:
    """Runs one case in this process."""
    import SimpleITK as sitk
    import torch

    from DivRegNetLib import files, models
    from DivRegNetLib.geometry import Grid
    from DivRegNetLib.pipeline import pick_device, register

    fixed, moving = (files.read_image(SAMPLE / f"{name}.nii.gz") for name in ("fixed_T1", "moving_T2"))
    if case == "large":
        images = []
        for image in (fixed, moving):
            grid = Grid.of(image)
            origin = grid.centre - grid.matrix[:3, :3] / grid.spacing @ ([(n - 1) / 2 for n in LARGE])
            large = Grid.build(LARGE, (1, 1, 1), origin, grid.direction)
            images.append(sitk.Resample(image, large.empty_image(), sitk.Transform(), sitk.sitkLinear, 0.0))
        fixed, moving = (sitk.Cast(image, sitk.sitkInt16) for image in images)
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
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "gpu_mib": cuda,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--refine", type=int, default=0)
    parser.add_argument("--case", choices=("demo", "large"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(args.case, args.device, args.refine)))
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
