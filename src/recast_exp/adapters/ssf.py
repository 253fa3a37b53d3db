"""SSF: scale and shift the output of every layer (Lian et al., NeurIPS 2022, arXiv 2210.08516).

    y ← γ ⊙ y + β,   starting at γ = 1 and β = 0

The paper starts from γ ~ N(1, 0.02) and β ~ N(0, 0.02); here the model is the pretrained one at first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recast_exp.adapters._base import (
    NORMS,
    Adapter,
    attach,
    backbone_modules,
    channels_dim,
    computes_itself,
    detach,
    not_linear,
)

NAME = "ssf"


@dataclass
class SSF(Adapter):
    """A scale and a shift for the output of every layer that has weights (Lian et al., arXiv 2210.08516).

    A layer without a bias gets no shift: its merged weights could not hold one. Where a layer applies an activation to
    its output or standardises its weight, `merge` leaves all modules in the model. It has no options.
    """

    fits = "linear layers, convolutions or normalisation layers, as in all of timm's models"

    def inject(self, network: nn.Module) -> dict[str, str]:
        """Modulate the output of every layer of the backbone that has weights."""
        names: dict[str, str] = {}
        for path, layer in _layers(network):
            adapter = ScaleAndShift(_outputs(layer), channels_dim(layer), layer.bias is not None)
            attach(layer, NAME, adapter)
            layer.register_forward_hook(adapter.forward)
            names |= {f"{path}.{NAME}.{part}": f"{path}.{NAME}.{part}" for part, _ in adapter.named_parameters()}
        return names

    @staticmethod
    @torch.no_grad()
    def merge(network: nn.Module) -> None:
        """Put scales and shifts into weights and biases, and remove the modules.

        All of them stay if one layer applies an activation to its output, or standardises its weight.
        """
        found = [
            (path, layer, adapter)
            for path, layer in backbone_modules(network)
            if isinstance(adapter := getattr(layer, NAME, None), ScaleAndShift)
        ]
        if not_linear((path, layer) for path, layer, _ in found) is not None:
            return
        for _, layer, adapter in found:
            weight = layer.get_parameter("weight")
            weight.mul_(adapter.scale.to(weight.dtype).reshape(-1, *[1] * (weight.dim() - 1)))
            if adapter.shift is not None:
                bias = layer.get_parameter("bias")
                bias.copy_(bias * adapter.scale.to(bias.dtype) + adapter.shift.to(bias.dtype))
            detach(layer, NAME)


class ScaleAndShift(nn.Module):
    """The scales γ [channels] and shifts β [channels] of one layer.

    Args:
        channels: Number of channels of its output.
        dim: Their dimension in it.
        shifts: Whether there are shifts.
    """

    def __init__(self, channels: int, dim: int, shifts: bool) -> None:
        super().__init__()
        self.dim = dim
        self.scale = nn.Parameter(torch.ones(channels))
        self.shift = nn.Parameter(torch.zeros(channels)) if shifts else None

    def forward(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        """Scale and shift the output of the layer; a forward hook."""
        shape = [1] * output.dim()
        shape[self.dim] = -1
        scaled = output * self.scale.view(shape)
        return scaled if self.shift is None else scaled + self.shift.view(shape)


def _layers(network: nn.Module) -> list[tuple[str, nn.Module]]:
    kinds = (nn.Linear, nn.Conv2d, *NORMS)
    return [
        (path, layer)
        for path, layer in backbone_modules(network)
        if isinstance(layer, kinds) and layer.weight is not None and computes_itself(network, path)
    ]


def _outputs(layer: nn.Module) -> int:
    """The number of channels of a layer's output."""
    for name in ("out_features", "out_channels", "num_features", "num_channels"):
        if isinstance(number := getattr(layer, name, None), int):
            return number
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return len(weight)
