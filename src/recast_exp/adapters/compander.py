"""Weight compander: a trained nonlinearity of every weight, two parameters a layer.

Weight Compander (Cakaj, Mehnert and Yang, 2023, arXiv 2306.16993) trains networks whose weights are a squashing
function of other weights, as a regulariser; that function's parameters can be learnt. Here the weights w are frozen and
the function adapts them, so it has to be the identity at first:

    w' = w + a · s · arctan(eᵇ · w / s),   a = b = 0 at first, s the standard deviation of the layer's weights

With a < 0, large and small weights come apart; with a > 0, small ones grow more than large ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recast_exp.adapters._base import Adapter, backbone_modules, merge_parametrized, parametrize_weight


@dataclass
class Compander(Adapter):
    """A nonlinearity of the weights of every layer, two parameters each (after Cakaj et al., arXiv 2306.16993).

    It has no options.
    """

    fits = "linear layers and convolutions, as in all of timm's models"

    @property
    def label(self) -> str:
        """As its paper calls it."""
        return "Weight compander"

    def inject(self, network: nn.Module) -> dict[str, str]:
        """Parametrise the weights of all linear layers and convolutions."""
        names: dict[str, str] = {}
        for path, layer in list(backbone_modules(network)):
            if isinstance(layer, nn.Linear | nn.Conv2d):
                place = parametrize_weight(layer, Companding())
                names |= {f"{path}.compander.{part}": f"{path}.{place}.{part}" for part in ("amount", "slope")}
        return names

    @staticmethod
    @torch.no_grad()
    def merge(network: nn.Module) -> None:
        """Put the changed weights in the place of the weights."""
        merge_parametrized(network, Companding)


class Companding(nn.Module):
    """Parametrisation of a weight by the amount a [1] and the logarithm b [1] of the slope."""

    def __init__(self) -> None:
        super().__init__()
        self.amount = nn.Parameter(torch.zeros(1))
        self.slope = nn.Parameter(torch.zeros(1))

    def forward(self, weight: Tensor) -> Tensor:
        """Change a weight [rows, ...]; the result has its dtype."""
        scale = weight.detach().float().std().clamp_min(1e-12)
        change = self.amount * scale * torch.arctan(self.slope.exp() * weight / scale)
        changed: Tensor = (weight + change).to(weight.dtype)
        return changed
