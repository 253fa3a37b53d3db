"""Sweeps that nobody ran: folders as the jobs of a sweep leave them, with numbers from a formula."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from support.task_files import COUNTS, FACTS

SEEDS = (42, 1998, 3142592)
DATASETS = {"flowers": 102, "aircraft": 100, "scenes": 67, "cub": 200, "cifar10": 10, "cifar100": 100}
# label → method of the model, name of the adapter, coefficients, task numbers, gain over the probe
METHODS: dict[str, tuple[str, str, int, int, float]] = {
    "linear probe": ("frozen", "none", 0, 0, 0.0),
    "RECAST-Att": ("recast", "none", 48, 48, 0.014),
    "RECAST-MLP": ("recast", "none", 96, 96, 0.009),
    "RECAST-Att+MLP": ("recast", "none", 144, 144, 0.019),
    "BitFit": ("frozen", "bitfit", 0, 41_088, 0.025),
    "MeLo": ("frozen", "melo", 0, 73_728, 0.04),
    "AdaptFormer": ("frozen", "adaptformer", 0, 595_200, 0.043),
    "Piggyback": ("frozen", "piggyback", 0, 21_233_664, 0.03),
    "RECAST-Att + MeLo": ("recast", "melo", 48, 73_776, 0.044),
    "RECAST-Att + AdaptFormer": ("recast", "adaptformer", 48, 595_248, 0.047),
    "RECAST-Att + Piggyback": ("recast", "piggyback", 48, 21_233_712, 0.034),
    "full fine-tuning": ("full", "none", 0, 21_665_664, 0.05),
}
LEVELS = dict(zip(DATASETS, (0.97, 0.55, 0.81, 0.83, 0.95, 0.82), strict=True))


def write_job(
    folder: Path,
    label: str = "RECAST-Att",
    dataset: str = "cub",
    seed: int = 42,
    *,
    number: int = 0,
    state: str = "finished",
    reason: str | None = None,
    overrides: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
    accuracy: float | None = None,
    epochs: int = 5,
    **record: Any,
) -> Path:
    """Write the folder of one job, with results if it is finished."""
    folder.mkdir(parents=True, exist_ok=True)
    method, adapter, coefficients, numbers, gain = METHODS.get(label, METHODS["RECAST-Att"])
    draw = np.random.default_rng([seed, list(DATASETS).index(dataset) if dataset in DATASETS else 9, len(label)])
    if accuracy is None:
        accuracy = float(min(0.999, LEVELS.get(dataset, 0.8) + gain + 0.004 * draw.standard_normal()))
    whole = {
        "seed": seed,
        "model": {"label": label, "method": method, "backbone": "vit_small_patch16_224", "weights": None},
        "adapter": {"name": adapter},
        "optimizer": {"lr": 0.002},
        "dataset": {"name": dataset},
    }
    content = {
        "format": 1,
        "state": state,
        "reason": reason,
        "exit_code": None,
        "number": number,
        "label": label,
        "stage": "adapt",
        "dataset": dataset,
        "seed": seed,
        "overrides": list(overrides),
        "config": merged(whole, config or {}),
        "pid": 1,
        "host": "somewhere",
        "started": "2026-11-21T10:00:00",
        "updated": f"2026-11-21T10:{number % 60:02d}:00",
        "epoch": epochs if state == "finished" else 2,
        "epochs": epochs,
        "val/accuracy": accuracy,
        **record,
    }
    (folder / "job.json").write_text(json.dumps(content))
    if state != "finished":
        return folder
    bits = 32 * coefficients + (numbers - coefficients if adapter == "piggyback" else 32 * (numbers - coefficients))
    metrics = {
        "test/accuracy": accuracy,
        "test/loss": 2 * (1 - accuracy),
        "val/accuracy": accuracy + 0.01,
        "epoch": epochs,
        "epochs": epochs,
        "seconds": 12.5,
        "images_per_second": 300.0,
        "device": "cpu (1 threads)",
        "version/torch": "2.15.0",
        "version/recast_exp": "0.1.0",
        "test/accuracy_per_class/one": 0.5,
    }
    parameters = {
        **COUNTS,
        "coefficients": coefficients,
        "adapter": numbers - coefficients,
        "task_specific": numbers,
        "task_bits": bits,
        "head": 385 * DATASETS.get(dataset, 10),
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "parameters.json").write_text(json.dumps(parameters))
    progress = 1 - np.exp(-np.arange(1, epochs + 1) / ((0.1 + 0.4 * draw.random()) * epochs))
    rows = [f"{at + 1},{2 - 1.5 * p},{accuracy * p},{2.1 - 1.4 * p}" for at, p in enumerate(progress)]
    (folder / "metrics.csv").write_text("\n".join(["epoch,train/loss,val/accuracy,val/loss", *rows]) + "\n")
    if coefficients:
        shares = np.tile(np.eye(2), (6, 1, 1)) + 0.1 * draw.standard_normal((6, 2, 2))
        layers = [f"blocks.{at}.attn.qkv" for at in range(12)]
        groups = [[f"blocks.attn.qkv.{at}", 2, 1, *layers[2 * at : 2 * at + 2]] for at in range(6)]
        tensors = {"relative": shares.ravel().astype(np.float32)}
        record = {"format": 2, "config": {}, "bank": "1" * 64, "templates": {"groups": groups, "solver": None}}
        record |= {"version": "0.1.0", **FACTS}
        save_file(tensors, folder / "task.safetensors", {"recast_exp": json.dumps(record)})
    return folder


def write_card(
    folder: Path, images: str = "", *, train: str = "", count: int = 10, classes: Sequence[str] = "ab"
) -> None:
    """Write the dataset.json of a job.

    Args:
        folder: The job's.
        images: Name for its test images; empty for a run of an earlier version, which has no digests.
        train: Name for its training and validation images.
        count: Number of test images.
        classes: Names of its classes.
    """
    digests = {"train": f"{train} train", "val": f"{train} val", "test": images}
    counts = {split: [count, *(0 for _ in classes[1:])] for split in digests}
    card = {"classes": list(classes), "images_per_class": counts, **({"digests": digests} if images else {})}
    (folder / "dataset.json").write_text(json.dumps(card))


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values over others."""
    return {
        **base,
        **{
            name: merged(base[name], value) if isinstance(value, Mapping) and name in base else value
            for name, value in over.items()
        },
    }


def write_plan(folder: Path, jobs: Sequence[Mapping[str, Any]], command: str = "python -m recast_exp -m …") -> Path:
    """Write sweep.json; a job needs folder, label, dataset and seed."""
    folder.mkdir(parents=True, exist_ok=True)
    plan = [{"number": at, "overrides": [], "skipped": None, **job} for at, job in enumerate(jobs)]
    sweep = {"format": 1, "command": command, "created": "2026-11-21T10:00:00", "jobs": plan}
    (folder / "sweep.json").write_text(json.dumps(sweep))
    return folder


def write_sweep(folder: Path, *, whole: bool = False, epochs: int = 5) -> Path:
    """Twelve methods, six datasets, three seeds; unless `whole`, with what goes wrong in one."""
    plan = []
    for label in METHODS:
        for dataset in DATASETS:
            for seed in SEEDS:
                name = label.lower().replace(" ", "_").replace("+", "and")
                overrides = [f"method={name}", f"dataset={dataset}", f'seed="{seed}"']
                job = {"folder": str(len(plan)), "label": label, "dataset": dataset, "seed": seed}
                plan.append({**job, "overrides": overrides})
    states: dict[tuple[str, str, int], tuple[str, str | None]] = {}
    if not whole:
        states = {
            ("MeLo", "cub", 1998): ("failed", "RuntimeError: [enforce fail] out of memory: tried to allocate 96 GB"),
            ("RECAST-Att + MeLo", "cifar100", 42): ("interrupted", None),
            ("RECAST-Att + MeLo", "cifar100", 1998): ("failed", "adapter.rank: got 3, takes <script>alert(1)</script>"),
            ("full fine-tuning", "cifar100", 3142592): ("running", None),
            **{("full fine-tuning", "cifar10", seed): ("planned", None) for seed in SEEDS},
            **{("Piggyback", "scenes", seed): ("skipped", "adapter: piggyback does not fit here") for seed in SEEDS},
        }
    for at, job in enumerate(plan):
        state, reason = states.get((job["label"], job["dataset"], job["seed"]), ("finished", None))
        if state == "skipped":
            job["skipped"] = reason
        elif state != "planned":
            write_job(folder / job["folder"], **{k: job[k] for k in ("label", "dataset", "seed", "overrides")},
                      number=at, state=state, reason=reason, epochs=epochs)  # fmt: skip
    command = f"python -m recast_exp -m experiment=paper dataset={','.join(DATASETS)} seed={','.join(map(str, SEEDS))}"
    return write_plan(folder, plan, command)
