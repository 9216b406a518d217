"""Tables as spreadsheets save them, and the names of pairs."""

import pytest

from DivRegNetLib.errors import InputError
from DivRegNetLib.io.landmarks import read_landmarks
from DivRegNetLib.io.tables import read_table
from DivRegNetLib.run.cohort import read_pairs, register_pairs
from DivRegNetLib.run.cohort.pairs import Pair

TEXT = "name,fixed,moving\nMüller,f.nii.gz,m.nii.gz\n\nb,f.nii.gz,n.nii.gz\n"
FORMS = {
    "comma, UTF-8": TEXT.encode(),
    "UTF-8 with mark": TEXT.encode("utf-8-sig"),
    "semicolon, Windows-1252": TEXT.replace(",", ";").encode("cp1252"),
    "tab, UTF-16 (Excel's Unicode text)": TEXT.replace(",", "\t").replace("\n", "\r\n").encode("utf-16"),
    "UTF-16 without mark": TEXT.encode("utf-16-le"),
    "declared separator": b"sep=;\n" + TEXT.replace(",", ";").encode(),
    "blanks": TEXT.replace(",", " , ").encode(),
    "old Mac line ends": TEXT.replace("\n", "\r").encode(),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_table_is_read_in_every_form_that_spreadsheets_write(form, tmp_path):
    (tmp_path / "pairs.csv").write_bytes(FORMS[form])
    pairs = read_pairs(tmp_path / "pairs.csv")
    assert list(pairs) == ["Müller", "b"]
    assert pairs["Müller"] == Pair(tmp_path / "f.nii.gz", tmp_path / "m.nii.gz")


BROKEN = {
    "other columns": (b"a;b\n1;2\n", "no column 'fixed'; its first line must name the columns, but names 'a', 'b'"),
    "nothing": (b"\n\n", "no header line"),
    "no text": (b"\x81\x8d\xff\n", "its encoding is not known; save it as text in UTF-8"),
    "too many cells": (b"fixed,moving\na,b\na,b,c\n", "line 3: has 3 cells, but the first line has 2"),
    "a comma in a name": (b"fixed,moving\nscan 1, left.nii,m.nii\n", "line 2: has 3 cells"),
    "a column twice": (b"fixed,moving,fixed\na,b,c\n", "two columns 'fixed'"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_wrong_with_a_table_is_said(kind, tmp_path):
    content, message = BROKEN[kind]
    (tmp_path / "pairs.csv").write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_pairs(tmp_path / "pairs.csv")
    assert str(error.value).startswith(str(tmp_path / "pairs.csv"))


NAMES = {
    ".hidden": "begins with a dot", ".divregnet.lock": "begins with a dot", "..": "begins with a dot",
    "results.csv": "is reserved", "Results.CSV": "is reserved", "a/b": "contains '/'", "a:b": "contains ':'",
    "end.": "ends with a dot", "con": "device on Windows", "x" * 300: "longer than",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_no_folder_can_have_is_refused_before_anything_runs(name, tmp_path):
    (tmp_path / "pairs.csv").write_text(f"name,fixed,moving\ngood,a,b\n{name},a,b\n")
    with pytest.raises(InputError, match=NAMES[name]):
        read_pairs(tmp_path / "pairs.csv")
    pairs = {"good": Pair(tmp_path / "a", tmp_path / "b"), name: Pair(tmp_path / "a", tmp_path / "b")}
    with pytest.raises(InputError, match=NAMES[name]):
        register_pairs(pairs, tmp_path / "out", options=None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("names", [("Case", "case"), ("straße", "STRASSE"), ("\u00e9", "e\u0301")])
def test_names_that_are_one_folder_on_some_systems_are_refused(names, tmp_path):
    rows = "".join(f"{name},a,b\n" for name in names)
    (tmp_path / "pairs.csv").write_text("name,fixed,moving\n" + rows, encoding="utf-8")
    with pytest.raises(InputError, match="the same folder on many systems"):
        read_pairs(tmp_path / "pairs.csv")


def test_landmarks_of_a_spreadsheet_with_decimal_commas(tmp_path):
    (tmp_path / "a.csv").write_text("label;x;y;z\nnose;1,5;-2,25;3\n")
    landmarks = read_landmarks(tmp_path / "a.csv")
    assert landmarks.labels == ("nose",)
    assert landmarks.points.tolist() == [[1.5, -2.25, 3.0]]


def test_the_lines_of_a_table_are_counted_as_an_editor_does(tmp_path):
    (tmp_path / "a.csv").write_text("\nx,y\n\n1,2\n")
    assert read_table(tmp_path / "a.csv").rows == ((4, {"x": "1", "y": "2"}),)
