"""The backbone of many tasks: its templates, and the coefficients that are in its layers at the moment."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn

from recast_exp.models.adapted import normalisations_with_statistics
from recast_exp.recast import Banks, TemplateCombination, inject
from recast_exp.recast.grouping import layer_module
from recast_exp.recast.mixed import keeps_apart, mixable

_COEFFICIENTS = ".parametrizations.weight.original"


class Trunk:
    """A frozen backbone in RECAST's form, in place. No module: it holds no tensors but those of the network.

    Attributes:
        network: The backbone: images [N, 3, H, W] → features [N, D].
        banks: Its templates and mimicked coefficients.
        width: The number D of features.
        weights: Fingerprint of the pretrained weights.
        start: [M], the mimicked coefficients of all layers, one after the other.
        mixable: Whether one pass can serve several tasks; None as long as none was asked to.
    """

    def __init__(self, network: nn.Module, banks: Banks, width: int, weights: str) -> None:
        self.network = network
        self.banks = banks
        self.width = width
        self.weights = weights
        self._paths = inject(network, banks)
        network.requires_grad_(False)
        self.layers = list(self._paths)
        self._sizes = [banks.coefficients[layer].numel() for layer in self.layers]
        self.start = torch.cat([banks.coefficients[layer].flatten() for layer in self.layers])
        modules = [layer_module(network, layer) for layer in self.layers]
        self._rewritten = [module.get_submodule("parametrizations.weight") for module in modules]
        self.mixable: bool | None = None if all(map(mixable, modules)) else False

    @property
    def live(self) -> list[nn.Parameter]:
        """The coefficients [K, B, n] of each layer, which some ways to load or to convert a model replace."""
        return [cast("nn.Parameter", module.original) for module in self._rewritten]

    def serves_many(self, images: Tensor) -> bool:
        """Whether one pass can serve several tasks. The first two images show it, and it is known from then on."""
        if self.mixable is None:
            two = images[:2]
            if len(two) < 2 or not two.isfinite().all():
                return False
            self.mixable = keeps_apart(self.network, self.layers, two)
        return self.mixable

    def coefficients_of(self, network: nn.Module) -> list[nn.Parameter]:
        """The coefficients [K, B, n] of each layer, in the network or in a copy of it with an adapter."""
        found = dict(network.named_parameters())
        moved = [path for path in found if path.endswith(_COEFFICIENTS)]
        return [
            found[path] if (path := self._paths[layer]) in found else found[_of_layer(moved, layer)]
            for layer in self.layers
        ]

    def per_layer(self, vectors: Tensor) -> dict[str, Tensor]:
        """Vectors of coefficients [N, M] as those of each layer: [N, K, B, n]."""
        parts = zip(self.layers, torch.split(vectors, self._sizes, 1), strict=True)
        return {layer: part.reshape(-1, *self.banks.coefficients[layer].shape) for layer, part in parts}

    def show(self, vector: Tensor) -> None:
        """Put a vector [M] of coefficients into the layers."""
        self._fill(self.live, vector)

    @torch.no_grad()
    def take(self, into: Tensor | None = None) -> Tensor:
        """The coefficients in the layers as a vector [M], a new one or `into`."""
        vector = torch.empty_like(self.start) if into is None else into
        torch._foreach_copy_(list(torch.split(vector, self._sizes)), [tensor.data.view(-1) for tensor in self.live])
        return vector

    @torch.no_grad()
    def _fill(self, coefficients: list[nn.Parameter], vector: Tensor) -> None:
        torch._foreach_copy_([tensor.data.view(-1) for tensor in coefficients], list(torch.split(vector, self._sizes)))

    @torch.no_grad()
    def renew_templates(self) -> None:
        """Take templates from the banks once more, which files hold: to convert there and back has rounded them."""
        for group in self.banks.groups:
            combination = self._rewritten[self.layers.index(group.layers[0])].get_submodule("0")
            assert isinstance(combination, TemplateCombination)
            live, kept = combination.bank, self.banks.bank(group, torch.device("cpu"))
            live.templates.copy_(kept.templates)
            if live.scales is not None and kept.scales is not None:
                live.scales.copy_(kept.scales)
        self.start.copy_(torch.cat([self.banks.coefficients[layer].flatten() for layer in self.layers]))

    def copy(self, *, own_statistics: bool) -> nn.Module:
        """The network once more, with the mimicked coefficients, of its own. All other tensors are the same ones.

        Args:
            own_statistics: Whether the running statistics of BatchNorm are copied as well.
        """
        own = {id(parameter) for parameter in self.live}
        if own_statistics:
            layers = normalisations_with_statistics(self.network)
            own |= {id(buffer) for _, module in layers for buffer in module.buffers()}
        tensors = (*self.network.parameters(), *self.network.buffers())
        memo: dict[int, object] = {id(tensor): tensor for tensor in tensors if id(tensor) not in own}
        copied = copy.deepcopy(self.network, memo)
        self._fill(self.coefficients_of(copied), self.start)
        return copied

    def separate(self, network: nn.Module, paths: list[str]) -> None:
        """Give a copy of the network parameters of its own, where they are those of the backbone.

        Args:
            network: The copy, changed in place.
            paths: Names of the parameters, which an adapter is going to train.
        """
        shared = {id(parameter) for parameter in self.network.parameters()}
        for path in paths:
            parameter = network.get_parameter(path)
            if id(parameter) in shared:
                owner, _, name = path.rpartition(".")
                setattr(network.get_submodule(owner), name, nn.Parameter(parameter.detach().clone()))
                parameter.requires_grad_(False)


def _of_layer(paths: list[str], layer: str) -> str:
    """The path of a layer's coefficients: an adapter may have put a module of its own between them."""
    return next(path for path in paths if path.startswith(f"{layer}."))
