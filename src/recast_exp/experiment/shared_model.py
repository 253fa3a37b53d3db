"""The model that a sequence tests: one backbone that takes each task from its file and keeps all of them."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from recast_exp.adapters import from_config
from recast_exp.errors import UserError
from recast_exp.experiment.experiment import Experiment
from recast_exp.experiment.sequence_tasks import SequenceTask
from recast_exp.heads import Features
from recast_exp.models.adapted import AdaptedModel, other_heads
from recast_exp.models.loading import load_task, restore
from recast_exp.tasks.model import RecastModel
from recast_exp.training.features import collect, extract
from recast_exp.training.loop import Tested, test


def opened(tasks: Sequence[SequenceTask]) -> list[Experiment]:
    """An experiment for each task, all on one backbone, which nobody may change.

    Raises:
        UserError: If the tasks have different backbones.
    """
    first = Experiment.open(tasks[0].settings)
    parts = []
    for task in tasks:
        for key in ("backbone", "weights", "img_size", "mean", "std", "pretrained", "arguments"):
            expected, got = (getattr(each.settings.model, key) for each in (tasks[0], task))
            if got != expected:
                raise UserError(
                    f"stage.tasks: expected tasks on one backbone, got model.{key}={got} for {task.name} and "
                    f"{expected} for {tasks[0].name}; set model.{key} for all"
                )
        adapter = from_config(task.settings.adapter)
        parts.append(Experiment(task.settings, adapter, first.cache, task.images, first.backbone))
    return parts


class Shared(ABC):
    """Tasks of task files, on copies of one backbone or on one."""

    @classmethod
    def of(cls, experiment: Experiment) -> Shared:
        """One model where tasks have coefficients and one head, else a copy of the backbone with the task at hand."""
        banks = experiment.banks()[0]
        pristine = experiment.backbone
        if banks is None or other_heads(copy.deepcopy(pristine.network)):
            return _FromFiles(experiment)
        own = dataclasses.replace(pristine, network=copy.deepcopy(pristine.network))
        return _OneModel(RecastModel.on(own, banks))

    @abstractmethod
    def add(self, path: Path) -> None:
        """Take the task of a file; tasks are numbered in the order in which they come."""

    @abstractmethod
    def model(self, number: int) -> contextlib.AbstractContextManager[nn.Module]:
        """The model of a task within the block: images [N, 3, S, S], normalised → logits [N, C]."""

    @abstractmethod
    def trunk(self, number: int) -> contextlib.AbstractContextManager[nn.Module]:
        """What computes the features of a task within the block: a timm model."""

    def test(self, number: int, experiment: Experiment) -> Tested:
        """Test a task on the images of an experiment."""
        with self.model(number) as network:
            return test(experiment.recipe, AdaptedModel(network, {}), experiment.data(keep=True, plain=True))

    def logits(self, number: int, experiment: Experiment) -> Tensor:
        """The logits [N, C] of a task for the test images of an experiment, of which there is at least one."""
        data = experiment.data(plain=True)
        with self.model(number) as network:
            loader = data.plain_dataloader("test")
            return collect(experiment.recipe, network, network, data, loader, "logits")[0].float()

    def features(self, number: int, experiment: Experiment, split: str) -> Features:
        """The features of the images of a split with the coefficients and the adapter of a task."""
        with self.trunk(number) as network:
            return extract(experiment.recipe, network, experiment.data(keep=True, plain=True), split)


class _OneModel(Shared):
    def __init__(self, model: RecastModel) -> None:
        self._model = model

    def add(self, path: Path) -> None:
        self._model.load_task(path, str(len(self._model.tasks)))

    @contextlib.contextmanager
    def model(self, number: int) -> Iterator[nn.Module]:
        with self._model.task(str(number)):
            yield self._model

    @contextlib.contextmanager
    def trunk(self, number: int) -> Iterator[nn.Module]:
        with self._model.task(str(number)):
            yield self._model.network


class _FromFiles(Shared):
    def __init__(self, experiment: Experiment) -> None:
        self._experiment = experiment
        self._paths: list[Path] = []

    def add(self, path: Path) -> None:
        self._paths.append(path)

    @contextlib.contextmanager
    def model(self, number: int) -> Iterator[nn.Module]:
        network = copy.deepcopy(self._experiment.backbone.network)
        restore(network, load_task(self._paths[number]), cache=self._experiment.cache)
        yield network.eval()

    trunk = model


def relative_of(path: Path) -> dict[str, Tensor]:
    """The relative form of a task file's coefficients: layer → [B, L]."""
    return load_task(path).relative


def mean_of(paths: Sequence[Path]) -> dict[str, Tensor]:
    """The mean of the relative forms of several tasks."""
    forms = [relative_of(path) for path in paths]
    return {layer: torch.stack([form[layer] for form in forms]).mean(0) for layer in forms[0]}
