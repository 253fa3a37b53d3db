"""A dataset's card, for a person to look at: what is in it, what the model sees of it, and what it takes for what."""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, TypedDict

import torch

from recast_exp import schemas
from recast_exp.data.datamodule import ImageDataModule
from recast_exp.data.types import ImageSet
from recast_exp.display import image_plots
from recast_exp.errors import UserError
from recast_exp.files import write_json, write_text
from recast_exp.runs import layout

if TYPE_CHECKING:
    from recast_exp.training.loop import Prediction


class _Card(TypedDict):
    """Of `dataset.json`, what tells one set of images from another."""

    classes: list[str]
    digests: NotRequired[dict[str, str]]  # runs of older versions have none


def check_images(run_dir: Path, images: ImageSet) -> None:
    """Refuse to go on with a run on other images than it was started with: it would train on one set, and test another.

    Args:
        run_dir: Folder of the run.
        images: Its images as they are now.

    Raises:
        UserError: If its card is of other classes or images.
    """
    path = run_dir / layout.DATASET
    if not path.is_file():
        return
    card = schemas.read_json(path, _Card, "the images of a run")
    other = [name for name in card["classes"] if name not in images.classes]
    other += [name for name in images.classes if name not in card["classes"]]
    digests = card.get("digests", {})
    splits = [split for split, samples in images.splits.items() if digests.get(split, "") not in ("", samples.digest())]
    if other or card["classes"] != list(images.classes):
        found = f"other classes ({', '.join(other[:3]) or 'in another order'})"
    elif splits:
        found = f"other files or labels in {', '.join(splits)}"
    else:
        return
    raise UserError(
        f"dataset: expected the images that the run in {run_dir} was started with, got {found}; restore them, or start "
        "from scratch in a new folder"
    )


def write_images(run_dir: Path, images: ImageSet) -> None:
    """Write `dataset.json`: classes, images per split and class, and a digest of each split.

    Runs with the same digests have the same images, wherever those lie: `check_images` and reports compare them.

    Args:
        run_dir: Folder of the run.
        images: Its images.
    """
    digests = {split: samples.digest() for split, samples in images.splits.items()}
    write_json(run_dir / layout.DATASET, images.describe() | {"digests": digests})


def write_card(run_dir: Path, data: ImageDataModule) -> None:
    """Write `dataset.json` (`write_images`) and `plots/batch.png` (the first training images).

    Args:
        run_dir: Folder of the run.
        data: The images.
    """
    images = data.image_set
    write_images(run_dir, images)
    pixels, labels = data.example(image_plots.SHEET_IMAGES)
    size = data.spec.size
    title = f"{images.name} · training images as the model sees them · {size} × {size}, {data.transform}"
    image_plots.contact_sheet(pixels, labels, images.classes, layout.plot(run_dir, "batch"), title=title)


def write_predictions(run_dir: Path, data: ImageDataModule, predictions: Sequence[Prediction]) -> None:
    """Write `predictions.csv`, `plots/confusion.png` and `plots/mistakes.png` (the 16 of the greatest loss).

    Args:
        run_dir: Folder of the run.
        data: The images.
        predictions: One for each test image.
    """
    classes = data.image_set.classes
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("image", "class", "predicted", "probability", "loss"))
    names = _names(data)
    for row in predictions:
        writer.writerow((names[row.image], classes[row.label], classes[row.predicted], row.probability, row.loss))
    write_text(run_dir / layout.PREDICTIONS, text.getvalue())

    pairs = Counter((row.label, row.predicted) for row in predictions)
    image_plots.confusion_matrix(pairs, classes, layout.plot(run_dir, "confusion"))
    wrong = sorted((row for row in predictions if row.predicted != row.label), key=lambda row: -row.loss)
    worst = wrong[: image_plots.MISTAKES]
    size = data.spec.size
    images = torch.stack([data.datasets["test"][0, row.image][0] for row in worst] or [torch.empty(3, size, size)])
    rows = [image_plots.Mistake(row.label, row.predicted, row.probability) for row in worst]
    image_plots.mistakes(images[: len(worst)].byte(), rows, classes, layout.plot(run_dir, "mistakes"))


def _names(data: ImageDataModule) -> Sequence[str]:
    """The test images' files, relative to the folder that holds them all; their numbers where there are no files."""
    images = data.image_set.splits["test"].images
    if not isinstance(images, tuple):
        return [str(number) for number in range(len(images))]
    root = Path(os.path.commonpath([path.parent for path in images]))
    return [path.relative_to(root).as_posix() for path in images]
