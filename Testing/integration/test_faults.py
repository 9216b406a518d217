"""After kills, double starts, bad files and load: no file is incomplete, and a repeated command ends with all results.

The full-length versions: ``python Testing/tools/faults.py`` and ``python Testing/tools/load.py``.
"""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import faults
import load
import pytest

from DivRegNetLib.errors import InputError
from DivRegNetLib.io.atomic import STAGING
from DivRegNetLib.io.locks import acquire
from DivRegNetLib.io.output_folder import LOCK, clear_abandoned, exclusive
from DivRegNetLib.options import Options
from DivRegNetLib.run.cohort import QUALITY, Pair
from DivRegNetLib.run.cohort.origin import origin_of
from DivRegNetLib.run.cohort.register_row import register_row

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The kinds of work by name, and the folder they are done in."""
    folder = tmp_path_factory.mktemp("faults")
    return faults.jobs(folder, faults.quick_model(folder / "models"), str(folder / "models")), folder


@pytest.mark.parametrize("name, kills", [("registration", 2), ("cohort", 2)])
def test_a_process_killed_at_random_leaves_whole_files_and_the_next_one_ends_as_if_nothing_had_been(work, name, kills):
    jobs, folder = work
    seen = faults.torture(jobs[name], folder, kills, random.Random(7))
    assert seen["kills"] == kills and seen["completed with the same result"] >= 1


@pytest.mark.parametrize("name", ["registration", "preparation"])
def test_of_two_processes_in_one_folder_one_writes_and_the_other_says_so_or_waits(work, name):
    jobs, folder = work
    seen = faults.race(jobs[name], folder)
    assert seen["succeeded"] == (1 if name == "registration" else 2)


def test_a_cohort_loses_the_bad_pairs_alone_names_them_and_opens_no_more_and_more_files(tmp_path):
    found = load.run_cohort(tmp_path / "load", pairs=14, bad=3, settled=3)
    assert found["wrong"] == []
    assert (found["ok"], found["failed"]) == (11, 3)


def test_the_same_pair_gives_the_same_bits_every_time(tmp_path, monkeypatch):
    monkeypatch.setenv("DIVREGNET_MODELS", "")
    assert len(load.digests(tmp_path, 3)) == 1


HOLDER = f"""
import pathlib, sys, time
from DivRegNetLib.io.output_folder import exclusive
output = pathlib.Path(sys.argv[1])
with exclusive(output):
    (output / "{STAGING}x").mkdir()
    (output / "{STAGING}x" / "half.nii.gz").touch()
    time.sleep(600)
"""


def test_a_folder_is_claimed_by_one_process_and_free_again_when_that_is_killed(tmp_path):
    output = tmp_path / "out"
    child = subprocess.Popen([sys.executable, "-c", HOLDER, str(output)], env=os.environ | {"PYTHONPATH": str(ROOT)})
    while not (output / f"{STAGING}x" / "half.nii.gz").exists():
        time.sleep(0.01)
    with (
        pytest.raises(InputError, match=r"another process is writing there; wait for it, or choose"),
        exclusive(output),
    ):
        pass
    clear_abandoned(output)
    assert (output / f"{STAGING}x" / "half.nii.gz").exists(), "it is not ours to tidy"
    assert acquire(output / LOCK, wait=False) is None
    child.kill()
    child.wait()
    with exclusive(output):
        assert [path.name for path in output.iterdir()] == [LOCK]
    assert not output.exists(), "nothing came into it"


def test_a_pair_whose_process_was_killed_after_its_last_file_counts_as_done_and_is_tidied(tmp_path):
    folder = tmp_path / "p1"
    (folder / f"{STAGING}x").mkdir(parents=True)
    (folder / LOCK).touch()
    pair = Pair(tmp_path / "fixed.nii.gz", tmp_path / "moving.nii.gz")
    for path in pair.paths().values():
        path.write_text("voxels")
    report = {"quality": {"nmi": {"before": 1.1, "after": 1.2}, "folded_percent": 0.0}, "seconds": {}, "warnings": []}
    (folder / QUALITY).write_text(json.dumps(report | {"origin": origin_of(pair, Options())}))
    row = register_row("p1", pair, tmp_path, Options(), lambda: pytest.fail("it is done"), overwrite=False)
    assert (row["status"], row["nmi_after"]) == ("ok", "1.2")
    assert [path.name for path in folder.iterdir()] == [QUALITY]
