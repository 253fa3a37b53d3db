"""Closed form: the optimal templates and coefficients, without iterating.

Per block, the best rank-n approximation of the stacked weights W [L, M] is U Uᵀ W with U [L, n] the leading left
singular vectors (Eckart and Young, 1936); for n = L it is W itself. U are the eigenvectors of the small Gram matrix
W Wᵀ [L, L]. Any invertible R gives the same weights from C = U R and T = R⁻¹ Uᵀ W: a random *orthogonal* R mixes the
layers and keeps C perfectly conditioned. T solves C T = W for the stored C, so rounding C costs no accuracy.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from recast_exp.recast.formulas import Mimicked


def solve(
    weights: Tensor,
    num_templates: int,
    num_sets: int,
    num_blocks: int,
    *,
    seed: int,
    progress: Callable[[], None] = lambda: None,
) -> Mimicked:
    """Find templates and coefficients: exact for n = L, optimal for n < L.

    Args:
        weights: [L, rows, ...].
        num_templates: Number n of templates, at most L.
        num_sets: Number K of sets of coefficients; all sets are equal.
        num_blocks: Number B of blocks of rows.
        seed: Seed of the mixing matrix R.
        progress: Not called, as there are no steps.
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


def _random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix [size, size], float64: the Q of a Gaussian's QR, with signs fixed by R's diagonal."""
    q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    signed: Tensor = q * r.diagonal().sign()
    return signed
