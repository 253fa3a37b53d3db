"""Images whose task is not known: one joint head over all classes that were seen, from sums over images alone.

Each task adds the sums of its training features (`heads.Moments`: class means, Gram matrix), never its images, so the
head of all classes is exact and the same for any order of the tasks. Sources: LDA with a shared covariance; RanPAC
(McDonnell et al. 2023, arXiv 2307.02251), ridge regression on random ReLU features; First Session Adaptation
(Panos et al. 2023, arXiv 2303.13199), the features of the model that was adapted to the first task.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

import torch
from torch import Tensor

from recast_exp.experiment.experiment import Experiment
from recast_exp.experiment.features import frozen_features
from recast_exp.experiment.shared_model import Shared
from recast_exp.heads import Features, Moments, Solution
from recast_exp.heads.lda import LDA, discriminants
from recast_exp.heads.ridge import Ridge, regressions

NEAREST, LDA_FROZEN, RANPAC, FIRST = "frozen, nearest mean", "frozen, LDA", "frozen, RanPAC", "first session, LDA"


@dataclass(frozen=True)
class Score:
    """Mean over the tasks of the accuracy on their test images.

    Attributes:
        known: Only the classes of the image's own task compete.
        unknown: All classes that were seen compete.
        per_task: `known` of each task.
    """

    known: float
    unknown: float
    per_task: list[float]


def score(logits: Sequence[Tensor], labels: Sequence[Tensor], sizes: Sequence[int]) -> Score:
    """Score logits over all classes.

    Args:
        logits: For each task, [N, C] over the classes of all tasks, one task's after another's.
        labels: For each task, int64 [N] within its own classes.
        sizes: Number of classes of each task.
    """
    known, unknown, start = [], [], 0
    for values, own, size in zip(logits, labels, sizes, strict=True):
        known.append((values[:, start : start + size].argmax(1) == own).double().mean().item())
        unknown.append((values.argmax(1) == own + start).double().mean().item())
        start += size
    return Score(fmean(known), fmean(unknown), known)


@dataclass
class _Statistics:
    """What is kept of one kind of features: sums of the training images; validation and test images as they are."""

    moments: list[Moments] = field(default_factory=list)
    val: list[Features] = field(default_factory=list)
    test: list[Features] = field(default_factory=list)

    def add(self, train: Features, val: Features, test: Features) -> None:
        train.check_classes()
        self.moments.append(Moments.of(train))
        self.val.append(val)
        self.test.append(test)

    @property
    def joint(self) -> Moments:
        return Moments.joined(self.moments)

    def best(self, solutions: Sequence[Solution], sizes: Sequence[int]) -> Solution:
        """The solution with the best accuracy on the validation images; of equals, the first."""

        def accuracy(solution: Solution) -> float:
            logits = [solution.logits(features.values) for features in self.val]
            return score(logits, [features.labels for features in self.val], sizes).unknown

        return max(solutions, key=accuracy)

    def logits(self, solution: Solution) -> list[Tensor]:
        return [solution.logits(features.values) for features in self.test]


class UnknownTask:
    """Joint heads over the classes of all tasks so far, and the task that they infer.

    Args:
        random_features: Number of RanPAC's random features.
        seed: Their seed.
    """

    def __init__(self, random_features: int, seed: int) -> None:
        self._random_features = random_features
        self._seed = seed
        self._parts: list[Experiment] = []
        self._frozen, self._random, self._first = _Statistics(), _Statistics(), _Statistics()

    def add(self, experiment: Experiment, shared: Shared) -> None:
        """Add the images of a task.

        Args:
            experiment: The task, whose backbone is as it was pretrained.
            shared: The model that has the first task.
        """
        self._parts.append(experiment)
        frozen = [frozen_features(experiment, split) for split in ("train", "val", "test")]
        self._frozen.add(*frozen)
        self._random.add(*map(self._lifted, frozen))
        self._first.add(*(shared.features(0, experiment, split) for split in ("train", "val", "test")))

    def scores(self) -> dict[str, Score]:
        """Method → its score on the test images of all tasks so far."""
        labels = [features.labels for features in self._frozen.test]
        means = self._frozen.joint.means
        nearest = Solution(means, -means.square().sum(1) / 2)
        logits = {
            NEAREST: self._frozen.logits(nearest),
            LDA_FROZEN: self._frozen.logits(self._lda(self._frozen)),
            RANPAC: self._random.logits(
                self._random.best([*regressions(self._random.joint, Ridge().strengths)], self._sizes)
            ),
            FIRST: self._first.logits(self._lda(self._first)),
        }
        return {name: score(values, labels, self._sizes) for name, values in logits.items()}

    def inferred(self, shared: Shared) -> float:
        """The accuracy of the tasks' own models, each image being given to the task that its frozen features suggest.

        The task is that of the class that LDA on the features of the frozen backbone takes it for.

        Args:
            shared: The model that has all tasks so far.
        """
        solution = self._lda(self._frozen)
        owner = torch.cat([torch.full((size,), number) for number, size in enumerate(self._sizes)])
        accuracies = []
        for number, (part, features) in enumerate(zip(self._parts, self._frozen.test, strict=True)):
            tasks = owner[solution.logits(features.values).argmax(1)]
            # An image that is given to another task is wrong, whatever that task's model takes it for
            rows = (tasks == number).nonzero().flatten()
            correct = 0
            if len(rows):
                some = Experiment(
                    part.settings, part.adapter, part.cache, part.images.with_test(rows.numpy()), part.backbone
                )
                correct = int((shared.logits(number, some).argmax(1) == features.labels[rows]).sum())
            accuracies.append(correct / len(tasks))
        return fmean(accuracies)

    @property
    def _sizes(self) -> list[int]:
        return [len(part.images.classes) for part in self._parts]

    def _lda(self, statistics: _Statistics) -> Solution:
        return statistics.best([*discriminants(statistics.joint, LDA().shrinkages)], self._sizes)

    def _lifted(self, features: Features) -> Features:
        generator = torch.Generator().manual_seed(self._seed)
        projection = torch.randn(features.width, self._random_features, generator=generator)
        return Features((features.values @ projection).relu(), features.labels, features.num_classes)
