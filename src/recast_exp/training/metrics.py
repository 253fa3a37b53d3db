"""The metrics of a part of the images, the same everywhere."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

TOP_K = 5  # top-5 accuracy is recorded for more classes than that
CALIBRATION = "calibration_error"
BINS = 15  # of the expected calibration error; Guo et al. 2017 (arXiv 1706.04599)


class MacroAccuracy(MulticlassAccuracy):
    """The mean of the accuracies of the classes that have images.

    That of torchmetrics counts a class without images as 0 as soon as it is predicted.
    """

    def compute(self) -> Tensor:
        """The mean, from 0 to 1; NaN without images."""
        right, _, _, missed = self._final_state()
        count = right + missed
        return (right[count > 0] / count[count > 0]).mean()


class CalibrationError(MulticlassCalibrationError):
    """The expected calibration error, whose last bin holds confidences of 1, too.

    That of torchmetrics has one more bin for them.
    """

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            preds: Probabilities [B, C].
            target: int64 [B].
        """
        super().update(preds.clamp(max=1 - torch.finfo(preds.dtype).eps), target)


def make_metrics(num_classes: int, *, calibration: bool = True) -> nn.ModuleDict:
    """Metrics by name: `accuracy` of all images, `accuracy_macro` as the mean over their classes, `loss`, and others.

    Args:
        num_classes: Number of classes.
        calibration: Whether the expected calibration error is one of them.
    """
    metrics: dict[str, Metric] = {
        "loss": MeanMetric(),
        "accuracy": MulticlassAccuracy(num_classes, average="micro"),
        "accuracy_macro": MacroAccuracy(num_classes, average="none"),
    }
    if calibration:
        metrics[CALIBRATION] = CalibrationError(num_classes, n_bins=BINS)
    if num_classes > TOP_K:
        metrics["accuracy_top5"] = MulticlassAccuracy(num_classes, average="micro", top_k=TOP_K)
    return nn.ModuleDict(metrics)


def update(metrics: nn.ModuleDict, logits: Tensor, labels: Tensor, loss: Tensor) -> None:
    """Add a batch.

    Args:
        metrics: `make_metrics`.
        logits: [B, C].
        labels: int64 [B].
        loss: Their mean loss.
    """
    for name, metric in metrics.items():
        assert isinstance(metric, Metric)
        if name == "loss":
            metric.update(loss, weight=len(labels))
        elif len(labels):
            # torchmetrics takes logits that all lie in [0, 1] for probabilities
            metric.update(logits.float().softmax(1) if name == CALIBRATION else logits, labels)


def measure(scores: Iterable[tuple[Tensor, Tensor]], num_classes: int) -> dict[str, float]:
    """The metrics of some images, by name.

    Args:
        scores: Logits [n, C] and labels [n], some images at a time.
        num_classes: Number C of classes.
    """
    metrics = make_metrics(num_classes)
    with torch.no_grad():
        for logits, labels in scores:
            update(metrics, logits.float(), labels, F.cross_entropy(logits.float(), labels))
    return {name: float(metric.compute()) for name, metric in metrics.items()}  # type: ignore[operator]
