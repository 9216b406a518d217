"""What a user waits for: seconds until the result is there, beside those that the library computes.

    python Testing/tools/time_to_result.py [--device cpu] [--repeat 3]

The bundled pair is registered in a worker (as the Slicer module does it: without anything prepared, in a process that was
prepared, and by the next clicks in the same process) and by ``divregnet register``. Each row has the seconds in all, those
that the stages of the registration took, and the rest. Let nothing else run.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
FIXED, MOVING = (ROOT / "Resources" / "SampleData" / f"{name}.nii.gz" for name in ("fixed_T1", "moving_T2"))
PREPARED_SECONDS = 180.0  # until a process that is prepared must be ready


def row(name: str, seconds: float, computing: float, processor: float | None = None) -> None:
    of_processor = "" if processor is None else f"{processor:14.2f}"
    print(f"{name:44}{seconds:9.2f}{computing:12.2f}{seconds - computing:8.2f}{of_processor}", flush=True)


def workers(device: str, repeat: int) -> None:
    from DivRegNetLib.io.images import read_image
    from DivRegNetLib.run.worker import Standby, Worker

    fixed, moving = read_image(FIXED), read_image(MOVING)

    def click(name: str, standby: Standby) -> None:
        started = time.perf_counter()
        worker = Worker(fixed, moving, standby=standby, keep_files=True, inverse=False, device=device).start()
        while worker.running:
            worker.poll()
            time.sleep(0.02)  # as the panel's timer
        files = worker.files
        for array in ("warped", "transform"):
            files.array(array).copy()
        row(name, time.perf_counter() - started, sum(files.timings.values()))
        worker.close()

    cold = Standby()
    click("worker, nothing prepared", cold)
    for _ in range(repeat):
        click("worker, next click", cold)
    cold.close()
    prepared = Standby()
    prepared.prepare(device=device)
    _wait_until_warm(prepared.pid)
    click("worker, prepared", prepared)
    prepared.close()


def _wait_until_warm(pid: int) -> None:
    """Waits until a process that was started in advance has ended its thread of low priority (Linux; elsewhere a while)."""
    if not Path("/proc").is_dir():
        time.sleep(20)
        return
    own = os.getpriority(os.PRIO_PROCESS, 0)
    until, begun = time.monotonic() + PREPARED_SECONDS, False
    while time.monotonic() < until:
        time.sleep(0.05)
        nice = [int(f.read_text().rpartition(")")[2].split()[16]) for f in Path(f"/proc/{pid}/task").glob("*/stat")]
        lowered = max(nice) > own
        if begun and not lowered:
            return
        begun = begun or lowered


def command_line(device: str, repeat: int) -> None:
    import resource

    for more in ((), ("--no-preview",)):
        for _ in range(repeat):
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, "-m", "DivRegNetLib.run.cli", "register", str(FIXED), str(MOVING)]
                command += ["--output", folder, "--device", device, *more]
                before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
                subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
                seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
                processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
                stages = json.loads((Path(folder) / "quality.json").read_text())["seconds"]
                row(" ".join(("divregnet register", *more)), seconds, sum(stages.values()), processor)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    print(f"{'':44}{'seconds':>9}{'computing':>12}{'rest':>8}{'processor s':>14}")
    workers(args.device, args.repeat)
    command_line(args.device, args.repeat)
    return 0


if __name__ == "__main__":
    sys.exit(main())
