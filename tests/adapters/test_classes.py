"""Layers with hooks have classes of their own: torch.compile tells them from layers without, nobody else has to."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from recast_exp import SSF, AdaptFormer, FiLM, HydraLoRA, find_groups, inject, inject_adapter, merge, mimic
from recast_exp.adapters import Adapter
from support.adapted import create, logits

ADAPTERS = [SSF(), FiLM(), HydraLoRA(rank=2), AdaptFormer(width=4)]


def adapted(adapter: Adapter | None, templates: bool = False) -> nn.Module:
    torch.manual_seed(0)
    network = create("vit", 3).eval().requires_grad_(False)
    if templates:
        inject(network, mimic(network, find_groups(network, targets=["*.mlp.fc1"])))
    if adapter is not None:
        with torch.no_grad():
            for path in inject_adapter(network, adapter).values():
                parameter = network.get_parameter(path)
                parameter.add_(0.3 * torch.randn_like(parameter))
    return network


@pytest.mark.parametrize("templates", [False, True])
@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.name)
def test_a_compiled_model_is_not_taken_for_another_one(adapter: Adapter, templates: bool) -> None:
    plain = adapted(None, templates)
    other = copy.deepcopy(plain)
    with torch.no_grad():
        for path in inject_adapter(other, adapter).values():
            parameter = other.get_parameter(path)
            parameter.add_(0.3 * torch.randn_like(parameter))
    expected = [logits(network) for network in (plain, other)]
    torch._dynamo.reset()
    for network, own in zip((plain, other), expected, strict=True):
        torch.testing.assert_close(logits(torch.compile(network, backend="eager")), own)  # type: ignore[arg-type]
    torch._dynamo.reset()


@pytest.mark.parametrize("templates", [False, True])
@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.name)
def test_a_copy_a_pickled_and_a_merged_model_compute_the_same(adapter: Adapter, templates: bool) -> None:
    network = adapted(adapter, templates)
    expected, classes = logits(network), [type(module) for module in network.modules()]
    copied = copy.deepcopy(network)
    assert torch.equal(logits(copied), expected)
    assert [type(module) for module in copied.modules()] == classes
    if not templates:  # what torch parametrises is not pickled
        content = io.BytesIO()
        torch.save(network, content)
        content.seek(0)
        loaded = torch.load(content, weights_only=False)
        assert torch.equal(logits(loaded), expected)
        assert [type(module) for module in loaded.modules()] == classes
    torch.testing.assert_close(logits(merge(copied)), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(network), expected)
    if isinstance(adapter, SSF | HydraLoRA):  # the others stay
        assert [type(module) for module in copied.modules()] == [type(module) for module in create("vit", 3).modules()]


def test_layers_are_of_their_kind_still() -> None:
    network, plain = adapted(SSF()), create("vit", 3)
    kinds = dict(plain.named_modules())
    changed = [(name, module) for name, module in network.named_modules() if "ssf" in module._modules]
    assert changed
    for name, module in changed:
        kind = type(kinds[name])
        assert isinstance(module, kind) and type(module) is not kind
        assert (type(module).__name__, type(module).__module__) == (kind.__name__, kind.__module__)
        assert repr(module).startswith(kind.__name__)
