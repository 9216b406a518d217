"""Documents agree with the code: options, commands, paths, names, links, figures, versions."""

import ast
import csv
import functools
import itertools
import json
import re
import shlex
from pathlib import Path

import document_options
import pytest
import SimpleITK as sitk
import yaml
from documents import DOCUMENTS, ROOT, document, table

import DivRegNetLib
from DivRegNetLib.io.landmarks import Landmarks, write_landmarks
from DivRegNetLib.options import STAGES
from DivRegNetLib.quality import verdict
from DivRegNetLib.run.cli import main
from DivRegNetLib.run.cohort.results import TABLE_COLUMNS

CURRENT = [d for d in DOCUMENTS if str(d) != "CHANGELOG.md"]  # which is also about what there was
PLACES = ("DivRegNet/", "DivRegNetLib/", "Resources/", "Testing/", "training/", "docs/", ".ci/")
PACKAGES = {"DivRegNetLib": ROOT, "DivRegNetModule": ROOT / "DivRegNet", "training": ROOT}
each_document = pytest.mark.parametrize("text", CURRENT, ids=str)


def test_the_readme_is_short():
    assert document("README.md").text.count("\n") < 120


def test_every_document_is_reached_from_the_readme():
    reached, waiting = set(), [document("README.md")]
    while waiting:
        here = waiting.pop()
        if here.path not in reached:
            reached.add(here.path)
            targets = {(here.path.parent / link.split("#")[0]).resolve() for link in here.links if ":" not in link}
            waiting += [d for d in DOCUMENTS if d.path in targets]
    assert {str(d) for d in DOCUMENTS if d.path not in reached} <= {"training/README.md"}


@pytest.mark.parametrize("text", DOCUMENTS, ids=str)
def test_links_within_the_repository_lead_somewhere(text):
    broken = []
    for link in text.links:
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (text.path.parent / name).resolve() if name else text.path
        if not _exists(target) or (anchor and anchor not in document(target.relative_to(ROOT)).anchors):
            broken.append(link)
    assert not broken


@each_document
def test_paths_exist(text):
    words = " ".join([*text.code, *text.commands]).split()
    paths = {word.strip("'\"(),;:") for word in words if word.startswith(PLACES)}
    assert not [path for path in sorted(paths) if not _exists(ROOT / path)]


@each_document
def test_names_of_tests_exist(text):
    names = {word for word in " ".join(text.code).split() if re.fullmatch(r"test_\w+\*?", word)}
    assert not [name for name in sorted(names) if not any((ROOT / "Testing").glob(f"*/{name}.py"))]


@each_document
def test_names_of_modules_functions_and_classes_exist(text):
    words = " ".join(text.code).split()
    names = {w for w in words if re.fullmatch(rf"(?:{'|'.join(PACKAGES)})(?:\.\w+)+", w)}
    assert not [name for name in sorted(names) if not _is_defined(name)]


@each_document
def test_python_examples_compile_and_import_what_there_is(text):
    for code in text.blocks("python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in PACKAGES:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                assert not [name for name in names if not _is_defined(name)]


@each_document
def test_commands_are_valid(text):
    for line in text.commands:
        words = [w for w in shlex.split(line) if not re.fullmatch(r"[A-Z_]+=\d+", w)]
        if words[0] == "divregnet":
            parser = document_options.parser()
            parser.error = functools.partial(pytest.fail, line)
            parser.parse_args(words[1:])
        _check_other_command(words, line)
    for code in text.code:
        words = code.split()
        if words[0] == "divregnet" and len(words) > 1 and words[1] in document_options.parsers():
            known = document_options.parsers()[words[1]]._option_string_actions
            assert not [w for w in words if w.startswith("--") and w not in known], code
        elif words[0] == "divregnet" and len(words) > 1:
            assert words[1] in ("COMMAND", "--version"), code
        _check_other_command(words, code)


def test_the_tables_of_arguments_and_options_are_those_of_the_command_line():
    text = document("docs/command-line.md").text
    missing = {*document_options.parsers(), "options", "presets"} - set(document_options.tables(text))
    assert missing <= {"models"}, "which has no arguments of its own"
    assert document_options.updated(text) == text, "run python Testing/tools/document_options.py"


def test_every_argument_of_the_command_line_has_a_help_text():
    for name, parser in document_options.parsers().items():
        assert not [a.dest for a in parser._actions if not a.help], name


# --- what a registration writes


@pytest.fixture
def written(paint, grid, moving_grid, other_contrast, tiny_model, landmarks, tmp_path) -> Path:
    """The folder of a registration with labels and landmarks."""
    for name, image in (("fixed", paint(grid)), ("moving", paint(moving_grid, contrast=other_contrast))):
        sitk.WriteImage(image, str(tmp_path / f"{name}.nii.gz"))
        sitk.WriteImage(sitk.Cast(image > 0.3, sitk.sitkUInt8), str(tmp_path / f"{name}_labels.nii.gz"))
        write_landmarks(Landmarks(landmarks[:4], ("a", "b", "c", "d")), tmp_path / f"{name}.mrk.json")
    at = lambda name: str(tmp_path / name)  # noqa: E731
    references = itertools.chain.from_iterable(
        (f"--{side}-labels", at(f"{side}_labels.nii.gz"), f"--{side}-landmarks", at(f"{side}.mrk.json"))
        for side in ("fixed", "moving")
    )
    files = (at("fixed.nii.gz"), at("moving.nii.gz"))
    how = ("--model", tiny_model, "--align", "none", "--device", "cpu", "--error-map", "--output", at("out"))
    assert main(["register", *files, *references, *how]) == 0
    return tmp_path / "out"


def test_the_files_and_keys_of_a_registration_are_described(written):
    text = document("docs/command-line.md")
    assert {row[0].strip("`") for row in text.table("What it writes")} == {path.name for path in written.iterdir()}
    report = json.loads((written / "quality.json").read_text(encoding="utf-8"))
    described = {key for row in text.table("The quality card") for key in re.findall(r"`(\w+)`", row[0])}
    assert described == set(report)
    quality = next(row[1] for row in text.table("The quality card") if row[0] == "`quality`")
    assert set(report["quality"]) <= set(re.findall(r"`(\w+)`", quality))
    seconds = next(row[1] for row in text.table("The quality card") if row[0] == "`seconds`")
    assert re.findall(r"\w+", seconds.split(":")[1]) == list(STAGES) == list(report["seconds"])
    assert re.findall(r"`(\w+)`", text.section("Cohort results")) == list(TABLE_COLUMNS)


def test_the_limits_of_the_verdict_in_the_guide_are_those_of_the_code():
    rows = {row[0]: row[1] for row in document("docs/guide.md").table("Read the verdict")}
    assert list(rows) == list(verdict.LEVELS)
    for limit in (
        f"{verdict.FOLDED_AMBER_PERCENT:g} %", f"{verdict.DISPLACEMENT_AMBER_MM:g} mm", f"{verdict.INVERSE_AMBER_MM:g} mm",
    ):  # fmt: skip
        assert limit in rows[verdict.AMBER]
    for limit in (f"{verdict.FOLDED_RED_PERCENT:g} %", f"{verdict.INVERSE_RED_MM:g} mm"):
        assert limit in rows[verdict.RED]


# --- figures


def test_the_figures_of_the_readme_are_those_of_the_benchmark():
    methods = ("ANTs SyN", "elastix", "ConvexAdam", "NiftyReg", "greedy", "DivRegNet, fast", "DivRegNet")
    measured = {(row["family"], row["set"], row["method"]): row for row in _results("benchmark")}
    rows = table(document("README.md").section("How accurate it is"))
    shown_families = set()
    for name, *shown in rows:
        seconds, which = name.startswith("CPU seconds, "), "seen" if name.endswith(", seen") else "held back"
        family = re.sub(r"^CPU seconds, | \(\d+\)|, mm|, seen", "", name)
        column = "CPU s" if seconds else "error mm" if ", mm" in name else "Dice"
        for method, cell in zip(methods, shown, strict=True):
            number = cell.strip("*")
            digits = len(number.partition(".")[2])
            assert f"{float(measured[family, which, method][column]):.{digits}f}" == number, (name, method)
        if count := re.search(r"\((\d+)\)", name):
            assert count[1] == measured[family, which, "DivRegNet"]["pairs"]
            shown_families.add((family, which))
    assert shown_families == {(family, which) for family, which, _ in measured}


@pytest.mark.parametrize(
    "section, results",
    [
        ("What trains best", "similarities"),
        ("AAL Brain", "aal-brain-2mm"),
        ("Calibration of the verdict", "calibration"),
        ("No harm", "no-harm"),
    ],
)
def test_the_figures_of_the_notebook_are_those_of_the_results(section, results):
    measured = [
        abs(float(v)) for row in _results(results) for v in row.values() if re.fullmatch(r"-?[\d.]+(e-?\d+)?", v)
    ]
    for row in document("docs/experiments.md").table(section):
        for number in re.findall(r"\d+\.\d+", " ".join(row[1:])):
            digits = len(number.partition(".")[2])
            assert any(f"{value:.{digits}f}" == number for value in measured), (row[0], number)


def test_the_families_of_the_benchmark_are_described():
    from training.benchmarks.cases import FAMILIES

    described = {row[0]: int(row[1]) for row in document("docs/experiments.md").table("The benchmark")}
    assert described == {name: len(family.cases) for name, family in FAMILIES.items()}


# --- versions and words


def test_the_version_is_the_same_everywhere():
    version = DivRegNetLib.__version__
    released = re.findall(r"^## \[(\d\S*)\]", document("CHANGELOG.md").text, re.MULTILINE)
    assert released[0] == version
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == version and "1908.08767" in citation["preferred-citation"]["url"]
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'dynamic = ["version"]' in project and 'attr = "DivRegNetLib.__version__"' in project


def test_documents_name_the_version_of_pytorch_that_make_installs():
    installed = re.search(r"^TORCH \?= (\S+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[1]
    named = {name for text in CURRENT for name in re.findall(r"torch==[\d.]+\d", text.text)}
    assert named - {"torch==2.5.0"} == {installed}  # 2.5.0 is the oldest one that was tried


BRITISH = re.compile(
    r"\b(colour|centr(?:e|es|ed|ing)\b|behaviour|neighbour|normalis|optimis|organis|summaris|licence|(?:milli)?metres?\b|grey\b"
    r"|labelled|modell|judgement|favour|catalogue|artefact|learnt|analys(?:e|es|ed|ing)\b)",
    re.IGNORECASE,
)
QUOTED = re.compile(r"(?<=[\"'`, ])(centre|normalisation|licence|grey)(?=[\"'`=])|\bCENTRE\b(?= = |\")")
"""British words that are names of files, or names in version 0.1; the last one is saved in scenes."""


def test_texts_are_in_us_spelling():
    files = [f for end in ("md", "py", "ui", "yaml", "toml", "cff") for f in ROOT.rglob(f"*.{end}") if _is_ours(f)]
    british = []
    for file in files:
        if file == Path(__file__):
            continue
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            words = BRITISH.finditer(QUOTED.sub("", line))
            british += [f"{file.relative_to(ROOT)}:{number}: {word[0]}" for word in words]
    assert not british


# ---


def _is_ours(file: Path) -> bool:
    return not any(part.startswith(".") or part == "build" for part in file.relative_to(ROOT).parts)


def _exists(path: Path) -> bool:
    """Whether a path exists, upper and lower case as written; ``*`` stands for anything."""
    if "*" in path.name:
        return any(path.parent.glob(path.name))
    return path.exists() and (path == ROOT or path.name in {p.name for p in path.parent.iterdir()})


@functools.cache
def _is_defined(name: str) -> bool:
    """Whether a dotted name is a module, or something that a module defines or imports; classes are looked into."""
    first, *rest = name.split(".")
    place = PACKAGES[first] / first
    while rest and ((place / rest[0]).is_dir() or (place / f"{rest[0]}.py").is_file()):
        place = place / rest.pop(0)
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    if not rest:
        return file.is_file()
    body = ast.parse(file.read_text(encoding="utf-8")).body
    for part in rest:
        found = next((node for node in body if part in _names(node)), None)
        if found is None:
            return part in getattr(DivRegNetLib, "__all__", ()) and first == "DivRegNetLib" and len(rest) == 1
        body = getattr(found, "body", [])
    return True


def _names(node: ast.stmt) -> set[str]:
    """What a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name for alias in node.names}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}


def _check_other_command(words: list[str], line: str) -> None:
    """Asserts that what make, pip and Python are given exists."""
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert not [w for w in words[1:] if "=" not in w and w not in targets], line
    elif words[0] == "pip":
        extras = [e for w in words for group in re.findall(r"\[([\w,]+)\]", w) for e in group.split(",")]
        project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        assert not [e for e in extras if not re.search(rf"^{e} = \[", project, re.MULTILINE)], line
    elif words[0] in ("python", "torchrun") and any(w.endswith(".py") for w in words):
        at = next(i for i, w in enumerate(words) if w.endswith(".py"))
        given, script = words[at + 1 :], ROOT / words[at]
        known = _options_of(script)
        assert not [w for w in given if w.startswith("--") and w not in known], line
        if script.name == "train.py":
            _check_training(script, given)


@functools.cache
def _options_of(script: Path) -> frozenset[str]:
    """The options of a program, and of the modules beside it that it imports."""
    seen, waiting, options = set(), [script], {"--help"}
    while waiting:
        file = waiting.pop()
        if file in seen or not file.is_file():
            continue
        seen.add(file)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
                options |= {a.value for a in node.args if isinstance(a, ast.Constant) and str(a.value).startswith("--")}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("training"):
                folder = ROOT.joinpath(*node.module.split("."))
                waiting += [folder.with_suffix(".py"), *(folder / f"{alias.name}.py" for alias in node.names)]
    return frozenset(options)


def _check_training(script: Path, given: list[str]) -> None:
    """Asserts that the configuration of a program accepts the overrides and the preset of a command."""
    from training import layers
    from training.classes.config import ClassTraining
    from training.config import Config

    kind = ClassTraining if script.parent.name == "classes" else Config
    overrides = [w for w in given if re.fullmatch(r"[a-z_.]+=.*", w)]
    preset = given[given.index("--preset") + 1] if "--preset" in given else None
    file = given[given.index("--config") + 1] if "--config" in given else "training/configs/retrain.yaml"
    layers.load(kind, ROOT / file, preset=preset, overrides=overrides)


def _results(name: str) -> list[dict]:
    with (ROOT / "training" / "results" / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_parser_of_markdown_finds_what_it_looks_for(tmp_path):
    from documents import Document

    page = tmp_path / "page.md"
    page.write_text(
        "# A title: with `code`\n\n[link](b.md#c)\n\n* item\n  ```sh\n  make test   # a comment\n  ```\n\n"
        "## Next\n\n| a | b |\n|---|---|\n| `x\\|y` | **1** |\n"
    )
    text = Document(page)
    assert text.links == ["b.md#c"] and text.commands == ["make test"] and text.code == ["code", "x\\|y"]
    assert text.anchors == {"a-title-with-code", "next"}
    assert text.table("Next") == [["`x\\|y`", "1"]]
