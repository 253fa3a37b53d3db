"""Reading image files; a file that cannot be decoded is named in the error."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from tqdm import tqdm

from recast_exp.errors import RecastError, UserError
from recast_exp.system import usable_cores

log = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")


def read_image(path: Path) -> Tensor:
    """Return an image file as a uint8 tensor [3, H, W]; grey is repeated, transparency dropped.

    Raises:
        UserError: If it cannot be read. One line that names the file.
    """
    try:
        with Image.open(path) as image:
            return pixels_of(image)
    # PIL's readers raise SyntaxError, ValueError, EOFError, struct.error and more, besides OSError, on a damaged file
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{path}: cannot be read as an image ({reason}); replace or remove the file, or set dataset.bad_images=skip"
        ) from error


def pixels_of(image: Image.Image) -> Tensor:
    """Return an image of PIL as a uint8 tensor [3, H, W]; grey is repeated, transparency dropped.

    Raises:
        ValueError: If it has 32 bits per pixel.
    """
    if image.mode in ("I", "F"):
        raise ValueError(f"it has 32 bits per pixel, mode {image.mode}; convert it to 8 or 16")
    deep = image.mode.startswith("I;16")  # 16 bits of grey, which PIL would clip to white
    gray = image.point(lambda value: value / 256).convert("L") if deep else image
    pixels: Tensor = v2.functional.pil_to_tensor(gray.convert("RGB"))
    return pixels


def reason_of(error: RecastError) -> str:
    """Why an image cannot be read, without its name."""
    return " ".join(str(error.__cause__).split()) or "unreadable"


def damaged_files(paths: Sequence[Path]) -> dict[Path, str]:
    """Decode images, and return those that cannot be decoded, each with the reason."""
    return {path: reason for path, reason in look_at(paths).items() if isinstance(reason, str)}


def look_at(paths: Sequence[Path]) -> dict[Path, tuple[int, int] | str]:
    """Decode images, and return the height and width of each, or the reason why it cannot be read."""

    def look(path: Path) -> tuple[int, int] | str:
        try:
            height, width = read_image(path).shape[1:]
        except RecastError as error:
            return reason_of(error)
        return height, width

    return dict(zip(paths, in_parallel(look, paths, "looking at images"), strict=True))


def in_parallel(work: Callable[[T], R], items: Sequence[T], progress: str) -> Iterator[R]:
    """Yield `work(item)` for each item, in order, computed by as many threads as there are cores.

    Threads, as decoding and resizing release the interpreter's lock; processes would have to be started from one that
    may hold other threads. A progress bar is shown in a terminal.
    """
    threads = torch.get_num_threads()

    def start() -> None:
        torch.set_num_threads(1)

    pool = ThreadPoolExecutor(usable_cores(), initializer=start)
    try:
        results = pool.map(work, items)
        yield from tqdm(
            results, desc=progress, total=len(items), unit="img", leave=False, disable=not sys.stderr.isatty()
        )
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
