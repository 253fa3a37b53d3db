"""MeLo against its formula and against peft's LoRA."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from recast_exp import MeLo, UserError, adapters, find_groups, inject, inject_adapter, mimic
from recast_exp.adapters.melo import LowRank, shared_out
from support.helpers import assert_one_line


def test_melo_is_loras_updates_of_queries_and_values() -> None:
    torch.manual_seed(0)
    layer, adapter, x = nn.Linear(8, 24), LowRank(8, rank=3, scale=0.5), torch.randn(2, 5, 8)
    nn.init.normal_(adapter.b)
    q, k, v = (F.linear(x, w, b) for w, b in zip(layer.weight.chunk(3), layer.bias.chunk(3), strict=True))
    q = q + 0.5 * (x @ adapter.a[0].T) @ adapter.b[0].T
    v = v + 0.5 * (x @ adapter.a[1].T) @ adapter.b[1].T
    torch.testing.assert_close(adapter.on_output(layer, (x,), layer(x)), torch.cat([q, k, v], -1))
    merged = F.linear(x, adapter(layer.weight), layer.bias)
    torch.testing.assert_close(merged, torch.cat([q, k, v], -1))


@pytest.mark.parametrize("added_to", ["output", "weight"])
def test_melo_trains_as_pefts_lora_on_split_projections(added_to: str) -> None:
    """The same first numbers, three steps of Adam: the same updates, outputs and merged weights."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    fused, adapter, x = nn.Linear(8, 24), LowRank(8, rank=3, scale=2.0), torch.randn(2, 5, 8)
    fused.requires_grad_(False)
    split = nn.ModuleDict({name: nn.Linear(8, 8) for name in "qkv"})
    for part, weight, bias in zip(split.values(), fused.weight.chunk(3), fused.bias.chunk(3), strict=True):
        part.weight.data, part.bias.data = weight.clone(), bias.clone()
    lora = peft.inject_adapter_in_model(peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q", "v"]), split)
    for name, a in zip("qv", adapter.a, strict=True):
        lora[name].lora_A["default"].weight.data = a.detach().clone()

    def ours() -> Tensor:
        if added_to == "weight":
            return F.linear(x, adapter(fused.weight), fused.bias)
        return adapter.on_output(fused, (x,), fused(x))

    def theirs() -> Tensor:
        return torch.cat([lora[name](x) for name in "qkv"], -1)

    target = torch.randn(2, 5, 24)
    for forward, module in ((ours, adapter), (theirs, lora)):
        optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            F.mse_loss(forward(), target).backward()
            optimizer.step()
    assert adapter.b.abs().max() > 0.01
    torch.testing.assert_close(ours(), theirs())
    for name, a, b in zip("qv", adapter.a, adapter.b, strict=True):
        torch.testing.assert_close(a, lora[name].lora_A["default"].weight)
        torch.testing.assert_close(b, lora[name].lora_B["default"].weight)
        lora[name].merge()
    theirs_merged = torch.cat([lora["q"].weight, lora["k"].weight, lora["v"].weight])
    torch.testing.assert_close(adapter(fused.weight), theirs_merged)


# Where the ranks come from


def _network() -> nn.Module:
    torch.manual_seed(0)
    options = {"img_size": 32, "depth": 3, "embed_dim": 24, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, **options).eval().requires_grad_(False)


def _images() -> Tensor:
    return torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("base", ["frozen", "recast"])
def test_eva_starts_from_the_inputs_and_shares_out_the_ranks(base: str) -> None:
    model, adapter = _network(), MeLo(rank=3, init="eva")
    if base == "recast":
        inject(model, mimic(model, find_groups(model, targets=["*.attn.qkv"])))
    expected = model(_images())
    paths = inject_adapter(model, adapter)
    adapter.initialise(model, lambda: model(_images()))
    assert torch.equal(model(_images()), expected)  # B is zero
    assert adapter.ranks is not None
    assert sum(adapter.ranks) == 9
    assert min(adapter.ranks) >= 1
    assert max(adapter.ranks) <= 6
    for number, rank in enumerate(adapter.ranks):
        seen: list[Tensor] = []
        hook = model.get_submodule(f"blocks.{number}.attn.qkv").register_forward_pre_hook(
            lambda _, inputs, seen=seen: seen.append(inputs[0].flatten(0, 1))
        )
        model(_images())
        hook.remove()
        vectors = torch.linalg.svd(torch.cat(seen), full_matrices=False).Vh[:rank]
        a = model.get_parameter(paths[f"blocks.{number}.attn.qkv.melo.a"])
        for own in a:  # the signs are free
            torch.testing.assert_close((own @ vectors.T).abs(), torch.eye(rank), rtol=1e-3, atol=1e-3)
    # A task file has the ranks
    again = _network()
    if base == "recast":
        inject(again, mimic(again, find_groups(again, targets=["*.attn.qkv"])))
    inject_adapter(again, MeLo(rank=3, init="eva", ranks=adapter.ranks))
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


@pytest.mark.parametrize("base", ["frozen", "recast"])
def test_eva_does_not_train_before_it_has_seen_images(base: str) -> None:
    model, adapter = _network(), MeLo(rank=2, init="eva")
    if base == "recast":
        inject(model, mimic(model, find_groups(model, targets=["*.attn.qkv"])))
    inject_adapter(model, adapter)
    model(_images())
    with pytest.raises(UserError) as error:
        model.train()(_images())
    assert_one_line(error, "init: expected random, or MeLo.initialise to be called before training", "got eva")
    adapter.initialise(model, lambda: model.eval()(_images()))
    model.train()(_images())


def test_ranks_go_to_the_layers_whose_directions_explain_most() -> None:
    assert shared_out([[0.9, 0.05, 0.05], [0.4, 0.35, 0.25]], 4, most=4) == [1, 3]
    assert shared_out([[0.9, 0.05, 0.05], [0.4, 0.35, 0.25]], 4, most=2) == [2, 2]
    assert shared_out([[0.5, 0.5]] * 3, 4, most=2) == [2, 1, 1]


@torch.no_grad()
def test_gates_shrink_to_zero_and_their_ranks_are_cut_off() -> None:
    model, adapter = _network(), MeLo(rank=4, rank_gates=True, sparsity=1.0)
    paths = inject_adapter(model, adapter)
    for name, path in paths.items():
        if name.endswith("melo.b"):
            model.get_parameter(path).normal_()
        if name.endswith("melo.gate"):
            model.get_parameter(path).copy_(torch.tensor([[0.05, 1.0, -0.5, 0.05], [0.05, 0.05, 0.05, 2.0]]))
    adapter.after_step(model, lr=0.1)
    gate = model.get_parameter(paths["blocks.0.attn.qkv.melo.gate"])
    torch.testing.assert_close(gate, torch.tensor([[0.0, 0.9, -0.4, 0.0], [0.0, 0.0, 0.0, 1.9]]))
    assert adapter.measure(model) == {"adapter/rank": 1.5}
    expected = model(_images())
    gone = adapter.finish(model)
    assert gone == [f"blocks.{number}.attn.qkv.melo.gate" for number in range(3)]
    assert adapter.found() == {"ranks": [2, 2, 2], "rank_gates": False}
    torch.testing.assert_close(model(_images()), expected)
    assert adapter.finish(model) == []


@torch.no_grad()
def test_all_gates_at_zero_leave_nothing() -> None:
    model, adapter = _network(), MeLo(rank=2, rank_gates=True)
    expected = model(_images())
    paths = inject_adapter(model, adapter)
    for name, path in paths.items():
        parameter = model.get_parameter(path)
        parameter.zero_() if name.endswith("gate") else parameter.normal_()
    adapter.finish(model)
    assert adapter.ranks == [0, 0, 0]
    torch.testing.assert_close(model(_images()), expected)
    torch.testing.assert_close(adapters.merge(model)(_images()), expected)


def test_nested_ranks_train_from_the_first_on() -> None:
    model, adapter = _network(), MeLo(rank=4, nested=True)
    paths = inject_adapter(model, adapter)
    with torch.no_grad():
        for path in paths.values():
            model.get_parameter(path).normal_()
    full = model(_images())
    model.train()
    torch.manual_seed(0)
    seen = set()
    for _ in range(20):
        adapter.before_step(model)
        active = {module.active for module in model.modules() if isinstance(module, LowRank)}
        (one,) = active  # the same for all layers
        assert one is not None
        seen.add(one)
        model.zero_grad()
        model(_images()).square().sum().backward()
        gradient = model.get_parameter(paths["blocks.1.attn.qkv.melo.a"]).grad
        assert gradient is not None
        assert [bool(row.any()) for row in gradient[0]] == [number < one for number in range(4)]
        assert torch.equal(model.eval()(_images()), full)
        model.train()
    assert seen == {1, 2, 3, 4}
    adapter.finish(model)
    assert torch.equal(model(_images()), full)
    # At any rank: the first ones, which a task file then has
    half, short = copy.deepcopy(model), MeLo(rank=4, nested=True)
    short.truncate(half, 2)
    assert short.found()["ranks"] == [2, 2, 2]
    for module in model.modules():
        if isinstance(module, LowRank):
            module.active = 2
    torch.testing.assert_close(half(_images()), model(_images()))
    with pytest.raises(UserError) as error:
        short.truncate(half, 3)
    assert_one_line(error, "rank: expected an integer ≥ 1 and < 3, got 3")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"init": "evil"}, "init: expected one of random, eva, got 'evil'"),
        ({"nested": True, "rank_gates": True}, "nested: expected false together with rank_gates"),
        ({"ranks": [1, -1]}, "ranks: expected integers ≥ 0, got -1"),
        ({"ranks": [1, 2]}, "ranks: expected 3 integers, one for each attention layer, got 2"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as error:
        inject_adapter(_network(), MeLo(**options))
    assert_one_line(error, expected)
