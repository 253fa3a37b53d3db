"""TeRA: a frozen random tensor network with trained scaling vectors (Gu et al., ACL 2026, arXiv 2509.03234).

The change of a weight, as a tensor with two modes for its rows and two for its columns, is a Tucker-like network. The
core G and the factors A are random, frozen, and shared by all layers of a shape; a layer trains a vector for each mode:

    ΔW = G ×₁ A₁ diag(d₁) ×₂ A₂ diag(d₂) ×₃ A₃ diag(d₃) ×₄ A₄ diag(d₄),   d₄ = 0 at first, the others 1

The rank of ΔW does not depend on the number of parameters. All modes are of full size here. The random tensors come
from the option `seed`: a task file does not hold them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recast_exp.adapters._base import Adapter, linear_layers, merge_parametrized, parametrize_weight, weight_of
from recast_exp.adapters._tensors import two_factors
from recast_exp.config.fields import option


@dataclass
class TeRA(Adapter):
    """A random tensor network with a trained vector for each of its modes (Gu et al., arXiv 2509.03234).

    Args:
        seed: Seed of the random tensors.
        layers: Ends of the names of the layers.
    """

    fits = "linear layers named attn.qkv, mlp.fc1 or mlp.fc2, as in timm's ViT and Swin; adapter.layers names others"

    seed: int = option(0, "seed of the random tensors", ge=0, lt=2**32)
    layers: list[str] = option(["attn.qkv", "mlp.fc1", "mlp.fc2"], "ends of the names of the linear layers")

    def inject(self, network: nn.Module) -> dict[str, str]:
        """Parametrise the weights."""
        names: dict[str, str] = {}
        shared: dict[tuple[int, int], list[Tensor]] = {}
        for path, layer in linear_layers(network, self.layers):
            shape = layer.out_features, layer.in_features
            if shape not in shared:
                shared[shape] = random_network((*two_factors(shape[0]), *two_factors(shape[1])), self.seed)
            device = weight_of(layer).device
            tensors = [
                torch.empty_like(each, device=device) if device.type == "meta" else each for each in shared[shape]
            ]
            place = parametrize_weight(layer, Network(tensors))
            names |= {f"{path}.tera.{part}": f"{path}.{place}.{part}" for part in PARTS}
        return names

    @staticmethod
    @torch.no_grad()
    def merge(network: nn.Module) -> None:
        """Add the changes to the weights."""
        merge_parametrized(network, Network)


PARTS = ("d1", "d2", "d3", "d4")


class Network(nn.Module):
    """Parametrisation of a weight by the vectors d₁ … d₄ of its modes.

    Args:
        tensors: The core [I₁, I₂, I₃, I₄] and the factors [I, I] of each mode, which other layers may share.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        for number, tensor in enumerate(tensors):
            # From the seed: neither in the state dict nor in a task file
            self.register_buffer(f"fixed{number}", tensor, persistent=False)
        for part, size in zip(PARTS, tensors[0].shape, strict=True):
            self.register_parameter(part, nn.Parameter(torch.zeros(size) if part == "d4" else torch.ones(size)))

    def forward(self, weight: Tensor) -> Tensor:
        """Add the network's tensor to a weight [rows, columns]; the result has its dtype."""
        change, *factors = (self.get_buffer(f"fixed{number}") for number in range(5))
        with torch.autocast(weight.device.type, enabled=False):
            for mode, (part, factor) in enumerate(zip(PARTS, factors, strict=True)):
                scaled = factor * self.get_parameter(part)
                change = torch.tensordot(scaled, change, dims=([1], [mode])).movedim(0, mode)
            added: Tensor = (weight + change.reshape(weight.shape)).to(weight.dtype)
        return added


def random_network(sizes: Sequence[int], seed: int) -> list[Tensor]:
    """A core of these sizes and a factor for each, scaled so that an entry of ΔW has about the variance 1/columns."""
    generator = torch.Generator().manual_seed(seed)
    columns = sizes[2] * sizes[3]
    core = torch.randn(tuple(sizes), generator=generator, device="cpu") * columns**-0.5
    return [core, *(torch.randn(size, size, generator=generator, device="cpu") * size**-0.5 for size in sizes)]
