"""Piggyback: its gradient, how its masks flip, what they take in a file, and its warning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from recast_exp.adapters.melo import MeLo
from recast_exp.adapters.piggyback import Mask, Piggyback
from recast_exp.errors import UserError
from recast_exp.models.count import count
from support import task_files
from support.adapted import Make, images, logits
from support.helpers import assert_one_line


def test_piggybacks_gradient_goes_straight_through() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 3, requires_grad=True)
    mask = Mask(weight.detach(), start=1e-2, threshold=5e-3)
    with torch.no_grad():
        mask.mask[0, 0] = 4e-3  # below the threshold
    masked = mask(weight)
    binary = torch.ones(4, 3).index_put((torch.tensor([0]), torch.tensor([0])), torch.tensor(0.0))
    assert torch.equal(masked, weight * binary)
    gradient = torch.randn(4, 3)
    masked.backward(gradient)
    assert torch.equal(mask.mask.grad, gradient * weight.detach())
    assert torch.equal(weight.grad, gradient * binary)


def test_masks_flip_in_training_at_the_canonical_rate(make: Make) -> None:
    """Adam moves a mask by about its rate in a step: after 60 steps of 1e-4, many are 5e-3 below their start."""
    adapted = make("piggyback", "vit", "frozen")
    masks = [parameter for _, parameter in adapted.parameters("adapter")]
    optimizer = torch.optim.Adam([{"params": masks, "lr": 1e-4}])
    network = adapted.network.eval()
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(network(images()), torch.tensor([0, 1, 2, 3])).backward()
        optimizer.step()
    flipped = sum(int((mask <= 5e-3).sum()) for mask in masks) / sum(mask.numel() for mask in masks)
    assert 0.02 < flipped < 0.6


def test_piggyback_masks_what_the_coefficients_make(make: Make) -> None:
    adapted = make("piggyback", "vit", "recast")
    layer: Any = adapted.network.get_submodule("blocks.0.attn.qkv")
    before = layer.weight.detach().clone()
    path = adapted.trainable["adapter"]["blocks.0.attn.qkv"]
    with torch.no_grad():
        adapted.network.get_parameter(path)[:5] = 0.0
        adapted.network.get_parameter(adapted.trainable["coefficients"]["blocks.0.attn.qkv"]).mul_(2)
    assert (layer.weight[:5] == 0).all()
    torch.testing.assert_close(layer.weight[5:], 2 * before[5:])


def test_masks_take_a_bit_in_the_file(make: Make, tmp_path: Path) -> None:
    adapted = make("piggyback", "cnn", "frozen")
    task_files.write(tmp_path / "task.safetensors", adapted)
    bits = count(adapted, 0)["task_bits"]
    size = (tmp_path / "task.safetensors").stat().st_size
    assert bits / 8 <= size <= bits / 8 + 12_000  # names, record and head


@pytest.mark.parametrize(("start", "threshold"), [(0.01, -0.005), (-1.0, -2.0), (3.0, 0.0)])
def test_a_file_restores_the_masks_of_any_threshold(make: Make, tmp_path: Path, start: float, threshold: float) -> None:
    trained, other = (make("piggyback", "vit", "frozen", start=start, threshold=threshold) for _ in range(2))
    with torch.no_grad():
        for _, mask in trained.parameters("adapter"):
            mask[::2] = threshold - 1
    task_files.write(tmp_path / "task.safetensors", trained)
    task_files.read_into(other, tmp_path / "task.safetensors")
    assert torch.equal(logits(other.network), logits(trained.network))
    assert not torch.equal(logits(other.network), logits(make("none", "vit", "frozen").network))


@pytest.mark.parametrize(("start", "threshold"), [(0.01, 0.00999999999), (10_000.0, 9999.99999)])
def test_a_start_that_float32_does_not_tell_from_the_threshold_is_refused(start: float, threshold: float) -> None:
    with pytest.raises(UserError) as error:
        Piggyback(start=start, threshold=threshold)
    assert_one_line(error, f"start: expected a number above threshold={threshold}, got {start}", "same in float32")


def test_masks_of_a_reported_epoch_before_the_first_flip_are_no_reason_for_a_higher_rate() -> None:
    remark = Piggyback().remark
    assert "raise the learning rate" in remark({"adapter/masked": 0.0}, {"adapter/masked": 0.0})
    text = remark({"adapter/masked": 0.0}, {"adapter/masked": 0.25})
    assert "25.0 %" in text and "raise" not in text
    assert remark({"adapter/masked": 0.1}, {"adapter/masked": 0.1}) == ""
    assert remark({}, {}) == ""  # of a run that began with an older version
    assert MeLo().remark({}, {}) == ""
