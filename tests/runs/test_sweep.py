"""Sweeps: what their folders say, what is done again and what is not, and what is said at the end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from omegaconf import OmegaConf
from rich.console import Console

from recast_exp import stages
from recast_exp.cli import job as running
from recast_exp.cli import main as cli
from recast_exp.cli.check import CommandLine, check
from recast_exp.config import compose as composition
from recast_exp.config.schema import Config, with_values
from recast_exp.display import live as progress
from recast_exp.errors import UserError
from recast_exp.runs import record as job_record
from recast_exp.runs import sweep
from support.helpers import assert_one_line
from support.program import Result, runner

Compose = Callable[..., Config]


@pytest.fixture
def program(tmp_path: Path) -> Callable[..., Result]:
    return runner(tmp_path / "cwd")


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_failures_are_recorded(program: Callable[..., Result]) -> None:
    typed = ("-m", "model=vit_att,vit_mlp", "seed=1,102,101", "hydra.sweep.dir=my sweep")
    result = program(*typed, stage=True)
    folder = result.folder / "my sweep"
    assert result.code == 2
    states = [read(folder / str(number) / "job.json")["state"] for number in range(6)]
    assert states == ["finished", "failed", "failed"] * 2
    first = read(folder / "1" / "job.json")
    assert first["reason"] == "some.key: expected 2, got 1"
    assert (first["exit_code"], first["number"], first["label"], first["seed"]) == (2, 1, "RECAST-Att", 102)
    assert read(folder / "2" / "job.json")["reason"] == "ValueError: a bug"
    plan = read(folder / "sweep.json")
    assert [(job["label"], job["seed"]) for job in plan["jobs"]] == [
        (label, seed) for label in ("RECAST-Att", "RECAST-MLP") for seed in (1, 102, 101)
    ]
    assert "model=vit_att " in result.out and "model=vit_mlp " in result.out  # what differs, and nothing else
    again = "python -m recast_exp -m model=vit_att,vit_mlp seed=1,102,101 'hydra.sweep.dir=my sweep'"
    assert again in result.out
    assert "4 of 6 job(s) did not finish" in result.out
    said = [line for line in result.err if " of 6: " in line]
    assert said[0].startswith("1 of 6: RECAST-Att on digits, seed 1: validation 50.0 %")
    assert said[1].endswith("seed 102 failed: some.key: expected 2, got 1")


def test_a_killed_sweep_goes_on(program: Callable[..., Result]) -> None:
    typed = ("-m", "seed=1,102,99,3", "hydra.sweep.dir=s")
    result = program(*typed, stage=True)
    assert result.code == -9
    folder = result.folder / "s"
    assert [read(folder / job / "job.json")["state"] for job in ("0", "1", "2")] == ["finished", "failed", "running"]
    assert not (folder / "3").exists()
    result = program(*typed, stage=True)
    assert result.code == 2
    assert [job["seed"] for job in result.jobs] == [102, 99, 3]  # what failed is tried again, too
    assert "0 is finished; nothing is left to do" in result.err[0]

    # Finished is what has its results, whatever a record says
    (folder / "0" / "metrics.json").write_text("{")
    (folder / "2" / "task.safetensors").unlink()
    assert [job["seed"] for job in program(*typed, stage=True).jobs] == [1, 102, 99]

    # D5: where the data is, how it is loaded and who follows decide no result, so a sweep goes on with others
    (folder / "0" / "metrics.json").unlink()
    moved = ("data_dir=elsewhere", "dataset.num_workers=1", "logger=none", "trainer.num_threads=2")
    assert program(*typed, *moved, stage=True).jobs[0]["data_dir"] == "elsewhere"

    # Another sweep in its folder is refused, and nothing is changed
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    result = program("-m", "seed=1,102,99,4", "trainer.max_epochs=7", "hydra.sweep.dir=s", stage=True)
    assert result.code == 2
    assert [line.split(";")[0] for line in result.err] == [
        "error: hydra.sweep.dir: job 0 in s was started with trainer.max_epochs=30, not 7",
        "error: hydra.sweep.dir: job 1 in s was started with trainer.max_epochs=30, not 7",
        "error: hydra.sweep.dir: job 2 in s was started with trainer.max_epochs=30, not 7",
        "error: hydra.sweep.dir: job 3 in s was started with seed=3, not 4 (and 1 more)",
    ]
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_draws_and_seeds_of_a_setting_are_one_row(program: Callable[..., Result]) -> None:
    typed = ("-m", "model=vit_att,vit_mlp", "dataset.split_seed=0,1,2", "seed=1,2", "hydra.sweep.dir=s")
    result = program(*typed, stage=True)
    assert result.code == 0
    settings = sweep.collect(result.folder / "s")
    assert {setting: len(jobs) for setting, jobs in settings.items()} == {"model=vit_att": 6, "model=vit_mlp": 6}
    assert "split_seed" not in result.out.split("Sweep s")[1].split("Report")[0]
    draws = program("-m", "dataset.split_seed=0,1", "hydra.sweep.dir=draws", stage=True)
    assert {setting: len(jobs) for setting, jobs in sweep.collect(draws.folder / "draws").items()} == {"RECAST-Att": 2}


def test_two_sweeps_do_not_share_a_folder(tmp_path: Path) -> None:
    with (
        sweep.holding(tmp_path / "s", [], [], ["-m"]),
        pytest.raises(UserError, match="a sweep is running in"),
        sweep.holding(tmp_path / "s", [], [], ["-m"]),
    ):
        pass
    with sweep.holding(tmp_path / "s", [], [], ["-m"]):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made"), sweep.holding(tmp_path / "file" / "s", [], [], ["-m"]):
        pass


def test_an_interrupted_sweep_says_how_to_go_on(program: Callable[..., Result]) -> None:
    result = program("-m", "seed=1,130,3", "hydra.sweep.dir=s", stage=True)
    assert result.code == 130
    assert result.err[-1] == "interrupted; continue with: python -m recast_exp -m seed=1,130,3 hydra.sweep.dir=s"
    assert [read(path)["state"] for path in sorted((result.folder / "s").glob("*/job.json"))] == [
        "finished",
        "interrupted",
    ]


def test_pairs_that_do_not_fit_are_refused_or_left_out(
    program: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*typed: str) -> list[str]:
        found = check(CommandLine(typed, multirun=True))
        return found.wrong or [str(error) for error in cli._preflight(found)]

    pairs = ("model=vit_att,vit_full", "adapter=clr,none")
    [line] = refused(*pairs)
    assert line.startswith("adapter: expected none with model=vit_full, which trains every weight, got clr")
    [line] = refused("adapter=clr,none")
    assert line.startswith("adapter: clr does not fit VisionTransformer")
    assert "adaptformer, bitfit" in line and line.endswith("(where adapter=clr)")
    lines = refused("model=vit_full", "adapter=bitfit,melo", "skip_unfit=true")  # nothing would be left
    assert any("which trains every weight" in line for line in lines)

    monkeypatch.setenv("unfit", "checked")
    result = program("-m", "adapter=clr,none", "skip_unfit=true", "hydra.sweep.dir=s", stage=True)
    assert result.code == 0
    assert len(result.jobs) == 1
    folder = result.folder / "s"
    assert [bool(job["skipped"]) for job in read(folder / "sweep.json")["jobs"]] == [True, False]
    assert [read(folder / str(n) / "job.json")["state"] for n in range(2)] == ["skipped", "finished"]
    assert "1 job(s) do not fit and were left out" in result.out
    assert "clr does not fit VisionTransformer" in " ".join(result.out.split())


def job(settings: Config, folder: Path, group: Path | None = None) -> stages.Job:
    def no_variants() -> stages.Variants:
        raise AssertionError("only stage=compare composes others")

    return stages.Job(settings, folder, None if group is None else str(group), no_variants)


def test_a_failed_job_leaves_the_next_one_alone(tiny: Compose, tmp_path: Path) -> None:
    settings = tiny("model=vit_att", "trainer.max_epochs=1")
    broken = with_values(settings, {"optimizer.lr": 1e30})
    with pytest.raises(UserError, match="diverged"):
        running.run_job(job(broken, tmp_path / "0", tmp_path), overrides=[], number=0)
    assert job_record.read(tmp_path / "0")["state"] == "failed"
    metrics = running.run_job(job(settings, tmp_path / "1", tmp_path), overrides=["seed=42"], number=1)
    record = job_record.read(tmp_path / "1")
    assert record["state"] == "finished"
    assert (record["epoch"], record["epochs"], record["val/accuracy"]) == (1, 1, metrics["val/accuracy"])
    assert job_record.is_finished(tmp_path / "1")
    other = with_values(settings, {"seed": 3})
    with pytest.raises(UserError, match="was started with seed=42, not 3"):
        running.run_job(job(other, tmp_path / "1", tmp_path), overrides=[], number=1)
    # Where its images are, how they are loaded and who looks on decide nothing
    moved = {
        "data_dir": "elsewhere",
        "dataset.num_workers": 2,
        "cache_dir": None,
        "logger.name": "none",
        "logger.project": "p",
    }
    again = running.run_job(job(with_values(settings, moved), tmp_path / "1", tmp_path), overrides=[], number=1)
    assert again["val/accuracy"] == metrics["val/accuracy"]


def test_every_row_of_the_paper_is_a_job() -> None:
    found = check(CommandLine(("experiment=paper", "dataset=flowers"), inputs=False))
    assert (found.wrong, found.missing) == ([], [])
    assert found.is_grid
    rows = sorted(path.stem for path in (composition.conf_dir() / "method").glob("*.yaml"))
    assert len(rows) == 19
    assert sorted(each.asked.overrides[0] for each in found.jobs if each.settings.seed == 42) == [
        f"method={row}" for row in rows
    ]
    assert sorted({each.settings.seed for each in found.jobs}) == [42, 1998, 3142592]
    paper = OmegaConf.load(composition.conf_dir() / "experiment" / "paper.yaml")
    assert paper.hydra.sweeper.params.dataset == "flowers,aircraft,scenes,cub,cifar10,cifar100"
    piggyback = next(each.settings for each in found.jobs if "method=recast_resnet_piggyback" in each.asked.overrides)
    optimizer = piggyback.optimizer
    assert (optimizer.name, optimizer.lr, optimizer.coefficients_lr, optimizer.adapter_lr) == ("adam", 3e-2, 5e-4, 1e-4)
    assert piggyback.dataset.batch_size == 64
    small = check(CommandLine(("experiment=paper_digits",)))
    assert len(small.jobs) == 8 * 3
    assert {(each.settings.model.family, each.settings.dataset.batch_size) for each in small.jobs} == {
        ("vit", 32),
        ("resnet", 64),
    }


def test_a_folder_has_one_job(tiny: Compose, tmp_path: Path) -> None:
    settings = tiny("model=vit_att", "trainer.max_epochs=1")
    first = running.run_job(job(settings, tmp_path), overrides=[])
    other = with_values(settings, {"optimizer.lr": 1e-5})
    with pytest.raises(UserError) as error:  # its checkpoint would be taken for this one's
        running.run_job(job(other, tmp_path), overrides=[])
    assert_one_line(error, "hydra.run.dir:", "was started with optimizer.lr=0.05, not 1e-05; choose a new folder")
    (tmp_path / "job.json").write_text('{"config": {}}')  # whose numbers these are cannot be known
    second = running.run_job(job(other, tmp_path), overrides=[])
    assert second["train/loss"] != first["train/loss"]

    with FileLock(tmp_path / ".lock"), pytest.raises(UserError) as error:
        running.run_job(job(other, tmp_path), overrides=[])
    assert_one_line(error, "a job is running in")
    assert job_record.read(tmp_path)["state"] == "finished"


def test_a_sweep_counts_its_own_jobs(tmp_path: Path) -> None:
    for folder, state in (("0", "finished"), ("old/0", "failed"), ("7", "failed")):
        (tmp_path / folder).mkdir(parents=True)
        content = record(state=state, number=int(folder[-1])) | job_record_keys()
        (tmp_path / folder / "job.json").write_text(json.dumps(content))
    plan = sweep.Plan(tmp_path, "", [{"number": 0, "folder": "0", "skipped": None}], "")
    assert [each["state"] for each in sweep.all_records(plan)] == ["finished"]
    assert [each["folder"] for each in sweep.records(tmp_path)] == ["0", "7"]


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (
            ("method=vit_full", "model=vit_att"),
            "method: expected no model, which a method chooses, got vit_full with model=vit_att",
        ),
        (
            ("method=vit_probe,recast_att", "adapter=melo"),
            "method: expected no adapter, which a method chooses, got vit_probe with adapter=melo",
        ),
        (
            ("seed=1,2", "hydra.sweep.subdir=x"),
            "the jobs of a sweep are in folders named by their numbers; leave it out",
        ),
        (
            ("seed=1,2", "hydra.sweep.dir=s_${seed}"),
            "hydra.sweep.dir: expected one folder for all jobs, got s_${seed}, but seed differs between jobs",
        ),
        (("stage=report", "path=.", "seed=1,2"), "stage: expected another one in a sweep, got report"),
        (("seed=1,2", "hydra.sweep.dir="), "hydra.sweep.dir: expected a folder, got nothing"),
    ],
)
def test_what_no_sweep_takes(typed: tuple[str, ...], expected: str) -> None:
    found = check(CommandLine(typed, multirun=True))
    assert any(expected in line for line in found.wrong), found.wrong


def test_a_sweep_does_not_shrink(tmp_path: Path) -> None:
    planned = check(CommandLine(("seed=1,2",), multirun=True)).jobs
    with sweep.holding(tmp_path, planned, ["a", "b"], ["-m", "seed=1,2"]):
        pass
    before = (tmp_path / "sweep.json").read_text()
    with pytest.raises(UserError) as error, sweep.holding(tmp_path, planned[:1], ["a"], ["-m", "seed=1"]):
        pass
    assert_one_line(error, "has a sweep of 2 jobs, not 1")
    assert (tmp_path / "sweep.json").read_text() == before


def test_the_folder_of_a_sweep_knows_typed_values() -> None:
    found = check(
        CommandLine(("seed=1,2", "trainer.max_epochs=5", "hydra.sweep.dir=s_${trainer.max_epochs}"), multirun=True)
    )
    assert (found.wrong, found.sweep_dir) == ([], Path("s_5"))


def test_what_failed_before_is_news_again(tmp_path: Path) -> None:
    common = {"label": "", "dataset": "", "skipped": None, "overrides": []}
    jobs = [{"number": n, "folder": str(n), "seed": n, **common} for n in range(2)]
    for number, state in enumerate(("finished", "failed")):
        (tmp_path / str(number)).mkdir()
        content = record(state=state, number=number) | job_record_keys()
        (tmp_path / str(number) / "job.json").write_text(json.dumps(content))
    watcher = progress._Watcher(tmp_path, jobs)
    assert watcher.reported == {0}
    assert [each["state"] for each in watcher.look()] == ["finished", "waiting"]
    job_record.update(tmp_path / "1", updated="2030-01-01T00:00:00+00:00")
    assert [each["state"] for each in watcher.look()] == ["finished", "failed"]


def job_record_keys() -> dict[str, Any]:
    return {"format": 1, "exit_code": 1, "overrides": [], "config": {"seed": 42}, "stage": "adapt"}


def record(**changes: Any) -> dict[str, Any]:
    now = job_record._now()
    return {
        "number": 0, "label": "RECAST-Att", "dataset": "cub", "seed": 42, "state": "finished", "reason": None,
        "skipped": None, "epoch": 10, "epochs": 10, "val/accuracy": 0.5, "started": now, "updated": now,
    } | changes  # fmt: skip


def test_the_live_table() -> None:
    records = [
        record(),
        record(number=1, state="failed", reason="no"),
        record(number=2, state="running", epoch=5, **{"val/accuracy": None}),
        record(number=3, state="waiting"),
    ]
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(progress.table(records, time.time() - 50))
    text = console.export_text()
    assert "5/10" in text and "waiting" in text and "2 of 4 jobs ended, 1 failed" in text
    assert "about 0:30 left" in text  # 2.5 of 4 in 50 s
    assert "with" not in text
    own = ["dataset.split_seed=0", "", "optimizer.lr=[1]", ""]
    console.print(progress.table(records, time.time() - 50, own))
    text = console.export_text()
    assert "with" in text and own[0] in text and own[2] in text


def test_the_live_table_of_a_search(tmp_path: Path) -> None:
    assert not progress.search_table(tmp_path, 0.0).renderables  # nothing is known yet
    trials = []
    for number, state in enumerate(("finished", "finished", "pruned", "failed", "running")):
        value = 0.5 + number / 10 if state == "finished" else None
        trials.append(
            {"number": number, "folder": str(number), "state": state, "value": value, "ended": job_record._now()}
            | {"reason": None, "exit_code": None, "epochs": {}, "started": None}
        )
        trials[-1]["parameters"] = {"optimizer.lr": f"{0.00123456 * (number + 1)!r}", "model": "'vit_att'"}
        if state != "failed":
            (tmp_path / str(number)).mkdir()
            told = {"pruned": "skipped"}.get(state, state)
            content = record(state=told, number=number, epoch=5 if state == "running" else 10) | job_record_keys()
            (tmp_path / str(number) / "job.json").write_text(json.dumps(content))
    space = {"optimizer.lr": "interval(0.0,1.0)", "model": "choice(vit_att,vit_mlp)"}
    facts = {"format": 1, "metric": "val/accuracy", "direction": "maximize", "seed": 42, "overrides": []}
    best = trials[1] | {"command": "python -m recast_exp"}
    search = facts | {"n_trials": 8, "space": space, "best": best, "trials": trials}
    (tmp_path / "search.json").write_text(json.dumps(search))
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(progress.search_table(tmp_path, time.time() - 45))
    text = console.export_text()
    assert [line.split()[:4] for line in text.splitlines() if "vit_att" in line] == [
        ["0", "0.001235", "vit_att", "finished"],
        ["1", "0.002469", "vit_att", "finished"],
        ["2", "0.003704", "vit_att", "pruned"],
        ["3", "0.004938", "vit_att", "failed"],
        ["4", "0.006173", "vit_att", "running"],
    ]
    assert "5/10" in text
    assert "4 of 8 trials ended, best 60.0 % (trial 1), about 0:35 left" in text  # 4.5 of 8 in 45 s


def test_the_time_that_is_left_does_not_count_what_had_ended_before() -> None:
    old = record(updated="2020-01-01T00:00:00+00:00")
    started = time.time() - 100
    assert progress.remaining([old, record(state="waiting")], started) is None
    assert progress.remaining([old, record(), record(state="waiting")], started) == pytest.approx(100, abs=2)
