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


def test_without_torch_the_module_opens_and_register_asks_before_it_installs(without_torch, ready, app, monkeypatch):
    asked = []

    class Logic:
        def installTorch(self, askConfirmation, torchVersionRequirement):
            asked.append((askConfirmation, torchVersionRequirement))
            without_torch["version"] = "2.5.1+cpu"
            return object()

    monkeypatch.setitem(sys.modules, "PyTorchUtils", type(sys)("PyTorchUtils"))
    sys.modules["PyTorchUtils"].PyTorchUtilsLogic = Logic
    app.answers = [False]
    ready.onRegister()
    assert asked == [] and ready._run is None and "PyTorch" in app.shown[0]
    assert "needs PyTorch" in ready.ui.messageLabel.text and ready.ui.registerButton.enabled
    ready.onRegister()  # agrees this time
    assert asked == [(True, ">=2.5")] and ready._run is not None


def test_without_the_pytorch_extension_it_is_offered_and_a_restart_asked_for(without_torch, ready, app, monkeypatch):
    monkeypatch.setitem(sys.modules, "PyTorchUtils", None)
    installed = []
    app.extensionsManagerModel = lambda: type(
        "M", (), {"installExtensionFromServer": lambda s, n: installed.append(n) or True}
    )()
    ready.onRegister()
    assert installed == ["PyTorch"] and "Restart Slicer" in ready.ui.messageLabel.text
    app.extensionsManagerModel = lambda: type("M", (), {"installExtensionFromServer": lambda s, n: False})()
    ready.onRegister()
    assert "offline" in ready.ui.messageLabel.text and "Install from file" in ready.ui.messageLabel.text


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
