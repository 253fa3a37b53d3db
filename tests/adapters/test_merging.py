"""Merging where a layer does more than multiply by its weight: an activation, or a weight that is standardised."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm import layers
from torch import Tensor, nn

from recast_exp import adapters
from recast_exp.adapters import from_config, inject_adapter, injected
from recast_exp.adapters._base import not_linear
from recast_exp.errors import UserError
from support.helpers import assert_one_line

SMALL = {"layers": (1, 1, 1, 1), "channels": (16, 16, 16, 32), "stem_chs": 8}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "activations": ("resnetv2_50", SMALL),
    "activations and no pre-activation": ("mobilenetv3_small_050", {}),
    "standardised weights": ("resnetv2_50x1_bit", {}),
    "scaled standardised weights": ("nf_resnet26", {}),
}


def changed(model: str, adapter: str, arguments: dict[str, Any]) -> nn.Module:
    """A network with an adapter that has been trained, and biases and statistics that are not those of a new one."""
    torch.manual_seed(0)
    network: nn.Module = timm.create_model(model, num_classes=3, **arguments).eval().requires_grad_(False)
    with torch.no_grad():
        for name, tensor in (*network.named_parameters(), *network.named_buffers()):
            if name.endswith(("bias", "running_mean")):
                tensor += 0.1 * torch.randn(tensor.shape)
        for path in inject_adapter(network, from_config({"name": adapter})).values():
            parameter = network.get_parameter(path)
            parameter += 0.2 * torch.randn(parameter.shape)
    return network


@torch.no_grad()
def logits(network: nn.Module) -> Tensor:
    result: Tensor = network(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
    return result


@pytest.mark.parametrize("kind", MODELS)
def test_ssf_stays_where_its_scales_cannot_become_weights(kind: str) -> None:
    network = changed(MODELS[kind][0], "ssf", MODELS[kind][1])
    expected, names = logits(network), set(network.state_dict())
    torch.testing.assert_close(logits(adapters.merge(network)), expected, rtol=1e-4, atol=1e-5)
    assert [each.adapter.label for each in injected(network)] == ["SSF"]
    assert set(network.state_dict()) == names  # all of it, so that it can still be saved


@pytest.mark.parametrize("kind", ["standardised weights", "scaled standardised weights"])
def test_peft_is_not_merged_into_weights_that_are_standardised(kind: str) -> None:
    network = changed(MODELS[kind][0], "peft", MODELS[kind][1])
    expected = logits(network)
    with pytest.raises(UserError) as error:
        adapters.merge(network)
    assert_one_line(error, "adapter: expected layers that peft can merge its updates into, got ", "StdConv2d")
    assert torch.equal(logits(network), expected)


@pytest.mark.parametrize(
    ("layer", "linear"),
    [
        (nn.Linear(3, 4), True),
        (nn.Conv2d(4, 6, 3, groups=2, dilation=2, bias=False), True),
        (layers.create_conv2d(4, 6, 3, stride=2, padding="same"), True),
        (nn.BatchNorm2d(4), True),
        (nn.BatchNorm1d(4), True),
        (nn.GroupNorm(2, 4), True),
        (nn.LayerNorm(4), True),
        (nn.LayerNorm((4, 3)), True),
        (layers.LayerNorm2d(4), True),
        (layers.BatchNormAct2d(4, apply_act=False), True),
        (layers.BatchNormAct2d(4, act_layer=nn.ReLU), False),
        (layers.BatchNormAct2d(4, act_layer=nn.Hardswish), False),
        (layers.GroupNormAct(4, 2, act_layer=nn.SiLU), False),
        (layers.StdConv2d(4, 6, 3), False),
        (layers.ScaledStdConv2d(4, 6, 3), False),
    ],
    ids=repr,
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_layers_that_are_linear_in_their_weight(layer: nn.Module, linear: bool, device: str) -> None:
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert not_linear([("it", layer if device == "cpu" else layer.to(device))]) == (None if linear else "it")
    if device == "cpu":
        assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
