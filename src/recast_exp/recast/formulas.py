"""The mathematics of RECAST, tensor in and tensor out.

Notation, as in the paper (arXiv 2411.16870): a *group* of L consecutive layers shares n templates; K sets of
coefficients are averaged. Layer l's weight is

    W[l] = 1/K · Σ_k Σ_i C[l, k, i] · T[i]                                                     (reparameterisation)

Here a weight may be cut into B equal blocks of rows (the projections q, k, v or single heads), each with coefficients
of its own over the same templates; B = 1 is the paper. Shapes, throughout:

    weights       [L, rows, ...]      the group's pretrained weights, Linear or Conv2d
    templates     [n, rows, ...]
    coefficients  [L, K, B, n]        of the group; [K, B, n] for one layer

Neural Mimicry finds templates and coefficients for given weights, without data. `closed_form`, `gradient` and
`autoencoder` do it behind one signature; the first is exact for n = L and optimal for n < L.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

# The authors' numbers of optimisation steps.
DEFAULT_STEPS = {
    "gradient": {"linear": 1000, "convolution": 3000},
    "autoencoder": {"linear": 2500, "convolution": 2500},
}


class Mimicked(NamedTuple):
    """Templates [n, rows, ...] and coefficients [L, K, B, n] of one group, float32."""

    templates: Tensor
    coefficients: Tensor


def combine(coefficients: Tensor, templates: Tensor) -> Tensor:
    """Rebuild one layer's weight: average the K sets, then combine the templates once.

    Products and sums only, no matrix product: autocast would run that one in bfloat16, and TF32 would round it.

    Args:
        coefficients: [K, B, n].
        templates: [n, rows, ...], with rows divisible by B.

    Returns:
        The weight [rows, ...], of the templates' dtype.
    """
    mean = coefficients.mean(dim=0)
    num_blocks, num_templates = mean.shape
    blocks = templates.reshape(num_templates, num_blocks, -1)
    weight: Tensor = (mean.T.unsqueeze(-1) * blocks).sum(dim=0)
    shaped: Tensor = weight.reshape(templates.shape[1:])
    return shaped


def project(weight: Tensor, templates: Tensor, num_sets: int, num_blocks: int) -> Tensor:
    """Coefficients [K, B, n] whose combination is nearest to `weight` [rows, ...]: least squares, block by block.

    Solved in float64 by the pseudo-inverse of the templates' Gram matrix, so linearly dependent templates do no harm.
    """
    target = weight.reshape(num_blocks, -1).double()
    blocks = templates.reshape(templates.shape[0], num_blocks, -1).double()
    gram = torch.einsum("nbm,pbm->bnp", blocks, blocks)
    moments = torch.einsum("nbm,bm->bn", blocks, target)
    solution: Tensor = (torch.linalg.pinv(gram, hermitian=True) @ moments.unsqueeze(-1)).squeeze(-1)
    return solution.to(weight.dtype).expand(num_sets, -1, -1).clone()


def closed_form(weights: Tensor, num_templates: int, num_sets: int, num_blocks: int, *, seed: int) -> Mimicked:
    """The best templates and coefficients there are, without iterating.

    Per block, the best rank-n approximation of the stacked weights W [L, M] is U Uᵀ W with U [L, n] the leading left
    singular vectors (Eckart and Young, 1936); for n = L it is W itself. U are the eigenvectors of the small Gram matrix
    W Wᵀ [L, L]. Any invertible R gives the same weights from C = U R and T = R⁻¹ Uᵀ W: a random *orthogonal* R mixes
    the layers and keeps C perfectly conditioned. T solves C T = W for the C that is stored, so rounding C is free.
    """
    num_layers = weights.shape[0]
    stacked = weights.reshape(num_layers, num_blocks, -1).transpose(0, 1).double()  # [B, L, M]
    if num_templates < num_layers:
        basis = torch.linalg.eigh(stacked @ stacked.mT).eigenvectors[..., -num_templates:]
    else:
        basis = torch.eye(num_layers, dtype=stacked.dtype).expand(num_blocks, -1, -1)
    mixing = _random_orthogonal(num_templates, torch.Generator().manual_seed(seed))
    coefficients = (basis @ mixing.to(stacked)).float()  # [B, L, n]
    templates = torch.linalg.pinv(coefficients.double()) @ stacked  # [B, n, M]
    return Mimicked(
        templates.transpose(0, 1).float().reshape(num_templates, *weights.shape[1:]),
        coefficients.transpose(0, 1).unsqueeze(1).expand(-1, num_sets, -1, -1).clone(),
    )


def gradient(
    weights: Tensor,
    num_templates: int,
    num_sets: int,
    num_blocks: int,
    *,
    seed: int,
    steps: int | None = None,
    lr: float | None = None,
    step_size: int | None = None,
    noise: float | None = None,
    progress: Callable[[], None] = lambda: None,
) -> Mimicked:
    """The authors' recipe: RMSprop on SmoothL1(rebuilt, pretrained), gradient norm at most 1, the best step kept.

    Templates start kaiming-normal, coefficients as unit vectors. The authors scale the loss (2.0 for ViT, 3.5 and 2.5
    for ResNet); RMSprop's step does not depend on that scale, so it is left out.

    Args:
        weights: [L, rows, ...].
        num_templates: n.
        num_sets: K.
        num_blocks: B.
        seed: Seed of the start.
        steps: Steps; the authors' are 1000 for linear layers and 3000 for convolutions.
        lr: Learning rate; theirs are 0.1 and 0.2.
        step_size: Steps between drops of the rate to a tenth; theirs are 200 and 500.
        noise: Deviation of the noise on the first coefficients; theirs are 1e-4 and 0.
        progress: Called after each step.
    """
    convolution = weights.dim() > 2
    steps = steps or DEFAULT_STEPS["gradient"]["convolution" if convolution else "linear"]
    lr = lr or (0.2 if convolution else 0.1)
    step_size = step_size or (500 if convolution else 200)
    noise = noise if noise is not None else (0.0 if convolution else 1e-4)

    generator = torch.Generator().manual_seed(seed)
    templates, coefficients = _authors_start(weights, num_templates, num_sets, num_blocks, generator)
    coefficients = coefficients + noise * torch.randn(coefficients.shape, generator=generator)
    parameters = [templates.requires_grad_(), coefficients.requires_grad_()]
    optimizer = torch.optim.RMSprop(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size, gamma=0.1)
    best_loss, best = float("inf"), Mimicked(templates.detach().clone(), coefficients.detach().clone())
    for _ in range(steps):
        loss = F.smooth_l1_loss(_combine_group(coefficients, templates), weights)
        if loss.item() < best_loss:
            best_loss, best = loss.item(), Mimicked(templates.detach().clone(), coefficients.detach().clone())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        progress()
    return best


def autoencoder(
    weights: Tensor,
    num_templates: int,
    num_sets: int,
    num_blocks: int,
    *,
    seed: int,
    steps: int | None = None,
    lr: float | None = None,
    hidden: int = 8,
    progress: Callable[[], None] = lambda: None,
) -> Mimicked:
    """The authors' "VAE", which is a plain autoencoder: an encoder gives the coefficients, the bank decodes them.

    Encoder: Linear(M → hidden), LeakyReLU, Linear(hidden → hidden), LeakyReLU, Linear(hidden → K·n), per block of
    M numbers. RMSprop 2e-3 with a cosine schedule, 2500 steps, the step with the best cosine similarity kept. Trained
    on the mean squared error of unit-scaled weights (the scale is put back into the templates).

    Args:
        weights: [L, rows, ...].
        num_templates: n.
        num_sets: K.
        num_blocks: B.
        seed: Seed of the start.
        steps: Steps; the authors' are 2500.
        lr: Learning rate; theirs is 2e-3.
        hidden: Width of the encoder; theirs is 8.
        progress: Called after each step.
    """
    steps, lr = steps or DEFAULT_STEPS["autoencoder"]["linear"], lr or 2e-3
    num_layers = weights.shape[0]
    scale = weights.square().mean().sqrt().clamp_min(1e-12)
    scaled = weights / scale
    generator = torch.Generator().manual_seed(seed)
    templates, _ = _authors_start(weights, num_templates, num_sets, num_blocks, generator)
    templates = (templates / templates.square().mean().sqrt()).requires_grad_()
    inputs = scaled.reshape(num_layers * num_blocks, -1)
    widths = [inputs.shape[1], hidden, hidden, num_sets * num_templates]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Linear(*pair) for pair in itertools.pairwise(widths)]
    encoder = nn.Sequential(layers[0], nn.LeakyReLU(), layers[1], nn.LeakyReLU(), layers[2]).to(weights.device)
    optimizer = torch.optim.RMSprop([*encoder.parameters(), templates], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    best_similarity, best = -float("inf"), None
    for _ in range(steps):
        encoded = encoder(inputs).reshape(num_layers, num_blocks, num_sets, num_templates).transpose(1, 2)
        rebuilt = _combine_group(encoded, templates)
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


# Each: (weights, num_templates, num_sets, num_blocks, *, seed, ...) -> Mimicked.
SOLVERS: dict[str, Callable[..., Mimicked]] = {
    "closed_form": closed_form,
    "gradient": gradient,
    "autoencoder": autoencoder,
}


def relative_error(rebuilt: Tensor, weights: Tensor) -> Tensor:
    """‖rebuilt - weights‖ / ‖weights‖ per layer: [L, ...] each → [L]."""
    difference: Tensor = (rebuilt.double() - weights.double()).flatten(1).norm(dim=1)
    scale: Tensor = weights.double().flatten(1).norm(dim=1)
    return difference / scale.clamp_min(1e-30)


def cosine_similarity(first: Tensor, second: Tensor) -> Tensor:
    """Cosine of the angle between two stacks of tensors: [L, ...] each → [L]."""
    return F.cosine_similarity(first.flatten(1).double(), second.flatten(1).double(), dim=1)


def _combine_group(coefficients: Tensor, templates: Tensor) -> Tensor:
    return torch.stack([combine(layer, templates) for layer in coefficients])


def _random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix [size, size], float64: the Q of a Gaussian's QR, with signs fixed by R's diagonal."""
    q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    signed: Tensor = q * r.diagonal().sign()
    return signed


def _authors_start(
    weights: Tensor, num_templates: int, num_sets: int, num_blocks: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Kaiming-normal templates and unit vectors as coefficients (`orthogonal_` on the shape (n, 1, 1))."""
    fan_in = weights[0, 0].numel()
    templates = torch.randn((num_templates, *weights.shape[1:]), generator=generator) * (2.0 / fan_in) ** 0.5
    directions = torch.randn((weights.shape[0], num_sets, num_blocks, num_templates), generator=generator)
    return templates.to(weights), F.normalize(directions, dim=-1).to(weights)
