"""Configurations of training: presets, overrides, errors, and the bundled files."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from training import config as configs
from training.config import CONFIGS, Config

SHIPPED = sorted(CONFIGS.glob("*.yaml"))


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(
        "name: run\nsteps: 100\nloss: {diffusion: 3.0, bins: 16}\n"
        "presets:\n  quick: {steps: 5, loss: {diffusion: 1.0}}\n  paper: {regnet: {guided: false}}\n"
    )
    return path


# Precedence


def test_missing_values_have_their_defaults(file):
    config = configs.load(file)
    assert (config.name, config.steps, config.loss.diffusion, config.loss.bins) == ("run", 100, 3.0, 16)
    default = Config(name="run")
    assert (config.batch, config.loss.samples, config.regnet) == (default.batch, default.loss.samples, default.regnet)


def test_options_replace_overrides_replace_the_preset_replaces_the_file(file):
    assert configs.load(file, preset="quick").steps == 5
    config = configs.load(file, preset="quick", overrides=["loss.diffusion=0.5", "steps=6", "steps=7"])
    assert (config.steps, config.loss.diffusion, config.loss.bins) == (7, 0.5, 16)
    config = configs.load(file, preset="quick", overrides=["steps=6"], steps=8, name="other", data={"cohort": "here"})
    assert (config.steps, config.name, config.data.cohort, config.loss.diffusion) == (8, "other", "here", 1.0)


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("learning_rate=0.01", lambda c: c.learning_rate == 0.01),
        ("learning_rate=1e-3", lambda c: c.learning_rate == 0.001),
        ("learning_rate=2", lambda c: c.learning_rate == 2.0 and isinstance(c.learning_rate, float)),
        ("regnet.channels=[1, 2, 3, 4]", lambda c: c.regnet.channels == (1, 2, 3, 4)),
        ("regnet.symmetric=true", lambda c: c.regnet.symmetric is True),
        ("data.tasks=[T2-T2]", lambda c: c.data.tasks == ["T2-T2"]),
        ("data.augmentation.degrees=3", lambda c: c.data.augmentation.degrees == 3.0),
        ("data={held_out: 3}", lambda c: c.data.held_out == 3),
        ("card.summary=a=b", lambda c: c.card == {"summary": "a=b"}),
    ],
)
def test_an_override_reaches_every_kind_of_value(file, override, read):
    assert read(configs.load(file, overrides=[override]))


# Errors


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("stepps=5", "Key 'stepps' not in .*; known are name, seed"),
        ("loss.weigth=1", "loss.weigth: Key 'weigth' not in .*; known are similarity, weight"),
        ("data.augmentation.turn=1", r"data\.augmentation\.turn: .*; known are degrees, shift_mm"),
        ("regnet.match=true", r"regnet\.match: Key 'match' not in .*; known are channels"),
        ("steps=ten", "steps: Value 'ten' .*Integer"),
        ("steps=1.5", "steps: Value '1.5' .*Integer"),
        ("steps=true", "steps: Value 'True' .*Integer"),
        ("learning_rate=fast", "learning_rate: Value 'fast' .*Float"),
        ("learning_rate=false", "learning_rate: Value 'False' .*Float"),
        ("learning_rate=0", "learning_rate must be greater than 0, got 0"),
        ("data=5", "data: 5 is of the wrong type"),
        ("data.tasks=T1-T2", r"data\.tasks: .*not a .*list"),
        ("data.tasks=[T1-CT]", "data: tasks is one of .*got 'T1-CT'"),
        ("data.pairs=all", "data: pairs is one of cohort, phantoms, synthesis, got 'all'"),
        ("data.held_out=0", "data: held_out is at least 1, got 0"),
        ("loss.similarity=ssd", "loss: similarity is one of kldiv, mi, lncc, got 'ssd'"),
        ("regnet.channels=[1, 2, 3, x]", r"regnet\.channels: .*'x'. is of the wrong type"),
        ("regnet.stride=3", "regnet: RegNet's stride is 1"),
        ("kldivnet.patch=0", "kldivnet: KLDivNet's patch is a whole number from 1"),
        ("variational.steps=0", "variational: steps: from 1 to"),
        ("variational.stepps=5", r"variational\.stepps: Key 'stepps' not in .*; known are steps, stride, levels"),
        ("variational.first_smoothness.fluid=x", r"variational\.first_smoothness\.fluid: Value 'x'"),
        ("variational.levels=[{shrink: 2}]", "variational: .*levels.*'share' is missing"),
        (
            "methods=[discrete]",
            r"methods to train with are \[regnet\], \[variational, regnet\] or, .* \[variational\], got",
        ),
        ("batch=0", "batch is at least 1, got 0"),
        ("steps=0", "steps is at least 1"),
        ("name=null", "name: .*None.* 'str'"),
    ],
)
def test_an_invalid_value_is_refused_with_its_key_and_file(file, override, named):
    with pytest.raises(ValueError, match=named) as caught:
        configs.load(file, overrides=[override])
    assert str(caught.value).startswith(str(file))


def test_kldivnet_alone_is_only_trained_where_it_is_the_similarity(file):
    alone = "methods=[variational]"
    assert not configs.load(file, overrides=[alone, "loss.similarity=kldiv"]).trains_regnet
    with pytest.raises(ValueError, match=r"train KLDivNet alone: loss\.similarity is kldiv, got 'mi'"):
        configs.load(file, overrides=[alone, "loss.similarity=mi"])


@pytest.mark.parametrize("override", ["steps", "=5", "steps=[1", ""])
def test_an_invalid_override_is_refused_and_repeated(file, override):
    with pytest.raises(ValueError, match=r"an override is KEY=VALUE|the value is not YAML") as caught:
        configs.load(file, overrides=[override])
    assert str(caught.value).startswith(repr(override))


def test_an_unknown_preset_is_refused_and_the_known_are_listed(file):
    with pytest.raises(ValueError, match="has no preset 'fast'; it has quick, paper") as caught:
        configs.load(file, preset="fast")
    assert str(file) in str(caught.value)
    file.write_text("name: run")
    with pytest.raises(ValueError, match="it has none"):
        configs.load(file, preset="fast")


@pytest.mark.parametrize("text", ["", "- 1", "run", "name: [", "presets: 5", "presets: {quick: 5}", "\x00"])
def test_a_file_that_is_no_configuration_is_named(file, text):
    file.write_text(text)
    with pytest.raises(ValueError, match=r"run\.yaml"):
        configs.load(file)


def test_a_missing_or_binary_file_is_named(file):
    with pytest.raises(ValueError, match=r"none\.yaml: cannot be read"):
        configs.load(file.with_name("none.yaml"))
    file.write_bytes(b"name: \xff\xfe")
    with pytest.raises(ValueError, match=r"run\.yaml: cannot be read"):
        configs.load(file)


def test_a_run_without_a_name_is_refused(file):
    file.write_text("steps: 5")
    with pytest.raises(ValueError, match=r"run\.yaml: name: .*missing"):
        configs.load(file)


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a\\b", "a b", "-x", "a\n", "a\0b", "C:x"])
def test_a_name_that_is_no_file_name_is_refused(name):
    with pytest.raises(ValueError, match="name becomes a file name"):
        configs.build({"name": name})


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(
                st.sampled_from(["name", "steps", "data", "loss", "regnet", "channels", "tasks", "card", "x"]), inner
            )
        ),
    )
)
def test_any_values_give_a_configuration_or_a_value_error(values):
    try:
        built = configs.build(values)
    except ValueError as error:
        assert str(error).startswith("configuration")
    else:
        assert configs.build(built.as_dict()) == built


# Bundled files


@pytest.mark.parametrize("shipped", SHIPPED, ids=lambda f: f.stem)
def test_every_bundled_file_loads_with_each_of_its_presets(shipped):
    presets = yaml.safe_load(shipped.read_text()).get("presets", {})
    for preset in (None, *presets):
        config = configs.load(shipped, preset=preset)
        assert configs.build(config.as_dict()) == config


def test_the_default_configuration_has_both_presets_and_is_unsupervised():
    own = CONFIGS / "retrain.yaml"
    for preset in ("quick", "paper"):
        config = configs.load(own, preset=preset, name="mine")
        assert (config.loss.known, config.loss.labels, config.data.pairs) == (0, 0, "cohort")
    paper = configs.load(own, preset="paper", name="mine")
    assert (paper.steps, paper.learning_rate, paper.final_learning_rate) == (10_000, 1e-3, 1e-3)
    assert paper.methods == ("regnet",)
    assert (paper.regnet.guided, paper.regnet.velocity, paper.regnet.symmetric) == (False, False, False)
    assert (paper.kldivnet.frequencies, paper.kldivnet.context) == (0, 0)
