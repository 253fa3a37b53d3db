"""Growth: a deeper backbone, whose new blocks are linear combinations of the pretrained ones.

MixtureGrowth (Pham et al., WACV 2024, arXiv 2311.04251) grows a network by new layers whose weights are linear
combinations of the templates of the old ones, and trains it as a whole. Here the backbone stays frozen: after some
blocks B_b a new one follows that shares their structure, biases and normalisation, and takes each weight from those of
all blocks with a weight of that shape in that place:

    x ← x + g·(B'_b(x) − x),   W'_l = Σ_j c_{l,j} W_{l,j}

where l is a layer of the block and j counts the blocks. The gate g starts at zero, so that nothing changes at first; c
starts at one for the block itself and at zero for the others, so that the new block repeats it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recast_exp.adapters._base import Adapter, PerThread, attach, backbone_modules, parametrize_weight, weight_of
from recast_exp.config.fields import option
from recast_exp.errors import UnfitError

NAME = "growth"


@dataclass
class Growth(Adapter):
    """New blocks whose weights are combinations of the pretrained ones (after Pham et al., arXiv 2311.04251).

    Args:
        blocks: New blocks, spread evenly over the depth; at most one after each block.
    """

    fits = "repeated blocks of layers of the same shapes, as in timm's ViT, Swin, ConvNeXt and ResNets"

    blocks: int = option(3, "new blocks, spread evenly over the depth; at most one after each block", ge=1)

    def inject(self, network: nn.Module) -> dict[str, str]:
        """Let blocks be followed by new ones.

        Raises:
            UnfitError: If a block is a container with a forward pass of its own, which would run the new block too.
        """
        found = _blocks(network)
        count = min(self.blocks, len(found))
        names: dict[str, str] = {}
        for place in (round((index + 1) * len(found) / count) - 1 for index in range(count)):
            path, alike = found[place]
            block = network.get_submodule(path)
            if not _runs_alone(block):
                raise _unfit(path, f"a {type(block).__name__} that runs its modules in a way of its own")
            layers = _layers(block)
            own = alike.index(path)
            new = NewBlock(path, list(layers), own, len(alike))
            attach(block, NAME, new)
            for name, layer in layers.items():
                sources = [network.get_submodule(f"{other}.{name}") for other in alike]
                parametrize_weight(layer, Recombined(new, name, sources, own))
            block.register_forward_hook(new.after_block, with_kwargs=True)
            names |= {name: name for part, _ in new.named_parameters() for name in [f"{path}.{NAME}.{part}"]}
        return names


class NewBlock(nn.Module):
    """The parameters of a new block: its gate g [1], and coefficients c [blocks] for each of its layers.

    Args:
        path: Name of the block that it follows.
        layers: Names of the layers within the block.
        own: Index of that block among those whose weights are combined.
        count: Number of these.
    """

    def __init__(self, path: str, layers: Sequence[str], own: int, count: int) -> None:
        super().__init__()
        self.path = path
        self.gate = nn.Parameter(torch.zeros(1))
        own_alone = torch.eye(count)[own]
        self.coefficients = nn.ParameterDict({_key(name): nn.Parameter(own_alone.clone()) for name in layers})
        self._running = PerThread()

    @property
    def running(self) -> bool:
        """Whether this thread runs the new block, and not the one before it."""
        return bool(self._running.value)

    def after_block(self, block: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> Tensor:
        """Run the new block on the output of the one before it; that block's forward hook.

        Raises:
            UnfitError: If the block does not take its own output, such as two tensors or another shape.
        """
        before, after = (_form(value) for value in (inputs[0] if inputs else None, output))
        if not isinstance(output, Tensor):
            raise _unfit(self.path, f"which makes {after} of {before}")
        self._running.value = True
        try:
            # Not by a call, which would run this hook again
            result: Tensor = block.forward(output, *inputs[1:], **named)
        except (RuntimeError, TypeError, ValueError) as error:
            if before == after:
                raise
            raise _unfit(self.path, f"which makes {after} of {before}") from error
        finally:
            self._running.value = False
        if result.shape != output.shape:
            raise _unfit(self.path, f"which makes {_form(result)} of {after}")
        return output + self.gate * (result - output)

    def forward(self, x: Tensor) -> Tensor:
        """Nothing: an `nn.Sequential` runs this module too, after its own; the new block runs after all of them."""
        return x


class Recombined(nn.Module):
    """Parametrisation of a weight: as it is in its own block, and combined with the others in the new one.

    Args:
        new: The new block.
        name: Name of the layer within it.
        sources: The layers at this place in all blocks.
        own: Index among them of the layer whose weight this is.
    """

    def __init__(self, new: NewBlock, name: str, sources: Sequence[nn.Module], own: int) -> None:
        super().__init__()
        # In a tuple, whose modules are not registered: their parameters have a place in the network already
        self._elsewhere = (new, tuple(sources))
        self._key = _key(name)
        self._own = own

    def forward(self, weight: Tensor) -> Tensor:
        """Combine a weight [rows, ...] with those of the other blocks if the new block runs; the same shape."""
        new, sources = self._elsewhere
        if not new.running:
            return weight
        coefficients = new.coefficients[self._key].to(weight.dtype)
        combined = torch.zeros_like(weight)
        for index, layer in enumerate(sources):
            combined = combined + coefficients[index] * (weight if index == self._own else weight_of(layer))
        return combined


def _blocks(network: nn.Module) -> list[tuple[str, list[str]]]:
    """Names of the repeated blocks in the order of the network, each with the names of all blocks of its shape."""
    alike: dict[Any, list[str]] = defaultdict(list)
    modules = dict(backbone_modules(network))
    for path, module in modules.items():
        parent = path.rpartition(".")[0]
        shapes = tuple((name, weight_of(layer).shape) for name, layer in _layers(module).items())
        called = not isinstance(module, nn.ModuleList)  # others only hold modules
        if called and isinstance(modules.get(parent), nn.Sequential | nn.ModuleList) and len(shapes) > 1:
            alike[type(module).__qualname__, shapes].append(path)
    repeated = {path: paths for paths in alike.values() if len(paths) > 1 for path in paths}
    inner = {path for path in repeated if not any(other.startswith(f"{path}.") for other in repeated)}
    return [(path, repeated[path]) for path in modules if path in inner]


def _runs_alone(block: nn.Module) -> bool:
    """Whether a block does not run all modules in it, such as a `NewBlock`, but for an `nn.Sequential`."""
    if isinstance(block, nn.Sequential):
        return type(block).forward is nn.Sequential.forward
    return not isinstance(block, nn.ModuleList | nn.ModuleDict)


def _form(value: object) -> str:
    """The shape of a tensor, or the type of anything else, for comparisons and messages."""
    return str(list(value.shape)) if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _unfit(path: str, reason: str) -> UnfitError:
    return UnfitError(
        f"adapter: growth needs blocks that keep the shape of their input, got {path}, {reason}; use another adapter"
    )


def _layers(block: nn.Module) -> dict[str, nn.Module]:
    """The linear layers and convolutions of a block, by their names within it."""
    return {name: layer for name, layer in block.named_modules() if name and isinstance(layer, nn.Linear | nn.Conv2d)}


def _key(name: str) -> str:
    """A layer's name as that of a parameter, which has no dots."""
    return name.replace(".", "_")
