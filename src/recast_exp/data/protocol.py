"""From a published set to a task: which images train, which choose, which test. The same for every dataset.

    official split, or 80/20 at random → classes → validation set aside → shots → at most so many of each class

Every choice is made by `dataset.split_seed` and stratified by class, so all runs see the same images.
"""

from __future__ import annotations

import difflib
import fnmatch
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from recast_exp.data.images import damaged_files
from recast_exp.data.types import SPLITS, ImageSet, Official, Samples, carve_validation, split_by_class
from recast_exp.errors import MissingInputError, UserError

if TYPE_CHECKING:
    from recast_exp.config.schema import DatasetConfig

log = logging.getLogger(__name__)

UNDIVIDED = (0.6, 0.2, 0.2)
"""Shares of train, validation and test where a set has no official split."""


def choose(cfg: DatasetConfig, official: Official) -> ImageSet:
    """Choose a task's images from a published set.

    Args:
        cfg: The `dataset` node of the configuration.
        official: The set.

    Raises:
        UserError: If an image is missing or (with `bad_images=skip`, where all are looked at) every image of a split
            is damaged, if a class is unknown or has too few images to be divided.
    """
    splits, skipped = _sound(cfg, official)
    classes, splits, numbers = _chosen_classes(cfg, official, _divided(cfg, splits, official.classes))
    if "val" not in splits:
        splits |= _with_validation(cfg, splits["train"])
    if cfg.shots is not None:
        splits["train"] = _at_most(splits["train"], cfg.shots, cfg.split_seed)
        counts = np.bincount(splits["train"].labels, minlength=len(classes))
        if short := [name for name, count in zip(classes, counts, strict=True) if count < cfg.shots]:
            log.warning(
                "dataset.shots=%d: %d of the classes have fewer training images, such as %s (%d)",
                *(cfg.shots, len(short), short[0], counts[classes.index(short[0])]),
            )
    if cfg.max_per_class is not None:
        splits = {split: _at_most(splits[split], cfg.max_per_class, cfg.split_seed) for split in SPLITS}
    return ImageSet(cfg.name, classes, {split: splits[split] for split in SPLITS}, numbers, skipped)


def _sound(cfg: DatasetConfig, official: Official) -> tuple[dict[str, Samples], dict[str, str]]:
    """Refuse images that are not there; or leave those, and the damaged ones, out and say so."""
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
                "or set dataset.bad_images=skip to go on without"
            )
        if cfg.bad_images == "skip":
            bad |= damaged_files([path for path in samples.images if path not in bad])
        if bad:
            keep = [i for i, path in enumerate(samples.images) if path not in bad]
            splits[split] = samples.select(np.array(keep, dtype=np.int64))
            skipped |= {str(path): reason for path, reason in bad.items()}
    if skipped:
        path, reason = next(iter(skipped.items()))
        log.warning("dataset %s: %d image(s) are left out, such as %s (%s)", cfg.name, len(skipped), path, reason)
    return splits, skipped


def missing_files(paths: Sequence[Path]) -> list[Path]:
    """The paths that are no files, or lead to none; each folder is listed once. A pipe is none: it would block."""
    there: set[Path] = set()
    for folder in {path.parent for path in paths}:
        if folder.is_dir():
            with os.scandir(folder) as entries:
                there.update(Path(entry.path) for entry in entries if entry.is_file())
    return [path for path in paths if path not in there]


def _divided(cfg: DatasetConfig, splits: dict[str, Samples], classes: Sequence[str]) -> dict[str, Samples]:
    """The splits that were asked for; without "val" where it is still to be set aside."""
    if cfg.split == "random_80_20":
        # The authors' protocol: a plain random choice among all images, not by class
        everything = _joined(list(splits.values()))
        order = np.random.RandomState(cfg.split_seed).permutation(len(everything))
        bound = round(0.8 * len(everything))
        return {"train": everything.select(np.sort(order[:bound])), "test": everything.select(np.sort(order[bound:]))}
    if "all" in splits:
        everything = splits["all"]
        parts = split_by_class(everything.labels, UNDIVIDED, cfg.split_seed, classes)
        return {split: everything.select(part) for split, part in zip(SPLITS, parts, strict=True)}
    return splits


def _joined(samples: Sequence[Samples]) -> Samples:
    images: tuple[Path, ...] | NDArray[np.uint8]
    if isinstance(samples[0].images, tuple):
        images = tuple(path for part in samples for path in part.images)
    else:
        images = np.concatenate([part.images for part in samples])
    return Samples(images, np.concatenate([part.labels for part in samples]))


def _chosen_classes(
    cfg: DatasetConfig, official: Official, splits: dict[str, Samples]
) -> tuple[tuple[str, ...], dict[str, Samples], tuple[int, ...] | None]:
    """Keep the classes that were asked for, number them from 0, and keep their official numbers."""
    classes = official.classes
    there = {label for samples in splits.values() for label in np.unique(samples.labels).tolist()}
    # A cut-down copy may lack whole classes
    known = [label for label in range(len(classes)) if cfg.verify or label in there]
    keep = known if cfg.classes is None else _matching(cfg.classes, {classes[label]: label for label in known})
    if without := [classes[label] for label in keep if label not in there]:
        raise UserError(f"dataset {cfg.name}: no image of class {', '.join(without)}")
    if len(keep) < 2:
        raise UserError(f"dataset.classes: {len(keep)} class is left of dataset={cfg.name}; takes at least two")
    numbers = official.numbers
    if len(keep) < len(classes) or numbers is not None:
        numbers = tuple(numbers[label] if numbers else label for label in keep)
    new = np.full(len(classes), -1, dtype=np.int64)
    new[keep] = np.arange(len(keep))
    chosen = {split: samples.select(np.flatnonzero(new[samples.labels] >= 0)) for split, samples in splits.items()}
    relabelled = {split: Samples(samples.images, new[samples.labels]) for split, samples in chosen.items()}
    return tuple(classes[label] for label in keep), relabelled, numbers


def _matching(patterns: Sequence[str], classes: dict[str, int]) -> list[int]:
    """The labels of the classes that patterns name, in the order of the set."""
    found: set[int] = set()
    for pattern in patterns:
        labels = [classes[pattern]] if pattern in classes else []
        labels = labels or [label for name, label in classes.items() if fnmatch.fnmatchcase(name, pattern)]
        if not labels:
            near = difflib.get_close_matches(pattern, classes, n=3, cutoff=0.4) or list(classes)[:3]
            raise UserError(
                f"dataset.classes: got {pattern!r}, which none of the {len(classes)} classes matches; takes names or "
                f"patterns such as {', '.join(near)}"
            )
        found.update(labels)
    return sorted(found)


def _with_validation(cfg: DatasetConfig, samples: Samples) -> dict[str, Samples]:
    train, val = carve_validation(samples, cfg.val_fraction, cfg.split_seed)
    if not len(val):
        log.warning("dataset %s: with one training image per class, the validation images are the same ones", cfg.name)
        val = train
    return {"train": train, "val": val}


def _at_most(samples: Samples, count: int, seed: int) -> Samples:
    """`count` random samples of each class, or all where there are no more."""
    random = np.random.RandomState(seed)
    chosen = []
    for label in np.unique(samples.labels):
        members = np.flatnonzero(samples.labels == label)
        chosen.append(random.permutation(members)[:count])
    return samples.select(np.sort(np.concatenate(chosen))) if chosen else samples
