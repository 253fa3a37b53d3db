"""Each head against an independent implementation, and the sums that it is solved from."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.covariance import ledoit_wolf as sklearn_ledoit_wolf
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.linear_model import Ridge as SklearnRidge
from torch.nn import functional as F  # noqa: N812

from recast_exp.errors import UserError
from recast_exp.heads import Features, Moments, choose, temperature
from recast_exp.heads._base import Solution
from recast_exp.heads._choice import Trial, _folds, _order, _trial, describe
from recast_exp.heads.best import Best
from recast_exp.heads.lda import LDA, discriminants, ledoit_wolf
from recast_exp.heads.logistic import Logistic
from recast_exp.heads.nearest_mean import NearestMean
from recast_exp.heads.ridge import Ridge, leave_one_out, regressions, solve_ridge


@pytest.fixture(params=[(60, 8), (20, 50)], ids=["many images", "many features"])
def features(request: pytest.FixtureRequest) -> Features:
    images, width = request.param
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(images) % 3
    labels[:4] = 0  # classes of different sizes
    means = torch.randn(3, width, generator=generator)
    return Features(means[labels] + torch.randn(images, width, generator=generator) * 1.5 + 4, labels, 3)


@pytest.mark.parametrize("shrinkage", [0.1, 0.5, 0.9])
def test_lda_is_scikit_learns(features: Features, shrinkage: float) -> None:
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage)
    theirs.fit(features.values.double().numpy(), features.labels.numpy())
    (ours,) = LDA().solve(features, [{"shrinkage": shrinkage}])
    # Of logits, only the differences between classes matter
    for found, expected in ((ours.weight.numpy(), theirs.coef_), (ours.bias.numpy(), theirs.intercept_)):
        np.testing.assert_allclose(found - found.mean(0), expected - expected.mean(0), rtol=1e-6, atol=1e-8)


def test_ledoit_wolf_is_scikit_learns(features: Features) -> None:
    means = features.moments.means
    centred = (features.values.double() - means[features.labels]).numpy()
    _, expected = sklearn_ledoit_wolf(centred, assume_centered=True)
    assert 0 < expected < 1
    assert ledoit_wolf(features, features.moments) == pytest.approx(expected, rel=1e-9)
    small = Features(features.values * 2.0**-10, features.labels, features.num_classes)
    assert ledoit_wolf(small, small.moments) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("strength", [1e-2, 1.0])
def test_ridge_is_scikit_learns(features: Features, strength: float) -> None:
    values = features.values.double().numpy()
    penalty = strength * ((values - values.mean(0)) ** 2).sum() / values.shape[1]
    theirs = SklearnRidge(alpha=penalty).fit(values, F.one_hot(features.labels).double().numpy())
    (ours,) = Ridge().solve(features, [{"strength": strength}])
    np.testing.assert_allclose(ours.weight.numpy(), theirs.coef_, rtol=1e-6, atol=1e-10)
    np.testing.assert_allclose(ours.bias.numpy(), theirs.intercept_, rtol=1e-6)
    weight, bias = solve_ridge(features.values.double(), features.labels, 3, strength)
    torch.testing.assert_close(weight, ours.weight)
    torch.testing.assert_close(bias, ours.bias)


@pytest.mark.parametrize("images", [4, 9])
def test_gradients_pass_through_the_solve(images: int) -> None:
    """Both forms: fewer images than features, and more."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(images, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    strength = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(images) % 2

    def logits(values: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
        weight, bias = solve_ridge(values, labels, 2, strength)
        return torch.ones(2, 6, dtype=torch.float64) @ weight.T + bias

    assert torch.autograd.gradcheck(logits, (values, strength))
    assert torch.autograd.gradcheck(lambda v, s: leave_one_out(v, labels, 2, s), (values, strength))


def test_leave_one_out_is_a_solve_without_that_image(features: Features) -> None:
    values, targets = features.values.double(), F.one_hot(features.labels, 3).double()
    centred = values - values.mean(0)
    penalty = 0.2 * centred.square().sum() / features.width
    predicted = leave_one_out(values, features.labels, 3, 0.2)
    for image in (0, 7, len(features) - 1):
        others = torch.arange(len(features)) != image
        theirs = SklearnRidge(alpha=float(penalty)).fit(values[others].numpy(), targets[others].numpy())
        np.testing.assert_allclose(
            predicted[image].numpy(), theirs.predict(values[image : image + 1].numpy())[0], rtol=1e-6, atol=1e-9
        )


@pytest.mark.parametrize("weight", ["none", "balanced"])
def test_logistic_regression_has_converged(features: Features, weight: str) -> None:
    """At the minimum, the gradient of penalty and loss vanishes: computed here from the solution alone."""
    head = Logistic(class_weight=weight, tolerance=1e-8)
    (solution,) = head.solve(features, [{"C": 0.1}])
    values = features.values.double()
    scale = (values - values.mean(0)).square().mean().sqrt()
    parameters = solution.weight.clone().requires_grad_(), solution.bias.clone().requires_grad_()
    logits = values @ parameters[0].T + parameters[1]
    per_class = head.image_weights(torch.bincount(features.labels))
    losses = F.cross_entropy(logits, features.labels, reduction="none") * per_class[features.labels]
    (0.5 * (parameters[0] * scale).square().sum() + 0.1 * losses.sum()).backward()
    for parameter in parameters:
        assert parameter.grad is not None
    # An intercept moves with the weight, as the features are centred for the solver
    weight_gradient = parameters[0].grad - parameters[1].grad[:, None] * values.mean(0)
    assert weight_gradient.abs().max() / scale < 1e-4
    assert parameters[1].grad.abs().max() < 1e-4


def test_two_classes_have_two_rows() -> None:
    features = Features(torch.randn(20, 4), torch.arange(20) % 2, 2)
    (solution,) = Logistic().solve(features, [{"C": 1.0}])
    assert solution.weight.shape == (2, 4)
    torch.testing.assert_close(solution.weight[0], -solution.weight[1])
    # The two rows say what the single one of scikit-learn says
    mean = features.values.double().mean(0)
    scale = (features.values.double() - mean).square().mean().sqrt()
    theirs = LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000).fit(
        ((features.values.double() - mean) / scale).numpy(), features.labels.numpy()
    )
    (ours,) = Logistic(tolerance=1e-10).solve(features, [{"C": 1.0}])
    found = torch.softmax(ours.logits(features.values), 1).numpy()
    np.testing.assert_allclose(
        found, theirs.predict_proba(((features.values.double() - mean) / scale).numpy()), atol=1e-5
    )


def test_nearest_mean_is_cosine_similarity(features: Features) -> None:
    (solution,) = NearestMean().solve(features, [{"centre": "none"}])
    normalised = F.normalize(features.values.double())
    means = torch.stack([normalised[features.labels == number].mean(0) for number in range(3)])
    cosines = F.cosine_similarity(features.values.double()[:, None], means[None], dim=2)
    assert torch.equal(solution.logits(features.values).argmax(1), cosines.argmax(1))


def test_the_nearest_mean_of_centred_features(features: Features) -> None:
    (solution,) = NearestMean().solve(features, [{"centre": "mean"}])
    values = features.values.double() - features.values.double().mean(0)
    normalised = F.normalize(values)
    means = torch.stack([normalised[features.labels == number].mean(0) for number in range(3)])
    expected = values @ F.normalize(means).T
    torch.testing.assert_close(solution.logits(features.values), expected, rtol=1e-6, atol=1e-8)


def test_sums_alone_give_the_settings_and_solutions_of_the_heads(features: Features) -> None:
    """As a sequence solves them, which keeps no features."""
    for solved, head, name in (
        (discriminants(features.moments, [0.3, 0.5]), LDA(), "shrinkage"),
        (regressions(features.moments, [0.3, 0.5]), Ridge(), "strength"),
    ):
        for found, expected in zip(solved, head.solve(features, [{name: 0.3}, {name: 0.5}]), strict=True):
            assert found.setting == expected.setting
            assert torch.equal(found.weight, expected.weight) and torch.equal(found.bias, expected.bias)


def test_ledoit_wolf_of_many_parts_and_of_odd_features(features: Features, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ledoit_wolf(features, features.moments)
    monkeypatch.setattr("recast_exp.heads._base.CHUNK", 7)
    assert ledoit_wolf(features, features.moments) == pytest.approx(whole, rel=1e-12)
    assert ledoit_wolf(features, Moments.of(features, torch.tensor([1.0, 1.0, 1.0]))) == pytest.approx(whole)
    # As many directions as features, and the same variance along each: nothing but shrinkage
    alike = Features(torch.cat([torch.eye(4), -torch.eye(4)]), torch.zeros(8, dtype=torch.long), 1)
    assert ledoit_wolf(alike, alike.moments) == 1.0
    few = Features(torch.randn(4, 40, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 0, 1, 1]), 2)
    centred = few.values.double() - few.moments.means[few.labels]
    _, expected = sklearn_ledoit_wolf(centred.numpy(), assume_centered=True)
    assert ledoit_wolf(few, few.moments) == pytest.approx(expected, rel=1e-9)
    # Nearly the same variance along each: the covariance is less certain than they differ
    axes = torch.diag(torch.tensor([1.0, 1.0, 1.0, 1.001]))
    nearly = Features(torch.cat([axes, -axes]), torch.zeros(8, dtype=torch.long), 1)
    assert ledoit_wolf(nearly, nearly.moments) == 1.0


def test_ledoit_wolf_is_tried_where_it_is_asked_for() -> None:
    assert LDA(shrinkages=[0.5]).settings() == [{"shrinkage": 0.5}, {"shrinkage": "ledoit_wolf"}]
    assert LDA(shrinkages=[0.5], ledoit_wolf=False).settings() == [{"shrinkage": 0.5}]


@pytest.mark.parametrize("solve", [solve_ridge, leave_one_out])
def test_a_ridge_head_has_rows_for_classes_without_images(solve: Callable[..., object]) -> None:
    """As in the support of an episode."""
    values = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).double()
    found = solve(values, torch.tensor([0, 1, 0, 1, 2, 2]), 5, 0.1)
    rows = found[0] if isinstance(found, tuple) else found.T  # type: ignore[attr-defined]
    assert len(rows) == 5
    torch.testing.assert_close(rows[3:], torch.zeros_like(rows[3:]), rtol=0, atol=1e-9)


def test_folds_hold_each_image_once_and_each_class_in_its_share(features: Features) -> None:
    held = torch.zeros(len(features))
    parts = list(_folds(features))
    assert len(parts) == 5
    for train, val in parts:
        assert len(train) + len(val) == len(features)
        shares = torch.bincount(val.labels, minlength=3) / torch.bincount(features.labels, minlength=3)
        assert (shares - 1 / 5).abs().max() < 1 / 5
        for row in val.values:
            held += (features.values == row).all(1)
    assert torch.equal(held, torch.ones(len(features)))


def test_folds_divide_each_class_evenly() -> None:
    counts = (5, 7, 23)
    labels = torch.cat([torch.full((count,), number) for number, count in enumerate(counts)])
    labels = labels[torch.randperm(35, generator=torch.Generator().manual_seed(0))]
    found = [torch.bincount(val.labels, minlength=3) for _, val in _folds(Features(torch.ones(35, 2), labels, 3))]
    for number, count in enumerate(counts):
        assert sorted({int(each[number]) for each in found}) == sorted({count // 5, -(-count // 5)})


def test_of_equal_losses_the_more_accurate_wins_and_of_equal_accuracies_the_smaller_loss() -> None:
    right, wrong = Trial({}, 0.8, 0.5, 1.0), Trial({}, 0.7, 0.5, 1.0)
    assert _order(right, "loss") < _order(wrong, "loss")
    sure, unsure = Trial({}, 0.8, 0.4, 1.0), Trial({}, 0.8, 0.5, 1.0)
    assert _order(sure, "accuracy") < _order(unsure, "accuracy")


def test_the_loss_of_parts_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 2
    held = Features(torch.randn(200, 3, generator=generator) + labels[:, None], labels, 2)
    solution = Solution(torch.randn(2, 3, generator=generator).double(), torch.zeros(2).double(), {})
    for name in ("_base", "_choice"):
        monkeypatch.setattr(f"recast_exp.heads.{name}.LOGITS", 120)  # 60 images at a time
    trial = _trial({}, [(solution, held)])
    logits = solution.logits(held.values)
    assert trial.loss == pytest.approx(F.cross_entropy(logits / trial.temperature, labels).item(), rel=1e-9)
    assert trial.accuracy == (logits.argmax(1) == labels).double().mean().item()
    assert trial.temperature != pytest.approx(temperature(logits, labels), rel=1e-4)


def test_two_images_of_each_class_are_enough_for_folds() -> None:
    few = Features(torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 2, 1, 0]), 3)
    assert [(len(train), sorted(val.labels.tolist())) for train, val in _folds(few)] == [(3, [0, 1, 2])] * 2
    absent = Features(few.values, few.labels, 4)
    with pytest.raises(UserError, match="got 0 of class 3"):
        next(iter(_folds(absent)))


def test_sums_of_batches_are_those_of_all(features: Features) -> None:
    weights = torch.tensor([0.5, 1.0, 2.0])
    whole = Moments.of(features, weights)
    streamed = Moments.empty(3, features.width, weights)
    for start in range(0, len(features), 7):
        streamed.add(features.values[start : start + 7], features.labels[start : start + 7])
    streamed = streamed.about(whole.origin)
    for name in ("counts", "sums", "gram"):
        torch.testing.assert_close(getattr(streamed, name), getattr(whole, name))
    centred = features.values.double() - features.moments.means[features.labels]
    expected = (centred * weights.double()[features.labels, None]).T @ centred / weights.double()[features.labels].sum()
    torch.testing.assert_close(whole.within(), expected)


def test_sums_of_two_tasks_are_those_of_all_their_classes() -> None:
    generator = torch.Generator().manual_seed(0)
    values, labels = torch.randn(8, 3, generator=generator), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    weights = torch.tensor([1.0, 2.0, 0.5, 1.0])
    parts = [
        Moments.of(Features(values[:4], labels[:4], 2), weights[:2]),
        Moments.of(Features(values[4:], labels[4:] - 2, 2), weights[2:]),
    ]
    joined, whole = Moments.joined(parts), Moments.of(Features(values, labels, 4), weights)
    joined = joined.about(whole.origin)
    for name in ("counts", "sums", "gram", "weights"):
        torch.testing.assert_close(getattr(joined, name), getattr(whole, name))


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({"shrinkage": 0.5}, "shrinkage=0.5"),
        ({"shrinkage": "ledoit_wolf"}, "shrinkage=ledoit_wolf"),
        ({"head": "lda", "shrinkage": 0.0001}, "lda shrinkage=0.0001"),
        ({"head": "ridge", "penalty": 10.0, "centre": "mean"}, "ridge penalty=10 centre=mean"),
    ],
)
def test_a_setting_in_one_line(setting: dict[str, float | str], expected: str) -> None:
    assert describe(setting) == expected


def test_sums_take_batches_that_lack_classes() -> None:
    values, labels = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 0, 1, 1, 2, 2])
    moments = Moments.empty(3, 2)
    for label in (0, 2, 1):
        moments.add(values[labels == label], labels[labels == label])
    assert moments.counts.tolist() == [2, 2, 2]
    torch.testing.assert_close(moments.within(), Features(values, labels, 3).moments.within())


def test_balanced_weights_also_where_a_class_has_one_image() -> None:
    weights = LDA(class_weight="balanced").image_weights(torch.tensor([1, 4]))
    assert weights.tolist() == [2.5, 0.625]


def test_one_class_has_one_row_of_zeros() -> None:
    features = Features(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(4).long(), 1)
    (solution,) = Logistic().solve(features, [{"C": 2.0}])
    assert solution.weight.tolist() == [[0.0, 0.0, 0.0]]
    assert solution.bias.tolist() == [0.0]
    assert solution.setting == solution.scaled(3.0).setting == {"C": 2.0}


def test_logistic_regression_stops_after_so_many_iterations(features: Features) -> None:
    (converged,), (stopped,) = (Logistic(max_iterations=most).solve(features, [{"C": 100.0}]) for most in (2000, 2))
    assert (converged.weight - stopped.weight).norm() > 0.1 * converged.weight.norm()


def test_the_temperature_is_that_of_the_smallest_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(50) % 3
    logits = 7 * (F.one_hot(labels, 3) + torch.randn(50, 3, generator=generator)).double()
    heat = temperature(logits, labels)
    grid = [heat * factor for factor in (0.9, 0.99, 1.0, 1.01, 1.1)]
    losses = [F.cross_entropy(logits / each, labels).item() for each in grid]
    assert min(losses) == losses[2]
    assert temperature(torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])) == 1.0


def test_where_all_images_are_right_the_next_one_may_be_wrong() -> None:
    """Without a bound on their confidence, the first wrong image of a test would have an endless loss."""
    labels = torch.arange(12) % 3
    margins = F.one_hot(labels, 3).double() * torch.linspace(50, 150, 12)[:, None]
    for logits in (margins, 1e-3 * margins):
        heat = temperature(logits, labels)
        probabilities = (logits / heat).softmax(1)[torch.arange(12), labels]
        assert 0.7 < float(probabilities.min()) < float(probabilities.mean()) < 0.95
        targets = torch.full((12, 3), 0.5 / 14, dtype=torch.float64).scatter(1, labels[:, None], 13 / 14)
        losses = [F.cross_entropy(logits / each, targets).item() for each in (0.99 * heat, heat, 1.01 * heat)]
        assert min(losses) == losses[1]
    even = 100 * F.one_hot(labels, 3).double()  # all with the same margin: the expected share is met
    assert float((even / temperature(even, labels)).softmax(1).amax()) == pytest.approx(13 / 14, abs=1e-4)


def test_temperatures_stay_between_a_ten_thousandth_and_ten_thousand() -> None:
    labels = torch.arange(12) % 3
    right, wrong = F.one_hot(labels, 3).double(), F.one_hot((labels + 1) % 3, 3).double()
    assert temperature(1e-6 * right, labels) == pytest.approx(1e-4, rel=0.01)
    assert temperature(1e4 * wrong, labels) == pytest.approx(1e4, rel=0.01)


@pytest.mark.parametrize("size", [1e6, 1e10, 1e200])
def test_logits_of_any_size_have_their_temperature(size: float) -> None:
    labels = torch.arange(50) % 3
    logits = F.one_hot(labels, 3).double() + 0.5 * torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    assert (logits.argmax(1) != labels).any()
    assert temperature(size * logits, labels) == pytest.approx(size * temperature(logits, labels), rel=1e-3)
    wrong = F.one_hot((labels + 1) % 3, 3).double()
    assert (size * wrong / temperature(size * wrong, labels)).softmax(1).amax().item() == pytest.approx(1 / 3, abs=1e-4)


_LARGE = """
import resource, sys, torch
from recast_exp.heads import Features, choose
from recast_exp.heads.{name} import {kind}
labels = torch.arange({images}) % {classes}
values = torch.randn({images}, 768)
values[:, :{classes}] += 2 * torch.nn.functional.one_hot(labels, {classes}).float()
train = Features(values, labels, {classes})
choose({kind}({options}), train, Features(values[:1000], labels[:1000], {classes}))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("images", "classes"), [(50_000, 100), (5_994, 200)], ids=["CIFAR-100", "CUB"])
@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("lda", "LDA", ""),
        ("ridge", "Ridge", ""),
        ("nearest_mean", "NearestMean", ""),
        ("logistic", "Logistic", "strengths=[1e-3]"),
    ],
)
def test_large_sets_take_less_than_2_gib(images: int, classes: int, name: str, kind: str, options: str) -> None:
    code = _LARGE.format(images=images, classes=classes, name=name, kind=kind, options=options)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(run.stdout) * unit < 2 * 2**30


def test_an_affine_map_of_the_choice_is_what_a_classifier_computes(features: Features) -> None:
    chosen = choose(LDA(), features, features)
    linear = torch.nn.Linear(features.width, 3)
    with torch.no_grad():
        linear.weight.copy_(chosen.solution.weight)
        linear.bias.copy_(chosen.solution.bias)
        logits = linear(features.values)
    torch.testing.assert_close(logits.double(), chosen.solution.logits(features.values), rtol=1e-4, atol=1e-3)


def test_scores_of_many_classes_are_made_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    values, labels = torch.randn(60, 5, generator=generator), torch.arange(60) % 4
    values += 2 * torch.eye(5)[labels]
    train, val = Features(values[:40], labels[:40], 4), Features(values[40:], labels[40:], 4)
    whole = [choose(Ridge(calibrate=False), train, held) for held in (val, None)]
    for name in ("_base", "_choice"):
        monkeypatch.setattr(f"recast_exp.heads.{name}.LOGITS", 28)
    assert [len(part) for part, _ in whole[0].solution.scores(val)] == [7, 7, 6]
    for found, known in zip([choose(Ridge(calibrate=False), train, held) for held in (val, None)], whole, strict=True):
        for trial, other in zip(found.trials, known.trials, strict=True):
            assert trial.setting == other.setting
            assert trial.accuracy == other.accuracy  # of all images
            # The temperature is that of a third of the images, so the loss is no better than at the best
            assert other.loss - 1e-9 <= trial.loss < other.loss + 0.5


def test_best_leaves_out_what_takes_hours_with_thousands_of_classes(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert {setting["head"] for setting in Best().grid(1000)} == {"logistic", "ridge", "lda", "nearest_mean"}
    assert {setting["head"] for setting in Best().grid(1001)} == {"ridge", "lda", "nearest_mean"}
    assert "head=best: logistic is left out, with 1001 classes" in caplog.text
    assert Logistic().grid(10_000) == Logistic().settings()


def test_one_image_of_each_class_is_a_nearest_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(50, 6, generator=generator)
    train = Features(values, torch.arange(50), 50)
    val = Features(values + 0.01 * torch.randn(50, 6, generator=generator), torch.arange(50), 50)
    chosen = choose(LDA(), train, val)
    assert chosen.trial.accuracy == 1.0
    assert all(math.isfinite(trial.loss) for trial in chosen.trials)
    assert chosen.solution.weight.float().isfinite().all()


@pytest.mark.parametrize("change", ["a constant feature", "an offset"])
def test_what_all_images_have_in_common_does_not_change_lda(features: Features, change: str) -> None:
    values = features.values.double()
    wide = torch.cat([values, torch.full((len(values), 1), 1e6)], 1) if change == "a constant feature" else values + 1e4
    plain, other = Features(values, features.labels, 3), Features(wide, features.labels, 3)
    (expected,), (found,) = (LDA().solve(each, [{"shrinkage": 0.0}]) for each in (plain, other))
    first, second = (s.logits(f.values).softmax(1) for s, f in ((expected, plain), (found, other)))
    torch.testing.assert_close(second, first, rtol=1e-3, atol=1e-4)
