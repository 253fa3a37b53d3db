"""Runs with templates of each kind, and with MeLo's ways to find its ranks: from training to the task file and back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recast_exp import stages
from recast_exp.config.schema import Config
from recast_exp.errors import UserError
from recast_exp.models.loading import load_task
from recast_exp.runs.task_header import read_record
from support.helpers import assert_one_line
from support.running import run_stage

Compose = Callable[..., Config]


def repeat(settings: Config, task: Path, folder: Path, metrics: dict[str, Any]) -> None:
    """Evaluate a task file with the settings of its run: the same accuracy and loss."""
    again = run_stage(dataclasses.replace(settings, task=str(task), stage={"name": "evaluate"}), folder)
    assert again["test/accuracy"] == metrics["test/accuracy"]
    assert again["test/loss"] == pytest.approx(metrics["test/loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("model", "parameters"),
    [("vit_random", 96), ("vit_svf", None), ("vit_lora_xs", 16 * 24), ("vit_crisp", 4 * 24)],
)
def test_a_run_and_its_task_file(tiny: Compose, tmp_path: Path, model: str, parameters: int | None) -> None:
    groups = ["recast.num_groups=3"] if model in ("vit_random", "vit_crisp") else []
    training = "through_head" if model == "vit_crisp" else "joint"
    settings = tiny(f"model={model}", *groups, f"training={training}", "trainer.limit_batches=null")
    metrics = run_stage(settings, tmp_path / "run")
    assert metrics["mimicry/relative_error"] == 0
    assert metrics["coefficients/change"] > 0
    task = load_task(tmp_path / "run" / "task.safetensors")
    assert task.relative == {}
    if parameters:
        assert len(task.tensors["coefficients"]) == parameters
    assert (tmp_path / "run" / "plots" / "coefficients.png").is_file()
    repeat(settings, task.path, tmp_path / "again", metrics)


def test_earlier_tasks_as_templates(tiny: Compose, tmp_path: Path) -> None:
    paths = []
    for number, model in enumerate((["model=vit_frozen", "adapter=melo"], ["model=vit_mlp"])):
        run_stage(tiny(*model, "dataset.part=source" if number else "seed=7"), tmp_path / f"task{number}")
        paths.append(str(tmp_path / f"task{number}" / "task.safetensors"))
    settings = tiny("model=vit_tasks", f"recast.tasks=[{','.join(paths)}]")
    metrics = run_stage(settings, tmp_path / "run")
    # Three layers of each of the twelve blocks have changed, and there are two tasks
    assert len(load_task(tmp_path / "run" / "task.safetensors").tensors["coefficients"]) == 2 * 3 * 12
    assert paths[0] not in str(read_record(tmp_path / "run" / "task.safetensors"))
    repeat(settings, tmp_path / "run" / "task.safetensors", tmp_path / "again", metrics)

    probe = tiny("model=vit_frozen")
    run_stage(probe, tmp_path / "probe")
    with pytest.raises(UserError) as error:
        run_stage(tiny("model=vit_tasks", f"recast.tasks=[{tmp_path / 'probe' / 'task.safetensors'}]"), tmp_path / "no")
    assert_one_line(error, "recast.tasks: expected tasks that have changed weights, got", "changed none")


@pytest.mark.parametrize(
    "options",
    [
        ["adapter.init=eva"],
        ["adapter.rank_gates=true", "adapter.sparsity=100", "optimizer.adapter_lr=1e-2"],
        ["adapter.nested=true"],
        ["adapter.init=eva", "adapter.rank_gates=true"],
    ],
    ids=["eva", "gates", "nested", "eva and gates"],
)
def test_melos_ranks(tiny: Compose, tmp_path: Path, options: list[str]) -> None:
    settings = tiny("model=vit_frozen", "adapter=melo", *options, "trainer.limit_batches=null", "trainer.max_epochs=3")
    metrics = run_stage(settings, tmp_path / "run")
    task = load_task(tmp_path / "run" / "task.safetensors")
    found = [task.tensors[f"adapter/blocks.{block}.attn.qkv.melo.a"].shape[1] for block in range(12)]
    assert not [name for name in task.tensors if name.endswith("gate")]
    adapter = vars(task.adapter)
    if "adapter.nested=true" in options:
        assert adapter["ranks"] is None
    else:
        assert found == adapter["ranks"]
        assert not adapter["rank_gates"]
        assert sum(found) <= 4 * 12
    # With the ranks of its file, which are not those of the settings
    run = {"name": "melo", **adapter}
    repeat(dataclasses.replace(settings, adapter=run), task.path, tmp_path / "again", metrics)


def test_merged_tasks_go_on_as_task_files(tiny: Compose, tmp_path: Path) -> None:
    runs: list[tuple[Config, dict[str, Any], str]] = []
    for number, more in enumerate((["model=vit_att"], ["model=vit_frozen", "adapter=melo"])):
        settings = tiny(*more, "dataset.part=source" if number else "seed=7")
        folder = tmp_path / f"run{number}"
        runs.append((settings, run_stage(settings, folder), str(folder / "task.safetensors")))
    files = f"[{','.join(path for _, _, path in runs)}]"
    merging = dataclasses.replace(runs[0][0], task=files, stage={"name": "merge"})
    found = run_stage(merging, tmp_path / "all")
    assert found["largest_error"] < 1e-5
    facts = json.loads((tmp_path / "all" / "merged.json").read_text())
    assert [row["task"] for row in facts["tasks"]] == ["run0/task", "run1/task"]
    paths = [tmp_path / "all" / "merged" / f"run{number} task.safetensors" for number in range(2)]
    assert facts["bank_bytes"] + sum(path.stat().st_size for path in paths) == found["bytes"]
    for (settings, metrics, _), path in zip(runs, paths, strict=True):
        again = dataclasses.replace(settings, task=str(path), stage={"name": "evaluate"})
        assert run_stage(again, tmp_path / f"again {path.stem}")["test/accuracy"] == metrics["test/accuracy"]
    lossy = dataclasses.replace(merging, stage={"name": "merge", "rank": 1})
    assert run_stage(lossy, tmp_path / "one")["largest_error"] > 0.05
    assert list(stages.from_config({"name": "merge", "rank": 3}).problems(merging)) == [
        "stage.rank: expected at most 2, the number of tasks, got 3"
    ]
    alone = dataclasses.replace(merging, task=runs[0][2])
    assert list(stages.from_config({"name": "merge"}).problems(alone)) == [
        "task: expected at least two task files ([FILE,FILE]) with stage=merge, got 1"
    ]
