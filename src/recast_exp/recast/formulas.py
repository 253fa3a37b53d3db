"""The mathematics of RECAST, tensor in and tensor out.

Notation, as in the paper (arXiv 2411.16870): a *group* of L consecutive layers shares n templates; K sets of
coefficients are averaged. Layer l's weight is

    W[l] = 1/K · Σ_k Σ_i C[l, k, i] · T[i]                                                     (reparameterisation)

Here a weight may be divided into B equal blocks of rows (the projections q, k and v, or single heads), each with
coefficients of its own for the same templates; the paper has B = 1. Shapes:

    weights       [L, rows, ...]      the group's pretrained weights, Linear or Conv2d
    templates     [n, rows, ...]
    coefficients  [L, K, B, n]        of the group; [K, B, n] for one layer

Templates that do not come from the weights themselves are *added* to the frozen weight, and their coefficients start at
zero. Templates of rank one, T[i, j] = u[i] v[j]ᵀ, are kept as their factors; c is then a diagonal or a full matrix:

    W'[l] = W[l] + Σ_i c[l, i] T[i]                                                            (added; NOLA, aTLAS)
    W'[l] = W[l] + U[l]ᵀ diag(c[l]) V                                                          (scales; SVF)
    W'[l] = W[l] + U[l]ᵀ c[l] V                                                                (matrix; LoRA-XS)
    W'[l] = W[l] + U[l]ᵀ (SiLU(c[l]) - I) V,   starting at SiLU(c[l]) = I                       (gated; after CRISP)

    factors       [r, L · rows + columns]   U[l] [r, rows] of each layer of the group, then V [r, columns]

Neural Mimicry finds templates and coefficients for given weights, without data. `recast_exp.recast.solvers` holds its
solvers, one module each, all with the same signature.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

MIXINGS = ("sum", "scales", "matrix", "gated")
"""How coefficients and templates make a weight: the sum of whole templates, or one of the ways of their factors."""

OPEN = 1.2784645427610738
"""The number whose SiLU is 1."""


class Mimicked(NamedTuple):
    """Templates [n, rows, ...], or factors [r, ...], and coefficients [L, K, B, n] of one group, float32."""

    templates: Tensor
    coefficients: Tensor


def combine(coefficients: Tensor, templates: Tensor) -> Tensor:
    """Rebuild one layer's weight: average the K sets, then combine the templates once.

    Uses products and sums only, no matrix product: autocast would run it in bfloat16, and TF32 would round it.

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


def combine_factors(coefficients: Tensor, factors: Tensor, index: int, shape: Sequence[int], mixing: str) -> Tensor:
    """The change of one layer's weight by templates of rank one, which are kept as their factors.

    Args:
        coefficients: [K, B, r] for `scales`, [K, B, r²] otherwise.
        factors: [r, L · rows + columns].
        index: Place of the layer among the L of its group.
        shape: Shape of its weight.
        mixing: `scales`, `matrix` or `gated`.

    Returns:
        [rows, ...], of the factors' dtype; exactly 0 for coefficients as they start.
    """
    rows, columns = shape[0], math.prod(shape[1:])
    left, right = factors[:, index * rows : (index + 1) * rows], factors[:, -columns:]
    rank, mean = len(factors), coefficients.mean(dim=0).to(factors.dtype)
    blocks = left.reshape(rank, len(mean), -1)  # [r, B, rows / B]
    if mixing == "scales":
        mixed = blocks * mean.T.unsqueeze(-1)
    else:
        mixer = mean.reshape(-1, rank, rank)
        if mixing == "gated":
            mixer = F.silu(mixer) - F.silu(OPEN * torch.eye(rank).to(mixer))
        mixed = torch.einsum("brs,rbm->sbm", mixer, blocks)
    change: Tensor = mixed.reshape(rank, rows).T @ right
    return change.reshape(tuple(shape))


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
"""How templates may be kept."""


def rounded(templates: Tensor, dtype: str) -> tuple[Tensor, Tensor | None]:
    """Templates as they are kept, in fewer bits.

    Args:
        templates: [n, rows, ...], or factors [r, ...]; float32.
        dtype: One of `DTYPES`. Integers have a scale for each row of a template, of eight binary digits, so that the
            product of both is exact in float32.

    Returns:
        The values, of that dtype, and the scales [n, rows, 1, ...] of integers, float32; None without.
    """
    if dtype != "int8":
        return templates.to(DTYPES[dtype]), None
    rows = tuple(range(min(2, templates.dim() - 1), templates.dim()))
    scales = templates.abs().amax(dim=rows, keepdim=True).clamp_min(1e-30) / 127
    mantissa, exponent = torch.frexp(scales)
    scales = torch.ldexp(torch.ceil(mantissa * 256) / 256, exponent)
    return torch.round(templates / scales).to(torch.int8), scales


def unrounded(values: Tensor, scales: Tensor | None) -> Tensor:
    """The templates that `rounded` keeps, to compute with."""
    if scales is not None:
        return values.to(scales.dtype) * scales
    return values.float() if values.dtype == torch.bfloat16 else values


def first_coefficients(num_layers: int, num_sets: int, num_blocks: int, count: int, mixing: str) -> Tensor:
    """Coefficients [L, K, B, count] of templates that are added to a weight, which do not change it."""
    start = torch.zeros(num_layers, num_sets, num_blocks, count)
    if mixing == "gated":
        start[...] = OPEN * torch.eye(math.isqrt(count)).flatten()
    return start


def project(weight: Tensor, templates: Tensor, num_sets: int, num_blocks: int) -> Tensor:
    """Find the coefficients whose combination is nearest to a weight: least squares, block by block.

    Solved in float64 with the pseudo-inverse of the templates' Gram matrix, which also handles linearly dependent
    templates.

    Args:
        weight: [rows, ...].
        templates: [n, rows, ...].
        num_sets: Number K of sets of coefficients; all sets are equal.
        num_blocks: Number B of blocks of rows.

    Returns:
        [K, B, n], of the weight's dtype.
    """
    target = weight.reshape(num_blocks, -1).double()
    blocks = templates.reshape(templates.shape[0], num_blocks, -1).double()
    gram = torch.einsum("nbm,pbm->bnp", blocks, blocks)
    moments = torch.einsum("nbm,bm->bn", blocks, target)
    solution: Tensor = (torch.linalg.pinv(gram, hermitian=True) @ moments.unsqueeze(-1)).squeeze(-1)
    return solution.to(weight.dtype).expand(num_sets, -1, -1).clone()


def relative(coefficients: Tensor, start: Tensor) -> Tensor:
    """Express the weights of a group by its pretrained weights instead of by templates.

    With the mimicked coefficients C₀, W = C₀ T; a task has W' = C T. As C C₀⁺ C₀ = C,

        W'[l] = Σ_j A[l, j] W[j],    A = C C₀⁺                                                    (relative form)

    where W are the pretrained weights for n = L, and their best approximation of rank n for n < L. A does not depend on
    how templates are mixed: it is the same for every seed of the closed form, and on every machine to within rounding.
    For n = L it is the identity before training; A[l, l] is the gain of layer l, A[l, j] what it takes from layer j.

    Args:
        coefficients: [L, K, B, n], of a task.
        start: [L, K, B, n], mimicked.

    Returns:
        A [L, B, L], float64.
    """
    after, before = coefficients.double().mean(1).transpose(0, 1), start.double().mean(1).transpose(0, 1)  # [B, L, n]
    shares: Tensor = (after @ torch.linalg.pinv(before)).transpose(0, 1)
    return shares.contiguous()


def from_relative(shares: Tensor, start: Tensor) -> Tensor:
    """The inverse of `relative` for templates with the mimicked coefficients `start`; all K sets are equal.

    Args:
        shares: A [L, B, L].
        start: [L, K, B, n], mimicked.

    Returns:
        [L, K, B, n], of the dtype of `start`.
    """
    before = start.double().mean(1).transpose(0, 1)
    mean = (shares.double().transpose(0, 1) @ before).transpose(0, 1)  # [L, B, n]
    return mean.unsqueeze(1).expand_as(start).to(start.dtype).clone()


def relative_error(rebuilt: Tensor, weights: Tensor) -> Tensor:
    """‖rebuilt - weights‖ / ‖weights‖ of each layer: [L, ...] each → [L], float64."""
    difference: Tensor = (rebuilt.double() - weights.double()).flatten(1).norm(dim=1)
    scale: Tensor = weights.double().flatten(1).norm(dim=1)
    return difference / scale.clamp_min(1e-30)


def cosine_similarity(first: Tensor, second: Tensor) -> Tensor:
    """Cosine of the angle between two stacks of tensors: [L, ...] each → [L], float64."""
    return F.cosine_similarity(first.flatten(1).double(), second.flatten(1).double(), dim=1)


def combine_group(coefficients: Tensor, templates: Tensor) -> Tensor:
    """Rebuild the weights of a group: coefficients [L, K, B, n], templates [n, rows, ...] → [L, rows, ...]."""
    return torch.stack([combine(layer, templates) for layer in coefficients])


def authors_start(
    weights: Tensor, num_templates: int, num_sets: int, num_blocks: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The authors' random start: Kaiming-normal templates, unit vectors as coefficients.

    The unit vectors are the result of their `orthogonal_` for the shape (n, 1, 1).

    Returns:
        Templates [n, rows, ...] and coefficients [L, K, B, n], of the weights' dtype and on their device.
    """
    fan_in = weights[0, 0].numel()
    templates = torch.randn((num_templates, *weights.shape[1:]), generator=generator) * (2.0 / fan_in) ** 0.5
    directions = torch.randn((weights.shape[0], num_sets, num_blocks, num_templates), generator=generator)
    return templates.to(weights), F.normalize(directions, dim=-1).to(weights)
