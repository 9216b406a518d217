"""Checks that memory, open files and results stay the same over a long cohort and over one pair registered many times.

    python Testing/tools/load.py [--pairs 300] [--bad 0] [--repeats 50] [--folder build/load]

Registers a cohort of small volumes through the command line, some of whose inputs are bad in ten ways, and watches the
memory and the open files of that process; then registers one pair many times and compares the results bit by bit. Exits
with 1 where memory or files grow from pair 20 on, a pair is lost, or a result differs.
"""

import argparse
import contextlib
import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from faults import blob, quick_model

from DivRegNetLib.run import cohort

ROOT = Path(__file__).resolve().parents[2]

SETTLED = 20  # pairs after which nothing may grow any more
GROWTH_MIB = 30.0
GROWTH_FILES = 1
LOOK_SECONDS = 0.02


def write_cohort(folder: Path, pairs: int, bad: int) -> tuple[Path, list[str]]:
    """A table of pairs of small volumes, every so often a bad one; its path, and the names of the bad."""
    folder.mkdir(parents=True)
    for i in range(10):
        sitk.WriteImage(blob(i), str(folder / f"v{i}.nii.gz"))
    kinds = [write(folder) for write in BAD]
    wrong = {round((i + 0.5) * pairs / bad): kinds[i % len(kinds)] for i in range(bad)}
    lines = ["name,fixed,moving"]
    lines += [f"p{i:04d},v{i % 10}.nii.gz,{wrong.get(i, f'v{(i + 1) % 10}.nii.gz')}" for i in range(pairs)]
    table = folder / "pairs.csv"
    table.write_text("\n".join(lines) + "\n")
    return table, [f"p{i:04d}" for i in sorted(wrong)]


def _missing(folder: Path) -> str:
    return "missing.nii.gz"


def _empty(folder: Path) -> str:
    (folder / "empty.nii.gz").write_bytes(b"")
    return "empty.nii.gz"


def _cut(folder: Path) -> str:
    sitk.WriteImage(blob(0), str(folder / "cut.nrrd"), useCompression=True)
    whole = (folder / "cut.nrrd").read_bytes()
    (folder / "cut.nrrd").write_bytes(whole[: len(whole) // 2])
    return "cut.nrrd"


def _text(folder: Path) -> str:
    (folder / "text.nii.gz").write_text("this is no image")
    return "text.nii.gz"


def _folder(folder: Path) -> str:
    (folder / "folder").mkdir()
    return "folder"


def _image(name: str, values: np.ndarray, **arguments):
    def write(folder: Path) -> str:
        sitk.WriteImage(sitk.GetImageFromArray(values, **arguments), str(folder / name))
        return name

    return write


def _far(folder: Path) -> str:
    image = blob(3)
    image.SetOrigin((1e5, 0, 0))
    sitk.WriteImage(image, str(folder / "far.nii.gz"))
    return "far.nii.gz"


_ramp = np.arange(4096, dtype=np.float32).reshape(16, 16, 16)
BAD = (
    _missing,
    _empty,
    _cut,
    _text,
    _folder,
    _far,
    _image("constant.nii.gz", np.ones((16, 16, 16), np.float32)),
    _image("nan.nrrd", np.where(_ramp == 7, np.nan, _ramp).astype(np.float32)),
    _image("flat.nii.gz", np.arange(256, dtype=np.float32).reshape(16, 16)),
    _image("vector.nrrd", np.stack([_ramp] * 3, -1), isVector=True),
)


def watch(command: list[str], output: Path, environment: dict[str, str]) -> tuple[int, list[tuple[int, float, int]]]:
    """Runs a cohort; its exit code, and again and again pairs done, memory in MiB and open files."""
    seen = []
    with (output.parent / "log.txt").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        while process.poll() is None:
            with contextlib.suppress(OSError, ValueError, IndexError):
                done = (output / cohort.TABLE).read_text().count("\n") - 1
                memory = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
                files = len(os.listdir(f"/proc/{process.pid}/fd"))
                seen.append((done, memory * os.sysconf("SC_PAGE_SIZE") / 2**20, files))
            time.sleep(LOOK_SECONDS)
    return process.returncode, seen


def run_cohort(folder: Path, pairs: int, bad: int, settled: int = SETTLED) -> dict:
    """What came of a cohort; ``failed`` lists what is not as it should."""
    table, wrong = write_cohort(folder / "data", pairs, bad)
    output, model = folder / "out", quick_model(folder / "models")
    command = [sys.executable, "-m", "DivRegNetLib.run.cli", "register", "--pairs", str(table), "--output", str(output)]
    command += ["--model", model, "--align", "none", "--device", "cpu", "--json"]
    variables = {"DIVREGNET_MODELS": str(folder / "models"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    code, seen = watch(command, output, os.environ | variables | {"ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": "1"})
    seconds = time.monotonic() - started
    with (output / cohort.TABLE).open(newline="") as file:
        rows = list(csv.DictReader(file))
    failed_rows = {row["name"]: row["message"] for row in rows if row["status"] != "ok"}
    early = [x for x in seen if settled <= x[0] < settled + max(pairs // 15, 3)]
    late = [x for x in seen if pairs - max(pairs // 15, 3) <= x[0] < pairs]
    found = {
        "pairs": len(rows),
        "ok": len(rows) - len(failed_rows),
        "failed": len(failed_rows),
        "seconds a pair": round(seconds / pairs, 2),
        "MiB": [round(max(x[1] for x in part)) for part in (early, late)],
        # the fewest: a result being written has several open for a moment
        "open files": [min(x[2] for x in part) for part in (early, late)],
        "messages": sorted({m.replace(str(folder), "") for m in failed_rows.values()}),
    }
    wrongs = {
        "exit code": code != (2 if bad else 0),
        "pairs were lost": len(rows) != pairs,
        "other pairs failed than those that are bad": sorted(failed_rows) != wrong,
        "a message does not name its file": not all(
            row["message"] and any(part in row["message"] for part in (".nii.gz", ".nrrd", "folder", "overlap"))
            for row in rows
            if row["status"] != "ok"
        ),
        "a result is missing": any(
            not (output / row["name"] / "quality.json").exists() for row in rows if row["status"] == "ok"
        ),
        "a failed pair left a folder": any((output / name).exists() for name in failed_rows),
        "memory grows": found["MiB"][1] > found["MiB"][0] + GROWTH_MIB,
        "open files grow": found["open files"][1] > found["open files"][0] + GROWTH_FILES,
    }
    return found | {"wrong": [name for name, is_so in wrongs.items() if is_so]}


def digests(folder: Path, repeats: int) -> set[str]:
    """Of the results of one pair registered again and again in one process, by the whole of the method."""
    from DivRegNetLib import models
    from DivRegNetLib.core.composites import field_of
    from DivRegNetLib.registration.pipeline import register

    quick_model(folder / "models")
    os.environ[models.ENVIRONMENT] = str(folder / "models")
    found = set()
    for _ in range(repeats):
        result = register(blob(0), blob(1), model="quick", device="cpu", align="rigid", refine=2)
        digest = hashlib.sha256(json.dumps(result.quality, sort_keys=True).encode())
        for image in (result.warped, *(field_of(t) for t in (result.transform, result.inverse))):
            digest.update(sitk.GetArrayFromImage(image).tobytes())
        found.add(digest.hexdigest())
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--bad", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--folder", type=Path, default=Path("build/load"))
    args = parser.parse_args()
    shutil.rmtree(args.folder, ignore_errors=True)
    folder, wrong = args.folder.absolute(), []
    if args.pairs:
        found = run_cohort(folder, args.pairs, args.bad)
        print(json.dumps(found, indent=2), flush=True)
        wrong += found["wrong"]
    if args.repeats:
        different = len(digests(folder, args.repeats))
        print(f"{args.repeats} times the same pair: {different} different results", flush=True)
        wrong += ["results differ"] if different != 1 else []
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
