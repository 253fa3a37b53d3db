"""Files that others made: a task file or a run's folder chooses nothing but what describes its model or its run."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest

from recast_exp.errors import MissingInputError, UserError
from recast_exp.models.task_file import read_task
from recast_exp.runs.adopt import contradictions, recorded, resumed_overrides
from recast_exp.runs.task_header import read_record
from support.program import runner
from support.task_files import FACTS

CONFIG = {"seed": 42, "model": {"name": "vit_att", "method": "recast"}, "dataset": {"name": "digits"}}


def task_file(path: Path, config: dict[str, Any], **record: Any) -> Path:
    """A safetensors file without tensors, whose record holds a configuration."""
    text = json.dumps({"format": 1, "config": config, "bank": None, **FACTS, **record})
    header = json.dumps({"__metadata__": {"recast_exp": text}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    return path


@pytest.mark.parametrize("names", [["${oc.env:HOME}", "b"], ["\udcff", "b"]], ids=["as an interpolation", "no UTF-8"])
def test_classes_may_be_called_anything(names: list[str], tmp_path: Path) -> None:
    assert read_record(task_file(tmp_path / "task.safetensors", CONFIG, classes=names))["classes"] == names


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"classes": ["a\ud800", "b"]}, "whose record is damaged"),
        ({"classes": ["\ud83d", "\ude00"]}, "whose record is damaged"),  # one letter in halves
        ({"invented": 1}, "has the entry 'invented', which this version does not know"),
        ({"input": FACTS["input"] | {"invented": 1}}, "has the entry 'input.invented', which this version does not"),
        ({"classes": ["a", "a"]}, "classes: expected different names"),
    ],
)
def test_records_that_are_refused(record: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read_record(task_file(tmp_path / "task.safetensors", CONFIG, **record))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_what_is_no_file_is_told_from_what_is_not_there(tmp_path: Path) -> None:
    for path, state in ((tmp_path, "is not a file"), (tmp_path / "x", "does not exist")):
        with pytest.raises(MissingInputError, match=f"got {re.escape(str(path))}, which {state}$"):
            read_record(path)


FOREIGN: dict[str, dict[str, Any]] = {
    "logger": {"logger": {"name": "wandb", "mode": "online", "entity": "somebody"}},
    "cache_dir": {"cache_dir": "elsewhere"},
    "data_dir": {"data_dir": "elsewhere"},
    "label": {"label": "a name"},
    "model.weights": {"model": {"weights": "elsewhere.pth"}},
    "dataset.path": {"dataset": {"path": "elsewhere"}},
    "dataset.download": {"dataset": {"download": True}},
    "trainer.max_epochs": {"trainer": {"max_epochs": 3}},
    "search.storage": {"search": {"storage": "elsewhere"}},
    "hydra": {"hydra": {"run": {"dir": "elsewhere"}}},
}


@pytest.mark.parametrize("key", FOREIGN)
def test_a_task_file_sets_only_what_describes_the_model(tmp_path: Path, key: str) -> None:
    path = task_file(tmp_path / "task.safetensors", CONFIG | FOREIGN[key])
    with pytest.raises(UserError, match=f"^task: .*{key}"):
        recorded(path)


@pytest.mark.parametrize(
    "config",
    [
        {"model": {"label": "${oc.env:HOME}"}},
        {"dataset": {"classes": ["a", "${oc.env:HOME}"]}},
        {"adapter": {"name": "peft", "arguments": {"${oc.env:HOME}": 1}}},
        {"recast": {"targets": ["x${recast.num_groups}"]}},
    ],
)
def test_a_task_file_holds_no_interpolation(tmp_path: Path, config: dict[str, Any]) -> None:
    path = task_file(tmp_path / "task.safetensors", CONFIG | config)
    for read in (read_record, read_task):
        with pytest.raises(UserError, match="interpolation"):
            read(path)


@pytest.mark.parametrize("length", [2**40, 2**63, 101_000_000])
def test_a_header_that_is_longer_than_any(tmp_path: Path, length: int) -> None:
    path = tmp_path / "task.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", length))
        file.truncate(min(length, 110_000_000))  # sparse: it takes no room
    with pytest.raises(UserError, match="no safetensors file or is cut short"):
        read_record(path)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("backbone", None),
        ("backbone", {"name": 3, "fingerprint": "x"}),
        ("classes", []),
        ("classes", ["a", "a"]),
        ("classes", "abc"),
        ("input", []),
        ("eval_batch_size", 0),
        ("eval_batch_size", True),
        ("eval_batch_size", 2**40),
        ("templates", {"groups": "x", "solver": None}),
        ("templates", {"groups": [["g", 0, 1, "a"]], "solver": None}),
        ("templates", {"groups": [], "solver": "closed_form"}),
        ("metrics", {"test/accuracy": "high"}),
        ("bank", 7),
        ("format", True),
        ("format", 1.5),
    ],
)
def test_each_entry_of_a_record_is_looked_at(tmp_path: Path, entry: str, value: object) -> None:
    path = task_file(tmp_path / "task.safetensors", CONFIG, **{entry: value})
    with pytest.raises(UserError, match=r"^task: expected") as error:
        read_record(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ['{"format": 1, "x": NaN}', "[" * 100_000, '{"format": 1e999}', '"text"', "9" * 6000])
def test_a_record_that_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "task.safetensors"
    header = json.dumps({"__metadata__": {"recast_exp": text}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(UserError, match="holds no task"):
        read_record(path)


@pytest.mark.parametrize("bank", ["../../somewhere", "a" * 63, "A" * 64, "a" * 64 + "/../b"])
def test_a_bank_is_named_by_its_hash(tmp_path: Path, bank: object) -> None:
    path = task_file(tmp_path / "task.safetensors", CONFIG, bank=bank)
    with pytest.raises(UserError, match="64 hexadecimal digits"):
        read_record(path)


def run_folder(folder: Path, *overrides: str) -> Path:
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text("seed: 42\n")
    (folder / ".hydra" / "overrides.yaml").write_text(json.dumps(list(overrides)))
    return folder


@pytest.mark.parametrize(
    "override",
    [
        "hydra.job_logging.handlers.file.filename=stolen",
        "+hydra.job_logging.handlers.more={class: logging.FileHandler, filename: stolen}",
        "hydra/job_logging=default",
        "hydra.job.env_set.HOME=elsewhere",
        "+dataset@hydra.job_logging=digits",
        "label=${oc.env:HOME}",
        "label=$\\{oc.env:HOME\\}",
        "label='$\\{oc.env:HOME}'",
        "dataset.classes=[$\\{oc.env:HOME\\}]",
        "logger={name: csv, project: '${oc.env:HOME}'}",
        "search={storage: elsewhere/optuna.log, trial: 1}",
        "no override at all",
    ],
)
def test_a_runs_folder_sets_only_keys_of_the_program(tmp_path: Path, override: str) -> None:
    folder = run_folder(tmp_path / "run", "seed=7", override)
    with pytest.raises(UserError, match=r"^resume: "):
        resumed_overrides(folder)


def test_a_runs_own_overrides_are_taken(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", "model=vit_att", "+adapter.rank=2", "launcher=joblib", "seed='7'")
    assert resumed_overrides(folder) == ["training=joint", "model=vit_att", "+adapter.rank=2", "seed='7'"]
    # An older version wrote no objective down, and knew this one only
    (folder / ".hydra" / "config.yaml").write_text("training: {name: through_head}\n", encoding="utf-8")
    assert resumed_overrides(folder)[0] == "model=vit_att"


def test_nothing_of_a_foreign_file_happens(tmp_path: Path) -> None:
    """The two holes that were seen: a task file that chose a tracker and a cache, a run's folder that wrote a file."""
    config = CONFIG | {"label": "${oc.env:HOME}", "logger": {"name": "wandb"}, "cache_dir": str(tmp_path / "made")}
    path = task_file(tmp_path / "task.safetensors", config)
    run = runner(tmp_path / "here")
    done = run("stage=evaluate", f"task={path}")
    assert done.code == 2
    assert not (tmp_path / "made").exists()
    stolen = tmp_path / "stolen.log"
    folder = run_folder(tmp_path / "run", f"hydra.job_logging.handlers.file.filename={stolen}")
    done = run(f"resume={folder}")
    assert done.code == 2
    assert not stolen.exists()
    assert done.files == []


@pytest.mark.parametrize(
    ("pruner", "named"),
    [
        ({"_target_": "os.mkdir", "path": "MADE"}, r"os\.mkdir"),
        ({"_target_": "optuna.storages.journal._file.os.mkdir", "path": "MADE"}, r"os\.mkdir"),
        ({"_target_": "optuna.logging.logging.FileHandler", "filename": "MADE"}, "FileHandler"),
        ({"_target_": "optuna.storages.RDBStorage", "url": "sqlite:///MADE"}, "RDBStorage"),
        ({"_target_": "optuna.pruners._base.abc.ABC"}, r"abc\.ABC"),
        (
            {
                "_target_": "optuna.pruners.PatientPruner",
                "wrapped_pruner": {"_target_": "os.mkdir", "path": "MADE"},
                "patience": 1,
            },
            r"os\.mkdir",
        ),
        ({"_target_": "optuna.pruners.PatientPruner", "_args_": ["x"]}, "options that optuna.pruners.PatientPruner"),
        ({"_target_": "optuna.pruners.PatientPruner", "patience": "${oc.env:HOME}"}, "options that optuna.pruners.P"),
        (None, "None"),
        ([1], "1"),
    ],
)
def test_the_storage_of_a_search_makes_nothing_but_pruners(tmp_path: Path, pruner: Any, named: str) -> None:
    optuna = pytest.importorskip("optuna")
    from recast_exp.search.study import STUDY, _storage, load_trial

    path, made = tmp_path / "optuna.log", tmp_path / "made"
    study = optuna.create_study(study_name=STUDY, storage=_storage(path))
    study.set_user_attr("request", json.loads(json.dumps({"pruner": pruner}).replace("MADE", str(made))))
    study.ask()
    with pytest.raises(UserError, match=named) as error:
        load_trial(str(path), 0)
    assert "\n" not in str(error.value)
    assert not made.exists()


def test_pruners_of_pruners_are_made(tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna")
    from recast_exp.search.study import STUDY, _storage, load_trial

    path = tmp_path / "optuna.log"
    study = optuna.create_study(study_name=STUDY, storage=_storage(path))
    inner = {"_target_": "optuna.pruners.MedianPruner", "n_startup_trials": 3}
    pruner = {"_target_": "optuna.pruners.PatientPruner", "wrapped_pruner": inner, "patience": 1}
    study.set_user_attr("request", {"pruner": pruner})
    study.ask()
    trial = load_trial(str(path), 0)
    assert trial is not None
    assert isinstance(trial.study.pruner, optuna.pruners.PatientPruner)


def test_the_storage_of_a_resumed_trial_is_that_of_its_search(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "search" / "0", f"search.storage={tmp_path}/other.log", "search.trial=0")
    with pytest.raises(UserError, match=r"search\.storage=.*expected optuna\.log beside the folders of the trials"):
        resumed_overrides(folder)
    folder = run_folder(tmp_path / "search" / "1", f"search.storage={tmp_path}/search/optuna.log", "search.trial=1")
    assert f"search.storage={tmp_path}/search/optuna.log" in resumed_overrides(folder)


@pytest.mark.parametrize("backbone", ["hf-hub:evil/x", "HF-HUB:evil/x", "hf_hub:evil/x", "local-dir:/etc"])
def test_a_task_file_chooses_no_repository_and_no_folder(tmp_path: Path, backbone: str) -> None:
    config = CONFIG | {"model": {**CONFIG["model"], "backbone": backbone}}
    path = task_file(tmp_path / "t.safetensors", config)
    [line] = contradictions({"model.backbone": "digits_vit"}, path, [], {})
    assert line.endswith(f"if you trust it, add model.backbone={backbone}")
    assert list(contradictions({"model.backbone": backbone}, path, ["model.backbone"], {})) == []
    done = runner(tmp_path / "r")("stage=evaluate", f"task={path}", "dataset=digits")
    assert done.code == 2
    assert any(f"add model.backbone={backbone}" in line for line in done.err)
    assert done.files == []


@pytest.mark.parametrize("other_images", [False, True])
def test_images_are_decoded_as_those_that_a_task_has_learnt_from(tmp_path: Path, other_images: bool) -> None:
    def decoded(path: Path) -> list[object]:
        found = recorded(path, other_images=other_images)
        return [found[f"dataset.{key}"] for key in ("background", "orient")]

    old = task_file(tmp_path / "old.safetensors", CONFIG)
    assert decoded(old) == ["drop", False]
    new = task_file(
        tmp_path / "new.safetensors", CONFIG, input={**FACTS["input"], "background": "gray", "orient": True}
    )
    assert decoded(new) == ["gray", True]


@pytest.mark.parametrize(
    "argument",
    ["pretrained_cfg_overlay", "pretrained_cfg", "cache_dir", "checkpoint_path", "pretrained", "kwargs_filter"],
)
def test_a_task_file_does_not_say_what_timm_loads(tmp_path: Path, argument: str) -> None:
    model = CONFIG["model"] | {"backbone": "vit_tiny_patch16_224", "arguments": {argument: {"url": "http://x/y.pth"}}}
    path = task_file(tmp_path / "t.safetensors", CONFIG | {"model": model})
    done = runner(tmp_path / "r")("stage=evaluate", f"task={path}")
    assert done.code == 2
    assert any(f"model.arguments.{argument}: expected an argument" in line for line in done.err), done.err
    assert done.files == []


def test_a_pickle_of_hydra_is_not_run(tmp_path: Path) -> None:
    done = runner(tmp_path / "r")("--experimental-rerun", str(tmp_path / "config.pickle"))
    assert done.code == 2
    assert done.err == ["error: --experimental-rerun: expected resume=FOLDER instead, which continues a run"]


@pytest.mark.parametrize("name", ["tensorboard/hparams.yaml", "plots/deep/x.png", "metrics.csv"])
def test_a_link_anywhere_in_a_resumed_run_is_refused(tmp_path: Path, name: str) -> None:
    folder = run_folder(tmp_path / "run")
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"expected the files of a run in .*, got {name}, a link to"):
        resumed_overrides(folder)
    (folder / name).unlink()
    resumed_overrides(folder)


def test_a_task_file_does_not_ask_for_a_huge_model(tmp_path: Path) -> None:
    model = CONFIG["model"] | {"backbone": "vit_tiny_patch16_224", "arguments": {"depth": 10**7}}
    path = task_file(tmp_path / "t.safetensors", CONFIG | {"model": model})
    done = runner(tmp_path / "r")("stage=evaluate", f"task={path}")
    assert done.code == 2
    assert any("model.arguments.depth: expected at most 1024, got 10000000" in line for line in done.err), done.err
