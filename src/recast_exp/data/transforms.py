"""From a decoded image to the input of a backbone, on uint8 throughout: normalisation happens later, on the device.

Three steps, so that each runs where it is cheapest:

1. `Geometry`: decode → resize. The same every time, so its results can be kept (`store.py`).
2. `Augmentation.crop`: one image, cut out of the resized one. Runs in the loader.
3. `Augmentation.__call__`: a batch, flipped, recoloured, turned. Runs on the GPU, if there is one.

The randomness is a row of uniform numbers from [0, 1) for each image: torchvision's transforms would sample one set of
numbers for a whole batch. `Augmentation.amounts` turns them, in the loader, into the amounts of step 3. Step 3 computes
nothing in float64, which some devices lack. The functions below give the same results as
torchvision.transforms.v2.functional on uint8, except for rounding (tested against it), in fewer passes over the pixels.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from recast_exp.config.schema import BACKGROUNDS, MAX_PIXELS, is_background
from recast_exp.errors import UserError

ORDERS = tuple(itertools.permutations(range(4)))
"""The orders of brightness, contrast, saturation and hue."""

_CHUNK = 2**16
"""Pixels that a processor alters at once: pixels in its cache are altered several times as fast."""

_INTERPOLATIONS = {"bilinear": v2.InterpolationMode.BILINEAR, "bicubic": v2.InterpolationMode.BICUBIC}


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
        if self.interpolation not in _INTERPOLATIONS:
            raise UserError(f"interpolation: expected one of {', '.join(_INTERPOLATIONS)}, got {self.interpolation!r}")
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
        resized: Tensor = v2.functional.resize(images, size, _INTERPOLATIONS[self.interpolation], antialias=True)
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


def chunks(images: Tensor) -> Iterator[slice]:
    """Divide a batch [B, C, H, W] into parts that fit a processor's cache; on an accelerator, leave it whole."""
    whole = images.device.type != "cpu"
    count = len(images) if whole else _CHUNK // (images.shape[-1] * images.shape[-2])
    return (slice(start, start + max(1, count)) for start in range(0, len(images), max(1, count)))


def eval_geometry(spec: InputSpec) -> Geometry:
    """The resizing of evaluation, which `standard`, `light`, `shift` and `none` share: short side to size/crop_pct."""
    return Geometry(math.floor(spec.size / spec.crop_pct), spec.squash, spec.interpolation, spec.decoding)


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Map uint8 pixels [B, 3, S, S] to float32.

    Args:
        images: The pixels.
        mean: Channel means [3, 1, 1], on the device of the pixels.
        std: Channel standard deviations [3, 1, 1], on the same.
    """
    result = torch.empty(images.shape, dtype=torch.float32, device=images.device)
    for part in chunks(images):
        result[part].copy_(images[part]).div_(255).sub_(mean).div_(std)
    return result


class Augmentation:
    """No augmentation: the centre crop of evaluation. The base of the others.

    Attributes:
        draws: Number of uniform numbers sampled for each image.
        geometry: The resizing before it.
    """

    draws = 0

    def __init__(self, spec: InputSpec) -> None:
        self.spec = spec
        self.geometry = eval_geometry(spec)

    def crop(self, image: Tensor, uniform: Sequence[float]) -> Tensor:
        """Cut uint8 [3, S, S] out of a resized image [3, H, W]; a view of it, if possible."""
        size = self.spec.size
        if min(image.shape[1:]) < size:  # a crop_pct above 1: the borders are filled
            centred: Tensor = v2.functional.center_crop(image, [size, size])
            return centred
        top, left = (round((side - size) / 2.0) for side in image.shape[1:])
        return image[:, top : top + size, left : left + size]

    def amounts(self, uniform: Tensor) -> Tensor:
        """Turn uniform numbers [B, draws] into the amounts, float32 [B, A], by which the images are altered.

        Runs on the CPU, so it may compute in float64. Here, the amounts are the uniform numbers themselves.
        """
        return uniform

    def __call__(self, images: Tensor, amounts: Tensor) -> Tensor:
        """Alter a batch, uint8 [B, 3, S, S], by its `amounts`, on the same device; may work in place."""
        if type(self).alter is Augmentation.alter:
            return images
        if images.device.type != "cpu":
            return self.alter(images, amounts)
        for part in chunks(images):
            images[part] = self.alter(images[part], amounts[part])
        return images

    def alter(self, images: Tensor, amounts: Tensor) -> Tensor:
        """Alter a part of a batch, which is processed at once; see `__call__`."""
        return images


class Light(Augmentation):
    """The centre crop, flipped half of the time."""

    draws = 1

    def alter(self, images: Tensor, amounts: Tensor) -> Tensor:
        """Flip."""
        return flip(images, amounts[:, 0] < 0.5)


class Standard(Augmentation):
    """A random part of the image, resized, flipped half of the time (torchvision's RandomResizedCrop, its defaults)."""

    scale = (0.08, 1.0)
    ratio = (3 / 4, 4 / 3)
    attempts = 10
    draws = 2 * attempts + 3

    def crop(self, image: Tensor, uniform: Sequence[float]) -> Tensor:
        """Cut out a random part of the image and resize it."""
        top, left, height, width = self.box(image.shape[1], image.shape[2], uniform)
        size, mode = self.spec.size, _INTERPOLATIONS[self.spec.interpolation]
        part = image[:, top : top + height, left : left + width]
        resized: Tensor = v2.functional.resize(part, [size, size], mode, antialias=True)
        return resized

    def box(self, height: int, width: int, uniform: Sequence[float]) -> tuple[int, int, int, int]:
        """Choose top, left, height and width of a part with a random share of the area and a random aspect ratio."""
        low, high = (math.log(ratio) for ratio in self.ratio)
        for i in range(self.attempts):
            area = height * width * (self.scale[0] + (self.scale[1] - self.scale[0]) * uniform[2 * i])
            aspect = math.exp(low + (high - low) * uniform[2 * i + 1])
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                top, left = (
                    int(u * (room + 1)) for u, room in zip(uniform[-3:], (height - h, width - w), strict=False)
                )
                return top, left, h, w
        w = min(width, round(height * self.ratio[1]))  # the largest part with an allowed aspect ratio, in the centre
        h = min(height, round(width / self.ratio[0]))
        return (height - h) // 2, (width - w) // 2, h, w

    def alter(self, images: Tensor, amounts: Tensor) -> Tensor:
        """Flip."""
        return flip(images, amounts[:, -1] < 0.5)


class Authors(Augmentation):
    """The augmentation of RECAST's authors: squashed to the square, flip, colour jitter in random order, affine.

    ColorJitter(0.4, 0.4, 0.4, 0.2) and RandomAffine(10°, translate 0.1, scale 0.9-1.1) of torchvision, nearest pixel,
    filled with black (appledora/RECAST_ICLR25).
    """

    draws = 10

    def __init__(self, spec: InputSpec) -> None:
        super().__init__(spec)
        self.geometry = Geometry(spec.size, True, spec.interpolation, spec.decoding)

    def alter(self, images: Tensor, amounts: Tensor) -> Tensor:
        """Flip, jitter, move."""
        mirrored, order, brightness, contrast, saturation, hue, turn, right, down, zoom = amounts.T
        images = flip(images, mirrored < 0.5)
        factors = [*(0.6 + 0.8 * factor for factor in (brightness, contrast, saturation)), 0.4 * hue - 0.2]
        images = jitter(images, factors, (order * len(ORDERS)).long())
        shift = (torch.stack([right, down], 1) * 2 - 1).mul(0.1 * images.shape[-1]).round()
        return affine(images, 20 * turn - 10, shift, 0.9 + 0.2 * zoom)


class Shift(Augmentation):
    """Moves and scales the image a little, continuing its border outwards. No flip: for characters.

    Unlike `affine` it leaves no black edge on a bright background.
    """

    draws = 3
    translate = 0.06  # largest shift, as a share of the side
    scale = 0.1  # largest change of the size, as a share of it

    def amounts(self, uniform: Tensor) -> Tensor:
        """The map from the result back to the image: a factor, and offsets in grid coordinates, from -1 to 1."""
        zoom, right, down = (uniform * 2 - 1).double().T
        factor = 1 / (1 + zoom * self.scale)
        return torch.stack([factor, 2 * self.translate * right, 2 * self.translate * down], 1).float()

    def alter(self, images: Tensor, amounts: Tensor) -> Tensor:
        """Move and scale, with bilinear interpolation."""
        factor, offset = amounts[:, 0], amounts[:, 1:]
        grid = _identity_grid(*images.shape[2:], images.device)
        grid = torch.addcmul(offset[:, None, None], grid, factor[:, None, None, None])
        moved = nn.functional.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
        return moved.round_().to(torch.uint8)


_AUGMENTATIONS: dict[str, type[Augmentation]] = {
    "standard": Standard,
    "light": Light,
    "authors": Authors,
    "shift": Shift,
    "none": Augmentation,
}


def augmentation(name: str, spec: InputSpec) -> Augmentation:
    """Build the training augmentation `name`.

    Args:
        name: `standard` (random resized crop, flip), `light` (flip), `authors` (RECAST's: squashed to the square, flip,
            colour jitter, affine), `shift` (small shifts and changes of size, no flip: for characters) or `none`.
        spec: The input that the backbone expects.

    Raises:
        UserError: If there is no augmentation of that name.
    """
    if name not in _AUGMENTATIONS:
        raise UserError(f"dataset.transform: expected one of {', '.join(_AUGMENTATIONS)}, got {name!r}")
    return _AUGMENTATIONS[name](spec)


def flip(images: Tensor, which: Tensor) -> Tensor:
    """Mirror the images [B, 3, H, W] of a batch where `which` [B] is true; on a processor in place."""
    if images.device.type != "cpu":
        return torch.where(which[:, None, None, None], images.flip(-1), images)
    for number in which.nonzero()[:, 0].tolist():  # several times as fast as with a mask
        images[number] = images[number].flip(-1)
    return images


def jitter(images: Tensor, factors: Sequence[Tensor], orders: Tensor) -> Tensor:
    """Change the colours of images, each by its own factors and in its own order.

    Args:
        images: uint8 [B, 3, H, W].
        factors: Of brightness, contrast and saturation, [B] each, and turns of the hue, [B], from -0.5 to 0.5.
        orders: For each image the order of the four, as an index [B] into `ORDERS`.

    Returns:
        uint8 [B, 3, H, W].
    """
    changes = (_brightness, _contrast, _saturation, _hue)
    pixels = images.float()
    for number in set(orders.tolist()):
        chosen = (orders == number).nonzero()[:, 0]
        part = pixels if len(chosen) == len(pixels) else pixels[chosen]
        for change in ORDERS[number]:
            part = changes[change](part, factors[change][chosen][:, None, None, None])
        pixels = part if len(chosen) == len(pixels) else pixels.index_copy_(0, chosen, part)
    return pixels.int().to(torch.uint8)  # by way of int32, in half of the time


# Below, pixels are integers from 0 to 255 in float32, [B, 3, H, W], and results are truncated to integers, as in
# torchvision on uint8. The functions may work in place.


def _brightness(pixels: Tensor, factor: Tensor) -> Tensor:
    return _truncated(pixels.mul_(factor))


def _contrast(pixels: Tensor, factor: Tensor) -> Tensor:
    mean = _gray(pixels).mean(dim=(-3, -2, -1), keepdim=True)
    return _truncated(pixels.mul_(factor).add_(mean * (1 - factor)))


def _saturation(pixels: Tensor, factor: Tensor) -> Tensor:
    gray = _gray(pixels).mul_(1 - factor)
    return _truncated(pixels.mul_(factor).add_(gray))


def _hue(pixels: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue h, six sectors in a circle, by 6·turn; the lightest and the darkest channel keep their values.

    Without HSV and its branches: with c = light - dark, a channel is dark + c·clamp(t, 0, 1), where t is |h - 3| - 1
    for red, 2 - |h - 2| for green and 2 - |h - 4| for blue.
    """
    red, green, blue = pixels.unbind(1)
    light, dark = pixels.amax(1), pixels.amin(1)
    chroma = light - dark
    # 0 where red (green) is the lightest, else 1: pixels are integers
    not_red, not_green = ((light - channel).clamp_(max=1) for channel in (red, green))
    from_green, from_blue = (blue - red).add_(chroma, alpha=2), (red - green).add_(chroma, alpha=4)
    hue = (green - blue).lerp_(from_green.lerp_(from_blue, not_green), not_red)
    hue.div_(chroma.clamp_min(1)).add_(6 * turn[:, 0])  # without chroma, any hue will do
    hue.sub_(hue.div(6).floor_().mul_(6))
    for channel, (centre, sign, offset) in enumerate(((3, 1, -1), (2, -1, 2), (4, -1, 2))):
        share = (hue - centre).abs_().mul_(sign).add_(offset).clamp_(0, 1)
        pixels[:, channel] = share.mul_(chroma).add_(dark)
    return pixels.mul_((256 - 1e-3) / 255).floor_()


def _gray(pixels: Tensor) -> Tensor:
    """Brightness [B, 1, H, W], truncated to integers."""
    red, green, blue = (pixels[:, channel : channel + 1] for channel in range(3))
    return red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_()


def _truncated(pixels: Tensor) -> Tensor:
    return pixels.clamp_(0, 255).floor_()


def affine(images: Tensor, angle: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Turn, scale and shift images about their centre, with the nearest pixel, or black outside the image.

    Args:
        images: uint8 [B, 3, H, W].
        angle: Degrees clockwise, [B].
        shift: Pixels to the right and down, [B, 2].
        scale: Factors [B].

    Returns:
        uint8 [B, 3, H, W].
    """
    height, width = images.shape[-2:]
    radians = angle.deg2rad()
    cos, sin = (radians.cos() / scale)[:, None], (radians.sin() / scale)[:, None]
    # From a pixel of the result back to the image: turn and scale the other way, after taking back the shift. The sum
    # of a part that depends on the column and one that depends on the row.
    x = torch.arange(width, device=images.device) - (width - 1) / 2 - shift[:, :1]
    y = torch.arange(height, device=images.device) - (height - 1) / 2 - shift[:, 1:]
    column = (cos * x)[:, None, :] + (sin * y + (width - 1) / 2)[:, :, None]
    row = (-sin * x)[:, None, :] + (cos * y + (height - 1) / 2)[:, :, None]
    # Pixels outside the image are taken from a black border, one pixel wide
    bordered = nn.functional.pad(images, (1, 1, 1, 1))
    column = column.round_().add_(1).clamp_(0, width + 1).int()
    row = row.round_().add_(1).clamp_(0, height + 1).int()
    source = row.mul_(width + 2).add_(column).long().flatten(1)
    return bordered.flatten(2).gather(2, source[:, None].expand(-1, 3, -1)).view_as(images)


@functools.lru_cache(maxsize=8)
def _identity_grid(height: int, width: int, device: torch.device) -> Tensor:
    """The grid [1, H, W, 2] that maps an image to itself; cached, as computing it would double the time of a batch."""
    return nn.functional.affine_grid(torch.eye(2, 3)[None], [1, 1, height, width], align_corners=False).to(device)
