"""What a backbone takes, and how image files are decoded and resized for it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms import v2

from recast_exp.config.schema import BACKGROUNDS, MAX_PIXELS, is_background
from recast_exp.errors import UserError, check_integer

INTERPOLATIONS = {"bilinear": v2.InterpolationMode.BILINEAR, "bicubic": v2.InterpolationMode.BICUBIC}

DROP = "drop"
"""In place of a background: the transparency of an image is dropped, whatever colours lie below it."""

MAX_ASPECT = 16
"""Of a longer or wider image, the middle is taken: resized whole, its short side to 224, it could fill the memory."""


@dataclass(frozen=True)
class Decoding:
    """How an image file becomes pixels.

    Attributes:
        background: The colour behind what is transparent: white, black, gray or #rrggbb; or `DROP`.
        orient: Whether an image is turned as its EXIF data says.
        max_pixels: Larger images are refused.
    """

    background: str = DROP
    orient: bool = False
    max_pixels: int = MAX_PIXELS


@dataclass(frozen=True)
class InputSpec:
    """The input that a backbone expects.

    Attributes:
        size: Height and width in pixels.
        mean: Channel means, of pixels from 0 to 1.
        std: Channel standard deviations, of pixels from 0 to 1.
        crop_pct: Share of the short side that the centre crop of evaluation keeps.
        interpolation: "bilinear" or "bicubic".
        squash: Whether evaluation squashes images to a square instead of keeping their aspect (timm's crop_mode).
        background: That of `Decoding`. The defaults of the last two are those of task files that do not have them.
        orient: That of `Decoding`.

    Raises:
        UserError: If the interpolation or the background is unknown.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    interpolation: str
    squash: bool = False
    background: str = DROP
    orient: bool = False

    @property
    def decoding(self) -> Decoding:
        """How image files become pixels."""
        return Decoding(self.background, self.orient)

    def constants(self, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation as `normalize` takes them, [3, 1, 1] each."""
        mean, std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (self.mean, self.std))
        return mean, std

    def __post_init__(self) -> None:
        check_integer("size", self.size, 1)
        for name, values, least in (("mean", self.mean, -math.inf), ("std", self.std, 0.0)):
            if len(values) not in (1, 3) or not all(least < value < math.inf for value in values):
                kind = "positive numbers" if name == "std" else "numbers"
                raise UserError(f"{name}: expected three {kind}, or one for all channels, got {values}")
        if not 0 < self.crop_pct <= 2:
            raise UserError(f"crop_pct: expected a number > 0 and ≤ 2, got {self.crop_pct}")
        if self.interpolation not in INTERPOLATIONS:
            raise UserError(f"interpolation: expected one of {', '.join(INTERPOLATIONS)}, got {self.interpolation!r}")
        if not is_background(self.background):
            raise UserError(
                f"background: expected one of {', '.join(BACKGROUNDS)}, or #rrggbb, got {self.background!r}"
            )


@dataclass(frozen=True)
class Geometry:
    """How images of any size are resized before they are cropped.

    Attributes:
        size: Length of the short side; of both sides if the image is squashed.
        squash: Whether the result is a square; otherwise the aspect ratio is kept.
        interpolation: "bilinear" or "bicubic", with antialiasing.
        decoding: How they are decoded before.
    """

    size: int
    squash: bool
    interpolation: str
    decoding: Decoding = Decoding()

    def __call__(self, images: Tensor) -> Tensor:
        """Resize uint8 [..., 3, H, W]."""
        height, width = self._middle(*images.shape[-2:])
        if (height, width) != images.shape[-2:]:
            images = v2.functional.center_crop(images, [height, width])
        size = [self.size, self.size] if self.squash else [self.size]
        resized: Tensor = v2.functional.resize(images, size, INTERPOLATIONS[self.interpolation], antialias=True)
        return resized

    def limited(self, max_pixels: int) -> Geometry:
        """The same for image files of another largest size."""
        return dataclasses.replace(self, decoding=dataclasses.replace(self.decoding, max_pixels=max_pixels))

    def shape(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the result."""
        if self.squash:
            return self.size, self.size
        height, width = self._middle(height, width)
        if height <= width:
            return self.size, int(self.size * width / height)
        return int(self.size * height / width), self.size

    def _middle(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the part that is resized."""
        if self.squash:
            return height, width
        return min(height, MAX_ASPECT * width), min(width, MAX_ASPECT * height)


def eval_geometry(spec: InputSpec) -> Geometry:
    """The resizing of evaluation, which `standard`, `light`, `shift` and `none` share: short side to size/crop_pct."""
    return Geometry(math.floor(spec.size / spec.crop_pct), spec.squash, spec.interpolation, spec.decoding)
