"""Measures what a registration costs beside busy processes, with threads that wait passively and with threads that spin.

    python Testing/tools/waiting.py [--busy 2] [--folder build/waiting] [--only "command line" worker dask]

Registers a small pair through the command line, through the worker of the Slicer module and on a Dask worker, beside
processes that only count; prints wall and CPU seconds of each, its children included. Linux and macOS.
"""

import argparse
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import SimpleITK as sitk

ROOT = Path(__file__).resolve().parents[2]
SHRINK = (4, 4, 4)
LIMIT_S = 1800.0
WORKER = """
import sys
import SimpleITK as sitk
from DivRegNetLib.run.worker import Worker
Worker(*(sitk.ReadImage(path) for path in sys.argv[1:]), device="cpu").start().result()
"""


def write_pair(folder: Path) -> list[str]:
    """The bundled sample pair at about 6 mm."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name in ("fixed_T1", "moving_T2"):
        image = sitk.ReadImage(str(ROOT / f"Resources/SampleData/{name}.nii.gz"))
        paths.append(str(folder / f"{name}.nii.gz"))
        sitk.WriteImage(sitk.BinShrink(image, SHRINK), paths[-1])
    (folder / "pairs.csv").write_text("fixed,moving\n" + ",".join(Path(p).name for p in paths) + "\n")
    return paths


def commands(folder: Path) -> dict[str, list[str]]:
    paths = write_pair(folder)
    register = [sys.executable, "-m", "DivRegNetLib.run.cli", "register"]
    common = ["--device", "cpu", "--overwrite", "--json", "--output"]
    return {
        "command line": [*register, *paths, *common, str(folder / "out")],
        "worker": [sys.executable, "-c", WORKER, *paths],
        "dask": [*register, "--pairs", str(folder / "pairs.csv"), "--dask", "local:1", *common, str(folder / "cohort")],
    }


def cpu_seconds() -> float:
    """Of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(command: list[str], policy: str | None) -> tuple[float, float]:
    """Wall and CPU seconds of a command, with OMP_WAIT_POLICY set or not."""
    kept = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")}
    variables = kept | {"PYTHONPATH": str(ROOT)} | ({} if policy is None else {"OMP_WAIT_POLICY": policy})
    used, started = cpu_seconds(), time.monotonic()
    subprocess.run(command, env=variables, stdout=subprocess.DEVNULL, check=True, timeout=LIMIT_S)
    return time.monotonic() - started, cpu_seconds() - used


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, default=2, help="processes that only count")
    parser.add_argument("--folder", type=Path, default=Path("build/waiting"))
    parser.add_argument("--only", nargs="*", help="some of the ways")
    args = parser.parse_args()
    jobs = commands(args.folder.absolute())
    count = f"import os\nwhile os.getppid() == {os.getpid()}: sum(range(10**6))"  # they end with this process
    counting = [subprocess.Popen([sys.executable, "-c", count]) for _ in range(args.busy)]
    try:
        for name in args.only or jobs:
            for policy in (None, "ACTIVE"):
                wall, cpu = measure(jobs[name], policy)
                how = "as it comes" if policy is None else "spinning"
                load = os.getloadavg()[0]
                print(f"{name}, {how}: wall {wall:.0f} s, CPU {cpu:.1f} s, load {load:.0f}", flush=True)
    finally:
        for process in counting:
            process.kill()
            process.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
