"""The metrics of a part of the images."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import recall_score

from recast_exp.training.metrics import make_metrics, measure, update


def test_the_macro_mean_is_that_of_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(200, 7, generator=generator), torch.randint(7, (200,), generator=generator)
    expected = recall_score(labels, logits.argmax(1), average="macro")
    assert measure([(logits, labels)], logits.shape[1])["accuracy_macro"] == pytest.approx(expected)


def test_a_class_without_images_has_no_accuracy() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    logits = 9 * torch.eye(3)[torch.tensor([0, 2, 1, 1])]  # one image is taken for a class that has none
    assert measure([(logits, labels)], logits.shape[1])["accuracy_macro"] == pytest.approx((0.5 + 1.0) / 2)


def test_batches_count_by_their_images() -> None:
    metrics = make_metrics(3)
    for size in (1, 5, 0):
        labels = torch.zeros(size, dtype=torch.int64)
        update(metrics, 9 * torch.eye(3)[labels], labels, torch.tensor(float(size)))
    assert metrics["accuracy_macro"].compute() == 1
    assert metrics["loss"].compute() == pytest.approx((1 * 1 + 5 * 5) / 6)


def test_the_calibration_error_is_that_of_fifteen_bins() -> None:
    """A confidence of 1 belongs to the last of them, as those a little below do."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (300,), generator=generator)
    logits = torch.randn(300, 4, generator=generator) + 2 * torch.eye(4)[labels]
    logits[:100, 0] += 200.0  # sure of everything, and often wrong
    logits[100:150], labels[100:150] = torch.tensor([[0.95, 0.05, 1e-9, 1e-9]]).log(), 0  # right more often than sure
    confidence, predicted = logits.double().softmax(1).max(1)
    assert (confidence.float() == 1).any()
    bins = (confidence * 15).ceil()
    expected = sum(
        float((confidence[bins == each] - (predicted == labels)[bins == each].double()).mean().abs())
        * float((bins == each).double().mean())
        for each in bins.unique()
    )
    assert measure([(logits, labels)], 4)["calibration_error"] == pytest.approx(expected, abs=1e-6)
