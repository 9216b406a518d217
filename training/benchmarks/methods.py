"""The methods of the benchmark; each registers a pair in a process of its own.

    python -m training.benchmarks.methods METHOD FOLDER SETTINGS     registers fixed.mha and moving.mha in a folder

A method is a function ``settings -> register``, which imports the package of the method, so that only its own memory is
measured. ``register`` takes (fixed, moving), both float32 on one isotropic grid along the LPS axes. Only ``register`` is
timed, not imports and the loading of a model.
"""

import importlib.metadata
import io
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk

from DivRegNetLib.presets import PRESETS


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
    options: options of DivRegNet; None for other methods.
    preset: preset of DivRegNet that the options are laid over.
    """

    package: str | None
    settings: str
    start: Callable[[dict], Register] | None = None
    options: dict | None = None
    preset: str = "general"

    def all_options(self) -> dict:
        """The options of the preset, replaced by the method's own. The alignment is left out, as pairs are aligned."""
        return {k: v for k, v in (PRESETS[self.preset].options | (self.options or {})).items() if k != "align"}


def syn(settings: dict, metric: str, sampling: int) -> Register:
    """Symmetric normalization (Avants et al., Medical Image Analysis 2008) of ANTs.

    Args:
        metric, sampling: ``CC`` and its radius, or ``mattes`` and its bins.
    """
    import ants

    def convert(image: sitk.Image):
        array = np.ascontiguousarray(sitk.GetArrayViewFromImage(image).T)
        direction = np.reshape(image.GetDirection(), (3, 3))
        return ants.from_numpy(array, origin=image.GetOrigin(), spacing=image.GetSpacing(), direction=direction)

    def register(fixed: sitk.Image, moving: sitk.Image):
        result = ants.registration(
            convert(fixed), convert(moving), "SyNOnly", initial_transform="Identity", grad_step=0.2, flow_sigma=3,
            total_sigma=0, syn_metric=metric, syn_sampling=sampling,
            reg_iterations=syn_iterations(fixed.GetSize(), fixed.GetSpacing()),
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


ELASTIX_SETTINGS = (
    "default parameter map bspline (Mattes MI, 10 mm control points, 256 iterations a resolution, as many of these as SyN has "
    "levels), with a weight of 1000 for the bending energy, inside a mask of the fixed image's foreground, or without a mask "
    "where it finds too few samples in that: with the default weight of 1 it ends far below its start on IXI012"
)
ELASTIX_PARAMETERS = {"Metric1Weight": "1000"}


def elastix(settings: dict) -> Register:
    """Cubic B-splines under mutual information (Klein et al., IEEE TMI 2010)."""
    import itk

    def convert(image: sitk.Image):
        converted = itk.image_from_array(sitk.GetArrayFromImage(image))
        converted.SetSpacing(image.GetSpacing())
        converted.SetOrigin(image.GetOrigin())
        converted.SetDirection(itk.matrix_from_array(np.reshape(image.GetDirection(), (3, 3))))
        return converted

    def register(fixed: sitk.Image, moving: sitk.Image) -> Registered:
        levels = len(syn_iterations(fixed.GetSize(), fixed.GetSpacing()))
        parameters = itk.ParameterObject.New()
        parameters.AddParameterMap(itk.ParameterObject.GetDefaultParameterMap("bspline", levels))
        for name, value in ELASTIX_PARAMETERS.items():
            parameters.SetParameter(0, name, value)
        images = convert(fixed), convert(moving)
        how = {"parameter_object": parameters, "number_of_threads": settings["threads"], "log_to_console": False}
        try:
            _, transform = itk.elastix_registration_method(*images, fixed_mask=convert(foreground(fixed)), **how)
        except RuntimeError:  # too few samples in the mask
            _, transform = itk.elastix_registration_method(*images, **how)
        return Registered(
            _vectors(itk.array_from_image(itk.transformix_deformation_field(images[1], transform)), fixed)
        )

    return register


def foreground(image: sitk.Image) -> sitk.Image:
    """A mask (uint8) of what is not air: Otsu's threshold, closed, holes filled."""
    inside = sitk.BinaryMorphologicalClosing(sitk.OtsuThreshold(image, 0, 1), [3] * 3)
    return sitk.Cast(sitk.BinaryFillhole(inside), sitk.sitkUInt8)


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


NIFTYREG_SETTINGS = "reg_f3d with its defaults: NMI of 64 bins, 3 levels, control points 5 voxels apart, bending energy"


def niftyreg(settings: dict) -> Register:
    """Free-form deformation of NiftyReg (Modat et al., Computer Methods and Programs in Biomedicine 2010)."""
    import niftyreg

    binaries = Path(niftyreg.__file__).parent / "bin"
    commands = {name: shutil.which(name) or str(binaries / name) for name in ("reg_f3d", "reg_transform")}

    def register(fixed: sitk.Image, moving: sitk.Image) -> Registered:
        with tempfile.TemporaryDirectory() as folder:
            names = [f"{folder}/{name}.nii" for name in ("fixed", "moving", "grid", "warped", "displacement")]
            for image, name in zip((fixed, moving), names, strict=False):
                sitk.WriteImage(image, name)
            f, m, grid, warped, displacement = names
            threads = ["-omp", str(settings["threads"])]
            for command in (
                [commands["reg_f3d"], "-ref", f, "-flo", m, "-cpp", grid, "-res", warped, *threads, "-voff"],
                [commands["reg_transform"], "-ref", f, "-disp", grid, displacement],
            ):
                subprocess.run(command, check=True, capture_output=True)
            array = sitk.GetArrayFromImage(sitk.ReadImage(displacement)).reshape(*fixed.GetSize()[::-1], 3)
        return Registered(_vectors(array * [-1, -1, 1], fixed))  # NIfTI is RAS

    return register


def greedy(settings: dict) -> Register:
    """Greedy diffeomorphic registration (Yushkevich et al., Alzheimer's & Dementia 2016; the successor of SyN's authors)."""
    from picsl_greedy import Greedy3D

    def register(fixed: sitk.Image, moving: sitk.Image) -> Registered:
        run = Greedy3D()
        command = f"-i fixed moving -m NMI -n 100x50x10 -s 1.732vox 0.7071vox -o warp -threads {settings['threads']}"
        said = io.StringIO()  # it prints a lot
        run.execute(command, fixed=fixed, moving=moving, warp=None, out=said, err=said)
        return Registered(sitk.Cast(run["warp"], sitk.sitkVectorFloat32))

    return register


def divregnet(settings: dict) -> Register:
    """DivRegNet without its own alignment, as the pair is aligned; everything else is as its options say."""
    from DivRegNetLib import models
    from DivRegNetLib.core.composites import displacement_on
    from DivRegNetLib.core.device import pick_device
    from DivRegNetLib.core.grid import Grid
    from DivRegNetLib.registration import pipeline

    model = models.load(settings["model"], pick_device(settings["device"]))
    options = {"model": model, "device": settings["device"], "align": "none"} | settings["options"]

    def register(fixed: sitk.Image, moving: sitk.Image) -> Registered:
        result = pipeline.register(fixed, moving, **options)
        displacement, inverse = (
            displacement_on(t, Grid.of(i)) for t, i in ((result.transform, fixed), (result.inverse, moving))
        )
        return Registered(displacement, inverse, result.timings["deform"])

    return _warmed(register)


REFINE_STEPS = 16
DEFAULT = "DivRegNet"

METHODS = {
    "initial": Method(None, "the images as they lie in space"),
    "affine": Method(None, "DivRegNet's own affine alignment (none for pairs in one frame); where all methods start"),
    "ANTs SyN": Method(
        "antspyx", "antsRegistrationSyN.sh without its linear stages, as in ANTsPy, with the metric of "
        "antsRegistrationSyNQuick.sh, Mattes MI of 32 bins: gradient step 0.2, flow sigma 3, 100 x 70 x 50 x 20 iterations at "
        "shrink factors 8, 4, 2 and 1, without levels of more than 8 mm or fewer than 8 voxels",
        partial(syn, metric="mattes", sampling=32),
    ),
    "ANTs SyN, CC": Method(
        "antspyx", "the same with the metric of antsRegistrationSyN.sh, cross-correlation of radius 2",
        partial(syn, metric="CC", sampling=2),
    ),
    "elastix": Method("itk-elastix", ELASTIX_SETTINGS, elastix),
    "ConvexAdam": Method(
        "convexadam", "MIND-SSC, defaults of convex_adam_pt (80 iterations of Adam); sides padded to multiples of 6",
        convex_adam,
    ),
    "NiftyReg": Method("niftyreg", NIFTYREG_SETTINGS, niftyreg),
    "greedy": Method(
        "picsl-greedy", "normalized mutual information, 100 x 50 x 10 iterations at shrink factors 4, 2 and 1, "
        "default smoothing", greedy,
    ),
    "DivRegNet, fast": Method(None, "preset fast", divregnet, {}, "fast"),
    DEFAULT: Method(None, "all options as they are", divregnet, {}),
    "DivRegNet, refined": Method(None, "as many steps of refinement as --refine says", divregnet, {"refine": REFINE_STEPS}),
    "DivRegNet, thorough": Method(None, "preset thorough", divregnet, {}, "thorough"),
}  # fmt: skip
"""Name -> method, in the order of the table."""

OURS = tuple(name for name, method in METHODS.items() if method.options is not None)


def version(package: str) -> str | None:
    """The version of an installed package, or None."""
    return next((d.version for d in importlib.metadata.distributions(name=package)), None)


def missing(method: str) -> str | None:
    """Why a method cannot be run, or None: its package is not installed, or this DivRegNet has no such preset."""
    about = METHODS[method]
    if about.package is not None and version(about.package) is None:
        return f"{about.package} is not installed; install it with pip install -e '.[benchmark]'"
    return None if about.preset in PRESETS else f"this version has no preset {about.preset}"


def reset_peak() -> int:
    """Memory of this process in bytes; resets the value of :func:`peak`, where the system allows that (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return peak()
    return _status("VmRSS")


def cpu_seconds() -> float:
    """CPU seconds of this process and of the commands that it has run."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


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
    started = time.perf_counter(), cpu_seconds()
    result = register(fixed, moving)
    seconds, worked = time.perf_counter() - started[0], cpu_seconds() - started[1]
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
