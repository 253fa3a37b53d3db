from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recast_exp import plugins
from recast_exp.config.schema import DatasetConfig
from recast_exp.data import check_dataset, names, registry, sets
from recast_exp.data.protocol import carve_validation, choose, split_by_class
from recast_exp.data.registry import read_official
from recast_exp.data.sets import cub
from recast_exp.data.types import ImageSet, Official, Samples
from recast_exp.errors import MissingInputError, RecastError, UserError
from recast_exp.plugins import DATASETS
from support.fixtures_data import make_cub, make_flowers, make_folder, write_image
from support.helpers import assert_one_line, load

ROOT = Path(__file__).parents[2]


def digits(**options: Any) -> ImageSet:
    return load("digits", **options)


# Registry


def test_every_dataset_has_its_two_functions_and_a_preset() -> None:
    presets = {path.stem for path in (ROOT / "conf" / "dataset").glob("*.yaml")}
    assert (
        {"digits", "cub", "folder", "flowers", "aircraft", "scenes", "cifar10", "cifar100"} <= set(names()) == presets
    )


def test_helper_modules_are_no_datasets() -> None:
    files = {path.stem for path in Path(sets.__path__[0]).glob("*.py")} - {"__init__"}
    helpers = {name for name in files if name.startswith("_")}
    assert {"_torchvision", "_cifar"} <= helpers
    assert set(names()) == files - helpers
    for name in names():
        module = DATASETS.load(name)
        assert callable(module.check)
        assert callable(module.read)
    with pytest.raises(UserError) as error:
        load("_cifar")
    assert_one_line(error, "dataset.name: expected one of aircraft, ", "got '_cifar'")


def test_a_module_without_the_functions_of_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "halfway.py").write_text("def check(cfg, data_dir): pass")
    (tmp_path / "broken.py").write_text("import no_such_module")
    monkeypatch.syspath_prepend(tmp_path)
    points = {
        name: importlib.metadata.EntryPoint(name, name, DATASETS.group) for name in ("halfway", "broken", "absent")
    }
    monkeypatch.setattr(plugins, "_entry_points", lambda group: points)
    assert set(points) < set(names())
    for key, options in {"name": {}, "reader": {"reader": "halfway"}}.items():
        with pytest.raises(UserError) as error:
            check_dataset(DatasetConfig(**{"name": "halfway", **options}), tmp_path)
        assert_one_line(error, f"dataset.{key}: expected the module halfway of dataset halfway", "got none", "read")
    for name in ("broken", "absent"):
        with pytest.raises(UserError) as error:
            check_dataset(DatasetConfig(name=name), tmp_path)
        assert_one_line(error, f"dataset.name: the dataset {name} of {name} cannot be imported", "No module named")


def test_checks_import_nothing_heavy() -> None:
    code = (
        "import sys, recast_exp.data as data\n"
        "from recast_exp.plugins import DATASETS\n"
        "for name in data.names(): DATASETS.load(name).check\n"
        "print([m for m in ('numpy', 'torch', 'torchvision', 'sklearn', 'PIL', 'lightning') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_unknown_dataset() -> None:
    with pytest.raises(RecastError) as error:
        load("birds")
    assert_one_line(error, "dataset.name: expected one of aircraft, ", "cub, digits, flowers, folder", "got 'birds'")
    with pytest.raises(RecastError) as error:
        load("mine", reader="birds")
    assert_one_line(error, "dataset.reader: expected one of aircraft, ", "got 'birds'")


# Splits


def test_split_by_class_is_stratified_disjoint_and_fixed() -> None:
    labels = np.repeat(np.arange(3), (50, 10, 3))
    parts = split_by_class(labels, (0.6, 0.2, 0.2), 5, "abc")
    assert sorted(np.concatenate(parts)) == list(range(63))
    assert [np.bincount(labels[part]).tolist() for part in parts] == [[30, 6, 1], [10, 2, 1], [10, 2, 1]]
    again = split_by_class(labels, (0.6, 0.2, 0.2), 5, "abc")
    other = split_by_class(labels, (0.6, 0.2, 0.2), 6, "abc")
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
    assert not np.array_equal(parts[0], other[0])


def test_carved_validation_has_every_class() -> None:
    samples = Samples(tuple(Path(str(i)) for i in range(8)), np.array([0, 1] * 4))
    train, val = carve_validation(samples, 0.01, 0)
    assert len(train) == 6
    assert sorted(val.labels) == [0, 1]
    assert {*train.images} | {*val.images} == {*samples.images}


def test_a_class_of_one_image_stays_in_training() -> None:
    samples = Samples((Path("a"), Path("b"), Path("c")), np.array([0, 0, 1]))
    train, val = carve_validation(samples, 0.5, 0)
    assert sorted(train.labels) == [0, 1]
    assert val.labels.tolist() == [0]


def test_two_classes_of_one_name() -> None:
    none = Samples((), np.array([], dtype=np.int64))
    with pytest.raises(RecastError) as error:
        Official(("wren", "crow", "wren"), {"all": none}, index="classes.txt")
    assert_one_line(error, "classes.txt: expected each class once, got two with the name 'wren'")


FOUR = np.zeros((4, 8, 8, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("images", "labels", "expected"),
    [
        (FOUR / 255, [0, 1, 0, 1], "train images a uint8 array [N, H, W, 3] or a tuple of paths, got float64"),
        (
            FOUR[..., 0],
            [0, 1, 0, 1],
            "train images a uint8 array [N, H, W, 3] or a tuple of paths, got uint8 [4, 8, 8]",
        ),
        (list("abcd"), [0, 1, 0, 1], "train images a uint8 array [N, H, W, 3] or a tuple of paths, got a list"),
        (tuple("abcd"), [0, 1, 0, 1], "train images a tuple of paths (pathlib.Path), got 'a' in it"),
        (FOUR, [0, 1, 0], "train images an int64 array [4] of labels, one for each, got int64 [3]"),
        (FOUR, [0.0, 1.0, 0.0, 1.0], "train images an int64 array [4] of labels, one for each, got float64 [4]"),
    ],
)
def test_what_a_dataset_reads_is_looked_at(images: Any, labels: list[float], expected: str) -> None:
    """Pixels from 0 to 1 would be taken for black images, and labels that are missing would leave images out."""
    with pytest.raises(UserError) as error:
        Official(("wren", "crow"), {"train": Samples(images, np.array(labels))}, index="birds.npz")
    assert_one_line(error, f"birds.npz: expected of the {expected}")
    with pytest.raises(UserError, match=r"got a list$"):
        Official(("wren", "crow"), {"train": Samples(FOUR, [0, 1, 0, 1])}, index="birds.npz")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("names", "listed"),
    [((), "none"), (("train",), "train"), (("test", "training"), "test, training"), (("val",), "val")],
)
def test_a_set_without_the_images_that_are_asked_for(names: tuple[str, ...], listed: str) -> None:
    official = Official(("wren", "crow"), {name: Samples(FOUR, np.array([0, 1, 0, 1])) for name in names})
    with pytest.raises(UserError) as error:
        choose(DatasetConfig(name="birds"), official)
    assert_one_line(
        error, f"dataset birds: expected images under train, test and maybe val, or under all, got {listed}"
    )


@pytest.mark.parametrize("found", [None, {"train": 1}])
def test_a_function_that_reads_no_set(found: object, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.SimpleNamespace(check=lambda cfg, data_dir: None, read=lambda cfg, data_dir: found)
    monkeypatch.setattr(registry, "_module", lambda cfg: module)
    with pytest.raises(UserError) as error:
        read_official(DatasetConfig(name="birds"), "data")
    assert_one_line(error, f"dataset birds: expected its function read to return an Official, got {found!r}")


def test_image_set_names_what_is_empty() -> None:
    some, none = Samples((Path("a"),), np.array([0])), Samples((), np.array([], dtype=np.int64))
    with pytest.raises(RecastError, match="the val split has no image"):
        ImageSet("x", ("wren",), {"train": some, "val": none, "test": some})
    with pytest.raises(RecastError, match="no training image of class crow"):
        ImageSet("x", ("wren", "crow"), {"train": some, "val": some, "test": some})


# Digits


@pytest.mark.parametrize(("part", "first", "last"), [(None, 5, 9), ("target", 5, 9), ("source", 0, 4), ("all", 0, 9)])
def test_digits_parts(part: str | None, first: int, last: int) -> None:
    image_set = digits(part=part)
    assert image_set.classes == tuple(str(digit) for digit in range(first, last + 1))
    for samples in image_set.splits.values():
        assert samples.images.shape == (len(samples), 8, 8, 3)
        assert samples.images.dtype == np.uint8
        assert samples.labels.dtype == np.int64
        assert set(samples.labels) == set(range(last - first + 1))
        assert samples.images.min() == 0
        assert samples.images.max() == 255


def test_digits_splits_are_fixed_and_labels_belong_to_their_images() -> None:
    from sklearn.datasets import load_digits

    image_set = digits()
    description = image_set.describe()
    assert description.pop("images_per_class")["val"] == [36, 37, 35, 34, 36]
    assert description == {
        "name": "digits",
        "classes": ["5", "6", "7", "8", "9"],
        "images": {"train": 359, "val": 178, "test": 359},
        "skipped": {},
    }
    # The very first images, so that a change of the split does not go unnoticed
    data = load_digits()
    originals = {(image * 255 / 16).round().astype(np.uint8).tobytes(): i for i, image in enumerate(data.images)}
    found = {
        split: [originals[image[..., 0].tobytes()] for image in samples.images]
        for split, samples in image_set.splits.items()
    }
    assert {split: indices[:4] for split, indices in found.items()} == {
        'train': [8, 18, 25, 27], 'val': [7, 9, 17, 31], 'test': [5, 6, 15, 16]
    }  # fmt: skip
    assert len({i for indices in found.values() for i in indices}) == 896
    for split, samples in image_set.splits.items():
        assert (data.target[found[split]] == samples.labels + 5).all()
    assert not np.array_equal(digits(split_seed=1).splits["train"].images, image_set.splits["train"].images)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"part": "odd"}, ("dataset.part", "'odd'", "target, source, all")),
        ({"path": "here"}, ("dataset.path", "'here'", "leave it out")),
    ],
)
def test_digits_refuses(options: dict[str, Any], expected: tuple[str, ...]) -> None:
    with pytest.raises(RecastError) as error:
        check_dataset(DatasetConfig(name="digits", **options), "data")
    assert_one_line(error, *expected)


# CUB


def test_cub_maps_class_numbers_with_gaps(tmp_path: Path) -> None:
    root = make_cub(tmp_path, numbers=(12, 1, 4))
    for image_set in (load("cub", tmp_path), load("cub", "nowhere", path=str(root))):
        assert image_set.classes == ("001.Bird_1", "004.Bird_4", "012.Bird_12")
        assert image_set.numbers == (1, 4, 12)
        assert image_set.describe()["official_numbers"] == [1, 4, 12]
        assert image_set.describe()["images"] == {"train": 9, "val": 3, "test": 6}
        for samples in image_set.splits.values():
            assert [image_set.classes[label] for label in samples.labels] == [p.parent.name for p in samples.images]
        tests = {path.name for path in image_set.splits["test"].images}
        assert tests == {"Bird_0004.jpg", "Bird_0005.jpg"}


def test_cub_missing(tmp_path: Path) -> None:
    cfg = DatasetConfig(name="cub", verify=False)
    with pytest.raises(MissingInputError) as error:
        check_dataset(cfg, tmp_path)
    assert_one_line(error, f"no folder {tmp_path / 'CUB_200_2011'}", "images.txt", "https://", "data_dir=")
    root = make_cub(tmp_path)
    check_dataset(cfg, tmp_path)
    (root / "images.txt").unlink()
    with pytest.raises(MissingInputError) as error:
        check_dataset(cfg, tmp_path)
    assert_one_line(error, f"{root} has no images.txt")


@pytest.mark.parametrize(
    ("file", "line", "expected"),
    [
        ("images.txt", b"2", ("images.txt, line 2", "'2'")),
        ("images.txt", b"9" * 6000 + b" a/b.jpg", ("images.txt, line 2", "expected a number")),
        ("images.txt", b"two 001.Bird_1/x.jpg", ("images.txt, line 2", "'two 001")),
        ("images.txt", b"2 \xff\xfe\x00", ("images.txt, line 2", "expected a number")),
        ("images.txt", b"1 001.Bird_1/Bird_0001.jpg", ("images.txt, line 2", "a second time")),
        ("images.txt", b"2 001.Bird_1/gone.jpg", ("gone.jpg: missing", "images.txt lists it")),
        ("images.txt", b"99 001.Bird_1/Bird_0001.jpg", ("image_class_labels.txt, line 2", "images.txt, got number 2")),
        ("image_class_labels.txt", b"2 77", ("image_class_labels.txt, line 2", "'77'", "one of 1, 4, 12")),
        ("image_class_labels.txt", b"99 1", ("image_class_labels.txt, line 2", "images.txt, got number 99")),
        ("train_test_split.txt", b"2 yes", ("train_test_split.txt, line 2", "'yes'", "one of 1, 0")),
        ("classes.txt", b"four", ("classes.txt, line 2", "'four'")),
        (
            "image_class_labels.txt",
            b"2 4",
            ("images.txt: expected image 2 as CLASS/FILE of the class '004.Bird_4'", "'001.Bird_1/"),
        ),
        (
            "images.txt",
            b"2 001.Bird_1/../../x.jpg",
            ("images.txt: expected image 2 as CLASS/FILE", "got '001.Bird_1/../../x.jpg'"),
        ),
        (
            "classes.txt",
            b"4 001.Bird_1",
            ("images.txt: expected image 7 as CLASS/FILE of the class '001.Bird_1'", "'004.Bird_4/"),
        ),
    ],
)
def test_cub_damaged_lists(tmp_path: Path, file: str, line: bytes, expected: tuple[str, ...]) -> None:
    path = make_cub(tmp_path) / file
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], line, *lines[2:]]))
    with pytest.raises(RecastError) as error:
        load("cub", tmp_path)
    assert_one_line(error, *expected)


def test_cub_lists_of_different_length(tmp_path: Path) -> None:
    path = make_cub(tmp_path) / "train_test_split.txt"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(RecastError) as error:
        load("cub", tmp_path)
    assert_one_line(error, "train_test_split.txt: no line for image 18")


def test_cub_real_images() -> None:
    data_dir = ROOT.parent / "shared" / "data"
    if not (data_dir / "CUB_200_2011").is_dir():
        pytest.skip("no real images: there is no ../shared/data/CUB_200_2011")
    image_set = load("cub", data_dir)
    assert image_set.describe()["images"] == {"train": 200, "val": 50, "test": 250}
    assert image_set.classes[0] == "001.Black_footed_Albatross"
    assert image_set.classes[-1] == "050.Eared_Grebe"
    assert image_set.numbers == (1, 4, 12, 13, 14, 17, 36, 42, 44, 50)
    assert all(
        np.bincount(samples.labels).tolist() == [len(samples) // 10] * 10 for samples in image_set.splits.values()
    )


# Folder


def test_folder_without_splits(tmp_path: Path) -> None:
    make_folder(tmp_path, ("class10", "class2", "Train"), count=10)
    make_folder(tmp_path / "class2", ("more",), count=5)
    (tmp_path / ".cache").mkdir()
    (tmp_path / "class2" / "notes.txt").write_text("not an image")
    image_set = load("folder", path=str(tmp_path))
    assert image_set.classes == ("class2", "class10", "Train")
    assert image_set.describe()["images"] == {"train": 21, "val": 7, "test": 7}
    everything = [path for samples in image_set.splits.values() for path in samples.images]
    assert len(set(everything)) == 35


@pytest.mark.parametrize("val", ["val", "valid", "Validation"])
def test_folder_with_splits(tmp_path: Path, val: str) -> None:
    for split, count in {"train": 4, val: 2, "test": 3}.items():
        make_folder(tmp_path / split, count=count)
    image_set = load("folder", path=str(tmp_path))
    assert image_set.classes == ("class2", "class10")
    assert image_set.describe()["images"] == {"train": 8, "val": 4, "test": 6}
    assert {path.parent.parent.name for path in image_set.splits["val"].images} == {val}


def test_folder_without_validation(tmp_path: Path) -> None:
    for split in ("train", "test"):
        make_folder(tmp_path / split)
    image_set = load("folder", path=str(tmp_path), val_fraction=0.4)
    assert image_set.describe()["images"] == {"train": 6, "val": 4, "test": 10}


def test_folder_errors(tmp_path: Path) -> None:
    def check(*expected: object, missing: bool = False, path: Path | None = tmp_path) -> None:
        with pytest.raises(MissingInputError if missing else UserError) as error:
            load("folder", path=path and str(path))
        assert_one_line(error, *expected)

    check("dataset.path: expected the folder of", "got nothing", "dataset.path=PATH", path=None)
    check(f"got {tmp_path / 'gone'}, which is not a folder", missing=True, path=tmp_path / "gone")
    check(f"got {tmp_path}, which holds no folders", missing=True)
    make_folder(tmp_path / "train")
    check("got train but no test", "PATH/{train,val,test}/CLASS", missing=True)
    make_folder(tmp_path / "test", ("class2", "class11"))
    check("expected the class folders of train in test, got class11 too")
    shutil.rmtree(tmp_path / "test" / "class11")
    make_folder(tmp_path / "test", ("class10",))
    (tmp_path / "train" / "class11").mkdir()
    check(tmp_path / "train" / "class11", "no image in this class folder", missing=True)
    for name in ("val", "valid"):
        make_folder(tmp_path / name)
    check("val and valid are the same split")


def test_test_images_may_be_the_validation_images(tmp_path: Path) -> None:
    for split, count in {"train": 5, "val": 3}.items():
        make_folder(tmp_path / split, count=count)
    with pytest.raises(MissingInputError, match=r"got train, val but no test; set dataset\.test_from=val"):
        load("folder", path=str(tmp_path))
    images = load("folder", path=str(tmp_path), test_from="val", val_fraction=0.4)
    assert images.describe()["images"] == {"train": 6, "val": 4, "test": 6}
    assert {path.parent.parent.name for path in images.splits["test"].images} == {"val"}
    make_folder(tmp_path / "test", count=1)  # which are not looked at then
    assert len(load("folder", path=str(tmp_path), test_from="val").splits["test"]) == 6
    shutil.rmtree(tmp_path / "val")
    with pytest.raises(MissingInputError, match="but no val"):
        load("folder", path=str(tmp_path), test_from="val")


def test_classes_without_test_images_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for split, classes in {"train": ("a", "b", "c"), "test": ("c", "a")}.items():
        make_folder(tmp_path / split, classes)
    images = load("folder", path=str(tmp_path))
    assert images.classes == ("a", "b", "c")
    assert np.bincount(images.splits["test"].labels).tolist() == [5, 0, 5]
    assert {path.parent.name for path in images.splits["test"].images[:5]} == {"a"}
    assert "the test images lack 1 of the classes, such as b; these have no accuracy there" in caplog.text


def test_one_name_written_in_two_ways_is_one_class(tmp_path: Path) -> None:
    make_folder(tmp_path, ("e\u0301tude", "b"))
    images = load("folder", path=str(tmp_path))
    assert images.classes == ("b", "\u00e9tude")
    assert load("folder", path=str(tmp_path), classes=["e\u0301tude", "b"]).classes == images.classes
    make_folder(tmp_path, ("\u00e9tude",))
    with pytest.raises(UserError, match="got two with the name"):
        load("folder", path=str(tmp_path))


def test_description_is_json(tmp_path: Path) -> None:
    write_image(tmp_path / "a" / "extra.jpg", seed=0)
    make_folder(tmp_path, ("a", "b"))
    description = load("folder", path=str(tmp_path)).describe()
    assert json.loads(json.dumps(description)) == description


def test_folder_follows_links_once_and_takes_images_only(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", count=6)
    elsewhere = make_folder(tmp_path / "elsewhere", ("more",), count=3)
    (root / "class2" / "linked").symlink_to(elsewhere)
    (root / "class2" / "loop").symlink_to(root / "class2")
    (root / "class10" / "film.mpg").write_text("no image")
    (root / os.fsdecode(b"caf\xe9")).mkdir()
    make_folder(root, (os.fsdecode(b"caf\xe9"),), count=6)
    image_set = load("folder", path=str(root))
    assert image_set.classes == ("caf\ufffd", "class2", "class10")
    assert np.array(list(image_set.describe()["images_per_class"].values())).sum(0).tolist() == [6, 9, 6]


def test_an_empty_split_is_named(birds: Path) -> None:
    path = birds / "CUB_200_2011" / "train_test_split.txt"
    path.write_text("".join(f"{line.split()[0]} 1\n" for line in path.read_text().splitlines()))
    with pytest.raises(RecastError, match="the test split has no image"):
        load("cub", birds, max_per_class=3)


# What is chosen from a set


@pytest.fixture
def birds(tmp_path: Path) -> Path:
    """Classes 1, 4, 12, 20 with 10 training and 5 test images each."""
    make_cub(tmp_path, numbers=(1, 4, 12, 20), train=10, test=5)
    return tmp_path


def counts(image_set: ImageSet) -> dict[str, list[int]]:
    counts: dict[str, list[int]] = image_set.describe()["images_per_class"]
    return counts


def files(image_set: ImageSet, split: str) -> set[Path]:
    images = image_set.splits[split].images
    assert isinstance(images, tuple)
    return set(images)


def test_classes_by_name_and_by_pattern(birds: Path) -> None:
    image_set = load("cub", birds, classes=["012.Bird_12", "00*"])
    assert image_set.classes == ("001.Bird_1", "004.Bird_4", "012.Bird_12")
    assert image_set.numbers == (1, 4, 12)
    for split in image_set.splits.values():
        assert [image_set.classes[label] for label in split.labels] == [p.parent.name for p in split.images]
    whole = load("cub", birds)
    assert files(image_set, "test") < files(whole, "test")


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        (["012.Bird_13"], ("dataset.classes", "'012.Bird_13'", "none of the 4 classes", "012.Bird_12")),
        (["00[1]*"], ("dataset.classes: expected at least two classes", "got 1")),
        ([], ("dataset.classes: expected at least two classes", "got 0")),
    ],
)
def test_classes_that_make_no_task(birds: Path, classes: list[str], expected: tuple[str, ...]) -> None:
    with pytest.raises(RecastError) as error:
        load("cub", birds, classes=classes)
    assert_one_line(error, *expected)


def test_shots_are_training_images_of_the_same_split(birds: Path) -> None:
    whole = load("cub", birds)
    assert counts(whole) == {"train": [8] * 4, "val": [2] * 4, "test": [5] * 4}
    shots = {k: load("cub", birds, shots=k) for k in (1, 3)}
    for k, image_set in shots.items():
        assert counts(image_set) == {"train": [k] * 4, "val": [2] * 4, "test": [5] * 4}
        assert files(image_set, "train") < files(whole, "train")
        assert files(image_set, "val") == files(whole, "val")
    assert files(shots[1], "train") < files(shots[3], "train")
    assert files(load("cub", birds, shots=3, split_seed=1), "train") != files(shots[3], "train")
    assert files(load("cub", birds, shots=3), "train") == files(shots[3], "train")


def test_more_shots_than_images_are_said(birds: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert counts(load("cub", birds, shots=100))["train"] == [8] * 4
    assert "dataset.shots=100: 4 of the classes have fewer training images" in caplog.text


def test_max_per_class_cuts_every_split(birds: Path) -> None:
    assert counts(load("cub", birds, max_per_class=2)) == {"train": [2] * 4, "val": [2] * 4, "test": [2] * 4}


def test_the_authors_split_takes_all_images_at_random(birds: Path) -> None:
    official, random = load("cub", birds), load("cub", birds, split="random_80_20")
    everything = {split: files(random, split) for split in random.splits}
    assert len(everything["test"]) == 12
    assert len(set.union(*everything.values())) == sum(map(len, everything.values())) == 60
    assert everything["test"] & files(official, "train")
    assert files(load("cub", birds, split="random_80_20", split_seed=5), "test") != everything["test"]


def test_official_validation_images_can_be_redrawn(tmp_path: Path) -> None:
    make_flowers(tmp_path)
    official = load("flowers", tmp_path)
    pool = files(official, "train") | files(official, "val")
    drawn = [load("flowers", tmp_path, split="redrawn", val_fraction=0.5, split_seed=seed) for seed in (0, 1)]
    for each in drawn:
        assert files(each, "test") == files(official, "test")
        assert files(each, "train") | files(each, "val") == pool
        assert not files(each, "train") & files(each, "val")
        assert len(files(each, "train")) == len(files(each, "val"))
    assert files(drawn[0], "train") != files(drawn[1], "train")


def test_a_share_that_official_validation_images_leave_without_effect_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "recast_exp")
    for split in ("train", "val", "test"):
        make_folder(tmp_path / split)
    official = load("folder", path=str(tmp_path))
    assert not caplog.text
    same = load("folder", path=str(tmp_path), val_fraction=0.5)
    assert "dataset.val_fraction: it has no effect, as dataset=folder has validation images of its own" in caplog.text
    assert [len(same.splits[split]) for split in same.splits] == [len(official.splits[split]) for split in same.splits]
    caplog.clear()
    load("folder", path=str(tmp_path), val_fraction=0.5, split="redrawn")
    assert not caplog.text


def test_one_training_image_per_class(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_cub(tmp_path, train=1)
    image_set = load("cub", tmp_path)
    assert files(image_set, "val") == files(image_set, "train")
    assert "the validation images are the same ones" in caplog.text


def test_missing_and_damaged_images(birds: Path) -> None:
    images = birds / "CUB_200_2011" / "images" / "004.Bird_4"
    (images / "Bird_0000.jpg").unlink()
    (images / "Bird_0014.jpg").write_bytes(b"no image")
    with pytest.raises(MissingInputError) as error:
        load("cub", birds)
    assert_one_line(error, images / "Bird_0000.jpg", "missing", "images.txt lists it", "dataset.bad_images=skip")
    image_set = load("cub", birds, bad_images="skip")
    assert sum(map(sum, counts(image_set).values())) == 58
    skipped = image_set.describe()["skipped"]
    assert skipped[str(images / "Bird_0000.jpg")] == "missing"
    assert "cannot identify image file" in skipped[str(images / "Bird_0014.jpg")]
    for file in images.iterdir():
        file.unlink()
    for verify, message in ((True, "4 classes and 0 train"), (False, None)):
        if message is None:
            assert load("cub", birds, bad_images="skip").classes == ("001.Bird_1", "012.Bird_12", "020.Bird_20")
        else:
            with pytest.raises(RecastError):
                load("cub", birds, bad_images="skip", verify=verify)


def test_what_is_no_file_is_missing_and_never_waited_for(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", count=6)
    os.mkfifo(root / "class2" / "pipe.jpg")
    (root / "class10" / "link.jpg").symlink_to(tmp_path / "gone.jpg")
    with pytest.raises(MissingInputError) as error:
        load("folder", path=str(root))
    assert_one_line(error, root / "class2" / "pipe.jpg", "missing (and 1 more)")
    assert len(load("folder", path=str(root), bad_images="skip").skipped) == 2


def test_a_cut_down_copy_is_refused_unless_asked_for(birds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecastError) as error:
        load("cub", birds, verify=True)
    assert_one_line(error, "classes.txt to have 200 lines like the official file, got 4;", "dataset.verify=false")
    layout = dataclasses.replace(cub.LAYOUT, lines={})
    monkeypatch.setattr(cub, "LAYOUT", layout)
    with pytest.raises(RecastError) as error:
        load("cub", birds, verify=True)
    assert_one_line(
        error, "4 classes and 40 train, 20 test images", "200 classes and 5,994 train", "dataset.verify=false"
    )
