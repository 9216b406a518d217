"""One registration from end to end: physical truth, determinism, progress, cancel, errors."""

from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from DivRegNetLib import models
from DivRegNetLib.core.composites import displacement_on, field_of
from DivRegNetLib.core.grid import Grid, affine_matrix, affine_transform
from DivRegNetLib.errors import Cancelled, DeviceError, InputError, ModelError
from DivRegNetLib.io.images import read_image
from DivRegNetLib.options import STAGES
from DivRegNetLib.registration.pipeline import register
from DivRegNetLib.similarity.classes import ClassNet, ClassNetConfig


@pytest.fixture(scope="module")
def pair(sample_data):
    """The bundled pair: another contrast, a known deformation, a rotated and anisotropic moving grid."""
    from DivRegNetLib.io import landmarks

    images = [read_image(sample_data / f"{n}.nii.gz") for n in ("fixed_T1", "moving_T2")]
    marks = [landmarks.read_landmarks(sample_data / f"{n}.mrk.json").points for n in ("fixed_T1", "moving_T2")]
    return (*images, *marks)


@pytest.fixture(scope="module")
def result(pair):
    return register(pair[0], pair[1], device="cpu")


def errors_mm(transform, fixed_points, moving_points):
    mapped = np.array([transform.TransformPoint(p) for p in fixed_points.tolist()])
    return np.linalg.norm(mapped - moving_points, axis=1)


def test_a_known_rotation_and_deformation_between_contrasts_is_recovered(pair, result):
    _, _, fixed_points, moving_points = pair
    start = errors_mm(sitk.Transform(), fixed_points, moving_points).mean()
    aligned = errors_mm(affine_transform(result.initial), fixed_points, moving_points).mean()
    after = errors_mm(result.transform, fixed_points, moving_points).mean()
    assert start > 20
    assert aligned < 4.5
    assert after < 0.25 * aligned
    assert after < 0.8


def test_warped_is_the_moving_volume_resampled_by_the_returned_transform(pair, result):
    fixed, moving = pair[:2]
    default = result.settings["default_value"]
    again = sitk.Resample(moving, fixed, result.transform, sitk.sitkLinear, default, sitk.sitkFloat32)
    again = sitk.Round(again)
    assert Grid.of(result.warped) == Grid.of(fixed)
    assert result.warped.GetPixelID() == moving.GetPixelID()
    np.testing.assert_array_equal(sitk.GetArrayFromImage(result.warped), sitk.GetArrayFromImage(again))


def test_the_inverse_undoes_the_transform_within_a_tenth_of_a_voxel(pair, result):
    fixed_points = pair[2]
    there = [result.transform.TransformPoint(p) for p in fixed_points.tolist()]
    back = np.array([result.inverse.TransformPoint(p) for p in there])
    assert np.linalg.norm(back - fixed_points, axis=1).max() < 0.1 * min(pair[1].GetSpacing())


def test_without_the_inverse_all_else_is_the_same(pair, result):
    without = register(pair[0], pair[1], device="cpu", inverse=False)
    assert without.inverse is None
    assert without.quality == result.quality
    for one, two in ((without.warped, result.warped), (field_of(without.transform), field_of(result.transform))):
        np.testing.assert_array_equal(sitk.GetArrayViewFromImage(one), sitk.GetArrayViewFromImage(two))


def test_the_deformation_does_not_fold_and_similarity_rises(result):
    quality = result.quality
    assert quality["folded_percent"] < 0.1
    assert quality["nmi"]["before"] < quality["nmi"]["aligned"] < quality["nmi"]["after"]
    assert quality["similarity"]["before"] < quality["similarity"]["aligned"] < quality["similarity"]["after"]
    assert quality["inverse_consistency_mm"]["mean"] < 0.1


def test_the_same_inputs_give_the_same_output_bit_by_bit(pair, result):
    again = register(pair[0], pair[1], device="cpu")
    np.testing.assert_array_equal(again.initial, result.initial)
    np.testing.assert_array_equal(
        sitk.GetArrayFromImage(field_of(again.transform)),
        sitk.GetArrayFromImage(field_of(result.transform)),
    )


def test_identical_inputs_hardly_move(pair):
    fixed = pair[0]
    result = register(fixed, fixed, align="none", device="cpu")
    assert result.quality["largest_displacement_mm"] < 0.2 * result.settings["spacing"]


def in_another_contrast(image: sitk.Image) -> sitk.Image:
    """The same anatomy in other grays, not monotone, with noise."""
    array = sitk.GetArrayFromImage(image).astype(float)
    unit = (array / np.percentile(array, 99.5)).clip(0, 1)
    noise = np.random.default_rng(0).normal(0, 0.02, array.shape)
    return Grid.of(image).image((0.8 * np.sin(np.pi * unit) + 0.2 * unit + noise).clip(0).astype(np.float32))


def test_two_contrasts_that_are_aligned_are_left_as_they_are(pair):
    fixed = pair[0]
    result = register(fixed, in_another_contrast(fixed), align="none", device="cpu")
    assert result.quality["mean_displacement_mm"] < 0.1 * result.settings["spacing"]
    chosen = result.quality["deformation"]
    assert chosen["chosen"] == "none" and set(chosen["scores"]) == {"none", "stiffness 1"}
    assert any("No deformation" in str(reason) for reason in result.verdict.reasons)


def test_the_stiffness_is_the_model_s_or_that_of_the_options(pair, result):
    chosen = result.quality["deformation"]
    assert chosen["stiffness"] == 1.0 and set(chosen["scores"]) == {"none", "stiffness 1"}
    stiff = register(*pair[:2], align=affine_transform(result.initial), device="cpu", stiffness=100, spacing=4)
    loose = register(*pair[:2], align=affine_transform(result.initial), device="cpu", stiffness=0.5, spacing=4)
    assert stiff.quality["deformation"] == {"chosen": "stiffness 100", "stiffness": 100, "scores": {}}
    assert stiff.quality["log_jacobian_sd"] < 0.7 * loose.quality["log_jacobian_sd"]


def test_air_around_the_fixed_image_does_not_lower_the_resolution(pair, result):
    """In a field of view of four times the volume."""
    fixed = pair[0]
    wide = sitk.ConstantPad(fixed, [n // 2 for n in fixed.GetSize()], [n // 8 for n in fixed.GetSize()], 0)
    far = register(wide, pair[1], device="cpu")
    assert far.settings["spacing"] < 1.15 * result.settings["spacing"]
    assert errors_mm(far.transform, *pair[2:]).mean() < 0.8
    assert far.warped.GetSize() == wide.GetSize()


def test_where_the_headers_put_the_volumes_does_not_matter(pair, result):
    """Both volumes moved by one rigid motion along the axes' permutation and far off: the same error in mm."""
    shift = sitk.Euler3DTransform((0, 0, 0), 0, 0, 0, (350.0, -420.0, 777.0))
    matrix = affine_matrix(shift)
    fixed, moving = (Grid(Grid.of(i).size, matrix @ Grid.of(i).matrix).stamp(sitk.Image(i)) for i in pair[:2])
    moved = register(fixed, moving, device="cpu")
    points = [np.array([shift.TransformPoint(p) for p in marks.tolist()]) for marks in pair[2:]]
    assert errors_mm(moved.transform, *points).mean() == pytest.approx(
        errors_mm(result.transform, *pair[2:]).mean(), abs=0.05
    )


def test_voxel_order_does_not_matter(pair, result):
    """The same volumes stored with flipped and permuted axes are registered the same way."""
    fixed, moving = (sitk.DICOMOrient(image, order) for image, order in zip(pair[:2], ("ASR", "IPL"), strict=True))
    turned = register(fixed, moving, device="cpu")
    difference = errors_mm(turned.transform, *pair[2:]) - errors_mm(result.transform, *pair[2:])
    assert np.abs(difference).max() < 0.6


def test_refinement_makes_nothing_worse(pair, result):
    refined = register(pair[0], pair[1], device="cpu", refine=30)
    assert refined.quality["nmi"]["after"] > result.quality["nmi"]["after"] - 1e-3
    assert refined.quality["folded_percent"] < 0.1
    assert errors_mm(refined.transform, *pair[2:]).mean() < errors_mm(result.transform, *pair[2:]).mean() + 0.1


def test_a_given_transform_replaces_the_initial_alignment(pair, result):
    given = register(pair[0], pair[1], align=affine_transform(result.initial), device="cpu")
    np.testing.assert_allclose(given.initial, result.initial, atol=1e-12)
    assert given.timings["align"] < result.timings["align"]


def test_progress_names_every_stage_in_order_and_ends_at_one(pair):
    seen = []
    register(pair[0], pair[1], align="center", device="cpu", progress=lambda stage, f: seen.append((stage, f)))
    stages = [stage for stage, _ in seen]
    fractions = [f for _, f in seen]
    assert list(dict.fromkeys(stages)) == list(STAGES)
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0


@pytest.mark.parametrize("stage", ["align", "deform", "outputs"])
def test_returning_false_from_progress_cancels(pair, stage):
    with pytest.raises(Cancelled, match=stage):
        register(*pair[:2], align="rigid", device="cpu", progress=lambda s, f: s != stage)


def small(array, **header):
    image = sitk.GetImageFromArray(np.asarray(array))
    for name, value in header.items():
        getattr(image, f"Set{name}")(value)
    return image


def with_nan():
    array = np.random.default_rng(0).random((8, 8, 8), dtype=np.float32)
    array[1, 2, 3] = np.nan
    return small(array)


BAD_IMAGES = {
    "NaN or infinite": with_nan(),
    "constant": small(np.full((8, 8, 8), 3.0, np.float32)),
    "2 dimensions": small(np.random.default_rng(0).random((8, 8), dtype=np.float32)),
    "3 components": sitk.GetImageFromArray(np.random.default_rng(0).random((8, 8, 8, 3)), isVector=True),
    "complex": small(np.ones((8, 8, 8), np.complex64)),
}


@pytest.mark.parametrize("reason", BAD_IMAGES)
@pytest.mark.parametrize("side", ["fixed", "moving"])
def test_an_image_that_cannot_be_registered_is_named_with_the_reason(pair, side, reason):
    images = {"fixed": pair[0], "moving": pair[1]} | {side: BAD_IMAGES[reason]}
    with pytest.raises(InputError, match=f"{side} image .*{reason}"):
        register(images["fixed"], images["moving"], device="cpu")


def test_volumes_that_do_not_overlap_are_refused_without_alignment(pair):
    far = sitk.Image(pair[1])
    far.SetOrigin((9000.0, 0.0, 0.0))
    with pytest.raises(InputError, match="do not overlap"):
        register(pair[0], far, align="none", device="cpu")


def test_volumes_far_apart_are_brought_together(pair, result):
    shift = (9000.0, -500.0, 0.0)
    far = sitk.Image(pair[1])
    far.SetOrigin([o + s for o, s in zip(far.GetOrigin(), shift, strict=True)])
    moved = register(pair[0], far, device="cpu")
    assert errors_mm(moved.transform, pair[2], pair[3] + shift).mean() == pytest.approx(
        errors_mm(result.transform, *pair[2:]).mean(), abs=0.3
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": "no-such-model"}, ModelError, "no-such-model"),
        ({"device": "tpu:9"}, InputError, "tpu:9"),
        ({"device": "cuda:77"}, DeviceError, "cuda:77"),
        ({"align": "sideways"}, InputError, "sideways"),
        ({"refine": -1}, InputError, "-1"),
        ({"interpolation": "cubist"}, InputError, "cubist"),
        ({"spacing": float("nan")}, InputError, "nan"),
        ({"shininess": 3}, InputError, "shininess"),
    ],
)
def test_an_option_that_cannot_be_meant_is_named(pair, options, error, message):
    with pytest.raises(error, match=message):
        register(*pair[:2], **({"device": "cpu"} | options))


def test_an_empty_mask_is_refused(pair):
    empty = sitk.Image(pair[0].GetSize(), sitk.sitkUInt8)
    empty.CopyInformation(pair[0])
    with pytest.raises(InputError, match="fixed mask is empty"):
        register(*pair[:2], fixed_mask=empty, device="cpu")


def test_the_fixed_mask_keeps_what_lies_outside_from_counting(pair):
    """A bright block far outside the head, masked out, changes nothing."""
    fixed, moving = pair[:2]
    array = sitk.GetArrayFromImage(fixed)
    mask = np.ones_like(array)
    mask[:, :12, :12] = 0
    spoilt = array.copy()
    spoilt[:, :12, :12] = 250
    masks = Grid.of(fixed).image(mask)
    results = [
        register(Grid.of(fixed).image(a), moving, fixed_mask=masks, align="rigid", device="cpu")
        for a in (array, spoilt)
    ]
    errors = [errors_mm(r.transform, *pair[2:]).mean() for r in results]
    assert errors[0] == pytest.approx(errors[1], abs=0.3)


@pytest.mark.parametrize("pixel", [sitk.sitkUInt8, sitk.sitkInt16, sitk.sitkUInt16, sitk.sitkFloat32, sitk.sitkFloat64])
def test_the_warped_volume_keeps_the_pixel_type(pair, pixel):
    result = register(pair[0], sitk.Cast(pair[1], pixel), align="center", device="cpu", spacing=6.0)
    assert result.warped.GetPixelID() == pixel


def test_air_fills_what_a_ct_does_not_show(pair):
    ct = sitk.Cast(pair[1], sitk.sitkInt16) * 8 - 1024
    result = register(pair[0], ct, align="none", device="cpu", spacing=6.0)
    assert result.settings["default_value"] == -1024
    assert sitk.GetArrayViewFromImage(result.warped)[0, 0, 0] == -1024


def test_a_large_field_of_view_lowers_the_working_resolution_and_says_so(monkeypatch, pair):
    monkeypatch.setattr("DivRegNetLib.core.grid.LARGEST_WORKING_VOXELS", 40_000)
    result = register(*pair[:2], align="center", device="cpu")
    assert result.settings["spacing"] > 2
    assert any("resolution" in w for w in result.warnings)


def test_what_a_class_network_sees_takes_part_in_the_registration(tiny_model, grid, moving_grid, paint, other_contrast):
    """And a network to which everything is background changes nothing."""
    images = paint(grid), paint(moving_grid, contrast=other_contrast)
    plain = models.load(tiny_model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = ClassNet(ClassNetConfig(classes=3, channels=(4, 4), stride=2)).eval()
        network.head.weight.data *= 50  # tells classes, though without reason
    card = replace(
        plain.card, methods=["variational"], regnet=None, classnet=network.config.as_dict(), classes=["a", "b", "c"]
    )

    def displacement(classnet) -> np.ndarray:
        model = replace(plain, card=card, regnet=None, classnet=classnet)
        found = register(*images, model=model, device="cpu", align="none", refine=8, stiffness=1)
        return sitk.GetArrayFromImage(displacement_on(found.transform, grid))

    seeing = displacement(network)
    assert np.isfinite(seeing).all()
    without = displacement(None)
    assert np.abs(seeing - without).max() > 0.1
    torch.nn.init.zeros_(network.head.weight)
    network.head.bias.data = torch.tensor([100.0, 0.0, 0.0])
    np.testing.assert_allclose(displacement(network), without, atol=1e-6)


def test_a_method_that_the_model_has_no_network_for_is_refused(tiny_model, grid, moving_grid, paint):
    plain = models.load(tiny_model)
    model = replace(plain, card=replace(plain.card, methods=["variational"], regnet=None), regnet=None)
    with pytest.raises(InputError, match="needs a RegNet, which model 'tiny' does not have"):
        register(paint(grid), paint(moving_grid), model=model, device="cpu", align="none", method="regnet")
