"""Reading CIFAR-10 and CIFAR-100: pickles of arrays, in the official layout for Python."""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from recast_exp.data.sets._torchvision import labels_of, reading, unverified
from recast_exp.data.types import Official, Samples
from recast_exp.errors import RecastError, UserError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from recast_exp.config.schema import DatasetConfig


class _Batches(Protocol):
    """What is used of torchvision's classes `CIFAR10` and `CIFAR100`."""

    train_list: ClassVar[list[list[str]]]
    test_list: ClassVar[list[list[str]]]
    meta: ClassVar[dict[str, str]]
    data: ArrayLike
    targets: list[int]
    classes: list[str]

    def __init__(self, root: Path, train: bool) -> None: ...


def read_batches(dataset_class: type[_Batches], root: Path, cfg: DatasetConfig) -> Official:
    """Read CIFAR-10 or CIFAR-100. The images are kept in memory.

    Args:
        dataset_class: torchvision's class.
        root: The folder of the batches.
        cfg: The `dataset` node of the configuration.

    Raises:
        UserError: If a file holds anything but arrays, or cannot be read.
    """
    import numpy as np

    files = [name for name, _ in [*dataset_class.train_list, *dataset_class.test_list]]
    files.append(dataset_class.meta["filename"])
    if not cfg.verify:
        for file in files:
            _refuse_code(root / file)
        dataset_class = unverified(dataset_class)
    splits = {}
    with reading(cfg, root):
        for split, train in (("train", True), ("test", False)):
            dataset = dataset_class(root.parent, train=train)
            images, labels = np.ascontiguousarray(dataset.data), labels_of(dataset.targets, root)
            classes = tuple(dataset.classes)
            if odd := [name for name in classes if not isinstance(name, str)]:
                raise UserError(
                    f"{root}: expected names of classes, got {odd[0]!r} in {dataset_class.meta['filename']}"
                )
            if images.dtype != np.uint8 or len(images) != len(labels) or not np.isin(labels, range(len(classes))).all():
                raise UserError(
                    f"{root}: expected uint8 images and one label below {len(classes)} for each, got {len(images)} "
                    f"images of type {images.dtype} and {len(labels)} labels up to {labels.max(initial=0)} in the "
                    f"{split} batches"
                )
            splits[split] = Samples(images, labels)
    return Official(classes, splits, index=str(root))


_TYPE = re.compile(r"[|<>=]?[biuf][1248]")
"""Names of the types of arrays: plain numbers, nothing that refers to anything."""


class _ForgedError(UserError):
    """A pickle whose parts could not have been written by NumPy."""


class _Dtype:
    """Stands in for a type of NumPy: a forged state of the real one would crash Python."""

    def __init__(self, name: object, align: object = False, copy: object = True) -> None:
        if not isinstance(name, str) or not _TYPE.fullmatch(name):
            raise _ForgedError("a type that is no plain number")
        self.itemsize = int(name[-1])

    def __setstate__(self, state: object) -> None:
        parts = state if isinstance(state, tuple) else ()
        if len(parts) != 8 or parts[1] not in ("<", ">", "|", "=") or parts[2:] != (None, None, None, -1, -1, 0):
            raise _ForgedError("a type that is no plain number")


class _Array:
    """Stands in for an array."""

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise _ForgedError("an array without its parts")
        _, shape, dtype, _, content = state
        if (
            not isinstance(dtype, _Dtype)
            or not isinstance(content, str | bytes | bytearray)
            or not isinstance(shape, tuple)
        ):
            raise _ForgedError("an array that is none of plain numbers")
        if not all(type(size) is int and size >= 0 for size in shape):
            raise _ForgedError("an array without a shape")
        if len(content) != math.prod(shape) * dtype.itemsize:
            raise _ForgedError("an array of another size than its content")


def _reconstructed(kind: object, shape: object, code: object) -> _Array:
    if kind is not _Array or shape != (0,):
        raise _ForgedError("an array that is none of NumPy's")
    return _Array()


def _from_buffer(content: object, dtype: object, shape: object, order: object) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, dtype, False, content))
    return array


def _encoded(text: object, encoding: object) -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise _ForgedError("bytes that are none")
    return text.encode("latin1")


_Reader: Any = pickle._Unpickler

_STAND_INS: dict[tuple[str, str], object] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encoded,  # how Python 3 stores bytes for Python 2
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstructed for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
}
"""All names that a pickle of arrays refers to, and what is called in their place."""


class _ArraysOnly(_Reader):  # type: ignore[misc]
    """Reads a pickle of arrays, lists and dictionaries without making an array, to find out that it holds no more.

    The reader is the one that Python has in Python, of which parts can be replaced: the key of a dictionary is looked
    at before it is hashed, which would take for ever for tuples of tuples of tuples.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(_Reader.dispatch)

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in _STAND_INS:
            raise UserError(f"{module}.{name}")
        return _STAND_INS[module, name]

    def _check(self, keys: Iterable[object]) -> None:
        if not all(isinstance(key, str | bytes) for key in keys):
            raise _ForgedError("a dictionary with keys that are no names")

    def load_dict(self) -> None:
        self._check(self.stack[::2])
        super().load_dict()

    def load_setitem(self) -> None:
        self._check(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        self._check(self.stack[::2])
        super().load_setitems()

    def _refuse_set(self) -> None:
        raise _ForgedError("a set")

    for _code in (pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET):
        dispatch[_code[0]] = _refuse_set
    dispatch[pickle.DICT[0]] = load_dict
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems


def _refuse_code(path: Path) -> None:
    """Refuse a pickle that holds anything but arrays: loading one from an unknown source can run any program.

    Raises:
        UserError: If it does, or is not a pickle.
    """
    try:
        with path.open("rb") as file:
            _ArraysOnly(file, encoding="latin1").load()
    except _ForgedError as error:
        raise UserError(f"{path}: expected a pickle of arrays and lists, got {error}; replace it") from None
    except RecastError as error:
        raise UserError(
            f"{path}: expected a pickle of arrays, lists and dictionaries, as in the official set, got one that refers "
            f"to {error}; opening it could run a program"
        ) from None
    except Exception as error:  # pickle can raise nearly any exception on damaged data
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: cannot be read as a pickle ({text}); replace it") from error
