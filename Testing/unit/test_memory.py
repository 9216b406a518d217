"""Memory: estimates against measured peaks, plans for less memory, and what happens when it runs out."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from DivRegNetLib import models
from DivRegNetLib.core.composites import field_of
from DivRegNetLib.core.grid import Grid
from DivRegNetLib.errors import DeviceError, InputError
from DivRegNetLib.registration import memory, resources
from DivRegNetLib.registration.pipeline import register
from DivRegNetLib.registration.regnet import RegNet, RegNetConfig
from DivRegNetLib.run.cli import main

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"model": "tiny", "device": "cpu", "align": "none"}


@pytest.fixture
def pair(grid, moving_grid, paint, other_contrast):
    """The phantom on two oblique grids."""
    return paint(grid), paint(moving_grid, contrast=other_contrast)


@pytest.fixture
def card(tiny_model):
    return models.read_card(models.find(tiny_model))


def limit(*images: sitk.Image, beyond_mb: float = 0.0) -> float:
    """GB of a process that has so many MB for voxels, beside what it takes for any image."""
    return (memory.held(*images) + memory.EXTRA + beyond_mb * 1e6) / 1e9


# The estimate


@pytest.mark.skipif(sys.platform != "linux", reason="a peak is read from /proc")
@pytest.mark.parametrize(
    "case, arguments", [("64x64x64@2", ()), ("176x160x144@0.5", ("--spacing", "4"))], ids=["network", "fields"]
)
def test_the_peak_of_a_registration_is_within_a_quarter_of_the_estimate(case, arguments, monkeypatch):
    from benchmark import peak_and_estimate

    peak, estimated = peak_and_estimate(case, *arguments)
    assert 0.75 < estimated / peak < 1.25, f"{peak / 1e6:.0f} MB taken, {estimated / 1e6:.0f} MB estimated"


def test_the_estimate_grows_as_the_voxels_do(card):
    fixed, moving = Grid.build((96, 128, 96), (1.5, 1.5, 1.5)), Grid.build((10, 10, 10), (1, 1, 1))
    one, fine = (memory.estimate(card, fixed, moving, spacing=mm) for mm in (2.0, 1.0))
    assert one.working == (72, 96, 72)
    ratio = np.prod(fine.working) / np.prod(one.working)
    assert (fine.device - memory.EXTRA) / (one.device - memory.EXTRA) == pytest.approx(ratio, rel=1e-3)
    assert fine.host == one.host
    assert memory.estimate(card, fixed, moving, refine=10).device >= memory.estimate(card, fixed, moving).device


@pytest.mark.parametrize("stride", [1, 2])
def test_the_working_grid_has_the_sides_that_regnet_pads_to(card, stride):
    card = replace(card, regnet=card.regnet | {"stride": stride})
    fixed = Grid.build((95, 131, 77), (1.5, 1.1, 2.0))
    multiple = RegNetConfig(**card.regnet).multiple
    assert memory.working_grid(card, fixed, 2.0).size == fixed.working_grid(2.0, multiple=multiple).size


def test_sizes_are_told_in_mb_and_gb():
    assert [memory.text(n) for n in (1_234_000_000, 347_000_000, 1000)] == ["1.2 GB", "350 MB", "10 MB"]


def test_what_is_available_is_the_least_of_what_the_system_and_its_control_groups_leave(tmp_path):
    def write(**files: str) -> float:
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return memory.available(tmp_path)

    assert write(proc__meminfo="MemTotal: 9000 kB\nMemAvailable:    8000 kB\n") == 8000 * 1024
    group = "sys__fs__cgroup__batch__job"
    write(**{"proc__self__cgroup": "0::/batch/job\n", f"{group}__memory.max": "max\n"})
    assert memory.available(tmp_path) == 8000 * 1024
    limits = {"memory.max": "5000000\n", "memory.current": "3000000\n", "memory.stat": "anon 1\ninactive_file 400000\n"}
    assert write(**{f"{group}__{k}": v for k, v in limits.items()}) == 2_400_000
    above = {"memory.max": "3500000\n", "memory.current": "3000000\n", "memory.stat": ""}
    assert write(**{f"sys__fs__cgroup__batch__{k}": v for k, v in above.items()}) == 500_000
    old = {"memory.limit_in_bytes": "100\n", "memory.usage_in_bytes": "40\n", "memory.stat": "inactive_file 0\n"}
    write(**{"proc__self__cgroup": "4:memory:/\n"})
    assert write(**{f"sys__fs__cgroup__memory__{k}": v for k, v in old.items()}) == 60
    assert memory.available() > 1e6


# Less of it


def test_with_little_memory_the_working_resolution_is_lowered_and_the_result_says_so(pair, tiny_model):
    ample = register(*pair, **SETTINGS, spacing=3.0, memory=1000.0)
    short = register(*pair, **SETTINGS, spacing=3.0, memory=limit(*pair, beyond_mb=15))
    assert ample.settings["spacing"] == 3.0 and ample.warnings == ()
    assert 3 < short.settings["spacing"] < 8
    assert np.prod(short.settings["working_size"]) * memory.INVERSION < 15e6
    assert any("little memory" in w and "from 3 to" in w for w in short.warnings)
    assert short.warped.GetSize() == pair[0].GetSize()


def test_what_does_not_fit_at_any_resolution_is_refused_with_numbers_before_it_is_begun(pair, tiny_model):
    seen = []
    with pytest.raises(DeviceError, match=r"20 x 26 x 18 and .* voxels: even at 24 mm .* takes \d+ MB more"):
        register(*pair, **SETTINGS, memory=0.3, progress=lambda stage, _: seen.append(stage))
    assert set(seen) == {"check"}
    with pytest.raises(InputError, match="memory is a number of at least 0\\.001 GB"):
        register(*pair, **SETTINGS, memory=-1.0)


def test_displacement_fields_that_do_not_fit_are_kept_at_the_working_resolution(grid_about, paint, tiny_model):
    """The same registration with and without the memory for a displacement at every voxel."""
    grids = [grid_about((33, -48, 113), (96, 112, 80), (1.25,) * 3, d) for d in ((12, -8, 25), (-4, 10, 3))]
    images = [paint(grids[0]), paint(grids[1], contrast=lambda v: 1 - v)]
    full = register(*images, **SETTINGS, memory=1000.0)
    thin = register(*images, **SETTINGS, memory=limit(*images, beyond_mb=40))
    assert thin.settings["spacing"] == full.settings["spacing"]
    for name, fine in (("transform", grids[0]), ("inverse", grids[1])):
        field = field_of(getattr(thin, name))
        assert np.prod(field.GetSize()) < fine.voxels / 30
        points = fine.to_physical(np.random.default_rng(0).random((200, 3)) * (np.array(fine.size) - 1))
        ends = [np.array([getattr(r, name).TransformPoint(p) for p in points.tolist()]) for r in (full, thin)]
        assert np.linalg.norm(ends[0] - ends[1], axis=1).max() < 0.5, "mm, a tenth of the field's spacing"
    again = sitk.Resample(images[1], images[0], thin.transform, sitk.sitkLinear, 0.0)
    np.testing.assert_array_equal(sitk.GetArrayViewFromImage(again), sitk.GetArrayViewFromImage(thin.warped))
    assert any("displacement every" in w for w in thin.warnings)


def test_a_thousand_slices_of_a_thousand_pixels_are_planned_within_16_gb_or_refused(card):
    fixed = Grid.build((1024, 1024, 700), (0.35, 0.35, 0.5))
    assert memory.estimate(card, fixed, fixed).cpu > 50e9, "two fields in double precision alone take 35"
    plan = memory.plan(card, fixed, fixed, 2.0, 0, lambda needed: needed.cpu < 16e9)
    assert plan.working.spacing[0] == 2.0
    assert plan.fixed.size == (206, 206, 176) and plan.fixed == plan.moving
    reach = plan.fixed.to_index(fixed.to_physical([[0, 0, 0], [1023, 1023, 699]]))
    assert (reach > -1e-6).all() and (reach < np.array(plan.fixed.size) - 1 + 1e-6).all()
    with pytest.raises(DeviceError, match=r"1024 x 1024 x 700 .* GB more"):
        memory.plan(card, fixed, fixed, 2.0, 0, lambda needed: needed.cpu < 2e9)


# None left


class Greedy(RegNet):
    """Takes more than there is for volumes of more than ``most`` voxels, where it is not on the CPU proper or always."""

    most, only_on_card, on_card = 0, False, False

    def to(self, device=None, **arguments):
        self.on_card = str(device) == STAND_IN
        return super().to(device, **arguments)

    def register(self, fixed, moving, start=None, valid=None):
        if fixed.numel() > self.most and (self.on_card or not self.only_on_card):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return super().register(fixed, moving)


STAND_IN = "cpu:0"  # another device than "cpu" to PyTorch, which every machine has


@pytest.fixture
def greedy(tiny_model):
    def build(most: int, *, only_on_card: bool = False) -> models.Model:
        loaded = models.load(tiny_model)
        regnet = Greedy(loaded.regnet.config)
        regnet.load_state_dict(loaded.regnet.state_dict())
        regnet.most, regnet.only_on_card = most, only_on_card
        return models.Model(loaded.card, regnet.eval(), loaded.kldivnet)

    return build


def register_with(model: models.Model, pair, **options):
    told = []
    result = register(*pair, model=model, align="none", progress=lambda s, f: told.append(f), **options)
    assert told == sorted(told) and told[-1] == 1.0, "the bar does not go back"
    return result


def test_where_the_memory_runs_out_all_the_same_a_coarser_resolution_follows(pair, greedy):
    """Beyond the estimate: what a network takes at run time is not in its card."""
    result = register_with(greedy(8000), pair, device="cpu")
    assert np.prod(result.settings["working_size"]) <= 8000
    assert any("little memory" in w and "from 6 to" in w for w in result.warnings)


def test_a_card_without_memory_gets_a_coarser_resolution_and_then_the_cpu_does_it(pair, greedy, monkeypatch):
    monkeypatch.setattr(resources, "pick_device", lambda name: torch.device(STAND_IN))
    monkeypatch.setattr(resources, "free_memory", lambda device: 1e12)
    coarser = register_with(greedy(8000, only_on_card=True), pair, device="auto")
    assert coarser.settings["device"] == STAND_IN and coarser.settings["spacing"] > 6
    on_cpu = register_with(greedy(0, only_on_card=True), pair, device="auto")
    assert on_cpu.settings["device"] == "cpu" and on_cpu.settings["spacing"] == 6
    assert any("memory of the graphics card was too small" in w for w in on_cpu.warnings)


def test_a_card_whose_memory_is_known_to_be_too_small_is_not_tried(pair, greedy, monkeypatch):
    monkeypatch.setattr(resources, "pick_device", lambda name: torch.device(STAND_IN))
    monkeypatch.setattr(resources, "free_memory", lambda device: memory.EXTRA)
    result = register_with(greedy(10**9), pair, device="auto")
    assert result.settings["device"] == "cpu" and result.settings["spacing"] == 6


def test_memory_that_is_never_enough_ends_in_one_sentence(pair, greedy):
    with pytest.raises(
        DeviceError, match=r"ran out in step 'deform', the last time at .* mm: choose a coarser spacing"
    ):
        register_with(greedy(0), pair, device="cpu")


# No card, or no use of it


@pytest.fixture
def files_of_pair(pair, tmp_path) -> list[str]:
    names = [str(tmp_path / f"{name}.nrrd") for name in ("fixed", "moving")]
    for image, name in zip(pair, names, strict=True):
        sitk.WriteImage(image, name)
    return names


def ask_for(device: str, files_of_pair, tmp_path) -> int:
    arguments = ["--model", "tiny", "--device", device, "--align", "none", "--output", str(tmp_path / "out"), "--json"]
    return main(["register", *files_of_pair, *arguments])


def too_old(*size, device="cpu", make=torch.ones, **arguments):
    if str(device) == "cpu":
        return make(*size, **arguments)
    raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCompile with ...")


CARDS = {
    "built for the CPU only": {"torch.version.cuda": None},
    "CUDA_VISIBLE_DEVICES hides": {"hidden": ""},
    "finds no graphics card": {"torch.cuda.is_available": lambda: False},
    "too old or too new for it": {"torch.ones": too_old},
    "PyTorch finds 1 graphics card": {"device": "cuda:7"},
}


@pytest.mark.parametrize("words", CARDS)
def test_why_a_card_is_not_used_is_told_and_auto_takes_the_cpu(
    words, files_of_pair, tiny_model, tmp_path, monkeypatch, capsys
):
    """PyTorch says what it says on a computer with one card, but for one thing."""
    usual = {
        "torch.version.cuda": "12.8",
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.device_count": lambda: 1,
    }
    changed = {k: v for k, v in CARDS[words].items() if k.startswith("torch")}
    for name, value in (usual | changed).items():
        monkeypatch.setattr(name, value)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if "hidden" in CARDS[words]:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", CARDS[words]["hidden"])
    device = CARDS[words].get("device", "cuda")
    assert ask_for(device, files_of_pair, tmp_path) == 2
    said = capsys.readouterr().err
    assert words in said and "use cpu" in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()
    if device == "cuda":
        assert ask_for("auto", files_of_pair, tmp_path) == 0
        assert words in capsys.readouterr().out, "a warning, as there is a card"


BROKEN = {
    "torch is missing": ("sys.modules['torch'] = None", "pip install torch"),
    "torch does not fit numpy": (
        "import torch\ndef deny(*_):\n    raise RuntimeError('Numpy is not available')\ntorch.from_numpy = deny",
        "does not work with NumPy",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_pytorch_that_is_missing_or_does_not_fit_numpy_is_named(what, files_of_pair, tiny_model, tmp_path):
    body, words = BROKEN[what]
    code = f"import sys\n{body}\nfrom DivRegNetLib.run.cli import main\nsys.exit(main(sys.argv[1:]))"
    arguments = ["register", *files_of_pair, "--model", "tiny", "--device", "cpu", "--output", str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and words in last and last.startswith("divregnet: "), done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
