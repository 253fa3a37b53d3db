"""Reading image files; a file that cannot be decoded is named in the error."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor
from torchvision.transforms import v2
from tqdm import tqdm

from recast_exp.data.preprocessing import DROP, Decoding
from recast_exp.errors import UserError
from recast_exp.system import usable_cores

log = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")


FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Those that PIL reads by itself, whatever the name of a file says. For EPS it starts a program, Ghostscript."""

_MAX_TEXT = 64 * 2**20
_ORIENTATION = 0x0112
_BITS, _PHOTOMETRIC = 0x0102, 0x0106
_WHITE_IS_ZERO = 0
"""Tags of TIFF, and a value of the second."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings an image into its position, by the value of EXIF's tag; from 5 on, rows become columns."""

_NO_IMAGES = {
    b"version https://git-lfs": "it is a pointer of Git LFS; get the file itself with git lfs pull",
    b"<!doctype html": "it is a web page, maybe that of an error while it was downloaded",
    b"<html": "it is a web page, maybe that of an error while it was downloaded",
}
"""How files begin that are often found in the place of an image, and what they are."""


class UnreadableImageError(UserError):
    """A file that cannot be read as an image.

    Attributes:
        reason: Why, without its name.
    """

    # Torch raises an error of a loader process again with its text alone
    def __init__(self, text: str, reason: str = "unreadable") -> None:
        super().__init__(text)
        self.reason = reason


def read_image(path: Path, decoding: Decoding = Decoding()) -> Tensor:  # noqa: B008 - it is frozen
    """Return an image file as a uint8 tensor [3, H, W]; grey is repeated, 16 bits become 8.

    Raises:
        UserError: If it cannot be read, or is too large. One line that names the file.
    """
    try:
        with _opened(path, decoding) as image:
            return pixels_of(image, decoding)
    # PIL's readers raise SyntaxError, ValueError, EOFError, struct.error and more, besides OSError, on a damaged file
    except Exception as error:
        reason = _other_kind(path) or " ".join(str(error).split()) or type(error).__name__
        large = isinstance(error, Image.DecompressionBombError | _TooLargeError)
        advice = "raise dataset.max_pixels" if large else "replace or remove the file"
        raise UnreadableImageError(
            f"{path}: cannot be read as an image ({reason}); {advice}, or set dataset.bad_images=skip", reason
        ) from error


def size_of(path: Path, decoding: Decoding = Decoding()) -> tuple[int, int]:  # noqa: B008
    """Height and width of what `read_image` returns, from the header of the file alone.

    Raises:
        UserError: If it cannot be read.
    """
    try:
        with _opened(path, decoding) as image:
            turn = _orientation(image)
            if turn > 1 and image.format == "TIFF":  # which PIL turns by itself, whatever is asked for
                image.load()
            if image.format == "TIFF" or not decoding.orient:
                turn = 1
            return (image.width, image.height) if 5 <= turn <= 8 else (image.height, image.width)
    except Exception:
        read_image(path, decoding)  # raises an error that says what is wrong
        raise


class _TooLargeError(ValueError):
    pass


def _opened(path: Path, decoding: Decoding) -> Image.Image:
    # Limits that PIL has for the whole process: they are only ever raised
    PngImagePlugin.MAX_TEXT_CHUNK = max(PngImagePlugin.MAX_TEXT_CHUNK, _MAX_TEXT)
    if Image.MAX_IMAGE_PIXELS is not None and decoding.max_pixels > 2 * Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = decoding.max_pixels
    image = Image.open(path, formats=FORMATS)
    if (pixels := image.width * image.height) > decoding.max_pixels:
        image.close()
        raise _TooLargeError(f"it has {pixels:,} pixels, more than the limit of {decoding.max_pixels:,}")
    return image


def pixels_of(image: Image.Image, decoding: Decoding = Decoding()) -> Tensor:  # noqa: B008
    """Return an image of PIL as a uint8 tensor [3, H, W]; grey is repeated, 16 bits become 8.

    Raises:
        ValueError: If it has 32 bits per pixel.
    """
    if image.mode == "I" and image.format == "PPM":  # 16 bits, which have a mode of their own in other formats
        image = Image.fromarray(np.asarray(image).astype(np.uint16))
    if image.mode in ("I", "F"):
        raise ValueError(f"it has 32 bits per pixel, mode {image.mode}; convert it to 8 or 16")
    image.info.update(_clear(image))
    image.load()  # which turns a TIFF
    turn = _TURNS.get(_orientation(image)) if decoding.orient else None
    if image.mode.startswith("I;16"):  # grey, which PIL would clip to white; the modes are those of byte orders
        values, clear = np.asarray(image), image.info.get("transparency")
        tags = getattr(image, "tag_v2", {})  # of a TIFF, whose 12 bits PIL does not scale, nor turn white to black
        grey = (values >> max(tags.get(_BITS, (16,))[0] - 8, 0)).astype(np.uint8)
        image = Image.fromarray(255 - grey if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else grey)
        if isinstance(clear, int):  # the value that a PNG has for what is transparent
            image.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    if turn is not None:
        image = image.transpose(turn)
    if decoding.background != DROP and image.has_transparency_data:
        drawing = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", drawing.size, decoding.background), drawing)
    pixels: Tensor = v2.functional.pil_to_tensor(image.convert("RGB"))
    return pixels


def _clear(image: Image.Image) -> dict[str, object]:
    """The transparent colour of a PNG, in the 8 bits to which PIL converts its pixels, but not this colour."""
    if not isinstance(image, PngImagePlugin.PngImageFile) or not image.tile:
        return {}
    clear, raw = image.info.get("transparency"), image.tile[0].args
    steps = {"L;2": 85, "L;4": 17}  # PIL converts that of 1 bit
    if isinstance(clear, int) and raw in steps:
        return {"transparency": clear * steps[raw]}
    if isinstance(clear, tuple) and raw == "RGB;16B":
        return {"transparency": tuple(value >> 8 for value in clear)}
    return {}


def _orientation(image: Image.Image) -> int:
    """The value of EXIF's tag; 1, as it is, where there is none or it is damaged, as the image may still be whole."""
    try:
        value = image.getexif().get(_ORIENTATION)
    except Exception:  # PIL's reader of EXIF raises what its readers of images do
        return 1
    return value if isinstance(value, int) else 1


def _other_kind(path: Path) -> str | None:
    """What a file is that is no image, where it is one of the usual cases."""
    try:
        with path.open("rb") as file:
            start = file.read(200).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    except OSError:
        return None
    return next((kind for begin, kind in _NO_IMAGES.items() if start.startswith(begin)), None)


def damaged_files(paths: Sequence[Path], decoding: Decoding) -> dict[Path, str]:
    """Decode images, and return those that cannot be decoded, each with the reason."""
    return {path: reason for path, reason in look_at(paths, decoding).items() if isinstance(reason, str)}


def look_at(paths: Sequence[Path], decoding: Decoding) -> dict[Path, tuple[int, int] | str]:
    """Decode images, and return the height and width of each, or the reason why it cannot be read."""

    def look(path: Path) -> tuple[int, int] | str:
        try:
            height, width = read_image(path, decoding).shape[1:]
        except UnreadableImageError as error:
            return error.reason
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
