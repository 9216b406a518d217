"""Training of the class network: what labels say, what an image looks like, the loss, and a resume bit by bit."""

import csv
import json

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from DivRegNetLib import models
from DivRegNetLib.core.intensity import SCHEMES, normalize
from DivRegNetLib.io.images import write_image
from DivRegNetLib.registration.pipeline import register
from training import layers
from training import train as train_whole
from training.classes import draws, export, subjects, train
from training.classes.config import CONFIGS, Augmentation, ClassTraining, Painting
from training.classes.loss import terms
from training.classes.trainer import BEST, LAST, LOG, fit
from training.data import hippocampus, prepare_hippocampus
from training.experiments import classes as experiment

NONE = Augmentation(**dict.fromkeys(Augmentation.__dataclass_fields__, 0.0) | {"control": (8.0, 8.0)})


def tiny(cohort, **values) -> ClassTraining:
    laid = {
        "sources": [{"cohort": str(cohort)}],
        "channels": [2, 3],
        "stride": 1,
        "steps": 4,
        "batch": 1,
        "warmup": 1,
        "checkpoint_every": 2,
        "validate_every": 2,
    }
    return layers.build(ClassTraining, laid | values)


@pytest.fixture
def two_cohorts(tmp_path, write_cohort, anatomy):
    """One labels classes 1 to 3; of the other, only label 7 was drawn, which covers two of these. Both 16 x 16 x 16."""
    images, labels, _ = anatomy((16, 16, 16), seed=1)
    fine = {"images": images[:1], "labels": labels}
    coarse = {"images": images[:1], "labels": 7 * (labels >= 2).astype(np.uint8)}
    alone = {"images": images[1:2]}
    whole = write_cohort(tmp_path / "fine", {"a": fine, "b": fine | {"split": "validation"}, "unlabeled": alone})
    part = write_cohort(tmp_path / "coarse", {"c": coarse})
    return whole, part


def test_a_label_stands_for_the_classes_that_it_names(two_cohorts):
    fine, coarse = two_cohorts
    config = tiny(fine, names=["one", "two", "three"], sources=[
        {"cohort": str(fine), "classes": {1: "one", 2: "two", 3: "three"}},
        {"cohort": str(coarse), "classes": {7: "two|three"}},
    ])  # fmt: skip
    read = subjects.load(config)
    assert read.names == ("background", "one", "two", "three")
    (fine_stock, coarse_stock) = read.stocks
    (a,), (b,), (c,) = (
        fine_stock.subjects,
        fine_stock.validation,
        coarse_stock.subjects,
    )  # a volume without labels is left out
    assert (a.name, b.name, c.name) == ("a", "b", "c")

    def members(subject, label):
        return [read.names[i] for i in read.sets[subject.set_of[label]].nonzero()[:, 0]]

    assert [members(a, n) for n in range(4)] == [["background"], ["one"], ["two"], ["three"]]
    assert members(c, 7) == ["two", "three"]
    assert members(c, 0) == ["background", "one"]  # it was not said that there is no class one


def test_labels_get_names_in_ascending_order(two_cohorts):
    read = subjects.load(tiny(two_cohorts[0], names=["fluid", "gray", "white"]))
    (a,) = read.stocks[0].subjects
    assert read.names == ("background", "fluid", "gray", "white")
    assert [read.sets[a.set_of[n]].tolist().index(1) for n in range(4)] == [0, 1, 2, 3]


def test_a_label_that_a_volume_lacks_may_be_there_unless_the_source_says_otherwise(tmp_path, write_cohort, anatomy):
    images, labels, _ = anatomy((16, 16, 16), seed=1)
    lacking = np.where(labels == 3, 0, labels)
    folder = write_cohort(
        tmp_path / "cohort",
        {"a": {"images": images[:1], "labels": labels}, "b": {"images": images[:1], "labels": lacking}},
    )
    for absent, background in (("unknown", {0, 3}), ("background", {0})):
        read = subjects.load(tiny(folder, sources=[{"cohort": str(folder), "absent": absent}]))
        b = read.stocks[0].subjects[1]
        assert set(read.sets[b.set_of[0]].nonzero()[:, 0].tolist()) == background


def test_of_anatomy_that_is_not_to_be_known_everything_is_background(two_cohorts):
    fine, coarse = two_cohorts
    kinds = ("nothing", "shapes")
    read = subjects.load(
        tiny(fine, sources=[{"cohort": str(fine)}, *({"cohort": str(coarse), "kind": k} for k in kinds)])
    )
    for (c,) in (stock.subjects for stock in read.stocks[1:]):
        assert (c.set_of == subjects.OUTSIDE).all() and read.sets[subjects.OUTSIDE].tolist() == [1, 0, 0, 0]
        looks = [draws.look(c, (16, 16, 16), 4.0, "robust", Augmentation(), Painting(), seed) for seed in (1, 2)]
        assert all(look.image.std() > 0 and (look.sets == subjects.OUTSIDE).all() for look in looks)
        assert not torch.equal(*(look.image for look in looks))


def test_a_class_that_a_coarse_label_names_may_be_where_there_is_no_label(two_cohorts):
    source = {"cohort": str(two_cohorts[1]), "classes": {7: "two|three"}, "elsewhere": ["three"]}
    read = subjects.load(tiny(two_cohorts[1], sources=[source], names=["one", "two", "three"]))
    (c,) = read.stocks[0].subjects
    assert read.sets[c.set_of[0]].tolist() == [1, 1, 0, 1] and read.sets[c.set_of[7]].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"sources": []}, "name a cohort"),
        ({"sources": [{"cohort": "FINE", "classes": {1: "nobody"}}], "names": ["one"]}, "nobody"),
        ({"sources": [{"cohort": "nowhere"}]}, "cohort.json is missing"),
        ({"sources": [{"cohort": "FINE"}], "names": ["one", "two"]}, "2 names for 3 labels"),
    ],
)
def test_sources_that_cannot_be_say_why(two_cohorts, values, said):
    values = {k: [{n: str(two_cohorts[0]) if w == "FINE" else w for n, w in x.items()} if isinstance(x, dict) else x
                  for x in v] for k, v in values.items()}  # fmt: skip
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        subjects.load(tiny(two_cohorts[0], **values))


def test_an_unknown_key_is_named():
    with pytest.raises(ValueError, match="nonsense"):
        layers.build(ClassTraining, {"augmentation": {"nonsense": 1}})


def subject(two_cohorts, **values):
    read = subjects.load(tiny(two_cohorts[0], **values))
    return read.stocks[0].subjects[0], read.stocks[0]


def test_unchanged_a_volume_looks_as_it_does_on_disk(two_cohorts):
    a, read = subject(two_cohorts)
    image, sets = draws.plain(a, read.shape, read.spacing[0], "robust")
    torch.testing.assert_close(image, normalize(a.images[:1].float(), "robust"), atol=1e-3, rtol=0)
    assert torch.equal(sets, a.set_of[a.labels.long()])


def test_labels_go_where_the_image_goes(two_cohorts):
    """An image that is the label map stays so, however it is placed and bent."""
    a, read = subject(two_cohorts)
    a = subjects.Subject(**vars(a) | {"images": a.labels.half() / 4})
    moved = Augmentation(**vars(NONE) | {"degrees": 30, "scale": 0.3, "stretch": 0.2, "shift": 0.2, "elastic": 0.2})
    for seed in range(3):
        image, sets = draws.look(a, (20, 16, 24), read.spacing[0], "robust", moved, Painting(), seed)
        agree = torch.corrcoef(torch.stack((image.flatten(), sets.flatten().float())))[0, 1]
        assert sets.any() and agree > 0.9


def test_outside_the_field_of_view_the_image_is_0_and_background(two_cohorts):
    a, read = subject(two_cohorts)
    a = subjects.Subject(**vars(a) | {"images": torch.ones_like(a.images), "labels": torch.ones_like(a.labels)})
    cropped = Augmentation(**vars(NONE) | {"crop": 1.0, "noise": 0.1})
    for shape, seed in (((32, 32, 32), 1), ((16, 16, 16), 2)):
        image, sets = draws.look(a, shape, read.spacing[0], "robust", cropped, Painting(), seed)
        outside = sets == subjects.OUTSIDE
        assert outside.any() and not outside.all() and (image[outside] == 0).all()


def test_the_same_seed_gives_the_same_image(two_cohorts):
    a, _ = subject(two_cohorts)
    looks = [draws.look(a, (16, 16, 16), 4.0, "balanced", Augmentation(), Painting(), seed) for seed in (5, 5, 6)]
    assert all(map(torch.equal, looks[0], looks[1])) and not torch.equal(looks[0].image, looks[2].image)


def test_a_label_map_is_painted_in_other_contrasts_each_time(tmp_path, write_cohort, anatomy):
    _, labels, brain = anatomy((16, 16, 16), seed=1)
    folder = write_cohort(tmp_path / "maps", {"a": {"labels": labels, "brain": brain, "contrasts": []}},
                          tissues=["background", "white", "gray", "fluid"])  # fmt: skip
    read = subjects.load(tiny(folder, sources=[{"cohort": str(folder), "kind": "paint"}]))
    (a,), stock = read.stocks[0].subjects, read.stocks[0]
    images = [draws.plain(a, stock.shape, stock.spacing[0], "balanced", seed).image for seed in range(6)]
    means = torch.stack([torch.stack([x[a.labels == n].mean() for n in (1, 2, 3)]) for x in images])
    assert len({tuple(row.argsort().tolist()) for row in means}) > 1


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_images_are_normalized_as_in_a_registration(scheme):
    torch.manual_seed(0)
    image = torch.randn(1, 1, 20, 21, 22).exp()
    inside = torch.rand(image.shape) < 0.7
    for mask in (inside, torch.ones_like(inside)):
        torch.testing.assert_close(draws.normalized(image, scheme, mask), normalize(image, scheme, mask))
    flat = torch.full_like(image, 3.0)
    assert torch.isfinite(draws.normalized(flat, scheme, inside)).all()
    assert torch.isfinite(draws.normalized(image, scheme, torch.zeros_like(inside))).all()


def test_the_loss_is_least_where_the_classes_are_right():
    sets = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 1]])
    number = torch.randint(0, 3, (2, 4, 4, 4), generator=torch.Generator().manual_seed(0))
    fractions = torch.nn.functional.one_hot(number, 4).movedim(-1, 1).float()
    right = 20 * fractions[:, :3]
    assert all(term < 1e-3 for term in terms(right, fractions, sets))
    assert all(term > 0.5 for term in terms(right.roll(1, 1), fractions, sets))


def test_where_two_classes_are_possible_either_is_right():
    sets = torch.tensor([[1.0, 0, 0], [0, 1, 1]])
    number = torch.ones(1, 2, 2, 2, dtype=torch.long)
    fractions = torch.nn.functional.one_hot(number, 2).movedim(-1, 1).float()
    logits = torch.zeros(1, 3, 2, 2, 2)
    for preferred in ([0, 20, 0], [0, 0, 20], [0, 20, 20]):
        entropy, dice = terms(logits + torch.tensor(preferred).view(1, 3, 1, 1, 1), fractions, sets)
        assert entropy < 1e-3 and dice == 0
    assert terms(logits + torch.tensor([20, 0, 0]).view(1, 3, 1, 1, 1), fractions, sets)[0] > 5


@pytest.mark.parametrize(("stride", "subvoxel"), [(1, False), (2, False), (2, True)])
def test_a_killed_training_goes_on_bit_by_bit(two_cohorts, tmp_path, stride, subvoxel):
    config = tiny(two_cohorts[0], stride=stride, subvoxel=subvoxel)
    read = subjects.load(config)
    whole = fit(config, read, tmp_path / "whole")

    class Killed(BaseException):
        pass

    def killed(step=whole.__class__.step):
        def until(trainer):
            if trainer.step_number == 3:
                raise Killed
            return step(trainer)

        return until

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(whole.__class__, "step", killed())
        fit(config, read, tmp_path / "parts")
    with pytest.raises(ValueError, match="holds a training already"):
        fit(config, read, tmp_path / "parts")
    with pytest.raises(ValueError, match="another learning_rate"):
        fit(
            tiny(two_cohorts[0], stride=stride, subvoxel=subvoxel, learning_rate=0.1),
            read,
            tmp_path / "parts",
            resume=True,
        )
    parts = fit(config, read, tmp_path / "parts", resume=True)
    for a, b in zip(whole.ema.state_dict().values(), parts.ema.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    for name in (LOG, LAST, BEST):
        assert (tmp_path / "parts" / name).exists()
    (tmp_path / "parts" / LOG).unlink()  # as of a process that was killed before it wrote the last one
    fit(config, read, tmp_path / "parts", resume=True)
    logs = [list(csv.DictReader((tmp_path / n / LOG).open())) for n in ("whole", "parts")]
    assert logs[0] == logs[1] and float(logs[0][-1]["Dice"]) >= 0


def test_it_learns_a_class_from_its_brightness(tmp_path, write_cohort):
    random = np.random.default_rng(0)
    labels = np.repeat(np.repeat(np.repeat(random.integers(0, 3, (4, 4, 4)), 4, 0), 4, 1), 4, 2).astype(np.uint8)
    images = (labels / 2 + random.normal(0, 0.02, labels.shape)).clip(0, 1)[None].astype(np.float16)
    folder = write_cohort(tmp_path / "cohort", {n: {"images": images, "labels": labels, "split": n} for n in
                                                ("train", "validation")})  # fmt: skip
    still = {"degrees": 0, "elastic": 0, "gamma": 0, "contrast": 0, "bias": 0, "blur": 0, "thick": 0, "noise": 0.02}
    config = tiny(folder, steps=60, channels=[6, 8], validate_every=60, checkpoint_every=60, learning_rate=0.02,
                  ema=0.9, augmentation=still)  # fmt: skip
    trainer = fit(config, subjects.load(config), tmp_path / "run")
    assert trainer.best > 0.8


def test_the_command_trains_and_says_what_came_of_it(two_cohorts, tmp_path, monkeypatch, capsys):
    options = ["--cohort", str(two_cohorts[0]), "--output", str(tmp_path / "run"), "--device", "cpu"]
    short = ["steps=2", "batch=1", "channels=[2,3]", "precision=32"]
    monkeypatch.setattr("sys.argv", ["train.py", *options, *short])
    assert train.main() == 0
    assert "step 2" in capsys.readouterr().out
    assert train.main() == 2
    assert "--resume" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["train.py", *options, "--resume", "--minutes", "0.001", *short[1:]])
    assert train.main() == 0  # the steps are those that it was begun with
    assert "step 2" in capsys.readouterr().out
    options[3] = str(tmp_path / "timed")
    monkeypatch.setattr("sys.argv", ["train.py", *options, "--minutes", "1e-9", *short[1:]])
    assert train.main() == 0
    assert "step 1," in capsys.readouterr().out


def test_a_trained_network_becomes_a_model_that_registers(two_cohorts, tmp_path, monkeypatch, grid, moving_grid, paint):
    config = tiny(two_cohorts[0], name="run", stride=2)
    fit(config, subjects.load(config), tmp_path / "run")
    options = ["--run", str(tmp_path / "run"), "--name", "told", "--models", str(tmp_path / "models")]
    monkeypatch.setattr("sys.argv", ["export.py", *options, "anatomy=phantom", "variational.class_weight=50"])
    assert export.main() == 0
    model = models.load(str(tmp_path / "models" / "told.json"))
    assert model.card.classes == ["background", "1", "2", "3"] and model.card.spacing_mm == 4.0
    settings = model.card.variational_settings
    assert (model.card.anatomy, settings.class_weight) == ("phantom", 50.0)
    # Steps on a finer grid follow what errs in the classes.
    used = settings.with_classes()
    assert used.descriptor_weight == 0 and not any(level.all_voxels for level in used.levels)
    assert str(tmp_path) not in (tmp_path / "models" / "told.json").read_text()
    best = torch.load(tmp_path / "run" / BEST, weights_only=True)
    assert all(torch.equal(v, best["net"][k]) for k, v in model.classnet.state_dict().items())
    found = register(paint(grid), paint(moving_grid), model=model, device="cpu", align="none")
    assert found.card.classes == model.card.classes
    monkeypatch.setattr("sys.argv", ["export.py", *options, "nonsense=1"])
    assert export.main() == 2


def test_of_few_cases_only_these_are_learnt_from(tmp_path, write_cohort, anatomy):
    volumes = {}
    for name in ("a", "b", "c"):
        images, labels, _ = anatomy((16, 16, 16), seed=1)
        volumes[name] = {"images": images[:1], "labels": labels}
    folder = write_cohort(tmp_path / "cohort", volumes)
    for cases, learned in ((2, ["a", "b"]), (0, ["a", "b", "c"])):
        read = subjects.load(tiny(folder, sources=[{"cohort": str(folder), "cases": cases}]))
        assert [s.name for s in read.stocks[0].subjects] == learned


def test_the_experiment_trains_on_few_cases_and_compares_on_pairs_it_never_saw(tmp_path, anatomy, monkeypatch, capsys):
    for i in range(7):
        images, labels, _ = anatomy((16, 20, 18), seed=i + 1)
        for kind, array in (("images", images[0].astype(np.float32)), ("labels", labels.clip(0, 2))):
            image = sitk.GetImageFromArray(array)
            image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
            write_image(image, tmp_path / "hippocampus" / kind / f"crop_{i}.nii.gz")
    monkeypatch.setattr(hippocampus, "HELD_OUT", 4)
    monkeypatch.setattr(prepare_hippocampus, "FIRST", 2)
    assert experiment.pairs(tmp_path)[-1] == ("crop_4.nii.gz", "crop_6.nii.gz")
    output = tmp_path / "out"
    options = [
        "--data",
        str(tmp_path),
        "--cases",
        "1",
        "--steps",
        "2",
        "--pairs",
        "2",
        "--output",
        str(output),
        "--device",
        "cpu",
    ]
    monkeypatch.setattr(
        "sys.argv", ["classes.py", *options, "--workers", "1", "batch=1", "channels=[2,3]", "precision=32"]
    )
    assert experiment.main() == 0
    assert "| 1 cases | 2 |" in (output / "classes.md").read_text()
    assert (output / "classes-worst-1-cases.png").stat().st_size > 1000
    rows = list(csv.DictReader((output / "classes.csv").open()))
    assert [(row["fixed"], row["moving"]) for row in rows] == experiment.pairs(tmp_path)[:2]
    listed = json.loads((output / "cohort" / "cohort.json").read_text())["volumes"]
    splits = {split: [v["name"] for v in listed if v["split"] == split] for split in ("train", "validation", "test")}
    assert (splits["train"], splits["validation"], len(splits["test"])) == (["crop_0", "crop_1"], ["crop_2"], 4)
    monkeypatch.setattr(hippocampus, "HELD_OUT", 5)  # crop_2 is one of them now
    monkeypatch.setattr("sys.argv", ["classes.py", *options, "--cohort", str(output / "cohort")])
    assert experiment.main() == 2
    assert "trains on crop_2" in capsys.readouterr().err


SMALL = (
    *("warmup=1", "regnet.channels=[2,2,2,2]", "kldivnet.channels=4", "loss.samples=64", "data.held_out=1"),
    *(
        "variational.steps=4",
        "validate_every=2",
        "classes.channels=[2,3]",
        "classes.batch=1",
        "classes.validate_every=2",
    ),
)


@pytest.fixture
def train_model(tiny_cohort, tmp_path, monkeypatch):
    """``(*arguments) -> exit code`` of ``train.py`` on the tiny cohort, whose models go to ``tmp_path / "models"``."""

    def run(*arguments: str) -> int:
        options = ["--steps", "2", "--device", "cpu", "--models", str(tmp_path / "models"), *SMALL]
        monkeypatch.setattr("sys.argv", ["train.py", *options, f"data.cohort={tiny_cohort}", *arguments])
        monkeypatch.chdir(tmp_path)
        return train_whole.main()

    return run


def test_a_model_of_a_labeled_cohort_has_a_class_network_that_its_registrations_use(train_model, tmp_path):
    assert train_model("--name", "told", "classes.steps=2") == 0
    model = models.load(str(tmp_path / "models" / "told.json"))
    assert model.card.classes == ["background", "1", "2", "3"]
    assert "segmentation Dice" in model.card.scores and "cohort Dice" in model.card.scores
    assert not any(level.all_voxels for level in model.card.variational_settings.with_classes().levels)
    run = tmp_path / "build" / "training" / "told"
    best = torch.load(run / BEST, weights_only=True)
    assert all(torch.equal(v, best["net"][k]) for k, v in model.classnet.state_dict().items())
    assert train_model("--name", "told", "classes.steps=2", "--resume") == 0
    assert train_model("--name", "told", "classes.steps=2") == 2


def test_a_model_without_labels_or_where_they_are_not_wanted_has_none(
    train_model, tmp_path, write_cohort, anatomy, capsys
):
    volumes = {f"v{i}": {"images": anatomy((16, 16, 16), i + 1)[0][:1], "split": split} for i, split in enumerate(
        ("train", "train", "validation", "validation"))}  # fmt: skip
    folder = write_cohort(tmp_path / "unlabeled", volumes)
    for arguments in (["classes.steps=0"], ["classes.steps=2", f"data.cohort={folder}"]):
        assert train_model("--name", "plain", "--output", str(tmp_path / f"run-{arguments[0]}"), *arguments) == 0
        plain = models.load(str(tmp_path / "models" / "plain.json"))
        assert plain.classnet is None and plain.card.variational_settings.levels[-1].all_voxels
    assert "no class network is trained" in capsys.readouterr().out


def test_a_model_that_is_fine_tuned_without_labels_keeps_its_class_network(train_model, tmp_path):
    assert train_model("--name", "told", "classes.steps=2") == 0
    card = str(tmp_path / "models" / "told.json")
    assert train_model("--name", "tuned", "--from", card, "classes.steps=0") == 0
    first, second = models.load(card), models.load(str(tmp_path / "models" / "tuned.json"))
    assert second.card.classes == first.card.classes
    assert all(torch.equal(v, second.classnet.state_dict()[k]) for k, v in first.classnet.state_dict().items())


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_bundled_file_can_be_read_and_names_no_class_that_it_does_not_list(file):
    config = layers.load(ClassTraining, file)
    named = {n for s in config.sources for classes in (s.classes or {}).values() for n in classes.split("|")}
    assert config.steps and named <= {"background", *config.names}
    assert layers.load(ClassTraining, file, preset="quick").steps < config.steps
