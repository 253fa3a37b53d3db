"""What every solved head does, whatever it is: shapes, invariants, and input that is odd. Walks the registry."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from recast_exp import heads, plugins
from recast_exp.config.compose import conf_dir
from recast_exp.errors import UnknownNameError, UserError
from recast_exp.heads import Features, Head, Solution, choose, lda
from recast_exp.heads.best import Best
from recast_exp.plugins import HEADS

SOLVED = [name for name in heads.names() if heads.load(name).solved]


def blobs(images: int, classes: int = 4, width: int = 12, *, seed: int = 0, spread: float = 0.6) -> Features:
    """Classes around random means, in turn."""
    means = torch.randn(classes, width, generator=torch.Generator().manual_seed(7))
    noise = torch.randn(images, width, generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(images) % classes
    return Features(means[labels] + spread * noise, labels, classes)


def accuracy(chosen: heads.Chosen, features: Features) -> float:
    return (chosen.solution.logits(features.values).argmax(1) == features.labels).double().mean().item()


@pytest.fixture(params=SOLVED)
def head(request: pytest.FixtureRequest) -> Head:
    return heads.load(request.param)()


def test_the_registry_has_what_the_documentation_lists() -> None:
    assert {"best", "lda", "linear", "logistic", "nearest_mean", "ridge"} <= set(heads.names())


@pytest.mark.parametrize("name", heads.names())
def test_the_preset_lists_every_option_with_its_default(name: str) -> None:
    preset = OmegaConf.to_container(OmegaConf.load(conf_dir() / "head" / f"{name}.yaml").head)
    assert isinstance(preset, dict)
    assert heads.from_config(preset) == heads.load(name)()
    listed = {field.name for field in dataclasses.fields(heads.load(name))}
    assert set(preset) - {"name"} == listed if heads.load(name).solved else set(preset) - {"name"} <= listed


def test_the_settings_of_nearest_mean_are_told_to_people() -> None:
    assert heads.load("nearest_mean")().settings() == [{"centre": "mean"}, {"centre": "none"}]


def test_a_head_separates_blobs(head: Head) -> None:
    chosen = choose(head, blobs(80), blobs(40, seed=1))
    assert chosen.solution.weight.shape == (4, 12)
    assert chosen.solution.bias.shape == (4,)
    assert chosen.solution.weight.dtype == torch.float64
    assert accuracy(chosen, blobs(400, seed=2)) > 0.9
    assert chosen.trial in chosen.trials
    assert len(chosen.trials) == len(head.settings())


def test_a_solution_knows_its_setting(head: Head) -> None:
    solutions = list(head.solve(blobs(40), head.settings()))
    assert [solution.setting for solution in solutions] == list(head.settings())


def test_balanced_classes_differ_from_those_by_their_images(head: Head) -> None:
    features = blobs(80)
    few = features.select(torch.cat([torch.arange(10), torch.arange(10, 80)[torch.arange(10, 80) % 4 == 1]]))
    (plain,), (balanced,) = (
        list(type(head)(class_weight=weight).solve(few, head.settings()[:1])) for weight in ("none", "balanced")
    )
    assert torch.equal(plain.bias, balanced.bias) == (head.name == "nearest_mean")


def test_a_solution_repeats_bit_for_bit(head: Head) -> None:
    first, second = (choose(head, blobs(80), blobs(40, seed=1)).solution for _ in range(2))
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.bias, second.bias)


def test_no_trial_is_better_than_the_chosen_one(head: Head) -> None:
    train, val = blobs(24, spread=1.5), blobs(40, seed=1, spread=1.5)
    head.select = "loss"
    by_loss = choose(head, train, val)
    assert by_loss.trial.loss == min(trial.loss for trial in by_loss.trials)
    head.select = "accuracy"
    by_accuracy = choose(head, train, val)
    assert by_accuracy.trial.accuracy == max(trial.accuracy for trial in by_accuracy.trials)


def test_calibration_changes_no_decision_and_lowers_the_loss(head: Head) -> None:
    train, val = blobs(24, spread=1.5), blobs(60, seed=1, spread=1.5)
    calibrated = choose(head, train, val)
    head.calibrate = False
    plain = choose(head, train, val)
    assert plain.temperature == 1.0
    torch.testing.assert_close(calibrated.solution.weight * calibrated.temperature, plain.solution.weight)
    losses = [
        torch.nn.functional.cross_entropy(chosen.solution.logits(val.values), val.labels).item()
        for chosen in (calibrated, plain)
    ]
    assert losses[0] <= losses[1] + 1e-6


def test_shifted_and_scaled_features_change_no_decision(head: Head) -> None:
    """The strengths mean the same for features of any scale. Cosine similarity alone knows where zero is."""
    train, val, test = blobs(80, spread=1.2), blobs(60, seed=1, spread=1.2), blobs(200, seed=2, spread=1.2)
    if head.name == "nearest_mean":
        head.settings = lambda: [{"centre": "mean"}]  # type: ignore[method-assign]
    if isinstance(head, Best):
        head.heads.remove("nearest_mean")

    def moved(features: Features) -> Features:
        return Features(features.values.double() * 30 + 5, features.labels, features.num_classes)

    before, after = choose(head, train, val), choose(head, moved(train), moved(val))
    same = before.solution.logits(test.values).argmax(1) == after.solution.logits(moved(test).values).argmax(1)
    assert same.double().mean() > 0.99


def test_without_validation_images_folds_choose(head: Head) -> None:
    chosen = choose(head, blobs(80))
    assert accuracy(chosen, blobs(400, seed=2)) > 0.9
    assert 0.8 < chosen.trial.accuracy <= 1


def test_refit_on_both_uses_both(head: Head) -> None:
    train, val = blobs(40), blobs(40, seed=1)
    head.refit, head.calibrate = "train_val", False
    chosen = choose(head, train, val)
    (expected,) = head.solve(train + val, [chosen.trial.setting])
    torch.testing.assert_close(chosen.solution.weight, expected.weight)


@pytest.mark.parametrize(
    "features",
    [
        pytest.param(Features(torch.ones(8, 5), torch.arange(8) % 2, 2), id="constant"),
        pytest.param(Features(torch.randn(12, 3), torch.arange(12) % 6, 6), id="more classes than features"),
        pytest.param(Features(torch.randn(9, 40), torch.tensor([0, 1, 1, 1, 1, 1, 1, 1, 1]), 2), id="one image"),
        pytest.param(Features(torch.randn(6, 4), torch.zeros(6).long(), 1), id="one class"),
    ],
)
def test_odd_features_are_solved_with_finite_numbers(head: Head, features: Features) -> None:
    chosen = choose(head, features, features)
    assert chosen.solution.weight.isfinite().all()
    assert chosen.solution.bias.isfinite().all()


def test_constant_features_say_the_most_frequent_class_or_all_the_same() -> None:
    features = Features(torch.ones(9, 5), torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1]), 2)
    for name in ("logistic", "ridge", "lda"):
        assert (
            choose(heads.load(name)(), features, features).solution.logits(features.values).argmax(1).tolist()
            == [0] * 9
        )


def test_balanced_weights_are_those_of_repeated_images() -> None:
    """With `balanced`, six images of one class weigh as much as two of the other, each taken three times."""
    few = blobs(8, 2, 5)
    rows = torch.cat([(few.labels == 0).nonzero().flatten(), (few.labels == 1).nonzero().flatten()[:2]])
    uneven = few.select(torch.cat([rows, rows[:2]]))  # six of class 0, two of class 1
    repeated = uneven.select(torch.cat([torch.arange(len(uneven)), *[(uneven.labels == 1).nonzero().flatten()] * 2]))
    for name, setting in (
        ("ridge", {"strength": 0.1}),
        ("lda", {"shrinkage": 0.3}),
        ("lda", {"shrinkage": "ledoit_wolf"}),
    ):
        (balanced,) = heads.load(name)(class_weight="balanced").solve(uneven, [setting])
        (plain,) = heads.load(name)().solve(repeated, [setting])
        if setting.get("shrinkage") != "ledoit_wolf":  # whose estimate depends on how many images there are
            torch.testing.assert_close(balanced.weight, plain.weight)
            torch.testing.assert_close(balanced.bias, plain.bias)
        assert balanced.weight.isfinite().all()


def test_a_class_without_training_images_is_refused(head: Head) -> None:
    features = Features(torch.randn(6, 4), torch.tensor([0, 0, 2, 2, 4, 4]), 5)
    with pytest.raises(UserError, match=r"^head: expected a training image of each class, got none of class 1, 3$"):
        choose(head, features, features)


@pytest.mark.parametrize(
    ("present", "expected"),
    [([0, 1], "2"), ([5], "0, 1, 2, 3, 4"), ([6], "0, 1, 2, 3, 4, …"), ([0], "1")],
)
def test_missing_classes_are_named(present: list[int], expected: str) -> None:
    """The last one, too, and no more than five."""
    last = {"2": 2, "1": 1}.get(expected, max(present))
    features = Features(torch.ones(len(present), 2), torch.tensor(present), last + 1)
    with pytest.raises(UserError, match=rf"got none of class {re.escape(expected)}$"):
        features.check_classes()


VALUES, LABELS = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ((VALUES.numpy(), LABELS, 3), "features: expected a tensor with values, got ndarray"),
        ((VALUES.to("meta"), LABELS, 3), "features: expected a tensor with values, got Tensor"),
        ((VALUES.to(torch.complex64), LABELS, 3), "features: expected numbers [images, features], got torch.complex64"),
        ((VALUES, LABELS.tolist(), 3), "labels: expected a tensor with values, got list"),
        ((VALUES, LABELS[:4], 3), "labels: expected int64 [6], got torch.int64 [4]"),
        ((VALUES, LABELS.float(), 3), "labels: expected int64 [6], got torch.float32 [6]"),
        ((VALUES, LABELS - 1, 3), "labels: expected numbers of classes from 0 to 2, got -1"),
        ((VALUES, LABELS, 2), "labels: expected numbers of classes from 0 to 1, got 2"),
        ((VALUES, LABELS, 1.5), "num_classes: expected an integer ≥ 1, got 1.5"),
    ],
)
def test_what_are_no_features(given: Any, line: str) -> None:
    with pytest.raises(UserError) as error:
        Features(*given)
    assert str(error.value).startswith(line)


def test_what_cannot_be_chosen_from() -> None:
    lda, best, train = heads.load("lda"), heads.load("best"), Features(VALUES, LABELS, 3)
    narrow, more = Features(VALUES[:, :2], LABELS, 3), Features(VALUES, LABELS, 4)
    solved = "lda, logistic, nearest_mean, ridge"
    wrong: list[tuple[Any, Any, Any, str]] = [
        ("lda", train, train, "head: expected a head, such as"),
        (lda(), VALUES, train, "train: expected Features, got Tensor"),
        (lda(), train, VALUES, "val: expected Features, got Tensor"),
        (lda(), train, narrow, "val: expected 3 features of 3 classes"),
        (lda(), train, more, "val: expected 3 features of 3 classes"),
        (lda(select="acuracy"), train, train, "select: expected one of loss, accuracy, got 'acuracy'"),
        (lda(refit="trainval"), train, train, "refit: expected one of"),
        (lda(shrinkages=[5.0]), train, train, "shrinkages: expected"),
        (lda(shrinkages=[], ledoit_wolf=False), train, train, "head: expected a head that is solved, got lda, whose"),
        *(
            (best(heads=names), train, train, f"heads: expected some of {solved}, each once, got {', '.join(names)}")
            for names in (["lda", "lda"], ["best"], ["linear", "lda"], ["nope"])
        ),
    ]
    for head, first, second, line in wrong:
        with pytest.raises(UserError) as error:
            heads.choose(head, first, second)
        assert str(error.value).startswith(line)
    with pytest.raises(UserError, match=r"^head.name: expected one of"):
        heads.from_config({})


@pytest.mark.parametrize("shape", [(4,), (0, 3), (3, 0), (2, 3, 4)])
def test_features_are_a_table(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=rf"got torch.float32 {re.escape(str(list(shape)))}$"):
        Features(torch.ones(shape), torch.zeros(shape[0], dtype=torch.long), 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_no_numbers_are_refused(value: float) -> None:
    values = torch.randn(6, 4)
    values[1, 2] = values[4, 0] = value
    with pytest.raises(UserError, match=r"^features: expected finite numbers, got NaN or infinity for 2 of 6 images"):
        Features(values, torch.arange(6) % 2, 2)


def test_folds_need_two_images_of_each_class(head: Head) -> None:
    with pytest.raises(UserError, match=r"or two training images of each class, got 1 of class 1$"):
        choose(head, Features(torch.randn(4, 3), torch.tensor([0, 0, 0, 1]), 2))


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        ({"name": "svm"}, r"head\.name: expected one of best, .*, got 'svm'"),
        ({"name": "lda", "shrinkage": 0.5}, r"head\.shrinkage: unknown option; head=lda takes .*shrinkages"),
        ({"name": "ridge", "strengths": "many"}, r"head\.strengths: expected a list of numbers > 0, got 'many'"),
        ({"name": "lda", "refit": "test"}, r"head\.refit: expected one of train, train_val, got 'test'"),
        ({"name": "logistic", "max_iterations": 0}, r"head\.max_iterations: expected an integer ≥ 1, got 0"),
        ({"name": "ridge", "strengths": []}, r"^head\.strengths: expected at least one, got an empty list$"),
        (
            {"name": "lda", "shrinkages": [], "ledoit_wolf": False},
            r"^head\.shrinkages: expected at least one, got an empty list$",
        ),
        ({"name": "best", "heads": []}, r"^head\.heads: expected at least one, got an empty list$"),
    ],
)
def test_wrong_options(node: dict[str, object], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        heads.from_config(node)


def test_the_shrinkage_of_ledoit_and_wolf_is_enough_to_choose_from() -> None:
    assert heads.from_config({"name": "lda", "shrinkages": []}).settings() == [{"shrinkage": "ledoit_wolf"}]


@pytest.mark.parametrize(
    ("solved", "expected"),
    [
        (lambda good: None, "none"),
        (lambda good: [], "none"),
        (lambda good: good[:1], "none for shrinkage=0.5"),
        (lambda good: good[::-1], "that of shrinkage=0.5 for shrinkage=0.1"),
        (lambda good: [(each.weight, each.bias) for each in good], "a tuple"),
        (lambda good: [Solution(each.weight, each.bias) for each in good], "that of no setting"),
        (lambda good: [replace(each, weight=each.weight.T) for each in good], r"a weight torch\.float64 \[12, 4\]"),
        (lambda good: [replace(each, weight=each.weight.float()) for each in good], r"a weight torch\.float32"),
        (lambda good: [replace(each, bias=each.bias[:1]) for each in good], r"a bias torch\.float64 \[1\]"),
        (lambda good: [replace(each, bias=each.bias / 0) for each in good], "a bias with NaN or infinity"),
        (lambda good: [*good, good[0]], "more"),
    ],
)
def test_what_no_solution_is_gets_refused(
    solved: Callable[[list[Solution]], object], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head of another package may return anything; a bias of one number would be that of all classes."""
    right = lda.LDA.solve
    monkeypatch.setattr(lda.LDA, "solve", lambda *given: solved(list(right(*given))))
    head, train = lda.LDA(shrinkages=[0.1, 0.5], ledoit_wolf=False), blobs(40)
    for val in (train, None):
        with pytest.raises(UserError, match=rf"^head: expected of lda .*got {expected}"):
            choose(head, train, val)


def test_a_head_that_cannot_be_imported_is_no_matter_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_head.py").write_text("raise SystemExit(3)")
    monkeypatch.syspath_prepend(tmp_path)
    point = importlib.metadata.EntryPoint("broken_head", "broken_head", HEADS.group)
    monkeypatch.setattr(plugins, "_entry_points", lambda group: {"broken_head": point} if group == HEADS.group else {})
    assert heads.from_config({"name": "best", "heads": ["lda", "ridge"]}).settings()
    for wrong in ("nope", "linear"):
        with pytest.raises(UserError, match=rf"^head\.heads: expected some of lda, .*, got {wrong}$") as error:
            heads.from_config({"name": "best", "heads": [wrong]})
        assert "broken_head" not in str(error.value)
    with pytest.raises(UserError, match=r"^head\..*broken_head cannot be imported \(SystemExit: 3\)"):
        heads.from_config({"name": "best", "heads": ["broken_head"]})


def test_an_unknown_head_is_a_key_error_too() -> None:
    with pytest.raises(UnknownNameError):
        heads.load("svm")
