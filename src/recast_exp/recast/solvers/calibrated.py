"""Calibrated: the closed form, then templates and coefficients that keep the layers' outputs instead of their weights.

With fewer templates than layers, something of the weights is lost; inputs say what matters least. For images without
labels, layer l of the pretrained model has the inputs x, that of the model with templates the inputs x̂, which earlier
layers have changed. Sought are templates T and coefficients c with the least

    Σ_l w[l] · (E ‖W[l] x - Ŵ[l] x̂‖² + λ[l] ‖W[l] - Ŵ[l]‖²),   Ŵ[l] = Σ_i c[l, i] T[i]
    w[l] = 1 / (E ‖W[l] x̂‖² + λ[l] ‖W[l]‖²), so that every layer counts alike

Either of both is a linear least-squares problem if the other is given, and depends on the images through the second
moments G[l] = E x̂ x̂ᵀ + λ[l] I and H[l] = E x x̂ᵀ + λ[l] I alone:

    c[l] = A⁻¹ b,   A[i, j] = ⟨T[i] G[l], T[j]⟩,   b[i] = ⟨T[i], W[l] H[l]⟩
    [T[1] … T[n]] = (Σ_l w[l] c[l]ᵀ ⊗ W[l] H[l]) · (Σ_l w[l] c[l] c[l]ᵀ ⊗ G[l])⁻¹

They take turns. The groups follow in the order of the model, each with the inputs that the groups before it have left,
as in GPTQ (Frantar et al., 2023, arXiv 2210.17323), which does so for rounding. What no group can mend by itself is
then minimised for all of them at once, with gradients through the whole model: `recast/matching.py`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from recast_exp.errors import UserError, first_line
from recast_exp.recast.formulas import Mimicked, combine
from recast_exp.recast.matching import match
from recast_exp.recast.solvers import closed_form

PASSES = 2
STEPS = 100
LR = 1e-3
MOST_BLOCKS = 64  # of rows: each needs a system of its own


def solve(
    weights: Tensor,
    num_templates: int,
    num_sets: int,
    num_blocks: int,
    *,
    seed: int,
    progress: Callable[[], None] = lambda: None,
) -> Mimicked:
    """The start: as the closed form."""
    return closed_form.solve(weights, num_templates, num_sets, num_blocks, seed=seed, progress=progress)


def refine(
    network: nn.Module,
    groups: Sequence[tuple[Sequence[str], Mimicked]],
    batches: Callable[[], Iterator[Tensor]],
    *,
    seed: int,
    progress: Callable[[], None] = lambda: None,
    passes: int = PASSES,
    rounds: int = 2,
    damping: float = 1e-2,
    steps: int | None = None,
    lr: float | None = None,
) -> list[Mimicked]:
    """Fit templates and coefficients to the outputs of the layers, then to the features of the model.

    Args:
        network: The pretrained model in evaluation mode, float32.
        groups: The layers of each group, and where their templates and coefficients start.
        batches: Gives the images anew, batch after batch: [N, 3, H, W].
        seed: Seed of the batches of the last part.
        progress: Called after each group of a pass, and for each group after a step.
        passes: How often all groups are fitted, one after the other.
        rounds: How often the inputs of a group are measured in a pass, as its own layers change them, too.
        damping: λ, as a part of the mean second moment of an input.
        steps: Number of steps for all groups at once; None is 100.
        lr: First learning rate of these steps; None is 1e-3.

    Returns:
        For each group, its templates and coefficients; those that rebuild the weights exactly stay as they are.

    Raises:
        UserError: If a layer is a convolution in groups, or is divided into too many blocks of rows.
    """
    changed = copy.deepcopy(network)
    for names, start in groups:
        _check(names[0], network.get_submodule(names[0]), start)
    found = [start for _, start in groups]
    places = {name: number for number, (name, _) in enumerate(network.named_modules())}
    order = sorted(range(len(groups)), key=lambda number: places[groups[number][0][0]])
    for _ in range(passes):
        for number in order:
            names, _ = groups[number]
            if len(found[number].templates) < len(names):
                weights = torch.stack([_weight(network, name) for name in names])
                for _ in range(rounds):
                    found[number] = _fitted(weights, found[number], _moments(network, changed, names, batches), damping)
                    for name, coefficients in zip(names, found[number].coefficients, strict=True):
                        _weight(changed, name).copy_(combine(coefficients, found[number].templates))
            progress()
    return _matched(network, groups, found, batches, steps or STEPS, lr or LR, seed, progress)


def num_steps(weights: Tensor, *, passes: int = PASSES, steps: int | None = None, **others: object) -> int:
    """How often `refine` calls `progress` for a group."""
    return passes + (steps or STEPS)


def _matched(
    network: nn.Module,
    groups: Sequence[tuple[Sequence[str], Mimicked]],
    found: Sequence[Mimicked],
    batches: Callable[[], Iterator[Tensor]],
    steps: int,
    lr: float,
    seed: int,
    progress: Callable[[], None],
) -> list[Mimicked]:
    """All groups at once, but for those that rebuild the weights exactly."""

    def advance() -> None:
        for _ in groups:
            progress()

    lossy = [number for number, (names, _) in enumerate(groups) if len(found[number].templates) < len(names)]
    if not lossy:
        return list(found)
    images = torch.cat(list(batches()))
    starts = [(groups[number][0], found[number]) for number in lossy]
    matched = match(network, starts, images, steps=steps, lr=lr, seed=seed, progress=advance)
    own = dict(zip(lossy, matched, strict=True))
    return [own.get(number, each) for number, each in enumerate(found)]


def _weight(network: nn.Module, name: str) -> Tensor:
    return network.get_parameter(f"{name}.weight").data


def _check(name: str, layer: nn.Module, start: Mimicked) -> None:
    if isinstance(layer, nn.Conv2d) and (layer.groups > 1 or isinstance(layer.padding, str)):
        raise UserError(
            f"targets: expected linear layers, or convolutions without groups, with mimicry=calibrated, got {name}; "
            "leave it out, or use mimicry=closed_form"
        )
    if (blocks := start.coefficients.shape[2]) > MOST_BLOCKS:
        raise UserError(
            f"granularity: expected at most {MOST_BLOCKS} blocks of rows with mimicry=calibrated, got {blocks} ({name})"
        )


def _fitted(weights: Tensor, start: Mimicked, moments: Sequence[tuple[Tensor, Tensor]], damping: float) -> Mimicked:
    """One turn of coefficients and templates, block by block.

    Args:
        weights: The pretrained weights [L, rows, ...].
        start: Templates [n, rows, ...] and coefficients [L, K, B, n].
        moments: G and H [columns, columns] of each layer, float64.
        damping: λ, as a part of the mean second moment of an input.
    """
    num_layers, num_templates = len(weights), len(start.templates)
    num_sets, num_blocks = start.coefficients.shape[1:3]
    own = weights.double().reshape(num_layers, num_blocks, -1, moments[0][0].shape[0])  # [L, B, rows / B, columns]
    templates = start.templates.double().reshape(num_templates, *own.shape[1:])
    coefficients = start.coefficients.double().mean(1)  # [L, B, n]
    # λ w ‖W - Ŵ‖² as a part of the moments
    damped = [
        tuple(each + damping * g.diagonal().mean() * torch.eye(len(g), dtype=g.dtype) for each in (g, h))
        for g, h in moments
    ]
    scales = [1 / (weight @ g * weight).sum().clamp_min(1e-30) for weight, (g, _) in zip(own, damped, strict=True)]
    new_templates, new_coefficients = torch.empty_like(templates), torch.empty_like(coefficients)
    for block in range(num_blocks):
        targets = [own[layer, block] @ h for layer, (_, h) in enumerate(damped)]
        of_block = templates[:, block]  # [n, rows, columns]
        system: Tensor | float = 0.0
        right: Tensor | float = 0.0
        for layer, (g, _) in enumerate(damped):
            products = of_block @ g
            a = torch.einsum("irc,jrc->ij", products, of_block)
            b = torch.einsum("irc,rc->i", of_block, targets[layer])
            c = torch.linalg.pinv(a, hermitian=True) @ b
            new_coefficients[layer, block] = c
            system = system + scales[layer] * torch.kron(torch.outer(c, c), g)
            right = right + scales[layer] * torch.kron(c[None], targets[layer])
        assert isinstance(system, Tensor)
        assert isinstance(right, Tensor)
        # Coefficients that are nearly dependent make the system nearly singular
        system = system + 1e-9 * system.diagonal().mean() * torch.eye(len(system), dtype=system.dtype)
        solved = torch.cholesky_solve(right.T, torch.linalg.cholesky(system)).T  # [rows, n · columns]
        new_templates[:, block] = solved.reshape(len(solved), num_templates, -1).transpose(0, 1)
    shaped = new_coefficients.float().unsqueeze(1).expand(-1, num_sets, -1, -1).clone()
    return Mimicked(new_templates.float().reshape(start.templates.shape), shaped)


def _moments(
    network: nn.Module, changed: nn.Module, names: Sequence[str], batches: Callable[[], Iterator[Tensor]]
) -> list[tuple[Tensor, Tensor]]:
    """G = E x̂ x̂ᵀ and H = E x x̂ᵀ of each layer, float64: x are its inputs in the network, x̂ in the changed one."""
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    count = 0
    for batch in batches():
        before, after = (_inputs(each, names, batch) for each in (network, changed))
        for name in names:
            g, h = ((each[name].T @ after[name]).double().cpu() for each in (after, before))
            sums[name] = (sums[name][0] + g, sums[name][1] + h) if name in sums else (g, h)
        count += len(after[names[0]])
    return [(sums[name][0] / count, sums[name][1] / count) for name in names]


class _Enough(Exception):  # noqa: N818 - nothing went wrong
    """All that is wanted of a forward pass is there."""


def _inputs(network: nn.Module, names: Sequence[str], batch: Tensor) -> dict[str, Tensor]:
    """The inputs of layers as rows [M, columns], float32: those of a convolution are its patches."""
    found: dict[str, Tensor] = {}
    try:
        with _watching(network, names, found), suppress(_Enough):
            network(batch)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(
            f"images: expected those of the size that the model takes, got {list(batch.shape)} ({first_line(error)})"
        ) from error
    if missing := [name for name in names if name not in found]:
        raise UserError(
            f"targets: expected layers that the model calls, with mimicry=calibrated, got {missing[0]}, whose weight "
            "it takes by itself; leave it out, or use mimicry=closed_form"
        )
    return found


@contextmanager
def _watching(network: nn.Module, names: Sequence[str], found: dict[str, Tensor]) -> Iterator[None]:
    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor]) -> None:
            found[name] = _rows(module, inputs[0])
            if len(found) == len(names):
                raise _Enough

        return hook

    hooks = [network.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _rows(layer: nn.Module, inputs: Tensor) -> Tensor:
    if isinstance(layer, nn.Conv2d):
        assert not isinstance(layer.padding, str)
        patches = F.unfold(inputs, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        return patches.transpose(1, 2).flatten(0, 1).float()
    return inputs.reshape(math.prod(inputs.shape[:-1]), -1).float()
