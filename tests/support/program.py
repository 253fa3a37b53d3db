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
import json, logging, os, struct, sys, types

def run(cfg, run_dir, sweep=None):
    from recast_exp.errors import MissingInputError, UserError
    keys = {"model": cfg.model.name, "seed": cfg.seed, "data_dir": cfg.data_dir, "epochs": cfg.trainer.max_epochs}
    print(json.dumps({**keys, "run_dir": str(run_dir)}), flush=True)
    logging.getLogger("recast_exp.stages").info("at work")
    once = run_dir / "once"
    if cfg.seed == 99 and not once.exists():
        once.touch()
        os.kill(os.getpid(), 9)
    if cfg.seed == 102:
        raise UserError("some.key: got 1, takes 2")
    if cfg.seed == 103:
        raise MissingInputError("some.file: is not there")
    if cfg.seed == 101:
        raise ValueError("a bug")
    if cfg.seed == 130:
        raise KeyboardInterrupt
    metrics = {"val/accuracy": 0.5, "test/accuracy": cfg.seed / 1000}
    (run_dir / "metrics.json").write_text(json.dumps(metrics))
    (run_dir / "parameters.json").write_text(json.dumps({"task_specific": 48}))
    record = json.dumps({"format": 1, "config": {"seed": cfg.seed}})
    header = json.dumps({"__metadata__": {"recast_exp": record}}).encode()
    (run_dir / "task.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    return metrics

stages = types.ModuleType("recast_exp.stages")
stages.run = run
sys.modules["recast_exp.stages"] = stages
labels = types.ModuleType("recast_exp.models.label")
labels.method_label = lambda cfg: cfg.label or cfg.model.label
sys.modules["recast_exp.models.label"] = labels
from recast_exp.cli import main as cli
if "unfit" not in os.environ:
    cli._unfit_models = lambda jobs: []  # asks timm, which takes seconds to import
cli.main()
"""


class Result:
    """What a process left behind."""

    def __init__(self, done: subprocess.CompletedProcess[str], folder: Path) -> None:
        self.code = done.returncode
        self.out = done.stdout
        self.err = done.stderr.splitlines()
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
