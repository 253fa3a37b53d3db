"""What follows a run: history, TensorBoard, and W&B by what its library is called with and by the file it writes."""

from __future__ import annotations

import csv
import json
import logging
import math
import re
import struct
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import wandb
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

from recast_exp import plugins
from recast_exp.cli import main as cli
from recast_exp.config import grammar
from recast_exp.config.compose import Composer
from recast_exp.config.keys import leaves
from recast_exp.config.schema import Config, typed, with_values
from recast_exp.errors import MissingInputError, UserError
from recast_exp.files import cache_folder, json_hash
from recast_exp.models.backbones import create_backbone
from recast_exp.models.bank_cache import bank_for
from recast_exp.tracking import _wandb_run as wandb_run
from recast_exp.tracking import dashboard
from recast_exp.tracking import start as tracking
from recast_exp.tracking.wandb_sync import how_to_sync
from recast_exp.training.history import as_csv
from recast_exp.training.loop import fit
from recast_exp.training.module import TaskModule
from support.running import run_stage
from support.task_files import coefficients

Compose = Callable[..., Config]
REGRESSION = Path(__file__).parents[1] / "regression" / "files"
EARLIER_WITHOUT_EFFECT = {"resume", "skip_unfit", "label", "model.label", "search.storage"}
GROUP = "somewhere/multirun/2026-11-21/11-58-54-2b5250"
KEY = 40 * "a"


@pytest.fixture(autouse=True, scope="module")
def own_wandb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pytest.MonkeyPatch]:
    """W&B as on a machine where it was never used; it reads the environment once, hence the teardown."""
    folder = tmp_path_factory.mktemp("wandb")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DATA", "CACHE", "CONFIG"):
            patch.setenv(f"WANDB_{name}_DIR", str(folder))
        for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
            patch.delenv(name, raising=False)
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        patch.setenv("NETRC", str(folder / "netrc"))
        wandb.teardown()
        yield patch
        wandb.teardown()


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def columns(run_dir: Path) -> tuple[list[str], list[dict[str, str]]]:
    with (run_dir / "metrics.csv").open(encoding="utf-8") as file:
        reader = csv.DictReader(file)
        return list(reader.fieldnames or []), list(reader)


# The file that W&B writes offline: records in blocks of 32 KiB, each with checksum, length and kind before it


def records(run: Path) -> Iterator[Any]:
    (path,) = run.glob("*.wandb")
    data, position, whole = path.read_bytes(), 7, b""
    assert data.startswith(b":W&B")
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # the whole of a record, or its end
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""


@dataclass
class Sent:
    """What an offline file holds."""

    run: Any = None
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    artifacts: list[Any] = field(default_factory=list)
    exit_code: int | None = None

    @classmethod
    def of(cls, run: Path) -> Sent:
        """What has been sent; W&B's own process may still be writing the last of it when a job has ended."""
        deadline = time.monotonic() + 60
        while (sent := cls.so_far(run)).exit_code is None and time.monotonic() < deadline:
            time.sleep(0.05)
        return sent

    @classmethod
    def so_far(cls, run: Path) -> Sent:
        sent = cls()
        for record in records(run):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                sent.run = record.run
                sent.config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            elif kind == "history":
                sent.rows.append(values(record.history.item))
            elif kind == "summary":
                sent.summary |= values(record.summary.update)
            elif kind == "artifact":
                sent.artifacts.append(record.artifact)
            elif kind == "exit":
                sent.exit_code = record.exit.exit_code
        return sent

    @property
    def epochs(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if "train/loss" in row]


def values(items: Any) -> dict[str, Any]:
    """Name → value; of a picture, which has several, the name of its first part alone."""
    found = {}
    for item in items:
        name = item.key or item.nested_key[0]
        if not name.startswith("_"):
            found[name] = json.loads(item.value_json)
    return found


def offline_runs(run_dir: Path) -> list[Path]:
    return sorted(run_dir.glob("wandb/offline-run-*"))


OPTIONS = ("model=vit_att", "adapter=melo", "probe=true", "select=best", "logger=wandb", "seed=7")


@pytest.fixture(scope="module")
def job(tiny: Compose, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A whole job with `logger=wandb`, and the lines that it logged."""
    folder = tmp_path_factory.mktemp("job")
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("recast_exp")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        run_stage(tiny(*OPTIONS), folder, GROUP)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return folder, lines


@pytest.fixture(scope="module")
def sent(job: tuple[Path, list[str]]) -> Sent:
    (run,) = offline_runs(job[0])
    return Sent.of(run)


def test_a_run_says_what_it_is(sent: Sent) -> None:
    run = sent.run
    assert (run.project, run.run_group, run.job_type) == ("recast_exp", "2026-11-21/11-58-54-2b5250", "adapt")
    assert run.display_name == "vit_att-melo-digits-7"
    assert sorted(run.tags) == ["digits", "melo", "seed7", "vit_att"]
    flat = {"method": "RECAST-Att + MeLo", "model": "vit_att", "adapter": "melo", "dataset": "digits", "seed": 7}
    assert {name: sent.config[name] for name in flat} == flat
    assert sent.config["config"]["optimizer"]["name"] == "adamw"
    assert sent.exit_code == 0


def test_each_epoch_is_a_row_of_metrics_csv(job: tuple[Path, list[str]], sent: Sent) -> None:
    names, rows = columns(job[0])
    assert len(sent.epochs) == len(rows) == 2
    for logged, row in zip(sent.epochs, rows, strict=True):
        assert set(logged) == {*names, "trainer/global_step"}
        assert {name: logged[name] for name in names} == {name: float(text) for name, text in row.items()}


def test_the_summary_is_the_results(job: tuple[Path, list[str]], sent: Sent) -> None:
    metrics, counts = (read(job[0] / f"{name}.json") for name in ("metrics", "parameters"))
    assert {name: sent.summary[name] for name in metrics} == metrics
    counts.pop("layers")
    assert {name: sent.summary[f"parameters/{name}"] for name in counts} == counts


def test_plots_and_confusion_matrix(job: tuple[Path, list[str]], sent: Sent) -> None:
    folder = job[0]
    plots = {f"plots/{path.stem}" for path in (folder / "plots").glob("*.png")}
    assert len(plots) == 5
    assert set(sent.rows[-1]) >= {*plots, "confusion_matrix_table"}
    (path,) = folder.rglob("confusion_matrix_table*.json")
    table = read(path)["data"]
    with (folder / "predictions.csv").open(encoding="utf-8") as file:
        pairs = [(row["class"], row["predicted"]) for row in csv.DictReader(file)]
    assert {(true, predicted): count for true, predicted, count in table if count} == {
        pair: pairs.count(pair) for pair in pairs
    }


def test_the_task_file_is_an_artifact(job: tuple[Path, list[str]], sent: Sent) -> None:
    (artifact,) = [each for each in sent.artifacts if each.type == "task"]
    metadata = json.loads(artifact.metadata)
    assert artifact.name == "RECAST-Att_MeLo-digits"
    assert sorted(artifact.aliases) == sorted(["latest", "seed7", metadata["sha256"][:12]])
    (content,) = artifact.manifest.contents
    assert Path(content.local_path) == job[0] / "task.safetensors"
    assert metadata["test/accuracy"] == read(job[0] / "metrics.json")["test/accuracy"]
    assert metadata["classes"] == 5


def test_a_job_of_a_sweep_says_once_why_it_is_offline(job: tuple[Path, list[str]]) -> None:
    lines = job[1]
    assert sum("no API key" in line for line in lines) == 1
    assert not any("wandb sync" in line for line in lines)  # the sweep says it, for all


def test_the_last_line_says_how_to_sync(job: tuple[Path, list[str]], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "recast_exp")
    tracking.say_how_to_sync(job[0])
    (run,) = offline_runs(job[0])
    assert caplog.messages[-1].endswith(f"wandb sync {run}")


def test_coefficients_over_time(job: tuple[Path, list[str]], tiny: Compose) -> None:
    folder = job[0]
    settings = tiny(*OPTIONS, "select=last")
    banks, _ = bank_for(create_backbone(settings.model), settings.recast, settings.mimicry, cache_folder(None))
    found = coefficients(folder / "task.safetensors", banks)
    row = columns(folder)[1][int(read(folder / "metrics.json")["epoch"]) - 1]
    moved = {layer: (found[layer] - start).abs().mean().item() for layer, start in banks.coefficients.items()}
    assert math.isclose(float(row["coefficients/change"]), sum(moved.values()) / len(moved), rel_tol=1e-5)
    assert len(banks.groups) == 6
    for group in banks.groups:
        mean = sum(moved[layer] for layer in group.layers) / len(group.layers)
        assert math.isclose(float(row[f"coefficients/change/{group.name}"]), mean, rel_tol=1e-5)


def test_a_failed_job_is_failed_and_goes_on_as_the_same_run(
    build: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = build("model=vit_frozen", "logger=wandb")
    original = TaskModule.training_step

    def train() -> None:
        with tracking.tracked(run.settings, tmp_path, None) as trackers:
            fit(run.recipe, run.adapted, run.data, run_dir=tmp_path, loggers=trackers)

    def interrupted(self: TaskModule, batch: Any, batch_idx: int) -> Any:
        if self.current_epoch == 1:
            raise KeyboardInterrupt
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(TaskModule, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train()
    (first,) = offline_runs(tmp_path)
    # Both may be begun within the second that stands in the names of W&B's folders
    first = first.rename(first.with_name(first.name.replace("offline-run-20", "offline-run-19")))
    train()
    _, second = offline_runs(tmp_path)
    parts = Sent.of(first), Sent.of(second)
    assert parts[0].run.run_id == parts[1].run.run_id == read(tmp_path / "wandb.json")["id"]
    assert [part.exit_code for part in parts] == [1, 0]
    assert [[row["epoch"] for row in part.epochs] for part in parts] == [[1], [1, 2]]  # the second has all
    assert parts[1].epochs[0]["train/loss"] == parts[0].epochs[0]["train/loss"]
    assert how_to_sync(tmp_path) == f"wandb sync {first} {second}"


# What wandb is called with


@dataclass
class FakeRun:
    """Stands in for a run: notes what it is told."""

    options: dict[str, Any]
    url: str = ""
    offline: bool = False
    summary: dict[str, Any] = field(default_factory=dict)
    defined: list[tuple[str, Any]] = field(default_factory=list)
    logged: list[dict[str, Any]] = field(default_factory=list)
    finished: list[int] = field(default_factory=list)
    broken: bool = False

    def define_metric(self, name: str, step_metric: str | None = None, step_sync: bool | None = None) -> None:
        self.defined.append((name, step_metric))

    def log(self, values: dict[str, Any]) -> None:
        if self.broken:
            raise wandb.errors.CommError("the line is dead")
        self.logged.append(values)

    def log_artifact(self, artifact: Any, aliases: list[str]) -> None:
        self.logged.append({"artifact": artifact.name})

    def finish(self, exit_code: int) -> None:
        self.finished.append(exit_code)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    started: list[FakeRun] = []

    def init(**options: Any) -> FakeRun:
        started.append(FakeRun(options))
        return started[-1]

    monkeypatch.setattr(wandb, "init", init)
    return started


def test_jobs_of_one_process_have_a_run_each(runs: list[FakeRun], tiny: Compose, tmp_path: Path) -> None:
    for number in ("0", "1", "0"):
        (tmp_path / number).mkdir(exist_ok=True)
        with tracking.tracked(tiny("logger=wandb", "logger.mode=offline", f"seed={number}"), tmp_path / number, GROUP):
            pass
    first, second, again = (run.options for run in runs)
    assert [run.finished for run in runs] == [[0], [0], [0]]
    assert {options["mode"] for options in (first, second, again)} == {"offline"}
    assert {options["resume"] for options in (first, second, again)} == {"allow"}
    assert first["dir"] == tmp_path / "0"
    assert first["id"] == again["id"] != second["id"]
    assert runs[0].defined == [("epoch", None), ("*", "epoch")]
    assert not any(Path(part).is_absolute() for part in (first["group"], *first["tags"]))


def test_another_configuration_in_the_same_folder_is_another_run(
    runs: list[FakeRun], tiny: Compose, tmp_path: Path
) -> None:
    for options in ((), ("optimizer.lr=0.5",), (f"resume={tmp_path}", "optimizer.lr=0.5")):
        with tracking.tracked(tiny("logger=wandb", "logger.mode=offline", *options), tmp_path, None):
            pass
    first, other, resumed = (run.options["id"] for run in runs)
    assert first != other == resumed


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, UserError])
def test_a_job_that_fails_before_it_trains_is_a_failed_run(
    error: type[BaseException], runs: list[FakeRun], tiny: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(settings: Config) -> None:
        raise error("no weights")

    monkeypatch.setattr("recast_exp.experiment.adaptation.Experiment.open", fail)
    with pytest.raises(error):
        run_stage(tiny("logger=wandb", "logger.mode=offline"), tmp_path)
    (run,) = runs
    assert run.finished == [1]


def test_results_that_cannot_be_sent_cost_a_warning(
    runs: list[FakeRun],
    job: tuple[Path, list[str]],
    tiny: Compose,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with tracking.tracked(tiny("logger=wandb", "logger.mode=offline"), tmp_path, None) as trackers:
        runs[0].broken = True
        tracking.report_results(trackers, job[0])
    assert "the line is dead" in caplog.text
    assert runs[0].finished == [0]


def test_many_classes_have_a_picture_and_no_chart(tmp_path: Path) -> None:
    (tmp_path / "predictions.csv").write_text("image,class,predicted\n0,c0,c1\n1,c1,c1\n")
    for number, names in ((100, {"confusion_matrix"}), (101, set())):
        (tmp_path / "dataset.json").write_text(json.dumps({"classes": [f"c{i}" for i in range(number)]}))
        assert set(wandb_run.confusion_matrix(tmp_path)) == names


# The run that a job goes on with


def test_a_run_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    recorded = read(REGRESSION / "vit_att" / "job.json")["config"]
    hashed = {name: value for name, value in leaves(recorded) if name not in EARLIER_WITHOUT_EFFECT}
    (tmp_path / "wandb.json").write_text(json.dumps({"id": "earlier", "configuration": json_hash(hashed)}))
    assert wandb_run.run_id(todays(recorded), tmp_path) == "earlier"
    assert wandb_run.run_id({**todays(recorded), "seed": 43}, tmp_path) == "earlier"  # whatever the hash


def test_a_key_that_decides_begins_another_run_and_a_later_one_or_a_name_does_not(tmp_path: Path) -> None:
    today = todays(read(REGRESSION / "vit_att" / "job.json")["config"])
    first = wandb_run.run_id(today, tmp_path)
    other = wandb_run.run_id({**today, "seed": 43}, tmp_path)
    assert other != first
    assert wandb_run.run_id({**today, "seed": 43, "later": 1, "label": "another"}, tmp_path) == other
    assert wandb_run.run_id(today, tmp_path) != other


def todays(recorded: dict[str, Any]) -> dict[str, Any]:
    """A recorded configuration with the keys that have been added since."""
    today = OmegaConf.to_container(OmegaConf.merge(OmegaConf.structured(Config), recorded))
    assert isinstance(today, dict)
    return {str(name): value for name, value in today.items()}


# Online or offline


@pytest.fixture
def server() -> Iterator[str]:
    """Something that answers as a server does."""

    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Refusing) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Sets variables for W&B, which reads them once."""

    def environment(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(f"WANDB_{name}", value)
        wandb.teardown()

    yield environment
    monkeypatch.undo()
    wandb.teardown()


def test_auto_is_online_with_a_key_and_a_server_that_answers(server: str, environment: Callable[..., None]) -> None:
    environment(BASE_URL=server)
    mode, reason = wandb_run.choose_mode("auto")
    assert mode == "offline" and "no API key" in reason
    environment(API_KEY=KEY)
    assert wandb_run.choose_mode("auto") == ("online", "")
    assert wandb_run.choose_mode("offline") == ("offline", "")
    environment(API_KEY="short")
    mode, reason = wandb_run.choose_mode("auto")
    assert mode == "offline" and "40+" in reason


@pytest.mark.parametrize("said", ["offline", "dryrun", "disabled"])
def test_auto_does_what_the_environment_says(said: str, server: str, environment: Callable[..., None]) -> None:
    environment(BASE_URL=server, API_KEY=KEY, MODE=said)
    mode, reason = wandb_run.choose_mode("auto")
    assert mode == ("disabled" if said == "disabled" else "offline")
    assert said in reason


def test_no_network_is_offline_and_asked_once(environment: Callable[..., None]) -> None:
    environment(BASE_URL="http://127.0.0.1:9", API_KEY=KEY)
    mode, reason = wandb_run.choose_mode("auto")
    assert mode == "offline" and "http://127.0.0.1:9 cannot be reached" in reason
    asked = wandb_run.connection_problem.cache_info().misses
    wandb_run.choose_mode("auto")
    assert wandb_run.connection_problem.cache_info().misses == asked


def test_a_server_that_is_silent_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_run, "CONNECT_SECONDS", -0.9)
    given_up = threading.Event()

    def urlopen(*_: Any, **__: Any) -> None:
        given_up.wait(30)
        raise OSError

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    assert "does not respond" in wandb_run.connection_problem("http://silent.invalid")
    given_up.set()


def test_online_without_a_key_is_refused(environment: Callable[..., None]) -> None:
    with pytest.raises(UserError, match=r"^logger\.mode: expected auto or offline, got online with no API key: set "):
        wandb_run.choose_mode("online")


@pytest.mark.parametrize(("name", "value"), [("MODE", "sometimes"), ("SILENT", "maybe"), ("RUN_ID", "a/b")])
def test_a_variable_that_wandb_cannot_read_is_named(name: str, value: str, environment: Callable[..., None]) -> None:
    environment(**{name: value})
    with pytest.raises(UserError, match=f"^WANDB_{name}: W&B cannot read the value '{value}' .*variable$") as error:
        wandb_run.choose_mode("auto")
    assert "pydantic" not in str(error.value)


def test_a_key_that_wandb_cannot_read_is_not_shown(environment: Callable[..., None]) -> None:
    environment(API_KEY="a secret key ")
    with pytest.raises(UserError, match=r"^WANDB_API_KEY: W&B cannot read its value \(.*variable$") as error:
        wandb_run.choose_mode("auto")
    assert "secret" not in str(error.value)


def test_a_wrong_variable_is_found_before_a_folder_is_made(
    environment: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    environment(MODE="nonsense")
    monkeypatch.chdir(tmp_path)
    asked = ["model.pretrained=false", "logger=wandb", "logger.mode=offline", f"cache_dir={tmp_path / 'cache'}"]
    assert cli.run(asked) == 2
    assert "error: WANDB_MODE: W&B cannot read the value 'nonsense'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("asked", ["auto", "online"])
def test_a_run_that_the_server_refuses(
    asked: str, server: str, environment: Callable[..., None], tiny: Compose, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, runs: list[FakeRun], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    accepting = wandb.init

    def init(**options: Any) -> Any:
        if options["mode"] == "online":
            raise wandb.errors.CommError("permission\ndenied")
        return accepting(**options)

    monkeypatch.setattr(wandb, "init", init)
    environment(BASE_URL=server, API_KEY=KEY)
    caplog.set_level(logging.INFO, "recast_exp")
    asking = tiny("logger=wandb", f"logger.mode={asked}")
    if asked == "online":
        with pytest.raises(UserError, match=r"^logger\.mode: .*permission denied"):
            wandb_run.start(asking.logger, tracking.facts(asking), tmp_path)
    else:
        wandb_run.start(asking.logger, tracking.facts(asking), tmp_path)
        assert "permission denied" in caplog.text
        assert [run.options["mode"] for run in runs] == ["offline"]


# How to upload


def test_how_to_sync(tmp_path: Path) -> None:
    assert how_to_sync(tmp_path) is None
    for job, name in (("0", "1-a"), ("1 b", "2-b"), ("1 b", "3-b")):
        (tmp_path / job / "wandb" / f"offline-run-{name}").mkdir(parents=True)
    assert how_to_sync(tmp_path) == f"wandb sync {tmp_path}/*/wandb/offline-run-*"
    (tmp_path / "0" / "wandb" / "offline-run-1-a" / "run-a.wandb.synced").touch()
    waiting = [f"'{tmp_path}/1 b/wandb/offline-run-{name}'" for name in ("2-b", "3-b")]
    assert how_to_sync(tmp_path) == " ".join(["wandb sync", *waiting])


# Trackers by their names

PAGE = (Path(__file__).parents[2] / "docs" / "tracking.md").read_text(encoding="utf-8")
MODULE, OPTION, POINTS = (
    re.search(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)[1]  # type: ignore[index]
    for language in ("python", "yaml", "toml")
)


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The documented example as another distribution that is installed; its folder of options."""
    package, info = tmp_path / "site" / "my_package", tmp_path / "site" / "my_package-1.0.dist-info"
    for folder in (package, info, tmp_path / "conf" / "logger"):
        folder.mkdir(parents=True)
    (package / "lines.py").write_text(MODULE)
    (package / "empty.py").write_text("")
    (tmp_path / "conf" / "logger" / "lines.yaml").write_text(OPTION)
    points = tomllib.loads(POINTS)["project"]["entry-points"]["recast_exp.trackers"] | {"empty": "my_package.empty"}
    lines = (f"{name} = {module}" for name, module in points.items())
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my_package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("\n".join(["[recast_exp.trackers]", *lines]))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    plugins._entry_points.cache_clear()
    yield tmp_path / "conf"
    plugins._entry_points.cache_clear()
    for name in ("my_package", "my_package.lines", "my_package.empty"):
        sys.modules.pop(name, None)


def test_the_documented_tracker_of_another_package(outside: Path, weights: dict[str, Path], tmp_path: Path) -> None:
    typed_in = ("logger=lines", "model=vit_frozen", "head=linear", "training=joint", "dataset.batch_size=8",
                "trainer.accelerator=cpu",
                "trainer.max_epochs=1", "trainer.limit_batches=2", "probe=false",
                f"model.weights={weights['digits_vit']}")  # fmt: skip
    settings = typed(Composer(config_dir=str(outside)).compose(grammar.rewrite(typed_in, multirun=False)).cfg)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    run_stage(settings, run_dir, GROUP)
    epoch, summary, end = (json.loads(line) for line in (run_dir / "lines.jsonl").read_text().splitlines())
    facts = {"method": "linear probe", "model": "vit_frozen", "adapter": "none", "dataset": "digits", "seed": 42}
    (row,) = columns(run_dir)[1]
    assert epoch == facts | {name: float(text) for name, text in row.items()}
    assert summary == facts | tracking.results(run_dir)
    assert end == facts | {"failed": False}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lines", {}, "logger.options.file: expected the name of a file, got None"),
        ("empty", {}, "logger.name: expected the module my_package.empty of tracker empty to have the function start, "
         "got none"),
        ("nope", {}, "logger.name: expected one of csv, empty, lines, none, tensorboard, wandb, got 'nope'"),
        *((name, {"size": 3}, f"logger.options.size: expected no options, as logger={name} has none; leave it out")
          for name in ("csv", "tensorboard", "wandb")),
    ],
)  # fmt: skip
def test_what_no_tracker_takes(
    name: str, options: dict[str, Any], message: str, outside: Path, tiny: Compose, tmp_path: Path
) -> None:
    settings = with_values(tiny(), {"logger.name": name, "logger.options": options})
    with pytest.raises(UserError) as error, tracking.tracked(settings, tmp_path, None):
        pass
    assert str(error.value) == message


@pytest.mark.parametrize("name", ["csv", "none"])
def test_none_is_another_name_for_csv(name: str, tiny: Compose, tmp_path: Path) -> None:
    with tracking.tracked(tiny(f"logger={name}"), tmp_path, None) as trackers:
        assert trackers == []


def test_the_modules_of_trackers_are_light() -> None:
    code = (
        "import sys\nfrom recast_exp.plugins import TRACKERS\n"
        "loaded = [TRACKERS.load(name) for name in TRACKERS.names()]\n"
        "print(len(loaded), [name for name in ('torch', 'lightning', 'wandb', 'tensorboard') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split(" ", 1)[1] == "[]\n"


@pytest.mark.parametrize(
    ("options", "method"),
    [
        (("model=vit_att",), "RECAST-Att"),
        (("model=vit_frozen",), "linear probe"),
        (("model=vit_frozen", "adapter=melo"), "MeLo"),
        (("model=vit_full",), "full fine-tuning"),
    ],
)
def test_the_method_is_called_as_in_tables(options: tuple[str, ...], method: str, compose: Compose) -> None:
    assert tracking.facts(compose(*options)).method == method


def test_a_dollar_in_the_name_of_a_folder_is_no_variable(
    tiny: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ELSEWHERE", "elsewhere")
    folder = tmp_path / "x$ELSEWHERE"
    folder.mkdir()
    with tracking.tracked(tiny("logger=tensorboard"), folder, None) as trackers:
        for tracker in trackers:
            tracker.log_metrics({"loss": 1.0}, 0)
    assert list((folder / "tensorboard").iterdir()) and [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_tensorboard_has_the_same_names(job: tuple[Path, list[str]], tiny: Compose, tmp_path: Path) -> None:
    folder = job[0]
    names, rows = columns(folder)
    with tracking.tracked(tiny("logger=tensorboard"), tmp_path, None) as trackers:
        for step, row in enumerate(rows):
            trackers[0].log_metrics({name: float(text) for name, text in row.items()}, step)
        tracking.report_results(trackers, folder)
    epochs = EventAccumulator(str(tmp_path / "tensorboard"), {"images": 0}).Reload()
    assert set(epochs.Tags()["scalars"]) == set(names)
    for name in names:
        logged = [event.value for event in epochs.Scalars(name)]
        assert logged == pytest.approx([float(row[name]) for row in rows])
    assert set(epochs.Tags()["images"]) == {f"plots/{path.stem}" for path in (folder / "plots").glob("*.png")}
    results = EventAccumulator(str(tmp_path / "tensorboard" / "results")).Reload()
    expected = {name: value for name, value in tracking.results(folder).items() if not isinstance(value, str)}
    assert {name: results.Scalars(name)[0].value for name in results.Tags()["scalars"]} == pytest.approx(expected)


def test_rows_that_an_older_version_has_begun_are_kept() -> None:
    assert as_csv([{"epoch": 1}, {"epoch": 2, "new": 0.5}]) == "epoch,new\n1,\n2,0.5\n"


# The dashboard


def named(value: Any) -> Iterator[tuple[str, str]]:
    """Where a workspace names a metric, and the name."""
    if isinstance(value, dict):
        for key, each in value.items():
            if key in ("metrics", "mediaKeys", "xAxis", "yAxis") and each != "_step":
                for name in [each] if isinstance(each, str) else each:
                    yield key, name
            elif key == "metricRegex":
                yield key, each
            else:
                yield from named(each)
    elif isinstance(value, list):
        for each in value:
            yield from named(each)


def test_the_dashboard_shows_what_runs_log(sent: Sent, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("wandb_workspaces")
    assert dashboard.main(["someone", "recast_exp", "--dry-run"]) == 0
    spec = json.loads(capsys.readouterr().out)
    logged = {name for row in sent.rows for name in row} | set(sent.summary)
    found = set(named(spec["section"]["panelBankConfig"]))
    assert {key for key, _ in found} == {"metrics", "mediaKeys", "xAxis", "yAxis", "metricRegex"}
    for key, name in found:
        if key == "metricRegex":
            assert any(each.startswith(name.removesuffix(".*")) for each in logged)
        else:
            assert name.removeprefix("summary:") in logged, (key, name)
    (runset,) = spec["section"]["runSets"]
    grouping = [item["name"].removesuffix(".value") for item in runset["grouping"]]
    assert grouping == ["dataset", "method"]
    assert set(grouping) <= set(sent.config)
    for column in runset["runFeed"]["columnOrder"][1:]:
        kind, _, name = column.partition(":")
        assert name in (sent.summary if kind == "summary" else sent.config)
    kinds = {
        panel["viewType"] for section in spec["section"]["panelBankConfig"]["sections"] for panel in section["panels"]
    }
    assert kinds == {"Bar Chart", "Scatter Plot", "Run History Line Plot", "Media Browser", "Run Comparer"}


def test_the_dashboard_wants_a_key(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("wandb_workspaces")
    assert dashboard.main(["someone", "recast_exp"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: dashboard: W&B has no API key") and error.count("\n") == 1


def test_the_dashboard_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb_workspaces.reports.v2.interface", None)
    with pytest.raises(MissingInputError, match=r"pip install 'recast-exp\[dashboard\]'"):
        dashboard.build("someone", "recast_exp")


def test_the_command_that_uploads_is_told_whatever_program_is_around_it(
    tiny: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """D15: a rank in the environment kept it back from a run on one device."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    run = tmp_path / "wandb" / "offline-run-20260101_000000-abc"
    run.mkdir(parents=True)
    (run / "run-abc.wandb").touch()
    caplog.set_level("INFO", logger="recast_exp")
    with pytest.raises(RuntimeError), tracking.tracked(tiny("logger=csv"), tmp_path, None):
        raise RuntimeError
    assert "upload with" in caplog.text
