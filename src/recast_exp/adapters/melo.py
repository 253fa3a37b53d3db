"""MeLo: low-rank updates of the query and value projections (Zhu et al., "MeLo", arXiv 2311.08236; LoRA, 2106.09685).

    q = W_q x + s·B_q A_q x,   v = W_v x + s·B_v A_v x,   s = α / r

for the fused weight of a ViT's attention. A starts Kaiming-uniform, B at zero. A ViT-S has 18,432·r of these
parameters.

The update B A is added where it is cheaper: to the output of a frozen layer, whose weight needs no gradient; or to the
weight of a layer that trains coefficients, whose gradient is computed anyway and is much smaller than the output.

Options change how the ranks come about:

- `init=eva` (Paischer et al., 2024, arXiv 2410.07170): A starts as the leading right singular vectors of the layer's
  inputs, and the ranks of all layers, r on average, are shared out by the variance that each vector explains.
- `rank_gates=true` (SoRA: Ding et al., EMNLP 2023, arXiv 2311.11696): B diag(g) A with trained gates g. After each
  step of the optimiser, |g| shrinks by the learning rate times `sparsity`, at most to 0. Ranks whose gate ends at zero
  are cut off, and the other gates become part of B.
- `nested=true` (DyLoRA: Valipour et al., EACL 2023, arXiv 2210.07558): each step trains the first ranks alone, up to a
  random one. Afterwards the task can be used at any rank: `truncate`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import parametrize

from recast_exp.adapters._base import (
    Adapter,
    attach,
    detach,
    linear_layers,
    merge_parametrized,
    parametrizations,
    parametrize_weight,
)
from recast_exp.config.fields import option
from recast_exp.errors import UnfitError, UserError, check_integer

NAME = "melo"


@dataclass
class MeLo(Adapter):
    """Low-rank updates of the queries and the values of every attention layer (Zhu et al., arXiv 2311.08236).

    Args:
        rank: Rank r of the updates, on average where they differ.
        alpha: Numerator α of their scale α/r.
        init: First values of A: `random`, or `eva` from training images: `initialise` has to be called before training.
        rank_gates: Train a gate for each rank, and cut off the ranks whose gate ends at zero.
        sparsity: How fast the gates shrink, in units of the learning rate for a step.
        nested: Train the ranks so that the first ones do without the others.
        ranks: The rank of each layer, in the order of the layers; None is `rank` for all. Found by `eva` and by gates.
    """

    fits = "attention with a fused layer qkv, as in timm's ViT, DeiT and Swin"

    rank: int = option(4, "rank r of the updates, on average where they differ", ge=1)
    alpha: float = option(4.0, "numerator α of their scale α/r", gt=0, le=10_000)
    init: str = option("random", "first values of A: random, or from training images", choices=("random", "eva"))
    rank_gates: bool = option(False, "train a gate for each rank, and cut off the ranks whose gate ends at zero")
    sparsity: float = option(
        10.0, "how fast the gates shrink, in units of the learning rate for a step", ge=0, le=1e6, needs="rank_gates"
    )
    nested: bool = option(False, "train the ranks so that the first ones do without the others")
    ranks: list[int] | None = option(None, "rank of each layer, in their order; null is `rank` for all")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nested and self.rank_gates:
            raise UserError("nested: expected false together with rank_gates, got true; choose one of them")
        if self.ranks is not None and (wrong := [rank for rank in self.ranks if rank < 0]):
            raise UserError(f"ranks: expected integers ≥ 0, got {wrong[0]}")

    def inject(self, network: nn.Module) -> dict[str, str]:
        """Add the updates to every fused projection."""
        names: dict[str, str] = {}
        layers = _layers(network)
        ranks = [self.rank] * len(layers) if self.ranks is None else self.ranks
        if layers and len(ranks) != len(layers):
            raise UnfitError(f"ranks: expected {len(layers)} integers, one for each attention layer, got {len(ranks)}")
        for (path, layer), rank in zip(layers, ranks, strict=bool(layers)):
            adapter = LowRank(layer.in_features, rank, self.alpha / self.rank, self.rank_gates)
            adapter.waits = self.init == "eva" and self.ranks is None  # those of a task file are known
            if parametrize.is_parametrized(layer, "weight"):
                place = parametrize_weight(layer, adapter.to(layer.weight.dtype))
            else:
                place = NAME
                attach(layer, NAME, adapter)
                layer.register_forward_hook(adapter.on_output)
            names |= {f"{path}.{NAME}.{part}": f"{path}.{place}.{part}" for part, _ in adapter.named_parameters()}
        return names

    @property
    def needs_images(self) -> bool:
        """For `init=eva`."""
        return self.init == "eva"

    @torch.no_grad()
    def initialise(self, network: nn.Module, run: Callable[[], None]) -> None:
        """Start A from the inputs of the layers, and share out the ranks."""
        if self.init != "eva":
            return
        layers = [(layer, module) for _, layer in _layers(network) if (module := _module_of(layer)) is not None]
        moments = _input_moments([layer for layer, _ in layers], run)
        values, vectors = zip(*(torch.linalg.eigh(moment) for moment in moments), strict=True)
        explained = [(each.flip(0) / each.sum()).tolist() for each in values]
        if self.ranks is None:
            self.set_found(network, ranks=shared_out(explained, self.rank * len(layers), most=2 * self.rank))
        assert self.ranks is not None
        for (_, module), vector, rank in zip(layers, vectors, self.ranks, strict=True):
            leading = vector.flip(1)[:, :rank].T.to(module.a)
            module.replace(leading.repeat(2, 1, 1), module.b.new_zeros(2, module.b.shape[1], rank))

    @torch.no_grad()
    def before_step(self, network: nn.Module) -> None:
        """Choose the rank up to which this step trains, the same for all layers."""
        if self.nested:
            most = max(self.ranks or [self.rank])
            active = int(torch.randint(1, most + 1, ()))
            for module in _modules(network):
                module.active = active

    @torch.no_grad()
    def after_step(self, network: nn.Module, lr: float) -> None:
        """Shrink the gates: the proximal step of their absolute values."""
        for module in _modules(network):
            if module.gate is not None:
                module.gate.copy_(F.softshrink(module.gate, lr * self.sparsity))

    @torch.no_grad()
    def finish(self, network: nn.Module) -> list[str]:
        """Cut off the ranks whose gates are zero, and multiply B by the other gates."""
        modules = _modules(network)
        for module in modules:
            module.active = None
        if not self.rank_gates:
            return []
        self.set_found(network, ranks=[module.cut_off() for module in modules], rank_gates=False)
        return [f"{path}.{NAME}.gate" for path, layer in _layers(network) if _module_of(layer) is not None]

    def found(self) -> dict[str, object]:
        """The rank of each layer, and that the gates are gone."""
        return {} if self.ranks is None else {"ranks": list(self.ranks), "rank_gates": self.rank_gates}

    @torch.no_grad()
    def truncate(self, network: nn.Module, rank: int) -> None:
        """Use the first ranks alone from now on, for which `nested=true` has trained them.

        Args:
            network: The network, changed in place. A task file that is saved from it has this rank.
            rank: Number of ranks to keep in each layer.

        Raises:
            UserError: If there are not as many.
        """
        modules = _modules(network)
        if not modules:
            raise UserError("network: expected one with MeLo in it, got one without")
        check_integer("rank", rank, 1, max(len(module.a[0]) for module in modules) + 1)
        for module in modules:
            module.replace(module.a[:, :rank].clone(), module.b[..., :rank].clone())
        self.set_found(network, ranks=[len(module.a[0]) for module in modules])

    @torch.no_grad()
    def measure(self, network: nn.Module) -> dict[str, float]:
        """The mean rank, as `adapter/rank`, where gates train."""
        gates = [module.gate for module in _modules(network) if module.gate is not None]
        return {"adapter/rank": sum(int((gate != 0).sum()) for gate in gates) / (2 * len(gates))} if gates else {}

    @staticmethod
    @torch.no_grad()
    def merge(network: nn.Module) -> None:
        """Add the updates to the weights and remove the modules."""
        merge_parametrized(network, LowRank)  # on templates, or where attention takes the weight itself
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
        gates: Whether each rank has a gate.

    Attributes:
        active: Number of ranks in use in training mode, from the first on; None for all. Evaluation uses all.
        waits: Whether A is to start from images first: `initialise` has to be called before training.
    """

    def __init__(self, width: int, rank: int, scale: float, gates: bool = False) -> None:
        super().__init__()
        self.scale = scale
        self.active: int | None = None
        self.waits = False
        self.a = nn.Parameter(torch.empty(2, rank, width))  # of the queries and of the values
        self.b = nn.Parameter(torch.zeros(2, width, rank))
        self.gate = nn.Parameter(torch.ones(2, rank)) if gates else None
        for part in self.a if rank else ():
            nn.init.kaiming_uniform_(part, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """Add the updates to the layer's weight [3d, d]; a parametrisation."""
        return torch.addmm(weight, self._up(), self._down())

    def on_output(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        """Add the updates to the layer's output [..., 3d]; a forward hook.

        One product computes and adds both updates. Splitting the output and concatenating it again would copy it in the
        forward and in the backward pass.
        """
        low = F.linear(inputs[0], self._down())
        return torch.addmm(output.flatten(0, -2), low.flatten(0, -2), self._up().t()).view_as(output)

    def replace(self, a: Tensor, b: Tensor) -> None:
        """Take other values of other ranks: A [2, r, d], B [2, d, r]."""
        self.waits = False
        self.a, self.b = (
            nn.Parameter(each, requires_grad=old.requires_grad) for each, old in ((a, self.a), (b, self.b))
        )
        if self.gate is not None:
            self.gate = nn.Parameter(self.gate.new_ones(2, a.shape[1]), requires_grad=self.gate.requires_grad)

    def cut_off(self) -> int:
        """Make the gates part of B, and leave out ranks whose gates are zero; the rank that is left.

        Queries and values keep as many ranks each: those of the one that needs more.
        """
        assert self.gate is not None
        rank = int((self.gate != 0).sum(1).max())
        kept = (self.gate != 0).int().argsort(dim=1, descending=True, stable=True)[:, :rank]
        b = self.b * self.gate[:, None]
        a = torch.stack([own[order] for own, order in zip(self.a, kept, strict=True)])
        b = torch.stack([own[:, order] for own, order in zip(b, kept, strict=True)])
        self.gate = None
        self.replace(a, b)
        return rank

    @property
    def _used(self) -> int | None:
        return self.active if self.training else None

    def _down(self) -> Tensor:
        """A of both updates, [2r, d]."""
        if self.waits and self.training:
            raise UserError(
                "init: expected random, or MeLo.initialise to be called before training, as it starts from images, "
                "got eva without it"
            )
        return self.a[:, : self._used].flatten(0, 1)

    def _up(self) -> Tensor:
        """The scaled B of both updates, [3d, 2r]: from [A_q x, A_v x] to queries, keys and values."""
        b = self.b if self.gate is None else self.b * self.gate[:, None]
        queries, values = self.scale * b[..., : self._used]
        nothing = torch.zeros_like(queries)
        rows = (queries, nothing), (nothing, nothing), (nothing, values)
        return torch.cat([torch.cat(row, 1) for row in rows])


def shared_out(explained: Sequence[Sequence[float]], total: int, most: int) -> list[int]:
    """Ranks of the layers: those directions of all layers that explain most of the variance of their layer's inputs.

    Args:
        explained: For each layer, the share of the variance that each direction explains, the largest first.
        total: Sum of the ranks.
        most: Largest rank of a layer. The smallest is 1.
    """
    ranks = [1] * len(explained)
    candidates = [(share, -layer) for layer, shares in enumerate(explained) for share in shares[1:most]]
    for _, layer in sorted(candidates, reverse=True)[: total - len(ranks)]:
        ranks[-layer] += 1
    return ranks


def _input_moments(layers: Sequence[nn.Module], run: Callable[[], None]) -> list[Tensor]:
    """The second moments of the inputs of layers, [d, d] each, float64, while images pass."""
    moments: dict[nn.Module, Tensor] = {}

    def add(module: nn.Module, inputs: tuple[Tensor]) -> None:
        rows = inputs[0].detach().flatten(0, -2).double()
        moments[module] = moments.get(module, torch.zeros((), dtype=rows.dtype, device=rows.device)) + rows.T @ rows

    hooks = [layer.register_forward_pre_hook(add) for layer in layers]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return [moments[layer].cpu() for layer in layers]


def _module_of(layer: nn.Module) -> LowRank | None:
    """The updates of a layer: its own module, or one of its parametrisations."""
    if isinstance(module := getattr(layer, NAME, None), LowRank):
        return module
    found = parametrizations(layer) if parametrize.is_parametrized(layer, "weight") else ()
    return next((module for module in found if isinstance(module, LowRank)), None)


def _modules(network: nn.Module) -> list[LowRank]:
    return [module for _, layer in _layers(network) if (module := _module_of(layer)) is not None]


def _layers(network: nn.Module) -> list[tuple[str, nn.Linear]]:
    found = linear_layers(network, ["qkv"])
    return [(path, layer) for path, layer in found if layer.out_features == 3 * layer.in_features]
