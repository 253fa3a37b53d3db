"""Batches of uint8 pixels, altered image by image.

torchvision's transforms would sample one set of numbers for a whole batch; these functions take one for each image.
They give the same results as torchvision.transforms.v2.functional on uint8, except for rounding (tested against it),
in fewer passes over the pixels. Nothing is computed in float64, which some devices lack.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

ORDERS = tuple(itertools.permutations(range(4)))
"""The orders of brightness, contrast, saturation and hue."""

_CHUNK = 2**16
"""Pixels that a processor alters at once: pixels in its cache are altered several times as fast."""


def chunks(images: Tensor) -> Iterator[slice]:
    """Divide a batch [B, C, H, W] into parts that fit a processor's cache; on an accelerator, leave it whole."""
    whole = images.device.type != "cpu"
    count = len(images) if whole else _CHUNK // (images.shape[-1] * images.shape[-2])
    return (slice(start, start + max(1, count)) for start in range(0, len(images), max(1, count)))


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
def identity_grid(height: int, width: int, device: torch.device) -> Tensor:
    """The grid [1, H, W, 2] that maps an image to itself; cached, as computing it would double the time of a batch."""
    return nn.functional.affine_grid(torch.eye(2, 3)[None], [1, 1, height, width], align_corners=False).to(device)
