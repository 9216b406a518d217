"""Models on disk: cards, weights, folders, and every way in which they can be wrong."""

import contextlib
import json
import os
import pickle
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from DivRegNetLib import models
from DivRegNetLib.errors import ModelError
from DivRegNetLib.models import card as cards
from DivRegNetLib.models import store
from DivRegNetLib.registration.regnet import RegNetConfig
from DivRegNetLib.registration.variational import DEFAULT, REFINEMENT
from DivRegNetLib.similarity.classes import ClassNet, ClassNetConfig
from DivRegNetLib.similarity.kldivnet import KLDivNetConfig


def edit(file: Path, **changes) -> None:
    """Changes keys of a card; Ellipsis takes a key out."""
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


def rewrite(file: Path, change) -> Path:
    """Passes the tensors of a model through a function and makes the card's checksum fit; returns the weights."""
    weights = file.with_suffix(".safetensors")
    tensors = load_file(weights)
    change(tensors)
    save_file(tensors, weights)
    edit(file, sha256=models.checksum(weights))
    return weights


@pytest.fixture
def card_file(tiny_model) -> Path:
    return models.find(tiny_model)


def test_a_saved_model_is_loaded_as_it_was(tiny_model, card_file):
    loaded = models.load(tiny_model)
    assert loaded.card == models.read_card(card_file)
    assert loaded.card.name == "tiny"
    assert loaded.regnet.config == RegNetConfig(channels=(2, 2, 2, 2))
    assert loaded.kldivnet.config == KLDivNetConfig(channels=4)
    again = models.save(card_file.parent / "copy", loaded.card, loaded.regnet, loaded.kldivnet)
    copied = models.load(str(again))
    for one, other in ((loaded.regnet, copied.regnet), (loaded.kldivnet, copied.kldivnet)):
        assert one.state_dict().keys() == other.state_dict().keys()
        assert all(torch.equal(v, other.state_dict()[k]) for k, v in one.state_dict().items())


def test_a_loaded_model_is_ready_for_inference(tiny_model):
    loaded = models.load(tiny_model)
    for network in (loaded.regnet, loaded.kldivnet):
        assert not network.training
        assert not any(p.requires_grad for p in network.parameters())
    assert loaded.regnet(*torch.rand(2, 1, 1, 9, 10, 11)).shape == (1, 3, 9, 10, 11)


def test_a_model_without_similarity_network_is_saved_and_loaded(tiny_model, tmp_path):
    loaded = models.load(tiny_model)
    values = {name: getattr(loaded.card, name) for name in loaded.card.__dataclass_fields__}
    card = models.Card(**values | {"name": "alone", "kldivnet": None})
    file = models.save(tmp_path / "models", card, loaded.regnet, None)
    assert models.load("alone").kldivnet is None
    assert not list(file.parent.glob("*.part"))


def test_a_model_without_regnet_is_saved_and_loaded_unless_its_methods_name_it(tiny_model, tmp_path):
    loaded = models.load(tiny_model)
    card = replace(loaded.card, name="alone", regnet=None, methods=["variational"])
    file = models.save(tmp_path / "models", card, None, loaded.kldivnet)
    assert models.load("alone").regnet is None
    edit(file, methods=["variational", "regnet"])
    with pytest.raises(ModelError, match="names regnet, but the file has no such network"):
        models.load("alone")


@pytest.fixture
def with_classes(tiny_model, card_file) -> Path:
    """The card of a model that tells three classes apart."""
    loaded, config = models.load(tiny_model), ClassNetConfig(classes=3, channels=(2, 3), stride=2)
    told = {"classnet": config.as_dict(), "classes": ["background", "one", "two"]}
    return models.save(
        card_file.parent, replace(loaded.card, name="classes", **told), loaded.regnet, loaded.kldivnet, ClassNet(config)
    )


def test_a_class_network_is_saved_and_loaded(with_classes):
    loaded = models.load("classes")
    assert loaded.classnet.config == ClassNetConfig(classes=3, channels=(2, 3), stride=2)
    assert loaded.card.classes == ["background", "one", "two"]
    assert not loaded.classnet.training and not any(p.requires_grad for p in loaded.classnet.parameters())
    assert loaded.on(torch.device("cpu")).classnet is loaded.classnet
    assert models.load("tiny").classnet is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"classes": ["background", "one"]}, "one name for each class"),
        ({"classnet": None}, "one name for each class"),
        ({"classnet": {"classes": "3"}}, "one name for each class"),
        ({"classnet": {"classes": 3, "channels": [2, 3], "stride": 3}}, "do not fit the card"),
        ({"classnet": {"classes": 3, "channels": [2, 4], "stride": 2}}, "do not fit the card"),
        ({"classnet": None, "classes": []}, "unknown tensor 'classnet"),
    ],
)
def test_a_class_network_that_does_not_fit_its_card_is_refused(with_classes, changes, said):
    edit(with_classes, **changes)
    with pytest.raises(ModelError, match=said):
        models.load("classes")


def test_saving_again_replaces_both_files(card_file):
    loaded = models.load("tiny")
    torch.nn.init.ones_(loaded.regnet.head.weight)
    models.save(card_file.parent, loaded.card, loaded.regnet, loaded.kldivnet)
    assert (models.load("tiny").regnet.head.weight == 1).all()


class Killed(BaseException):
    """In place of a signal that ends the process between two steps."""


@pytest.mark.parametrize("step", range(1, 5))
def test_a_model_is_replaced_in_one_step_wherever_saving_is_killed(step, card_file, monkeypatch):
    """At every moment card and weights belong together: either the old ones or the new."""
    old, new = models.load("tiny"), models.load("tiny")
    torch.nn.init.ones_(new.regnet.head.weight)
    done, replace = [], os.replace

    def counted(*paths):
        done.append(paths)
        if len(done) == step:
            raise Killed
        replace(*paths)

    monkeypatch.setattr(os, "replace", counted)
    with contextlib.suppress(Killed):
        models.save(card_file.parent, new.card, new.regnet, new.kldivnet)
    monkeypatch.setattr(os, "replace", replace)
    expected = (old if step <= 2 else new).regnet.head.weight
    assert torch.equal(models.load("tiny").regnet.head.weight, expected)
    models.save(card_file.parent, new.card, new.regnet, new.kldivnet)
    assert torch.equal(models.load("tiny").regnet.head.weight, new.regnet.head.weight)


def test_a_model_can_be_loaded_while_it_is_replaced_again_and_again(card_file):
    """Never is it said to be damaged."""
    model, stop = models.load("tiny"), threading.Event()

    def replace():
        while not stop.is_set():
            torch.nn.init.normal_(model.regnet.head.weight)
            models.save(card_file.parent, model.card, model.regnet, model.kldivnet)

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        for _ in range(30):
            models.load("tiny")
    finally:
        stop.set()
        thread.join()
    assert len(list(card_file.parent.glob("*.safetensors"))) == 1


def test_without_home_and_without_named_folders_the_bundled_models_are_left(monkeypatch):
    monkeypatch.delenv(models.ENVIRONMENT, raising=False)

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert models.own_folders() == []
    assert models.find("general").parent == models.bundled_folder()
    with pytest.raises(ModelError, match=f"no home folder for the model: .* {models.ENVIRONMENT}"):
        models.own_folder()


# Where models are looked for


def test_the_users_own_folders_come_before_the_bundled_one(card_file, tmp_path, monkeypatch):
    bundled = tmp_path / "bundled"
    bundled.mkdir()
    monkeypatch.setattr(store, "bundled_folder", lambda: bundled)
    for name in ("tiny", "shipped"):
        (bundled / f"{name}.json").write_text("{}")
    assert models.find("tiny") == card_file
    assert models.find("shipped") == bundled / "shipped.json"
    monkeypatch.delenv(models.ENVIRONMENT)
    assert models.find("tiny") == bundled / "tiny.json"


def test_several_folders_are_searched_in_their_order(tmp_path, monkeypatch):
    for folder, names in (("a", ["one"]), ("b", ["one", "two"])):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / f"{name}.json").write_text("{}")
    entries = [str(tmp_path / "missing"), "", str(tmp_path / "a"), str(tmp_path / "b")]
    monkeypatch.setenv(models.ENVIRONMENT, os.pathsep.join(entries))
    assert models.folders()[:-1] == [tmp_path / "missing", tmp_path / "a", tmp_path / "b"]
    assert models.find("one") == tmp_path / "a" / "one.json"
    assert models.find("two") == tmp_path / "b" / "two.json"


def test_a_model_can_be_named_by_the_path_of_its_card(card_file, monkeypatch):
    monkeypatch.delenv(models.ENVIRONMENT)
    assert models.find(str(card_file)) == card_file


def test_an_unknown_model_is_refused_with_those_that_are_known(tiny_model, tmp_path):
    with pytest.raises(ModelError, match=r"no model 'large'.*tiny") as error:
        models.find("large")
    assert str(tmp_path / "models") in str(error.value)


@pytest.mark.parametrize("file", sorted(models.bundled_folder().glob("*.json")), ids=lambda file: file.stem)
def test_a_model_that_ships_can_be_loaded(file):
    loaded = models.load(str(file))
    assert loaded.card.name == file.stem
    assert loaded.card.license
    assert loaded.card.training


# Cards of format 1


def old_card(file: Path, newton: int, **changes) -> None:
    """Makes a card one of format 1."""
    values = json.loads(file.read_text())
    regnet = {k: v for k, v in values["regnet"].items() if k != "guided"} | {"newton": newton}
    edit(file, format=1, methods=..., variational=..., refinement=..., regnet=regnet, **changes)


@pytest.mark.parametrize("newton", [0, 7])
def test_a_card_of_format_1_is_read_as_one_of_format_3(card_file, newton):
    values = json.loads(card_file.read_text())
    old_card(card_file, newton, licence=values["license"], license=..., normalisation="robust", normalization=...)
    card = models.read_card(card_file)
    assert card.format == 3
    assert card.methods == (["variational", "regnet"] if newton else ["regnet"])
    assert card.variational_settings == replace(DEFAULT, steps=newton or DEFAULT.steps)
    assert card.refinement_settings == REFINEMENT
    assert RegNetConfig(**card.regnet) == RegNetConfig(channels=(2, 2, 2, 2), guided=newton > 0)
    assert (card.license, card.normalization) == (values["license"], "robust")


def test_in_a_card_of_format_2_a_level_with_a_displacement_of_its_own_stride_sampled_all_voxels(card_file):
    values = json.loads(card_file.read_text())
    for key in ("variational", "refinement"):
        for level in values[key]["levels"]:
            level["stride"] = int(level.pop("all_voxels"))
    card_file.write_text(json.dumps(values | {"format": 2}))
    card = models.read_card(card_file)
    assert card.variational_settings == DEFAULT and card.variational_settings.levels[-1].all_voxels
    assert card.refinement_settings == REFINEMENT


@pytest.mark.parametrize("levels", [7, [7], [{"stride": 1}]])
def test_a_card_of_format_2_with_invalid_levels_is_refused(card_file, levels):
    values = json.loads(card_file.read_text())
    card_file.write_text(json.dumps(values | {"format": 2, "variational": {"levels": levels}}))
    with pytest.raises(ModelError, match=str(card_file)):
        models.read_card(card_file)


@pytest.mark.parametrize("newton", ["7", True, None, -1])
def test_a_card_of_format_1_with_an_invalid_number_of_steps_is_refused(card_file, newton):
    old_card(card_file, newton)
    with pytest.raises(ModelError, match=str(card_file)):
        models.load("tiny")


# Cards that are wrong


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": 4}, "format 4, this version of DivRegNet reads 3"),
        ({"format": ...}, "format None"),
        ({"license": ...}, "no 'license'"),
        ({"sha256": ...}, "no 'sha256'"),
        ({"color": "red"}, "unknown key 'color'"),
        ({"name": "other"}, "model 'other'"),
        ({"modalities": "T1"}, "'modalities'"),
        ({"spacing_mm": "2"}, "'spacing_mm'"),
        ({"spacing_mm": True}, "'spacing_mm'"),
        ({"spacing_mm": 0.01}, "spacing_mm must be between"),
        ({"spacing_mm": float("nan")}, "spacing_mm must be between"),
        ({"regnet": 1}, "'regnet'"),
        ({"regnet": None}, "'methods' .* names regnet"),
        ({"methods": []}, "'methods'"),
        ({"methods": ["regnet", "magic"]}, "'methods'"),
        ({"methods": "regnet"}, "'methods'"),
        ({"variational": {"steps": 0}}, "variational in the model card: steps: from 1"),
        ({"refinement": {"color": 0}}, "refinement in the model card: settings: unknown key 'color'"),
        ({"kldivnet": 1}, "'kldivnet'"),
        ({"training": []}, "'training'"),
    ],
)
def test_a_wrong_card_is_refused_with_its_file_and_the_reason(card_file, changes, says):
    edit(card_file, **changes)
    with pytest.raises(ModelError, match=says) as error:
        models.load("tiny")
    assert str(error.value).startswith(f"{card_file}: ")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[1, 2]", b'"tiny"', b"[" * 100_000],
    ids=["empty", "cut off", "not text", "a list", "a string", "bottomless"],
)
def test_a_card_that_is_no_json_object_is_refused_with_its_file(card_file, content):
    card_file.write_bytes(content)
    with pytest.raises(ModelError) as error:
        models.read_card(card_file)
    assert str(error.value).startswith(f"{card_file}: ")


def test_a_card_of_absurd_size_is_not_read(card_file):
    card_file.write_bytes(b" " * (cards.LARGEST_CARD_BYTES + 1))
    with pytest.raises(ModelError, match="refused") as error:
        models.read_card(card_file)
    assert str(card_file) in str(error.value)


def test_a_card_that_is_missing_is_an_error_with_its_file(tmp_path):
    with pytest.raises(ModelError) as error:
        models.read_card(tmp_path / "none.json")
    assert str(tmp_path / "none.json") in str(error.value)


def test_an_unknown_normalization_is_refused_with_those_known(card_file):
    edit(card_file, normalization="magic")
    with pytest.raises(ModelError, match=r"'magic', known are .*robust") as error:
        models.load("tiny")
    assert str(card_file) in str(error.value)


# Weights that are wrong


def assert_refused(weights: Path, says: str) -> None:
    with pytest.raises(ModelError, match=says) as error:
        models.load("tiny")
    assert str(error.value).startswith(f"{weights}: ")
    assert "\n" not in str(error.value)


def test_missing_weights_are_refused(card_file):
    card_file.with_suffix(".safetensors").unlink()
    assert_refused(card_file.with_suffix(".safetensors"), "missing")


def test_one_changed_byte_is_noticed(card_file):
    weights = card_file.with_suffix(".safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert_refused(weights, "checksum")


def test_a_pickle_that_calls_itself_safetensors_is_not_opened(card_file, tmp_path):
    ran = tmp_path / "ran"

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (ran,))

    weights = card_file.with_suffix(".safetensors")
    weights.write_bytes(pickle.dumps(Bomb()))
    edit(card_file, sha256=models.checksum(weights))
    assert_refused(weights, "do not fit the card")
    assert not ran.exists()


def test_half_a_file_is_refused(card_file):
    weights = card_file.with_suffix(".safetensors")
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    edit(card_file, sha256=models.checksum(weights))
    assert_refused(weights, "do not fit the card")


def test_weights_of_other_shapes_are_refused(card_file):
    edit(card_file, regnet=RegNetConfig(channels=(2, 2, 2, 3)).as_dict())
    assert_refused(card_file.with_suffix(".safetensors"), "size mismatch")


def test_a_missing_tensor_is_refused(card_file):
    assert_refused(rewrite(card_file, lambda t: t.pop("regnet.head.bias")), "head.bias")


def test_a_stray_tensor_of_a_network_is_refused(card_file):
    assert_refused(rewrite(card_file, lambda t: t.update({"regnet.extra": torch.zeros(1)})), "extra")


def test_a_stray_tensor_of_no_network_is_refused(card_file):
    assert_refused(rewrite(card_file, lambda t: t.update({"optimizer": torch.zeros(1)})), "unknown tensor 'optimizer'")


def test_a_similarity_network_that_the_card_does_not_know_is_refused(card_file):
    edit(card_file, kldivnet=None)
    assert_refused(card_file.with_suffix(".safetensors"), "unknown tensor 'kldivnet")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["regnet.head.weight", "kldivnet.fixed_branch.0.bias"])
def test_weights_that_are_not_finite_are_refused(card_file, name, value):
    def spoil(tensors) -> None:
        tensors[name].view(-1)[0] = value

    assert_refused(rewrite(card_file, spoil), f"'{name}' holds values that are not finite")


@pytest.mark.parametrize(
    "changes",
    [
        {"regnet": {"channels": [2, 2, 2, 2], "color": 1}},
        {"regnet": {"channels": 2}},
        {"regnet": {"channels": [2, 2, 2, 2], "stride": 3}},
        {"regnet": {"channels": [2, 2, 2, "2"]}},
        {"kldivnet": {"channels": 4, "color": 1}},
        {"kldivnet": {"channels": "4"}},
        {"kldivnet": {"channels": -4}},
        {"kldivnet": {"channels": 4, "patch": 0}},
        {"kldivnet": {"channels": 4, "patch": "2"}},
        {"kldivnet": {"channels": 4, "frequencies": -1}},
        {"kldivnet": {"channels": 4, "context": -1}},
    ],
)
def test_an_impossible_architecture_is_refused(card_file, changes):
    edit(card_file, **changes)
    assert_refused(card_file.with_suffix(".safetensors"), "do not fit the card")


# Files of strangers


def absurd(header_bytes: int, header: bytes = b"") -> bytes:
    return header_bytes.to_bytes(8, "little") + header


HEADERS = {
    "a header said to be 8 EiB": absurd(2**63 - 1, b"{}"),
    "a header said to be 10 GB": absurd(10**10, b"{}"),
    "nothing": b"",
    "no JSON": absurd(4, b"1234"),
    "a header without end": absurd(100_000, b"[" * 100_000),
    "a tensor beyond the file": absurd(
        61, b'{"regnet.head.bias":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}'[:61]
    ),
    "a tensor of 10^18 numbers": absurd(
        91, b'{"regnet.head.bias":{"dtype":"F32","shape":[1000000000,1000000000],"data_offsets":[0,12]}}'
    ),
    "an unknown type": absurd(70, b'{"regnet.head.bias":{"dtype":"OBJ","shape":[3],"data_offsets":[0,12]}}')
    + bytes(12),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_weights_with_an_absurd_header_are_refused(card_file, kind):
    weights = card_file.with_suffix(".safetensors")
    weights.write_bytes(HEADERS[kind])
    edit(card_file, sha256=models.checksum(weights))
    assert_refused(weights, "do not fit the card")


def test_weights_of_absurd_size_are_not_even_summed_up(card_file, monkeypatch):
    weights = card_file.with_suffix(".safetensors")
    with weights.open("ab") as file:
        file.truncate(store.LARGEST_WEIGHTS_BYTES + 1)
    monkeypatch.setattr(store, "checksum", None)
    assert_refused(weights, "refused")


@pytest.mark.parametrize("name", ["../../evil", "/etc/passwd", "..", "tiny/../tiny", "a\\b", "", "C:evil", "x\0y"])
def test_a_card_cannot_name_a_file_elsewhere(card_file, tmp_path, name):
    edit(card_file, name=name)
    with pytest.raises(ModelError, match="its file must have that name"):
        models.load("tiny")


@pytest.mark.parametrize("name", ["../models/tiny", "/etc/passwd", "..", "models/../tiny", ""])
def test_a_model_asked_for_by_a_path_that_is_no_card_is_unknown(card_file, name):
    with pytest.raises(ModelError, match="no model"):
        models.find(name)


def test_a_card_of_100_megabytes_is_not_read(card_file, monkeypatch):
    card_file.write_text('{"format": 1, "training": {"a": "' + "x" * 100_000_000 + '"}}')
    monkeypatch.setattr(Path, "read_text", None)
    with pytest.raises(ModelError, match="more than 1000000 bytes is refused"):
        models.load("tiny")


def test_a_pipe_in_the_place_of_a_card_is_not_waited_for(card_file):
    card_file.unlink()
    os.mkfifo(card_file)
    with pytest.raises(ModelError, match="not a regular file"):
        models.load("tiny")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": 99}, "format 99, .* update DivRegNet"),
        ({"format": "1"}, "format '1'"),
        ({"regnet": {"channels": [10**6] * 4}}, "do not fit the card"),
        ({"regnet": {"channels": [2, 2, 2, 2], "passes": 10**9}}, "do not fit the card"),
        ({"kldivnet": {"channels": 10**9}}, "do not fit the card"),
        ({"spacing_mm": 1e308}, "spacing_mm must be between"),
        ({"modalities": [{"a": []}] * 3}, None),
    ],
)
def test_a_card_of_the_future_or_of_giants_is_refused_before_the_memory_is_taken(card_file, changes, says):
    edit(card_file, **changes)
    if says is None:
        assert models.load("tiny").card.modalities == changes["modalities"]
        return
    with pytest.raises(ModelError, match=says):
        models.load("tiny")


def test_pickles_are_refused_by_the_command_line_and_never_run(card_file, tmp_path, sample_data, capsys):
    from DivRegNetLib.run.cli import main

    ran = tmp_path / "ran"

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (ran,))

    weights = card_file.with_suffix(".safetensors")
    torch.save({"regnet": Bomb()}, weights)
    edit(card_file, sha256=models.checksum(weights))
    image = str(sample_data / "fixed_T1.nii.gz")
    for model in (str(card_file), str(weights), "tiny"):
        assert (
            main(["register", image, image, "--model", model, "--output", str(tmp_path / "out"), "--device", "cpu"])
            == 2
        )
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith("divregnet: ") and "unexpected" not in said
    assert not ran.exists() and not (tmp_path / "out").exists()
