"""The mathematics against independent implementations: numpy's einsum, lstsq and SVD, and finite differences."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from recast_exp.recast.formulas import SOLVERS, autoencoder, closed_form, combine, gradient, project, relative_error

SHAPES = {"linear": (12, 10), "convolution": (12, 4, 3, 3), "depthwise": (12, 1, 3, 3)}
ITERATIVE = {"gradient": gradient, "autoencoder": autoencoder}
# Options with which a solver gets within a factor of the least error on the small weights here.
CLOSE = {"gradient": ({"steps": 500}, 1.02), "autoencoder": ({"steps": 500, "lr": 1e-2}, 1.25)}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rebuilt(coefficients: Tensor, templates: Tensor) -> Tensor:
    return torch.stack([combine(layer, templates) for layer in coefficients])


def squared_error(found: tuple[Tensor, Tensor], weights: Tensor) -> float:
    return (rebuilt(found[1], found[0]).double() - weights.double()).square().sum().item()


def least_squared_error(weights: Tensor, num_templates: int, num_blocks: int = 1) -> float:
    """Eckart-Young by numpy: what the singular values beyond the n-th leave, block by block."""
    stacked = weights.double().numpy().reshape(len(weights), num_blocks, -1)
    values = [np.linalg.svd(stacked[:, block], compute_uv=False) for block in range(num_blocks)]
    return float(sum((each[num_templates:] ** 2).sum() for each in values))


# combine


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("sets", "blocks", "templates"), [(1, 1, 1), (2, 1, 2), (3, 4, 5)])
def test_combine_is_the_mean_over_sets_of_the_weighted_sum(
    shape: tuple[int, ...], sets: int, blocks: int, templates: int
) -> None:
    coefficients, bank = random(sets, blocks, templates), random(templates, *shape, seed=1)
    expected = np.zeros(shape)
    rows = shape[0] // blocks
    for k in range(sets):
        for b in range(blocks):
            part = slice(b * rows, (b + 1) * rows)
            expected[part] += np.einsum("n,n...->...", coefficients[k, b].numpy(), bank[:, part].numpy()) / sets
    np.testing.assert_allclose(combine(coefficients, bank).numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("blocks", [1, 3])
def test_gradients_of_combine_match_finite_differences(blocks: int) -> None:
    inputs = (random(2, blocks, 3, dtype=torch.float64), random(3, 6, 2, dtype=torch.float64, seed=1))
    assert torch.autograd.gradcheck(combine, [tensor.requires_grad_() for tensor in inputs])


def test_every_set_gets_the_same_gradient_and_only_their_mean_matters() -> None:
    coefficients, bank = random(4, 2, 3).requires_grad_(), random(3, 12, 5, seed=1)
    weight = combine(coefficients, bank)
    (weight * random(12, 5, seed=2)).sum().backward()
    first, *others = coefficients.grad
    assert first.abs().min() > 0
    assert all(torch.equal(first, other) for other in others)
    mean = coefficients.detach().mean(0)
    torch.testing.assert_close(combine(mean.expand(7, -1, -1), bank), weight.detach())
    assert not torch.allclose(combine(coefficients.detach()[:1], bank), weight.detach(), atol=0.1)


def test_autocast_does_not_round_the_weight() -> None:
    coefficients, bank = random(2, 1, 3), random(3, 64, 64, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert (coefficients[0] @ coefficients[0].T).dtype == torch.bfloat16  # autocast is on
        weight = combine(coefficients, bank)
    assert weight.dtype == torch.float32
    assert torch.equal(weight, combine(coefficients, bank))


# project


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("blocks", [1, 3])
def test_projection_is_the_least_squares_solution(shape: tuple[int, ...], blocks: int) -> None:
    weight, bank = random(*shape), random(3, *shape, seed=1)
    found = project(weight, bank, 2, blocks)
    assert found.shape == (2, blocks, 3)
    for b in range(blocks):
        columns = bank.reshape(3, blocks, -1)[:, b].double().numpy().T
        expected, *_ = np.linalg.lstsq(columns, weight.reshape(blocks, -1)[b].double().numpy(), rcond=None)
        for k in range(2):
            np.testing.assert_allclose(found[k, b].numpy(), expected, rtol=1e-4, atol=1e-6)


def test_projection_of_a_combination_gives_it_back() -> None:
    coefficients, bank = random(1, 4, 3), random(3, 12, 10, seed=1)
    torch.testing.assert_close(project(combine(coefficients, bank), bank, 1, 4), coefficients)


def test_projection_survives_dependent_templates() -> None:
    bank = random(1, 12, 10).repeat(3, 1, 1)
    found = project(2 * bank[0], bank, 2, 1)
    torch.testing.assert_close(combine(found, bank), 2 * bank[0])


# Closed form


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("layers", "sets", "blocks"), [(2, 2, 1), (2, 1, 3), (5, 2, 4)])
def test_closed_form_is_exact_with_a_template_per_layer(
    shape: tuple[int, ...], layers: int, sets: int, blocks: int
) -> None:
    weights = random(layers, *shape)
    found = closed_form(weights, layers, sets, blocks, seed=3)
    assert found.templates.shape == (layers, *shape)
    assert found.coefficients.shape == (layers, sets, blocks, layers)
    assert relative_error(rebuilt(found.coefficients, found.templates), weights).max() < 5e-7


def test_every_weight_stays_a_combination_of_the_pretrained_weights_of_its_group() -> None:
    """W' = A W with A = c c0⁻¹, whatever a task learns (docs/method.md, "What coefficients can reach")."""
    weights = random(3, 12, 10)
    found = closed_form(weights, 3, 2, 1, seed=3)
    learned = found.coefficients + 0.1 * random(*found.coefficients.shape, seed=1)
    mean, start = learned.mean(1).squeeze(1), found.coefficients.mean(1).squeeze(1)
    expected = torch.einsum("lj,j...->l...", mean @ torch.linalg.inv(start), weights)
    torch.testing.assert_close(rebuilt(learned, found.templates), expected)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_closed_form_is_exact_at_any_scale_and_for_dependent_weights(scale: float) -> None:
    weights = random(4, 12, 10) * scale
    weights[2], weights[3] = weights[0], 0.0
    found = closed_form(weights, 4, 2, 1, seed=3)
    assert (rebuilt(found.coefficients, found.templates) - weights).abs().max() < 1e-6 * weights.abs().max()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("templates", [1, 2, 4])
def test_closed_form_reaches_the_least_error_there_is(shape: tuple[int, ...], blocks: int, templates: int) -> None:
    weights = random(5, *shape)
    bound = least_squared_error(weights, templates, blocks)
    assert bound > 1
    assert squared_error(closed_form(weights, templates, 2, blocks, seed=3), weights) == pytest.approx(bound, rel=1e-6)


def test_finer_granularity_leaves_less_error() -> None:
    weights = random(5, 12, 10)
    errors = [squared_error(closed_form(weights, 2, 1, blocks, seed=3), weights) for blocks in (1, 3, 12)]
    assert all(finer < 0.99 * coarser for coarser, finer in pairwise(errors))


@pytest.mark.parametrize("templates", [2, 3, 6])
def test_coefficients_are_orthonormal_mixed_and_the_same_in_every_set(templates: int) -> None:
    found = closed_form(random(6, 12, 10), templates, 3, 2, seed=3).coefficients
    for block in range(2):
        matrix = found[:, 0, block].double()
        torch.testing.assert_close(matrix.T @ matrix, torch.eye(templates, dtype=torch.float64), rtol=0, atol=1e-6)
        assert np.linalg.cond(matrix.numpy()) < 1 + 1e-5
        assert matrix.abs().max() < 0.999  # templates are mixtures, not copies of the layers
    assert torch.equal(found[:, 0], found[:, 1])
    assert torch.equal(found[:, 0], found[:, 2])


# All solvers


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_are_deterministic_by_seed_and_leave_their_surroundings_alone(name: str) -> None:
    weights = random(4, 12, 10)
    before, state = weights.clone(), torch.get_rng_state()
    options = {} if name == "closed_form" else {"steps": 20}
    first, again, other = (SOLVERS[name](weights, 2, 2, 1, seed=seed, **options) for seed in (5, 5, 6))
    assert torch.equal(weights, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.templates, again.templates)
    assert torch.equal(first.coefficients, again.coefficients)
    assert not torch.allclose(first.coefficients, other.coefficients, atol=1e-2)
    assert not any(tensor.requires_grad for tensor in first)


@pytest.mark.parametrize("name", ITERATIVE)
@pytest.mark.parametrize("shape", [(8, 6), (6, 2, 3, 3)], ids=["linear", "convolution"])
@pytest.mark.parametrize(("templates", "blocks"), [(2, 1), (2, 2)])
def test_no_solver_beats_the_closed_form_and_all_come_close(
    name: str, shape: tuple[int, ...], templates: int, blocks: int
) -> None:
    weights = 0.1 * random(4, *shape)
    bound = least_squared_error(weights, templates, blocks)
    best = squared_error(closed_form(weights, templates, 2, blocks, seed=0), weights)
    options, factor = CLOSE[name]
    error = squared_error(ITERATIVE[name](weights, templates, 2, blocks, seed=0, **options), weights)
    assert best <= bound * (1 + 1e-6)
    assert best <= error * (1 + 1e-6)
    assert error < factor * bound < 0.8 * weights.square().sum().item()


@pytest.mark.parametrize("name", ITERATIVE)
def test_more_steps_help_and_each_reports_progress(name: str) -> None:
    weights, ticks = 0.1 * random(2, 12, 10), []
    errors = [
        squared_error(ITERATIVE[name](weights, 2, 2, 1, seed=0, steps=steps, progress=lambda: ticks.append(1)), weights)
        for steps in (1, 30, 300)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert len(ticks) == 331


def test_gradient_keeps_its_best_step() -> None:
    weights = 0.1 * random(2, 12, 10)
    start = squared_error(gradient(weights, 2, 2, 1, seed=0, steps=1), weights)
    assert squared_error(gradient(weights, 2, 2, 1, seed=0, steps=20, lr=50.0), weights) <= start * (1 + 1e-6)
