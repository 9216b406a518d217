"""First use: packages that are missing, devices, sample data; no torch in Slicer's own process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from panel import stand_in

ROOT = Path(__file__).resolve().parents[2]
MODULE = ROOT / "DivRegNet"
LAZY = ("torch", "safetensors")


class PyTorchLogic:
    """``PyTorchUtils.PyTorchUtilsLogic`` (SlicerPyTorch, PyTorchUtils.py): asks once more if it is told to."""

    installed: tuple = ()

    def installTorch(self, askConfirmation=False, forceComputationBackend=None, torchVersionRequirement=None):
        import slicer

        if askConfirmation and not slicer.util.confirmOkCancelDisplay("PyTorch will be downloaded and installed"):
            return None
        type(self).installed += (torchVersionRequirement,)
        return object()


class ExtensionsManager:
    """``qSlicerExtensionsManagerModel``: where it is interactive, it asks as well, and answers False if the user declines;
    otherwise it restarts Slicer without asking, unless told not to (installExtensionFromServer)."""

    def __init__(self, online: bool) -> None:
        self.interactive, self.online = True, online
        self.installed, self.restarted = [], False

    def installExtensionFromServer(self, name: str, restart: bool = True, update: bool = False) -> bool:
        import slicer

        if self.interactive and not slicer.util.confirmYesNoDisplay(f"Do you want to install '{name}' now?"):
            return False
        if not self.online:
            return False
        self.installed.append(name)
        self.restarted = restart
        return True


@pytest.fixture
def pytorch(monkeypatch, without_torch):
    """The PyTorch extension; what it has installed, and the version that there is then."""
    logic = type("Logic", (PyTorchLogic,), {})
    monkeypatch.setitem(sys.modules, "PyTorchUtils", type(sys)("PyTorchUtils"))
    sys.modules["PyTorchUtils"].PyTorchUtilsLogic = logic
    install = logic.installTorch

    def installTorch(self, *arguments, **values):
        torch = install(self, *arguments, **values)
        without_torch["version"] = "2.5.1+cpu" if torch else ""
        return torch

    logic.installTorch = installTorch
    return logic


def test_at_first_use_one_question_names_all_that_is_installed(pytorch, ready, app, monkeypatch):
    """Fault 8: two questions, and declining the second said that the computer may be offline."""
    from DivRegNetModule import first_use

    pipped = []
    there = first_use.importlib.util.find_spec
    monkeypatch.setattr(
        first_use.importlib.util, "find_spec", lambda n: None if n == "safetensors" and not pipped else there(n)
    )
    monkeypatch.setattr("slicer.util.pip_install", pipped.append, raising=False)
    app.answers = [False]
    ready.onRegister()
    assert pytorch.installed == () and ready._run is None and len(app.shown) == 1
    assert "torch>=2.5" in app.shown[0] and "safetensors" in app.shown[0]
    assert "needs PyTorch" in ready.ui.messageLabel.text and "offline" not in ready.ui.messageLabel.text
    assert ready.ui.registerButton.enabled
    app.shown.clear()
    ready.onRegister()  # agrees this time
    assert len(app.shown) == 1 and pytorch.installed == (">=2.5",) and pipped == ['"safetensors>=0.4.3"']
    assert ready._run is not None


def test_without_the_pytorch_extension_it_is_offered_once_and_a_restart_asked_for(
    without_torch, ready, app, monkeypatch
):
    monkeypatch.setitem(sys.modules, "PyTorchUtils", None)
    manager = ExtensionsManager(online=True)
    app.extensionsManagerModel = lambda: manager
    app.answers = [False]
    ready.onRegister()
    assert manager.installed == [] and len(app.shown) == 1
    assert "Extensions Manager" in ready.ui.messageLabel.text and "offline" not in ready.ui.messageLabel.text
    app.shown.clear()
    ready.onRegister()
    assert manager.installed == ["PyTorch"] and len(app.shown) == 1 and not manager.restarted and manager.interactive
    assert "Restart Slicer" in ready.ui.messageLabel.text
    manager.online = False
    ready.onRegister()
    assert "offline" in ready.ui.messageLabel.text and "Install from file" in ready.ui.messageLabel.text


def test_the_requirements_file_is_what_slicers_packaging_reads():
    from DivRegNetModule import first_use

    packaging = pytest.importorskip("packaging.requirements")
    assert [packaging.Requirement(line).name for line in first_use.requirements()] == ["safetensors"]
    assert "safetensors>=0.4.3" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_the_panel_does_not_wait_for_the_graphics_driver(module, monkeypatch, tmp_path):
    """Fault 22: entering the module waited up to 3 s for ``nvidia-smi``."""
    from DivRegNetModule import devices
    from panel import wait_for
    from render_panel import make_widget

    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!{sys.executable}\nimport time\ntime.sleep(1.5)\nprint('0, NVIDIA Slow, 2048')\n")
    tool.chmod(0o755)
    monkeypatch.setattr(devices.shutil, "which", lambda name: str(tool))
    monkeypatch.setattr(devices, "torch_version", lambda: "2.7.0+cu128")
    widget = make_widget(module)
    assert widget._devices.asking  # it has not answered yet
    combo = widget.ui.deviceComboBox
    assert combo.count == 2
    wait_for(lambda: combo.count == 3)
    assert "NVIDIA Slow, 2.0 GB free" in combo.itemText(2) and widget._devices.has_gpu
    widget.cleanup()


def test_an_installation_that_fails_says_what_to_do_offline(without_torch, ready, monkeypatch):
    class Logic:
        def installTorch(self, **_):
            raise RuntimeError("no route to host")

    monkeypatch.setitem(sys.modules, "PyTorchUtils", type(sys)("PyTorchUtils"))
    sys.modules["PyTorchUtils"].PyTorchUtilsLogic = Logic
    ready.onRegister()
    text = ready.ui.messageLabel.text
    assert "no route to host" in text and "pip download" in text and "--find-links" in text


def test_nothing_is_installed_in_testing_mode(without_torch, ready, app):
    app.testing = True
    ready.onRegister()
    assert "Not installed: torch>=2.5" in ready.ui.messageLabel.text and app.shown == []


@pytest.mark.parametrize(
    ("version", "fits"), [("2.5.0", True), ("2.13.0+cu128", True), ("2.4.1", False), ("1.13.1", False)]
)
def test_an_old_torch_is_not_enough(without_torch, version, fits):
    from DivRegNetModule import first_use

    without_torch["version"] = version
    assert (not [need for need in first_use.missing() if need.startswith("torch")]) == fits


def test_loading_the_module_and_opening_the_panel_imports_no_torch():
    folders = [str(ROOT / "Testing" / name) for name in ("helpers", "tools")]
    code = (
        f"import sys; sys.path[:0] = {folders!r}\n"
        "from slicer_stand_in import running\n"
        "with running() as app:\n"
        "    from render_panel import load_module, make_widget\n"
        "    make_widget(load_module(app)).cleanup()\n"
        "    import DivRegNetLib\n"
        "    print(DivRegNetLib.__file__)\n"
        f"    print([name for name in {LAZY!r} if name in sys.modules])\n"
    )
    with stand_in():
        pass
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd="/")
    assert done.returncode == 0, done.stderr
    library, imported = done.stdout.strip().splitlines()
    assert Path(library).parent.parent == ROOT  # found from the module's folder alone
    assert imported == "[]"


def test_graphics_cards_are_read_from_the_drivers_tool():
    from DivRegNetModule.devices import parse

    assert parse("0, NVIDIA RTX A4000, 15012\n1, Odd, name, 7\n") == [
        (0, "NVIDIA RTX A4000", 15012.0),
        (1, "Odd, name", 7),
    ]
    assert parse("") == []
    with pytest.raises(ValueError):
        parse("no devices were found")


def test_the_pairs_that_are_shipped_are_offered_in_sample_data(module, monkeypatch):
    from DivRegNetModule import samples

    registered = []

    class Logic:
        @staticmethod
        def registerCustomSampleDataSource(**source):
            registered.append(source)

    monkeypatch.setitem(sys.modules, "SampleData", type(sys)("SampleData"))
    sys.modules["SampleData"].SampleDataLogic = Logic
    module.registerSampleData()
    assert [source["sampleName"] for source in registered] == list(samples.PAIRS)
    assert all((samples.folder(MODULE) / file).is_file() for source in registered for file in source["fileNames"])
    assert all(Path(source["thumbnailFileName"]).is_file() for source in registered)
