"""`benchmarks/gradients.py`, which the results page quotes."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from recast_exp.config.schema import Config
from recast_exp.experiment.experiment import Experiment


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gradients", Path(__file__).parents[2] / "benchmarks/gradients.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_agreement_is_the_mean_over_pairs_of_images(script: ModuleType) -> None:
    torch.manual_seed(0)
    g, h = torch.randn(7, 3) + 0.5, torch.randn(4, 3)
    pairs = [g[i] @ g[k] for i in range(7) for k in range(7) if i != k]
    squares = [each @ each for each in g]
    found = script.compare(g, h)
    assert found["agreement"] == pytest.approx(float(sum(pairs) / len(pairs) / (sum(squares) / len(squares))))
    assert script.compare(torch.ones(5, 3), h)["agreement"] == pytest.approx(1)
    assert script.compare(torch.eye(5), torch.eye(5))["agreement"] == 0
    assert script.compare(g, g)["carried over"] == pytest.approx(found["train slope"])
    assert script.compare(g, -g)["carried over"] == pytest.approx(-found["train slope"])


def test_gradients_of_images_are_those_of_the_batch(script: ModuleType, tiny: Callable[..., Config]) -> None:
    cfg = tiny("model=vit_att", "dataset.max_per_class=8")
    head = script.probe_head(cfg)
    adapted = script.with_head(Experiment.open(cfg), head)
    assert all(torch.equal(parameter, head[name]) for name, parameter in adapted.parameters("head"))
    coefficients: list[Any] = [parameter for _, parameter in adapted.parameters("coefficients")]
    data = Experiment.open(cfg).data()
    images, labels = data.example(6)
    images = data.normalize(images)
    losses, found = script.gradients(adapted.network, coefficients, images, labels)
    loss = F.cross_entropy(adapted.network(images), labels)
    expected = torch.cat([each.flatten() for each in torch.autograd.grad(loss, coefficients)])
    torch.testing.assert_close(losses.mean(), loss.detach())
    torch.testing.assert_close(found.mean(0), expected, rtol=1e-3, atol=1e-6)
    measured = script.measure(cfg, head)
    assert set(measured) == set(script.MEASURES)
    assert measured["train slope"] > 0
