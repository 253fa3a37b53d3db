from __future__ import annotations

import math
from typing import Any, Self

import numpy as np
import pytest
import timm
import torch
from scipy import stats
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.transforms import v2

from recast_exp.config.schema import ModelConfig
from recast_exp.data.pixels import ORDERS, affine, flip, jitter
from recast_exp.data.preprocessing import Geometry, InputSpec, eval_geometry
from recast_exp.data.transforms import Augmentation, Authors, Shift, Standard, augmentation
from recast_exp.errors import RecastError
from recast_exp.models.create import input_of

F = v2.functional
SPEC = InputSpec(size=16, mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 0.2), crop_pct=0.9, interpolation="bicubic")
TRANSFORMS = ("standard", "light", "authors", "shift", "none")


def photo(count: int = 1, size: tuple[int, int] = (60, 84), seed: int = 0) -> Tensor:
    """Smooth colours, as photographs have, with a few flat, black and white places."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 8, 8, generator=generator) * 1.6 - 0.3
    pixels = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic").clamp(0, 1)
    return (pixels * 255).to(torch.uint8)


def apply(transform: Augmentation, image: Tensor, uniform: Tensor) -> Tensor:
    cropped = transform.crop(transform.geometry(image), uniform[0].tolist())
    return transform(cropped[None].clone(), transform.amounts(uniform))[0]


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("size", [(8, 8), (50, 31), (20, 64), (3, 90)])
def test_transforms_give_uint8_squares(name: str, size: tuple[int, int]) -> None:
    transform = augmentation(name, SPEC)
    result = apply(transform, photo(size=size)[0], torch.rand(1, transform.draws))
    assert result.shape == (3, 16, 16)
    assert result.dtype == torch.uint8


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_random_where_they_should_be(name: str) -> None:
    torch.manual_seed(0)
    transform, pixels = augmentation(name, SPEC), photo()[0]
    results = [apply(transform, pixels, torch.rand(1, transform.draws)) for _ in range(16)]
    assert len({result.numpy().tobytes() for result in results}) == {"none": 1, "light": 2}.get(name, 16)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_batch_is_altered_image_by_image(name: str) -> None:
    transform = augmentation(name, SPEC)
    images, amounts = photo(40, (16, 16)), transform.amounts(torch.rand(40, transform.draws))
    whole = transform(images.clone(), amounts)
    single = [transform(images[i : i + 1].clone(), amounts[i : i + 1]) for i in range(40)]
    assert torch.equal(whole, torch.cat(single))
    assert torch.equal(whole, transform.alter(images.clone(), amounts))  # all at once, as on an accelerator


class NoDoubles(TorchDispatchMode):
    """Pretends that all tensors are on an accelerator that has no float64, as Apple's."""

    def __enter__(self) -> Self:
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(torch.Tensor, "device", torch.device("meta"), raising=False)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.patch.undo()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        result = func(*args, **kwargs)
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, Tensor) and tensor.dtype in (torch.float64, torch.complex128):
                raise TypeError(f"{func}: no float64 on this device")
        return result


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_device_needs_no_float64(name: str) -> None:
    transform = augmentation(name, SPEC)
    images, uniform = photo(40, (16, 16)), torch.rand(40, transform.draws)
    amounts = transform.amounts(uniform)
    assert amounts.dtype == torch.float32
    expected = transform(images.clone(), amounts)
    with NoDoubles():
        assert images.device.type != "cpu"
        altered = transform(images.clone(), amounts)
        if name == "shift":  # which computes in float64 in the loader
            with pytest.raises(TypeError, match="no float64"):
                transform.amounts(uniform)
    assert torch.equal(altered, expected)


def test_the_rest_of_a_factor_is_rounded_once() -> None:
    """As in float64, which torchvision computes it in: for every factor that the jitter can have."""
    for start in range(0, 2**24, 2**22):
        factor = 0.6 + 0.8 * (torch.arange(start, start + 2**22) / 2**24)
        assert torch.equal(1 - factor, (1 - factor.double()).float())


def test_eval_geometry_keeps_the_aspect_and_the_centre() -> None:
    spec = InputSpec(size=20, mean=(0.0,) * 3, std=(1.0,) * 3, crop_pct=0.5, interpolation="bilinear")
    transform = Augmentation(spec)
    pixels = torch.zeros(3, 80, 160, dtype=torch.uint8)
    pixels[:, 20:60, 60:100] = 255  # exactly the centre that is kept: half of the short side
    assert (transform.crop(transform.geometry(pixels), ())[:, 1:-1, 1:-1] == 255).all()
    assert (transform.crop(transform.geometry(255 - pixels), ())[:, 1:-1, 1:-1] == 0).all()


@pytest.mark.parametrize("name", ["vit_small_patch16_224.augreg_in21k_ft_in1k", "resnet34.a1_in1k", "convnext_tiny.fb_in22k", "vit_base_patch16_clip_quickgelu_224.metaclip_400m", "maxvit_tiny_tf_384.in1k"])  # fmt: skip # noqa: E501
@pytest.mark.parametrize("size", [(375, 500), (500, 333), (224, 224)])
def test_evaluation_is_timms(name: str, size: tuple[int, int]) -> None:
    """The same pixels as timm's own evaluation transform, up to how PIL and torch round."""
    cfg = timm.get_pretrained_cfg(name)
    network = torch.nn.Module()
    network.pretrained_cfg = cfg.to_dict()
    spec = input_of(network, ModelConfig())
    data = timm.data.resolve_data_config(pretrained_cfg=cfg.to_dict())
    pixels = photo(size=size)[0]
    mine = Augmentation(spec).crop(eval_geometry(spec)(pixels), ())
    reference = create_transform(**data, is_training=False)
    theirs = reference(F.to_pil_image(pixels))
    mean, std = (torch.tensor(data[key]).view(3, 1, 1) for key in ("mean", "std"))
    difference = (mine.float() - (theirs * std + mean) * 255).abs()
    assert difference.max() <= 3
    assert difference.mean() < 0.6


@pytest.mark.parametrize("geometry", [Geometry(20, False, "bicubic"), Geometry(20, True, "bilinear")])
def test_the_shape_is_known_beforehand(geometry: Geometry) -> None:
    for height, width in ((20, 20), (31, 77), (500, 333), (333, 500), (7, 100), (101, 9)):
        assert geometry(photo(size=(height, width))).shape[2:] == geometry.shape(height, width)


# Parity with torchvision's functions on uint8


@pytest.mark.parametrize("order", range(len(ORDERS)))
def test_jitter_is_torchvisions(order: int) -> None:
    generator = torch.Generator().manual_seed(order)
    images = photo(2, seed=order)
    images[:, :, :4, :4] = torch.tensor([0, 255, 128, 77])[:, None].byte()
    factors = [0.6 + 0.8 * torch.rand(2, generator=generator) for _ in range(3)]
    factors.append(0.4 * torch.rand(2, generator=generator) - 0.2)
    mine = jitter(images.clone(), factors, torch.full((2,), order))
    functions = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    for image, result, values in zip(images, mine, torch.stack(factors, 1).tolist(), strict=True):
        expected = image
        for number in ORDERS[order]:
            expected = functions[number](expected, values[number])
        # Rounding of the hue may differ in the last bit; what follows it can turn one level into a few
        difference = (result.int() - expected.int()).abs()
        assert difference.max() <= 3
        assert (difference > 0).float().mean() < 0.02


@pytest.mark.parametrize("number", range(4))
def test_each_change_of_colour_is_torchvisions(number: int) -> None:
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[..., :8, :] = torch.arange(256).view(1, 1, 4, 64).repeat(1, 3, 2, 1).byte()  # grey
    function = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)[number]
    neutral = [1.0, 1.0, 1.0, 0.0]
    for value in (-0.2, -0.05, 0.1, 0.2) if number == 3 else (0.6, 0.83, 1.2, 1.4):
        factors = [torch.tensor([value if i == number else neutral[i]]) for i in range(4)]
        mine = jitter(images.clone(), factors, torch.tensor([0]))
        difference = (mine.int() - function(images, factors[number].item()).int()).abs()
        assert difference.max() <= 1
        assert (difference > 0).float().mean() < (1e-3, 1e-3, 1e-2, 2e-3)[number]


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (224, 224)])
def test_affine_is_torchvisions(size: tuple[int, int]) -> None:
    images = photo(4, size)
    angle, scale = torch.tensor([0.0, 10.0, -7.3, 3.1]), torch.tensor([1.0, 0.9, 1.1, 1.03])
    shift = torch.tensor([[0.0, 0.0], [3.0, -2.0], [-3.0, 0.0], [1.0, 1.0]])
    mine = affine(images, angle, shift, scale)
    for image, result, a, s, z in zip(images, mine, angle.tolist(), shift.tolist(), scale.tolist(), strict=True):
        expected = F.affine(image, a, s, z, [0.0, 0.0])
        assert (result != expected).float().mean() < 1e-3  # where a pixel lies right between two others
    assert torch.equal(mine[0], images[0])


def test_flip_is_torchvisions() -> None:
    images = photo(3)
    result = flip(images.clone(), torch.tensor([True, False, True]))
    assert torch.equal(result, torch.stack([F.hflip(images[0]), images[1], F.hflip(images[2])]))


def test_augmentations_draw_what_torchvisions_draw() -> None:
    """The distribution of the parameters, against torchvision's own sampling (Kolmogorov-Smirnov)."""
    torch.manual_seed(0)
    standard = Standard(SPEC)
    boxes = np.array([standard.box(40, 60, torch.rand(standard.draws).tolist()) for _ in range(3000)])
    image = torch.zeros(3, 40, 60)
    theirs = []
    crop = v2.RandomResizedCrop(16, antialias=True)
    for _ in range(3000):
        drawn = crop.make_params([image])
        theirs.append([drawn[name] for name in ("top", "left", "height", "width")])
    for mine, other in zip(boxes.T, np.array(theirs).T, strict=True):
        assert stats.ks_2samp(mine, other).pvalue > 1e-3
    top, left, height, width = boxes.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 40).all()
    assert (left + width <= 60).all()


@pytest.mark.parametrize("shape", [(10, 200), (200, 10), (16, 16)])
def test_the_random_crop_of_extreme_images(shape: tuple[int, int]) -> None:
    standard = Standard(SPEC)
    for seed in range(50):
        top, left, height, width = standard.box(*shape, np.random.RandomState(seed).rand(standard.draws).tolist())
        assert 0 <= top <= top + height <= shape[0]
        assert 0 <= left <= left + width <= shape[1]
        assert min(height, width) >= 1
        assert (width - 0.5) / (height + 0.5) < 4 / 3
        assert (width + 0.5) / (height - 0.5) > 3 / 4


def test_authors_squashes() -> None:
    assert Authors(SPEC).geometry == Geometry(16, True, "bicubic")
    assert Standard(SPEC).geometry == Geometry(math.floor(16 / 0.9), False, "bicubic")


def test_shift_moves_and_scales_within_its_bounds_and_continues_the_border() -> None:
    torch.manual_seed(0)
    shift = Shift(SPEC)
    amounts = shift.amounts(torch.rand(100, 3))
    assert (shift(torch.full((100, 3, 32, 32), 200, dtype=torch.uint8), amounts) == 200).all()
    square = torch.zeros(100, 3, 100, 100, dtype=torch.uint8)
    square[..., 30:70, 30:70] = 255
    sides, centres = [], []
    for moved in shift(square, amounts):
        rows = torch.nonzero(moved[0].amax(1) > 127)
        sides.append(len(rows))
        centres.append(rows.float().mean().item() - 49.5)
    assert 35 <= min(sides) < 38
    assert 42 < max(sides) <= 45
    assert -7.5 <= min(centres) < -4
    assert 4 < max(centres) <= 7.5


def test_unknown_names() -> None:
    with pytest.raises(RecastError, match=r"dataset\.transform: expected one of standard, .*, got 'heavy'"):
        augmentation("heavy", SPEC)
    with pytest.raises(RecastError, match="expected one of bilinear, bicubic, got 'lanczos'"):
        InputSpec(16, (0.0,) * 3, (1.0,) * 3, 1.0, "lanczos")
