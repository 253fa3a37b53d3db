"""The mathematics against independent implementations: numpy's einsum and lstsq, and finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from recast_exp.recast import find_groups, mimic
from recast_exp.recast.formulas import combine, from_relative, project, relative, relative_error
from recast_exp.recast.weights import weight_report

SHAPES = {"linear": (12, 10), "convolution": (12, 4, 3, 3), "depthwise": (12, 1, 3, 3)}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


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


@pytest.mark.parametrize(("sets", "blocks"), [(1, 1), (3, 1), (2, 4)])
def test_the_relative_form_rebuilds_the_weights_from_the_pretrained_ones_and_leads_back(sets: int, blocks: int) -> None:
    layers = 3
    bank, start = random(layers, 12, 10), random(layers, sets, blocks, layers, seed=1)
    learned = start + 0.3 * random(*start.shape, seed=2)
    shares = relative(learned, start)
    assert shares.shape == (layers, blocks, layers)
    pretrained = torch.stack([combine(each, bank) for each in start]).double().reshape(layers, blocks, -1)
    expected = torch.stack([combine(each, bank) for each in learned]).double().reshape(layers, blocks, -1)
    torch.testing.assert_close(torch.einsum("lbj,jbm->lbm", shares, pretrained), expected, rtol=1e-4, atol=1e-4)
    back = from_relative(shares, start)
    assert back.shape == start.shape
    assert back.dtype == start.dtype
    torch.testing.assert_close(back, learned.mean(1, keepdim=True).expand_as(back), rtol=1e-4, atol=1e-4)
    assert from_relative(shares, start.double()).dtype == torch.float64


def test_relative_error_is_that_of_each_layer_at_any_scale() -> None:
    weights = torch.tensor([[[3.0, 4.0]], [[6.0, 8.0]], [[0.0, 0.0]]])
    rebuilt = torch.tensor([[[3.0, 5.0]], [[0.0, 0.0]], [[0.0, 0.0]]])
    for scale in (1.0, 1e-12, 1e12):
        found = relative_error(scale * rebuilt, scale * weights)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, torch.tensor([0.2, 1.0, 0.0]).double(), rtol=1e-6, atol=0)


def test_the_report_of_a_bank_says_how_far_each_weight_is_off() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"layer": nn.Linear(4, 6)}) for _ in range(3)])})
    banks = mimic(model, find_groups(model, num_groups=1, num_templates=2))
    report = weight_report(model, banks)
    assert list(report) == [f"blocks.{number}.layer" for number in range(3)]
    for name, found in report.items():
        weight, rebuilt = model.get_submodule(name).weight.detach(), banks.rebuilt(name)  # type: ignore[union-attr]
        off, own = (weight - rebuilt).double(), weight.double()
        assert found == {
            "relative_error": pytest.approx((off.norm() / own.norm()).item()),
            "max_error": pytest.approx(off.abs().max().item()),
            "cosine_similarity": pytest.approx(((own * rebuilt).sum() / own.norm() / rebuilt.norm()).item(), abs=1e-6),
        }
    assert max(found["relative_error"] for found in report.values()) > 0.1
