"""Dependencies: each has a lower bound and a known license, and a registration needs no network."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import SimpleITK as sitk

ROOT = Path(__file__).resolve().parents[2]


def dependencies(section: str) -> dict[str, str]:
    """Name -> lower bound of the packages in a list of pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(rf"^{section} = \[(.*?)\]$", text, re.MULTILINE | re.DOTALL).group(1)
    return dict(re.findall(r'"([\w.-]+)(?:\[\w+\])?>=([\d.]+)"', listed))


def documented() -> dict[str, tuple[str, str]]:
    """Name -> lower bound and license in the table of the docs."""
    text = (ROOT / "Testing" / "hostile-input.md").read_text(encoding="utf-8")
    return {
        n: (bound, license) for n, bound, license in re.findall(r"^\| ([\w-]+) \| ([\d.]+) \| (.+?) \|", text, re.M)
    }


def test_every_dependency_is_listed_with_its_lower_bound_and_license():
    needed = {name: bound for s in ("dependencies", "training", "dask") for name, bound in dependencies(s).items()}
    assert len(dependencies("dependencies")) <= 7, "few"
    table = documented()
    assert {name: table.get(name, ("", ""))[0] for name in needed} == needed
    assert all(re.search("MIT|BSD|Apache|PSF", table[name][1]) for name in needed), "none that binds the user"


FORBIDDEN = """
import socket, sys
class Forbidden(socket.socket):
    def __init__(self, *arguments, **more):
        raise PermissionError("the network is forbidden")
def forbidden(*arguments, **more):
    raise PermissionError("the network is forbidden")
socket.socket = Forbidden
for name in ("create_connection", "getaddrinfo", "gethostbyname"):
    setattr(socket, name, forbidden)
from DivRegNetLib.run.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("how", ["sockets forbidden", "no network at all"])
def test_a_registration_needs_no_network(how, paint, grid, moving_grid, other_contrast, tiny_model, tmp_path):
    names = [str(tmp_path / f"{name}.nrrd") for name in ("fixed", "moving")]
    for name, image in zip(names, (paint(grid), paint(moving_grid, contrast=other_contrast)), strict=True):
        sitk.WriteImage(image, name)
    command = (
        [sys.executable, "-c", FORBIDDEN]
        if how == "sockets forbidden"
        else [sys.executable, "-m", "DivRegNetLib.run.cli"]
    )
    if how == "no network at all":
        command = ["unshare", "--map-root-user", "--net", *command]
        if not shutil.which("unshare") or subprocess.run([*command[:3], "true"], capture_output=True).returncode:
            pytest.skip("this system gives no network namespace")
    command += ["register", *names, "--model", tiny_model, "--device", "cpu", "--align", "rigid", "--refine", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "out")], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "quality.json").exists()
