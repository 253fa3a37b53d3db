"""What a head is: options, a grid of strengths, and a closed or converged solution for given features.

A head is solved on the features of images that a backbone, whatever it is, has computed: the inputs of its classifier.
Every solution is a weight and a bias of that classifier, so nothing else needs to know how they were found.
"""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from recast_exp.config.fields import option
from recast_exp.errors import UserError, check_integer

LOGITS = 2**24  # that are at hand at a time: 128 MB
CHUNK = 4096  # rows that are in float64 at a time: 25 MB of 768 features

Setting = Mapping[str, float | str]
"""The values of a head's strengths: `{"C": 1.0}`."""


def in_chunks(values: Tensor) -> Iterator[Tensor]:
    """Some thousand rows at a time, so that not all of them are in float64 at once."""
    for start in range(0, len(values), CHUNK):
        yield values[start : start + CHUNK]


@dataclass(frozen=True, eq=False)
class Features:
    """Features of labelled images.

    Attributes:
        values: float32 or float64 [N, D].
        labels: int64 [N] of class numbers, counted from 0.
        num_classes: Number C of classes.

    Raises:
        UserError: If a feature is not finite, there are no features, or the labels are not those of the classes.
    """

    values: Tensor
    labels: Tensor
    num_classes: int

    def __post_init__(self) -> None:
        for name, given in (("features", self.values), ("labels", self.labels)):
            if not isinstance(given, Tensor) or given.is_meta:
                raise UserError(f"{name}: expected a tensor with values, got {type(given).__name__}")
        if self.values.ndim != 2 or not self.values.numel() or not self.values.is_floating_point():
            raise UserError(
                f"features: expected numbers [images, features], got {self.values.dtype} {list(self.values.shape)}"
            )
        check_integer("num_classes", self.num_classes, 1)
        count, last = len(self.values), self.num_classes - 1
        if self.labels.dtype != torch.int64 or self.labels.shape != (count,):
            raise UserError(f"labels: expected int64 [{count}], got {self.labels.dtype} {list(self.labels.shape)}")
        if (lowest := int(self.labels.min())) < 0 or int(self.labels.max()) > last:
            wrong = lowest if lowest < 0 else int(self.labels.max())
            raise UserError(f"labels: expected numbers of classes from 0 to {last}, got {wrong}")
        bad = sum(int((~rows.isfinite().all(1)).sum()) for rows in in_chunks(self.values))
        if bad:
            raise UserError(
                f"features: expected finite numbers, got NaN or infinity for {bad} of {len(self)} images; check the "
                "weights of the backbone"
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def width(self) -> int:
        """Number D of features of an image."""
        return self.values.shape[1]

    def select(self, rows: Tensor) -> Features:
        """The features of some images."""
        return Features(self.values[rows], self.labels[rows], self.num_classes)

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Features in float64 and labels, some thousand images at a time."""
        for values, labels in zip(in_chunks(self.values), in_chunks(self.labels), strict=True):
            yield values.double(), labels

    def __add__(self, other: Features) -> Features:
        return Features(
            torch.cat([self.values, other.values]), torch.cat([self.labels, other.labels]), self.num_classes
        )

    @functools.cached_property
    def moments(self) -> Moments:
        """Their sums, which several heads share."""
        return Moments.of(self)

    def check_classes(self) -> None:
        """Check that each class can be learnt.

        Raises:
            UserError: If a class has no image.
        """
        counts = torch.bincount(self.labels, minlength=self.num_classes)
        if missing := (counts == 0).nonzero().flatten().tolist():
            listed = ", ".join(map(str, missing[:5])) + (", …" if len(missing) > 5 else "")
            raise UserError(f"head: expected a training image of each class, got none of class {listed}")


@dataclass
class Moments:
    """Sums over images, in float64: enough to solve ridge regression and discriminant analysis.

    They take D² + C·D numbers for any number of images, and can be added up batch by batch (`add`), so features need
    not be kept.

    Attributes:
        counts: [C], images of each class.
        sums: [C, D], Σᵢ (xᵢ - o), sums of their features.
        gram: [D, D], Σᵢ wᵢ (xᵢ - o)(xᵢ - o)ᵀ, in which each image has the weight of its class.
        weights: [C], weight of an image of each class in `gram`.
        origin: [D], o, the mean of the first batch: about 0, features that are far from it would lose their digits.
    """

    counts: Tensor
    sums: Tensor
    gram: Tensor
    weights: Tensor
    origin: Tensor

    @classmethod
    def empty(cls, num_classes: int, width: int, weights: Tensor | None = None) -> Moments:
        """Those of no image.

        Args:
            num_classes: Number C of classes.
            width: Number D of features.
            weights: [C], weight of an image of each class; 1 for all if it is left out.
        """
        zeros = functools.partial(torch.zeros, dtype=torch.float64)
        weights = torch.ones(num_classes, dtype=torch.float64) if weights is None else weights.double()
        return cls(zeros(num_classes), zeros(num_classes, width), zeros(width, width), weights, zeros(width))

    @classmethod
    def of(cls, features: Features, weights: Tensor | None = None) -> Moments:
        """Those of features that are at hand."""
        moments = cls.empty(features.num_classes, features.width, weights)
        for values, labels in features.chunks():
            moments.add(values, labels)
        return moments

    @classmethod
    def joined(cls, parts: Sequence[Moments]) -> Moments:
        """Those of all classes of several tasks, one task's after another's; exact, whatever the order of the tasks."""
        origin = torch.stack([part.origin for part in parts]).mean(0)
        moved = [part.about(origin) for part in parts]
        return cls(
            torch.cat([part.counts for part in moved]),
            torch.cat([part.sums for part in moved]),
            torch.stack([part.gram for part in moved]).sum(0),
            torch.cat([part.weights for part in moved]),
            origin,
        )

    def about(self, origin: Tensor) -> Moments:
        """The same about another origin [D]."""
        way = self.origin - origin
        cross = (self.weights @ self.sums).outer(way)
        gram = self.gram + cross + cross.T + self.total * way.outer(way)
        return Moments(self.counts, self.sums + self.counts[:, None] * way, gram, self.weights, origin)

    def add(self, values: Tensor, labels: Tensor) -> None:
        """Add a batch of features [B, D] with labels [B]."""
        values = values.double()
        if len(values) and not self.counts.any():
            self.origin = values.mean(0)
        values = values - self.origin
        self.counts += torch.bincount(labels, minlength=len(self.counts))
        self.sums.index_add_(0, labels, values)
        self.gram.addmm_((values * self.weights[labels, None]).T, values)

    @property
    def means(self) -> Tensor:
        """[C, D], mean features of each class."""
        return self.origin + self._means

    @property
    def _means(self) -> Tensor:
        return self.sums / self.counts.clamp(min=1)[:, None]

    @property
    def total(self) -> Tensor:
        """The sum of the weights of all images."""
        return (self.counts * self.weights).sum()

    @property
    def mean(self) -> Tensor:
        """[D], weighted mean of the features."""
        return self.origin + self._mean

    @property
    def _mean(self) -> Tensor:
        return self.weights @ self.sums / self.total

    def centred_means(self) -> Tensor:
        """[C, D], mean features of each class, from the mean of all."""
        return self._means - self._mean

    def centred_sums(self) -> Tensor:
        """[C, D], Σᵢ wᵢ (xᵢ - m) over the images of each class, with the mean m."""
        return (self.sums - self.counts[:, None] * self._mean) * self.weights[:, None]

    def centred_gram(self) -> Tensor:
        """[D, D], Σᵢ wᵢ (xᵢ - m)(xᵢ - m)ᵀ with the mean m."""
        return self.gram - self.total * self._mean.outer(self._mean)

    def within(self) -> Tensor:
        """[D, D], the covariance within classes, of which each image has its weight."""
        means = self._means
        return (self.gram - (means * (self.counts * self.weights)[:, None]).T @ means) / self.total


@dataclass(frozen=True, eq=False)
class Solution:
    """A solved head.

    Attributes:
        weight: float64 [C, D].
        bias: float64 [C].
        setting: The strengths that it was solved with.
    """

    weight: Tensor
    bias: Tensor
    setting: Setting = field(default_factory=dict)

    def logits(self, values: Tensor) -> Tensor:
        """Features [N, D] → float64 logits [N, C]."""
        return torch.cat([rows.double() @ self.weight.T + self.bias for rows in in_chunks(values)])

    def scores(self, features: Features) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits [n, C] and labels [n] of some images at a time: those of thousands of classes take gigabytes."""
        count = max(1, LOGITS // len(self.bias))
        for start in range(0, len(features), count):
            rows = slice(start, start + count)
            yield self.logits(features.values[rows]), features.labels[rows]

    def scaled(self, factor: float) -> Solution:
        """The same decisions with logits times a factor."""
        return Solution(self.weight * factor, self.bias * factor, self.setting)


@dataclass
class Head(ABC):
    """A classifier that is solved, not trained. The fields of a subclass are its options.

    Attributes:
        solved: Whether it is solved; the paper's own head is trained with the rest instead.
        label: What tables call it; the module's name by default.
    """

    solved: ClassVar[bool] = True
    label: ClassVar[str] = ""

    class_weight: str = option(
        "none", "weight of a class: by its images, or the same for all", choices=("none", "balanced")
    )
    calibrate: bool = option(True, "scale the logits by a temperature that validation chooses")
    views: int = option(0, "altered views of each training image to solve it on, too", ge=0, le=1000)
    refit: str = option("train", "images that the chosen head is solved on in the end", choices=("train", "train_val"))
    select: str = option(
        "loss",
        "what chooses the strength on validation images: calibrated loss, or accuracy",
        choices=("loss", "accuracy"),
    )

    @property
    def name(self) -> str:
        """The name of its module, and of its option."""
        return type(self).__module__.rpartition(".")[2]

    def problems(self) -> Iterator[str]:
        """What is wrong with options beyond types and ranges, a line each that begins with the option."""
        empty = [field.name for field in dataclasses.fields(self) if getattr(self, field.name) == []]
        if empty and not self.settings():
            yield f"{empty[0]}: expected at least one, got an empty list"

    @abstractmethod
    def settings(self) -> Sequence[Setting]:
        """The grid of strengths to choose from."""

    def grid(self, num_classes: int) -> Sequence[Setting]:
        """Those of the settings that take a bearable time with so many classes."""
        return self.settings()

    @abstractmethod
    def solve(self, features: Features, settings: Sequence[Setting]) -> Iterator[Solution]:
        """Solve the head for each setting of a list, in its order.

        Args:
            features: Features of the training images; each class has at least one.
            settings: Some of `settings()`.
        """

    def image_weights(self, counts: Tensor) -> Tensor:
        """[C], weight of an image of each class; their mean over all images is 1."""
        counts = counts.double()
        if self.class_weight == "none":
            return torch.ones_like(counts)
        return counts.sum() / (len(counts) * counts.clamp(min=1))

    def moments(self, features: Features) -> Moments:
        """The sums over images, each with its weight."""
        if self.class_weight == "none":
            return features.moments
        return Moments.of(features, self.image_weights(features.moments.counts))
