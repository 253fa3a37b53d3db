"""The classifier of a model, and what goes into it."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from recast_exp.models.features import full_precision, tapped


def network(name: str = "vit_tiny_patch16_224", **options: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, img_size=32, **options).eval()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_classifier_of_large_numbers_keeps_its_digits_in_mixed_precision(compiled: bool) -> None:
    model = network(depth=1, embed_dim=24, num_heads=2)
    if compiled:
        model.compile(backend="eager", fullgraph=True)
    linear = model.get_submodule("head")
    assert isinstance(linear, nn.Linear)
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        linear.bias += 1000  # logits near each other, as those of a solved head may be
        with full_precision(model), tapped(model) as tap, torch.autocast("cpu", torch.bfloat16):
            logits = model(images)
            features = tap.take()
        expected = features.float() @ linear.weight.T + linear.bias
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-3)
        assert len({round(value, 3) for value in logits[0].tolist()}) == 5
        with torch.autocast("cpu", torch.bfloat16):
            assert network(depth=1, embed_dim=24, num_heads=2)(images).dtype == torch.bfloat16
    assert "forward" not in vars(linear)


def test_models_with_another_classifier_stay_as_they_are() -> None:
    plain = nn.Sequential(nn.Linear(2, 2))
    two = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=5, img_size=32)
    for model in (plain, two):
        with full_precision(model):
            assert all("forward" not in vars(module) for module in model.modules())
