"""From a decoded image to the input of a backbone, on uint8 throughout: normalisation happens later, on the device.

A transform has two parts. `prepare` is the geometry that is the same every time, so that its result can be kept;
`augment` is random and draws from torch's global generator.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

from recast_exp.errors import UserError

_INTERPOLATIONS = {"bilinear": v2.InterpolationMode.BILINEAR, "bicubic": v2.InterpolationMode.BICUBIC}


@dataclass(frozen=True)
class InputSpec:
    """What a backbone wants to see.

    Attributes:
        size: Height and width in pixels.
        mean: Channel means, of pixels from 0 to 1.
        std: Channel deviations, of pixels from 0 to 1.
        crop_pct: Share of the short side that the centre crop of evaluation keeps.
        interpolation: "bilinear" or "bicubic".

    Raises:
        UserError: If the interpolation is another one.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    interpolation: str

    def __post_init__(self) -> None:
        if self.interpolation not in _INTERPOLATIONS:
            raise UserError(f"interpolation: got {self.interpolation!r}, takes one of {', '.join(_INTERPOLATIONS)}")


@dataclass(frozen=True)
class ImageTransform:
    """A transform of uint8 images, from any size to uint8 [3, size, size].

    Attributes:
        prepare: The deterministic part, or None.
        augment: The random part, or None. It draws from torch's global generator.
    """

    prepare: Callable[[Tensor], Tensor] | None
    augment: Callable[[Tensor], Tensor] | None

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        """Transform a PIL image in RGB, or a uint8 tensor [3, H, W]."""
        result: Tensor = v2.functional.pil_to_tensor(image) if isinstance(image, Image.Image) else image
        if self.prepare is not None:
            result = self.prepare(result)
        return result if self.augment is None else self.augment(result)


class RandomShift(nn.Module):
    """Move and scale an image a little, continuing its border outwards. No flip: for characters.

    Unlike torchvision's RandomAffine it leaves no black edge on a bright background, and on small images it takes a
    third of the time.

    Args:
        translate: Largest shift, as a share of the side.
        scale: Largest change of the size, as a share of it.
    """

    def __init__(self, translate: float = 0.06, scale: float = 0.1) -> None:
        super().__init__()
        self.translate = translate
        self.scale = scale

    def forward(self, image: Tensor) -> Tensor:
        """Map uint8 [3, H, W] to the same."""
        zoom, right, down = (torch.rand(3) * 2 - 1).tolist()
        factor = 1 / (1 + zoom * self.scale)  # the map leads from the result back to the image
        side = 2 * self.translate  # in the coordinates of a grid, a side goes from -1 to 1
        offset = torch.tensor([right * side, down * side])
        grid = torch.add(offset, _identity_grid(*image.shape[1:]), alpha=factor)
        moved = nn.functional.grid_sample(image[None].float(), grid, padding_mode="border", align_corners=False)
        return moved[0].round_().to(torch.uint8)


@functools.lru_cache(maxsize=8)
def _identity_grid(height: int, width: int) -> Tensor:
    """The grid [1, H, W, 2] that maps an image to itself; kept, as making it takes as long as all the rest."""
    return nn.functional.affine_grid(torch.eye(2, 3)[None], [1, 1, height, width], align_corners=False)


def eval_transform(spec: InputSpec) -> ImageTransform:
    """The deterministic transform of evaluation: short side to size / crop_pct, then the centre crop."""
    return ImageTransform(_centre(spec), None)


def train_transform(name: str, spec: InputSpec) -> ImageTransform:
    """Build the training augmentation `name`.

    Args:
        name: `standard` (random resized crop, flip), `light` (flip), `authors` (RECAST's: squashed to the square, flip,
            colour jitter, affine), `shift` (small shifts and changes of size, no flip: for characters) or `none`.
        spec: What the backbone wants. `light`, `shift` and `none` share the geometry of evaluation.

    Raises:
        UserError: If there is no augmentation of that name.
    """
    if name not in _AUGMENTATIONS:
        raise UserError(f"dataset.transform: got {name!r}, takes one of {', '.join(_AUGMENTATIONS)}")
    return _AUGMENTATIONS[name](spec)


def _centre(spec: InputSpec) -> v2.Compose:
    return v2.Compose([_resize(spec, [math.floor(spec.size / spec.crop_pct)]), v2.CenterCrop(spec.size)])


def _resize(spec: InputSpec, size: list[int]) -> v2.Resize:
    return v2.Resize(size, interpolation=_INTERPOLATIONS[spec.interpolation], antialias=True)


def _standard(spec: InputSpec) -> ImageTransform:
    crop = v2.RandomResizedCrop(spec.size, interpolation=_INTERPOLATIONS[spec.interpolation], antialias=True)
    return ImageTransform(None, v2.Compose([crop, v2.RandomHorizontalFlip()]))


def _authors(spec: InputSpec) -> ImageTransform:
    augment = [
        v2.RandomHorizontalFlip(),
        v2.ColorJitter(0.4, 0.4, 0.4, 0.2),
        v2.RandomAffine(10, translate=(0.1, 0.1), scale=(0.9, 1.1)),
    ]
    return ImageTransform(_resize(spec, [spec.size, spec.size]), v2.Compose(augment))


_AUGMENTATIONS: dict[str, Callable[[InputSpec], ImageTransform]] = {
    "standard": _standard,
    "light": lambda spec: ImageTransform(_centre(spec), v2.RandomHorizontalFlip()),
    "authors": _authors,
    "shift": lambda spec: ImageTransform(_centre(spec), RandomShift()),
    "none": eval_transform,
}
