"""Choose the strength of a head: by validation images, or by cross-validation where there are none."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from recast_exp.config import converted
from recast_exp.errors import UserError
from recast_exp.heads._base import LOGITS, Features, Head, Setting, Solution
from recast_exp.torch_state import one_thread

FOLDS = 5

_Parts = list[tuple[Solution, Features]]


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
        validated: The head that has not seen the validation images, where `solution` has (`refit`); else None.
    """

    solution: Solution
    temperature: float
    trial: Trial
    trials: list[Trial]
    validated: Solution | None = None


@one_thread()
def choose(head: Head, train: Features, val: Features | None = None) -> Chosen:
    """Solve a head for each strength of its grid, and keep the one that does best on validation images.

    Of equals, the first in the grid wins.

    Args:
        head: A head that is solved.
        train: Features of the training images.
        val: Those of the validation images; None takes folds of the training images in turn.

    Raises:
        UserError: If a class has no training image, or only one where folds are needed; if the features are not of one
            kind; or if an option of the head is wrong.
    """
    if not isinstance(head, Head):
        raise UserError(f"head: expected a head, such as heads.load('best')(), got {head!r:.60}")
    converted.check(head)
    for name, given in (("train", train), ("val", val)):
        if not isinstance(given, Features) and (given is not None or name == "train"):
            raise UserError(f"{name}: expected Features, got {type(given).__name__}")
    if val is not None and (val.width, val.num_classes) != (train.width, train.num_classes):
        raise UserError(
            f"val: expected {train.width} features of {train.num_classes} classes, as the training images have, got "
            f"{val.width} of {val.num_classes}"
        )
    train.check_classes()
    if not head.settings():
        why = "whose lists of strengths are empty" if head.solved else "which is trained"
        raise UserError(f"head: expected a head that is solved, got {head.name}, {why}")
    settings = head.grid(train.num_classes)
    trials: list[Trial] = []
    best, solution = 0, None
    # One after the other, as the logits of all would take gigabytes
    for number, parts in enumerate(_solved(head, settings, train, val)):
        trials.append(_trial(settings[number], parts))
        if number == 0 or _order(trials[number], head.select) < _order(trials[best], head.select):
            best, solution = number, parts[0][0]
    heat = trials[best].temperature if head.calibrate else 1.0
    validated = None
    if solution is None or val is None or head.refit != "train":
        validated = None if solution is None or val is None else solution.scaled(1 / heat)
        (solution,) = _solutions(head, train if val is None else train + val, [settings[best]])
    return Chosen(solution.scaled(1 / heat), heat, trials[best], trials, validated)


def _solved(head: Head, settings: Sequence[Setting], train: Features, val: Features | None) -> Iterator[_Parts]:
    """For each setting, the solutions and the held images that each is measured on."""
    if val is not None:
        for solution in _solutions(head, train, settings):
            yield [(solution, val)]
        return
    folds = [[(solution, held) for solution in _solutions(head, part, settings)] for part, held in _folds(train)]
    yield from (list(parts) for parts in zip(*folds, strict=True))


def _solutions(head: Head, features: Features, settings: Sequence[Setting]) -> Iterator[Solution]:
    """What a head solves, which is looked at: that of another package may be anything.

    Raises:
        UserError: If it is not one solution for each setting, in their order.
    """
    found = iter(head.solve(features, settings) or ())
    for setting in settings:
        solution = next(found, None)
        if wrong := _problem(solution, setting, features):
            raise UserError(
                f"head: expected of {head.name} a Solution for each setting, in order, with a weight "
                f"[{features.num_classes}, {features.width}] and a bias [{features.num_classes}] of finite float64 "
                f"numbers, got {wrong} for {describe(setting)}"
            )
        assert solution is not None
        yield solution
    if next(found, None) is not None:
        raise UserError(f"head: expected of {head.name} {len(settings)} solutions, one for each setting, got more")


def _problem(solution: object, setting: Setting, features: Features) -> str | None:
    """What is wrong with a solution, in words."""
    if not isinstance(solution, Solution):
        return "none" if solution is None else f"a {type(solution).__name__}"
    if solution.setting != setting:
        return f"that of {describe(solution.setting) or 'no setting'}"
    shapes = {"weight": (features.num_classes, features.width), "bias": (features.num_classes,)}
    for name, shape in shapes.items():
        tensor: Tensor = getattr(solution, name)
        if tensor.dtype != torch.float64 or tensor.shape != shape:
            return f"a {name} {tensor.dtype} {list(tensor.shape)}"
        if not tensor.isfinite().all():
            return f"a {name} with NaN or infinity"
    return None


def _order(trial: Trial, select: str) -> tuple[float, float]:
    """What is smallest for the best trial."""
    return (trial.loss, -trial.accuracy) if select == "loss" else (-trial.accuracy, trial.loss)


def _trial(setting: Setting, parts: _Parts) -> Trial:
    """Measure a setting. With many classes, the temperature is that of evenly spaced images: all would take minutes."""
    sample = [(solution, _thinned(held, len(parts))) for solution, held in parts]
    known = [scores for solution, held in sample for scores in solution.scores(held)]
    logits, labels = (torch.cat(each) for each in zip(*known, strict=True))
    heat = temperature(logits, labels)
    scores: Iterator[tuple[Tensor, Tensor]] = iter([(logits, labels)])
    if len(labels) < sum(len(held) for _, held in parts):
        scores = itertools.chain.from_iterable(solution.scores(held) for solution, held in parts)
    right, loss, count = 0, 0.0, 0
    for logits, labels in scores:
        right += int((logits.argmax(1) == labels).sum())
        loss += F.cross_entropy(logits / heat, labels, reduction="sum").item()
        count += len(labels)
    return Trial(setting, right / count, loss / count, heat)


def _thinned(features: Features, parts: int) -> Features:
    """At most so many evenly spaced images that the logits of all parts fit `LOGITS`."""
    most = max(1, LOGITS // (features.num_classes * parts))
    if len(features) <= most:
        return features
    return features.select(torch.linspace(0, len(features) - 1, most).round().long())


def temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature T that minimises the mean cross-entropy of logits / T, between 10⁻⁴ and 10⁴.

    Of logits that spread over more than 10⁴, both bounds are times their spread: LDA of one image of each class has
    some of 10¹⁰.

    Where all N images are right, that would be 0, and the first wrong one of a test would have an endless loss. The
    targets are then softened, as Platt does it ("Probabilistic outputs for support vector machines", 1999): by
    Laplace's rule of succession, N of N right let expect (N + 1) / (N + 2) of others.

    Args:
        logits: [N, C].
        labels: int64 [N].
    """
    from scipy.optimize import minimize_scalar

    if (logits == logits[:, :1]).all():
        return 1.0

    targets = labels
    if bool((logits.argmax(1) == labels).all()):
        right = (len(labels) + 1) / (len(labels) + 2)
        targets = logits.new_full(logits.shape, (1 - right) / (logits.shape[1] - 1), dtype=torch.float64)
        targets[torch.arange(len(labels)), labels] = right

    exact = logits.double()
    spread = float((exact - exact.mean(1, keepdim=True)).abs().amax())
    unit = spread if spread > 1e4 else 1.0
    exact = exact / unit

    def loss(log_scale: float) -> float:
        return float(F.cross_entropy(exact * 10**log_scale, targets))

    # Convex in the scale 1 / T, so it has one minimum in its logarithm, too
    found = minimize_scalar(loss, bounds=(-4, 4), method="bounded", options={"xatol": 1e-4})
    return float(unit * 10**-found.x)


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
