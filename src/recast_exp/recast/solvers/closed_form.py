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

COLUMNS = 2**16
"""Columns of W at once: float64 copies of larger parts leave the processor's cache, and take ten times as long."""


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
    stacked = weights.reshape(num_layers, num_blocks, -1).transpose(0, 1)  # [B, L, M]
    if num_templates < num_layers:
        doubled = stacked.double()
        basis = torch.linalg.eigh(doubled @ doubled.mT).eigenvectors[..., -num_templates:]
    else:
        basis = torch.eye(num_layers, dtype=torch.float64).expand(num_blocks, -1, -1)
    mixing = _random_orthogonal(num_templates, torch.Generator().manual_seed(seed))
    coefficients = (basis @ mixing).float()  # [B, L, n]
    inverse = torch.linalg.pinv(coefficients.double())
    templates = weights.new_empty(num_templates, *weights.shape[1:], dtype=torch.float32)
    made = templates.view(num_templates, num_blocks, -1).transpose(0, 1)  # [B, n, M]
    for part, columns in zip(torch.split(made, COLUMNS, -1), torch.split(stacked, COLUMNS, -1), strict=True):
        part.copy_(inverse @ columns.double())
    return Mimicked(templates, coefficients.transpose(0, 1).unsqueeze(1).expand(-1, num_sets, -1, -1).clone())


def _random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix [size, size], float64: the Q of a Gaussian's QR, with signs fixed by R's diagonal."""
    q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    signed: Tensor = q * r.diagonal().sign()
    return signed
