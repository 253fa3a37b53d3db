"""Gradient: the authors' recipe, RMSprop on SmoothL1(rebuilt, pretrained) with a gradient norm of at most 1.

The step with the lowest loss is kept. Templates start Kaiming-normal, coefficients as unit vectors. The authors scale
the loss (2.0 for ViT, 3.5 and 2.5 for ResNet); RMSprop's step does not depend on that scale, so it is left out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from recast_exp.recast.formulas import Mimicked, authors_start, combine_group


def num_steps(weights: Tensor, *, steps: int | None = None, **others: object) -> int:
    """The number of steps of `solve` for weights [L, rows, ...]; the authors' is 1000, or 3000 for convolutions."""
    return steps or (3000 if _are_convolutions(weights) else 1000)


def _are_convolutions(weights: Tensor) -> bool:
    """Of stacked weights: [L, out, in, height, width], where linear layers have [L, out, in]."""
    return weights.dim() == 5


def solve(
    weights: Tensor,
    num_templates: int,
    num_sets: int,
    num_blocks: int,
    *,
    seed: int,
    progress: Callable[[], None] = lambda: None,
    steps: int | None = None,
    lr: float | None = None,
    step_size: int | None = None,
    noise: float | None = None,
) -> Mimicked:
    """Descend from a random start. None as an option takes the authors' value.

    Args:
        weights: [L, rows, ...].
        num_templates: Number n of templates.
        num_sets: Number K of sets of coefficients.
        num_blocks: Number B of blocks of rows.
        seed: Seed of the random start.
        progress: Called after each step.
        steps: Number of steps; the authors' are 1000 for linear layers and 3000 for convolutions.
        lr: Learning rate; the authors' are 0.1 and 0.2.
        step_size: Number of steps between drops of the learning rate to a tenth; the authors' are 200 and 500.
        noise: Standard deviation of the noise on the first coefficients; the authors' are 1e-4 and 0.
    """
    convolution = _are_convolutions(weights)
    lr = lr or (0.2 if convolution else 0.1)
    step_size = step_size or (500 if convolution else 200)
    noise = noise if noise is not None else (0.0 if convolution else 1e-4)

    generator = torch.Generator().manual_seed(seed)
    templates, coefficients = authors_start(weights, num_templates, num_sets, num_blocks, generator)
    coefficients = coefficients + noise * torch.randn(coefficients.shape, generator=generator)
    parameters = [templates.requires_grad_(), coefficients.requires_grad_()]
    optimizer = torch.optim.RMSprop(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size, gamma=0.1)
    best_loss, best = float("inf"), Mimicked(templates.detach().clone(), coefficients.detach().clone())
    for _ in range(num_steps(weights, steps=steps)):
        loss = F.smooth_l1_loss(combine_group(coefficients, templates), weights)
        if loss.item() < best_loss:
            best_loss, best = loss.item(), Mimicked(templates.detach().clone(), coefficients.detach().clone())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        progress()
    return best
