"""The procedure of `stage=check`: look at a dataset, all of it, and say what is there."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt

from recast_exp.config.schema import Config
from recast_exp.data import read_official
from recast_exp.data.copies import copies
from recast_exp.data.datamodule import ImageDataModule
from recast_exp.data.images import look_at
from recast_exp.data.preprocessing import Decoding
from recast_exp.data.protocol import choose, decoding, missing_files, prepared_as
from recast_exp.data.registry import is_published
from recast_exp.data.types import SPLITS, ImageSet, Official
from recast_exp.display import console
from recast_exp.errors import MissingInputError, UserError
from recast_exp.experiment.card import write_card
from recast_exp.experiment.pretrain import EVAL_BATCH_SIZE
from recast_exp.files import write_json
from recast_exp.models.create import input_spec
from recast_exp.runs import layout
from recast_exp.runs.results import Copies, Inspection, Metrics, Sizes
from recast_exp.system import is_main_process

log = logging.getLogger(__name__)

GROUPS = 100  # of copies that are named


def run(settings: Config, run_dir: Path, group: str | None = None) -> Metrics:
    """Read the index, decode every image, and write the dataset's card.

    Raises:
        UserError: If images are missing or damaged and `dataset.bad_images` is "error"; after all have been looked at.
        MissingInputError: If the data is not there.
    """
    dataset, is_main = settings.dataset, is_main_process(settings.trainer.devices)
    official = read_official(dataset, settings.data_dir)
    sizes, bad = _inspect(official, decoding(dataset))
    report: Inspection = {
        "verified": dataset.verify and is_published(dataset),
        "official_classes": len(official.classes),
        "classes": len({label for part in official.splits.values() for label in np.unique(part.labels).tolist()}),
        "official_images": {split: len(samples) for split, samples in official.splits.items()},
        "height": _range(sizes[:, 0]),
        "width": _range(sizes[:, 1]),
        "bad": {str(path): reason for path, reason in bad.items()},
        "unread": official.unread,
        "copies": {"seen_before": {}, "other_classes": 0, "groups": []},
    }
    if is_main:
        write_json(run_dir / layout.CHECK, report)
    if bad and dataset.bad_images == "error":
        if is_main:
            console.show_bad(report["bad"])
        kind = MissingInputError if "missing" in bad.values() else UserError
        raise kind(
            f"dataset {dataset.name}: {len(bad)} of {sum(report['official_images'].values()):,} images are missing or "
            f"damaged, all named in {run_dir / layout.CHECK}; replace them, or set dataset.bad_images=skip"
        )
    images = choose(dataset, official)
    report["copies"] = _copies(images)
    data = ImageDataModule(
        images,
        prepared_as(input_spec(settings.model), dataset),
        transform=dataset.transform,
        batch_size=dataset.batch_size,
        eval_batch_size=EVAL_BATCH_SIZE,
        seed=settings.seed,
    )
    if is_main:
        write_json(run_dir / layout.CHECK, report)
        write_card(run_dir, data)
        dataset = settings.dataset
        title, card = f"dataset {dataset.name} in {dataset.path or settings.data_dir}", images.describe()
        console.show_check(title, report, card["images"], card["images_per_class"])
        log.info("Results: %s", run_dir)
    return {f"images/{split}": len(samples) for split, samples in images.splits.items()}


def _inspect(official: Official, how: Decoding) -> tuple[npt.NDArray[np.int64], dict[Path, str]]:
    """Heights and widths [N, 2] of all images, and what is wrong with the others."""
    sizes: list[tuple[int, int]] = []
    bad: dict[Path, str] = {}
    for samples in official.splits.values():
        if not isinstance(samples.images, tuple):
            sizes += [samples.images.shape[1:3]] * len(samples)
            continue
        bad |= dict.fromkeys(missing_files(samples.images), "missing")
        for path, found in look_at([path for path in samples.images if path not in bad], how).items():
            if isinstance(found, str):
                bad[path] = found
            else:
                sizes.append(found)
    return np.array(sizes, np.int64).reshape(-1, 2), bad


def _copies(images: ImageSet) -> Copies:
    groups = copies(images.splits)
    seen_before: Counter[str] = Counter()
    for group in groups:
        first = min(SPLITS.index(image.split) for image in group)
        seen_before.update(image.split for image in group if SPLITS.index(image.split) > first)
    return {
        "seen_before": dict(seen_before),
        "other_classes": sum(len({image.label for image in group}) > 1 for group in groups),
        "groups": [[image.name for image in group] for group in groups[:GROUPS]],
    }


def _range(values: npt.NDArray[np.int64]) -> Sizes:
    if not len(values):
        return {}
    return {"min": int(values.min()), "median": float(np.median(values)), "max": int(values.max())}
