"""AdaptFormer: a bottleneck in parallel with each MLP (Chen et al., NeurIPS 2022, arXiv 2205.13535).

    x ← x + MLP(norm₂(x)) + s·W_up ReLU(W_down x + b_down) + s·b_up

where x is the residual stream before the second normalisation layer. The up-projection starts at zero. A ViT-S has
595,200 of these parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recast_exp.adapters._base import Adapter, PerThread, attach, backbone_modules, channels_dim, weight_of
from recast_exp.config.fields import option

NAME = "adaptformer"


@dataclass
class AdaptFormer(Adapter):
    """A bottleneck in parallel with the MLP of every block (Chen et al., arXiv 2205.13535).

    Args:
        width: Width of the bottleneck.
        scale: Scale s of its output.
    """

    fits = "blocks with norm2, mlp and drop_path2, as in timm's ViT, DeiT, BEiT, EVA, Swin and PoolFormer"

    width: int = option(64, "width of the bottleneck", ge=1)
    scale: float = option(0.1, "scale s of the bottleneck's output", gt=0, le=10_000)

    def inject(self, network: nn.Module) -> dict[str, str]:
        """Add a bottleneck to every block."""
        names: dict[str, str] = {}
        for path, block in _blocks(network):
            norm = block.get_submodule("norm2")
            adapter = Bottleneck(weight_of(norm).shape[0], self.width, self.scale, channels_dim(norm))
            attach(block, NAME, adapter)
            norm.register_forward_pre_hook(adapter.before_norm)
            # The last of the branch: timm's MetaFormers scale it after their drop_path2
            last = "layer_scale2" if hasattr(block, "layer_scale2") else "drop_path2"
            block.get_submodule(last).register_forward_hook(adapter.after_branch)
            names |= {name: name for part, _ in adapter.named_parameters() for name in [f"{path}.{NAME}.{part}"]}
        return names


class Bottleneck(nn.Module):
    """The bottleneck of one block.

    Args:
        width: Width of the residual stream.
        hidden: Width of the bottleneck.
        scale: Scale s of its output.
        dim: Dimension of the channels in the residual stream.
    """

    def __init__(self, width: int, hidden: int, scale: float, dim: int) -> None:
        super().__init__()
        self.scale = scale
        self.dim = dim
        self.down = nn.Linear(width, hidden)
        self.up = nn.Linear(hidden, width)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)
        self._added = PerThread()

    def forward(self, x: Tensor) -> Tensor:
        """Compute the update of the residual stream x [..., width], or [N, width, ...] of images; the same shape."""
        update: Tensor = self.up(torch.relu(self.down(x.movedim(self.dim, -1)))) * self.scale
        return update.movedim(-1, self.dim)

    def before_norm(self, module: nn.Module, inputs: tuple[Tensor]) -> None:
        """Compute the update from the input of norm2, which is the residual stream; its forward pre-hook."""
        self._added.value = self(inputs[0])

    def after_branch(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        """Add the update to the output of the MLP's branch; a forward hook of its last layer."""
        added: Tensor = self._added.value
        self._added.value = None
        return output + added


def _blocks(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """The blocks that normalise before the MLP. Blocks that normalise after it declare norm2 after mlp."""
    blocks = []
    for path, module in backbone_modules(network):
        children = dict(module.named_children())
        order = list(children)
        if not {"norm2", "mlp", "drop_path2"} <= set(order) or order.index("norm2") > order.index("mlp"):
            continue
        if isinstance(getattr(children["norm2"], "weight", None), Tensor):  # its length is the width
            blocks.append((path, module))
    return blocks
