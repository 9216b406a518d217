"""Layouts of cohorts on disk, and splits that keep the volumes of a subject together."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given
from hypothesis import strategies as st

from training.data import layouts
from training.data.layouts import SPLITS, Source


@pytest.fixture
def tree(tmp_path):
    """``(*names) -> folder``: makes empty files of these names, with their folders."""

    def make(*names: str) -> Path:
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return tmp_path

    return make


def named(sources: list[Source]) -> dict[str, Source]:
    return {source.name: source for source in sources}


def of_subject(subject: str, role: str = "both", split: str | None = None, name: str | None = None) -> Source:
    return Source(name or f"{subject}-{role}", subject, (Path(f"{subject}.nii"),), ("image",), None, role, split)


def test_a_plain_folder_gives_a_subject_per_volume_with_labels_of_its_name_or_stem(tree):
    root = tree("i/b.nrrd", "i/a.nii.gz", "i/c.mha", "i/notes.txt", "i/.hidden.nii", "l/a.nii.gz", "l/b.nii.gz")
    sources = layouts.folder(root / "i", root / "l")
    assert [s.name for s in sources] == [s.subject for s in sources] == ["a", "b", "c"]
    assert [s.labels for s in sources] == [root / "l/a.nii.gz", root / "l/b.nii.gz", None]
    assert sources[1].images == (root / "i/b.nrrd",)
    assert {(s.role, s.contrasts, s.split) for s in sources} == {("both", ("image",), None)}


def test_a_label_map_with_the_full_name_of_an_image_takes_precedence(tree):
    root = tree("i/a.nrrd", "l/a.nii", "l/a.nrrd", "l/a.nii.gz")
    assert layouts.folder(root / "i", root / "l")[0].labels == root / "l/a.nrrd"


def test_a_folder_of_dicom_slices_is_a_volume(tmp_path):
    slices = sitk.GetImageFromArray(np.arange(64, dtype=np.int16).reshape(4, 4, 4))
    (tmp_path / "scan").mkdir()
    for i in range(4):
        sitk.WriteImage(slices[:, :, i], str(tmp_path / f"scan/{i}.dcm"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/readme.txt").write_text("nothing here" * 20)
    assert [s.images for s in layouts.folder(tmp_path)] == [(tmp_path / "scan",)]


def test_fixed_and_moving_folders_share_a_subject_where_they_share_a_name(tree):
    root = tree("ct/p1.nii.gz", "ct/p2.nii.gz", "mr/p2.nii.gz", "mr/p3.nii.gz", "ctl/p1.nii.gz", "mrl/p3.nrrd")
    sources = named(layouts.fixed_moving(root / "ct", root / "mr", root / "ctl", root / "mrl"))
    assert {n: (s.subject, s.role) for n, s in sources.items()} == {
        "p1-fixed": ("p1", "fixed"),
        "p2-fixed": ("p2", "fixed"),
        "p2-moving": ("p2", "moving"),
        "p3-moving": ("p3", "moving"),
    }
    assert sources["p1-fixed"].labels == root / "ctl/p1.nii.gz"
    assert sources["p3-moving"].labels == root / "mrl/p3.nrrd"
    assert sources["p2-moving"].labels is None


@pytest.mark.parametrize("key", ["channel_names", "modality"])
def test_nnunet_channels_are_contrasts_of_one_case_named_by_dataset_json(tree, key):
    root = tree(
        *(f"imagesTr/{case}_{channel}.nii.gz" for case in ("la_01", "la_02") for channel in ("0000", "0001")),
        "labelsTr/la_01.nii.gz",
        "labelsTr/la_02.nii.gz",
        "imagesTs/la_03_0000.nii.gz",
    )
    (root / "dataset.json").write_text(json.dumps({key: {"0": "T1", "1": "T2"}, "labels": {"background": 0}}))
    sources = layouts.nnunet(root)
    assert [s.name for s in sources] == ["la_01", "la_02"]
    assert sources[1].contrasts == ("T1", "T2")
    assert [path.name for path in sources[1].images] == ["la_02_0000.nii.gz", "la_02_0001.nii.gz"]
    assert sources[1].labels == root / "labelsTr/la_02.nii.gz"


def test_a_channel_that_one_case_lacks_is_listed_so_that_it_is_reported(tree):
    root = tree("imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz", "imagesTr/b_0000.nii.gz")
    sources = named(layouts.nnunet(root))
    assert sources["b"].images[1] == root / "imagesTr/b_0001.nii.gz"
    assert sources["b"].contrasts == ("image0", "image1")


@pytest.mark.parametrize("about", [None, "not json", "[1, 2]", '{"modality": ["MRI"]}', '{"modality": {"0": 7}}'])
def test_decathlon_archives_are_read_without_their_hidden_twins_and_whatever_dataset_json_says(tree, about):
    root = tree(
        "imagesTr/hip_001.nii.gz",
        "imagesTr/._hip_001.nii.gz",
        "imagesTr/hip_004.nii.gz",
        "labelsTr/hip_001.nii.gz",
        "labelsTr/._hip_004.nii.gz",
        "labelsTr/hip_004.nii.gz",
    )
    if about is not None:
        (root / "dataset.json").write_text(about)
    sources = layouts.nnunet(root)
    assert [(s.name, s.contrasts, s.labels.name) for s in sources] == [
        ("hip_001", ("image",), "hip_001.nii.gz"),
        ("hip_004", ("image",), "hip_004.nii.gz"),
    ]


def test_decathlon_cases_that_end_in_four_digits_are_no_channels(tree):
    root = tree("imagesTr/la_0003.nii.gz", "imagesTr/la_0004.nii.gz", "labelsTr/la_0003.nii.gz")
    assert [s.name for s in layouts.nnunet(root)] == ["la_0003", "la_0004"]


def test_lits_volumes_are_found_in_subfolders(tree):
    root = tree(
        "Training Batch 1/volume-0.nii",
        "Training Batch 1/segmentation-0.nii",
        "Training Batch 2/volume-28.nii.gz",
        "Training Batch 2/segmentation-28.nii.gz",
        "Training Batch 2/._volume-28.nii.gz",
        "Training Batch 2/volume-29.nii",
    )
    sources = named(layouts.lits(root))
    assert sorted(sources) == ["volume-0", "volume-28", "volume-29"]
    assert sources["volume-28"].subject == "28"
    assert sources["volume-28"].labels == root / "Training Batch 2/segmentation-28.nii.gz"
    assert sources["volume-29"].labels is None
    assert sources["volume-0"].contrasts == ("CT",)
    tree("Training Batch 2/volume-0.nii")
    with pytest.raises(ValueError, match=r"Batch 2.volume-0.nii: .*Batch 1.volume-0.nii is the same volume; keep one"):
        layouts.lits(root)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (("imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz"), ("a", "image", True)),
        (("b/volume-3.nii", "b/segmentation-3.nii"), ("volume-3", "CT", True)),
        (("volume-3.nii",), ("volume-3", "image", False)),  # without segmentations this need not be LiTS
        (("images/a.nii.gz", "labels/a.nii.gz"), ("a", "image", True)),
        (("images/a.nii.gz",), ("a", "image", False)),
        (("x.mha",), ("x", "image", False)),
    ],
)
def test_a_layout_is_recognized(tree, files, expected):
    (source,) = layouts.find(tree(*files))
    assert (source.name, *source.contrasts, source.labels is not None) == expected


def write_table(folder: Path, text: str) -> Path:
    table = folder / "cohort.csv"
    table.write_text(text, encoding="utf-8")
    return table


def test_a_manifest_has_all_fields_of_a_source_and_relative_paths(tmp_path):
    table = write_table(
        tmp_path,
        "\ufeffsubject, image, labels, role, contrast, split, name, frame\n"
        "p1, ct/p1.nii.gz, seg/p1.nii.gz, fixed, CT, train, , table\n"
        "p1, mr/p1.nii.gz, , moving, MR, train, , table\n"
        f"p2, a.nii; b.nii, , , T1;T2, test, second\n"
        f"anna b, {tmp_path / 'far' / 'c.nii'}\n",
    )
    assert layouts.manifest(table) == [
        Source(
            "p1-1", "p1", (tmp_path / "ct/p1.nii.gz",), ("CT",), tmp_path / "seg/p1.nii.gz", "fixed", "train", "table"
        ),
        Source("p1-2", "p1", (tmp_path / "mr/p1.nii.gz",), ("MR",), None, "moving", "train", "table"),
        Source("second", "p2", (tmp_path / "a.nii", tmp_path / "b.nii"), ("T1", "T2"), None, "both", "test"),
        Source("anna_b", "anna b", (tmp_path / "far/c.nii",), ("image",)),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("subject,image,lables\np,a.nii,b.nii\n", "unknown column 'lables'; known are subject, image, labels"),
        ("subject,labels\np,a.nii\n", "no column 'image'"),
        ("", "no column 'subject'"),
        ("subject,image\n", "holds no volume"),
        ("subject,image\np,a.nii\n,b.nii\n", "line 3: subject and image are needed"),
        ("subject,image\np,a.nii,b.nii\n", "line 2: more cells than columns"),
        ("subject,image,role\np,a.nii,target\n", "line 2: p: role is one of both, fixed, moving, got 'target'"),
        ("subject,image,split\np,a.nii,val\n", "line 2: p: split is one of train, validation, test, got 'val'"),
        ("subject,image,contrast\np,a.nii;b.nii,T1\n", "line 2: p: 2 images, but 1 contrasts"),
        ("subject,image,name\np,a.nii,../x\n", r"line 2: the name '../x' is not a valid file name"),
        ("subject,image,name\np,a.nii,x\nq,b.nii,X\n", "a.nii and b.nii are both named X; rename one"),
    ],
)
def test_an_invalid_manifest_is_refused_with_line_and_value(tmp_path, text, message):
    table = write_table(tmp_path, text)
    with pytest.raises(ValueError, match=f"cohort.csv.*{message}"):
        layouts.manifest(table)


def test_what_is_missing_is_named_with_a_remedy(tree):
    root = tree("i/a.nii", "l/b.nii", "e/notes.txt", "n/imagesTr/a_0000.nii", "n/labelsTr/b.nii", "t/a.nii", "t/a.mha")
    for load in (layouts.folder, layouts.lits, layouts.find):
        with pytest.raises(FileNotFoundError, match=r"nowhere: there is no such folder; name the folder that holds"):
            load(root / "nowhere")
    with pytest.raises(FileNotFoundError, match="no such table; name a CSV"):
        layouts.manifest(root / "nowhere.csv")
    with pytest.raises(FileNotFoundError, match="imagesTr"):
        layouts.nnunet(root)
    with pytest.raises(ValueError, match=r"e: holds no volume; volumes end in .nii"):
        layouts.folder(root / "e")
    with pytest.raises(ValueError, match=r"l: no file is named like an image of .*i, such as a.nii"):
        layouts.folder(root / "i", root / "l")
    with pytest.raises(ValueError, match=r"labelsTr: no file is named like a case of .*imagesTr, such as a"):
        layouts.nnunet(root / "n")
    with pytest.raises(ValueError, match=r"t: a.mha and a.nii are both named a; rename one"):
        layouts.folder(root / "t")


def parsed(*arguments: object) -> list[Source] | None:
    parser = argparse.ArgumentParser()
    layouts.add_arguments(parser)
    return layouts.from_arguments(parser.parse_args([str(a) for a in arguments]))


def test_each_layout_can_be_named_on_the_command_line(tree):
    root = tree("i/a.nii", "l/a.nii", "m/b.nii", "ml/b.nii", "d/imagesTr/c.nii")
    table = write_table(root, "subject,image\nd,d.nii\n")
    assert parsed("--images", root / "i", "--labels", root / "l") == layouts.folder(root / "i", root / "l")
    both = ("--fixed", root / "i", "--moving", root / "m", "--fixed-labels", root / "l", "--moving-labels", root / "ml")
    assert parsed(*both) == layouts.fixed_moving(root / "i", root / "m", root / "l", root / "ml")
    assert parsed("--manifest", table) == layouts.manifest(table)
    assert parsed("--cohort", root / "d") == layouts.nnunet(root / "d")
    assert parsed() is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--images", "a", "--cohort", "b"), "--images and --cohort name two cohorts; give one of them"),
        (("--images", "a", "--fixed-labels", "b"), "--fixed-labels needs --fixed"),
        (("--fixed", "a"), "--fixed needs --moving"),
        (("--moving", "a"), "--moving needs --fixed"),
        (("--manifest", "a", "--labels", "b"), "--labels needs --images"),
    ],
)
def test_options_that_do_not_go_together_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        parsed(*arguments)


SOURCES = st.lists(
    st.tuples(st.integers(0, 25), st.sampled_from(layouts.ROLES), st.sampled_from([None, None, None, *SPLITS])),
    min_size=1,
    max_size=60,
)
SHARES = st.sampled_from([(0.7, 0.15, 0.15), (0.5, 0.25, 0.25), (0.98, 0.01, 0.01), (0.8, 0.2, 0.0), (1.0, 0.0, 0.0)])


def cohort_of(drawn: list[tuple[int, str, str | None]]) -> list[Source]:
    """A subject's first word about its split counts."""
    said: dict[int, str | None] = {}
    return [
        of_subject(f"s{number}", role, said.setdefault(number, split), name=f"v{i}")
        for i, (number, role, split) in enumerate(drawn)
    ]


@given(SOURCES, SHARES, st.integers(0, 5))
def test_a_split_never_parts_a_subject_keeps_what_is_given_and_leaves_no_split_empty(drawn, fractions, seed):
    sources = cohort_of(drawn)
    found = layouts.split(sources, fractions, seed)
    assert found == layouts.split(sources[::-1], fractions, seed), "the order of the files must not matter"
    assert set(found) == {s.name for s in sources}
    of: dict[str, set[str]] = {}
    for source in sources:
        of.setdefault(source.subject, set()).add(found[source.name])
        assert source.split in (None, found[source.name])
    assert all(len(splits) == 1 for splits in of.values())
    if not any(s.split for s in sources):
        wanted = {name for name, share in zip(SPLITS, fractions, strict=True) if share}
        assert set(found.values()) <= wanted
        roles = {subject: {s.role for s in sources if s.subject == subject} for subject in of}
        for role in layouts.ROLES[1:]:
            kind = [subject for subject, has in roles.items() if has == {role}]
            if len(kind) >= 3:
                assert {split for subject in kind for split in of[subject]} == wanted
        if len({min(r) if len(r) == 1 else "both" for r in roles.values()}) == 1 and len(of) >= 3:
            assert set(found.values()) == wanted


@given(st.integers(3, 60), st.integers(0, 5))
def test_the_shares_are_met_to_a_subject(count, seed):
    found = list(layouts.split([of_subject(f"s{i}") for i in range(count)], (0.6, 0.2, 0.2), seed).values())
    for name, share in zip(SPLITS, (0.6, 0.2, 0.2), strict=True):
        assert abs(found.count(name) - share * count) <= 1


def test_another_seed_is_another_split():
    sources = [of_subject(f"s{i}") for i in range(20)]
    splits = [layouts.split(sources, seed=seed) for seed in (1, 1, 2)]
    assert splits[0] == splits[1] != splits[2]


def counts(sources: list[Source], found: dict[str, str], role: str) -> tuple[int, ...]:
    return tuple(sum(found[s.name] == name for s in sources if s.role == role) for name in SPLITS)


def test_the_papers_numbers_of_fixed_and_moving_subjects_can_be_asked_for():
    """Hospital Liver: 14 CT as 6/4/4 and 19 MR as 10/4/5; LiTS: 131 CT as 70/30/31."""
    sources = [of_subject(f"c{i}", "fixed") for i in range(14)] + [of_subject(f"m{i}", "moving") for i in range(19)]
    found = layouts.split(sources, (6, 4, 4, 10, 4, 5))
    assert counts(sources, found, "fixed") == (6, 4, 4)
    assert counts(sources, found, "moving") == (10, 4, 5)
    assert counts(sources, layouts.split(sources), "fixed") == (10, 2, 2)
    lits = [of_subject(str(i)) for i in range(131)]
    assert counts(lits, layouts.split(lits, (70.0, 30.0, 31.0)), "both") == (70, 30, 31)


def test_paired_subjects_are_split_once_for_both_roles():
    sources = [of_subject(f"p{i}", role) for i in range(10) for role in ("fixed", "moving")]
    found = layouts.split(sources, (6, 2, 2))
    assert counts(sources, found, "fixed") == counts(sources, found, "moving") == (6, 2, 2)


@pytest.mark.parametrize("fractions", [(0.7, 0.2), (0.7, 0.2, 0.2), (-0.1, 0.6, 0.5), (float("nan"), 0, 1), (0, 0, 0)])
def test_shares_that_do_not_add_up_are_refused(fractions):
    with pytest.raises(ValueError, match="three shares of train, validation, test that add up to 1"):
        layouts.split([of_subject("a")], fractions)


@pytest.mark.parametrize("fractions", [(6, 4, 4), (3, 1, 1, 2, 1, 1)])
def test_numbers_that_do_not_fit_the_cohort_are_refused(fractions):
    sources = [of_subject(f"s{i}", "fixed") for i in range(5)]
    with pytest.raises(ValueError, match="does not fit 5 fixed subjects: give numbers that add up"):
        layouts.split(sources, fractions)


def test_a_subject_in_two_splits_is_refused():
    sources = [of_subject("s", "fixed", "train"), of_subject("s", "moving", "test")]
    with pytest.raises(ValueError, match="subject s is in two splits, train and test"):
        layouts.split(sources)
