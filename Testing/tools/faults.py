"""Kills registrations, cohorts, preparations and trainings at random points, and checks the files that remain.

    python Testing/tools/faults.py [--kills 200] [--seed 0] [--folder build/faults]

After each kill every file that has its final name must be whole; after a few the command is run to its end and must give
what an undisturbed run gave. Half of the kills come at a random time, half when the output folder changes for the n-th
time, n at random. Two processes at once in one folder come last. Exits with 1 at the first thing that is not as it should.
"""

import argparse
import contextlib
import csv
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import SimpleITK as sitk

ROOT = Path(__file__).resolve().parents[2]

LONGEST_SERIES = 4  # kills before a run is let through
LOOK_SECONDS = 0.002
TIMES = ("seconds", "timings", "trained")  # keys of what may differ from run to run
VARIES = (".log", "tensorboard")


@dataclass(frozen=True)
class Job:
    """A command that writes into a folder.

    arguments: of the interpreter; ``OUT`` stands for the folder.
    again: more arguments, for a run after one that was killed.
    """

    name: str
    arguments: tuple[str, ...]
    again: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)

    def start(self, output: Path, *, again: bool = False) -> "Run":
        words = [str(output) if a == "OUT" else a for a in (*self.arguments, *(self.again if again else ()))]
        variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": "1"}
        variables |= {name: value.replace("OUT", str(output)) for name, value in self.environment.items()}
        return Run(words, variables)

    def finish(self, output: Path, *, again: bool = False, refused: bool = False) -> None:
        """Runs it to the end; raises AssertionError with its last words where it fails.

        refused: it may say that its results are there already, as the run before was killed when they were.
        """
        code, said = self.start(output, again=again).wait()
        assert code == 0 or (refused and "holds the results" in said), f"{self.name}: exit code {code}: {said[-2000:]}"


class Run:
    """A command under way, at the head of a process group of its own.

    forked: True takes a copy of this process, in which all is imported already, so that kills strike the work itself.
    """

    forked = False

    def __init__(self, words: list[str], variables: dict[str, str]) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 -- it goes with this object
        if self.forked:
            self.pid = os.fork()
            if self.pid == 0:
                self._become(words, variables)
            with contextlib.suppress(PermissionError, ProcessLookupError):  # it was quicker
                os.setpgid(self.pid, self.pid)
        else:
            command = [sys.executable, *words]
            self._process = subprocess.Popen(
                command,
                env=os.environ | variables,
                stdout=subprocess.DEVNULL,
                stderr=self._log,
                start_new_session=True,
            )
            self.pid = self._process.pid
        self._status: int | None = None

    def _become(self, words: list[str], variables: dict[str, str]) -> None:
        """In the copy: does what the interpreter does with these arguments, and ends."""
        code = 1
        try:
            os.setpgid(0, 0)
            os.environ.update(variables)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(self._log.fileno(), 2)
            module, sys.argv = words[0] == "-m", words[1:] if words[0] == "-m" else words
            (runpy.run_module if module else runpy.run_path)(sys.argv[0], run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def ended(self) -> bool:
        if self._status is None:
            if self.forked:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                self._status = os.waitstatus_to_exitcode(status) if pid else None
            else:
                self._status = self._process.poll()
        return self._status is not None

    def kill(self) -> None:
        """With its children; returns when it is gone."""
        os.killpg(self.pid, signal.SIGKILL)
        self.wait()

    def wait(self) -> tuple[int, str]:
        """Its exit code, and what it wrote to standard error."""
        while not self.ended():
            time.sleep(LOOK_SECONDS)
        self._log.seek(0)
        return self._status, self._log.read().decode(errors="replace")


def jobs(folder: Path, model: str, models: str) -> dict[str, Job]:
    """The four kinds of work, on tiny images that are written into a folder.

    Args:
        model, models: name of a quick model, and the folder it is in.
    """
    raw = folder / "raw"
    raw.mkdir(parents=True)
    for i in range(6):
        sitk.WriteImage(blob(i), str(raw / f"subject{i}.nii.gz"))
    table = folder / "pairs.csv"
    table.write_text(
        "name,fixed,moving\n" + "".join(f"p{i},raw/subject0.nii.gz,raw/subject{i}.nii.gz\n" for i in (1, 2, 3))
    )
    options = ("--model", model, "--align", "none", "--device", "cpu", "--json")
    known = {"DIVREGNET_MODELS": models}
    register = ("-m", "DivRegNetLib.run.cli", "register")
    pair = (str(raw / "subject0.nii.gz"), str(raw / "subject1.nii.gz"))
    common = ("--images", str(raw), "--align", "none", "--spacing", "6", "--split", "2,2,2")
    train = (*common, "--workers", "1", "--name", "mine", "--steps", "8", "--device", "cpu", "--output", "OUT")
    train += ("warmup=2", "checkpoint_every=2", "validate_every=4", "data.held_out=1", "loss.samples=256")
    train += ("regnet.channels=[2,2,2,2]", "variational.steps=1", "regnet.integration_steps=2", "kldivnet.channels=4")
    return {
        job.name: job
        for job in (
            Job("registration", (*register, *pair, *options, "--output", "OUT"), environment=known),
            Job("cohort", (*register, "--pairs", str(table), *options, "--output", "OUT"), environment=known),
            Job("preparation", (str(ROOT / "training/data/prepare.py"), *common, "--workers", "1", "--output", "OUT")),
            Job(
                "training", (str(ROOT / "training/train.py"), *train), ("--resume",), {"DIVREGNET_MODELS": "OUT/models"}
            ),
        )
    }


def blob(number: int, size: tuple[int, int, int] = (24, 22, 20)) -> sitk.Image:
    """A head-like thing of 16-bit integers, each number another one."""
    k, j, i = np.indices(size[::-1])
    bend = 2 * np.sin(j / 4 + number)
    radius = np.sqrt(((i - 11.5 + bend) / 9) ** 2 + ((j - 10.5) / 8.5) ** 2 + ((k - 9.5) / 8) ** 2)
    values = 400 * (radius < 1) * (1.2 + np.sin(i / 3 + bend) * np.cos(k / 2.5)) + 100 * (radius < 0.4)
    image = sitk.GetImageFromArray(values.astype(np.int16))
    image.SetSpacing((6.0, 6.5, 7.0))
    image.SetOrigin((-60.0, 30.0, 5.0))
    return image


def finished_files(output: Path) -> Iterator[Path]:
    """Those that have their final name: no hidden ones, in which parts wait, nor a checkpoint's ``.part``."""
    for path in sorted(output.rglob("*")):
        parts = path.relative_to(output).parts
        if path.is_file() and not any(p.startswith(".") for p in parts) and path.suffix != ".part":
            yield path


def content(path: Path):
    """What is in a file, all of it read; raises where it is not whole. Arrays and tensors as bytes."""
    if path.name.endswith((".nii.gz", ".nrrd")):
        image = sitk.ReadImage(str(path))
        return image.GetSpacing(), image.GetOrigin(), image.GetDirection(), sitk.GetArrayFromImage(image).tobytes()
    if path.suffix == ".h5":
        from DivRegNetLib.core.composites import field_of

        field = field_of(sitk.ReadTransform(str(path)))
        return field.GetSize(), sitk.GetArrayFromImage(field).tobytes()
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return {name: arrays[name].tobytes() for name in arrays}
    if path.suffix == ".json":
        return _timeless(json.loads(path.read_text(encoding="utf-8")))
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            return [_timeless(row) for row in csv.DictReader(file, strict=True)]
    if path.suffix == ".pt":
        import torch

        return _plain(torch.load(path, weights_only=True))
    if path.suffix == ".safetensors":
        from safetensors.numpy import load_file

        return {name: array.tobytes() for name, array in load_file(path).items()}
    if path.suffix == ".png":
        from PIL import Image

        return Image.open(path).tobytes()
    return path.read_bytes()


def _timeless(value):
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if k not in TIMES}
    return [_timeless(v) for v in value] if isinstance(value, list) else value


def _plain(value):
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value.numpy().tobytes() if hasattr(value, "numpy") else value


def contents(output: Path) -> dict:
    """Relative path -> content, of all finished files but those that vary."""
    found = {}
    for path in finished_files(output):
        name = str(path.relative_to(output))
        value = content(path)
        if not any(part in name for part in VARIES):
            found[name] = _without(value, str(output))
    return found


def _without(value, path: str):
    """A record without the name of the folder that it is in."""
    if isinstance(value, dict):
        return {k: _without(v, path) for k, v in value.items()}
    if isinstance(value, list):
        return [_without(v, path) for v in value]
    return value.replace(path, "OUT") if isinstance(value, str) else value


def differing(found: dict, expected: dict) -> list[str]:
    return sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))


def kill_at_random(run: Run, output: Path, seconds: float, draw: random.Random) -> bool:
    """Ends a run; False where it had ended by itself before."""
    until, changes, seen = draw.uniform(0.0, seconds), draw.randint(1, 12) if draw.random() < 0.5 else 0, None
    started = time.monotonic()
    while not run.ended():
        if changes:
            now = [(folder, *names) for folder, _, names in os.walk(output)]  # which does not mind what vanishes
            changes, seen = changes - (seen is not None and now != seen), now
            if not changes:
                break
        elif time.monotonic() - started > until:
            break
        time.sleep(LOOK_SECONDS)
    if alive := not run.ended():
        run.kill()
    return alive


def torture(job: Job, folder: Path, kills: int, draw: random.Random) -> Counter:
    """Kills a job that many times; what was seen. Raises AssertionError for what should not be."""
    alone, output, seen = folder / f"{job.name}-alone", folder / f"{job.name}-killed", Counter()
    started = time.monotonic()
    job.finish(alone)
    seconds, expected = time.monotonic() - started, contents(alone)
    while seen["kills"] < kills:
        shutil.rmtree(output, ignore_errors=True)
        ended, begun = False, False
        for _ in range(min(LONGEST_SERIES, kills - seen["kills"])):
            killed = kill_at_random(job.start(output, again=begun), output, seconds, draw)
            begun = begun or (output / "last.pt").exists()
            found = contents(output)  # raises where a file is not whole
            seen["files found whole after a kill"] += len(found) * killed
            seen["kills"] += killed
            if not killed:
                ended = True
                break
        if not ended:
            job.finish(output, again=begun, refused=not differing(found, expected))
        assert not (wrong := differing(contents(output), expected)), (
            f"{job.name}: {wrong} differ from an undisturbed run"
        )
        hidden = [p for p in output.rglob("*") if p.name.startswith(".") or p.suffix == ".part"]
        assert not hidden, f"{job.name}: left behind: {hidden}"
        seen["completed with the same result"] += 1
    return seen


def race(job: Job, folder: Path, processes: int = 2) -> Counter:
    """Several processes start at once on one folder; at least one succeeds, the others say why not, the result is whole."""
    alone, output, seen = folder / f"{job.name}-alone", folder / f"{job.name}-race", Counter()
    if not alone.exists():
        job.finish(alone)
    running = [job.start(output) for _ in range(processes)]
    ends = [run.wait() for run in running]
    assert any(code == 0 for code, _ in ends), ends
    for code, words in ends:
        known = ("another process is writing there", "holds the results", "holds a training already")
        assert code == 0 or any(k in words for k in known), words
        seen["succeeded" if code == 0 else "refused in a sentence"] += 1
    assert not (wrong := differing(contents(output), contents(alone))), f"{job.name}: {wrong} differ"
    return seen


def quick_model(folder: Path) -> str:
    """Writes a model of two channels per level and returns its name."""
    import torch

    from DivRegNetLib import models
    from DivRegNetLib.registration.regnet import RegNet, RegNetConfig
    from DivRegNetLib.registration.variational import REFINEMENT
    from DivRegNetLib.similarity.kldivnet import KLDivNet, KLDivNetConfig

    torch.manual_seed(0)
    regnet, kldivnet = RegNet(RegNetConfig(channels=(2, 2, 2, 2), guided=True)), KLDivNet(KLDivNetConfig(channels=4))
    card = models.Card(
        name="quick", version="1.0", summary="Untrained, for tests", modalities=["any"], anatomy="blob",
        skull="not applicable", spacing_mm=8.0, normalization="robust", methods=["variational", "regnet"],
        variational={"steps": 1}, refinement=REFINEMENT.as_dict(), regnet=regnet.config.as_dict(),
        kldivnet=kldivnet.config.as_dict(), training={}, scores={}, license="Apache-2.0", sha256="",
    )  # fmt: skip
    models.save(folder, card, regnet, kldivnet)
    return card.name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="shared equally by the four kinds of work")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("build/faults"))
    parser.add_argument("--only", help="one kind of work")
    args = parser.parse_args()
    shutil.rmtree(args.folder, ignore_errors=True)
    folder = args.folder.absolute()
    work = jobs(folder, quick_model(folder / "models"), str(folder / "models"))
    work = {name: job for name, job in work.items() if args.only in (None, name)}
    draw = random.Random(args.seed)
    import training.train  # noqa: F401 -- and with it all that a copy of this process needs
    from DivRegNetLib.run import cli  # noqa: F401
    from DivRegNetLib.run.cohort import serial  # noqa: F401

    Run.forked = True
    try:
        for job in work.values():
            started = time.monotonic()
            seen = torture(job, folder, args.kills // len(work), draw)
            raced = sum((race_again(job, folder) for _ in range(3)), Counter())
            print(
                f"{job.name}: {dict(seen)}; two at once, 3 times: {dict(raced)}; {time.monotonic() - started:.0f} s",
                flush=True,
            )
    except AssertionError as error:
        print(f"FAILED: {error}", flush=True)
        return 1
    return 0


def race_again(job: Job, folder: Path) -> Counter:
    shutil.rmtree(folder / f"{job.name}-race", ignore_errors=True)
    return race(job, folder)


if __name__ == "__main__":
    sys.exit(main())
