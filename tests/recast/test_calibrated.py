"""Calibrated mimicry: templates that keep the layers' outputs on images."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from recast_exp import UserError
from recast_exp.recast import Banks, find_groups, inject, mimic
from recast_exp.recast.formulas import Mimicked, combine
from recast_exp.recast.solvers import calibrated
from support.helpers import assert_one_line

UNMATCHED: dict[str, Any] = {"steps": 1, "lr": 1e-12}
"""Options that leave the closed form as good as it was found."""


def network(name: str = "vit_tiny_patch16_224", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    given = {"img_size": 32, "depth": 4, "embed_dim": 24, "num_heads": 2} if name.startswith("vit") else {}
    return timm.create_model(name, num_classes=0, **(given | options)).eval().requires_grad_(False)


def images(count: int = 48, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def inputs_of(model: nn.Module, layer: str, batch: Tensor) -> Tensor:
    found: list[Tensor] = []
    hook = model.get_submodule(layer).register_forward_pre_hook(
        lambda _, inputs: found.append(inputs[0].flatten(0, -2))
    )
    model(batch)
    hook.remove()
    return found[0]


def with_banks(model: nn.Module, banks: Banks) -> nn.Module:
    changed = copy.deepcopy(model)
    inject(changed, banks)
    return changed.requires_grad_(False)


def distance(model: nn.Module, banks: Banks, batch: Tensor) -> float:
    expected = model(batch)
    return ((with_banks(model, banks)(batch) - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("granularity", ["layer", "projection", "head"])
@pytest.mark.parametrize(("num_groups", "num_templates"), [(2, 1), (1, 3), (1, 2)])
def test_features_are_nearer_to_those_of_the_model_also_on_other_images(
    granularity: str, num_groups: int, num_templates: int
) -> None:
    model = network()
    groups = find_groups(
        model,
        targets=["*.qkv", "*.fc1", "*.fc2"],
        num_groups=num_groups,
        num_templates=num_templates,
        granularity=granularity,
    )
    plain = mimic(model, groups)
    fitted = mimic(model, groups, solver="calibrated", images=images())
    assert distance(model, fitted, images()) < 0.9 * distance(model, plain, images())
    assert distance(model, fitted, images(seed=9)) < distance(model, plain, images(seed=9))
    # In terms of the weights, the closed form is the best
    assert fitted.origin is not None
    assert not fitted.origin.repeatable


def test_it_is_the_least_squares_solution_of_each_turn() -> None:
    """One group, one layer block: no small change of templates or coefficients lowers the error of the outputs."""
    model = network(depth=2)
    groups = find_groups(model, targets=["*.attn.proj"], num_templates=1)
    names = groups[0].layers
    start = mimic(model, groups, num_sets=1)
    weights = torch.stack([model.get_parameter(f"{name}.weight").double() for name in names])
    rows = [inputs_of(model, name, images()).double() for name in names]
    moments = [(each.T @ each / len(each),) * 2 for each in rows]
    state = Mimicked(
        start.templates[groups[0].name].double(), torch.stack([start.coefficients[name].double() for name in names])
    )

    def error(templates: Tensor, coefficients: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for weight, x, own in zip(weights, rows, coefficients, strict=True):
            target = x @ weight.T
            total = total + (x @ combine(own, templates).T - target).square().sum() / target.square().sum()
        return total

    for _ in range(50):
        state = calibrated._fitted(weights, state, moments, damping=1e-9)
    templates = state.templates.double().requires_grad_()
    coefficients = state.coefficients.double().requires_grad_()
    found = error(templates, coefficients)
    scale = [each.norm() for each in (templates, coefficients)]
    gradients = torch.autograd.grad(found, (templates, coefficients))
    assert all(gradient.norm() * size < 1e-3 * found for gradient, size in zip(gradients, scale, strict=True))
    assert found < error(start.templates[groups[0].name].double(), torch.stack([*start.coefficients.values()]).double())


def test_as_many_templates_as_layers_stay_exact() -> None:
    model = network()
    groups = find_groups(model)
    assert mimic(model, groups, solver="calibrated", images=images()).hash == mimic(model, groups).hash


def test_convolutions_and_the_model_is_unchanged() -> None:
    model = network("resnet18", channels=(8, 8, 16, 16), zero_init_last=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    groups = find_groups(model, targets=["layer?.1.conv?", "layer?.0.conv2"], num_groups=1, num_templates=1)
    groups = [group for group in groups if len(group.layers) > 1]
    plain = mimic(model, groups)
    fitted = mimic(model, groups, solver="calibrated", images=images())
    assert distance(model, fitted, images()) < distance(model, plain, images())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_moments_are_the_means_of_all_batches() -> None:
    model, changed = network(depth=2), network(depth=2)
    with torch.no_grad():
        changed.get_parameter("blocks.0.mlp.fc2.weight").mul_(1.5)
    names = ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
    parts = torch.split(images(), [20, 20, 8])
    found = calibrated._moments(model, changed, names, lambda: iter(parts))
    for name, (g, h) in zip(names, found, strict=True):
        before, after = (inputs_of(each, name, images()).double() for each in (model, changed))
        torch.testing.assert_close(g, after.T @ after / len(after), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(h, before.T @ after / len(after), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[1][0], found[1][1], rtol=1e-2)


def test_the_patches_of_a_convolution_are_what_its_weight_multiplies() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(2, 1), bias=False)
    batch = torch.randn(4, 3, 9, 8)
    rows = calibrated._rows(layer, batch) @ layer.weight.flatten(1).T
    torch.testing.assert_close(rows, layer(batch).flatten(2).transpose(1, 2).flatten(0, 1))


def test_groups_follow_in_the_order_of_the_model_however_they_are_given() -> None:
    model = network()
    groups = find_groups(model, targets=["*.qkv", "*.fc1"], num_templates=1)
    there, back = (mimic(model, each, solver="calibrated", images=images(), seed=0) for each in (groups, groups[::-1]))
    assert len(groups) > 2
    for name, templates in there.templates.items():
        errors = [
            (banks.rebuilt(layer) - model.get_parameter(f"{layer}.weight")).norm()
            for banks in (there, back)
            for layer in next(group.layers for group in groups if group.name == name)
        ]
        half = len(errors) // 2
        torch.testing.assert_close(torch.stack(errors[:half]), torch.stack(errors[half:]), rtol=1e-3, atol=0)
        assert templates.shape == back.templates[name].shape


def test_more_damping_keeps_the_weights_more() -> None:
    model = network()
    groups = find_groups(model, targets=["*.qkv"], num_groups=1, num_templates=2)
    errors = []
    for damping in (1e-3, 1e3):
        banks = mimic(model, groups, solver="calibrated", images=images(), damping=damping, **UNMATCHED)
        errors.append(
            sum((banks.rebuilt(name) - model.get_parameter(f"{name}.weight")).norm() for name in groups[0].layers)
        )
    assert errors[1] < 0.98 * errors[0]


def test_options_and_progress_of_the_passes_and_the_model_as_it_was() -> None:
    model = network().train().double()
    groups = find_groups(model, targets=["*.qkv"], num_groups=2, num_templates=1)
    ticks: list[int] = []
    found = [
        mimic(
            model,
            groups,
            solver="calibrated",
            images=images().double(),
            passes=passes,
            steps=5,
            progress=lambda: ticks.append(1),
        )
        for passes in (1, 3)
    ]
    assert len(ticks) == (1 + 5 + 3 + 5) * len(groups)
    weights = torch.zeros(2, 3, 4)
    assert calibrated.num_steps(weights, passes=3, steps=5, damping=1.0) == 3 + 5
    assert calibrated.num_steps(weights) == calibrated.PASSES + calibrated.STEPS
    assert found[0].hash != found[1].hash
    assert model.training
    assert all(parameter.dtype == torch.float64 for parameter in model.parameters())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "images: expected preprocessed images [N, 3, H, W] of finite numbers with solver=calibrated, got None"),
        (
            {"images": torch.zeros(3, 32, 32)},
            "images: expected preprocessed images [N, 3, H, W] of finite numbers with solver=calibrated, got "
            "torch.float32 [3, 32, 32]",
        ),
        ({"images": images(4), "noise": 3}, "options.noise: expected one of passes, rounds, damping, steps, lr"),
    ],
)
def test_what_it_needs(options: dict[str, Any], expected: str) -> None:
    model = network()
    with pytest.raises(UserError) as error:
        mimic(model, find_groups(model), solver="calibrated", **options)
    assert_one_line(error, expected)


def test_layers_that_it_does_not_take() -> None:
    model = network("resnext26ts")
    with pytest.raises(UserError) as error:
        mimic(model, find_groups(model), solver="calibrated", images=torch.randn(2, 3, 64, 64))
    assert_one_line(error, "targets: expected linear layers, or convolutions without groups, with mimicry=calibrated")
    model = network()
    groups = find_groups(model, targets=["*.fc1"], granularity="row", num_groups=1, num_templates=2)
    with pytest.raises(UserError) as error:
        mimic(model, groups, solver="calibrated", images=images(4))
    assert_one_line(error, "granularity: expected at most 64 blocks of rows with mimicry=calibrated, got 96")


def test_a_group_of_one_layer_stays_exact_next_to_one_that_is_fitted() -> None:
    model = network(depth=3)
    single = find_groups(model, targets=["blocks.0.attn.qkv"])
    pair = find_groups(model, targets=["blocks.[12].attn.qkv"], num_templates=1)
    groups = [dataclasses.replace(single[0], name="first"), pair[0]]
    plain, fitted = mimic(model, groups), mimic(model, groups, solver="calibrated", images=images())
    assert torch.equal(fitted.templates["first"], plain.templates["first"])
    assert not torch.equal(fitted.templates[pair[0].name], plain.templates[pair[0].name])


def test_without_options_it_damps_by_a_hundredth() -> None:
    model = network(depth=2)
    groups = find_groups(model, targets=["*.qkv"], num_templates=1)
    plain, given, more = (
        mimic(model, groups, solver="calibrated", images=images(), **options).hash
        for options in ({}, {"damping": 1e-2, "passes": 2, "rounds": 2}, {"damping": 1e-1})
    )
    assert plain == given != more


def test_a_convolution_in_two_groups_is_not_taken_and_64_blocks_of_rows_are() -> None:
    start = Mimicked(torch.ones(1, 4, 2, 1, 1), torch.ones(1, 1, 1, 1))
    with pytest.raises(UserError, match=r"^targets: expected linear layers, or convolutions without groups"):
        calibrated._check("layer", nn.Conv2d(4, 4, 1, groups=2), start)
    calibrated._check("layer", nn.Linear(3, 64), Mimicked(torch.ones(1, 64, 3), torch.ones(1, 1, 64, 1)))
    with pytest.raises(UserError, match=r"^granularity: expected at most 64 blocks .*, got 65 \(layer\)$"):
        calibrated._check("layer", nn.Linear(3, 65), Mimicked(torch.ones(1, 65, 3), torch.ones(1, 1, 65, 1)))


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (images(4).index_fill(0, torch.tensor([2]), torch.nan), "images: expected preprocessed images"),
        (torch.randn(4, 3, 40, 40), "images: expected those of the size that the model takes, got [4, 3, 40, 40]"),
        (images(4).numpy(), "images: expected preprocessed images"),
        (images(4).to("meta"), "images: expected preprocessed images"),
        (images(4).to(torch.uint8), "images: expected preprocessed images"),
    ],
)
def test_images_that_are_none(given: Any, line: str) -> None:
    model = network()
    with pytest.raises(UserError) as error:
        mimic(model, find_groups(model, num_templates=1), solver="calibrated", images=given)
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)


def test_a_model_that_takes_the_weights_itself() -> None:
    model = network("beit_base_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=2)
    with pytest.raises(UserError, match=r"^targets: expected layers that the model calls"):
        mimic(model, find_groups(model, targets=["*.qkv"], num_templates=1), solver="calibrated", images=images())
