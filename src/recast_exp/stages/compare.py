"""`stage=compare`: every method that fits one backbone, beside each other, over several seeds."""

from __future__ import annotations

import csv
import fnmatch
import functools
import io
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from recast_exp import adapters, console, plots
from recast_exp.backbones import blueprint
from recast_exp.composition import conf_dir
from recast_exp.errors import UserError
from recast_exp.experiment import with_values
from recast_exp.files import json_hash, write_json, write_text
from recast_exp.stages.adapt import adapt, read_results
from recast_exp.sweep import mean_and_spread

log = logging.getLogger(__name__)

PROBE, RECAST, FULL = "linear probe", "RECAST", "full fine-tuning"


def run(cfg: DictConfig, run_dir: Path, group: str | None = None) -> dict[str, Any]:
    """Run every method with every seed, and set the results beside each other.

    A run that is finished in `run_dir` already, with the same configuration, is not repeated: the same command with the
    same hydra.run.dir goes on where it was stopped.

    Raises:
        UserError: If `stage.methods` names no method that fits.
    """
    rows = _chosen(cfg, methods(cfg))
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in rows}
    for seed in cfg.stage.seeds:
        for name, each in rows.items():
            results[name].append(_run(with_values(each, seed=seed), run_dir / "runs", name, group))
            _write(run_dir, results)
    summary = summarize(results)
    console.show_comparison(cfg, summary)
    log.info("Results: %s", run_dir)
    return {f"{name}/test/accuracy": row["test/accuracy"] for name, row in summary.items()}


def methods(cfg: DictConfig) -> dict[str, DictConfig]:
    """Name → configuration of every method that fits the backbone; an adapter's with the values of its preset."""
    base = with_values(cfg, adapter={"name": "none"}, probe=False, stage__name="adapt")
    frozen = with_values(base, model__method="frozen")
    rows = {PROBE: frozen}
    if cfg.model.method == "recast":
        rows[RECAST] = base
    for name in adapters.fitting(functools.partial(blueprint, cfg)):
        if name != "none":
            preset = OmegaConf.load(conf_dir() / "adapter" / f"{name}.yaml")
            assert isinstance(preset, DictConfig)
            optimizer = {f"optimizer__{key}": value for key, value in preset.get("optimizer", {}).items()}
            rows[name] = with_values(frozen, adapter=preset.adapter, **optimizer)
            if cfg.model.method == "recast":
                rows[f"{RECAST} + {name}"] = with_values(base, adapter=preset.adapter, **optimizer)
    rows[FULL] = with_values(base, model__method="full", model__batchnorm_statistics="update")
    return rows


def summarize(results: Mapping[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """For each method that has results: mean and spread over its seeds, and what a task takes."""
    rows = {}
    for name, runs in results.items():
        if runs:
            row = {key: runs[0]["parameters"][key] for key in ("task_specific", "task_bits", "head")}
            for metric in ("val/accuracy", "test/accuracy", "seconds"):
                row[metric], row[f"{metric}/spread"] = mean_and_spread([each[metric] for each in runs])
            rows[name] = {"seeds": len(runs), **row}
    return rows


def _chosen(cfg: DictConfig, rows: dict[str, DictConfig]) -> dict[str, DictConfig]:
    patterns = cfg.stage.methods
    if patterns is None:
        return rows
    for pattern in patterns:
        if not fnmatch.filter(rows, pattern):
            raise UserError(f"stage.methods: got {pattern!r}, takes names or patterns of {', '.join(rows)}")
    return {name: each for name, each in rows.items() if any(fnmatch.fnmatchcase(name, p) for p in patterns)}


def _run(cfg: DictConfig, folder: Path, name: str, group: str | None) -> dict[str, Any]:
    """The results of one method with one seed; trained, continued, or read where they are there already."""
    run_dir = folder / name.replace(" ", "_") / str(cfg.seed)
    fingerprint = json_hash(OmegaConf.to_container(cfg, resolve=True), 32)
    record = run_dir / "configuration.txt"
    known = record.is_file() and record.read_text(encoding="utf-8") == fingerprint
    started = time.perf_counter()
    if not (known and (run_dir / "metrics.json").is_file()):
        if not known:  # what another configuration has left is not continued
            for left in (run_dir / "metrics.json", run_dir / "checkpoints" / "last.ckpt"):
                left.unlink(missing_ok=True)
        write_text(record, fingerprint)
        adapt(cfg, run_dir, group)
    metrics, parameters = read_results(run_dir)
    seconds = time.perf_counter() - started
    log.info("%s, seed %d: test accuracy %.1f %% (%.0f s)", name, cfg.seed, 100 * metrics["test/accuracy"], seconds)
    return {**metrics, "parameters": parameters}


def _write(run_dir: Path, results: Mapping[str, list[dict[str, Any]]]) -> None:
    """Write what there is so far: `comparison.json`, `comparison.csv` and `plots/comparison.png`."""
    rows = summarize(results)
    write_json(run_dir / "comparison.json", rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, ["method", *next(iter(rows.values()))], lineterminator="\n")
    writer.writeheader()
    writer.writerows({"method": name, **row} for name, row in rows.items())
    write_text(run_dir / "comparison.csv", text.getvalue())
    plots.comparison(rows, run_dir / "plots" / "comparison.png")
