"""What the runs of a report were tested on: a column of its own for each set of test images, and which probes are fair.

Runs of one dataset share a column if their test images and classes are the same, as `dataset.json` has them. Where that
is not known (a run that has not finished, or of an earlier version), the keys that choose the test images decide.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, TypedDict

from recast_exp.config import grammar, keys
from recast_exp.errors import UserError
from recast_exp.files import user_path

if TYPE_CHECKING:
    from recast_exp.report.reading import Job

_PATH = "dataset.path"
_LIMIT = "trainer.limit_batches"
_HOW = frozenset(
    f"dataset.{name}" for name in ("name", "split_seed", "transform", "views", "batch_size", "eval_batch_size")
)
"""Keys of a dataset that choose no images; the draw is part of the replicate."""
_TRAINING = frozenset({"dataset.shots", "dataset.val_fraction"})
"""Keys that choose training and validation images, but no test images."""
_INPUT = frozenset({"dataset.background", "dataset.orient", "trainer.precision"})
"""Keys, in addition to those of the model, on which the features of a frozen backbone depend."""
_METHOD = frozenset(f"model.{name}" for name in ("name", "method", "family", "batchnorm_statistics"))
"""Keys of the model that its pretrained backbone does not depend on."""

_SHOWN = 3  # keys in the name of a column
_LONGEST = 40  # letters of a value in it

Settings = Mapping[str, str]
"""Dotted key → value, without those that have their defaults."""


class Card(TypedDict):
    """Of `dataset.json`, what a report wants to know; earlier versions had no digests."""

    classes: list[str]
    images_per_class: dict[str, list[int]]
    digests: NotRequired[dict[str, str]]


@dataclasses.dataclass(frozen=True)
class Images:
    """The images of a finished run.

    Attributes:
        card: Its `dataset.json`.
        tested: Number of test images that were tested; None for all of them.
    """

    card: Card
    tested: int | None = None

    def same(self, other: Images, *splits: str) -> bool:
        """Whether the classes and the images of these splits are the same, as far as is known."""
        if self.card["classes"] != other.card["classes"]:
            return False
        return all(
            self.card["images_per_class"].get(split) == other.card["images_per_class"].get(split)
            and (not (self.digest(split) and other.digest(split)) or self.digest(split) == other.digest(split))
            for split in splits
        )

    def same_test(self, other: Images) -> bool:
        """Whether both were tested on the same images."""
        return self.tested == other.tested and self.same(other, "test")

    @property
    def count(self) -> int:
        """The number of test images."""
        return sum(self.card["images_per_class"].get("test", ()))

    def digest(self, split: str) -> str | None:
        """That of a split's images; None for a run of an earlier version."""
        return self.card.get("digests", {}).get(split)


@dataclasses.dataclass
class _Column:
    """Jobs of one dataset, and the test images of each draw, of those that have any."""

    jobs: list[Job]
    images: dict[int, Images]

    def takes(self, job: Job) -> bool:
        known = self.images.get(job.draw)
        return job.images is None or known is None or known.same_test(job.images)

    def has(self, job: Job) -> bool:
        return any(job.images is not None and images.same_test(job.images) for images in self.images.values())

    def add(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            self.jobs.append(job)
            if job.images is not None:
                self.images.setdefault(job.draw, job.images)

    def is_of(self, other: _Column) -> bool:
        """Whether the test images of all draws that both have are the same."""
        shared = self.images.keys() & other.images.keys()
        return bool(shared) and all(self.images[draw].same_test(other.images[draw]) for draw in shared)


def told_apart(jobs: Sequence[Job]) -> tuple[tuple[Job, ...], tuple[str, ...]]:
    """The jobs, the names of their datasets followed by the difference where their test images differ; and remarks."""
    by_dataset: dict[str, list[Job]] = defaultdict(list)
    for job in jobs:
        by_dataset[job.dataset].append(job)
    name_of: dict[Path, str] = {}
    remarks: list[str] = []
    for dataset, members in by_dataset.items():
        columns = _columns(members)
        names, unlike = _names(dataset, columns)
        remarks += [f"{name}: the test images are not the same in all runs; each set has a column" for name in unlike]
        for name, column in zip(names, columns, strict=True):
            name_of |= {job.path: name for job in column.jobs}
            remarks += _partial(name, column.jobs)
    return tuple(
        dataclasses.replace(
            job, dataset=name_of[job.path], source=(job.dataset, _settings(job, _PATH.__eq__).get(_PATH))
        )
        for job in jobs
    ), tuple(remarks)


def has_same_training(one: Job, other: Job) -> bool:
    """Whether two runs of one dataset (a column of the table) and draw have the same training and validation images."""
    if one.images is not None and other.images is not None:
        if not one.images.same(other.images, "train", "val"):
            return False
        if "digests" in one.images.card and "digests" in other.images.card:
            return True
    return _settings(one, _TRAINING.__contains__) == _settings(other, _TRAINING.__contains__)


def is_fair(run: Job, probe: Job) -> bool:
    """Whether a probe of the same dataset and draw has a run's backbone, its preprocessing, precision and images."""
    return has_same_training(run, probe) and _settings(run, _is_of_features) == _settings(probe, _is_of_features)


def _is_of_features(key: str) -> bool:
    return key in _INPUT or (key.startswith("model.") and keys.decides(key) and key not in _METHOD)


def chooses_test_images(key: str) -> bool:
    """Whether the test images of a run depend on a key, apart from its draw."""
    if key in (_PATH, _LIMIT):
        return True
    return key.startswith("dataset.") and keys.decides(key) and key not in _HOW | _TRAINING | _INPUT


def _settings(job: Job, wanted: Callable[[str], bool]) -> Settings:
    """The keys of a job that are wanted: of its configuration, of what its sweep planned, or of its overrides."""
    config = job.config or job.plan
    pairs = (
        keys.leaves(config)
        if config
        else ((grammar.key(text), text.partition("=")[2].strip("\"'")) for text in job.overrides)
    )
    return {
        key: _text(key, value)
        for key, value in pairs
        if wanted(key) and value != keys.default(key) and "${" not in str(value)
    }


def _text(key: str, value: object) -> str:
    if key == _PATH:
        with contextlib.suppress(UserError):  # a record may say anything
            return os.path.abspath(user_path(str(value)))  # noqa: PTH100  (links may lead elsewhere by now)
    if isinstance(value, list):
        return ",".join(map(str, value))
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _columns(jobs: Sequence[Job]) -> list[_Column]:
    """Jobs of one dataset by their test images, in order of appearance."""
    by_settings: dict[tuple[tuple[str, str], ...], list[_Column]] = defaultdict(list)
    for job in jobs:
        parts = by_settings[tuple(sorted(_settings(job, chooses_test_images).items()))]
        taking = [part for part in parts if part.takes(job)]
        part = next((part for part in taking if part.has(job)), taking[0] if taking else None)
        if part is None:
            parts.append(part := _Column([], {}))
        part.add([job])
    columns: list[_Column] = []
    for part in (part for parts in by_settings.values() for part in parts):
        # Other settings may choose the same images: a folder that was moved, a limit that nothing exceeds
        if (column := next((column for column in columns if column.is_of(part)), None)) is None:
            columns.append(part)
        else:
            column.add(part.jobs)
    return columns


def _names(dataset: str, columns: Sequence[_Column]) -> tuple[list[str], list[str]]:
    """The names of a dataset's columns; and those that only their images tell apart."""
    if len(columns) < 2:
        return [dataset] * len(columns), []
    settings = [_settings(column.jobs[0], chooses_test_images) for column in columns]
    differing = [
        key
        for key in dict.fromkeys(key for setting in settings for key in setting)
        if len({setting.get(key) for setting in settings}) > 1
    ]
    places = {setting[_PATH] for setting in settings if _PATH in setting}
    ends = {Path(place).name for place in places}
    names = []
    for setting in settings:
        parts = [
            (Path(value).name if len(ends) == len(places) else value)
            if key == _PATH
            else f"{key.removeprefix('dataset.')}={value[:_LONGEST]}"
            for key in differing
            if (value := setting.get(key)) is not None
        ]
        names.append(" ".join([dataset, *parts[:_SHOWN], *(["…"] if len(parts) > _SHOWN else [])]))
    unlike = [name for name, count in Counter(names).items() if count > 1]
    for name in unlike:
        same = [at for at, other in enumerate(names) if other == name]
        for at, difference in zip(same, _differences([columns[at] for at in same]), strict=True):
            names[at] = f"{name} ({difference})"
    return [f"{name} #{at + 1}" if names.count(name) > 1 else name for at, name in enumerate(names)], unlike


def _differences(columns: Sequence[_Column]) -> list[str]:
    """What tells columns of the same settings apart: how many test images they have, or else a digest of them."""
    images = [next(iter(column.images.values()), None) for column in columns]
    if len({found and found.count for found in images}) == len(columns):
        return ["without results" if found is None else f"{found.count:,} test images" for found in images]
    return ["without results" if found is None else f"images {(found.digest('test') or '')[:6]}" for found in images]


def _partial(dataset: str, jobs: Sequence[Job]) -> list[str]:
    """A remark on the runs that were tested on part of the test images."""
    counts = Counter((job.images.tested, job.images.count) for job in jobs if job.images and job.images.tested)
    return [
        f"{dataset}: {runs} run(s) were tested on only {tested:,} of {count:,} test images ({_LIMIT})"
        for (tested, count), runs in counts.items()
    ]
