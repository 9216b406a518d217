"""PyTorch and the few packages that the registration needs: whether they are installed, and asking to install them.

Nothing here runs before Register is pressed. PyTorch is installed by Slicer's PyTorch extension, which finds the build
for the graphics driver; the rest by pip. Packages that come with Slicer (SimpleITK, numpy, vtk) are never changed.
"""

import importlib
import importlib.metadata
import importlib.util

import slicer
import slicer.util

from DivRegNetModule import _

TORCH = ">=2.5"
TORCH_MINIMUM = (2, 5)
PACKAGES = {"safetensors": "safetensors>=0.4.3"}
"""Name of the module that is imported -> requirement that pip installs."""


class NotReady(RuntimeError):
    """The registration cannot run yet; the message says what to do."""


def torch_version() -> str:
    """The installed version of torch, empty where there is none. Does not import it."""
    importlib.invalidate_caches()
    if importlib.util.find_spec("torch") is None:
        return ""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return ""


def missing() -> list[str]:
    """Requirements, in pip's form, that are not installed or too old; empty if registration can run."""
    needed = []
    version = torch_version()
    try:
        recent = tuple(int(part) for part in version.split("+")[0].split(".")[:2]) >= TORCH_MINIMUM
    except ValueError:
        recent = bool(version)  # a development build
    if not recent:
        needed.append(f"torch{TORCH}")
    needed += [need for name, need in PACKAGES.items() if importlib.util.find_spec(name) is None]
    return needed


def ensure() -> None:
    """Asks whether to install what is missing, and installs it.

    Raises:
        NotReady: declined, offline, a restart is needed, or Slicer runs in testing mode, where nothing is installed.
    """
    needed = missing()
    if not needed:
        return
    if slicer.app.testingEnabled():
        raise NotReady(_("Not installed: {names}.").format(names=", ".join(needed)))
    if any(need.startswith("torch") for need in needed):
        _ensure_torch()
    packages = [need for need in needed if not need.startswith("torch")]
    if packages:
        _ensure_packages(packages)
    if left := missing():
        text = _("{names} cannot be found yet. Restart Slicer, then press Register again.")
        raise NotReady(text.format(names=", ".join(left)))


def _ensure_torch() -> None:
    if torch_version():
        text = _(
            "The installed PyTorch {version} is too old, {needed} is needed. Open the module 'PyTorch Utils', uninstall "
            "PyTorch, restart Slicer, and press Register again."
        )
        raise NotReady(text.format(version=torch_version(), needed=TORCH))
    try:
        import PyTorchUtils
    except ImportError:
        _offer_extension()
    text = _(
        "DivRegNet computes with PyTorch, which is not installed in this Slicer yet.\n\n"
        "Install it now? This is needed once, downloads from 200 MB (no graphics card) to 3 GB (NVIDIA), and takes some "
        "minutes, in which Slicer does not respond."
    )
    if not slicer.util.confirmOkCancelDisplay(text, _("DivRegNet: first use")):
        raise NotReady(_("Registration needs PyTorch; press Register again when you want to install it."))
    try:
        torch = PyTorchUtils.PyTorchUtilsLogic().installTorch(askConfirmation=True, torchVersionRequirement=TORCH)
    except Exception as error:
        raise NotReady(_offline(f"torch{TORCH} {' '.join(PACKAGES.values())}", error)) from error
    if torch is None:
        raise NotReady(_("Registration needs PyTorch; press Register again when you want to install it."))


def _offer_extension() -> None:
    """Installs the PyTorch extension if the user agrees; raises NotReady in any case, as Slicer must restart."""
    text = _(
        "DivRegNet computes with PyTorch, and Slicer's extension 'PyTorch', which installs it, is missing.\n\n"
        "Install this extension now? Slicer then has to restart; save your work first."
    )
    if not slicer.util.confirmOkCancelDisplay(text, _("DivRegNet: first use")):
        raise NotReady(_("Registration needs the extension 'PyTorch'; you find it in the Extensions Manager."))
    if slicer.app.extensionsManagerModel().installExtensionFromServer("PyTorch"):
        raise NotReady(_("The extension 'PyTorch' is installed. Restart Slicer, then press Register again."))
    text = _(
        "The extension 'PyTorch' could not be installed. Is this computer offline? Download it on another one from "
        "https://extensions.slicer.org, and choose 'Install from file' in the Extensions Manager."
    )
    raise NotReady(text)


def _ensure_packages(packages: list[str]) -> None:
    if importlib.util.find_spec("slicer.packaging"):  # since Slicer 5.11
        try:
            importlib.import_module("slicer.packaging").pip_ensure(packages, requester="DivRegNet")
            return
        except RuntimeError as error:  # declined
            raise NotReady(_("Registration needs {names}.").format(names=", ".join(packages))) from error
        except Exception as error:
            raise NotReady(_offline(" ".join(packages), error)) from error
    text = _("DivRegNet needs to install {names} into Slicer's Python. Continue?")
    if not slicer.util.confirmOkCancelDisplay(text.format(names=", ".join(packages)), _("DivRegNet: first use")):
        raise NotReady(_("Registration needs {names}.").format(names=", ".join(packages)))
    try:
        slicer.util.pip_install(" ".join(f'"{need}"' for need in packages))
    except Exception as error:
        raise NotReady(_offline(" ".join(packages), error)) from error


def _offline(needed: str, error: Exception) -> str:
    text = _(
        "The installation failed ({error}). If this computer is offline, run on another one with the same system and "
        "Python version:\n    pip download {needed} -d wheels\nbring the folder here, and run in Slicer's Python "
        "console:\n    slicer.util.pip_install('--no-index --find-links /path/to/wheels {needed}')"
    )
    return text.format(error=error, needed=needed)
