"""MeLo: low-rank updates of the query and value projections (Zhu et al., "MeLo", arXiv 2311.08236; LoRA, 2106.09685).

    q = W_q x + s·B_q A_q x,   v = W_v x + s·B_v A_v x,   s = α / r

for the fused weight of a ViT's attention. A starts Kaiming-uniform, B at zero. A ViT-S has 18,432·r of these
parameters.

The update B A is added where it is cheaper: to the output of a frozen layer, whose weight needs no gradient; or to the
weight of a layer that trains coefficients, whose gradient is computed anyway and is much smaller than the output.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import parametrize

from recast_exp.adapters._base import Adapter, attach, detach, linear_layers, parametrize_weight
from recast_exp.config.fields import option

NAME = "melo"


@dataclass
class MeLo(Adapter):
    """Low-rank updates of the queries and the values of every attention layer (Zhu et al., arXiv 2311.08236).

    Args:
        rank: Rank r of the updates.
        alpha: Numerator α of their scale α/r.
    """

    fits = "attention with a fused layer qkv, as in timm's ViT, DeiT and Swin"

    rank: int = option(4, "rank r of the updates", ge=1)
    alpha: float = option(4.0, "numerator α of their scale α/r", gt=0)

    def inject(self, network: nn.Module) -> dict[str, str]:
        """Add the updates to every fused projection."""
        names: dict[str, str] = {}
        for path, layer in _layers(network):
            adapter = LowRank(layer.in_features, self.rank, self.alpha / self.rank)
            if parametrize.is_parametrized(layer, "weight"):
                place = parametrize_weight(layer, adapter.to(layer.weight.dtype))
            else:
                place = NAME
                attach(layer, NAME, adapter)
                layer.register_forward_hook(adapter.on_output)
            names |= {f"{path}.{NAME}.{part}": f"{path}.{place}.{part}" for part in ("a", "b")}
        return names

    @staticmethod
    @torch.no_grad()
    def merge(network: nn.Module) -> None:
        """Add the updates to the weights and remove the modules, unless RECAST's own `merge` has done so."""
        for _, layer in _layers(network):
            if hasattr(layer, NAME):
                adapter = layer.get_submodule(NAME)
                layer.weight.copy_(adapter(layer.weight))
                detach(layer, NAME)


class LowRank(nn.Module):
    """The updates of the queries and the values of one attention layer.

    Args:
        width: Width d of the model.
        rank: Rank r of each update.
        scale: Scale s of both.
    """

    def __init__(self, width: int, rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.a = nn.Parameter(torch.empty(2, rank, width))  # of the queries and of the values
        self.b = nn.Parameter(torch.zeros(2, width, rank))
        for part in self.a:
            nn.init.kaiming_uniform_(part, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """Add the updates to the layer's weight [3d, d]; a parametrisation."""
        return torch.addmm(weight, self._up(), self.a.flatten(0, 1))

    def on_output(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        """Add the updates to the layer's output [..., 3d]; a forward hook.

        One product computes and adds both updates. Splitting the output and concatenating it again would copy it in the
        forward and in the backward pass.
        """
        low = F.linear(inputs[0], self.a.flatten(0, 1))
        return torch.addmm(output.flatten(0, -2), low.flatten(0, -2), self._up().t()).view_as(output)

    def _up(self) -> Tensor:
        """The scaled B of both updates, [3d, 2r]: from [A_q x, A_v x] to queries, keys and values."""
        queries, values = self.scale * self.b
        nothing = torch.zeros_like(queries)
        rows = (queries, nothing), (nothing, nothing), (nothing, values)
        return torch.cat([torch.cat(row, 1) for row in rows])


def _layers(network: nn.Module) -> list[tuple[str, nn.Linear]]:
    found = linear_layers(network, ["qkv"])
    return [(path, layer) for path, layer in found if layer.out_features == 3 * layer.in_features]
