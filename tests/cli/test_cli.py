"""The command line: what is refused, with which line and exit code, and what reaches the stages."""

import json
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recast_exp.cli import main as cli
from recast_exp.cli.check import CommandLine, check
from support.program import Result, runner
from support.task_files import FACTS

HEAVY = ("torch", "lightning", "timm", "torchvision", "sklearn", "torchmetrics", "wandb", "matplotlib")


@pytest.fixture
def program(tmp_path: Path) -> Callable[..., Result]:
    return runner(tmp_path / "cwd")


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("RECAST_EXP_DATA", raising=False)
    return folder


def options(folder: Path, **experiments: str) -> str:
    """Write a folder of a user's own experiments."""
    (folder / "mine" / "experiment").mkdir(parents=True)
    for name, text in experiments.items():
        (folder / "mine" / "experiment" / f"{name}.yaml").write_text(f"# @package _global_\n{text}\n")
    return str(folder / "mine")


def task_file(path: Path, config: Any, version: Any = 1, key: str = "recast_exp") -> str:
    """Write a task file with one tensor."""
    record = json.dumps({"format": version, "config": config, "bank": None, **FACTS})
    tensor = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header = json.dumps({"__metadata__": {key: record}, "coefficients": tensor}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    return str(path)


TRAINED = {
    "seed": 7,
    "model": {"name": "vit_mlp", "method": "recast", "family": "vit", "backbone": "digits_vit"},
    "recast": {"targets": ["*.mlp.fc1", "*.mlp.fc2"], "num_groups": 6, "num_templates": 2},
    "dataset": {"name": "digits", "part": "target"},
}


def lines(*argv: str) -> tuple[list[str], list[str]]:
    """The lines of a check: what is wrong, what is missing."""
    multirun = "-m" in argv
    found = check(CommandLine(tuple(arg for arg in argv if arg != "-m"), multirun=multirun))
    return found.wrong, found.missing


# One line for each kind of mistake

MISTAKES = [
    ("model=vit_at", "model: expected one of vit_att, .*, got 'vit_at'; did you mean vit_att?"),
    ("model=", "model: expected one of recast, resnet, .*, got nothing"),
    ("model=null", "model: expected one of .*, got 'null'"),
    ("model=[vit_att,vit_mlp]", "model: expected one option, got the list [vit_att,vit_mlp]; for a sweep write -m .*"),
    (
        "model=vit_att,vit_mlp",
        "model: expected a single value, got vit_att,vit_mlp; add -m to run a job for each value",
    ),
    ("vit_att", "vit_att: expected key=value or group=option, got no value; did you mean model=vit_att?"),
    ("nonsense", "nonsense: expected key=value or group=option, got no value"),
    ("mod el=vit_att", "mod el=vit_att: expected key=value or group=option"),
    ("optimzer.lr=0.1", "optimzer.lr: unknown key; did you mean optimizer.lr?"),
    ("modle=vit_att", "modle: unknown key; did you mean model?"),
    ("epochs=3", "epochs: unknown key; did you mean trainer.max_epochs?"),
    ("tasks=[cub]", "tasks: unknown key; did you mean stage.tasks?"),
    ("rank=8", "rank: unknown key; did you mean adapter.rank or stage.rank?"),
    ("lr=0.1", "lr: unknown key; did you mean mimicry.lr or optimizer.lr?"),
    ("zzz.qqq=1", "zzz.qqq: unknown key; `--cfg job` prints all keys"),
    ("trainer.max_epochs=abc", "trainer.max_epochs: expected an integer ≥ 1 and ≤ 1000000, got 'abc'"),
    ("trainer.max_epochs=2.5", "trainer.max_epochs: expected an integer ≥ 1 and ≤ 1000000, got 2.5"),
    ("trainer.max_epochs=0", "trainer.max_epochs: expected an integer ≥ 1 and ≤ 1000000, got 0"),
    ("trainer.max_epochs=null", "trainer.max_epochs: expected an integer ≥ 1 and ≤ 1000000, got null"),
    ("trainer.max_epochs=true", "trainer.max_epochs: expected an integer ≥ 1 and ≤ 1000000, got true"),
    ("trainer.max_epochs=[1]", "trainer.max_epochs: expected an integer ≥ 1 and ≤ 1000000, got [1]"),
    (
        "trainer.max_epochs=${nope}",
        "trainer.max_epochs: expected an integer ≥ 1 and ≤ 1000000, got ${nope}, but .*nope' not found",
    ),
    (
        "trainer.max_epochs=${data_dir}",
        "trainer.max_epochs: expected an integer ≥ 1 and ≤ 1000000, got ${data_dir}, but .*",
    ),
    ("optimizer.lr=-1", "optimizer.lr: expected a number > 0, got -1"),
    ("optimizer.lr=nan", "optimizer.lr: expected a number > 0, got nan"),
    ("optimizer.lr=inf", "optimizer.lr: expected a number > 0, got inf"),
    ("optimizer.nesterov=maybe", "optimizer.nesterov: expected true or false, got 'maybe'"),
    ("optimizer=5", "optimizer: expected one of adam, adamw, sgd, got '5'"),
    ("optimizer={lr:-1}", "optimizer.lr: expected a number > 0, got -1"),
    ("optimizer={rl:1}", "optimizer.rl: unknown key; .*"),
    ("optimizer.name=lion", "optimizer.name: expected one of adamw, adam, sgd, got 'lion'"),
    ("recast=5", "recast: expected its keys to be set one by one (recast.targets, .*), got 5"),
    ("recast.targets=*.qkv", "recast.targets: expected a list of strings or null, got '*.qkv'"),
    (
        "recast.targets=a,b",
        "recast.targets: expected a single value, got a,b; add -m .*, or write recast.targets=[a,b] for a list",
    ),
    ("recast.targets=[]", "recast.targets: expected at least one pattern, or null for every layer, got an empty list"),
    ("model.backbone={a:1}", "model.backbone: expected a string or null, got {'a': 1}"),
    ("model.img_size=4", "model.img_size: expected an integer ≥ 8 and ≤ 4096 or null, got 4"),
    ("model.mean=[0.5]", "model.mean and model.std: expected both or neither, got one of them"),
    ("seed=abc", "seed: expected an integer ≥ 0 and < 4294967296, got 'abc'"),
    ("seed=-1", "seed: expected an integer ≥ 0 and < 4294967296, got '-1'"),
    ("seed=1.5", "seed: expected an integer ≥ 0 and < 4294967296, got '1.5'"),
    ("seed=4294967296", "seed: expected an integer ≥ 0 and < 4294967296, got '4294967296'"),
    ("seed=1,2", "seed: expected a single value, got 1,2; add -m to run a job for each value"),
    ("seed=[1,2]", "seed: expected a single value, got 1,2; add -m to run a job for each value"),
    ("seed=range(1,3)", "seed: expected a single value, got 1,2; add -m to run a job for each value"),
    ("data_dir=", "data_dir: expected a path, got nothing"),
    ("+optimizer.lr=1", "+optimizer.lr: the key is there already; write optimizer.lr=... without the +"),
    ("++optimizer.lr=1", "++optimizer.lr: the key is there already; write optimizer.lr=... without the +"),
    ("+model=vit_mlp", "+model: the group is there already; write model=... without the +"),
    ("+foo=1", "foo: unknown key; .*"),
    (
        "~optimizer.lr",
        "~optimizer.lr: every key is needed and none can be deleted; set another value: optimizer.lr=...",
    ),
    ("~model", "~model: every key is needed and none can be deleted; set another value: model=..."),
    ("hydra.foo=1", "hydra.foo: Key 'foo' not in 'HydraConf'; --cfg hydra shows what there is"),
    ("hydra.run=null", "hydra.run: field 'hydra.run' is not Optional; --cfg hydra shows what there is"),
    ("hydra.run.dir=???", "hydra.run.dir: expected a value, got .*"),
    ("hydra/launcher=slurm", "hydra/launcher: expected one of .*, got 'slurm'"),
    ("experiment=foo", "experiment: expected one of .*, got 'foo'; --config-dir DIR adds those of DIR/experiment/"),
    ("trainer.devices=2", "trainer.devices: expected trainer=ddp for 2 devices, got strategy=auto"),
    (
        "task=x",
        "task: expected nothing with stage=adapt, got 'x'; did you mean stage=evaluate, export, merge, predict or "
        "publish?",
    ),
    ("stage.name=nope", "stage.name: expected one of adapt, check, .*, got 'nope'.*"),  # D3: made a folder, then failed
    ("stage=evaluate", "task: expected a task file .* with stage=evaluate, got nothing"),
    ("dataset.name=nope", "dataset.name: expected one of .*, got 'nope'"),
]


def matches(pattern: str, line: str) -> bool:
    """Whether `line` is `pattern`, in which only `.*` is not literal."""
    return re.fullmatch(".*".join(map(re.escape, pattern.split(".*"))), line) is not None


@pytest.mark.parametrize(("typed", "pattern"), MISTAKES)
def test_each_mistake_has_one_line(
    typed: str, pattern: str, capsys: pytest.CaptureFixture[str], empty_folder: Path
) -> None:
    assert cli.run([typed]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert matches(f"error: {pattern}", line), line
    assert not list(empty_folder.iterdir())


@pytest.mark.parametrize(
    ("argv", "pattern"),
    [
        (["--epochs=3"], "--epochs=3: unknown flag; keys have no dashes: trainer.max_epochs=3"),
        (["--frobnicate"], "--frobnicate: unknown flag; see --help"),
        (["--help", "--frobnicate"], "--frobnicate: unknown flag; see --help"),
        (["--cfg", "foo"], "argument --cfg/-c: invalid choice: 'foo' .*; see --help"),
        (["--config-dir"], "argument --config-dir/-cd: expected one argument; see --help"),
        (
            ["--config-dir", "nope"],
            "--config-dir: expected a folder with your own options, got nope, which is not there",
        ),
        (["--config-name", "nope"], "Cannot find primary config 'nope'. Check that it's in your config search path."),
        (["--cfg", "job", "-m"], "--multirun and --cfg are mutually exclusive"),
        (["--resolve"], "--resolve: expected together with --cfg (--cfg job --resolve), got it alone"),
        (["stage=compare", "stage.seeds=[]"], "stage.seeds: expected at least one seed, got an empty list"),
        (["stage=compare", "stage.draws=[]"], "stage.draws: expected at least one draw, got an empty list"),
        (
            ["trainer.max_epochs=6", "trainer.validate_every=4"],
            "trainer.validate_every: expected a divisor of trainer.max_epochs=6, got 4",
        ),
        (
            ["stage=compare", "stage.tune_seeds=2"],
            "stage.tune_seeds: expected 1 without stage.tune, as nothing is tried, got 2",
        ),
        (["stage=compare", "stage.tune_seeds=4"], "stage.tune_seeds: expected at most the 3 of stage.seeds, got 4"),
        (["-m", "seed=1,-2"], "seed: expected an integer ≥ 0 and < 4294967296, got '-2'"),
        (["-m", "seed=[]"], "seed: expected one option, got the list []; .*"),
        (["-m", "seed=range(3,1)"], "seed: expected at least one value, got range(3,1), which is empty"),
        (["-m", "seed=range(0,1000000)"], "-m: expected at most 10000 jobs, got 10001 or more; split the sweep"),
        (
            ["-m", "optimizer.lr=interval(0,1)"],
            "optimizer.lr: expected comma-separated values or .*, got interval(0,1); search=optuna searches intervals",
        ),
        (["-m", "trainer=ddp"], "trainer.strategy: expected auto in a sweep, got ddp, .*"),
        (["-m", "hydra.run.dir=a,b", "seed=x"], "seed: expected an integer .*, got 'x'"),
    ],
)
def test_mistakes_of_flags_and_sweeps(
    argv: list[str], pattern: str, capsys: pytest.CaptureFixture[str], empty_folder: Path
) -> None:
    assert cli.run(argv) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert matches(f"error: {pattern}", line), line
    assert not list(empty_folder.iterdir())


def test_five_mistakes_at_once(program: Callable[..., Result]) -> None:
    typed = ["model=vit_at", "optimzer.lr=1", "trainer.max_epochs=abc", "optimizer.lr=-1", "trainer.devices=2"]
    result = program(*typed)
    keys = [line.removeprefix("error: ").partition(":")[0] for line in result.err]
    assert keys == ["model", "optimzer.lr", "trainer.max_epochs", "optimizer.lr", "trainer.devices"]
    assert (result.code, result.out, result.files) == (2, "", [])


def test_consequences_of_a_mistake_are_not_reported() -> None:
    wrong, _ = lines("stage=evaluat", "task=x")
    assert len(wrong) == 1
    wrong, _ = lines("model=recst", "model.mean=[1,2]", "model.std=[1]")
    assert [line.partition(":")[0] for line in wrong] == ["model", "model.mean"]


def test_missing_inputs_come_together_and_before_anything_is_made(
    capsys: pytest.CaptureFixture[str], empty_folder: Path
) -> None:
    assert cli.run(["dataset=cub", "model.weights=no weights=é.pth", "bank=nope", "resume=gone"]) == 3
    keys = [line.removeprefix("error: ").split(":")[0] for line in capsys.readouterr().err.splitlines()]
    assert keys[:3] == ["resume", "model.weights", "bank"]
    assert "cub" in keys[3]
    assert cli.run(["dataset=cub", "optimizer.lr=0"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2
    assert not list(empty_folder.iterdir())


# Sweeps


def test_a_line_of_a_sweep_names_its_cause() -> None:
    wrong, _ = lines(
        "-m", "model=vit_att,vit_frozen", "trainer.max_epochs=3,5", "scheduler.warmup_epochs=4", "seed=1,2"
    )
    [line] = wrong
    assert line == "scheduler.warmup_epochs: expected less than trainer.max_epochs=3, got 4"
    wrong, _ = lines("-m", "model=vit_att,vit_frozen", "seed=1,2", "bank=nope")
    assert wrong == [
        "bank: expected none with model=vit_frozen, which has no templates, got a file; leave it out",
    ]
    wrong, _ = lines("-m", "model.weights=x,null", "seed=1,2", "model.pretrained=false")
    assert wrong == [
        "model.pretrained: expected true together with model.weights, got false; leave one of them out "
        "(where model.weights=x)"
    ]


def test_every_job_of_a_sweep_is_composed() -> None:
    found = check(CommandLine(("model=vit_att,resnet", "seed=42,7", "trainer.max_epochs=choice(1,2)"), multirun=True))
    assert (found.wrong, found.missing) == ([], [])
    jobs = [
        (each.settings.model.name, each.settings.model.backbone, each.settings.seed, each.settings.trainer.max_epochs)
        for each in found.jobs
    ]
    assert jobs == [
        (model, backbone, seed, epochs)
        for model, backbone in (("vit_att", "digits_vit"), ("resnet", "digits_resnet"))
        for seed in (42, 7)
        for epochs in (1, 2)
    ]


def test_globs_of_options() -> None:
    found = check(CommandLine(("model=glob([vit_att*,vit_fr*,vit_mlp])",), multirun=True))
    assert [each.settings.model.name for each in found.jobs] == ["vit_att", "vit_att_mlp", "vit_frozen", "vit_mlp"]


# A user's own options


def test_own_experiments(empty_folder: Path) -> None:
    own = options(
        empty_folder,
        good='defaults:\n  - override /seed: "5"\n  - override /model: vit_mlp\ntrainer: {max_epochs: 4}',
        sweep="hydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      seed: 1,2\n      trainer.max_epochs: 3,4",
    )
    found = check(CommandLine(("experiment=good",), config_dir=own))
    assert (found.wrong, found.missing) == ([], [])
    cfg = found.jobs[0].settings
    assert (cfg.seed, cfg.model.name, cfg.trainer.max_epochs) == (5, "vit_mlp", 4)

    found = check(CommandLine(("experiment=sweep",), config_dir=own))
    assert [(each.settings.seed, each.settings.trainer.max_epochs) for each in found.jobs] == [
        (1, 3),
        (1, 4),
        (2, 3),
        (2, 4),
    ]
    assert any(text.startswith("hydra.sweeper.params.seed=") for text in found.overrides)

    found = check(CommandLine(("experiment=good,null",), config_dir=own, multirun=True))
    assert [each.settings.model.name for each in found.jobs] == ["vit_mlp", "vit_att"]


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        (
            "trainer: {max_epochs: abc}",
            "trainer.max_epochs: expected an integer ≥ 1 and ≤ 1000000, got 'abc' (in experiment/mine.yaml)",
        ),
        ("trainer: {max_epoch: 4}", "trainer.max_epoch: unknown key; did you mean .*? (in experiment/mine.yaml)"),
        ("trainer: {max_epochs: -4}", "trainer.max_epochs: expected an integer ≥ 1 and ≤ 1000000, got -4"),
        ("defaults: [{override /model: vit_at}]", "model: expected one of .*, got 'vit_at'; did you mean vit_att?"),
        ("trainer: [", ".*mine.yaml: line .*"),
        ("optimizer: [1, 2]", "experiment/mine.yaml: expected sections and their keys (Merge error: list .*)"),
    ],
)
def test_mistakes_in_own_experiments(text: str, pattern: str, empty_folder: Path) -> None:
    found = check(CommandLine(("experiment=mine",), config_dir=options(empty_folder, mine=text)))
    [line] = found.wrong
    assert matches(pattern, line), line


# Task files


def test_a_task_file_brings_its_configuration(tmp_path: Path) -> None:
    task = task_file(tmp_path / "été = 1.safetensors", TRAINED)
    for more in (
        (),
        ("seed=7",),
        ("model=vit_mlp", "dataset=digits"),
        ("recast.num_groups=6", "trainer.precision=32-true"),
    ):
        found = check(CommandLine(("stage=evaluate", f"task={task}", *more)))
        assert (found.wrong, found.missing) == ([], []), more
        cfg = found.jobs[0].settings
        assert (cfg.seed, cfg.model.name, list(cfg.recast.targets)) == (7, "vit_mlp", ["*.mlp.fc1", "*.mlp.fc2"])


def test_contradictions_of_a_task_file_are_refused(tmp_path: Path, empty_folder: Path) -> None:
    task = task_file(tmp_path / "task.safetensors", TRAINED)
    typed = ("stage=evaluate", f"task={task}", "model=resnet", "seed=3", "dataset.part=source", "recast.num_groups=3")
    wrong, _ = lines(*typed)
    where = f"with which the task file {task} was trained"
    assert wrong == [
        f"seed: expected 7, {where}, got 3; leave it out",
        f"dataset.part: expected 'target', {where}, got 'source'; leave it out",
        f"recast.num_groups: expected 6, {where}, got 3; leave it out",
        f"model.name: expected 'vit_mlp', {where}, got 'resnet'; leave model=resnet out",
    ]
    own = options(empty_folder, mine="defaults:\n  - override /model: resnet")
    found = check(CommandLine(("stage=evaluate", f"task={task}", "experiment=mine"), config_dir=own))
    assert found.wrong == [f"model.name: expected 'vit_mlp', {where}, got 'resnet'; leave model=resnet out"]


def test_damaged_task_files(tmp_path: Path) -> None:
    whole = Path(task_file(tmp_path / "whole", TRAINED)).read_bytes()
    (tmp_path / "cut header").write_bytes(whole[:60])
    (tmp_path / "cut tensors").write_bytes(whole[:-1])
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text").write_text("hello")
    task_file(tmp_path / "other", TRAINED, key="other")
    task_file(tmp_path / "newer", None, version=99)
    task_file(tmp_path / "unknown key", {"model": {"colour": 1}})
    task_file(tmp_path / "wrong type", {"model": {"pretrained": [1]}})
    task_file(tmp_path / "not a record", [1])
    expected = {
        "cut header": "is no safetensors file or is cut short",
        "cut tensors": "is cut short",
        "empty": "is no safetensors file or is cut short",
        "text": "is no safetensors file or is cut short",
        "other": "holds no task",
        "newer": "has format 99, this version reads up to 2",
        "unknown key": "holds the key model.colour, which this version does not know",
        "wrong type": "holds model.pretrained=[1], which this version does not accept",
        "not a record": "config: expected a mapping, got a list",
    }
    for name, what in expected.items():
        wrong, missing = lines("stage=evaluate", f"task={tmp_path / name}")
        assert len(wrong) == 1 and not missing, name
        assert what in wrong[0] and str(tmp_path / name) in wrong[0]
    assert lines("stage=evaluate", f"task={tmp_path}/gone")[1] == [
        f"task: expected the task.safetensors of a run, got {tmp_path}/gone, which does not exist"
    ]


# The whole program


def test_help_and_configuration_import_nothing_heavy(program: Callable[..., Result]) -> None:
    result = program("--help", "model=nonsense")
    assert (result.code, result.err, result.files) == (0, [], [])
    assert "vit_att_mlp" in result.out and "adamw" in result.out and "$" not in result.out

    result = program("--cfg", "job", "seed=7", "dataset=cub", "data_dir=a b=é")
    assert (result.code, result.err, result.files) == (0, [], [])
    assert "seed: 7" in result.out and "data_dir: a b=é" in result.out

    code = (
        "import sys; from recast_exp.cli import main as cli; "
        "cli.run(['model=nope', 'stage=evaluate', 'task=x', 'dataset=cub']);"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


def test_a_run(program: Callable[..., Result]) -> None:
    path = "a b=c,[d] l'été"
    result = program("model=vit_mlp", "seed=7", f"data_dir={path}", "trainer.max_epochs=3", stage=True)
    assert (result.code, result.err) == (0, ["at work"])
    [job] = result.jobs
    assert (job["model"], job["seed"], job["data_dir"], job["epochs"]) == ("vit_mlp", 7, path, 3)
    assert Path(job["run_dir"]).parts[-3] == "outputs"
    made = [name.split("/", 3)[-1] for name in result.files if name.count("/") > 2]
    assert made == [".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml", "recast_exp.log"] or set(
        made
    ) >= {
        ".hydra/config.yaml",
        "recast_exp.log",
    }
    log = (Path(job["run_dir"]) / "recast_exp.log").read_text()
    assert re.search(r"^\d{4}-.* INFO recast_exp.stages: at work\n", log, re.MULTILINE)


def test_the_home_folder_in_files(
    program: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As shells write it out in what is typed."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    own = tmp_path / "mine"
    own.mkdir()
    text = "defaults: [config, _self_]\nhydra: {run: {dir: ~/one}, sweep: {dir: ~/several}}\n"
    (own / "mine.yaml").write_text(text.replace("~/one", "'~/one'").replace("~/several", "'~/several'"))
    for words, place in (((), "one"), (("-m", "seed=0,1"), "several/0")):
        done = program("--config-dir", str(own), "--config-name", "mine", *words, stage=True)
        assert done.code == 0, done.stderr
        assert (tmp_path / "home" / place / "metrics.json").is_file()


def test_info_is_of_requests_that_there_are() -> None:
    for wrong in ("=3", "nope=3", "model=nope"):
        assert cli.run(["--info", "defaults", wrong]) == 2


def test_a_sweep(program: Callable[..., Result]) -> None:
    result = program("-m", "model=vit_att,resnet", "seed=range(41,43)", "data_dir=a b,c=d", stage=True)
    assert result.code == 0
    assert [(job["model"], job["seed"], job["data_dir"]) for job in result.jobs] == [
        (model, seed, path) for model in ("vit_att", "resnet") for seed in (41, 42) for path in ("a b", "c=d")
    ]
    folders = [Path(job["run_dir"]) for job in result.jobs]
    assert [folder.name for folder in folders] == [str(number) for number in range(8)]
    assert len({folder.parent for folder in folders}) == 1
    assert folders[0].parts[-4] == "multirun"


@pytest.mark.parametrize(
    ("seed", "code", "line"),
    [
        (102, 2, "error: some.key: expected 2, got 1"),
        (103, 3, "error: some.file: is not there"),
        (130, 130, "interrupted"),
    ],
)
def test_failures_of_a_run(seed: int, code: int, line: str, program: Callable[..., Result]) -> None:
    result = program(f"seed={seed}", stage=True)
    assert (result.code, result.err) == (code, ["at work", line])


def test_a_bug_keeps_its_traceback(program: Callable[..., Result]) -> None:
    result = program("seed=101", stage=True)
    assert result.code == 1
    assert result.err.count("Traceback (most recent call last):") == 1
    assert "ValueError: a bug" in result.err
    assert not any("HYDRA_FULL_ERROR" in line for line in result.err)
    [job] = result.jobs
    assert "ValueError: a bug" in (Path(job["run_dir"]) / "recast_exp.log").read_text()


def test_a_sweep_goes_on_after_a_failure(program: Callable[..., Result]) -> None:
    result = program("-m", "seed=102,1,103,101,2", stage=True)
    assert [job["seed"] for job in result.jobs] == [102, 1, 103, 101, 2]
    assert result.code == 3
    assert result.err.count("error: some.key: expected 2, got 1") == 1
    assert result.err.count("error: some.file: is not there") == 1
    assert result.err.count("ValueError: a bug") == 1


def test_resuming_a_run(program: Callable[..., Result]) -> None:
    folder = "my run=1"
    assert program("seed=7", "trainer.max_epochs=3", f"hydra.run.dir={folder}", stage=True).code == 0
    before = program("--help").files
    result = program(f"resume={folder}", "trainer.max_epochs=3", stage=True)
    assert (result.code, result.err, result.files) == (0, ["at work"], before)
    [job] = result.jobs
    assert (job["seed"], job["epochs"], Path(job["run_dir"]).name) == (7, 3, folder)

    # D5: where the data is, how it is loaded and who follows decide no result, so they may change
    moved = (
        "data_dir=elsewhere",
        "cache_dir=c",
        "dataset.num_workers=1",
        "dataset.pin_memory=false",
        "logger=tensorboard",
    )
    result = program(f"resume={folder}", *moved, stage=True)
    assert (result.code, result.err) == (0, ["at work"])
    assert result.jobs[0]["data_dir"] == "elsewhere"

    result = program(f"resume={folder}", "trainer.max_epochs=4", "model=vit_mlp", stage=True)
    assert result.code == 2
    end = "; resume with the original settings"
    assert all(text.endswith(end) for text in result.err)
    where = f"with which the run in {folder} was started"
    assert [text.removesuffix(end) for text in result.err] == [
        f"error: model.name: expected 'vit_att', {where}, got 'vit_mlp'",
        f"error: recast.targets: expected ['*.attn.qkv'], {where}, got ['*.mlp.fc1', '*.mlp.fc2']",
        f"error: trainer.max_epochs: expected 3, {where}, got 4",
    ]
    assert program("-m", f"resume={folder}", "seed=1,2", stage=True).err == [
        "error: resume: expected a single run, got a sweep; leave out -m"
    ]


def test_two_runs_of_one_second_have_two_folders(program: Callable[..., Result]) -> None:
    result = program("--cfg", "hydra", "--package", "hydra.run", "--resolve")
    other = program("--cfg", "hydra", "--package", "hydra.run", "--resolve")
    assert re.search(r"dir: outputs/[\d-]+/[\d-]+-[0-9a-f]{6}$", result.out.strip())
    assert result.out[-7:] != other.out[-7:]
