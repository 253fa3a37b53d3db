"""The procedure of `stage=predict`: any number of images, one batch after another, in constant memory."""

from __future__ import annotations

import collections
import contextlib
import csv
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
from lightning.fabric import Fabric
from msgspec import Meta
from torch import Tensor
from tqdm import tqdm

from recast_exp import schemas
from recast_exp.config.schema import Config, TrainerConfig
from recast_exp.data.images import UnreadableImageError
from recast_exp.data.listing import images_at
from recast_exp.data.pixels import normalize
from recast_exp.data.preprocessing import InputSpec
from recast_exp.display import console, image_plots
from recast_exp.errors import RecastError, UserError
from recast_exp.experiment.trained import Trained, open_tasks
from recast_exp.files import json_hash, user_path, write_json
from recast_exp.models.features import full_precision
from recast_exp.runs import layout
from recast_exp.runs.results import Metrics
from recast_exp.system import usable_cores
from recast_exp.tasks.prediction import Predicted, prepared, top_of
from recast_exp.torch_state import threads
from recast_exp.training.environment import check_device, device_name, thread_count

log = logging.getLogger(__name__)

AHEAD = 2  # batches that are decoded while one is computed


@dataclass(frozen=True)
class Asked:
    """What is predicted, and how.

    Attributes:
        images: A folder, a pattern, a list or an image (`data.listing.images_at`).
        top: Number of classes that are written for an image.
        batch_size: Images that are computed at once; another number changes the last bits.
        sheet: Images on the contact sheet.
    """

    images: str
    top: int
    batch_size: int
    sheet: int


@dataclass
class _Progress:
    """How far a run is, in `progress.json`: what is behind these sizes in the files is of a batch that was cut off."""

    asked: str
    seen: Annotated[int, Meta(ge=0)] = 0
    broken: Annotated[int, Meta(ge=0)] = 0
    seconds: Annotated[float, Meta(ge=0)] = 0.0
    sizes: dict[str, Annotated[int, Meta(ge=0)]] = field(default_factory=dict)
    counts: dict[str, dict[str, Annotated[int, Meta(ge=0)]]] = field(default_factory=dict)
    paths: str = ""
    """A hash of the paths that have been seen, in their order; empty in the files of earlier versions."""


def run(settings: Config, run_dir: Path, asked: Asked) -> Metrics:
    """Predict the classes of images with one task or several, and write them down batch by batch.

    Run again in the same folder, it goes on after the last whole batch.

    Args:
        settings: The settings of the command, with the task files.
        run_dir: Folder of the run.
        asked: What is predicted.

    Raises:
        MissingInputError: If there are no images.
        UserError: If the tasks have different backbones, none of the images can be read, or the folder holds other
            predictions.
    """
    check_device(settings.trainer)
    paths = itertools.chain(images_at(asked.images))
    paths = itertools.chain([next(paths)], paths)  # whether there is one, before a backbone is created
    tasks = open_tasks(settings)
    digests = [hashlib.sha256(task.task.path.read_bytes()).hexdigest() for task in tasks.values()]
    images = str(user_path(asked.images).absolute())
    what = json_hash([digests, dataclasses.asdict(asked) | {"images": images}], 32)
    most = max(len(task.task.classes) for task in tasks.values())
    with _Files(run_dir, what, list(tasks), min(asked.top, most)) as files:
        if files.progress.seen:
            log.info("Going on after %d images", files.progress.seen)
            files.check_seen(itertools.islice(paths, files.progress.seen))
        _predict(settings.trainer, tasks, paths, asked, files, settings.dataset.max_pixels)
        found = files.progress
    predicted = found.seen - found.broken
    if not predicted:
        raise UserError(
            f"stage.images: expected images, got {found.broken} files below {asked.images} that cannot be read; "
            f"{layout.BROKEN} says why"
        )
    _write_sheet(run_dir, tasks, asked.sheet, settings.dataset.max_pixels)
    console.show_predictions(asked.images, predicted, found.broken, found.counts)
    log.info("Results: %s", run_dir)
    return {
        "images": predicted,
        "broken": found.broken,
        "seconds": found.seconds,
        "images_per_second": predicted / max(found.seconds, 1e-9),
        "device": device_name(settings.trainer),
    }


def _predict(
    trainer: TrainerConfig,
    tasks: Mapping[str, Trained],
    paths: Iterator[Path],
    asked: Asked,
    files: _Files,
    max_pixels: int,
) -> None:
    fabric = Fabric(accelerator=trainer.accelerator, devices=1, precision=trainer.precision)  # type: ignore[arg-type]
    networks = {name: fabric.setup_module(task.adapted.network.eval()) for name, task in tasks.items()}
    specs = {name: task.task.input for name, task in tasks.items()}
    constants = {spec: spec.constants(fabric.device) for spec in specs.values()}
    bar = tqdm(desc="predicting", unit="img", initial=files.progress.seen, leave=False, disable=not sys.stderr.isatty())
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        for task in tasks.values():
            stack.enter_context(full_precision(task.adapted.network))
        for block in (bar, threads(thread_count(trainer)), torch.inference_mode()):
            stack.enter_context(block)
        for batch in _decoded(paths, list(constants), asked.batch_size, max_pixels):
            whole = [(path, images) for path, images in batch if not isinstance(images, str)]
            for path, reason in batch:
                if isinstance(reason, str):
                    log.warning("%s is left out: it cannot be read as an image (%s)", path, reason)
            rows: dict[str, list[Predicted]] = {name: [] for name in tasks}
            for name, network in networks.items() if whole else ():
                spec, classes = specs[name], tasks[name].task.classes
                pixels = torch.stack([images[spec] for _, images in whole if not isinstance(images, str)])
                logits: Tensor = network(normalize(pixels.to(fabric.device), *constants[spec])).cpu()
                rows[name] = [top_of(line, classes, name, asked.top) for line in logits]
            broken = [(path, reason) for path, reason in batch if isinstance(reason, str)]
            order = [path for path, _ in batch]
            files.add(order, [path for path, _ in whole], rows, broken, time.perf_counter() - started)
            started = time.perf_counter()
            bar.update(len(batch))


_Decoded = tuple[Path, Mapping[InputSpec, Tensor] | str]


def _decoded(paths: Iterator[Path], specs: Sequence[InputSpec], size: int, max_pixels: int) -> Iterator[list[_Decoded]]:
    """Batches of images as each input expects them, or the reason why one cannot be read; decoded a little ahead."""

    def decode(path: Path) -> _Decoded:
        try:
            return path, {spec: prepared(path, spec, max_pixels) for spec in specs}
        except RecastError as error:
            return path, error.reason if isinstance(error, UnreadableImageError) else "it is not there"

    waiting: collections.deque[list[Future[_Decoded]]] = collections.deque()
    with ThreadPoolExecutor(usable_cores()) as pool:
        while True:
            while len(waiting) < AHEAD and (some := list(itertools.islice(paths, size))):
                waiting.append([pool.submit(decode, path) for path in some])
            if not waiting:
                return
            yield [future.result() for future in waiting.popleft()]


class _Files:
    """`predictions.csv`, `predictions.jsonl` and `broken.csv`, to which batches are appended whole.

    Raises:
        UserError: If the folder holds predictions of other tasks or images.
    """

    def __init__(self, folder: Path, what: str, tasks: Sequence[str], top: int) -> None:
        self._folder = folder
        self._path = folder / layout.PROGRESS
        self.progress = self._read(what)
        names = [("class", "probability"), *((f"class_{at}", f"probability_{at}") for at in range(2, top + 1))]
        self._heads = {
            layout.PREDICTIONS: _csv([["image", "task", *itertools.chain(*names)]]),
            layout.PREDICTIONS_LINES: "",
            layout.BROKEN: _csv([["image", "reason"]]),
        }
        self._top = top
        self._tasks = tasks

    def _read(self, what: str) -> _Progress:
        if not self._path.is_file():
            return _Progress(what)
        try:
            progress = schemas.decode(self._path, _Progress)
        except ValueError:
            raise UserError(f"hydra.run.dir: {self._path} is damaged; choose a new folder") from None
        if progress.asked != what:
            raise UserError(
                f"hydra.run.dir: {self._folder} holds the predictions of other tasks, images or options; choose a new "
                "folder"
            )
        return progress

    def check_seen(self, paths: Iterable[Path]) -> None:
        """Refuse to go on where the images that have been seen are no longer the first ones.

        Raises:
            UserError: If they are not.
        """
        if self.progress.paths and functools.reduce(_chained, paths, "") != self.progress.paths:
            raise UserError(
                f"hydra.run.dir: {self._folder} has predictions of other images: some have been added, removed or "
                "renamed since; choose a new folder"
            )

    def __enter__(self) -> _Files:
        for name, size in self.progress.sizes.items():
            path = self._folder / name
            if name not in self._heads or not path.is_file() or path.stat().st_size < size:
                raise UserError(
                    f"hydra.run.dir: {path} is not there, or shorter than {layout.PROGRESS} says; choose a new folder"
                )
        self._open = {name: (self._folder / name).open("ab") for name in self._heads}
        for name, file in self._open.items():
            file.truncate(self.progress.sizes.get(name, 0))
            file.seek(0, os.SEEK_END)
            if not self.progress.sizes:
                file.write(self._heads[name].encode("utf-8"))
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open.values():
            file.close()

    def add(
        self,
        order: Sequence[Path],
        paths: Sequence[Path],
        rows: Mapping[str, Sequence[Predicted]],
        broken: Sequence[tuple[Path, str]],
        seconds: float,
    ) -> None:
        """Append a batch, and note that it is there once it is on disk."""
        lines: list[list[str]] = []
        objects: list[str] = []
        for at, path in enumerate(paths):
            for name in self._tasks:
                found = rows[name][at]
                pairs = [value for label, probability in found.top for value in (label, f"{probability:.6f}")]
                lines.append([str(path), name, *pairs, *[""] * (2 * self._top - len(pairs))])
                entry = {"image": str(path), "task": name, "class": found.label, "probability": found.probability}
                objects.append(json.dumps(entry | {"top": found.top}, ensure_ascii=False) + "\n")
                counts = self.progress.counts.setdefault(name, {})
                counts[found.label] = counts.get(found.label, 0) + 1
        texts = {
            layout.PREDICTIONS: _csv(lines),
            layout.PREDICTIONS_LINES: "".join(objects),
            layout.BROKEN: _csv([[str(path), reason] for path, reason in broken]),
        }
        for name, file in self._open.items():
            file.write(texts[name].encode("utf-8", "backslashreplace"))
            file.flush()
            os.fsync(file.fileno())
        self.progress.seen += len(order)
        self.progress.paths = functools.reduce(_chained, order, self.progress.paths)
        self.progress.broken += len(broken)
        self.progress.seconds += seconds
        self.progress.sizes = {name: file.tell() for name, file in self._open.items()}
        write_json(self._path, dataclasses.asdict(self.progress))


def _chained(before: str, path: Path) -> str:
    return hashlib.sha256(f"{before}{path}\0".encode(errors="surrogateescape")).hexdigest()


def _csv(rows: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _write_sheet(run_dir: Path, tasks: Mapping[str, Trained], count: int, max_pixels: int) -> None:
    """The first images with what the first task takes them for."""
    name, task = next(iter(tasks.items()))
    with (run_dir / layout.PREDICTIONS_LINES).open(encoding="utf-8") as file:
        entries = (entry for line in file if (entry := json.loads(line))["task"] == name)
        shown = list(itertools.islice(entries, count))
    images = []
    captions = []
    for entry in shown:
        try:
            images.append(prepared(entry["image"], task.task.input, max_pixels))
        except UserError:  # it has gone since
            continue
        captions.append((entry["class"], entry["probability"]))
    if images:
        whose = f" by {name}" if len(tasks) > 1 else ""
        title = (
            f"The first {len(images)} images as the model sees them, with the class predicted{whose} (its probability)"
        )
        image_plots.predictions(torch.stack(images), captions, layout.plot(run_dir, "predictions"), title=title)
