"""Fixtures of all tests: a cache of the session's own, composed configurations, small backbones with lively weights."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import timm
import torch
from absl import logging as absl_logging
from safetensors.torch import save_file
from torch import nn

from recast_exp.cli.check_job import JobChecker
from recast_exp.config import grammar
from recast_exp.config.compose import Composer
from recast_exp.config.schema import Config
from recast_exp.data.datamodule import ImageDataModule
from recast_exp.experiment.experiment import Experiment
from recast_exp.models.adapted import AdaptedModel
from recast_exp.models.digits import EMBEDDED
from recast_exp.runs.plan import Asked
from recast_exp.training.recipe import Recipe

# TensorBoard brings absl, whose handler closes its stream when Hydra sets up logging: be it that of pytest, which was
# there when absl was imported
absl_logging.get_absl_handler().python_handler.stream = sys.__stderr__

TINY = (
    "training=joint",
    "trainer.accelerator=cpu",
    "trainer.max_epochs=2",
    "trainer.limit_batches=2",
    "dataset.batch_size=8",
    "dataset.eval_batch_size=16",
    "probe=false",
)


@dataclass
class Run:
    """What a training run needs."""

    settings: Config
    recipe: Recipe
    experiment: Experiment
    adapted: AdaptedModel
    data: ImageDataModule


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--all-cases`: every bad input (`make attack`), not a tenth of them."""
    parser.addoption("--all-cases", action="store_true", help="try every case of tests/attack")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What `make faults` counted, at its end: standard output does not reach it from other processes."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    found = [getattr(report, "user_properties", []) for report in reports if getattr(report, "when", "") == "call"]
    if lines := [text for properties in found for name, text in properties if name == "faults"]:
        terminalreporter.section("what was lost")
        terminalreporter.write_line("\n".join(sorted(lines)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files with the most slow tests come first: at the end, no process waits for one that has a long file left."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="session", autouse=True)
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No test reads or writes the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    if "PYTEST_XDIST_WORKER" in os.environ:  # pretraining takes long: once for all processes of the session
        shared = tmp_path_factory.getbasetemp().parent / "backbones"
        shared.mkdir(exist_ok=True)
        (folder / "backbones").symlink_to(shared)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECAST_EXP_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The tensors here are small: with more threads, on a busy machine, they mostly wait for one another."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def compose() -> Callable[..., Config]:
    """Overrides as typed → the settings of a run, checked as the command line checks them."""
    composer = Composer()
    groups = composer.groups()
    checker = JobChecker(composer, multirun=False, resumed=None, inputs=False)

    def compose(*texts: str) -> Config:
        last = {grammar.key(text): text for text in texts}  # of two values, as on the command line
        rewritten = grammar.rewrite(last.values(), multirun=False)
        options = tuple(text for text in rewritten if grammar.key(text) in groups and grammar.key(text) != "seed")
        checked = checker.check(Asked(options, tuple(text for text in rewritten if text not in options), {}))
        if checked.errors:
            raise checked.errors[0]
        assert checked.settings is not None
        return checked.settings

    return compose


@pytest.fixture(scope="session")
def enliven() -> Callable[[nn.Module], nn.Module]:
    """Redraws all weights of a model, so that no branch, norm, bias or running statistic is off, as many are at first.

    Fresh layer scales of 1e-5, zero biases and last BatchNorms of zero would hide any error behind them.
    """

    @torch.no_grad()
    def enliven(model: nn.Module, seed: int = 0) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            normal = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias") or (parameter.dim() > 1 and not name.endswith("weight")):
                parameter.copy_(0.3 * normal)
            elif parameter.dim() > 1:
                parameter.copy_(normal * ((2.0 if parameter.dim() > 2 else 1.0) / parameter[0].numel()) ** 0.5)
            else:
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
        return model.eval()

    return enliven


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory, enliven: Callable[..., nn.Module]) -> dict[str, Path]:
    """Files of random weights for the embedded backbones, so that none has to be pretrained."""
    folder = tmp_path_factory.mktemp("weights")
    files = {name: folder / f"{name}.safetensors" for name in EMBEDDED}
    for name, path in files.items():
        save_file(enliven(timm.create_model(name, num_classes=0)).state_dict(), path)
    return files


@pytest.fixture(scope="session")
def tiny(compose: Callable[..., Config], weights: dict[str, Path]) -> Callable[..., Config]:
    """As `compose`, for a run of seconds on the digits with random weights."""

    def tiny(*texts: str) -> Config:
        own = any(text.startswith(("model.pretrained", "model.weights")) for text in texts)
        name = "digits_resnet" if any(text.startswith("model=resnet") for text in texts) else "digits_vit"
        return compose(*TINY, *(() if own else (f"model.weights={weights[name]}",)), *texts)

    return tiny


@pytest.fixture(scope="session")
def build(tiny: Callable[..., Config]) -> Callable[..., Run]:
    """As `tiny`, with the model and the data that the settings ask for."""

    def build(*texts: str) -> Run:
        settings = tiny(*texts)
        experiment = Experiment.open(settings)
        banks, _ = experiment.banks()
        return Run(settings, experiment.recipe, experiment, experiment.adapt(banks), experiment.data(plain=True))

    return build
