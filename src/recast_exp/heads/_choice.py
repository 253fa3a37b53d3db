"""Choose the strength of a head: by validation images, or by cross-validation where there are none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from recast_exp.errors import UserError
from recast_exp.heads._base import Features, Head, Setting, Solution
from recast_exp.torch_state import one_thread

FOLDS = 5


@dataclass(frozen=True)
class Trial:
    """A setting on validation images.

    Attributes:
        setting: The strengths.
        accuracy: Share of the images that are classified correctly.
        loss: Mean cross-entropy at the temperature that is best for them.
        temperature: That temperature.
    """

    setting: Setting
    accuracy: float
    loss: float
    temperature: float


@dataclass(frozen=True)
class Chosen:
    """A head, chosen and solved.

    Attributes:
        solution: Weight and bias; calibrated, if the head is to be.
        temperature: What its logits were divided by.
        trial: The chosen setting on the validation images, before the head was solved again (`refit`).
        trials: All settings.
    """

    solution: Solution
    temperature: float
    trial: Trial
    trials: list[Trial]


@one_thread()
def choose(head: Head, train: Features, val: Features | None = None) -> Chosen:
    """Solve a head for each strength of its grid, and keep the one that does best on validation images.

    Of equals, the first in the grid wins.

    Args:
        head: A head that is solved.
        train: Features of the training images.
        val: Those of the validation images; None takes folds of the training images in turn.

    Raises:
        UserError: If a class has no training image, or only one where folds are needed.
    """
    train.check_classes()
    settings = head.settings()
    if not settings:
        raise UserError(f"head: expected a head that is solved, got {head.name}, which is trained")
    folds = [(train, val)] if val is not None else list(_folds(train))
    logits: list[list[Tensor]] = [[] for _ in settings]
    solved: list[Solution] = []
    for part, held in folds:
        for number, solution in enumerate(head.solve(part, settings)):
            logits[number].append(solution.logits(held.values))
            if val is not None:
                solved.append(solution)
    labels = torch.cat([held.labels for _, held in folds])
    trials = [_trial(setting, torch.cat(parts), labels) for setting, parts in zip(settings, logits, strict=True)]
    best = min(range(len(trials)), key=lambda number: _order(trials[number], head.select))
    if val is not None and head.refit == "train":
        solution = solved[best]
    else:
        (solution,) = head.solve(train if val is None else train + val, [settings[best]])
    heat = trials[best].temperature if head.calibrate else 1.0
    return Chosen(solution.scaled(1 / heat), heat, trials[best], trials)


def _order(trial: Trial, select: str) -> tuple[float, float]:
    """What is smallest for the best trial."""
    return (trial.loss, -trial.accuracy) if select == "loss" else (-trial.accuracy, trial.loss)


def _trial(setting: Setting, logits: Tensor, labels: Tensor) -> Trial:
    heat = temperature(logits, labels)
    accuracy = (logits.argmax(1) == labels).double().mean().item()
    return Trial(setting, accuracy, F.cross_entropy(logits / heat, labels).item(), heat)


def temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature T that minimises the mean cross-entropy of logits / T, between 10⁻⁴ and 10⁴.

    Args:
        logits: [N, C].
        labels: int64 [N].
    """
    from scipy.optimize import minimize_scalar

    if (logits == logits[:, :1]).all():
        return 1.0

    def loss(log_scale: float) -> float:
        return float(F.cross_entropy(logits.double() * 10**log_scale, labels))

    # Convex in the scale 1 / T, so it has one minimum in its logarithm, too
    found = minimize_scalar(loss, bounds=(-4, 4), method="bounded", options={"xatol": 1e-4})
    return float(10**-found.x)


def describe(setting: Setting) -> str:
    """A setting in one line: `lda shrinkage=0.5`."""
    rest = [f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in setting.items()]
    if "head" in setting:
        rest = [str(setting["head"]), *rest[1:]]
    return " ".join(rest)


def _folds(features: Features) -> Iterator[tuple[Features, Features]]:
    """Training and validation parts, in each of which a class has its share; the images' order decides."""
    counts = torch.bincount(features.labels, minlength=features.num_classes)
    fewest = int(counts.min())
    if fewest < 2:
        raise UserError(
            f"head: expected validation images, or two training images of each class, got {fewest} of class "
            f"{int(counts.argmin())}"
        )
    place = torch.empty_like(features.labels)
    for number in range(features.num_classes):
        rows = (features.labels == number).nonzero().flatten()
        place[rows] = torch.arange(len(rows))
    count = min(FOLDS, fewest)
    for fold in range(count):
        held = place % count == fold
        yield features.select(~held), features.select(held)
