"""PyTorch and the few packages that the registration needs: whether they are installed, and asking to install them.

Nothing here runs before Register is pressed. PyTorch is installed by Slicer's PyTorch extension, which finds the build
for the graphics driver; the rest, listed in Resources/requirements.txt, by ``slicer.packaging`` or pip. There is one
question, which says all that will be installed. Packages that come with Slicer (SimpleITK, numpy, vtk) are never changed.
"""

import importlib
import importlib.metadata
import importlib.util
from pathlib import Path

import slicer
import slicer.util

from DivRegNetModule import _

TORCH = ">=2.5"
TORCH_MINIMUM = (2, 5)
REQUIREMENTS = Path(__file__).resolve().parent.parent / "Resources" / "requirements.txt"


class NotReady(RuntimeError):
    """The registration cannot run yet; the message says what to do."""


def requirements() -> list[str]:
    """The lines of requirements.txt that name a package."""
    lines = (line.strip() for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith(("#", "-"))]


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
    return needed + [need for need in requirements() if importlib.util.find_spec(need.split(">")[0]) is None]


def ensure() -> None:
    """Asks, once, whether to install what is missing, and installs it.

    Raises:
        NotReady: declined, offline, a restart is needed, or Slicer runs in testing mode, where nothing is installed.
    """
    needed = missing()
    if not needed:
        return
    if slicer.app.testingEnabled():
        raise NotReady(_("Not installed: {names}.").format(names=", ".join(needed)))
    packages = [need for need in needed if not need.startswith("torch")]
    if len(packages) < len(needed):
        _check_torch()
        try:
            import PyTorchUtils
        except ImportError:
            _install_extension()
        text = _(
            "DivRegNet computes with PyTorch, which is not installed in this Slicer yet.\n\n"
            "Install {names} now? This is needed once, downloads from 200 MB (no graphics card) to 3 GB (NVIDIA), and "
            "takes some minutes, in which Slicer does not respond."
        )
        _ask(text.format(names=", ".join(needed)), _("Registration needs PyTorch."))
        _install(needed, lambda: PyTorchUtils.PyTorchUtilsLogic().installTorch(torchVersionRequirement=TORCH))
    else:
        text = _("DivRegNet needs to install {names} into Slicer's Python. Continue?")
        declined = _("Registration needs {names}.")
        _ask(text.format(names=", ".join(packages)), declined.format(names=", ".join(packages)))
    if packages:
        _install(packages, lambda: _install_packages(packages))
    if left := missing():
        text = _("{names} cannot be found yet. Restart Slicer, then press Register again.")
        raise NotReady(text.format(names=", ".join(left)))


def _ask(question: str, declined: str) -> None:
    """Raises NotReady if the user declines."""
    if not slicer.util.confirmOkCancelDisplay(question, _("DivRegNet: first use")):
        raise NotReady(declined + " " + _("Press Register again when you want to install it."))


def _check_torch() -> None:
    """Raises NotReady for a PyTorch that is too old: it has to be uninstalled first."""
    if torch_version():
        text = _(
            "The installed PyTorch {version} is too old, {needed} is needed. Open the module 'PyTorch Utils', uninstall "
            "PyTorch, restart Slicer, and press Register again."
        )
        raise NotReady(text.format(version=torch_version(), needed=TORCH))


def _install_extension() -> None:
    """Installs the PyTorch extension if the user agrees; raises NotReady in any case, as Slicer must restart."""
    text = _(
        "DivRegNet computes with PyTorch, and Slicer's extension 'PyTorch', which installs it, is missing.\n\n"
        "Install this extension now? Slicer then has to restart; save your work first."
    )
    _ask(text, _("Registration needs the extension 'PyTorch'; you find it in the Extensions Manager."))
    manager = slicer.app.extensionsManagerModel()
    # Asked already: interactive, Slicer would ask again, and answers False also where the user declines, so that a
    # declined question could not be told from a missing network (qSlicerExtensionsManagerModel.cxx).
    interactive = getattr(manager, "interactive", None)
    if interactive is not None:
        manager.interactive = False
    try:
        installed = manager.installExtensionFromServer("PyTorch", False)
    finally:
        if interactive is not None:
            manager.interactive = interactive
    if installed:
        raise NotReady(_("The extension 'PyTorch' is installed. Restart Slicer, then press Register again."))
    text = _(
        "The extension 'PyTorch' could not be installed. Is this computer offline? Download it on another one from "
        "https://extensions.slicer.org, and choose 'Install from file' in the Extensions Manager."
    )
    raise NotReady(text)


def _install_packages(packages: list[str]) -> None:
    if importlib.util.find_spec("slicer.packaging"):  # since Slicer 5.11
        importlib.import_module("slicer.packaging").pip_ensure(packages, requester="DivRegNet", prompt_install=False)
    else:
        slicer.util.pip_install(" ".join(f'"{need}"' for need in packages))


def _install(needed: list[str], install) -> None:
    """Runs an installation; raises NotReady if it fails."""
    try:
        install()
    except Exception as error:
        text = _(
            "The installation failed ({error}). If this computer is offline, run on another one with the same system and "
            "Python version:\n    pip download {needed} -d wheels\nbring the folder here, and run in Slicer's Python "
            "console:\n    slicer.util.pip_install('--no-index --find-links /path/to/wheels {needed}')"
        )
        raise NotReady(text.format(error=error, needed=" ".join(needed))) from error
