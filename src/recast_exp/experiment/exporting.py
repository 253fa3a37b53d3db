"""The procedure of `stage=export`: a task file as a model of another program."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from pathlib import Path

from recast_exp.config.schema import Config
from recast_exp.experiment.trained import open_task
from recast_exp.export import FORMATS
from recast_exp.export._base import exported
from recast_exp.files import write_json, writing
from recast_exp.runs import layout
from recast_exp.runs.results import Metrics

log = logging.getLogger(__name__)


def run(settings: Config, run_dir: Path, format: str, options: Mapping[str, bool]) -> Metrics:
    """Write a task in a format, load it again as its users would, and compare the logits.

    Args:
        settings: The settings of the command, with the task file.
        run_dir: Folder of the run; the model goes into `export` in it.
        format: A key of `export.FORMATS`.
        options: Those of the format.

    Raises:
        UserError: If the format cannot hold the model, its packages are not installed, or the logits differ.
    """
    trained = open_task(settings)
    model = exported(trained.adapted, trained.task, own_weights=settings.model.weights is not None)
    folder = run_dir / layout.EXPORT
    with writing(folder):
        folder.mkdir(exist_ok=True)
    write = importlib.import_module(f"recast_exp.export.{FORMATS[format]}").write
    files, difference = write(model, folder, **options)
    facts = model.facts
    write_json(
        folder / layout.EXPORT_FACTS,
        {
            "format": format,
            "options": dict(options),
            **{name: value for name, value in vars(facts).items() if name not in ("input", "classes")},
            "classes": list(facts.classes),
            "input": vars(facts.input) | {"mean": list(facts.input.mean), "std": list(facts.input.std)},
            "preprocessing": facts.preprocessing(),
            "largest_difference": difference,
        },
    )
    for file in files:
        log.info("%s  %.1f MB", file, file.stat().st_size / 1e6)
    log.info("The logits of what was loaded again differ by %.1e at most. %s", difference, facts.preprocessing())
    return {"largest_difference": difference, "bytes": sum(file.stat().st_size for file in files)}
