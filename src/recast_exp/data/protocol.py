"""From a published set to a task: the images for training, validation and test, chosen alike for every dataset.

    official split, or 80/20 at random → classes → validation set aside → shots → a maximum for each class

Every choice depends on `dataset.split_seed` alone and is stratified by class, so all runs see the same images.
"""

from __future__ import annotations

import dataclasses
import difflib
import errno
import fnmatch
import logging
import os
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from recast_exp.config import keys
from recast_exp.data.images import damaged_files
from recast_exp.data.listing import is_file
from recast_exp.data.preprocessing import Decoding, InputSpec
from recast_exp.data.types import SPLITS, ImageSet, Official, Samples
from recast_exp.errors import MissingInputError, UserError

if TYPE_CHECKING:
    from recast_exp.config.schema import DatasetConfig

log = logging.getLogger(__name__)

_NOT_THERE = errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG  # the last: no file system could have it

UNDIVIDED = (0.6, 0.2, 0.2)
"""Shares of train, validation and test for a set without an official split."""


def choose(cfg: DatasetConfig, official: Official) -> ImageSet:
    """Choose a task's images from a published set.

    Args:
        cfg: The `dataset` node of the configuration.
        official: The set.

    Raises:
        MissingInputError: If an image is missing and `cfg.bad_images` is "error".
        UserError: If every image of a split is missing or damaged (with `bad_images=skip`, which decodes all of them),
            or a class is unknown or has too few images to be divided.
    """
    _check_splits(cfg, official.splits)
    splits, skipped = _sound(cfg, official)
    classes, splits, numbers = _select_classes(cfg, official, _divide(cfg, splits, official.classes))
    if "val" not in splits:
        splits |= _with_validation(cfg, splits["train"])
    elif cfg.val_fraction != keys.default("dataset.val_fraction"):
        log.info(
            "dataset.val_fraction: it has no effect, as dataset=%s has validation images of its own; "
            "dataset.split=redrawn draws new ones",
            cfg.name,
        )
    if cfg.shots is not None:
        splits["train"] = _at_most(splits["train"], cfg.shots, cfg.split_seed)
        counts = np.bincount(splits["train"].labels, minlength=len(classes))
        if short := [name for name, count in zip(classes, counts, strict=True) if count < cfg.shots]:
            log.warning(
                "dataset.shots=%d: %d of the classes have fewer training images, such as %s (%d)",
                *(cfg.shots, len(short), short[0], counts[classes.index(short[0])]),
            )
    for split in ("val", "test"):
        present = set(splits[split].labels.tolist())
        if absent := [name for label, name in enumerate(classes) if label not in present]:
            log.warning(
                "dataset %s: the %s images lack %d of the classes, such as %s; these have no accuracy there",
                *(cfg.name, {"val": "validation", "test": "test"}[split], len(absent), absent[0]),
            )
    if cfg.max_per_class is not None:
        splits = {split: _at_most(splits[split], cfg.max_per_class, cfg.split_seed) for split in SPLITS}
    return ImageSet(cfg.name, classes, {split: splits[split] for split in SPLITS}, numbers, skipped)


def decoding(cfg: DatasetConfig) -> Decoding:
    """How the image files of a dataset become pixels."""
    return Decoding(cfg.background, cfg.orient, cfg.max_pixels)


def prepared_as(spec: InputSpec, cfg: DatasetConfig) -> InputSpec:
    """The input of a backbone, its images decoded as those of a dataset."""
    return dataclasses.replace(spec, background=cfg.background, orient=cfg.orient)


def missing_files(paths: Sequence[Path]) -> list[Path]:
    """The paths that are not regular files; each folder is listed once. Reading a pipe, for example, would block."""
    existing: set[Path] = set()
    for folder in {path.parent for path in paths}:
        try:
            with os.scandir(folder) as entries:
                existing.update(Path(entry.path) for entry in entries if is_file(entry))
        except OSError as error:
            if error.errno not in _NOT_THERE:
                raise
        except ValueError:  # a NUL in its name
            continue
    return [path for path in paths if path not in existing]


def split_by_class(
    labels: NDArray[np.int64], fractions: Sequence[float], seed: int, classes: Sequence[str]
) -> list[NDArray[np.int64]]:
    """Divide samples into parts that hold each class in the same proportion.

    Every part gets at least one sample of every class; otherwise a class is divided by `fractions`, rounded.
    scikit-learn's stratified split has no such minimum: it leaves small classes out of small parts.

    Args:
        labels: Class numbers [N].
        fractions: Share of each part; they sum to 1.
        seed: Seed of the choice. The same seed gives the same parts on every machine.
        classes: Class names, for the message.

    Returns:
        For each part, its sample numbers, ascending.

    Raises:
        UserError: If a class has fewer samples than there are parts.
    """
    random = np.random.RandomState(seed)  # its stream is frozen: splits do not change with the version of numpy
    parts: list[list[NDArray[np.int64]]] = [[] for _ in fractions]
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < len(fractions):
            raise UserError(
                f"class {classes[label]}: expected at least {len(fractions)} images, one for each split, got "
                f"{len(members)}; add images, or name the other classes in dataset.classes"
            )
        bounds = np.round(np.cumsum([0.0, *fractions]) * len(members)).astype(int)
        sizes = np.diff(bounds)
        while sizes.min() == 0:
            sizes[sizes.argmax()] -= 1
            sizes[sizes.argmin()] += 1
        shuffled = random.permutation(members)
        for part, selected in zip(parts, np.split(shuffled, np.cumsum(sizes)[:-1]), strict=True):
            part.append(selected)
    return [np.sort(np.concatenate(part)).astype(np.int64) for part in parts]


def carve_validation(samples: Samples, fraction: float, seed: int) -> tuple[Samples, Samples]:
    """Set a stratified share of the training samples aside, for a dataset without a validation split.

    Args:
        samples: The training samples.
        fraction: Share of each class to set aside: at least one sample, but none of a class that has only one.
        seed: Seed of the choice.

    Returns:
        The remaining training samples, and the validation samples, which may be none.
    """
    counts = np.bincount(samples.labels)
    single = counts[samples.labels] == 1
    train, val = np.flatnonzero(single), np.flatnonzero(~single)
    if len(val):
        parts = split_by_class(samples.labels[~single], (1 - fraction, fraction), seed, [])
        train, val = np.sort(np.concatenate([train, val[parts[0]]])), val[parts[1]]
    return samples.select(train), samples.select(val)


def _sound(cfg: DatasetConfig, official: Official) -> tuple[dict[str, Samples], dict[str, str]]:
    """Refuse missing images; or leave out missing and damaged ones, and report how many."""
    skipped: dict[str, str] = {}
    splits = dict(official.splits)
    for split, samples in official.splits.items():
        if not isinstance(samples.images, tuple):
            continue
        bad = dict.fromkeys(missing_files(samples.images), "missing")
        if bad and cfg.bad_images == "error":
            first = next(iter(bad))
            more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
            raise MissingInputError(
                f"{first}: missing{more}, though {official.index or 'the index'} lists it; unpack the archive again, "
                "or set dataset.bad_images=skip to leave it out"
            )
        if cfg.bad_images == "skip":
            bad |= damaged_files([path for path in samples.images if path not in bad], decoding(cfg))
        if bad:
            keep = [i for i, path in enumerate(samples.images) if path not in bad]
            splits[split] = samples.select(np.array(keep, dtype=np.int64))
            skipped |= {str(path): reason for path, reason in bad.items()}
    if skipped:
        path, reason = next(iter(skipped.items()))
        log.warning("dataset %s: %d image(s) are left out, such as %s (%s)", cfg.name, len(skipped), path, reason)
    return splits, skipped


def _check_splits(cfg: DatasetConfig, splits: Iterable[str]) -> None:
    """Refuse a set without the images that are asked for; `test_from` has a line of its own."""
    names = set(splits)
    needed = {"all"} if "all" in names else {"train", "test"} if cfg.test_from == "test" else {"train"}
    if cfg.split != "random_80_20" and not needed <= names <= needed | {"val", "test"}:
        raise UserError(
            f"dataset {cfg.name}: expected images under train, test and maybe val, or under all, got "
            f"{', '.join(sorted(names)) or 'none'}"
        )


def _divide(cfg: DatasetConfig, splits: dict[str, Samples], classes: Sequence[str]) -> dict[str, Samples]:
    """The requested splits; without "val" if that has yet to be set aside."""
    if cfg.test_from == "val":
        if "val" not in splits:
            raise UserError(
                f"dataset.test_from: expected test, as dataset={cfg.name} has no validation images of its own, got val"
            )
        splits = {"train": splits["train"], "test": splits["val"]}
    if cfg.split == "random_80_20":
        # The authors' protocol: a plain random choice among all images, not by class
        everything = _join(list(splits.values()))
        order = np.random.RandomState(cfg.split_seed).permutation(len(everything))
        bound = round(0.8 * len(everything))
        return {"train": everything.select(np.sort(order[:bound])), "test": everything.select(np.sort(order[bound:]))}
    if "all" in splits:
        for key, value in (("split", cfg.split), ("val_fraction", cfg.val_fraction)):
            if value != (default := keys.default(f"dataset.{key}")):
                raise UserError(
                    f"dataset.{key}: expected {default} for a set without splits, which is divided {_shares()} for "
                    f"training, validation and test, got {value}; make folders train, val and test of your own"
                )
        everything = splits["all"]
        parts = split_by_class(everything.labels, UNDIVIDED, cfg.split_seed, classes)
        return {split: everything.select(part) for split, part in zip(SPLITS, parts, strict=True)}
    if cfg.split == "redrawn":
        return {"train": _join([splits[name] for name in ("train", "val") if name in splits]), "test": splits["test"]}
    return splits


def _shares() -> str:
    return ", ".join(f"{100 * share:.0f} %" for share in UNDIVIDED)


def _join(samples: Sequence[Samples]) -> Samples:
    images: tuple[Path, ...] | NDArray[np.uint8]
    if isinstance(samples[0].images, tuple):
        images = tuple(path for part in samples for path in part.images)
    else:
        images = np.concatenate([part.images for part in samples])
    return Samples(images, np.concatenate([part.labels for part in samples]))


def _select_classes(
    cfg: DatasetConfig, official: Official, splits: dict[str, Samples]
) -> tuple[tuple[str, ...], dict[str, Samples], tuple[int, ...] | None]:
    """Keep the requested classes, number them from 0, and keep their official numbers."""
    classes = official.classes
    present = {label for samples in splits.values() for label in np.unique(samples.labels).tolist()}
    # A cut-down copy may lack whole classes
    available = [label for label in range(len(classes)) if cfg.verify or label in present]
    keep = available if cfg.classes is None else _matching(cfg.classes, {classes[label]: label for label in available})
    if empty := [classes[label] for label in keep if label not in present]:
        raise UserError(f"dataset {cfg.name}: no image of class {', '.join(empty)}")
    if len(keep) < 2:
        raise UserError(f"dataset.classes: expected at least two classes of dataset={cfg.name}, got {len(keep)}")
    numbers = official.numbers
    if len(keep) < len(classes) or numbers is not None:
        numbers = tuple(numbers[label] if numbers else label for label in keep)
    new_label = np.full(len(classes), -1, dtype=np.int64)
    new_label[keep] = np.arange(len(keep))
    kept = {split: samples.select(np.flatnonzero(new_label[samples.labels] >= 0)) for split, samples in splits.items()}
    relabelled = {split: Samples(samples.images, new_label[samples.labels]) for split, samples in kept.items()}
    return tuple(classes[label] for label in keep), relabelled, numbers


def _matching(patterns: Sequence[str], classes: dict[str, int]) -> list[int]:
    """The labels of the classes that match one of the patterns, in the order of the set."""
    labels: set[int] = set()
    for pattern in (unicodedata.normalize("NFC", each) for each in patterns):
        matches = [classes[pattern]] if pattern in classes else []
        matches = matches or [label for name, label in classes.items() if fnmatch.fnmatchcase(name, pattern)]
        if not matches:
            near = difflib.get_close_matches(pattern, classes, n=3, cutoff=0.4) or list(classes)[:3]
            raise UserError(
                f"dataset.classes: expected names or patterns such as {', '.join(near)}, got {pattern!r}, which "
                f"matches none of the {len(classes)} classes"
            )
        labels.update(matches)
    return sorted(labels)


def _with_validation(cfg: DatasetConfig, samples: Samples) -> dict[str, Samples]:
    train, val = carve_validation(samples, cfg.val_fraction, cfg.split_seed)
    if not len(val):
        log.warning("dataset %s: with one training image per class, the validation images are the same ones", cfg.name)
        val = train
    return {"train": train, "val": val}


def _at_most(samples: Samples, count: int, seed: int) -> Samples:
    """`count` random samples of each class, or all of a class that has fewer."""
    random = np.random.RandomState(seed)
    selected = []
    for label in np.unique(samples.labels):
        members = np.flatnonzero(samples.labels == label)
        selected.append(random.permutation(members)[:count])
    return samples.select(np.sort(np.concatenate(selected))) if selected else samples
