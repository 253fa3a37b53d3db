"""FiLM: a scale and a shift for every channel after each normalisation layer.

Perez et al., AAAI 2018, arXiv 1709.07871; for adapting a frozen backbone: Requeima et al., NeurIPS 2019,
arXiv 1906.07697.

    y ← γ ⊙ y + β,   starting at γ = 1 and β = 0
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recast_exp.adapters._base import NORMS, Adapter, attach, backbone_modules, channels_dim

NAME = "film"


@dataclass
class FiLM(Adapter):
    """A scale and a shift for every channel after each normalisation layer (Perez et al., arXiv 1709.07871).

    It has no options.
    """

    fits = "normalisation layers with a scale"

    def inject(self, network: nn.Module) -> dict[str, str]:
        """Modulate the output of every normalisation layer of the backbone."""
        names: dict[str, str] = {}
        for path, layer in list(backbone_modules(network)):
            if isinstance(layer, NORMS) and layer.weight is not None:
                adapter = Modulation(len(layer.weight), channels_dim(layer))
                attach(layer, NAME, adapter)
                layer.register_forward_hook(adapter.forward)
                names |= {f"{path}.{NAME}.{part}": f"{path}.{NAME}.{part}" for part in ("scale", "shift")}
        return names


class Modulation(nn.Module):
    """Scale and shift of one layer's channels.

    Args:
        channels: Number of channels.
        dim: Dimension of the channels in the layer's output.
    """

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.scale = nn.Parameter(torch.ones(channels))
        self.shift = nn.Parameter(torch.zeros(channels))

    def forward(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        """Scale and shift the output of the layer; a forward hook."""
        shape = [1] * output.dim()
        shape[self.dim] = -1
        return output * self.scale.view(shape) + self.shift.view(shape)
