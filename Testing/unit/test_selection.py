"""Candidates and evidence: which one is chosen, and what the stiffnesses share."""

from dataclasses import replace

import pytest
import torch
from textures import deformed, inner, other_contrast, textured

from DivRegNetLib.core import fields
from DivRegNetLib.errors import Cancelled
from DivRegNetLib.registration import methods, selection
from DivRegNetLib.registration.methods import Images
from DivRegNetLib.registration.regnet import RegNet, RegNetConfig
from DivRegNetLib.registration.selection import (
    Agreement,
    Candidate,
    Score,
    best_of,
    cubes_at,
    descriptors_of,
    slopes_of,
    stiffened,
)
from DivRegNetLib.registration.variational import DEFAULT, FAST
from DivRegNetLib.similarity.descriptors import mind_ssc

SHAPE = (32, 40, 24)
ALONE, BOTH = ("variational",), ("variational", "regnet")


def noisy(image: torch.Tensor, seed: int, sd: float = 0.04) -> torch.Tensor:
    return (image + sd * torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))).clamp(0, 1)


@pytest.fixture
def aligned() -> Images:
    """Two contrasts, with noise, of one texture: nothing is to be moved."""
    image = textured(SHAPE, 3)
    return Images(noisy(other_contrast(image), 1), noisy(image, 2))


def bent(mean: float = 1.5) -> tuple[Images, torch.Tensor]:
    moving, fixed, truth = deformed(SHAPE, mean, seed=0)
    return Images(noisy(fixed, 1), noisy(moving, 2)), truth


def network(sd: float = 0.05) -> RegNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = RegNet(RegNetConfig(channels=(2, 2, 2, 2)))
        torch.nn.init.normal_(net.head.weight, std=sd)
    return net.eval().requires_grad_(False)


# Choosing


def test_the_least_distance_is_chosen_and_of_equal_ones_the_first():
    made = []

    def candidate(name: str, value: float) -> Candidate:
        return Candidate(name, lambda: made.append(name) or torch.full((1, 3, 2, 2, 2), value))

    def score(u: torch.Tensor) -> Score:
        return Score(1 - u.mean().item() / 10, 0.5, 1.0)

    choice = best_of([candidate("a", 1.0), candidate("b", 2.0), candidate("c", 2.0)], score)
    assert choice.candidate.name == "b" and (choice.displacement == 2).all()
    assert made == ["a", "b", "c"] and list(choice.scores) == made
    assert choice.as_dict()["scores"]["b"] == {"distance": 0.8, "edges": 0.5, "information": 1.0}
    with pytest.raises(ValueError, match="no candidate"):
        best_of([], score)


def test_a_deformation_has_to_be_better_by_all_evidence():
    none = Score(0.3, 0.7, 1.0)
    assert Score(0.2, 0.74, 1.2).beats(none)
    assert not any(s.beats(none) for s in (Score(0.2, 0.75, 1.05), Score(0.2, 0.73, 2.0), Score(0.31, 0.8, 2.0), none))
    nearly_perfect = Score(0.3, 0.96, 1.0)
    assert Score(0.2, 0.97, 1.2).beats(nearly_perfect) and not Score(0.2, 0.965, 1.2).beats(nearly_perfect)


def test_descriptors_and_slopes_of_some_voxels_are_those_of_the_image():
    image = textured(SHAPE, 3)
    whole = mind_ssc(image)[0].flatten(1).T
    at = torch.arange(image.numel())
    torch.testing.assert_close(descriptors_of(cubes_at(image, at)), whole, atol=1e-5, rtol=1e-4)
    some = at[5000:20000:7]
    assert (descriptors_of(cubes_at(image, some)) - whole[some]).abs().max() < 0.05
    ramp = fields.identity(SHAPE, like=image)[0, :, None] * torch.tensor([1.0, 2.0, -3.0]).view(3, 1, 1, 1, 1)
    middle = torch.tensor([(16 * SHAPE[1] + 20) * SHAPE[2] + 12])
    slopes = slopes_of(cubes_at(ramp.sum(0)[None], middle))
    torch.testing.assert_close(slopes, torch.tensor([[-3.0, 2.0, 1.0]]), atol=1e-4, rtol=1e-4)


def test_images_agree_best_where_they_are_aligned():
    images, truth = bent()
    score = Agreement(images)
    noise = fields.smooth(torch.randn(truth.shape, generator=torch.Generator().manual_seed(0)), 2.0)
    noise = noise / fields.length(noise).mean()
    scores = [score(u) for u in (truth, truth + 0.5 * noise, truth + noise, torch.zeros_like(truth))]
    for part, sign in (("distance", -1), ("edges", 1), ("information", 1)):
        values = [sign * getattr(s, part) for s in scores]
        assert values == sorted(values, reverse=True), part
    assert scores[0].beats(scores[-1]) and scores[0].edges > scores[-1].edges + 0.1


def test_what_was_not_measured_does_not_count():
    images, truth = bent()
    valid = torch.ones(2, 1, 1, *SHAPE, dtype=torch.bool)
    valid[0, ..., :8], valid[1, ..., -6:, :] = False, False
    spoilt = replace(images, fixed=images.fixed * valid[0], moving=images.moving * valid[1], valid=tuple(valid))
    plain = replace(images, valid=tuple(valid))
    for u in (truth, torch.zeros_like(truth)):
        scores = [vars(Agreement(pair)(u)) for pair in (spoilt, plain)]
        assert scores[0] == pytest.approx(scores[1], rel=0.05)
    apart = replace(images, valid=(valid[0], torch.zeros_like(valid[1])))
    assert Agreement(apart)(truth) == selection.NOTHING, "nothing in common"


# Stiffnesses


def test_a_given_stiffness_is_that_of_the_settings(aligned):
    images, _ = bent()
    chosen = selection.deform(images, ALONE, DEFAULT, None, 3.0)
    assert torch.equal(chosen.displacement, methods.deform(images, ALONE, stiffened(DEFAULT, 3.0), None))
    assert chosen.candidate.stiffness == 3.0 and chosen.scores == {}
    usual = selection.deform(images, ALONE, DEFAULT, None, 1.0)
    assert torch.equal(usual.displacement, methods.deform(images, ALONE, DEFAULT, None))
    assert fields.diffusion(chosen.displacement) < fields.diffusion(usual.displacement)


def test_images_that_are_aligned_stay_so(aligned):
    chosen = selection.deform(aligned, ALONE, DEFAULT, None)
    usual = selection.deform(aligned, ALONE, DEFAULT, None, 1.0)
    assert fields.length(usual.displacement).mean() > 0.1, "what would have been done to them"
    assert fields.length(chosen.displacement).mean() < 0.1
    assert chosen.candidate.name == selection.NO_DEFORMATION
    assert set(chosen.scores) == {"none", "stiffness 1"}


def test_a_known_deformation_is_recovered_as_well_as_by_the_best_fixed_stiffness():
    images, truth = bent()
    errors = [
        fields.length(inner(chosen.displacement - truth)).mean().item()
        for chosen in (
            *(selection.deform(images, ALONE, DEFAULT, None, s) for s in selection.STIFFNESSES),
            selection.deform(images, ALONE, DEFAULT, None, thorough=True),
        )
    ]
    # The evidence prefers what fits the noise a little better, as descriptors are also in the equations.
    assert errors[-1] < 1.2 * min(errors[:-1]) < 0.5 * fields.length(inner(truth)).mean().item()


def test_a_thorough_registration_has_more_candidates():
    moving, fixed, _ = deformed((48, 52, 56), 3.0, seed=0)
    images, few = Images(fixed, moving), replace(FAST, steps=6)
    usual = selection.deform(images, ALONE, few, None)
    assert set(usual.scores) == {"none", "stiffness 1"}
    chosen = selection.deform(images, ALONE, few, None, thorough=True)
    stiffnesses = {f"stiffness {s:g}" for s in selection.STIFFNESSES}
    assert set(chosen.scores) == {"none", selection.DISCRETE_START} | stiffnesses
    least = min(score.distance for score in chosen.scores.values())
    assert chosen.scores[chosen.candidate.name].distance == least


def test_a_network_goes_on_from_the_variational_displacement_and_alone_it_is_not_judged():
    images, _ = bent()
    chosen = selection.deform(images, BOTH, DEFAULT, network())
    assert torch.equal(chosen.displacement, methods.deform(images, BOTH, DEFAULT, network()))
    alone = selection.deform(images, ("regnet",), DEFAULT, network())
    assert alone.scores == {} and alone.candidate.stiffness is None


def test_the_same_images_give_the_same_choice_and_displacement():
    images, _ = bent()
    one, other = (selection.deform(images, BOTH, DEFAULT, network()) for _ in range(2))
    assert one.scores == other.scores and torch.equal(one.displacement, other.displacement)


def test_progress_rises_to_one_and_cancels():
    images, _ = bent()
    for names in (ALONE, BOTH, BOTH[::-1], ("regnet",)):
        reported = []
        selection.deform(images, names, DEFAULT, network(), progress=reported.append)
        assert reported == sorted(reported) and reported[-1] == pytest.approx(1) and len(reported) > 1

    def cancel(fraction: float) -> None:
        raise Cancelled("enough")

    with pytest.raises(Cancelled):
        selection.deform(images, ALONE, DEFAULT, None, progress=cancel)
