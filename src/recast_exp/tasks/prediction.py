"""From images of any kind to classes: prepared as evaluation prepares them, and the most probable classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from recast_exp.config.schema import MAX_PIXELS
from recast_exp.data.images import UnreadableImageError, pixels_of, read_image
from recast_exp.data.preprocessing import Decoding, InputSpec
from recast_exp.data.transforms import augmentation
from recast_exp.errors import UserError, first_line
from recast_exp.files import user_path

Picture = str | Path | Image.Image | np.ndarray | Tensor
"""An image: a file, one of PIL, or uint8 [H, W, 3] or [3, H, W]."""


@dataclass(frozen=True)
class Predicted:
    """What a task makes of an image.

    Attributes:
        task: Name of the task.
        label: The most probable class.
        probability: Its probability.
        top: The most probable classes with their probabilities, in order.
    """

    task: str
    label: str
    probability: float
    top: tuple[tuple[str, float], ...]


def prepared(picture: Picture, spec: InputSpec, max_pixels: int = MAX_PIXELS) -> Tensor:
    """An image as evaluation sees it: uint8 [3, S, S].

    Args:
        picture: The image.
        spec: How evaluation prepares it.
        max_pixels: Larger image files are refused.

    Raises:
        UserError: If a file cannot be read, or an array is no image of this kind.
    """
    plain = augmentation("none", spec)
    decoding = dataclasses.replace(spec.decoding, max_pixels=max_pixels)
    return plain.crop(plain.geometry(_pixels(picture, decoding)), ()).contiguous()


def _pixels(picture: Picture, decoding: Decoding) -> Tensor:
    if isinstance(picture, str | Path):
        path = user_path(picture)
        try:
            there = path.is_file()
        except OSError as error:  # in a folder that cannot be opened
            raise UnreadableImageError(f"{path}: cannot be read ({error.strerror})", str(error.strerror)) from error
        if not there:
            raise UserError(f"{path}: expected an image file, got nothing")
        return read_image(path, decoding)
    if isinstance(picture, Image.Image):
        try:
            if 0 in picture.size:
                raise ValueError(f"its size is {picture.width} x {picture.height}")
            return pixels_of(picture, decoding)
        except Exception as error:  # PIL's readers raise anything
            raise UserError(f"images: cannot read one of PIL ({first_line(error)})") from error
    expected = "images: expected files, images of PIL, or uint8 [3, H, W] or [H, W, 3]"
    if not isinstance(picture, np.ndarray | Tensor):
        raise UserError(f"{expected}, got {type(picture).__name__}")
    if str(picture.dtype).removeprefix("torch.") != "uint8" or picture.ndim != 3 or 0 in picture.shape:
        raise UserError(f"{expected}, got {picture.dtype} {list(picture.shape)}")
    # A view such as image[..., ::-1] has negative strides, which torch does not know
    tensor = torch.from_numpy(np.ascontiguousarray(picture)) if isinstance(picture, np.ndarray) else picture
    if not tensor.is_meta and tensor.shape[0] == 3:
        return tensor.cpu()
    if not tensor.is_meta and tensor.shape[2] == 3:
        return tensor.permute(2, 0, 1).cpu()
    raise UserError(f"{expected}, got {list(tensor.shape)}{' without values' if tensor.is_meta else ''}")


def pictures_of(images: Picture | Sequence[Picture]) -> list[Picture]:
    """One image, or several, as a list; a batch [N, ...] is taken apart."""
    if isinstance(images, str | Path | Image.Image):
        return [images]
    if isinstance(images, np.ndarray | Tensor):
        return list(images) if images.ndim == 4 else [images]
    if not isinstance(images, Iterable):
        raise UserError(f"images: expected one or several, got {type(images).__name__}")
    return list(images)


def top_of(logits: Tensor, classes: Sequence[str], task: str, count: int) -> Predicted:
    """The most probable classes for the logits [C] of an image."""
    probabilities, numbers = logits.float().softmax(0).topk(min(count, len(classes)))
    pairs = zip(numbers.tolist(), probabilities.tolist(), strict=True)
    top = tuple((classes[number], probability) for number, probability in pairs)
    return Predicted(task, top[0][0], top[0][1], top)
