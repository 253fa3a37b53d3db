"""A transform of the weight plus a compact residual.

After "Transformed Low-rank Adaptation via Tensor Decomposition" (Tao et al., 2025, arXiv 2501.08727): a transform of
full rank brings the pretrained weight W [rows, columns] near to the one that the task wants; what is missing then takes
a smaller rank. The paper decomposes both in several ways. Here the transform is a sum of Kronecker products, which is a
tensor train of two cores, and the residual a product of rank r:

    W' = W · Σ_k P[k] ⊗ Q[k] + B A,   P[0] = Q[0] = I, P[k > 0] = 0 and B = 0 at first
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recast_exp.adapters._base import Adapter, linear_layers, merge_parametrized, parametrize_weight
from recast_exp.adapters._tensors import two_factors
from recast_exp.config.fields import option


@dataclass
class Transformed(Adapter):
    """A Kronecker transform of the weights plus a low-rank residual (after Tao et al., arXiv 2501.08727).

    Args:
        transform_rank: Number of Kronecker products in the transform.
        rank: Rank r of the residual.
        layers: Ends of the names of the layers.
    """

    fits = "linear layers named attn.qkv or mlp.fc1, as in timm's ViT, DeiT and Swin; adapter.layers names others"

    transform_rank: int = option(1, "number of Kronecker products in the transform", ge=1, le=64)
    rank: int = option(1, "rank r of the residual", ge=1)
    layers: list[str] = option(["attn.qkv", "mlp.fc1"], "ends of the names of the linear layers")

    def inject(self, network: nn.Module) -> dict[str, str]:
        """Parametrise the weights."""
        names: dict[str, str] = {}
        for path, layer in linear_layers(network, self.layers):
            transform = Transform(layer.out_features, layer.in_features, self.transform_rank, self.rank)
            place = parametrize_weight(layer, transform)
            names |= {f"{path}.transform.{part}": f"{path}.{place}.{part}" for part, _ in transform.named_parameters()}
        return names

    @staticmethod
    @torch.no_grad()
    def merge(network: nn.Module) -> None:
        """Put the transformed weights in the place of the weights."""
        merge_parametrized(network, Transform)


class Transform(nn.Module):
    """Parametrisation of a weight: P [k, m, m], Q [k, n, n] with m · n = columns; A [r, columns], B [rows, r]."""

    def __init__(self, rows: int, columns: int, transform_rank: int, rank: int) -> None:
        super().__init__()
        sizes = two_factors(columns)
        self.p, self.q = (nn.Parameter(torch.eye(size).repeat(transform_rank, 1, 1)) for size in sizes)
        self.a = nn.Parameter(torch.empty(rank, columns))
        self.b = nn.Parameter(torch.zeros(rows, rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        with torch.no_grad():
            self.p[1:] = 0
            if transform_rank > 1:  # products that are all alike would stay so
                nn.init.normal_(self.q[1:], std=sizes[1] ** -0.5)

    def forward(self, weight: Tensor) -> Tensor:
        """Transform a weight [rows, columns] and add the residual; the result has its dtype."""
        dtype = torch.promote_types(weight.dtype, self.a.dtype)
        own, p, q, a, b = (each.to(dtype) for each in (weight, self.p, self.q, self.a, self.b))
        parts = own.reshape(len(own), p.shape[1], q.shape[1])
        with torch.autocast(weight.device.type, enabled=False):
            # Differences to the identity: nothing is rounded at first
            changes = torch.einsum("iab,kac,kbd->icd", parts, p - _identity(p), q)
            changes = changes + torch.einsum("iab,bd->iad", parts, (q - _identity(q))[0])
            transformed: Tensor = (own + changes.reshape(own.shape) + b @ a).to(weight.dtype)
        return transformed


def _identity(cores: Tensor) -> Tensor:
    """Cores [k, n, n] as they start: the identity, then zeros."""
    start = torch.zeros_like(cores)
    start[0] = torch.eye(cores.shape[1], dtype=cores.dtype, device=cores.device)
    return start
