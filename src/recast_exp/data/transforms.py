"""From a decoded image to the input of a backbone, on uint8 throughout: normalisation happens later, on the device.

Three steps, so that each runs where it is cheapest:

1. `preprocessing.Geometry`: decode → resize. The same every time, so its results can be kept (`store.py`).
2. `Augmentation.crop`: one image, cut out of the resized one. Runs in the loader.
3. `Augmentation.__call__`: a batch, flipped, recoloured, turned (`pixels.py`). Runs on the GPU, if there is one.

The randomness is a row of uniform numbers from [0, 1) for each image. `Augmentation.amounts` turns them, in the loader,
into the amounts of step 3, which computes nothing in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from recast_exp.data.pixels import ORDERS, affine, chunks, flip, identity_grid, jitter
from recast_exp.data.preprocessing import INTERPOLATIONS, Geometry, InputSpec, eval_geometry
from recast_exp.errors import UserError


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
        size, mode = self.spec.size, INTERPOLATIONS[self.spec.interpolation]
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
        grid = identity_grid(*images.shape[2:], images.device)
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
