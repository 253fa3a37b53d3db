"""The classification sets of torchvision, by the names of their classes: `dataset=torchvision dataset.name=DTD`.

The splits are the official ones; a set that has none is divided by class.
"""

from __future__ import annotations

import difflib
import inspect
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recast_exp.data.download import fetch
from recast_exp.data.layout import refuse
from recast_exp.data.sets._mat import check_mat
from recast_exp.data.sets._torchvision import reading, reason, unverified, without_pickles
from recast_exp.data.types import Official, Samples
from recast_exp.errors import MissingInputError, RecastError, UserError
from recast_exp.files import locked, write_text

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from recast_exp.config.schema import DatasetConfig

    Images = NDArray[np.uint8] | tuple[Path, ...]


@dataclass(frozen=True)
class _Set:
    """A set of torchvision.

    Attributes:
        entries: The files and folders that must be below `data_dir`.
        splits: For each split, the arguments of the class that select it.
        by_hand: How to get the set if torchvision cannot download it.
    """

    entries: tuple[str, ...]
    splits: Mapping[str, Mapping[str, str | bool]]
    by_hand: str = ""


def _split(**names: str) -> dict[str, dict[str, str | bool]]:
    return {split: {"split": name} for split, name in names.items()}


def _idx(name: str, *parts: str) -> tuple[str, ...]:
    """The files of MNIST and its successors."""
    kinds = ("images-idx3-ubyte", "labels-idx1-ubyte")
    return tuple(f"{name}/raw/{part}-{kind}" for part in parts or ("train", "t10k") for kind in kinds)


_TRAIN_VAL_TEST, _TRAIN_TEST = _split(train="train", val="val", test="test"), _split(train="train", test="test")
_TRAIN_OR_NOT: dict[str, dict[str, str | bool]] = {"train": {"train": True}, "test": {"train": False}}
_ALL: dict[str, dict[str, str | bool]] = {"all": {}}
_BALANCED = {split: {**arguments, "split": "balanced"} for split, arguments in _TRAIN_OR_NOT.items()}
_SETS = {
    "Caltech101": _Set(("caltech101/101_ObjectCategories",), _ALL),
    "Caltech256": _Set(("caltech256/256_ObjectCategories",), _ALL),
    # The labels of its test images are not published
    "CLEVRClassification": _Set(("clevr/CLEVR_v1.0",), _split(train="train", test="val")),
    "Country211": _Set(("country211",), _split(train="train", val="valid", test="test")),
    "DTD": _Set(("dtd/dtd",), _TRAIN_VAL_TEST),
    "EMNIST": _Set(_idx("EMNIST", "emnist-balanced-train", "emnist-balanced-test"), _BALANCED),
    "EuroSAT": _Set(("eurosat/2750",), _ALL),
    "FashionMNIST": _Set(_idx("FashionMNIST"), _TRAIN_OR_NOT),
    "FER2013": _Set(
        ("fer2013",),
        _TRAIN_TEST,
        "torchvision cannot download it: get fer2013.csv or icml_face_data.csv (test.csv has no labels) from "
        "https://www.kaggle.com/c/challenges-in-representation-learning-facial-expression-recognition-challenge",
    ),
    "Food101": _Set(("food-101/images", "food-101/meta"), _TRAIN_TEST),
    "GTSRB": _Set(("gtsrb/GTSRB/Training", "gtsrb/GTSRB/Final_Test/Images", "gtsrb/GT-final_test.csv"), _TRAIN_TEST),
    "Imagenette": _Set(("imagenette2{size}",), _split(train="train", test="val")),
    "KMNIST": _Set(_idx("KMNIST"), _TRAIN_OR_NOT),
    "MNIST": _Set(_idx("MNIST"), _TRAIN_OR_NOT),
    "OxfordIIITPet": _Set(
        ("oxford-iiit-pet/images", "oxford-iiit-pet/annotations"), _split(train="trainval", test="test")
    ),
    "RenderedSST2": _Set(("rendered-sst2",), _TRAIN_VAL_TEST),
    "StanfordCars": _Set(
        ("stanford_cars/devkit", "stanford_cars/cars_test_annos_withlabels.mat"),
        _TRAIN_TEST,
        "its archives are no longer on the official server, so torchvision cannot download it; put a copy of your own "
        "there, with cars_train/ and cars_test/",
    ),
    "STL10": _Set(("stl10_binary",), _TRAIN_TEST),
    "SUN397": _Set(("SUN397",), _ALL),
    "SVHN": _Set(("train_32x32.mat", "test_32x32.mat"), _TRAIN_TEST),
    "USPS": _Set(("usps.bz2", "usps.t.bz2"), _TRAIN_OR_NOT),
}
_SEPARATE_READERS = {"CIFAR10": "cifar10", "CIFAR100": "cifar100", "FGVCAircraft": "aircraft", "Flowers102": "flowers"}
_RESERVED = {"root", "transform", "target_transform", "transforms", "target_type", "target_types", "loader", "download"}
"""Arguments that the reader sets, or that would change the kind of labels."""


def check(cfg: DatasetConfig, data_dir: Path) -> None:
    """Check that the set is present, unless it may be downloaded.

    Raises:
        UserError: If torchvision has no such set, or an option is set that it does not accept.
        MissingInputError: If the set is missing.
    """
    refuse(cfg, "options")
    if cfg.name in _SEPARATE_READERS:
        raise UserError(
            f"dataset.name: expected a set without a reader of its own, got {cfg.name!r}; set "
            f"dataset={_SEPARATE_READERS[cfg.name]} instead"
        )
    if cfg.name not in _SETS:
        lower = {name.lower(): name for name in _SETS}
        near = [lower[name] for name in difflib.get_close_matches(cfg.name.lower(), lower)] or list(_SETS)
        got = repr(cfg.name) if cfg.name else "nothing"
        raise UserError(f"dataset.name: expected one of {', '.join(near)} for dataset=torchvision, got {got}")
    by_hand = _SETS[cfg.name].by_hand
    if cfg.download and not by_hand:
        return
    missing = _missing(cfg, data_dir)
    if missing or _unfinished(cfg, data_dir).exists():
        problem = f"{data_dir} has no {', '.join(missing)}" if missing else "its download has not finished"
        advice = by_hand or "set dataset.download=true to download it"
        raise MissingInputError(f"dataset {cfg.name}: {problem}; {advice}, or set its location with data_dir=…")


def read(cfg: DatasetConfig, data_dir: Path) -> Official:
    """Read the index (or the images, if they are small); download the set first, if `cfg.download` is set.

    Raises:
        UserError: If an option is unknown, or torchvision cannot read the set.
        MissingInputError: If the set cannot be downloaded.
    """
    from torchvision import datasets

    dataset_class = without_pickles(getattr(datasets, cfg.name))
    parameters = inspect.signature(dataset_class).parameters
    arguments = _options(cfg, parameters)
    if "loader" in parameters:
        arguments["loader"] = Path
    if cfg.download and (_missing(cfg, data_dir) or _unfinished(cfg, data_dir).exists()):
        _download(cfg, data_dir, dataset_class, arguments)
    for entry in _SETS[cfg.name].entries:
        for file in [data_dir / entry] if entry.endswith(".mat") else (data_dir / entry).glob("*.mat"):
            check_mat(file, cfg.name)
    if not cfg.verify:
        dataset_class = unverified(dataset_class)
    with reading(cfg, data_dir):
        opened = {
            split: dataset_class(data_dir, **selection, **arguments)
            for split, selection in _SETS[cfg.name].splits.items()
        }
        pairs = {split: _pairs(cfg.name, dataset) for split, dataset in opened.items()}
    for split, (_, labels) in pairs.items():
        if None in labels:
            raise UserError(f"dataset {cfg.name}: the {split} images have no labels; {_SETS[cfg.name].by_hand}")
    names = {
        split: getattr(dataset, "classes", getattr(dataset, "categories", None)) for split, dataset in opened.items()
    }
    first, *others = names.values()
    if any(other != first for other in others):
        raise UserError(
            f"dataset {cfg.name}: {' and '.join(names)} below {data_dir} have different classes; get the whole set"
        )
    return _official(cfg, first, pairs, data_dir)


def _options(cfg: DatasetConfig, parameters: Mapping[str, inspect.Parameter]) -> dict[str, object]:
    """The user's arguments, checked against those of the class."""
    selecting = {argument for arguments in _SETS[cfg.name].splits.values() for argument in arguments}
    named = [name for name, parameter in parameters.items() if parameter.kind is not parameter.VAR_KEYWORD]
    allowed = [name for name in named if name not in _RESERVED | selecting]
    for name in cfg.options:
        if name not in allowed:
            raise UserError(f"dataset.options: expected {' or '.join(allowed) or 'none'} for {cfg.name}, got {name!r}")
    return dict(cfg.options)


def _missing(cfg: DatasetConfig, data_dir: Path) -> list[str]:
    """The missing entries: those of the table, with the size in the name of Imagenette's folder."""
    size = str(cfg.options.get("size", "full")).removesuffix("px")
    return [entry for entry in _entries(cfg.name, size) if not (data_dir / entry).exists()]


def _entries(name: str, size: str) -> list[str]:
    return [entry.format(size="" if size == "full" else f"-{size}") for entry in _SETS[name].entries]


def _unfinished(cfg: DatasetConfig, data_dir: Path) -> Path:
    """The file that lists the entries of an unfinished download; it is removed when all of them are complete."""
    return data_dir / ".downloads" / f"torchvision-{cfg.name}.unfinished"


def _download(
    cfg: DatasetConfig, data_dir: Path, dataset_class: Callable[..., object], arguments: Mapping[str, object]
) -> None:
    """Let torchvision download the missing entries, in one process at a time. An interrupted download is continued.

    torchvision assumes that an existing folder is complete. So entries that a killed run may have unpacked in part are
    removed first; archives stay.
    """
    from torchvision.datasets import utils

    def retrieve(url: str, filename: str | Path, *_: object, **__: object) -> None:
        try:
            fetch(url, Path(filename), description=f"dataset {cfg.name}")
        except RecastError as error:
            raise RuntimeError(str(error)) from error  # makes torchvision try the next mirror, if there is one

    unfinished = _unfinished(cfg, data_dir)
    original = getattr(utils, "_urlretrieve", None)
    try:
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        unfinished.with_suffix(".lock").touch()
    except OSError as error:
        raise UserError(
            f"data_dir: expected a folder that can be written to, got {data_dir} ({error.strerror})"
        ) from error
    try:
        with locked(unfinished.with_suffix(".lock"), f"the download of dataset {cfg.name}"):
            own = {entry for size in ("full", "320", "160") for entry in _entries(cfg.name, size)}
            begun = unfinished.read_text(encoding="utf-8").splitlines() if unfinished.exists() else ()
            for entry in own.intersection(begun):  # the file may be another's
                if (data_dir / entry).is_dir():
                    shutil.rmtree(data_dir / entry)
                else:
                    (data_dir / entry).unlink(missing_ok=True)
            if not _missing(cfg, data_dir):
                unfinished.unlink(missing_ok=True)
                return
            if original:
                utils._urlretrieve = retrieve
            for selection in _SETS[cfg.name].splits.values():
                write_text(unfinished, "\n".join(_missing(cfg, data_dir)))
                dataset_class(data_dir, **selection, **arguments, download=True)
            unfinished.unlink()
    except RecastError:
        raise
    except Exception as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise MissingInputError(
            f"dataset {cfg.name}: torchvision cannot download it to {data_dir} ({reason(error)}); check the network "
            "and its proxy settings and run again, or get the set by hand and set its location with data_dir=…"
        ) from error
    finally:
        if original:
            utils._urlretrieve = original


def _pairs(name: str, dataset: Any) -> tuple[Images, Sequence[int | None]]:
    """The images (paths or an array) and the labels of one split."""
    import numpy as np

    pairs: list[tuple[Any, int | None]]
    if name == "Caltech101":
        folders = [Path(dataset.root, "101_ObjectCategories", category) for category in dataset.categories]
        pairs = [(folders[y] / f"image_{i:04d}.jpg", y) for i, y in zip(dataset.index, dataset.y, strict=True)]
    elif name == "Caltech256":
        folders = [Path(dataset.root, "256_ObjectCategories", category) for category in dataset.categories]
        pairs = [(folders[y] / f"{y + 1:03d}_{i:04d}.jpg", y) for i, y in zip(dataset.index, dataset.y, strict=True)]
    elif name == "GTSRB":
        # In a cut-down copy, torchvision would renumber the training folders, but not the test images
        pairs = [(Path(path), label) for path, label in dataset._samples]
        pairs = [(path, label if path.parent.name == "Images" else int(path.parent.name)) for path, label in pairs]
    elif name == "OxfordIIITPet":
        pairs = list(zip(dataset._images, dataset._labels, strict=True))
    else:
        pairs = [dataset[i] for i in range(len(dataset))]
    if not hasattr(pairs[0][0], "convert"):
        pairs.sort(key=lambda pair: pair[0])  # some sets come in the order of the file system
        return tuple(path for path, _ in pairs), [label for _, label in pairs]
    return np.stack([np.asarray(image.convert("RGB")) for image, _ in pairs]), [label for _, label in pairs]


def _official(
    cfg: DatasetConfig,
    names: Sequence[str | Sequence[str]] | None,
    pairs: Mapping[str, tuple[Images, Sequence[int | None]]],
    data_dir: Path,
) -> Official:
    """Number the classes from 0; without names, the existing labels become the names."""
    import numpy as np

    try:
        labels = {split: np.array(numbers, dtype=np.int64) for split, (_, numbers) in pairs.items()}
    except OverflowError as error:
        raise UserError(
            f"dataset {cfg.name}: expected small integers as labels below {data_dir}; get the whole set"
        ) from error
    numbers = np.unique(np.concatenate(list(labels.values())))
    official = None
    if names is None:
        names, official = [str(number) for number in numbers], tuple(numbers.tolist())
        labels = {split: np.searchsorted(numbers, original).astype(np.int64) for split, original in labels.items()}
    elif numbers[0] < 0 or numbers[-1] >= len(names):
        raise UserError(
            f"dataset {cfg.name}: expected labels from 0 to {len(names) - 1}, one for each class, got {numbers[0]} to "
            f"{numbers[-1]} below {data_dir}; get the whole set"
        )
    classes = tuple(name if isinstance(name, str) else str(name[0]) for name in names)  # Imagenette has synonyms
    splits = {split: Samples(pairs[split][0], split_labels) for split, split_labels in labels.items()}
    return Official(classes, splits, official, index=f"torchvision's {cfg.name}", root=data_dir)
