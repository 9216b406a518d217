"""Compares what two checkouts make of the same pairs: warped volume, transforms and quality card, bit by bit.

    python Testing/tools/compare_checkouts.py BEFORE AFTER [--data DIR] [--threads 1] [--cases NAME ...] [--keep DIR]

BEFORE and AFTER are folders of two checkouts (``git worktree add`` makes one of any commit). Each is run in a process of
its own with the interpreter that runs this script, on the bundled pair and, with ``--data``, on a pair of hippocampus
crops, MS07 and BrainWeb in both directions, a pair of livers and a limb. A row says ``same`` or how far the two are apart.
Exit code 1 where anything differs. With ``--keep`` the results of BEFORE are kept in a folder and used the next time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

SAMPLE = "Resources/SampleData"
# Name -> fixed image, moving image, options, fixed and moving mask. Paths are in the data folder, or in the checkout.
CASES = {
    "sample": (f"{SAMPLE}/fixed_T1.nii.gz", f"{SAMPLE}/moving_T2.nii.gz", {}, None),
    "sample, refine 16": (f"{SAMPLE}/fixed_T1.nii.gz", f"{SAMPLE}/moving_T2.nii.gz", {"refine": 16}, None),
    "sample, rigid": (f"{SAMPLE}/fixed_T1.nii.gz", f"{SAMPLE}/moving_T2.nii.gz", {"align": "rigid"}, None),
    "sample, masks": (
        f"{SAMPLE}/fixed_T1.nii.gz",
        f"{SAMPLE}/moving_T2.nii.gz",
        {"refine": 16},
        (f"{SAMPLE}/fixed_T1_labels.nii.gz", f"{SAMPLE}/moving_T2_labels.nii.gz"),
    ),
    "hippocampus": ("hippocampus/images/hippocampus_309.nii.gz", "hippocampus/images/hippocampus_310.nii.gz", {}, None),
    "MS07 T2 to BrainWeb T1": (
        "brain_t1t2pd/brainweb_T1.nii.gz", "brain_multicontrast/ms07_T2.nii.gz", {}, None,
    ),
    "BrainWeb T1 to MS07 T2": (
        "brain_multicontrast/ms07_T2.nii.gz", "brain_t1t2pd/brainweb_T1.nii.gz", {}, None,
    ),
    "liver": ("liver/ct_crlm1004.nii.gz", "liver/mr_t2_cmb001.nii.gz", {}, None),
    "limb": ("limb_ct_mr/STS_001_MR_T1_image.nii.gz", "limb_ct_mr/STS_001_CT_image.nii.gz", {"align": "none"}, None),
}  # fmt: skip


def probe(name: str, checkout: Path, data: Path | None, output: Path) -> None:
    """Registers one case with the library on the path and writes arrays and the quality card to a folder."""
    import SimpleITK as sitk

    from DivRegNetLib import register

    fixed, moving, options, masks = CASES[name]

    def read(path: str) -> sitk.Image:
        return sitk.ReadImage(str(_where(path, checkout, data)))

    if masks:
        options = options | dict(zip(("fixed_mask", "moving_mask"), map(read, masks), strict=True))
    fixed, moving = read(fixed), read(moving)
    result = register(fixed, moving, device="cpu", **options)

    def displacement(transform: sitk.Transform, image: sitk.Image) -> np.ndarray:
        """At every voxel, whatever the transform is made of."""
        grid = image.GetSize(), image.GetOrigin(), image.GetSpacing(), image.GetDirection()
        return sitk.GetArrayFromImage(sitk.TransformToDisplacementField(transform, sitk.sitkVectorFloat64, *grid))

    arrays = {
        "warped": sitk.GetArrayFromImage(result.warped),
        "transform": displacement(result.transform, fixed),
        "inverse": displacement(result.inverse, moving),
        "initial": np.asarray(result.initial),
    }
    np.savez(output / "arrays.npz", **arrays)
    (output / "quality.json").write_text(json.dumps(result.quality))


def _where(path: str, checkout: Path, data: Path | None) -> Path:
    return checkout / path if path.startswith("Resources") else data / path


def run(
    name: str, checkout: Path, data: Path | None, threads: int, keep: Path | None = None
) -> tuple[dict[str, np.ndarray], dict]:
    """Arrays and quality card of a case, made by a checkout.

    Args:
        keep: folder whose results are taken if they are there, and that takes them if not.
    """
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS")
    environment = os.environ | dict.fromkeys(names, str(threads)) | {"PYTHONPATH": str(checkout)}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) if keep is None else keep.resolve() / f"{name}, {threads} threads"
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "quality.json").exists():
            arguments = [str(Path(__file__).resolve()), "--probe", name, str(checkout), str(data or ""), str(folder)]
            subprocess.run([sys.executable, *arguments], env=environment, cwd=scratch, check=True)
        with np.load(folder / "arrays.npz") as arrays:
            return dict(arrays), json.loads((folder / "quality.json").read_text())


def differences(before: tuple[dict, dict], after: tuple[dict, dict]) -> dict[str, str]:
    """For each array, and for the numbers of the quality card that both have: ``same``, or the largest difference."""
    found = {}
    for key, one in before[0].items():
        other = after[0][key]
        same = one.shape == other.shape and one.dtype == other.dtype and np.array_equal(one, other)
        apart = "another shape" if one.shape != other.shape else f"up to {np.abs(one - other.astype(float)).max():.3g}"
        found[key] = "same" if same else apart
    cards = _numbers(before[1]), _numbers(after[1])
    unequal = {k: f"{cards[0][k]} -> {cards[1][k]}" for k in cards[0] if k in cards[1] and cards[0][k] != cards[1][k]}
    missing = sorted(set(cards[0]) - set(cards[1]))
    found["quality"] = "same" if not unequal and not missing else f"{unequal} missing {missing}"
    return found


def _numbers(card: dict, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in card.items():
        flat |= _numbers(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument(
        "--data", type=Path, help="folder with hippocampus, liver, ...; default: the bundled pair alone"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="folder for the results of BEFORE")
    parser.add_argument("--cases", nargs="+", choices=CASES, metavar="NAME", help=", ".join(CASES))
    args = parser.parse_args()
    here = [n for n, case in CASES.items() if args.data or case[0].startswith("Resources")]
    differs = False
    data = args.data and args.data.resolve()
    for name in args.cases or here:
        before = run(name, args.before.resolve(), data, args.threads, args.keep)
        found = differences(before, run(name, args.after.resolve(), data, args.threads))
        differs |= any(value != "same" for value in found.values())
        print(f"{name:24}" + "  ".join(f"{key}: {value}" for key, value in found.items()), flush=True)
    return int(differs)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--probe"]:
        probe(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]) if sys.argv[4] else None, Path(sys.argv[5]))
    else:
        sys.exit(main())
