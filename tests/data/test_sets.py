"""The readers of published sets, on tiny copies in the official layouts and, where they are there, on real ones."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import http.server
import importlib
import os
import pickle
import shutil
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision

from recast_exp.config.schema import DatasetConfig
from recast_exp.data import check_dataset, load_dataset, read_official
from recast_exp.data.sets import aircraft, scenes
from recast_exp.data.sets import torchvision as reader
from recast_exp.data.types import ImageSet, Official
from recast_exp.errors import MissingInputError, RecastError, UserError
from support.fixtures_data import (
    AIRCRAFT,
    make_aircraft,
    make_cifar,
    make_flowers,
    make_folder,
    make_scenes,
    make_torchvision,
)

REAL = Path(__file__).parents[3] / "shared" / "data"
PUBLISHED = ("flowers", "aircraft", "scenes", "cifar10", "cifar100")
MAKE: dict[str, Callable[[Path], Path]] = {
    "flowers": make_flowers,
    "aircraft": make_aircraft,
    "scenes": make_scenes,
    "cifar10": make_cifar,
    "cifar100": functools.partial(make_cifar, classes=100),
}


def load(name: str, data_dir: Path, *, verify: bool = False, **options: Any) -> ImageSet:
    return load_dataset(DatasetConfig(name=name, verify=verify, **options), data_dir)


def failure(
    name: str, data_dir: Path, *expected: object, kind: type[RecastError] = RecastError, **options: Any
) -> None:
    """Check that a set is refused with one line that has all the expected texts in it."""
    with pytest.raises(kind) as error:
        load(name, data_dir, **options)
    message = str(error.value)
    assert "\n" not in message
    for text in expected:
        assert str(text) in message, message


def real(folder: str) -> Path:
    if not (REAL / folder).is_dir():
        pytest.skip(f"no real images: there is no ../shared/data/{folder}")
    return REAL


def counts(image_set: ImageSet) -> dict[str, int]:
    return {split: len(samples) for split, samples in image_set.splits.items()}


def named(image_set: ImageSet) -> Iterator[tuple[str, str, Path]]:
    """Split, class name and path of every image; all paths differ and exist."""
    everything = [
        (split, image_set.classes[label], path)
        for split, samples in image_set.splits.items()
        for path, label in zip(samples.images, samples.labels.tolist(), strict=True)
    ]
    assert len({path for *_, path in everything}) == len(everything)
    assert all(isinstance(path, Path) and path.is_file() for *_, path in everything)
    return iter(everything)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the address that it is served at."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield folder, f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


# All published sets


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_missing_set_says_what_is_expected_and_where_it_is_from(tmp_path: Path, name: str) -> None:
    with pytest.raises(MissingInputError) as error:
        check_dataset(DatasetConfig(name=name), tmp_path)
    assert "\n" not in str(error.value)
    for text in (f"no folder {tmp_path}", "dataset.download=true", "http", "data_dir="):
        assert text in str(error.value)
    check_dataset(DatasetConfig(name=name, download=True), tmp_path)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_tiny_copy_is_not_taken_for_the_whole_set(tmp_path: Path, name: str) -> None:
    root = MAKE[name](tmp_path)
    first = {"flowers": root / "setid.mat", "cifar10": root / "data_batch_1", "cifar100": root / "train"}
    failure(name, tmp_path, first.get(name, root), "official", "dataset.verify=false", verify=True)
    load(name, tmp_path)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_folder_may_lie_elsewhere(tmp_path: Path, name: str) -> None:
    root = MAKE[name](tmp_path)
    assert counts(load(name, Path("nowhere"), path=str(root))) == counts(load(name, tmp_path))
    other = root.rename(tmp_path / "other")
    if name == "scenes":
        load(name, Path("nowhere"), path=str(other))
    else:
        failure(name, Path("nowhere"), "dataset.path", other, root.name, path=str(other))


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("option", ["part", "options", "level"])
def test_options_of_other_sets_are_refused(tmp_path: Path, name: str, option: str) -> None:
    if (name, option) != ("aircraft", "level"):
        value = {"a": 1} if option == "options" else "a"
        failure(name, tmp_path, f"dataset.{option}", "leave it out", **{option: value})


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_downloaded_makes_the_layout(
    tmp_path: Path, name: str, server: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    served, address = server
    MAKE[name](tmp_path / "original")
    module = importlib.import_module(f"recast_exp.data.sets.{name}")
    layout, archives = module.layout(DatasetConfig(name=name)), []
    for archive in layout.archives:
        assert archive.url.rsplit("/", 1)[0].startswith(("http://", "https://"))
        source, file = tmp_path / "original" / archive.provides, served / archive.url.rsplit("/", 1)[1]
        if archive.member is None:
            shutil.copy(source, file)
        else:
            with tarfile.open(file, "w") as tar:
                tar.add(source, archive.member)
        archives.append(dataclasses.replace(archive, url=f"{address}/{file.name}", md5=None))
    monkeypatch.setattr(module, "layout", lambda cfg: dataclasses.replace(layout, archives=tuple(archives)))
    assert counts(load(name, tmp_path / "new", download=True)) == counts(load(name, tmp_path / "original"))


# Flowers


def test_flowers(tmp_path: Path) -> None:
    make_flowers(tmp_path, numbers=(73, 46, 51))
    image_set = load("flowers", tmp_path)
    assert image_set.classes == ("wallflower", "petunia", "water lily")
    assert image_set.numbers == (46, 51, 73)
    assert counts(image_set) == {"train": 6, "val": 6, "test": 6}
    for split, name, path in named(image_set):
        image = int(path.stem.removeprefix("image_")) - 1
        assert name == ("water lily", "wallflower", "petunia")[image // 6]
        assert split == ("train", "val", "test")[image % 6 // 2]


def test_flowers_damaged_lists(tmp_path: Path) -> None:
    root = make_flowers(tmp_path)
    (root / "imagelabels.mat").write_bytes(b"no such thing")
    failure("flowers", tmp_path, root, "torchvision cannot read")
    (root / "imagelabels.mat").unlink()
    failure("flowers", tmp_path, f"{root} has no imagelabels.mat", kind=MissingInputError)


def test_flowers_real_images() -> None:
    data_dir = real("flowers-102")
    image_set = load("flowers", data_dir)
    assert image_set.numbers == (46, 51, 73, 74, 77, 78, 81, 88, 89, 94)
    assert image_set.classes[0] == "wallflower"
    assert image_set.classes[-1] == "foxglove"
    assert counts(image_set) == {"train": 100, "val": 100, "test": 300}
    assert len(list(named(image_set))) == 500
    failure(
        "flowers", data_dir, data_dir / "flowers-102" / "setid.mat", "a5357ecc9cb78c4bef273ce3793fc85c", verify=True
    )


# Aircraft


@pytest.mark.parametrize(("column", "level"), [(0, "variant"), (1, "family"), (2, "manufacturer")])
def test_aircraft_levels(tmp_path: Path, column: int, level: str) -> None:
    make_aircraft(tmp_path)
    image_set = load("aircraft", tmp_path, level=level)
    assert image_set.classes == tuple(sorted({names[column] for names in AIRCRAFT}))
    assert counts(image_set) == {"train": 6, "val": 6, "test": 6}
    for split, name, path in named(image_set):
        number, i = divmod(int(path.stem), 10)
        assert name == AIRCRAFT[number][column]
        assert split == ("train", "val", "test")[i % 3]


def test_aircraft_errors(tmp_path: Path) -> None:
    root = make_aircraft(tmp_path)
    failure(
        "aircraft", tmp_path, "dataset.level: expected one of variant, family, manufacturer", "got 'kind'", level="kind"
    )
    path = root / "data" / "images_family_val.txt"
    for content in ("1234567 Boeing 999", "1234567", ""):
        path.write_text(f"{path.read_text().splitlines()[0]}\n{content}\n")
        failure(
            "aircraft",
            tmp_path,
            f"{path}, line 2: expected",
            f"got {content!r}",
            "3 names in families.txt",
            level="family",
        )
    load("aircraft", tmp_path, level="variant")
    path.unlink()
    failure("aircraft", tmp_path, "has no data/images_family_val.txt", kind=MissingInputError, level="family")


@pytest.mark.parametrize("name", ["../../../secret", "../images/../../secret", "/secret"])
def test_aircraft_lists_do_not_leave_the_folder(tmp_path: Path, name: str) -> None:
    root = make_aircraft(tmp_path)
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(next((root / "data" / "images").glob("*.jpg")).read_bytes())
    path = root / "data" / "images_variant_train.txt"
    lines = path.read_text().splitlines()
    listed = str(secret.with_suffix("")) if name.startswith("/") else name
    path.write_text("\n".join([f"{listed} {lines[0].partition(' ')[2]}", *lines[1:]]))
    failure("aircraft", tmp_path, f"expected names of images in {root}", "which lies outside", level="variant")


def test_a_folder_may_be_named_from_above(tmp_path: Path) -> None:
    make_aircraft(tmp_path / "data")
    (tmp_path / "here").mkdir()
    assert load("aircraft", tmp_path / "here" / ".." / "data", level="variant").classes


@pytest.mark.parametrize("name", ["variants.txt", "images_variant_train.txt"])
def test_aircraft_lists_with_a_byte_order_mark_are_named(tmp_path: Path, name: str) -> None:
    path = make_aircraft(tmp_path) / "data" / name
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    failure("aircraft", tmp_path, f"{path}: expected text without a byte order mark", level="variant")


@pytest.mark.parametrize(("level", "num_classes"), [("variant", 100), ("family", 70), ("manufacturer", 30)])
def test_aircraft_official_lists(tmp_path: Path, level: str, num_classes: int) -> None:
    folder = real("lists-only/fgvc-aircraft-2013b") / "lists-only" / "fgvc-aircraft-2013b" / "data"
    data = tmp_path / "fgvc-aircraft-2013b" / "data"
    data.mkdir(parents=True)
    for path in folder.glob("*.txt"):
        # Whoever published this copy has put a header over some of the lists
        lines = path.read_text().splitlines()
        (data / path.name).write_text("\n".join(lines[lines[0] in ("Variant", "family", "Image") :]))
    cfg = DatasetConfig(name="aircraft", level=level)
    official = aircraft.read(cfg, tmp_path)
    aircraft.layout(cfg).verify(cfg, official, data.parent)
    assert len(official.classes) == num_classes
    assert len({path for samples in official.splits.values() for path in samples.images}) == 10_000
    assert {len(set(samples.labels)) for samples in official.splits.values()} == {num_classes}


# Scenes


def test_scenes(tmp_path: Path) -> None:
    make_scenes(tmp_path)
    image_set = load("scenes", tmp_path, val_fraction=0.25)
    assert image_set.classes == ("airport_inside", "bar")
    assert counts(image_set) == {"train": 6, "val": 2, "test": 2}
    for split, name, path in named(image_set):
        assert name == path.parent.name
        assert (split == "test") == (path.name == "a room 4.jpg")


@pytest.mark.parametrize(
    ("file", "line", "expected"),
    [
        ("TrainImages.txt", b"bar", ("TrainImages.txt, line 2", "'bar'")),
        ("TrainImages.txt", b"bar/", ("TrainImages.txt, line 2", "'bar/'")),
        ("TrainImages.txt", b"../bar.jpg", ("TrainImages.txt, line 2", "'../bar.jpg'")),
        ("TrainImages.txt", b"a/bar/1.jpg", ("TrainImages.txt, line 2", "'a/bar/1.jpg'")),
        ("TrainImages.txt", b"bar/\xff.jpg", ("TrainImages.txt, line 2", "expected CLASS/FILE")),
        (
            "TrainImages.txt",
            b"bar/a room 0.jpg",
            ("TrainImages.txt, line 2", "a second time", "TrainImages.txt, line 1"),
        ),
        ("TestImages.txt", b"bar/a room 0.jpg", ("TestImages.txt, line 2", "a second time", "TrainImages.txt, line 1")),
        ("TrainImages.txt", b"cellar/1.jpg", ("TestImages.txt: no image of cellar", "TrainImages.txt lists")),
        ("TestImages.txt", b"cellar/1.jpg", ("no image of cellar", "TestImages.txt lists")),
        ("TrainImages.txt", b"bar/gone.jpg", ("gone.jpg: missing",)),
    ],
)
def test_scenes_damaged_lists(tmp_path: Path, file: str, line: bytes, expected: tuple[str, ...]) -> None:
    path = make_scenes(tmp_path) / file
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], line, *lines[2:]]))
    failure("scenes", tmp_path, *expected)


def test_scenes_real_images() -> None:
    data_dir = real("indoor67")
    official = read_official(DatasetConfig(name="scenes", verify=False), data_dir)
    assert len(official.classes) == 10
    for samples in official.splits.values():
        assert [official.classes[label] for label in samples.labels] == [path.parent.name for path in samples.images]
        assert sorted(samples.labels) == list(range(10))
        assert all(path.is_file() for path in samples.images)
    failure("scenes", data_dir, "TrainImages.txt to have 5,360 lines like the official file, got 10;", verify=True)


def test_scenes_official_lists() -> None:
    root = real("lists-only/indoor67") / "lists-only" / "indoor67"
    cfg = DatasetConfig(name="scenes", path=str(root))
    official = scenes.read(cfg, Path("nowhere"))
    scenes.layout(cfg).verify(cfg, official, root)
    assert len(official.classes) == 67
    assert {split: len(samples) for split, samples in official.splits.items()} == {"train": 5360, "test": 1340}
    assert all(np.bincount(samples.labels).min() > 0 for samples in official.splits.values())


# CIFAR


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar(tmp_path: Path, classes: int) -> None:
    make_cifar(tmp_path, classes)
    image_set = load(f"cifar{classes}", tmp_path)
    assert image_set.classes == tuple(f"thing {i}" for i in range(classes))
    batches = 5 if classes == 10 else 1
    assert counts(image_set)["train"] + counts(image_set)["val"] == 2 * classes * batches
    assert counts(image_set)["test"] == 2 * classes
    for split, samples in image_set.splits.items():
        assert isinstance(samples.images, np.ndarray)
        assert samples.images.dtype == np.uint8
        assert samples.images.shape == (len(samples), 32, 32, 3)
        assert (samples.images[:, 0, 0, :] == samples.labels[:, None]).all()
        assert ((samples.images[:, -1, -1, 2] == batches) == (split == "test")).all()


def test_cifar_missing_batch(tmp_path: Path) -> None:
    root = make_cifar(tmp_path)
    (root / "data_batch_3").unlink()
    failure("cifar10", tmp_path, f"{root} has no data_batch_3", kind=MissingInputError)


class Evil:
    """Unpickled, it runs a program."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.victim),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("file", ["data_batch_4", "batches.meta"])
def test_cifar_runs_nothing_from_an_unverified_file(tmp_path: Path, protocol: int, file: str) -> None:
    path = make_cifar(tmp_path) / file
    path.write_bytes(pickle.dumps({"data": [], "labels": [Evil(tmp_path / "victim")]}, protocol=protocol))
    failure("cifar10", tmp_path, path, f"{os.name}.mkdir", "run a program")
    assert not (tmp_path / "victim").exists()
    failure("cifar10", tmp_path, "md5", "dataset.verify=false", verify=True)
    assert not (tmp_path / "victim").exists()


class Forged:
    """An array of NumPy with a type that NumPy would not have written."""

    def __reduce__(self) -> tuple[Any, ...]:
        return np.zeros(1).__reduce__()[0], (np.ndarray, (0,), b"b"), (1, (20,), ForgedType(), False, b"\x41" * 160)


class ForgedType:
    """Says that 8 bytes hold a reference to an object: whoever follows it crashes Python."""

    def __reduce__(self) -> tuple[Any, ...]:
        state = (4, "|", None, ("f",), {"f": (np.dtype("O"), 0)}, 8, 1, 0, None)
        return np.dtype, ("V8", False, True), state


def keyed_by_tuples(depth: int) -> bytes:
    """A dictionary with tuples of tuples as its key, written by hand: a hash looks at 2 to the power of `depth`."""
    code = b"\x80\x02)q\x00"
    for at in range(1, depth):
        code += b"h" + bytes([at - 1]) + b"h" + bytes([at - 1]) + b"\x86q" + bytes([at])
    return code + b"}h" + bytes([depth - 1]) + b"K\x01s."


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (pickle.dumps({"data": Forged(), "labels": []}, 2), "got a type that is no plain number"),
        (pickle.dumps({"data": np.zeros(3, object), "labels": []}, 2), "got a type that is no plain number"),
        (pickle.dumps({"data": np.zeros(3, [("a", "i4")]), "labels": []}, 5), "got a type that is no plain number"),
        (pickle.dumps({"data": [], "labels": {1: 2}}, 2), "got a dictionary with keys that are no names"),
        (keyed_by_tuples(60), "got a dictionary with keys that are no names"),
        (pickle.dumps({"data": [], "labels": {1, 2}}, 4), "got a set"),
    ],
)
def test_a_forged_pickle_is_refused_before_it_is_made(tmp_path: Path, content: bytes, says: str) -> None:
    path = make_cifar(tmp_path) / "data_batch_2"
    path.write_bytes(content)
    failure("cifar10", tmp_path, path, "expected a pickle of arrays and lists", says)


@pytest.mark.parametrize("labels", [[0.7, 1.0], ["0", "1"], [[0], [1]], [True, False], [None, 1]])
def test_labels_that_are_no_integers_are_refused(tmp_path: Path, labels: list[Any]) -> None:
    path = make_cifar(tmp_path) / "data_batch_1"
    pixels = np.zeros((2, 3072), np.uint8)
    path.write_bytes(pickle.dumps({"data": pixels, "labels": labels}, 2))
    failure("cifar10", tmp_path, path.parent, "expected labels that are integers", repr(labels[0]))


@pytest.mark.parametrize("name", ["", "half \udcff", 3])
def test_names_of_classes_that_no_file_could_hold(name: object) -> None:
    with pytest.raises(UserError, match=r"^list: expected names of classes, got "):
        Official(("a", name), {}, index="list")  # type: ignore[arg-type]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_cifar_takes_arrays_of_every_pickle_protocol(tmp_path: Path, protocol: int) -> None:
    root = make_cifar(tmp_path)
    path = root / "test_batch"
    batch = pickle.loads(path.read_bytes())
    batch["labels"] = np.array(batch["labels"])
    path.write_bytes(pickle.dumps(batch, protocol=protocol))
    assert counts(load("cifar10", tmp_path))["test"] == 20


def test_cifar_damaged_files(tmp_path: Path) -> None:
    path = make_cifar(tmp_path) / "data_batch_1"
    whole = path.read_bytes()

    def check(content: bytes, *expected: object) -> None:
        path.write_bytes(content)
        failure("cifar10", tmp_path, *expected)

    check(b"", path, "cannot be read as a pickle")
    check(whole[: len(whole) // 2], path, "cannot be read as a pickle")
    check(pickle.dumps([1]), path.parent, "torchvision cannot read")
    names = path.parent / "batches.meta"
    meta = names.read_bytes()
    names.write_bytes(pickle.dumps({"label_names": list(range(10))}, 2))
    check(whole, path.parent, "expected names of classes, got 0 in batches.meta")
    names.write_bytes(meta)
    pixels = np.zeros((2, 3072), dtype=np.uint8)
    check(pickle.dumps({"data": pixels, "labels": [0]}, 2), path.parent, "got 82 images", "81 labels", "train batches")
    check(pickle.dumps({"data": pixels, "labels": [0, 10]}, 2), path.parent, "labels up to 10", "below 10")
    check(pickle.dumps({"data": pixels - 1.0, "labels": [0, 1]}, 2), path.parent, "type float64")


def test_cifar_real_images() -> None:
    data_dir = real("cifar-10-batches-py")
    image_set = load("cifar10", data_dir)
    assert image_set.classes[:3] == ("airplane", "automobile", "bird")
    assert counts(image_set) == {"train": 4000, "val": 1000, "test": 1000}
    assert np.bincount(image_set.splits["test"].labels).tolist() == [100] * 10
    images = image_set.splits["test"].images
    assert isinstance(images, np.ndarray)
    # Neighbours in a photograph are alike: were channels, rows and columns mixed up, they would not be
    steps = [np.abs(np.diff(images.astype(float), axis=axis)).mean() for axis in (1, 2)]
    assert max(steps) < images.std() / 2
    failure("cifar10", data_dir, data_dir / "cifar-10-batches-py" / "data_batch_1", "md5", verify=True)


# torchvision


def tv(data_dir: Path, name: str, **options: Any) -> ImageSet:
    return load(name, data_dir, reader="torchvision", **options)


@pytest.mark.parametrize(
    ("name", "classes", "expected"),
    [
        ("DTD", ("banded", "dotted", "woven"), (12, 3, 6)),
        ("EuroSAT", ("Forest", "Highway", "River"), (12, 3, 3)),
        ("OxfordIIITPet", ("Abyssinian", "American Bulldog", "Bengal"), (9, 3, 6)),
        ("GTSRB", ("0", "7", "42"), (9, 3, 6)),
        ("Caltech101", ("ant", "bass", "crab"), (12, 3, 3)),
        ("Caltech256", ("001.ant", "002.bass", "003.crab"), (12, 3, 3)),
        ("SUN397", ("abbey", "bar", "church/outdoor"), (12, 3, 3)),
        ("Food101", ("cake", "pie", "ribs"), (9, 3, 6)),
        ("Country211", ("AD", "AE", "AF"), (12, 3, 6)),
        ("RenderedSST2", ("negative", "positive"), (8, 2, 4)),
        ("Imagenette", ("tench", "English springer", "cassette player"), (9, 3, 6)),
        ("CLEVRClassification", ("3", "4", "5"), (9, 3, 6)),
        ("StanfordCars", ("Acura", "BMW", "Fiat"), (9, 3, 6)),
    ],
)
def test_torchvision_files(tmp_path: Path, name: str, classes: tuple[str, ...], expected: tuple[int, ...]) -> None:
    make_torchvision(tmp_path, name)
    options = {"size": "160px"} if name == "Imagenette" else {}
    image_set = tv(tmp_path, name, verify=True, options=options)
    assert image_set.classes == classes
    assert tuple(counts(image_set).values()) == expected
    assert image_set.numbers == {"GTSRB": (0, 7, 42), "CLEVRClassification": (3, 4, 5)}.get(name)
    for split, label, path in named(image_set):
        below = str(path.relative_to(tmp_path)).lower()
        if name == "GTSRB":
            assert int(label) == (int(path.stem) % 100 if split == "test" else int(path.parent.name))
        elif name == "CLEVRClassification":
            assert int(label) == 3 + int(path.stem) // (2 if split == "test" else 4)
        elif name == "StanfordCars":
            assert label == classes[int(path.stem) % 3]
        elif name == "Imagenette":
            assert label == {"n01440764": "tench", "n02102040": "English springer"}.get(path.parent.name, classes[2])
        else:
            assert label.lower().replace(" ", "_") in below
        if name == "Food101":
            assert (split == "test") == (int(path.stem) > 4)
        elif expected[2] != 3:
            assert (split == "test") == (("/val" if name in ("Imagenette", "CLEVRClassification") else "test") in below)


@pytest.mark.parametrize(
    ("name", "classes", "size", "values"),
    [
        ("SVHN", ("0", "1", "2"), 32, (10, 1, 2)),
        ("MNIST", ("0 - zero", "1 - one", "2 - two"), 28, (0, 1, 2)),
        ("EMNIST", ("0", "1", "2"), 28, (0, 1, 2)),
        ("STL10", ("airplane", "bird", "car"), 96, (1, 2, 3)),
        ("FER2013", ("0", "1", "2"), 48, (0, 1, 2)),
        ("USPS", ("0", "1", "2"), 16, (140, 153, 165)),
    ],
)
def test_torchvision_arrays(
    tmp_path: Path,
    name: str,
    classes: tuple[str, ...],
    size: int,
    values: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(torchvision.datasets.FER2013._RESOURCES, "fer", ("fer2013.csv", None))
    make_torchvision(tmp_path, name)
    image_set = tv(tmp_path, name)
    assert image_set.classes == classes
    assert counts(image_set) == {"train": 9, "val": 3, "test": 6}
    for samples in image_set.splits.values():
        assert isinstance(samples.images, np.ndarray)
        assert samples.images.dtype == np.uint8
        assert samples.images.shape == (len(samples), size, size, 3)
        assert (samples.images == np.array(values)[samples.labels][:, None, None, None]).all()


def test_torchvision_pickles_of_old_versions_are_not_read(tmp_path: Path) -> None:
    make_torchvision(tmp_path, "MNIST")
    before = tv(tmp_path, "MNIST").splits["train"]
    folder = tmp_path / "MNIST" / "processed"
    folder.mkdir()
    for name in ("training.pt", "test.pt"):
        torch.save((torch.zeros(5, 28, 28, dtype=torch.uint8), torch.zeros(5, dtype=torch.long)), folder / name)
    after = tv(tmp_path, "MNIST").splits["train"]
    assert np.array_equal(after.images, before.images)
    assert np.array_equal(after.labels, before.labels)


def test_torchvision_order_does_not_depend_on_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_torchvision(tmp_path, "SUN397")
    straight = sorted(tmp_path.rglob("sun_*.jpg"))
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: straight[::-1])
    everything = read_official(DatasetConfig(name="SUN397", reader="torchvision"), tmp_path).splits["all"]
    assert list(everything.images) == straight
    assert everything.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6


def test_torchvision_checksums_are_compared(tmp_path: Path) -> None:
    make_torchvision(tmp_path, "SVHN")
    failure("SVHN", tmp_path, "torchvision cannot read", "corrupted", "verify=false", reader="torchvision", verify=True)
    tv(tmp_path, "SVHN")


def test_torchvision_every_set_is_there_and_takes_its_arguments() -> None:
    import inspect

    for name, known in reader._SETS.items():
        parameters = inspect.signature(getattr(torchvision.datasets, name)).parameters
        assert set(known.splits) in ({"all"}, {"train", "test"}, {"train", "val", "test"})
        assert {key for own in known.splits.values() for key in own} <= {*parameters, *(["train"] * (name == "EMNIST"))}
        assert ("download" in parameters or "kwargs" in parameters) or known.by_hand
    assert all(hasattr(torchvision.datasets, name) for name in reader._SEPARATE_READERS)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("", ("dataset.name: expected one of", "got nothing", "Caltech101", "DTD", "USPS")),
        ("dtd", ("dataset.name: expected one of DTD", "got 'dtd'")),
        ("SVNH", ("one of SVHN",)),
        ("Birds", ("expected one of Caltech101",)),
        ("Flowers102", ("dataset=flowers",)),
    ],
)
def test_torchvision_unknown_names(tmp_path: Path, name: str, expected: tuple[str, ...]) -> None:
    failure(name, tmp_path, *expected, reader="torchvision")


def test_torchvision_options(tmp_path: Path) -> None:
    make_torchvision(tmp_path, "DTD")
    labels = tmp_path / "dtd" / "dtd" / "labels"
    for path in labels.glob("*1.txt"):
        shutil.copy(path, path.with_name(path.name.replace("1", "2")))
    (labels / "train2.txt").write_text("\n".join((labels / "train1.txt").read_text().splitlines()[::2]))
    assert counts(tv(tmp_path, "DTD"))["train"] == 12
    assert counts(tv(tmp_path, "DTD", options={"partition": 2}))["train"] == 6
    for key in ("root", "split", "transform", "target_transform", "loader", "download", "size"):
        failure("DTD", tmp_path, f"got {key!r}", "expected partition for DTD", reader="torchvision", options={key: 1})
    failure("DTD", tmp_path, "dtd", "train9.txt", reader="torchvision", options={"partition": 9})
    for key in ("path", "part", "level"):
        failure("DTD", tmp_path, f"dataset.{key}", "leave it out", reader="torchvision", **{key: "x"})


def test_torchvision_missing(tmp_path: Path) -> None:
    fails = functools.partial(failure, kind=MissingInputError, reader="torchvision")
    fails("DTD", tmp_path, f"{tmp_path} has no dtd/dtd", "dataset.download=true", "data_dir=")
    fails("Imagenette", tmp_path, "has no imagenette2;")
    fails("Imagenette", tmp_path, "has no imagenette2-160;", options={"size": "160px"})
    for download in (False, True):
        fails("StanfordCars", tmp_path, "no longer on the official server", download=download)
        fails("FER2013", tmp_path, "fer2013.csv", "kaggle", download=download)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    failure(
        "DTD",
        tmp_path / "file",
        "data_dir: expected a folder that can be written to",
        reader="torchvision",
        download=True,
    )


def test_torchvision_damage(tmp_path: Path) -> None:
    make_torchvision(tmp_path, "OxfordIIITPet")
    path = tmp_path / "oxford-iiit-pet" / "annotations" / "test.txt"
    path.write_text("\n".join(path.read_text().splitlines()[:2]))
    failure("OxfordIIITPet", tmp_path, "train and test below", "different classes", reader="torchvision")
    path.write_text("Bengal_0 three\n")
    failure("OxfordIIITPet", tmp_path, "torchvision cannot read", "ValueError", reader="torchvision")


def test_torchvision_download(tmp_path: Path, server: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    served, address = server
    make_torchvision(served, "SVHN")
    files = {split: served / f"{split}_32x32.mat" for split in ("train", "test")}
    md5s = {split: hashlib.md5(path.read_bytes()).hexdigest() for split, path in files.items()}
    lists = {split: [f"{address}/{path.name}", path.name, md5s[split]] for split, path in files.items()}
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", lists)
    original = torchvision.datasets.utils._urlretrieve
    data_dir = tmp_path / "data"

    # The second file is not there yet: the first one stays, and is not asked for again
    hidden = files["test"].rename(served / "hidden")
    fails = functools.partial(failure, "SVHN", data_dir, kind=MissingInputError, reader="torchvision", verify=True)
    fails("dataset SVHN: torchvision cannot download it", "404", "data_dir=", download=True)
    hidden.rename(files["test"])
    files["train"].unlink()
    assert counts(tv(data_dir, "SVHN", verify=True, download=True)) == {"train": 9, "val": 3, "test": 6}
    assert torchvision.datasets.utils._urlretrieve is original
    assert sorted(path.name for path in data_dir.glob("*")) == [".downloads", "test_32x32.mat", "train_32x32.mat"]
    assert not list((data_dir / ".downloads").glob("*.unfinished"))
    shutil.rmtree(data_dir / ".downloads")
    tv(data_dir, "SVHN", verify=True, download=True)
    assert not (data_dir / ".downloads").exists()


def test_torchvision_download_that_was_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "eurosat" / "2750"

    def cut_off(self: Any) -> None:
        make_folder(root, ("Forest",))
        raise KeyboardInterrupt

    def whole(self: Any) -> None:
        assert not root.exists()
        make_torchvision(tmp_path, "EuroSAT")

    monkeypatch.setattr(torchvision.datasets.EuroSAT, "download", cut_off)
    with pytest.raises(KeyboardInterrupt):
        tv(tmp_path, "EuroSAT", download=True)
    failure(
        "EuroSAT", tmp_path, "has not finished", "dataset.download=true", kind=MissingInputError, reader="torchvision"
    )
    monkeypatch.setattr(torchvision.datasets.EuroSAT, "download", whole)
    assert tv(tmp_path, "EuroSAT", download=True).classes == ("Forest", "Highway", "River")
    assert tv(tmp_path, "EuroSAT").classes == ("Forest", "Highway", "River")


def test_only_what_belongs_to_a_set_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, victim = tmp_path / "data", tmp_path / "victim"
    victim.mkdir()
    (root / ".downloads").mkdir(parents=True)
    (root / ".downloads" / "torchvision-EuroSAT.unfinished").write_text(f"{victim}\n../victim\neurosat/2750\n")
    (root / "eurosat" / "2750").mkdir(parents=True)
    monkeypatch.setattr(torchvision.datasets.EuroSAT, "download", lambda self: make_torchvision(root, "EuroSAT"))
    tv(root, "EuroSAT", download=True)
    assert victim.is_dir()


def test_labels_that_no_integer_holds(tmp_path: Path) -> None:
    make_torchvision(tmp_path, "GTSRB")
    path = tmp_path / "gtsrb" / "GT-final_test.csv"
    head, first, *others = path.read_text().splitlines()
    path.write_text("\n".join([head, ";".join([*first.split(";")[:-1], "9" * 30]), *others]))
    failure("GTSRB", tmp_path, "dataset GTSRB: expected small integers as labels", reader="torchvision")


def test_a_cut_down_copy_of_a_csv(tmp_path: Path) -> None:
    make_torchvision(tmp_path, "FER2013")
    assert tv(tmp_path, "FER2013", verify=False).classes
    failure("FER2013", tmp_path, "or corrupted", reader="torchvision", verify=True)
