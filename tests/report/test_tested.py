"""What was tested: runs are compared, and have a probe in common, only where their images are the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from recast_exp.report import exports
from recast_exp.report.build import write_report
from recast_exp.report.comparing import compare_all, compare_with_reference
from recast_exp.report.reading import Contents, read_jobs
from recast_exp.report.table import Results, tabulate
from support.fake_sweep import write_card, write_job, write_plan

PROBE, METHOD, OTHER = "linear probe", "RECAST-Att", "MeLo"


def results_of(folder: Path) -> Results:
    return tabulate(read_jobs(folder).jobs)


def gain_of(folder: Path, method: str) -> str:
    head, *body = [[str(cell) for cell in row] for row in exports.table(results_of(folder))]
    return dict(zip(head, next(row for row in body if row[0] == method), strict=True)).get("to the probe", "–")


def measured(folder: Path, **metrics: float) -> None:
    path = folder / "metrics.json"
    added = {name.replace("__", "/"): value for name, value in metrics.items()}
    path.write_text(json.dumps(json.loads(path.read_text()) | added))


def of_dataset(**values: Any) -> dict[str, Any]:
    return {"dataset": values}


def columns(contents: Contents) -> list[str]:
    return [job.dataset for job in contents.jobs]


UNLIKE: dict[str, dict[str, Any]] = {
    "shots": of_dataset(shots=2),
    "validation": of_dataset(val_fraction=0.1),
    "background": of_dataset(background="black"),
    "precision": {"trainer": {"precision": "bf16-mixed"}},
    "size": {"model": {"img_size": 96}},
    "weights": {"model": {"pretrained": False}},
}


@pytest.mark.parametrize("config", UNLIKE.values(), ids=UNLIKE)
def test_a_run_is_not_compared_with_the_probe_of_others(tmp_path: Path, config: dict[str, Any]) -> None:
    write_job(tmp_path / "0", PROBE, accuracy=0.9)
    write_job(tmp_path / "1", METHOD, accuracy=0.4, config=config)
    write_job(tmp_path / "2", OTHER, accuracy=0.95)
    assert [gain_of(tmp_path, name) for name in (METHOD, OTHER)] == ["–", "+5.0"]
    pairs = {(found.first, found.second): found.pairs for found in compare_all(results_of(tmp_path))}
    assert pairs == {(PROBE, METHOD): 0, (PROBE, OTHER): 1, (METHOD, OTHER): 1}
    measured(tmp_path / "1", probe__test__accuracy=0.39)
    assert gain_of(tmp_path, METHOD) == "+1.0"


def test_how_a_method_trains_does_not_change_its_probe(tmp_path: Path) -> None:
    write_job(tmp_path / "0", PROBE, accuracy=0.9)
    config = {"dataset": {"transform": "light", "batch_size": 8}, "optimizer": {"lr": 1.0}}
    write_job(tmp_path / "1", METHOD, accuracy=0.95, config=config)
    assert gain_of(tmp_path, METHOD) == "+5.0"


def test_the_own_probe_of_a_run_comes_before_that_of_the_sweep(tmp_path: Path) -> None:
    write_job(tmp_path / "0", PROBE, accuracy=0.9)
    write_job(tmp_path / "1", METHOD, accuracy=0.95)
    measured(tmp_path / "1", probe__test__accuracy=0.94)
    assert gain_of(tmp_path, METHOD) == "+1.0"


def test_training_images_that_changed_between_two_runs(tmp_path: Path) -> None:
    for at, label in enumerate((PROBE, METHOD, OTHER)):
        write_job(tmp_path / str(at), label, accuracy=0.9 + 0.01 * at)
        write_card(tmp_path / str(at), "same", train="new" if label == METHOD else "old")
    assert [gain_of(tmp_path, name) for name in (METHOD, OTHER)] == ["–", "+2.0"]
    assert "cub: the training or validation images are not the same in all runs" in results_of(tmp_path).remarks[0]


def test_each_method_has_the_probe_of_its_own_shots_as_reference(tmp_path: Path) -> None:
    for at, (label, shots) in enumerate((label, shots) for label in (PROBE, METHOD) for shots in (1, 5)):
        config = of_dataset(shots=shots)
        write_job(
            tmp_path / str(at), label, accuracy=0.5 + 0.1 * at, config=config, overrides=[f"dataset.shots={shots}"]
        )
    found = {comparison.first: comparison for comparison in compare_with_reference(results_of(tmp_path))}
    for shots in (1, 5):
        comparison = found[f"{METHOD} · dataset.shots={shots}"]
        assert comparison.second == f"{PROBE} · dataset.shots={shots}"
        assert comparison.difference == pytest.approx(0.2)


def test_classes_make_a_column(tmp_path: Path) -> None:
    write_job(tmp_path / "0", METHOD)
    write_job(tmp_path / "1", OTHER, config=of_dataset(classes=["5", "6"]))
    write_card(tmp_path / "0", "all", classes="567")
    write_card(tmp_path / "1", "two", classes="56")
    assert columns(read_jobs(tmp_path)) == ["cub", "cub classes=5,6"]
    results = results_of(tmp_path)
    assert [row.method for row in results.rows] == [METHOD, OTHER]
    assert compare_all(results)[0].pairs == 0


def test_settings_that_differ_make_methods_whatever_the_column(tmp_path: Path) -> None:
    write_job(tmp_path / "0", METHOD, config=of_dataset(shots=2), overrides=["dataset.shots=2"])
    write_job(tmp_path / "1", METHOD, config={"dataset": {"classes": ["5"]}, "optimizer": {"lr": 1.0}})
    write_job(tmp_path / "2", OTHER)
    write_job(tmp_path / "3", OTHER, config=of_dataset(classes=["5"]))
    rows = [row.method for row in results_of(tmp_path).rows]
    assert rows == [f"{METHOD} · dataset.shots=2", METHOD, OTHER]


def test_the_probe_of_a_method_that_was_meant_for_one_column(tmp_path: Path) -> None:
    write_job(tmp_path / "0", PROBE)
    write_job(tmp_path / "1", METHOD, accuracy=0.9, config=of_dataset(classes=["5"]))
    write_job(tmp_path / "2", METHOD, seed=1, config=of_dataset(classes=["5"]))
    measured(tmp_path / "1", probe__test__accuracy=0.85)
    assert gain_of(tmp_path, METHOD) == "+5.0 (1 of 2 datasets, 1 of 2 runs)"


def test_a_limit_makes_a_column_and_a_remark(tmp_path: Path) -> None:
    for at, limit in enumerate((None, 1, 9)):
        write_job(tmp_path / str(at), METHOD, config={"trainer": {"limit_batches": limit}})
        write_card(tmp_path / str(at), "same", count=359)
    measured(tmp_path / "1", test__images=64)
    contents = read_jobs(tmp_path)
    assert columns(contents) == ["cub", "cub trainer.limit_batches=1", "cub"]
    line = "cub trainer.limit_batches=1: 1 run(s) were tested on only 64 of 359 test images (trainer.limit_batches)"
    assert contents.remarks == (line,)
    assert line in write_report(tmp_path).with_suffix(".md").read_text()


@pytest.mark.parametrize(
    ("cards", "names"),
    [
        ([("old", 45), ("new", 75)], ["45 test images", "75 test images"]),
        ([("", 45), ("", 75)], ["45 test images", "75 test images"]),  # of an earlier version
        ([("ancient", 45), ("brandnew", 45)], ["images ancien", "images brandn"]),
    ],
)
def test_images_that_were_replaced_make_a_column_and_a_remark(
    tmp_path: Path, cards: list[tuple[str, int]], names: list[str]
) -> None:
    for at, (label, (images, count)) in enumerate(((METHOD, cards[0]), (METHOD, cards[1]), (OTHER, cards[1]))):
        write_job(tmp_path / str(at), label, config=of_dataset(name="folder", path="split3"), dataset="folder")
        write_card(tmp_path / str(at), images, count=count)
    contents = read_jobs(tmp_path)
    assert columns(contents) == [f"folder ({names[at]})" for at in (0, 1, 1)]
    assert contents.remarks == ("folder: the test images are not the same in all runs; each set has a column",)
    assert len(results_of(tmp_path).counted) == 3  # not one run of METHOD that was repeated
    assert compare_all(tabulate(contents.jobs))[0].pairs == 1


def test_draws_with_test_images_of_their_own_share_a_column(tmp_path: Path) -> None:
    for at, (label, draw) in enumerate((label, draw) for label in (METHOD, OTHER) for draw in range(3)):
        write_job(tmp_path / str(at), label, config=of_dataset(split="random_80_20", split_seed=draw))
        write_card(tmp_path / str(at), f"draw {draw}", train=f"draw {draw}")
    results = results_of(tmp_path)
    assert results.datasets == ("cub",) and not results.remarks
    assert compare_all(results)[0].pairs == 3


def test_one_folder_written_in_two_ways_and_one_that_was_moved(tmp_path: Path) -> None:
    for at, path in enumerate(("split3", "./split3", "/elsewhere/split3", "other")):
        write_job(tmp_path / str(at), METHOD, "folder", seed=at, config=of_dataset(name="folder", path=path))
    assert columns(read_jobs(tmp_path))[:2] == columns(read_jobs(tmp_path))[1:2] * 2
    for at in (0, 2):
        job = json.loads((tmp_path / str(at) / "job.json").read_text())
        (tmp_path / str(at) / "job.json").write_text(json.dumps(job | {"seed": 0}))
        write_card(tmp_path / str(at), "same")
    write_card(tmp_path / "3", "others")
    assert columns(read_jobs(tmp_path)) == ["folder split3"] * 3 + ["folder other"]


def test_a_planned_job_is_in_the_column_of_its_settings(tmp_path: Path) -> None:
    jobs = [{"folder": str(at), "label": METHOD, "dataset": "cub", "seed": at} for at in range(3)]
    for at, job in enumerate(jobs):
        job["config"] = of_dataset(name="cub", classes=None if at == 0 else ["5", "6"], batch_size="${somewhere}")
    write_plan(tmp_path, jobs)
    write_job(tmp_path / "0", METHOD, seed=0)
    write_job(tmp_path / "1", METHOD, seed=1, config=of_dataset(classes=["5", "6"]))
    assert columns(read_jobs(tmp_path)) == ["cub", *["cub classes=5,6"] * 2]


@pytest.mark.parametrize("path", ["~" * 5000, "\0", "a" * 300])
def test_a_place_that_is_no_path(tmp_path: Path, path: str) -> None:
    write_job(tmp_path / "0", METHOD, config=of_dataset(path=path))
    write_job(tmp_path / "1", METHOD, config=of_dataset(path="other"))
    assert len(set(columns(read_jobs(tmp_path)))) == 2


def test_a_damaged_card_is_one_that_is_not_known(tmp_path: Path) -> None:
    write_job(tmp_path / "0", PROBE)
    write_job(tmp_path / "1", METHOD)
    write_card(tmp_path / "0", "same")
    (tmp_path / "1" / "dataset.json").write_text("{")
    assert columns(read_jobs(tmp_path)) == ["cub", "cub"]
    assert compare_all(results_of(tmp_path))[0].pairs == 1


def test_links_to_runs_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    write_job(tmp_path / "elsewhere", METHOD, seed=1)
    folder = tmp_path / "runs"
    write_job(folder / "b", METHOD, seed=2)
    for name, target in {"a": "b", "c": "../elsewhere", "d": ".", "e": "..", "f": "nowhere"}.items():
        (folder / name).symlink_to(target)
    (tmp_path / "elsewhere" / "back").symlink_to(folder)
    (folder / "b" / "self").symlink_to(folder / "b")
    assert [job.folder for job in read_jobs(folder).jobs] == ["b", "c"]
    (tmp_path / "link").symlink_to(folder)
    assert len(read_jobs(tmp_path / "link").jobs) == 2
    assert write_report(tmp_path / "link").is_file()
