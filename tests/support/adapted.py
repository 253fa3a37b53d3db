"""Small networks with adapters: what the tests of the adapters have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from recast_exp.models.adapted import AdaptedModel

Make = Callable[..., AdaptedModel]
"""`make(name, kind, base, **options)`: the adapter of that name on a network of `NETWORKS`, RECAST or frozen."""

NETWORKS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2}, ["*.attn.qkv"]),
    "cnn": ("resnet18", {"channels": (8, 8, 16, 16)}, ["layer?.1.conv?"]),
}
"""A name for tests → timm's name, its arguments, and the layers that get templates."""

BASES = ("recast", "frozen")


def create(kind: str, num_classes: int = 0) -> nn.Module:
    name, arguments, _ = NETWORKS[kind]
    network: nn.Module = timm.create_model(name, num_classes=num_classes, **arguments)
    return network


def create_without_weights(kind: str) -> nn.Module:
    with torch.device("meta"):
        return create(kind)


def images() -> Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(network: nn.Module) -> Tensor:
    result: Tensor = network.eval()(images())
    return result


def train(adapted: AdaptedModel, steps: int = 2, lr: float = 0.05) -> None:
    """A few steps on what trains, as the training loop takes them."""
    network = adapted.network.eval()
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(network(images()), torch.tensor([0, 1, 2, 3])).backward()
        optimizer.step()
