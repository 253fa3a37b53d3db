"""Resized images, kept for fast access: in a file that all runs on a machine share, or in memory.

Decoding and resizing a photograph takes milliseconds, reading it from here tens of microseconds. The content of a store
depends only on the bytes of the image files and on the geometry. So it is identified by their hash: all runs of a sweep
use it, and a run whose data has changed does not.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Protocol, TypedDict

import numpy as np
import PIL
import torch
import torchvision
from msgspec import Meta
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from recast_exp import schemas
from recast_exp.data.images import in_parallel, read_image, size_of
from recast_exp.data.preprocessing import Geometry
from recast_exp.data.types import Samples
from recast_exp.errors import UserError
from recast_exp.files import json_hash, locked, write_json

log = logging.getLogger(__name__)

FORMAT = 2
"""Another one for images that are decoded otherwise."""
SMALL = 64 * 2**20
"""Up to so many bytes, images that are in memory anyway are kept resized."""

_WRITING = threading.Lock()
_PIXELS, _INDEX = "pixels.bin", "index.safetensors"
_SPARE = 2**28  # bytes of a disk or of memory to leave free


class Store(Protocol):
    """Resized images by their number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Tensor:
        """Image `index`, uint8 [3, H, W]; callers must not change it.

        Raises:
            UserError: If its file cannot be read.
        """
        ...


class FileStore:
    """Image files, decoded and resized each time."""

    def __init__(self, paths: Sequence[Path], geometry: Geometry) -> None:
        # One array instead of many objects: loader processes count references, which copies the objects' memory
        self._paths = np.array([os.fsencode(path) for path in paths])
        self._geometry = geometry

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Tensor:
        return self._geometry(read_image(self.path(index), self._geometry.decoding))

    def path(self, index: int) -> Path:
        """The file of an image."""
        return Path(os.fsdecode(bytes(self._paths[index])))


class ArrayStore:
    """Images [N, H, W, 3] in memory, resized each time."""

    def __init__(self, images: NDArray[np.uint8], geometry: Geometry) -> None:
        self._images = images
        self._geometry = geometry

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Tensor:
        return self._geometry(torch.from_numpy(self._images[index]).permute(2, 0, 1))


@dataclass(frozen=True)
class Index:
    """The position of each image among the pixels.

    Attributes:
        shapes: Heights and widths, int64 [N, 2].
    """

    shapes: NDArray[np.int64]

    @property
    def ends(self) -> NDArray[np.int64]:
        """Bytes up to the end of each image, [N]."""
        ends: NDArray[np.int64] = np.cumsum(3 * self.shapes.prod(1))
        return ends

    @property
    def size(self) -> int:
        """Bytes of all images."""
        return int(3 * self.shapes.prod(1).sum())


class PixelStore:
    """Resized images one after the other in memory, or in a file that is mapped into it.

    Args:
        pixels: uint8 values in memory, or the file that holds them; each process maps it when it first reads.
        index: Their shapes.
    """

    def __init__(self, pixels: NDArray[np.uint8] | Path, index: Index) -> None:
        self._source = pixels
        self._shapes = index.shapes
        self._ends = index.ends
        self._pixels = None if isinstance(pixels, Path) else torch.from_numpy(pixels)

    def __len__(self) -> int:
        return len(self._shapes)

    def __getitem__(self, index: int) -> Tensor:
        if self._pixels is None:
            assert isinstance(self._source, Path)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about an array that cannot be written to, which is intended
                self._pixels = torch.from_numpy(np.memmap(self._source, mode="r"))
        height, width = self._shapes[index]
        return self._pixels[self._ends[index] - 3 * height * width : self._ends[index]].view(3, height, width)

    def __getstate__(self) -> dict[str, object]:
        state = dict(self.__dict__)
        if isinstance(self._source, Path):
            state["_pixels"] = None  # mapped again by the process that receives it
        return state


@dataclass(frozen=True)
class Request:
    """The images of one split, and their resizing.

    Attributes:
        samples: The images.
        geometry: The resizing.
        build: Whether to decode images that are not kept yet; otherwise these are decoded when they are read.
    """

    samples: Samples
    geometry: Geometry
    build: bool = True


def open_stores(requests: Mapping[str, Request], mode: str, cache: Path, name: str) -> dict[str, Store]:
    """Open the stores of a dataset's splits; missing ones that are to be kept are built together.

    Args:
        requests: The requests by split.
        mode: "memmap" (files below `cache`), "ram" or "off". Images that are in memory anyway need none of them.
        cache: The cache folder.
        name: Name of the dataset, for messages.

    Raises:
        UserError: If there is not enough space, or an image cannot be read. Nothing is left behind then.
    """
    stores: dict[str, Store] = {}
    plans: dict[str, _Plan] = {}
    for split, request in requests.items():
        images, geometry = request.samples.images, request.geometry
        if not isinstance(images, tuple):
            stores[split] = _array_store(images, geometry)
        elif mode == "off" or (mode == "ram" and not request.build):
            stores[split] = FileStore(images, geometry)
        elif mode == "memmap" and (store := _find(folder := _folder(cache, images, geometry), len(images))) is not None:
            stores[split] = store
        elif not request.build:
            stores[split] = FileStore(images, geometry)
        else:
            plans[split] = _Plan(images, geometry, folder if mode == "memmap" else None)
    if plans:
        _announce(list(plans.values()), mode, cache, name)
    return stores | {split: plan.build(name) for split, plan in plans.items()}


@dataclass
class _Plan:
    """Images to be decoded, and the folder for them; None is memory."""

    paths: Sequence[Path]
    geometry: Geometry
    folder: Path | None

    def __post_init__(self) -> None:
        self.index = Index(np.array(list(in_parallel(self._shape, self.paths, "reading sizes")), dtype=np.int64))

    def _shape(self, path: Path) -> tuple[int, int]:
        return self.geometry.shape(*size_of(path, self.geometry.decoding))

    def build(self, name: str) -> Store:
        """Decode and resize all images."""
        if self.folder is None:
            pixels = np.empty(self.index.size, dtype=np.uint8)
            self._decode(lambda image, start: np.copyto(pixels[start : start + image.size], image), name)
            return PixelStore(pixels, self.index)
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            # Another job may be building it, or have built it since
            with locked(self.folder.with_suffix(".lock"), f"the decoded images of {name}"):
                return _find(self.folder, len(self.paths)) or self._build_folder(self.folder, name)
        except OSError as error:
            raise UserError(
                f"dataset.cache: {self.folder.parent} cannot be written to ({error.strerror or error}); set cache_dir "
                "elsewhere, or dataset.cache=off"
            ) from error

    def _build_folder(self, folder: Path, name: str) -> Store:
        for left in folder.parent.glob(f"{folder.name}.tmp*"):  # by a killed job, as this one holds the lock
            shutil.rmtree(left, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp", dir=folder.parent))
        try:
            with (temporary / _PIXELS).open("wb") as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, self.index.size)
                self._decode(lambda image, start: _write(file.fileno(), image, start), name)
                os.fsync(file.fileno())
            facts = {"format": FORMAT, "dataset": name, "geometry": _facts(self.geometry), **_versions()}
            save_file(
                {"shapes": torch.from_numpy(self.index.shapes)},
                temporary / _INDEX,
                {"recast_exp": json.dumps(facts)},
            )
            temporary.chmod(temporary.parent.stat().st_mode)  # `mkdtemp` makes folders that only their owner can read
            if folder.is_dir():  # one that `_find` did not accept
                shutil.rmtree(folder, ignore_errors=True)
            else:
                folder.unlink(missing_ok=True)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        store = _find(folder, len(self.paths))
        assert store is not None
        return store

    def _decode(self, put: Callable[[NDArray[np.uint8], int], None], name: str) -> None:
        starts = self.index.ends - 3 * self.index.shapes.prod(1)

        def work(number: int) -> None:
            image = self.geometry(read_image(self.paths[number], self.geometry.decoding))
            if image.shape[1:] != tuple(self.index.shapes[number]):
                raise UserError(f"{self.paths[number]}: the file changed while it was read; run again")
            put(image.contiguous().numpy().reshape(-1), int(starts[number]))

        for _ in in_parallel(work, range(len(self.paths)), f"decoding {name}"):
            pass


def _array_store(images: NDArray[np.uint8], geometry: Geometry) -> Store:
    height, width = geometry.shape(*images.shape[1:3])
    index = Index(np.tile(np.array([[height, width]], dtype=np.int64), (len(images), 1)))
    if index.size > SMALL:
        return ArrayStore(images, geometry)
    resized = geometry(torch.from_numpy(images).permute(0, 3, 1, 2))
    return PixelStore(resized.contiguous().numpy().reshape(-1), index)


def _announce(plans: Sequence[_Plan], mode: str, cache: Path, name: str) -> None:
    """Log the number, place and size of the images that will be kept.

    Raises:
        UserError: If they do not fit.
    """
    size, count = sum(plan.index.size for plan in plans), sum(len(plan.paths) for plan in plans)
    if mode == "memmap":
        cache.mkdir(parents=True, exist_ok=True)
        free, place, other = shutil.disk_usage(cache).free, str(cache / "images"), "cache_dir elsewhere"
    else:
        free, place, other = _free_memory(), "memory", "dataset.cache=memmap"
    if size + _SPARE > free:
        raise UserError(
            f"dataset.cache: {mode} needs {_bytes(size)} in {place} for the {count:,} images of {name}, but only "
            f"{_bytes(free)} are free; set {other}, or dataset.cache=off"
        )
    log.info("Decoding %s images of %s, once, to %s (%s)", f"{count:,}", name, place, _bytes(size))


def _bytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def _free_memory() -> int:
    """Bytes of available memory; unlimited if the system does not report them."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        (available,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
        return int(available) * 1024
    except (OSError, ValueError):
        return 2**62


_LONGEST_SIDE = 2**20
"""Pixels; a longer one is that of a damaged index, with which sizes would be too large for an integer."""


def _find(folder: Path, count: int) -> Store | None:
    """The complete store of so many images in a folder; None if there is none, or what is there is damaged."""
    try:
        if not (folder / _INDEX).is_file() or not (folder / _PIXELS).is_file():
            return None
        with safe_open(folder / _INDEX, framework="np") as file:
            shapes = file.get_tensor("shapes")
        sound = shapes.dtype == np.int64 and shapes.shape == (count, 2)
        if not sound or ((shapes < 1) | (shapes > _LONGEST_SIDE)).any():
            return None
        index = Index(shapes)
        if (folder / _PIXELS).stat().st_size == index.size:
            return PixelStore(folder / _PIXELS, index)
    except (OSError, SafetensorError, TypeError, ValueError):
        pass
    return None


def _folder(cache: Path, paths: Sequence[Path], geometry: Geometry) -> Path:
    """The folder for the resized images of these files."""
    settings = {"format": FORMAT, "geometry": _facts(geometry), **_versions()}
    return cache / "images" / json_hash({"content": content_hash(paths, cache), "settings": settings}, 32)


def _facts(geometry: Geometry) -> dict[str, object]:
    """What decides the pixels of a store."""
    facts = asdict(geometry)
    del facts["decoding"]["max_pixels"]
    return facts


def _versions() -> dict[str, str]:
    """The versions that affect the last bits of a resized image."""
    return {"pillow": PIL.__version__, "torchvision": torchvision.__version__}


class _Hash(TypedDict):
    """A remembered hash of image files."""

    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    files: int


def content_hash(paths: Sequence[Path], cache: Path) -> str:
    """Hash the bytes of image files, in order.

    They are read once: as long as no path, size or time of change differs, the hash is remembered below `cache`.

    Raises:
        UserError: If a file cannot be read.
    """
    digest, newest = hashlib.sha256(), 0
    for path in paths:
        status = path.stat()
        facts = f"{path.absolute()}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ctime_ns}\n"
        digest.update(facts.encode("utf-8", "surrogateescape"))
        newest = max(newest, status.st_ctime_ns)
    memo = cache / "images" / "hashes" / f"{digest.hexdigest()[:32]}.json"
    try:
        return schemas.decode(memo, _Hash)["sha256"]
    except ValueError:
        pass
    whole = hashlib.sha256()
    for digest_of_file in in_parallel(_file_hash, paths, "hashing images"):
        whole.update(digest_of_file)
    # A file that changed just now could change again within the resolution of the clock, unnoticed
    if time.time_ns() - newest > 2 * 10**9:
        with contextlib.suppress(OSError):  # if it cannot be written, the files are read again next time
            write_json(memo, {"sha256": whole.hexdigest(), "files": len(paths)})
    return whole.hexdigest()


def _file_hash(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _write(descriptor: int, image: NDArray[np.uint8], start: int) -> None:
    """Write an image at its position; not through a mapping, where a full disk would kill the process."""
    data = memoryview(image.data).cast("B")
    if hasattr(os, "pwrite"):
        while data:
            written = os.pwrite(descriptor, data, start)
            data, start = data[written:], start + written
        return
    with _WRITING:  # Windows: of several threads, each has to find its place first
        os.lseek(descriptor, start, os.SEEK_SET)
        while data:
            data = data[os.write(descriptor, data) :]
