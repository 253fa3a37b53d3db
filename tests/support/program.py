"""The whole program in a process of its own; where training does not matter, with a stage that says what it got."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Stands in for the stages: says what it got, leaves results behind, and fails as the seed asks for.
STAGE = """
import json, logging, os, struct, sys
from dataclasses import dataclass

import recast_exp.models  # imports nothing heavy by itself, and label is replaced below
import types
labels = types.ModuleType("recast_exp.models.label")
labels.method_label = lambda label, model, adapter: label or model.label
sys.modules["recast_exp.models.label"] = labels
trainer = types.ModuleType("recast_exp.training.trainer")
import contextlib
trainer.quiet = contextlib.nullcontext
trainer.progress_bars = lambda wanted: contextlib.nullcontext()
sys.modules["recast_exp.training.trainer"] = trainer

from recast_exp.cli import main as cli
from recast_exp.runs.results import Counts
from recast_exp.stages import adapt

def run(self, job):
    from recast_exp.errors import MissingInputError, UserError
    settings, run_dir = job.settings, job.folder
    keys = {"model": settings.model.name, "seed": settings.seed, "data_dir": settings.data_dir}
    print(json.dumps({**keys, "epochs": settings.trainer.max_epochs, "run_dir": str(run_dir)}), flush=True)
    logging.getLogger("recast_exp.stages").info("at work")
    once = run_dir / "once"
    if settings.seed == 99 and not once.exists():
        once.touch()
        os.kill(os.getpid(), 9)
    if settings.seed == 102:
        raise UserError("some.key: expected 2, got 1")
    if settings.seed == 103:
        raise MissingInputError("some.file: is not there")
    if settings.seed == 101:
        raise ValueError("a bug")
    if settings.seed == 130:
        raise KeyboardInterrupt
    metrics = {"val/accuracy": 0.5, "test/accuracy": settings.seed / 1000}
    (run_dir / "metrics.json").write_text(json.dumps(metrics))
    counts = dict.fromkeys(Counts.__annotations__, 0) | {"task_specific": 48, "layers": {}}
    (run_dir / "parameters.json").write_text(json.dumps(counts))
    images = {"size": 8, "mean": [0, 0, 0], "std": [1, 1, 1], "crop_pct": 1, "interpolation": "bicubic"}
    facts = {"backbone": {"name": "", "fingerprint": ""}, "classes": ["a"], "input": images, "eval_batch_size": 1}
    record = json.dumps({"format": 2, "config": {"seed": settings.seed}, "bank": None, **facts})
    header = json.dumps({"__metadata__": {"recast_exp": record}}).encode()
    (run_dir / "task.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    return metrics

adapt.Adapt.run = run
if "unfit" not in os.environ:
    cli._preflight = lambda findings: []  # asks timm, which takes seconds to import
cli.main()
"""


class Result:
    """What a process left behind."""

    def __init__(self, done: subprocess.CompletedProcess[str], folder: Path) -> None:
        self.code = done.returncode
        self.out = done.stdout
        lines = done.stderr.splitlines()
        self.err = [line for line in lines if not line.startswith("Recipe: ")]
        self.recipe = [line for line in lines if line.startswith("Recipe: ")]
        self.folder = folder
        self.files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))

    @property
    def jobs(self) -> list[dict[str, Any]]:
        """What the stages said."""
        return [json.loads(line) for line in self.out.splitlines() if line.startswith("{")]


def runner(folder: Path) -> Callable[..., Result]:
    """Runs the program in a folder, with the stages replaced by ours if `stage`."""
    folder.mkdir()

    def run(*argv: str, stage: bool = False) -> Result:
        command = [sys.executable, "-c", STAGE] if stage else [sys.executable, "-m", "recast_exp"]
        done = subprocess.run([*command, *argv], cwd=folder, capture_output=True, text=True, timeout=120, check=False)
        return Result(done, folder)

    return run
