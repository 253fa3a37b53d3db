"""The formulas of the adapters that change weights, each against an independent way to compute it."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from recast_exp import adapters
from recast_exp.adapters import from_config, inject_adapter
from recast_exp.adapters.tera import random_network


def network() -> nn.Module:
    torch.manual_seed(0)
    options = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, **options).eval().requires_grad_(False)


def changed(name: str, **options: Any) -> tuple[nn.Module, nn.Module, dict[str, Tensor]]:
    """A network with an adapter whose parameters have moved, the stock one, and these parameters by public name."""
    model = network()
    trained = inject_adapter(model, from_config({"name": name, **options}))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for path in trained.values():
            parameter = model.get_parameter(path)
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model, network(), {public: model.get_parameter(path).detach() for public, path in trained.items()}


def weight(model: nn.Module, layer: str) -> Tensor:
    found = model.get_submodule(layer).weight
    assert isinstance(found, Tensor)
    return found.detach()


def test_ssf_scales_and_shifts_what_a_layer_gives() -> None:
    model, stock, found = changed("ssf")
    inputs = torch.randn(2, 24, generator=torch.Generator().manual_seed(1))
    for layer in ("blocks.0.mlp.fc1", "blocks.1.norm1", "norm"):
        expected = stock.get_submodule(layer)(inputs) * found[f"{layer}.ssf.scale"] + found[f"{layer}.ssf.shift"]
        torch.testing.assert_close(model.get_submodule(layer)(inputs), expected)
    merged = adapters.merge(model)
    assert merged.state_dict().keys() == stock.state_dict().keys()


def test_ssf_leaves_out_the_shift_of_a_layer_without_a_bias() -> None:
    with torch.device("meta"):
        model = timm.create_model("resnet18")
        trained = inject_adapter(model, from_config({"name": "ssf"}))
    assert "layer1.0.conv1.ssf.scale" in trained
    assert "layer1.0.conv1.ssf.shift" not in trained
    assert "layer1.0.bn1.ssf.shift" in trained


def test_the_branches_of_hydra_one_after_the_other() -> None:
    model, stock, found = changed("hydra_lora", scale=0.5)
    layer = "blocks.1.mlp.fc2"
    inputs = torch.randn(2, 96, generator=torch.Generator().manual_seed(1))
    output = stock.get_submodule(layer)(inputs)
    a, b, c, d = (found[f"{layer}.hydra.{part}"] for part in "abcd")
    expected = output + 0.5 * inputs @ a.T @ b.T + 0.5 * output @ c.T @ d.T
    torch.testing.assert_close(model.get_submodule(layer)(inputs), expected)
    torch.testing.assert_close(adapters.merge(model).get_submodule(layer)(inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("transform_rank", [1, 3])
def test_the_transform_is_a_sum_of_kronecker_products(transform_rank: int) -> None:
    model, stock, found = changed("transformed", transform_rank=transform_rank, rank=2)
    layer = "blocks.0.attn.qkv"
    p, q, a, b = (found[f"{layer}.transform.{part}"] for part in "pqab")
    transform = sum((torch.kron(*pair) for pair in zip(p, q, strict=True)), torch.zeros(24, 24))
    torch.testing.assert_close(weight(model, layer), weight(stock, layer) @ transform + b @ a, rtol=1e-4, atol=1e-5)


def test_tera_is_a_tucker_product() -> None:
    model, stock, found = changed("tera", seed=5)
    layer = "blocks.1.mlp.fc1"  # [96, 24]: modes 8 × 12 and 4 × 6
    core, *factors = random_network((8, 12, 4, 6), 5)
    scaled = [factor @ torch.diag(found[f"{layer}.tera.d{n}"]) for n, factor in enumerate(factors, 1)]
    expected = weight(stock, layer) + torch.einsum("abcd,ia,jb,kc,ld->ijkl", core, *scaled).reshape(96, 24)
    torch.testing.assert_close(weight(model, layer), expected, rtol=1e-4, atol=1e-5)
    assert torch.linalg.matrix_rank(weight(model, layer) - weight(stock, layer)) == 24
    # A layer of the same shape has the same random tensors, in memory once
    modules = [model.get_submodule(f"blocks.{n}.mlp.fc1.parametrizations.weight.0") for n in (0, 1)]
    assert modules[0].get_buffer("fixed0").data_ptr() == modules[1].get_buffer("fixed0").data_ptr()
    assert not [name for name in model.state_dict() if "fixed" in name]


def test_the_compander_moves_small_and_large_weights_differently() -> None:
    model, stock, found = changed("compander")
    layer = "blocks.0.mlp.fc2"
    before = weight(stock, layer)
    amount, slope = found[f"{layer}.compander.amount"], found[f"{layer}.compander.slope"]
    expected = before + amount * before.std() * torch.arctan(slope.exp() * before / before.std())
    torch.testing.assert_close(weight(model, layer), expected)
