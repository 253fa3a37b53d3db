"""MeLo against its formula and against peft's LoRA."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from recast_exp.adapters.melo import LowRank


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
