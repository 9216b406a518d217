"""The methods of the benchmark; each registers a pair in a process of its own.

    python -m training.benchmarks.methods METHOD FOLDER SETTINGS     registers fixed.mha and moving.mha in a folder

A method is a function ``settings -> register``, which imports the package of the method, so that only its own memory is
measured. ``register`` takes (fixed, moving), both float32 on one isotropic grid along the LPS axes. Only ``register`` is
timed, not imports and the loading of a model.
"""

import importlib.metadata
import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk


class Registered(NamedTuple):
    """The result of a method.

    displacement: maps fixed points to moving points, a vector image on their grid (LPS, mm).
    inverse: maps moving points to fixed points, likewise; None if the method has no inverse.
    deformation_seconds: duration of the deformation alone; None if the method does not report it.
    """

    displacement: sitk.Image
    inverse: sitk.Image | None = None
    deformation_seconds: float | None = None


Register = Callable[[sitk.Image, sitk.Image], Registered]


@dataclass(frozen=True)
class Method:
    """A row of the table.

    package: the distribution it needs besides DivRegNet; None: none.
    settings: its settings, described for the report.
    start: ``settings -> register``; None: nothing is run, and the initial alignment is scored.
    """

    package: str | None
    settings: str
    start: Callable[[dict], Register] | None = None


def syn(settings: dict) -> Register:
    """Symmetric normalization (Avants et al., Medical Image Analysis 2008) of ANTs."""
    import ants

    def convert(image: sitk.Image):
        array = np.ascontiguousarray(sitk.GetArrayViewFromImage(image).T)
        direction = np.reshape(image.GetDirection(), (3, 3))
        return ants.from_numpy(array, origin=image.GetOrigin(), spacing=image.GetSpacing(), direction=direction)

    def register(fixed: sitk.Image, moving: sitk.Image):
        result = ants.registration(
            convert(fixed), convert(moving), "SyNOnly", initial_transform="Identity", syn_metric="mattes",
            syn_sampling=32, reg_iterations=syn_iterations(fixed.GetSize(), fixed.GetSpacing()),
        )  # fmt: skip
        fields = [next(f for f in result[k] if f.endswith("Warp.nii.gz")) for k in ("fwdtransforms", "invtransforms")]
        displacement, inverse = (sitk.ReadImage(f, sitk.sitkVectorFloat32) for f in fields)
        return Registered(displacement, inverse)

    return register


def syn_iterations(size: tuple[int, ...], spacing: tuple[float, ...]) -> tuple[int, ...]:
    """The iterations of ANTs' script for images of 1 mm, at levels with shrink factors 8, 4, 2 and 1.

    Levels with voxels of more than 8 mm or with fewer than 8 voxels along an axis are left out, because they show no anatomy
    any more: with all four levels SyN moved a head of 4 mm voxels 25 mm along its axis.
    """
    levels = zip((8, 4, 2, 1), (100, 70, 50, 20), strict=True)
    fit = [n for shrink, n in levels if shrink == 1 or (shrink * max(spacing) <= 8 and min(size) >= 8 * shrink)]
    return tuple(fit)


def elastix(settings: dict) -> Register:
    """Cubic B-splines under mutual information (Klein et al., IEEE TMI 2010)."""
    import itk

    def convert(image: sitk.Image):
        converted = itk.image_from_array(sitk.GetArrayFromImage(image))
        converted.SetSpacing(image.GetSpacing())
        converted.SetOrigin(image.GetOrigin())
        converted.SetDirection(itk.matrix_from_array(np.reshape(image.GetDirection(), (3, 3))))
        return converted

    def register(fixed: sitk.Image, moving: sitk.Image):
        parameters = itk.ParameterObject.New()
        levels = len(syn_iterations(fixed.GetSize(), fixed.GetSpacing()))
        parameters.AddParameterMap(itk.ParameterObject.GetDefaultParameterMap("bspline", levels))
        converted = convert(moving)
        _, transform = itk.elastix_registration_method(
            convert(fixed), converted, parameter_object=parameters, log_to_console=False
        )
        return Registered(
            _vectors(itk.array_from_image(itk.transformix_deformation_field(converted, transform)), fixed)
        )

    return register


def convex_adam(settings: dict) -> Register:
    """Coupled convex optimization and Adam on MIND-SSC (Siebert et al., IEEE TMI 2024)."""
    import torch
    from convexAdam.convex_adam_MIND import convex_adam_pt

    device = torch.device(settings["device"])

    def register(fixed: sitk.Image, moving: sitk.Image):
        # Images whose sides are no multiples of 6 voxels, its coarse grid, would be stretched.
        after = [-n % 6 for n in fixed.GetSize()]
        images = [sitk.GetArrayFromImage(sitk.ZeroFluxNeumannPad(x, [0, 0, 0], after)) for x in (fixed, moving)]
        field = convex_adam_pt(*(torch.from_numpy(x) for x in images), device=device)
        x, y, z = fixed.GetSize()
        return Registered(_vectors(field[:z, :y, :x, ::-1] * fixed.GetSpacing()[0], fixed))

    return _warmed(register)


def divregnet(settings: dict) -> Register:
    """DivRegNet without its own alignment, as the pair is aligned."""
    from DivRegNetLib import models
    from DivRegNetLib.core.device import pick_device
    from DivRegNetLib.registration import pipeline

    model = models.load(settings["model"], pick_device(settings["device"]))
    if "methods" in settings:
        model = replace(model, card=replace(model.card, methods=settings["methods"]))
    options = {"model": model, "device": settings["device"], "align": "none"}

    def register(fixed: sitk.Image, moving: sitk.Image):
        result = pipeline.register(
            fixed, moving, spacing=fixed.GetSpacing()[0], refine=settings.get("refine", 0), **options
        )
        displacement, inverse = (t.GetDisplacementField() for t in (result.transform, result.inverse))
        return Registered(displacement, inverse, result.timings["deform"])

    return _warmed(register)


REFINE_STEPS = 16

METHODS = {
    "initial": Method(None, "as the images lie in space"),
    "affine": Method(None, "DivRegNet's own affine stage (phantoms and limbs: none); where all below start"),
    "ANTs SyN": Method(
        "antspyx", "SyNOnly, Mattes MI of 32 bins, gradient step 0.2, flow sigma 3, iterations 100 x 70 x 50 x 20 on levels "
        "shrunk 8, 4, 2 and 1 times, without those of more than 8 mm or fewer than 8 voxels", syn,
    ),
    "elastix": Method(
        "itk-elastix", "default parameter map bspline: 256 iterations a resolution, as many of these as SyN has levels, Mattes "
        "MI and bending energy, 10 mm control points", elastix,
    ),
    "ConvexAdam": Method(
        "convexadam", "MIND-SSC, defaults of convex_adam_pt (80 iterations of Adam); sides padded to multiples of 6",
        convex_adam,
    ),
    "Newton steps alone": Method(None, "method variational of the model, align=none", divregnet),
    "DivRegNet": Method(None, "forward pass, align=none", divregnet),
    "DivRegNet, refined": Method(None, "align=none, as many steps as --refine says", divregnet),
}  # fmt: skip
"""Name -> method, in the order of the table."""

OURS = ("DivRegNet", "DivRegNet, refined", "Newton steps alone")


def version(package: str) -> str | None:
    """The version of an installed package, or None."""
    return next((d.version for d in importlib.metadata.distributions(name=package)), None)


def is_installed(method: str) -> bool:
    """Whether the package of a method is installed."""
    package = METHODS[method].package
    return package is None or version(package) is not None


def reset_peak() -> int:
    """Memory of this process in bytes; resets the value of :func:`peak`, where the system allows that (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return peak()
    return _status("VmRSS")


def peak() -> int:
    """Peak memory of this process in bytes.

    ``ru_maxrss`` is not used on Linux, because it includes the parent's memory at the time of the fork.
    """
    try:
        return _status("VmHWM")
    except OSError:
        largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return largest if sys.platform == "darwin" else largest * 1024


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def _vectors(array: np.ndarray, like: sitk.Image) -> sitk.Image:
    image = sitk.GetImageFromArray(np.ascontiguousarray(array, dtype=np.float32), isVector=True)
    image.CopyInformation(like)
    return image


def _warmed(register: Register) -> Register:
    """Registers a small generated pair first, so that what torch loads at the first call is not measured."""
    blobs = [sitk.GaussianSource(sitk.sitkFloat32, [48] * 3, [s] * 3, [24.0] * 3, 1.0) for s in (10.0, 12.0)]
    register(*blobs)
    return register


def gpu_peak() -> int | None:
    """Peak GPU memory of torch in bytes; None without a GPU."""
    torch = sys.modules.get("torch")
    return torch.cuda.max_memory_allocated() if torch and torch.cuda.is_available() else None


def main(name: str, folder: Path, settings: dict) -> None:
    fixed, moving = (sitk.ReadImage(str(folder / f"{n}.mha"), sitk.sitkFloat32) for n in ("fixed", "moving"))
    register = METHODS[name].start(settings)
    before = reset_peak()
    started = time.perf_counter(), time.process_time()
    result = register(fixed, moving)
    seconds, worked = time.perf_counter() - started[0], time.process_time() - started[1]
    most = peak()
    output = Path(settings["output"])
    for kind in ("displacement", "inverse"):
        if (image := getattr(result, kind)) is not None:
            sitk.WriteImage(sitk.Cast(image, sitk.sitkVectorFloat32), str(output / f"{kind}.mha"), useCompression=True)
    measured = {"seconds": seconds, "predicted": result.deformation_seconds, "cpu": worked}
    measured |= {"peak": most, "added": most - before, "gpu": gpu_peak()}
    (output / "measured.json").write_text(json.dumps(measured))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]))
