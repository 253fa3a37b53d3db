"""The objectives that solve a head and then train with it: alternating, and linear probing then fine-tuning."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recast_exp.cli import main as cli
from recast_exp.heads.ridge import Ridge
from recast_exp.training.features import extract
from recast_exp.training.loop import fit
from recast_exp.training.module import TaskModule
from recast_exp.training.objectives import _base
from support.running import run_stage

QUICK = ("model=vit_att", "trainer.accelerator=cpu", "trainer.max_epochs=3", "dataset.max_per_class=12", "probe=false")


def head(module: TaskModule) -> Tensor:
    (_, weight), (_, bias) = module.adapted.parameters("head")
    return torch.cat([weight, bias[:, None]], 1).detach().clone()


@pytest.fixture
def heads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Tensor]]:
    """The epoch and the head of every step, before it."""
    seen: list[tuple[int, Tensor]] = []
    original = _base.classify

    def note(module: TaskModule, *args: Any) -> Any:
        seen.append((module.current_epoch, head(module)))
        return original(module, *args)

    for name in ("alternating", "lp_ft"):
        monkeypatch.setattr(f"recast_exp.training.objectives.{name}.classify", note)
    return seen


def test_alternating_solves_the_head_once_an_epoch(build: Any, heads: list[tuple[int, Tensor]]) -> None:
    run = build(*QUICK, "training=alternating", "head=ridge", "dataset.batch_size=20", "trainer.limit_batches=null")
    features = extract(run.recipe, run.adapted.network, run.data, "train")
    (solution,) = Ridge().solve(features, [{"strength": 0.1}])
    start = {name: tensor.detach().clone() for name, tensor in run.adapted.parameters("coefficients")}
    result = fit(run.recipe, run.adapted, run.data)
    epochs = {epoch: [value for at, value in heads if at == epoch] for epoch in range(3)}
    assert [len(each) for each in epochs.values()] == [3, 3, 3]
    assert all(torch.equal(each[0], value) for each in epochs.values() for value in each)
    assert not torch.equal(epochs[0][0], epochs[1][0])
    scaled = solution.scaled(10.0)
    expected = torch.cat([scaled.weight, scaled.bias[:, None]], 1)
    torch.testing.assert_close(epochs[0][0], expected.float(), rtol=1e-3, atol=1e-3)
    assert any(not torch.equal(value, start[name]) for name, value in run.adapted.parameters("coefficients"))
    assert result.history[-1]["val/accuracy"] > 0.6


def test_linear_probing_then_fine_tuning_solves_the_head_once_and_trains_it(
    build: Any, heads: list[tuple[int, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = TaskModule.training_features
    monkeypatch.setattr(TaskModule, "training_features", lambda self: calls.append(1) or original(self))
    run = build(*QUICK, "training=lp_ft", "head=linear", "dataset.batch_size=20", "trainer.limit_batches=null")
    features = extract(run.recipe, run.adapted.network, run.data, "train")
    (solution,) = Ridge().solve(features, [{"strength": 0.1}])
    scaled = solution.scaled(10.0)
    fit(run.recipe, run.adapted, run.data)
    assert calls == [1]
    expected = torch.cat([scaled.weight, scaled.bias[:, None]], 1)
    torch.testing.assert_close(heads[0][1], expected.float(), rtol=1e-3, atol=1e-3)
    assert all(not torch.equal(one, other) for (_, one), (_, other) in itertools.pairwise(heads))


def test_the_first_loss_is_that_of_the_solved_head(build: Any) -> None:
    """Against a random head, whose loss is that of guessing. The learning rate moves neither."""
    losses = {}
    still = ("head=linear", "optimizer.lr=1e-9", "trainer.max_epochs=1", "trainer.limit_batches=null")
    for name in ("joint", "lp_ft"):
        run = build(*QUICK, f"training={name}", *still)
        losses[name] = fit(run.recipe, run.adapted, run.data).history[0]["train/loss"]
    assert losses["joint"] > 0.8 * math.log(5)
    assert losses["lp_ft"] < 0.9 * losses["joint"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("training=alternating", "head=best", "adapter=melo"),
        ("training=alternating", "head=lda", "model=resnet"),
        ("training=lp_ft", "head=linear", "model=vit_full", "optimizer.backbone_lr=1e-5"),
        ("training=lp_ft", "head=best"),
    ],
    ids=" ".join,
)
def test_whole_runs(tiny: Any, tmp_path: Path, options: tuple[str, ...]) -> None:
    metrics = run_stage(tiny(*QUICK, *options), tmp_path)
    assert metrics["test/accuracy"] > 0.4
    assert metrics == json.loads((tmp_path / "metrics.json").read_text())


@pytest.mark.slow
def test_learning_rates_are_said_to_have_no_effect_on_a_probe(tmp_path: Path) -> None:
    """A solved head is trained by nothing, so no recipe is named."""
    command = ["model=vit_frozen", "dataset.max_per_class=12", "probe=false"]
    typed = ["optimizer.lr=0.3", "trainer.max_epochs=2"]
    expected = (
        "optimizer.lr, trainer.max_epochs: no effect, as nothing is trained but the head, which is solved; head=linear "
        "trains it by gradient descent"
    )
    cases = ((typed, True), ([], False), ([*typed, "head=linear"], False))
    commands = [[*command, *more, f"hydra.run.dir={tmp_path}/run{len(more)}"] for more, _ in cases]
    code = (
        "import json, sys\n"
        "from recast_exp.cli.main import run\n"
        "for arguments in json.loads(sys.argv[1]):\n"
        "    print('NEXT', file=sys.stderr, flush=True)\n"
        "    assert run(arguments) == 0\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)], capture_output=True, text=True, timeout=100, check=True
    )
    for (more, warned), said in zip(cases, done.stderr.split("NEXT\n")[1:], strict=True):
        assert (expected in said.splitlines()) is warned
        assert ("Recipe: " in said) is ("head=linear" in more)


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (("training=alternating", "head=linear"), "head: expected one that is solved with training=alternating"),
        (
            ("training=lp_ft", "trainer=ddp", "trainer.devices=2"),
            "training: expected joint with trainer.devices=2, got lp_ft; add training=joint, or use one device",
        ),
        (
            ("training=alternating", "trainer.head_first_epochs=1"),
            "trainer.head_first_epochs: expected 0 with training=alternating, whose head does not train, got 1",
        ),
        (("training=lp_ft", "training.strength=0"), "training.strength: expected a number > 0, got 0"),
    ],
)
def test_wrong_requests_are_one_line(
    typed: tuple[str, ...], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run([*QUICK, *typed, f"hydra.run.dir={tmp_path}/run"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {expected}")
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()
