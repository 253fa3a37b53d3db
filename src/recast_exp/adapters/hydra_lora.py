"""Hydra: a parallel and a sequential low-rank branch (Kim et al., "Hydra: Multi-head Low-rank Adaptation", 2309.06922).

It has nothing to do with the Hydra of the command line.

    y = W x + b + s · B A x + s · D C (W x + b),   B = D = 0 at first

The first branch adds new features, as LoRA does; the second combines those that the layer has. Both become part of the
weights: W' = W + s · B A + s · D C W and b' = b + s · D C b.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from recast_exp.adapters._base import Adapter, attach, backbone_modules, detach, linear_layers, not_linear
from recast_exp.config.fields import option

NAME = "hydra"


@dataclass
class HydraLoRA(Adapter):
    """A parallel and a sequential low-rank branch of linear layers (Kim et al., arXiv 2309.06922).

    Args:
        rank: Rank r of each branch.
        scale: Factor s of both.
        layers: Ends of the names of the layers.
    """

    fits = "linear layers named attn.proj or mlp.fc2, as in timm's ViT, DeiT and Swin; adapter.layers names others"

    rank: int = option(2, "rank r of each branch", ge=1)
    scale: float = option(1.0, "factor s of both branches", gt=0, le=10_000)
    layers: list[str] = option(["attn.proj", "mlp.fc2"], "ends of the names of the linear layers")

    @property
    def label(self) -> str:
        """Not "Hydra" alone, which is the library of the command line."""
        return "Hydra-LoRA"

    def inject(self, network: nn.Module) -> dict[str, str]:
        """Add the branches to every layer."""
        names: dict[str, str] = {}
        for path, layer in linear_layers(network, self.layers):
            branches = Branches(layer.in_features, layer.out_features, self.rank, self.scale)
            attach(layer, NAME, branches)
            layer.register_forward_hook(branches.forward)
            names |= {f"{path}.{NAME}.{part}": f"{path}.{NAME}.{part}" for part, _ in branches.named_parameters()}
        return names

    @staticmethod
    @torch.no_grad()
    def merge(network: nn.Module) -> None:
        """Make both branches part of weights and biases, and remove the modules."""
        found = [
            (path, layer, branches)
            for path, layer in backbone_modules(network)
            if isinstance(branches := getattr(layer, NAME, None), Branches)
        ]
        if not_linear((path, layer) for path, layer, _ in found) is not None:
            return
        for _, layer, branches in found:
            weight = layer.get_parameter("weight")
            sequential = branches.scale * branches.d @ branches.c
            weight.copy_(weight + branches.scale * branches.b @ branches.a + sequential @ weight)
            if (bias := dict(layer.named_parameters()).get("bias")) is not None:
                bias.copy_(bias + sequential @ bias)
            detach(layer, NAME)


class Branches(nn.Module):
    """The branches of one layer: A [r, in], B [out, r], C [r, out], D [out, r]."""

    def __init__(self, inputs: int, outputs: int, rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.a, self.c = (nn.Parameter(torch.empty(rank, width)) for width in (inputs, outputs))
        self.b, self.d = (nn.Parameter(torch.zeros(outputs, rank)) for _ in range(2))
        for part in (self.a, self.c):
            nn.init.kaiming_uniform_(part, a=math.sqrt(5))

    def forward(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        """Add both branches to the output [..., out] of the layer; a forward hook."""
        parallel = F.linear(F.linear(inputs[0], self.a), self.b)
        return output + self.scale * (parallel + F.linear(F.linear(output, self.c), self.d))
