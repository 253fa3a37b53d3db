"""The report of a sweep: what counts, what is marked, and what the tests of significance say."""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import socket
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
from pyarrow import parquet
from safetensors import safe_open
from safetensors.numpy import save_file
from scipy import stats

from recast_exp.cli.check import CommandLine, check
from recast_exp.errors import MissingInputError, UserError
from recast_exp.report import charts, exports, reading, sequences, text
from recast_exp.report.build import write_report
from recast_exp.report.comparing import EXACT, compare, compare_with_reference, holm, mean_interval, sign_flip
from recast_exp.report.reading import read_jobs
from recast_exp.report.replicates import Replicate
from recast_exp.report.table import Results, tabulate
from recast_exp.report.trials import read_searches
from recast_exp.runs.state import State
from support.fake_sweep import DATASETS, METHODS, SEEDS, merged, write_job, write_plan, write_sweep
from support.helpers import assert_one_line


def results_of(folder: Path) -> Results:
    return tabulate(read_jobs(folder).jobs)


def row_of(results: Results, method: str) -> dict[str, str]:
    head, *body = [[str(cell) for cell in row] for row in exports.table(results)]
    return dict(zip(head, next(row for row in body if row[0] == method), strict=True))


@pytest.fixture(scope="module")
def partial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sweep(tmp_path_factory.mktemp("partial") / "sweep")


# What counts


def test_the_table_against_the_files(partial: Path) -> None:
    results = results_of(partial)
    assert [row.method for row in results.rows] == list(METHODS)
    assert results.datasets == tuple(DATASETS)
    by_dataset: dict[str, list[float]] = {}
    by_seed: dict[int, list[float]] = {}
    for path in partial.glob("*/job.json"):
        job = json.loads(path.read_text())
        if job["label"] == "RECAST-Att":
            accuracy = json.loads((path.parent / "metrics.json").read_text())["test/accuracy"]
            by_dataset.setdefault(job["dataset"], []).append(accuracy)
            by_seed.setdefault(job["seed"], []).append(accuracy)
    row = results.rows[1]
    for dataset, values in by_dataset.items():
        assert row.cells[dataset].mean == pytest.approx(statistics.fmean(values))
        assert row.cells[dataset].std == pytest.approx(statistics.stdev(values))
    means = [statistics.fmean(values) for values in by_seed.values()]
    assert row.average.mean == pytest.approx(statistics.fmean(means))
    assert row.average.std == pytest.approx(statistics.stdev(means))
    assert (row.parameters, row.size, row.head) == ((48, 48), (192, 192), (3850, 77000))
    assert row_of(results, "RECAST-Att + Piggyback")["bytes"] == f"{-(-(32 * 48 + 21_233_664) // 8):,}"


def test_what_is_missing_is_said_and_never_averaged_away(partial: Path) -> None:
    results = results_of(partial)
    assert (len(results.counted), results.expected) == (206, 213)
    melo = row_of(results, "MeLo")
    assert melo["cub"].endswith("(2 of 3 seeds)")
    assert " ± " in melo["cub"]
    assert melo["average"].endswith("(17 of 18 runs)")
    assert " ± " not in melo["average"]
    stacked = row_of(results, "RECAST-Att + MeLo")
    assert stacked["cifar100"].endswith("(1 of 3 seeds)")
    assert " ± " not in stacked["cifar100"]
    full = row_of(results, "full fine-tuning")
    assert full["cifar10"] == "– (0 of 3 seeds)"
    assert full["average"] == full["to the probe"] == "– (5 of 6 datasets)"
    piggyback = row_of(results, "Piggyback")
    assert piggyback["scenes"] == "– (does not fit)"
    assert piggyback["average"] == "– (5 of 6 datasets)"
    assert not any("(" in cell for cell in row_of(results, "RECAST-Att").values())


def test_a_report_of_a_partial_sweep(partial: Path) -> None:
    page = write_report(partial)
    assert page == partial / "report" / "report.html"
    names = {path.name for path in page.parent.iterdir()}
    assert names == {
        "report.html",
        "report.md",
        "results.csv",
        "results.parquet",
        "comparisons.csv",
        "table.tex",
        "accuracy.png",
    }
    summary = (page.parent / "report.md").read_text()
    assert "206 of 213 runs finished · 2 failed · 1 interrupted · 3 waiting · 1 running · 3 left out" in summary
    assert "**Partial" in summary
    assert "failed, epoch 2 of 5: RuntimeError: \\[enforce fail\\] out of memory" in summary
    assert "python -m recast_exp -m experiment=paper" in summary
    html = page.read_text()
    assert "<script>alert(1)" not in html  # a reason that a job gave
    assert "PARTIAL" in (page.parent / "table.tex").read_text()
    before = {path.name: path.read_bytes() for path in page.parent.iterdir()}
    write_report(partial)
    assert {path.name: path.read_bytes() for path in page.parent.iterdir()} == before


def test_a_seed_that_only_another_method_has_is_missing(tmp_path: Path) -> None:
    for at, (label, seed) in enumerate([("MeLo", 1), ("MeLo", 2), ("RECAST-Att", 1)]):
        write_job(tmp_path / str(at), label, seed=seed)
    assert row_of(results_of(tmp_path), "RECAST-Att")["cub"].endswith("(1 of 2 seeds)")  # without a sweep.json too


def test_several_sweeps_and_a_comparison_in_one_folder(tmp_path: Path) -> None:
    write_job(tmp_path / "one" / "0", "MeLo", seed=1)
    write_job(tmp_path / "two" / "runs" / "RECAST-Att" / "1", seed=1)
    write_job(tmp_path / "two", "RECAST-Att", stage="compare")
    write_job(tmp_path / "two" / "report" / "0", "BitFit")  # what a report left is no job
    found = read_jobs(tmp_path)
    assert [job.folder for job in found.jobs] == ["one/0", "two/runs/RECAST-Att/1"]
    assert found.remarks == ("1 job(s) of other stages than adapt are not shown",)


def test_what_was_never_planned_is_not_missing_but_said(tmp_path: Path) -> None:
    for at, (label, dataset) in enumerate([("MeLo", "cub"), ("MeLo", "flowers"), ("RECAST-Att", "cub")]):
        write_job(tmp_path / str(at), label, dataset)
    results = results_of(tmp_path)
    row = row_of(results, "RECAST-Att")
    assert (row["flowers"], row["average"]) == ("– (not planned)", "– (1 of 2 datasets)")
    assert "Partial" not in write_report(tmp_path).with_suffix(".md").read_text()


def test_the_probe_of_the_same_backbone_dataset_and_seed(tmp_path: Path) -> None:
    write_job(tmp_path / "0", "linear probe", accuracy=0.5)
    write_job(tmp_path / "1", "RECAST-Att", accuracy=0.6)
    write_job(tmp_path / "2", "MeLo", accuracy=0.7, config={"model": {"backbone": "resnet34"}})
    results = results_of(tmp_path)
    assert [row_of(results, name)["to the probe"] for name in ("linear probe", "RECAST-Att")] == ["–", "+10.0"]
    assert row_of(results, "MeLo")["to the probe"] == "–"
    metrics = tmp_path / "2" / "metrics.json"
    metrics.write_text(json.dumps(json.loads(metrics.read_text()) | {"probe/test/accuracy": 0.73}))
    assert row_of(results_of(tmp_path), "MeLo")["to the probe"] == "−3.0"  # its own
    write_job(tmp_path / "3", "linear probe", accuracy=0.4, config={"optimizer": {"lr": 1.0}})
    assert row_of(results_of(tmp_path), "RECAST-Att")["to the probe"] == "–"  # to which of the two?


def test_a_run_that_was_repeated_counts_once(tmp_path: Path) -> None:
    write_job(tmp_path / "0", accuracy=0.5, updated="2026-11-21T12:00:00")
    write_job(tmp_path / "1", accuracy=0.7, updated="2026-11-21T11:00:00", state="finished")
    results = results_of(tmp_path)
    assert results.rows[0].cells["cub"].values == {(42, 0): 0.5}
    assert results.remarks == ("1 has the settings of 0 (RECAST-Att, cub, seed 42); the newer one counts",)


DAMAGE = {
    "metrics.json": ('{"test/accu', "metrics.json cannot be read"),
    "parameters.json": ('{"task_bits": 1, "head": 2}', "parameters.json has no number task_specific"),
    "job.json": ("", "job.json cannot be read"),
}
HUGE = '{"task_specific": 48, "task_bits": 1, "head": 1' + "0" * 30 + "}"


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_a_failure_not_an_error(tmp_path: Path, name: str) -> None:
    content, reason = DAMAGE[name]
    jobs = [{"folder": str(at), "label": "RECAST-Att", "dataset": "cub", "seed": at} for at in range(3)]
    write_plan(tmp_path, jobs)
    for at in range(3):
        write_job(tmp_path / str(at), seed=at)
    (tmp_path / "1" / name).write_text(content)
    results = results_of(tmp_path)
    [(_, job)] = results.unfinished
    assert (job.folder, job.label, job.seed, job.state) == ("1", "RECAST-Att", 1, "damaged")
    assert reason in str(job.reason)
    assert set(results.rows[0].cells["cub"].values) == {(0, 0), (2, 0)}
    write_report(tmp_path)


@pytest.mark.parametrize(
    ("name", "key", "value"), [("metrics.json", "test/accuracy", 5), ("parameters.json", "task_specific", -5)]
)
def test_numbers_that_cannot_be_are_damage(tmp_path: Path, name: str, key: str, value: int) -> None:
    write_job(tmp_path / "0")
    content = json.loads((tmp_path / "0" / name).read_text()) | {key: value}
    (tmp_path / "0" / name).write_text(json.dumps(content))
    [(_, job)] = results_of(tmp_path).unfinished
    assert (job.state, job.reason) == ("damaged", f"{name} has {key}={value}, which cannot be")


def test_numbers_that_no_column_holds_are_damage(tmp_path: Path) -> None:
    write_job(tmp_path / "0")
    write_job(tmp_path / "1", seed=1)
    (tmp_path / "1" / "parameters.json").write_text(HUGE)
    [(_, job)] = results_of(tmp_path).unfinished
    assert job.folder == "1" and "is too large for an integer" in str(job.reason)
    write_report(tmp_path)


@pytest.mark.parametrize("folder", ["/etc", "../elsewhere", "a/../../b"])
def test_the_folders_of_a_sweep_are_below_it(tmp_path: Path, folder: str) -> None:
    write_job(tmp_path / "sweep" / "0")
    write_plan(tmp_path / "sweep", [{"folder": folder, "label": "RECAST-Att", "dataset": "cub", "seed": 1}])
    assert f"sweep.json has a job in '{folder}'" in write_report(tmp_path).with_suffix(".md").read_text()


def test_a_history_that_a_spreadsheet_has_saved(tmp_path: Path) -> None:
    write_job(tmp_path / "0")
    (tmp_path / "0" / "metrics.csv").write_text("epoch,val/accuracy\n1,0.5\n", encoding="utf-8-sig")
    [job] = results_of(tmp_path).jobs
    assert reading.read_history(job) == [{"epoch": 1.0, "val/accuracy": 0.5}]
    write_report(tmp_path)


def test_damage_that_leaves_the_results_whole_is_a_remark(tmp_path: Path) -> None:
    write_job(tmp_path / "0")
    (tmp_path / "0" / "metrics.csv").write_text("epoch,val/accuracy\n1,zero\n")
    (tmp_path / "0" / "task.safetensors").write_bytes(b"cut")
    (tmp_path / "sweep.json").write_text("[")
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "job.json").write_text("{}")
    summary = write_report(tmp_path).with_suffix(".md").read_text()
    assert "0: metrics.csv cannot be read" not in summary  # the summary has no curves
    assert "sweep.json cannot be read" in summary
    assert "job.json cannot be read (the entry" in summary
    html = (tmp_path / "report" / "report.html").read_text()
    assert "0: metrics.csv cannot be read" in html
    assert "0: task.safetensors cannot be read" in html


def test_a_label_is_no_formula_and_no_command(tmp_path: Path) -> None:
    write_job(tmp_path / "0", "=1+1", seed=1)
    write_job(tmp_path / "1", "a\x1b[31m", seed=1)
    write_report(tmp_path)
    with (tmp_path / "report" / "results.csv").open(encoding="utf-8", newline="") as file:
        assert {row["method"] for row in csv.DictReader(file)} == {"'=1+1", r"a\x1b[31m"}


def test_a_command_and_a_device_are_no_markdown(tmp_path: Path) -> None:
    write_job(tmp_path / "0", seed=1)
    path = tmp_path / "0" / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"device": "`<script>` [x](javascript:1)"}))
    write_plan(tmp_path, [], "python\n```\n<b>")
    write_report(tmp_path)
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "- `device`: `'<script>' [x](javascript:1)`" in text
    assert "$ python " + "'" * 3 + " <b>\n```" in text


def test_a_report_is_not_written_through_a_link(tmp_path: Path) -> None:
    write_job(tmp_path / "sweep" / "0", seed=1)
    (tmp_path / "victim").mkdir()
    (tmp_path / "sweep" / "report").symlink_to(tmp_path / "victim")
    with pytest.raises(UserError, match=r"^path: expected the report's own folder in .*, got a link to"):
        write_report(tmp_path / "sweep")
    assert not list((tmp_path / "victim").iterdir())


def test_half_a_character_in_a_label_is_marked(tmp_path: Path) -> None:
    write_job(tmp_path / "0", "half \ud800 a pair", seed=1)
    write_job(tmp_path / "1", "half \ud800 a pair", seed=2)
    write_report(tmp_path)
    assert "half ? a pair" in (tmp_path / "report" / "report.md").read_text(encoding="utf-8")


def test_states_in_the_words_of_earlier_versions(tmp_path: Path) -> None:
    told = "pruned after epoch 2 of 5 at 40.0 % validation accuracy"
    write_job(tmp_path / "0", seed=0)
    write_job(tmp_path / "1", seed=1, state="skipped", reason=told)
    write_job(tmp_path / "2", seed=2, state="not begun")
    write_job(tmp_path / "3", seed=3, state="lost")
    write_job(tmp_path / "4", "MeLo", seed=0, state="pruned", reason=told)
    results = results_of(tmp_path)
    states = {job.folder: (job.state, job.reason) for _, job in results.unfinished}
    assert states == {
        "1": (State.PRUNED, told),
        "2": (State.WAITING, None),
        "3": (State.DAMAGED, "job.json has the state 'lost', which this version does not know"),
        "4": (State.PRUNED, told),
    }
    assert (results.expected, len(results.counted)) == (3, 1)  # a pruned trial is not meant to have a result
    assert row_of(results, "MeLo")["cub"] == "– (pruned)"
    summary = write_report(tmp_path).with_suffix(".md").read_text()
    assert "1 of 3 runs finished · 2 pruned · 1 waiting · 1 damaged" in summary


def test_a_newer_format_is_not_guessed_at(tmp_path: Path) -> None:
    write_job(tmp_path / "0", format=2)
    [(_, job)] = results_of(tmp_path).unfinished
    assert job.reason == "job.json has format 2, this version reads up to 1"


# Methods of one label


def test_settings_that_differ_make_methods_of_their_own(tmp_path: Path) -> None:
    for at, (lr, seed) in enumerate(itertools.product(("0.1", "0.01"), (1, 2))):
        overrides = ["model=vit_att", f"optimizer.lr={lr}", f"seed={seed}"]
        write_job(tmp_path / str(at), seed=seed, overrides=overrides, config={"optimizer": {"lr": float(lr)}})
    results = results_of(tmp_path)
    assert [row.method for row in results.rows] == ["RECAST-Att · optimizer.lr=0.1", "RECAST-Att · optimizer.lr=0.01"]
    assert all(row.cells["cub"].complete for row in results.rows)


def test_settings_that_only_the_configurations_tell(tmp_path: Path) -> None:
    write_job(tmp_path / "0", config={"optimizer": {"lr": 0.1}})
    write_job(tmp_path / "1", config={"optimizer": {"lr": 0.2}})  # a preset was changed between two sweeps
    assert set(results_of(tmp_path).methods) == {"RECAST-Att · optimizer.lr=0.1", "RECAST-Att · optimizer.lr=0.2"}


def test_what_a_dataset_brings_and_where_it_lies_makes_no_other_method(tmp_path: Path) -> None:
    write_job(tmp_path / "0", dataset="cub", config={"optimizer": {"lr": 0.1}})
    write_job(tmp_path / "1", dataset="flowers", config={"optimizer": {"lr": 0.2}})
    write_job(tmp_path / "2", dataset="cub", seed=7, config={"optimizer": {"lr": 0.1}, "data_dir": "/elsewhere"})
    assert set(results_of(tmp_path).methods) == {"RECAST-Att"}


def test_folders_of_images_are_datasets_of_their_own(tmp_path: Path) -> None:
    for number, path in enumerate(("birds", "cars")):
        config = {"dataset": {"name": "folder", "path": f"/data/{path}"}}
        write_job(tmp_path / str(number), dataset="folder", config=config)
    results = results_of(tmp_path)
    assert list(results.rows[0].cells) == ["folder birds", "folder cars"] and not results.remarks


def test_numbers_of_thousands_of_digits_are_names(tmp_path: Path) -> None:
    write_job(tmp_path / ("9" * 200), config={"dataset": {"name": "cub", "split_seed": "9" * 5000}})
    assert results_of(tmp_path).rows[0].cells["cub"].values.keys() == {(42, 0)}


def test_a_job_that_never_started_belongs_to_its_overrides(tmp_path: Path) -> None:
    jobs = []
    for at, (lr, seed) in enumerate(itertools.product(("0.1", "0.01"), (1, 2))):
        overrides = [f"optimizer.lr={lr}", f'seed="{seed}"']
        jobs.append({"folder": str(at), "label": "MeLo", "dataset": "cub", "seed": seed, "overrides": overrides})
    write_plan(tmp_path, jobs)
    write_job(tmp_path / "0", "MeLo", seed=1, overrides=jobs[0]["overrides"], config={"optimizer": {"lr": 0.1}})
    results = results_of(tmp_path)
    assert list(results.methods) == ["MeLo · optimizer.lr=0.1"] * 2 + ["MeLo · optimizer.lr=0.01"] * 2
    assert [row.cells["cub"].note for row in results.rows] == ["1 of 2 seeds", "0 of 2 seeds"]


# Draws of the training images


def write_draws(folder: Path, *, draws: int = 3, seeds: Sequence[int] = (42,), missing: Sequence[int] = ()) -> Path:
    """A sweep of two methods over draws and seeds; jobs by these numbers have not run."""
    jobs: list[dict[str, Any]] = []
    for label, seed, draw in itertools.product(("linear probe", "RECAST-Att"), seeds, range(draws)):
        overrides = [f"method={label}", f"dataset.split_seed={draw}", f'seed="{seed}"']
        jobs.append({"folder": str(len(jobs)), "label": label, "dataset": "cub", "seed": seed, "overrides": overrides})
        if len(jobs) - 1 not in missing:
            accuracy = 0.5 + 0.01 * draw + (0.02 + 0.005 * draw) * (label == "RECAST-Att") + 0.001 * (seed == 1)
            rest = {"overrides": overrides, "config": {"dataset": {"split_seed": draw}}, "accuracy": accuracy}
            write_job(folder / jobs[-1]["folder"], label, seed=seed, number=len(jobs), **rest)
    return write_plan(folder, jobs)


def test_draws_are_replicates(tmp_path: Path) -> None:
    results = results_of(write_draws(tmp_path))
    assert [row.method for row in results.rows] == ["linear probe", "RECAST-Att"]
    assert results.rows[1].cells["cub"].values == pytest.approx({(42, 0): 0.52, (42, 1): 0.535, (42, 2): 0.55})
    row = row_of(results, "RECAST-Att")
    assert (row["cub"], row["to the probe"]) == ("53.5 ± 1.5", "+2.5")  # to the probe of the same draw
    assert results.remarks == ()
    [found] = compare_with_reference(results)
    assert (found.pairs, found.possible) == (3, 3)
    figures, _ = charts.curve_figures(results, charts.style(results.methods))
    labels = [trace["hovertemplate"] for trace in figures["cub|validation accuracy"]["data"]]
    assert all("(mean of 3 draws)" in label for label in labels)
    assert "deviation over the draws;" in exports.latex(results)
    write_report(tmp_path)
    summary = (tmp_path / "report" / "report.md").read_text()
    assert "deviation over the draws of the training images." in summary
    assert "if they have the same dataset and draw. In brackets is the 95 % interval of the difference" in summary
    assert "covers the variation over draws of the training images, not other test images or datasets." in summary
    assert "| RECAST-Att − linear probe | +2.5 (1.3 to 3.7) |" in summary
    assert "seed" not in summary
    html = (tmp_path / "report" / "report.html").read_text()
    assert '+2.5 <span class="note">(1.3 to 3.7)</span>' in html
    assert "on the same backbone, dataset and draw." in html
    assert "Mean over a method&#39;s draws" in html
    with (tmp_path / "report" / "results.csv").open(newline="") as file:
        numbers = [(row["seed"], row["draw"]) for row in csv.DictReader(file)]
    assert numbers == [("42", "0"), ("42", "1"), ("42", "2")] * 2
    with (tmp_path / "report" / "comparisons.csv").open(newline="") as file:
        [pair] = csv.DictReader(file)
    assert found.interval is not None
    assert (float(pair["interval_low"]), float(pair["interval_high"])) == pytest.approx(
        [-end for end in reversed(found.interval)]  # the table has the linear probe as the second
    )


def test_a_draw_that_has_not_run_is_missing(tmp_path: Path) -> None:
    results = results_of(write_draws(tmp_path, missing=[4]))
    assert list(results.methods) == ["linear probe"] * 3 + ["RECAST-Att"] * 3
    assert (len(results.counted), results.expected) == (5, 6)
    row = row_of(results, "RECAST-Att")
    assert (row["cub"], row["to the probe"]) == ("53.5 ± 2.1 (2 of 3 draws)", "+2.5 (2 of 3 runs)")
    [(_, job)] = results.unfinished
    assert (job.seed, job.draw) == (42, 1)
    write_report(tmp_path)
    summary = (tmp_path / "report" / "report.md").read_text()
    assert "Cells give the number of draws that they are based on" in summary
    assert "| job | method | dataset | seed | draw | why |" in summary
    assert "| 4 | RECAST-Att | cub | 42 | 1 | waiting |" in summary
    assert '<th scope="col" class="number">draw</th>' in (tmp_path / "report" / "report.html").read_text()


def test_seeds_and_draws_together_are_runs(tmp_path: Path) -> None:
    results = results_of(write_draws(tmp_path, draws=2, seeds=(1, 2), missing=[0]))
    assert row_of(results, "linear probe")["cub"].endswith("(3 of 4 runs)")
    assert row_of(results, "RECAST-Att")["cub"] == "52.8 ± 0.9"
    assert compare_with_reference(results)[0].note == "3 of 4 pairs"
    summary = write_report(tmp_path).with_suffix(".md").read_text()
    assert "deviation over the seeds and draws of the training images." in summary
    assert "if they have the same dataset, seed and draw." in summary


@pytest.mark.parametrize(
    ("plan", "draw"),
    [
        ({}, 0),
        ({"overrides": ["dataset.split_seed=3"]}, 3),
        ({"overrides": ["+dataset.split_seed='4'"]}, 4),
        ({"overrides": ["dataset.split_seed=${seed}"]}, 0),
        ({"overrides": ["experiment=mine"], "config": {"dataset": {"split_seed": 5}}}, 5),
        ({"overrides": ["dataset.split_seed=6"], "config": {"dataset": {"split_seed": "${seed}"}}}, 6),
    ],
)
def test_the_draw_of_a_job_that_has_not_run(tmp_path: Path, plan: dict[str, Any], draw: int) -> None:
    write_plan(tmp_path, [{"folder": "0", "label": "MeLo", "dataset": "cub", "seed": 42, **plan}])
    [job] = read_jobs(tmp_path).jobs
    assert job.replicate == (42, draw)


def test_a_draw_that_was_repeated_counts_once(tmp_path: Path) -> None:
    for at, (draw, accuracy) in enumerate([(0, 0.5), (1, 0.6), (1, 0.7)]):
        write_job(tmp_path / str(at), number=at, accuracy=accuracy, config={"dataset": {"split_seed": draw}})
    results = results_of(tmp_path)
    assert results.rows[0].cells["cub"].values == {(42, 0): 0.5, (42, 1): 0.7}
    assert results.remarks == ("1 has the settings of 2 (RECAST-Att, cub, seed 42, draw 1); the newer one counts",)


def test_another_split_of_all_runs_is_about_seeds(tmp_path: Path) -> None:
    for at, (label, seed) in enumerate([("MeLo", 1), ("MeLo", 2), ("RECAST-Att", 1)]):
        write_job(tmp_path / str(at), label, seed=seed, config={"dataset": {"split_seed": 7}})
    assert row_of(results_of(tmp_path), "RECAST-Att")["cub"].endswith("(1 of 2 seeds)")
    assert "draw" not in write_report(tmp_path).with_suffix(".md").read_text()


# Tests of significance


@pytest.mark.parametrize("values", [[0.2, 0.1, 0.4], [0.3, -0.1, 0.2, 0.05, -0.02, 0.4, 0.1], [1.0, -1.0, 0.0], [0.0]])
def test_sign_flips_against_all_of_them_and_scipy(values: list[float]) -> None:
    observed = abs(sum(values))
    sums = [
        abs(sum(sign * value for sign, value in zip(signs, values, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(values))
    ]
    test = sign_flip(values)
    assert test.p == pytest.approx(np.mean([each >= observed - 1e-12 for each in sums]))
    assert test.smallest == 2 / 2 ** len(values)
    if len(values) > 3:
        same = stats.permutation_test(
            (np.array(values),), np.sum, permutation_type="samples", n_resamples=np.inf, vectorized=False
        )
        assert test.p == pytest.approx(same.pvalue)


def test_the_smallest_p_value_is_reached() -> None:
    assert sign_flip([0.1, 0.2, 0.3]).p == 0.25
    assert sign_flip([0.01 * at for at in range(1, 19)]).p == 2 / 2**18


def test_many_differences_are_drawn() -> None:
    values = np.random.default_rng(1).normal(0.3, 1, EXACT + 1).tolist()
    drawn, exact = sign_flip(values), sign_flip(values[:EXACT])
    assert drawn.p == sign_flip(values).p
    assert drawn.p == pytest.approx(stats.ttest_1samp(values, 0).pvalue, abs=0.02)
    assert exact.p == pytest.approx(stats.ttest_1samp(values[:EXACT], 0).pvalue, abs=0.02)


def test_pairs_are_of_one_dataset_and_seed() -> None:
    first = {("a", 1): 0.9, ("a", 2): 0.8, ("b", 1): 0.5, ("b", 3): 0.1}
    second = {("a", 1): 0.8, ("a", 2): 0.6, ("b", 1): 0.4, ("b", 2): 0.9}
    found = compare(("one", "two"), first, second, 4)
    assert found.difference == pytest.approx((0.15 + 0.1) / 2)  # every dataset has one weight
    assert (found.pairs, found.note) == (3, "3 of 4 pairs")
    assert found.runs is not None
    assert found.datasets is not None
    assert (found.runs.p, found.runs.units) == (0.25, 3)
    assert (found.datasets.p, found.datasets.units) == (0.5, 2)
    back = compare(("two", "one"), second, first, 4)
    assert back.difference == pytest.approx(-found.difference)
    assert back.runs == found.runs
    one = compare(("one", "two"), {("a", 1): 0.9}, {("a", 1): 0.8}, 1)
    assert one.datasets is None
    assert compare(("one", "two"), {("a", 1): 0.9}, {("a", 2): 0.8}, 1).difference is None


def test_the_interval_of_one_dataset_is_that_of_the_paired_t_test() -> None:
    first, second = [0.91, 0.83, 0.88, 0.79, 0.86], [0.88, 0.84, 0.82, 0.77, 0.8]
    expected = stats.ttest_rel(first, second).confidence_interval(0.95)
    values = [{("cub", Replicate(42, at)): value for at, value in enumerate(each)} for each in (first, second)]
    found = compare(("one", "two"), values[0], values[1], 5)
    assert found.interval == pytest.approx((expected.low, expected.high))
    back = compare(("two", "one"), values[1], values[0], 5)
    assert back.interval == pytest.approx((-expected.high, -expected.low))


def test_the_interval_of_two_datasets_of_unequal_variance() -> None:
    wide = 0.06 * math.sqrt(3 / 4)
    narrow, broad = [0.01, 0.02, 0.03], [0.06 - wide, 0.06 - wide, 0.06 + wide, 0.06 + wide]
    found = mean_interval([narrow, broad])
    # By hand: variances 0.0001 and 0.0036, so v/n is 0.0001 / 3 = 3.3333e-5 and 0.0036 / 4 = 9e-4, together 9.3333e-4.
    # Freedom: 9.3333e-4² / (3.3333e-5² / 2 + 9e-4² / 3) = 3.21971. Standard error: sqrt(9.3333e-4) / 2 = 0.01527525.
    margin = stats.t.ppf(0.975, 3.21971) * 0.01527525
    assert found == pytest.approx((0.04 - margin, 0.04 + margin), abs=1e-7)
    # The sum of two means, twice the mean of them, has the interval of Welch's test on two samples, one turned around
    welch = stats.ttest_ind(narrow, [-value for value in broad], equal_var=False).confidence_interval(0.95)
    assert found == pytest.approx((welch.low / 2, welch.high / 2))


def test_there_is_no_interval_without_two_pairs_of_every_dataset() -> None:
    assert mean_interval([[0.1]]) is None
    assert mean_interval([[0.1, 0.2, 0.3], [0.1]]) is None
    assert mean_interval([[0.5, 0.5], [0.25, 0.25]]) == (0.375, 0.375)  # nothing varies
    one = compare(("one", "two"), {("a", Replicate(1, 0)): 0.9}, {("a", Replicate(1, 0)): 0.8}, 1)
    assert (one.pairs, one.interval) == (1, None)


def test_the_interval_holds_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    datasets = ((0.02, 0.01, 5), (0.05, 0.03, 3), (-0.01, 0.02, 4))
    intervals = [mean_interval([rng.normal(*each).tolist() for each in datasets]) for _ in range(2000)]
    assert np.mean([low <= 0.02 <= high for low, high in intervals]) == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize(
    ("ends", "shown"), [(None, ""), ((0.009, 0.0588), "0.9 to 5.9"), ((-0.0123, -0.0041), "−1.2 to −0.4")]
)
def test_intervals_as_text(ends: tuple[float, float] | None, shown: str) -> None:
    assert text.interval(ends) == shown


def test_the_pairs_of_a_sweep(partial: Path) -> None:
    found = {each.first: each for each in compare_with_reference(results_of(partial))}
    assert {each.second for each in found.values()} == {"linear probe"}
    assert found["RECAST-Att"].pairs == found["RECAST-Att"].possible == 18
    assert found["MeLo"].note == "17 of 18 pairs"
    assert found["Piggyback"].note == ""  # a dataset that a method does not fit is not missing
    assert found["Piggyback"].pairs == 15


def test_holm_against_its_definition() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


# For other programs


def test_parquet_and_csv_hold_what_the_jobs_measured(partial: Path) -> None:
    target = write_report(partial).parent
    rows = parquet.read_table(target / "results.parquet").to_pylist()
    assert len(rows) == len(METHODS) * len(DATASETS) * len(SEEDS)
    assert sum(row["counts"] for row in rows) == 206
    for row in rows:
        if row["state"] == "finished":
            metrics = json.loads((partial / row["folder"] / "metrics.json").read_text())
            parameters = json.loads((partial / row["folder"] / "parameters.json").read_text())
            assert row["test/accuracy"] == metrics["test/accuracy"]
            assert row["parameters/task_bits"] == parameters["task_bits"]
            assert not any(name.startswith("test/accuracy_per_class") for name in row)
        else:
            assert row["test/accuracy"] is None
    with (target / "results.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [row["method"] for row in read] == [row["method"] for row in rows]
    assert [float(row["test/accuracy"] or "nan") for row in read] == pytest.approx(
        [math.nan if row["test/accuracy"] is None else row["test/accuracy"] for row in rows], abs=0, nan_ok=True
    )


def test_columns_of_several_kinds(tmp_path: Path) -> None:
    rows = [{"a": 1, "b": "x", "c": True, "d": None}, {"a": 2.5, "b": 3, "c": None, "d": None}]
    exports.write_parquet(tmp_path / "t.parquet", rows)
    assert parquet.read_table(tmp_path / "t.parquet").to_pylist() == [
        {"a": 1.0, "b": "x", "c": True, "d": None},
        {"a": 2.5, "b": "3", "c": None, "d": None},
    ]


def test_half_a_surrogate_pair_is_written_as_its_code(tmp_path: Path) -> None:
    exports.write_parquet(tmp_path / "t.parquet", [{"a": "\ud800", "b": 1}, {"a": 2, "b": 2}])
    assert parquet.read_table(tmp_path / "t.parquet")["a"].to_pylist() == ["\\ud800", "2"]


def test_latex_takes_any_name() -> None:
    assert exports.latex_escaped(r"a_b & 50% #1 {x} ~ ^ \ $") == (
        r"a\_b \& 50\% \#1 \{x\} \textasciitilde{} \textasciicircum{} \textbackslash{} \$"
    )


def test_the_table_in_latex(tmp_path: Path) -> None:
    write_job(tmp_path / "0", "a_b & c", accuracy=0.801)
    write_job(tmp_path / "1", "a_b & c", seed=7, accuracy=0.807)
    source = exports.latex(results_of(tmp_path))
    assert "\na\\_b \\& c & 48 & 192 & 80.4 $\\pm$ 0.4 & 77,000 \\\\\n" in source
    rows = [line for line in source.splitlines() if line.endswith(r"\\")]
    assert {line.replace(r"\&", "").count("&") + 1 for line in rows} == {len("lrrrr")}
    assert r"\begin{tabular}{lrrrr}" in source


def test_brackets_in_a_name_make_no_table_partial(tmp_path: Path) -> None:
    for at, (label, seed) in enumerate([("a (b)", 1), ("a (b)", 2), ("c", 1)]):
        write_job(tmp_path / str(at), label, seed=seed)
    assert "PARTIAL" in exports.latex(results_of(tmp_path))  # c misses a seed
    write_job(tmp_path / "3", "c", seed=2)
    assert "PARTIAL" not in exports.latex(results_of(tmp_path))


def test_markdown_takes_any_name() -> None:
    assert exports.markdown([["a", "b"], ["x|y", "*z*\n<b>"]]).splitlines()[2] == r"| x\|y | \*z\* \<b\> |"


@pytest.mark.parametrize(
    ("p", "shown"), [(None, "–"), (1.0, "1.00"), (0.25, "0.25"), (0.03125, "0.031"), (7.6e-6, "< 0.0001")]
)
def test_p_values_as_text(p: float | None, shown: str) -> None:
    assert text.p_value(p) == shown


# Charts


def test_every_chart_is_one_that_plotly_takes(partial: Path) -> None:
    results = results_of(partial)
    styles = charts.style(list(METHODS))
    accuracy = charts.accuracy_figures(results, styles)
    curves, unread = charts.curve_figures(results, styles)
    coefficients, damaged = charts.coefficient_figures(results)
    assert not unread + damaged
    assert set(accuracy) == {f"{name}|{unit}" for name in ("average", *DATASETS) for unit in ("parameters", "bytes")}
    assert len(curves) == 3 * len(DATASETS)
    assert len(coefficients) == 2 * 6  # RECAST's methods, each with its values and what tells the datasets apart
    for figure in (*accuracy.values(), *curves.values(), *coefficients.values()):
        go.Figure(figure)  # refuses what plotly does not know
        json.dumps(figure, allow_nan=False)
    shown = {trace["meta"]: trace for trace in accuracy["average|parameters"]["data"]}
    assert shown["RECAST-Att"]["x"] == [48]
    assert shown["RECAST-Att"]["y"][0] == pytest.approx(100 * results.rows[1].average.mean)
    assert shown["MeLo"]["marker"]["symbol"].endswith("-open")  # partial
    assert "full fine-tuning" not in shown  # there is no average
    assert len(shown["linear probe"]["x"]) == 2  # a level


def test_curves_end_where_a_seed_ends(tmp_path: Path) -> None:
    write_job(tmp_path / "0", seed=1, epochs=4, accuracy=0.5)
    write_job(tmp_path / "1", seed=2, epochs=6, accuracy=0.5)
    results = results_of(tmp_path)
    figures, _ = charts.curve_figures(results, charts.style(results.methods))
    [trace] = figures["cub|validation accuracy"]["data"]
    rows = [charts.read_history(job) for job in results.jobs]
    assert trace["x"] == [1, 2, 3, 4]
    assert trace["y"] == pytest.approx(
        [50 * (a["val/accuracy"] + b["val/accuracy"]) for a, b in zip(*rows, strict=False)], rel=1e-5
    )


# Searches


def write_search(folder: Path, **changed: Any) -> None:
    """A search of four trials with a job each: two finished, one pruned, one failed."""
    config = {"search": {"storage": "optuna.log"}}
    kinds = [(0.7, "finished", ""), (0.9, "finished", ""), (None, "pruned", ""), (None, "failed", "out of memory")]
    trials = []
    for number, (value, state, reason) in enumerate(kinds):
        lr = repr(0.001234567 * 10**number)
        write_job(
            *(folder / str(number), "RECAST-Att"),
            state={"pruned": "skipped"}.get(state, state),
            config=merged(config, {"optimizer": {"lr": float(lr)}, "search": {"trial": number}}),
            accuracy=0.95 - 0.1 * number,  # on the test images, the other way round
        )
        epochs = {"1": 0.3, "2": 0.4} if number < 3 else {}
        trials.append(
            {"number": number, "folder": str(number), "state": state, "reason": reason or None, "value": value}
            | {
                "parameters": {"optimizer.lr": lr, "model": "vit_att"},
                "epochs": epochs,
                "exit_code": 1 if state == "failed" else None,
                "started": "2026-11-21T10:00:00",
                "ended": None,
            }
        )
    content = {
        "format": 1,
        "metric": "val/accuracy",
        "direction": "maximize",
        "seed": 42,
        "overrides": [],
        "n_trials": 5,
        "space": {"optimizer.lr": "tag(log,interval(0.001,10.0))", "model": "choice(vit_att,vit_mlp)"},
        "best": {**trials[1], "command": "python -m recast_exp optimizer.lr=0.0123"},
        "trials": trials,
    }
    (folder / "search.json").write_text(json.dumps({**content, **changed}))


def test_a_search_is_shown_by_validation_and_its_best_trial_alone_by_test(tmp_path: Path) -> None:
    write_search(tmp_path)
    page = write_report(tmp_path).read_text()
    summary = (tmp_path / "report/report.md").read_text()
    table, search = summary.split("## Search\n")
    assert "85.0" in table  # the test accuracy of trial 1
    assert not any(other in summary for other in ("95.0", "75.0", "65.0"))
    rows = [
        [cell.strip() for cell in line.replace("\\_", "_").strip("|").split("|")]
        for line in search.splitlines()
        if line[:1] == "|"
    ]
    assert rows[2:] == [
        ["1", "90.0", "2", "0.01235", "vit_att", "best"],
        ["0", "70.0", "2", "0.001235", "vit_att", ""],
        ["2", "40.0", "2", "0.1235", "vit_att", "pruned"],
        ["3", "–", "–", "1.235", "vit_att", "failed: out of memory"],
    ]
    assert "4 of 5 trials: 2 finished, 1 pruned, 1 failed" in summary
    assert "$ python -m recast_exp optimizer.lr=0.0123\n" in search
    assert "Without results" not in summary
    with (tmp_path / "report/results.csv").open() as file:
        assert [row["folder"] for row in csv.DictReader(file)] == ["1"]
    assert page.count('<a href="../2/">2</a>') == 1

    _, searches = read_searches(read_jobs(tmp_path))
    figures = charts.search_figures(searches)
    assert list(figures) == ["Search|trial", "Search|optimizer.lr", "Search|model"]
    for figure in figures.values():
        go.Figure(figure)
        json.dumps(figure, allow_nan=False)
    assert figures["Search|trial"]["data"][0]["y"] == [70, 90, 40]
    assert figures["Search|trial"]["data"][0]["marker"]["symbol"] == ["circle", "star", "circle-open"]
    assert figures["Search|trial"]["data"][1]["y"] == [70, 90]
    axes = [(figure["layout"]["xaxis"].get("type")) for figure in figures.values()]
    assert axes == [None, "log", "category"]


def test_an_accuracy_of_a_trial_that_cannot_be_is_left_out(tmp_path: Path) -> None:
    write_search(tmp_path)
    path = tmp_path / "search.json"
    content = json.loads(path.read_text())
    content["trials"][0]["value"] = 1e300
    path.write_text(json.dumps(content))
    write_report(tmp_path)


def test_a_search_without_a_finished_trial_has_a_report(tmp_path: Path) -> None:
    write_search(tmp_path / "one", best=None, trials=[])
    write_search(tmp_path / "other", best={"number": 1}, n_trials="many")
    write_report(tmp_path)
    summary = (tmp_path / "report/report.md").read_text()
    assert "## Search one\n\n0 of 5 trials." in summary
    why = "n_trials: expected an integer, got text"
    assert f"- other: search.json cannot be read ({why}); its trials are shown as jobs" in summary


# The command line


def test_the_command(tmp_path: Path) -> None:
    sweep = tmp_path / "a sweep"
    write_job(sweep / "0")
    code = (
        "import sys\nfrom recast_exp.cli import main as cli\n"
        "try:\n    cli.main()\nfinally:\n"
        "    print([name for name in ('torch', 'timm', 'lightning') if name in sys.modules])"
    )
    argv = [sys.executable, "-c", code, "stage=report", f"path={sweep}", "dataset=cub"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
    assert done.stderr.strip().endswith(f"Report: {sweep / 'report' / 'report.html'}")
    assert "RECAST-Att" in (sweep / "report" / "report.md").read_text()


@pytest.mark.parametrize(
    ("typed", "wrong", "missing"),
    [
        (["stage=report"], "path: expected a folder of runs", ""),
        (
            ["path=somewhere"],
            "path: expected nothing with stage=adapt, got 'somewhere'; did you mean stage=report?",
            "",
        ),
        (["stage=report", "path=nowhere"], "", "path: expected the folder of a sweep, got nowhere"),
    ],
)
def test_wrong_requests(typed: list[str], wrong: str, missing: str) -> None:
    found = check(CommandLine(tuple(typed)))
    for lines, expected in ((found.wrong, wrong), (found.missing, missing)):
        assert len(lines) == bool(expected)
        assert all(line.startswith(expected) for line in lines)


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    write_job(tmp_path / "0")
    (tmp_path / "report").write_text("in the way")
    with pytest.raises(UserError) as error:
        write_report(tmp_path)
    assert_one_line(error, "path: ", "report cannot be written to (")


def test_a_folder_without_runs(tmp_path: Path) -> None:
    write_job(tmp_path, stage="evaluate")
    with pytest.raises(MissingInputError) as error:
        write_report(tmp_path)
    assert_one_line(error, "path: expected the folder of a sweep, got", "1 job(s) of other stages")


def test_a_job_whose_process_is_gone_was_interrupted() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    here = {"state": "running", "host": socket.gethostname()}
    assert reading._has_died({**here, "pid": gone.pid})
    assert not reading._has_died({**here, "pid": os.getpid()})
    assert not reading._has_died({**here, "pid": gone.pid, "host": "another"})
    assert not reading._has_died({**here, "pid": gone.pid, "state": "finished"})


# Sequences


def write_sequence(folder: Path, **changed: Any) -> Path:
    """What stage=sequence leaves of three tasks."""
    folder.mkdir(parents=True, exist_ok=True)
    row = {"known": 0.9, "forgetting": 0.0, "unknown": 0.8, "parameters": 144, "heads": 1000}
    found = {
        "tasks": ["cub[0:2]", "<b>", "digits"],
        "accuracy": [[0.9], [0.9, 0.8], [0.9, 0.8, 1.0]],
        "identical": True,
        "backward_transfer": 0.0,
        "forward_transfer": None,
        "parameters": [144] * 3,
        "bytes": [4000] * 3,
        "seconds": [1.5] * 3,
        "methods": [{"method": "RECAST-Att", **row}, {"method": "full & all", **row, "unknown": None}],
        "unknown": {"RECAST-Att": [0.9, 0.85, 0.8]},
    }
    (folder / "sequence.json").write_text(json.dumps(found | changed))
    (folder / "job.json").write_text(json.dumps({"format": 1, "stage": "sequence"}))
    return folder


def test_a_sequence_has_a_table_and_a_chart(tmp_path: Path) -> None:
    write_sequence(tmp_path / "first")
    write_job(tmp_path / "first" / "tasks" / "01 cub", seed=1)  # no replicate of anything
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "RECAST-Att on 3 tasks in sequence, first" in page and "full &amp; all" in page
    summary = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "| RECAST-Att | 90.0 | 0.0 | 80.0 | 144 |" in summary and "| full & all | 90.0 | 0.0 | – | 144 |" in summary
    assert "other stages" not in summary and "01 cub" not in summary
    assert "1 sequence(s) of tasks" in summary and "0 of 0" not in summary
    read, remarks = sequences.read_sequences(tmp_path)
    figures = sequences.sequence_figures(read)
    assert list(figures) == [f"{read[0].title}|{show}" for show in ("each task after each", "task unknown")]
    for figure in figures.values():
        go.Figure(figure)
        assert "<b>" not in json.dumps(figure)
    assert not remarks


@pytest.mark.parametrize("changed", [{"methods": []}, {"accuracy": 3}, {"tasks": None}, {"unknown": {"a": ["x"]}}])
def test_a_damaged_sequence_is_a_remark(changed: dict[str, Any], tmp_path: Path) -> None:
    write_sequence(tmp_path / "bad", **changed)
    write_sequence(tmp_path / "good")
    write_report(tmp_path)
    summary = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "- bad: sequence.json cannot be read" in summary and "sequence, good" in summary


def test_templates_without_a_relative_form_have_no_heat_map_and_are_no_remark(tmp_path: Path) -> None:
    folder = write_job(tmp_path / "0", seed=1, accuracy=0.5)
    with safe_open(folder / "task.safetensors", framework="np") as file:
        record = json.loads(file.metadata()["recast_exp"])
    record["templates"] |= {"solver": "singular", "seed": 1, "num_sets": 1, "weights": "x"}
    tensors = {"coefficients": np.zeros(24, np.float32)}
    save_file(tensors, folder / "task.safetensors", {"recast_exp": json.dumps(record)})
    assert charts.coefficient_figures(results_of(tmp_path)) == ({}, [])


def test_a_folder_whose_name_is_no_text(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"\xff\xfe")
    exports.write_parquet(folder / "t.parquet", [{"a": 1}])
    with (folder / "t.parquet").open("rb") as file:
        assert parquet.read_table(file).to_pylist() == [{"a": 1}]
