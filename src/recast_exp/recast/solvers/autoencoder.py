"""Autoencoder: the authors' "VAE", although nothing is sampled: an encoder gives coefficients, the bank decodes them.

Encoder: Linear(M → hidden), LeakyReLU, Linear(hidden → hidden), LeakyReLU, Linear(hidden → K·n), for each block of M
entries of a weight. RMSprop at 2e-3 with a cosine schedule for 2500 steps; the step with the best cosine similarity is
kept. The loss is the mean squared error of weights scaled to unit size; the templates are scaled back at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from recast_exp.recast.formulas import Mimicked, authors_start, combine_group, cosine_similarity


def num_steps(weights: Tensor, *, steps: int | None = None, **others: object) -> int:
    """The number of steps that `solve` makes; the authors' is 2500, whatever the weights."""
    return steps or 2500


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
    hidden: int = 8,
) -> Mimicked:
    """Train the encoder and the templates.

    Args:
        weights: [L, rows, ...].
        num_templates: Number n of templates.
        num_sets: Number K of sets of coefficients.
        num_blocks: Number B of blocks of rows.
        seed: Seed of the random start.
        progress: Called after each step.
        steps: Number of steps; None is the authors' 2500.
        lr: Learning rate; None is the authors' 2e-3.
        hidden: Width of the encoder; the authors' is 8.
    """
    steps, lr = num_steps(weights, steps=steps), lr or 2e-3
    num_layers = weights.shape[0]
    scale = weights.square().mean().sqrt().clamp_min(1e-12)
    scaled = weights / scale
    generator = torch.Generator().manual_seed(seed)
    templates, _ = authors_start(weights, num_templates, num_sets, num_blocks, generator)
    templates = (templates / templates.square().mean().sqrt()).requires_grad_()
    inputs = scaled.reshape(num_layers * num_blocks, -1)
    encoder = _encoder(inputs.shape[1], hidden, num_sets * num_templates, seed).to(weights.device)
    optimizer = torch.optim.RMSprop([*encoder.parameters(), templates], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    best_similarity, best = -float("inf"), None
    for _ in range(steps):
        encoded = encoder(inputs).reshape(num_layers, num_blocks, num_sets, num_templates).transpose(1, 2)
        rebuilt = combine_group(encoded, templates)
        similarity = cosine_similarity(rebuilt.detach(), scaled).mean().item()
        if best is None or similarity > best_similarity:
            best_similarity = similarity
            best = Mimicked(templates.detach() * scale, encoded.detach().clone())
        optimizer.zero_grad()
        torch.autograd.backward(F.mse_loss(rebuilt, scaled))
        optimizer.step()
        schedule.step()
        progress()
    assert best is not None
    return best


def _encoder(inputs: int, hidden: int, outputs: int, seed: int) -> nn.Module:
    """The encoder, initialised as torch does by default, but from a generator of its own."""
    generator = torch.Generator().manual_seed(seed)

    def linear(width: int, rows: int) -> nn.Linear:
        layer: nn.Linear = nn.utils.skip_init(nn.Linear, width, rows)  # type: ignore[no-untyped-call]
        nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
        bound = 1 / math.sqrt(width)
        nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
        return layer

    first, second, last = linear(inputs, hidden), linear(hidden, hidden), linear(hidden, outputs)
    return nn.Sequential(first, nn.LeakyReLU(), second, nn.LeakyReLU(), last)
