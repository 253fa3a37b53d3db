"""The table of bad inputs. Each is one case: what is typed or called, the exit code, and what the one line says."""

from __future__ import annotations

import io
import json
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import nn

import recast_exp
from attack.materials import Materials, header
from recast_exp.config.schema import fields
from recast_exp.data.unpack import extract
from recast_exp.models.loading import load_task
from recast_exp.recast import Banks
from recast_exp.runs import layout

Typed = Callable[[Materials], Sequence[object]]


@dataclass(frozen=True)
class Case:
    """A bad input.

    Attributes:
        kind: Its group in the table.
        name: What is wrong.
        typed: The arguments of the command line.
        call: Or a call of the library.
        code: The exit code of the command line.
        says: A part of the one line.
    """

    kind: str
    name: str
    says: str
    typed: Typed | None = None
    call: Callable[[Materials], object] | None = None
    code: int = 2


def typed(kind: str, says: str, *arguments: str, code: int = 2) -> Case:
    return Case(kind, " ".join(arguments) or "nothing", says, lambda _: arguments, code=code)


# The command line


def of_keys() -> Iterator[Case]:
    """Every key: a value of another type, one out of range, and a name that is nearly right."""
    for name, field in fields():
        kind = str(field.type)
        if (
            any(text in kind for text in ("int", "float", "bool"))
            or "choices" in field.metadata
            or kind.startswith(("list", "dict"))
        ):
            yield typed("keys", f"{name}: ", f"{name}=nonsense")
        for bound, factor in (("ge", -1), ("gt", -1), ("le", 1), ("lt", 1)):
            if bound in field.metadata and ("int" in kind or "float" in kind) and "list" not in kind:
                value = field.metadata[bound] + factor * (1 + abs(field.metadata[bound]))
                yield typed("keys", f"{name}: ", f"{name}={value:.0f}")
        if "float" in kind and "list" not in kind:
            yield typed("keys", f"{name}: ", f"{name}=nan")
        if "." in name and "dict" not in kind:
            yield typed("unknown keys", f"{name}x", f"{name}x=1")


def of_words() -> Iterator[Case]:
    kind = "words"
    yield typed(kind, "model: expected one of", "model=vit_atx")
    yield typed(kind, "dataset: expected one of", "dataset=digit")
    yield typed(kind, "adapter: expected one of", "adapter=lora")
    yield typed(kind, "stage: expected one of", "stage=train")
    yield typed(kind, "head: expected one of", "head=svm")
    yield typed(kind, "optimizer: expected one of", "optimizer=lion")
    yield typed(kind, "training: expected one of", "training=jointly")
    yield typed(kind, "--modle", "--modle=vit")
    yield typed(kind, "model", "model")
    yield typed(kind, "expected KEY=VALUE", "=3")
    yield typed(kind, "expected KEY=VALUE", "@training=joint")
    yield typed(kind, "seed", "seed=-1")
    yield typed(kind, "seed", "seed=1.5")
    yield typed(kind, "seed", "seed=4294967296")
    yield typed(kind, "seed", f"seed={'9' * 6000}")
    yield typed(kind, "seed", "seed=1,2")
    yield typed(kind, "seed: expected each value once", "-m", "seed=1,1")
    yield typed(kind, "expected at most 10000 jobs", "-m", "seed=range(1,100000)")
    yield typed(kind, "optimizer.lr", "optimizer.lr=1e-3,1e-2")
    yield typed(kind, "model.backbone: expected a timm model", "model.backbone=vit_smal_patch16_224")
    yield typed(kind, "model.backbone: expected", "model.backbone=local-dir:nowhere", code=3)
    yield typed(kind, "model.backbone: expected", "model.backbone=other:x/y")
    yield typed(kind, "model.arguments.depht: unknown argument", "model.arguments.depht=2")
    yield typed(kind, "adapter", "adapter=melo", "adapter.rank=0")
    for rank in (10**6, 2**62):
        yield typed(kind, "adapter: expected at most", "adapter=melo", f"adapter.rank={rank}")
    yield typed(kind, "training.strength: expected a number ≥ 1e-09", "training.strength=1e-30")
    yield typed(kind, "adapter.method: expected one of", "adapter=peft", "adapter.method=LORE")
    yield typed(kind, "adapter.arguments.bias", "adapter=peft", "adapter.arguments.bias=all")
    yield typed(kind, "adapter: clr does not fit", "adapter=clr")
    yield typed(kind, "recast.targets", "recast.targets=[nowhere]")
    yield typed(kind, "recast.num_groups", "recast.num_groups=1000")
    yield typed(kind, "recast.num_templates", "recast.num_templates=1000")
    yield typed(kind, "recast.templates: expected one of", "recast.templates=magic")
    yield typed(kind, "recast.mixing: expected sum", "recast.mixing=gated")
    yield typed(kind, "recast.num_templates: expected at most 64", "model=vit_random", "recast.num_templates=65")
    yield typed(kind, "recast.num_templates", "model=vit_lora_xs", "recast.num_templates=100000")
    yield typed(kind, "recast.tasks: expected task files", "model=vit_tasks")
    yield typed(kind, "recast.tasks: expected none", "recast.tasks=[x.safetensors]")
    yield typed(kind, "recast.tasks: task: expected hf://owner/name", "model=vit_tasks", "recast.num_templates=null", "recast.tasks=[hf://a]")  # fmt: skip  # noqa: E501
    yield typed(kind, "recast.tasks: expected a file", "model=vit_tasks", "recast.tasks=[nowhere]", code=3)
    yield typed(kind, "head.views: expected an integer ≥ 0 and ≤ 1000", "head.views=1000000")
    yield typed(kind, "training.splits: expected an integer ≥ 1 and ≤ 1000", "training.splits=1000000")
    yield typed(kind, "search.storage: nowhere is not there", "search.storage=nowhere", "search.trial=3")
    yield Case(
        kind, "a storage that is none", "search.storage: expected the storage of a search",
        lambda at: [f"search.storage={at.file('log', b'x')}", "search.trial=3"],
    )  # fmt: skip
    for heads in ("[nope]", "[lda,lda]", "[best]", "[linear]"):
        yield typed(kind, "head.heads: expected some of lda, logistic, nearest_mean, ridge", f"head.heads={heads}")
    for model in (("model=resnet", "model.batchnorm_statistics=update"), ("model=resnet_full",)):
        model = (*model, "model.img_size=32")  # maps of one pixel in the last stage
        yield typed(kind, "dataset.batch_size: expected at least 2", *model, "training=joint", "dataset.batch_size=1")
    yield typed(kind, "mimicry: expected closed_form", "model=vit_random", "mimicry=gradient")
    yield typed(kind, "stage.solvers: expected some of", "stage=reconstruct", "stage.solvers=[magic]")
    yield typed(kind, "stage.dtypes: expected some of", "stage=reconstruct", "stage.dtypes=[int4]")
    yield typed(kind, "stage.sizes: expected integers", "stage=reconstruct", "stage.sizes=[0]")
    yield typed(kind, "stage.sweep: expected false", "stage=reconstruct", "stage.sweep=true", "model=vit_random")
    yield typed(kind, "stage.sizes: expected at most 2", "stage=reconstruct", "stage.sweep=true", "stage.sizes=[1,99]")
    yield typed(kind, "stage.splits: expected at most 2", "stage=sequence", "stage.splits=5")
    yield typed(kind, "at least two of its 5 classes", "stage=sequence", "stage.tasks=['digits[0:0]','digits[0:2]']")
    yield typed(kind, "at least two of its 5 classes", "stage=sequence", "stage.tasks=['digits[0:2]','digits[2:3]']")
    yield typed(kind, "stage.sizes: expected each value once", "stage=reconstruct", "stage.sizes=[1,1]")
    yield typed(kind, "stage.seeds: expected each seed once", "stage=compare", "stage.seeds=[1,1]")
    yield typed(kind, "stage.draws: expected each draw once", "stage=compare", "stage.draws=[1,1]")
    yield typed(kind, "stage.seeds: expected an integer", "stage=compare", "stage.seeds=[-1]")
    yield typed(kind, "stage.draws: expected an integer", "stage=compare", "stage.draws=[4294967296]")
    yield typed(kind, "stage.seeds: expected none", "stage=compare", "stage.seeds=[1]", "stage.draws=[0]")
    yield typed(kind, "method: expected none", "stage=compare", "method=recast_att")
    yield typed(kind, "also adapter=", "stage=compare", "experiment=recast_melo")
    for values in ("optimizer.lr=range(1,3,0)", "optimizer.name=glob(*)", "~optimizer.lr=0.1"):
        yield typed(kind, "stage.tune: expected", "stage=compare", f"stage.tune=['{values}']")
    tuned = "stage.tune=[optimizer.lr=0.1,optimizer.lr=0.3]"
    yield typed(kind, "optimizer.lr more than once", "stage=compare", tuned)
    for value in ("abc", "'1,2'", "interval(0,1)"):
        text = f"optimizer.lr={value}".replace("'", "")
        yield typed(kind, "stage.more: a: optimizer.lr", "stage=compare", f"stage.more={{a: '{text}'}}")
        yield typed(kind, "optimizer.lr", "stage=sequence", f"stage.tasks=['digits[0:2] {text}','digits[2:5]']")
    yield typed(kind, "with stage=sequence", "stage=sequence", "stage.splits=2", "resume=somewhere")
    for project in ("a/b", "x" * 129):
        says = "logger.project: expected a name that W&B takes"
        yield typed(kind, says, "logger=wandb", "logger.mode=offline", f"logger.project={project}")
    for tracker in ("csv", "none", "tensorboard", "wandb"):
        yield typed(kind, "logger.options.a: expected no options", f"logger={tracker}", "logger.options={a: 1}")
    yield typed(kind, "hydra.job.chdir: expected false", "hydra.job.chdir=true")
    for repository in ("a/b.git", "a/b--c", "a/b..c", "ü/ö", "a/" + "b" * 300):
        yield Case(
            kind,
            f"publish to {repository[:9]}",
            "stage.repo: expected",
            lambda at, r=repository: ["stage=publish", f"task={at.copy('task.safetensors')}", f"stage.repo={r}"],
        )
    yield typed(kind, "stage.more: a: expected overrides", "stage=compare", "stage.more={a: 'model=vit_att \\'x'}")
    yield typed(
        kind,
        "model.label: expected one of its own",
        "stage=compare",
        "model.label='linear probe'",
        "stage.methods=['*']",
    )
    yield typed(
        kind, "stage.tasks: expected a dataset", "stage=sequence", f"stage.tasks=['digits[0:{'9' * 5000}]',digits]"
    )
    yield typed(kind, "hydra.job.name: expected", "hydra.job.name=a/b")
    yield typed(kind, "task: expected", "stage=merge")
    yield Case(
        kind,
        "merge one file twice",
        "more than once",
        lambda at: ["stage=merge", f"task=[{at.copy('task.safetensors')},inputs/../../inputs/task.safetensors]"],
    )
    for name, says in (
        ("frozen", "which has changed none"),
        ("biases", "weights of linear layers and convolutions alone"),
    ):
        yield Case(
            kind,
            f"merge with a task of {name}",
            says,
            lambda at, n=name: ["stage=merge", f"task=[{at.good / 'task.safetensors'},{at.good / n / layout.TASK}]"],
        )
    for name, value in (("drop_path_rate", 5), ("drop_rate", 1.0), ("drop_rate", -0.1)):
        yield typed(kind, f"model.arguments.{name}: expected", f"+model.arguments.{name}={value}")
    for objective in ("through_head", "alternating", "lp_ft"):
        yield typed(kind, "training.scale: expected", f"training={objective}", "training.scale=1e20")
    yield typed(kind, "trainer.precision: expected", "trainer.precision=16-mixed")
    yield typed(
        kind, "adapter.nested", "model=vit_frozen", "adapter=melo", "adapter.nested=true", "adapter.rank_gates=true"
    )
    yield typed(kind, "ranks: expected", "model=vit_frozen", "adapter=melo", "adapter.ranks=[1,2]")
    yield typed(kind, "adapter: tera does not fit", "model=vit_frozen", "adapter=tera", "adapter.layers=[nowhere]")
    yield typed(kind, "dataset.classes: expected", "dataset.classes=[nope]")
    yield typed(kind, "dataset.classes: expected", "stage=check", "dataset.classes=[nope]")
    yield typed(kind, "dataset.classes: expected at least two", "dataset.classes=[5]")
    yield typed(kind, "training: expected joint", "training=through_head", "dataset.shots=1")
    yield typed(kind, "trainer.accelerator", "trainer.accelerator=gpu")
    yield typed(kind, "trainer.max_epochs", "trainer.max_epochs=1e23")
    yield typed(kind, "trainer.num_threads", "trainer.num_threads=100000")
    yield typed(kind, "did you mean stage.tasks", "tasks=[a,b]")
    yield typed(kind, "stage.methods: expected", "stage=compare", "stage.methods=[nope]")
    yield typed(kind, "task", "stage=evaluate")
    yield typed(kind, "task", "stage=evaluate", "task=nowhere", code=3)
    yield typed(kind, "task", "task=task.safetensors")
    yield typed(kind, "path", "stage=report", "path=nowhere", code=3)
    yield typed(kind, "stage.images", "stage=predict", "task=nowhere")
    yield typed(kind, "resume: ", "resume=nowhere", code=3)
    yield typed(kind, "resume: expected a single run", "-m", "resume=nowhere", "seed=1,2")
    yield typed(kind, "launcher", "launcher=joblib")
    yield typed(kind, "launcher: expected one of", "-m", "launcher=cluster", "seed=1,2")
    yield typed(kind, "method: expected no adapter", "method=vit_melo", "adapter=bitfit")
    yield typed(kind, "cache_dir", "cache_dir=/proc/nowhere")
    huge, long = "1" + "0" * 400, "x" * 300
    for key in ("model.backbone", "model.img_size", "recast.num_groups", "optimizer.lr", "trainer.max_epochs"):
        yield typed(kind, "", f"{key}={huge}")
    yield typed(kind, "of 64 bits at most", "adapter=melo", "adapter.rank=1" + "0" * 30)
    yield typed(kind, "adapter.start", "adapter=piggyback", "adapter.start=1e308")
    yield typed(kind, "adapter.alpha", "adapter=melo", "adapter.alpha=1e308")
    for key in ("model.mean", "model.std", "model.arguments", "recast.targets", "recast.tasks", "mimicry.options"):
        yield typed(kind, f"{key}: expected", f"{key}=${{seed}}")
    for key in ("model.mean", "model.std", "recast.targets", "recast.tasks", "dataset.classes"):
        yield typed(kind, f"{key}: expected", f"{key}=[[1]]")
    yield typed(kind, "model.mean: expected three numbers from 0 to 1", "model.mean=[2,2,2]", "model.std=[1,1,1]")
    for key in ("bank", "resume", "model.weights", "dataset.path", "task"):
        more = {
            "dataset.path": ["dataset=folder"],
            "model.weights": ["model.pretrained=true"],
            "task": ["stage=evaluate"],
        }
        yield typed(kind, "255 bytes", *more.get(key, []), f"{key}={long}")
    yield typed(kind, "255 bytes", "model=vit_tasks", f"recast.tasks=[{long}]")
    yield typed(kind, "repeated groups", "adapter=peft", "adapter.arguments.target_modules='(.+)+!'")
    yield typed(kind, "adapter: peft", "adapter=peft", "adapter.arguments.target_modules='['")
    yield typed(kind, "adapter: peft", "adapter=peft", "adapter.arguments.megatron_config={a:1}")
    for argument in ("num_heads=0", "embed_dim=0", "norm_layer=x", "num_heads=5", "patch_size=0", "mlp_ratio=x"):
        yield typed(kind, "model.arguments: expected", f"+model.arguments.{argument}")
    yield typed(kind, "head.strengths: expected", "head=ridge", "head.strengths=[-1]")
    yield typed(kind, "head.strengths: expected at least one", "head=ridge", "head.strengths=[]")
    yield typed(kind, "head.shrinkages: expected", "head=lda", "head.shrinkages=[2]")
    yield typed(kind, "head.shrinkages: expected at least", "head=lda", "head.shrinkages=[]", "head.ledoit_wolf=false")
    yield typed(kind, "head.tolerance: expected", "head=logistic", "head.tolerance=1e300")
    yield typed(kind, "training.strength: expected", "training=through_head", "training.strength=1e-300")
    yield typed(kind, "optimizer.lr: expected", "optimizer.lr=1e308")
    for option in ("damping=-1", "damping=0", "rounds=x", "passes=-1"):
        name = option.partition("=")[0]
        yield typed(kind, f"mimicry.options.{name}: expected", "mimicry=calibrated", f"+mimicry.options.{option}")
    for method in ("POLY", "TRAINABLE_TOKENS"):
        yield typed(kind, "adapter.method: expected", "model=vit_frozen", "adapter=peft", f"adapter.method={method}")
    for name in ("solvers", "dtypes", "sizes"):
        sweep = ("stage=reconstruct", "stage.sweep=true", f"stage.{name}=[]")
        yield typed(kind, f"stage.{name}: expected at least one", *sweep)
    yield typed(kind, "lora_dropout: expected a finite", "adapter=peft", "adapter.arguments.lora_dropout=nan")
    yield typed(kind, "(5,002 characters)", f"trainer.max_epochs={'x' * 5000}")
    yield typed(kind, "adapter.arguments.modules_to_save", "adapter=peft", "adapter.arguments.modules_to_save=none")
    yield typed(kind, "hydra.run.dir", "hydra.run.dir=/proc/nowhere/run")
    for deep in (60, 600):
        text = "adapter.arguments=" + "{a:" * deep + "1" + "}" * deep
        yield Case(kind, f"a value nested {deep} times", "adapter.arguments", lambda _, t=text: ["adapter=peft", t])


# Files of configuration


def of_hydra() -> Iterator[Case]:
    """Keys of Hydra's own, and what others have left in the environment of a command."""
    kind = "Hydra"
    yield typed(kind, "hydra: expected its keys to be set one by one", "hydra={}")
    yield typed(kind, "hydra.job.env_copy: expected environment variables that are set", "hydra.job.env_copy=[NOT_SET]")
    for size in ("0", "-1"):
        yield typed(
            kind, f"hydra.sweeper.max_batch_size: expected an integer ≥ 1 or null, got {size}",
            "-m", f"hydra.sweeper.max_batch_size={size}", "seed=1,2",
        )  # fmt: skip
    for part, target in (("launcher", "nowhere.X"), ("launcher", "hydra_plugins.x.Y"), ("sweeper", "os.getcwd")):
        yield typed(
            kind, f"hydra.{part}._target_: expected an installed plug-in of Hydra, got '{target}'",
            "-m", f"hydra.{part}._target_={target}", "seed=1,2",
        )  # fmt: skip
    yield typed(kind, "hydra.sweeper.params: expected its keys to be set", "-m", "+hydra.sweeper.params={seed: '1,2'}")
    yield typed(kind, "seed: got range(1,5,0): ", "-m", "seed=range(1,5,0)")
    yield typed(kind, "stage.methods: expected names of methods", "stage=compare", "stage.methods=[]")
    for stage in ("evaluate", "export", "publish"):
        says = f"task: expected one task file with stage={stage}, got 2"
        yield typed(kind, says, f"stage={stage}", "task=[a.safetensors,b.safetensors]")
    yield typed(
        kind, "hydra.sweeper.seed: expected an integer ≥ 0",
        "-m", "search=optuna", "hydra.sweeper.seed=-1", "optimizer.coefficients_lr=0.1,0.2",
    )  # fmt: skip


def configured(content: str | bytes, name: str = "experiment/mine.yaml") -> Typed:
    def prepare(at: Materials) -> Sequence[object]:
        at.file(f"conf/{name}", content)
        return ["--config-dir", at.here / "conf", "experiment=mine"]

    return prepare


ALIASES = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{at}: &a{at} [{', '.join([f'*a{at - 1}'] * 10)}]\n" for at in range(1, 12)
)


def of_configurations() -> Iterator[Case]:
    top = "# @package _global_\n"
    for name, content, says in (
        ("no YAML", top + "model: [", "mine.yaml: line"),
        ("a tab", top + "model:\n\tname: x", "mine.yaml: line"),
        ("a list", "- a\n- b\n", "mine"),
        ("an unknown key", top + "modle:\n  name: x\n", "modle"),
        ("an unknown key within", top + "trainer:\n  epochs: 3\n", "trainer.epochs"),
        ("a wrong type", top + "trainer:\n  max_epochs: many\n", "trainer.max_epochs"),
        ("out of range", top + "trainer:\n  validate_every: 0\n", "trainer.validate_every"),
        ("an interpolation that leads nowhere", top + "label: ${nowhere}\n", "label"),
        ("an unknown resolver", top + "label: ${no.such:thing}\n", "label"),
        ("an unknown default", top + "defaults:\n  - override /model: nothing\n", "nothing"),
        ("defaults that are none", top + "defaults: 3\n", "mine"),
        ("a circle", top + "defaults:\n  - mine\n", "mine"),
        ("bytes", b"\xff\xfe\x00", "mine.yaml"),
        ("nested aliases", top + ALIASES, "aliases counted as often"),
        ("deep nesting", top + "a: " + "[" * 5000 + "]" * 5000, "nested more than"),
        ("a Python object", top + "label: !!python/object/apply:os.getcwd []\n", "mine"),
        ("a broken logging section", top + "hydra:\n  job_logging:\n    version: one\n", "hydra"),
    ):
        yield Case("configuration files", name, says, configured(content))
    yield Case(
        "configuration files",
        "a folder that is not there",
        "config",
        lambda at: ["--config-dir", at.here / "nowhere", "experiment=mine"],
    )


# Task files


def evaluate(change: Any) -> Typed:
    return lambda at: ["stage=evaluate", f"task={at.task(change)}"]


WRONG: dict[str, object] = {"null": None, "a list": [], "a number": 3.5, "a text": "x", "a mapping": {"x": 1}}


def of_tasks() -> Iterator[Case]:
    kind = "task files"

    def entry(name: str, value: object) -> Callable[[dict[str, Any], Any], None]:
        return lambda record, tensors: record.update({name: value})

    def gone(name: str) -> Callable[[dict[str, Any], Any], None]:
        return lambda record, tensors: record.pop(name) and None

    needed = ("backbone", "classes", "input", "eval_batch_size", "config", "format")
    for name in needed:
        yield Case(kind, f"without {name}", "task: ", evaluate(gone(name)))
        for what, value in WRONG.items():
            if (name, what) not in {("config", "a mapping"), ("input", "a mapping")}:
                yield Case(kind, f"{name}: {what}", "task: ", evaluate(entry(name, value)))
    for name in ("bank", "templates", "metrics", "checksum"):
        for what, value in WRONG.items():
            if (name, what) not in {("bank", "null"), ("metrics", "a list"), ("metrics", "a mapping")}:
                yield Case(kind, f"{name}: {what}", "task", evaluate(entry(name, value)))
    for name, value in (
        ("logger", {"name": "wandb"}),
        ("cache_dir", "elsewhere"),
        ("data_dir", "elsewhere"),
        ("hydra", {"run": {"dir": "x"}}),
        ("model", {"weights": "x"}),
        ("dataset", {"path": "x"}),
        ("label", "${oc.env:HOME}"),
        ("nonsense", 3),
        ("model", {"name": "vit_att", "method": "magic"}),
        ("recast", {"num_groups": -1}),
    ):
        yield Case(
            kind,
            f"a configuration with {name}={value}",
            name if name in ("model", "recast") else "task: ",
            evaluate(lambda record, tensors, n=name, v=value: record["config"].update({n: v})),
        )
    for name, value in (
        ("size", 17),
        ("size", 16.5),
        ("size", "x"),
        ("size", 100_000),
        ("size", None),
        ("mean", None),
        ("mean", [0.5] * 4),
        ("mean", [1e308] * 3),
        ("std", [0, 0, 0]),
        ("std", [-1, 1, 1]),
        ("crop_pct", 0),
        ("crop_pct", 0.01),
        ("interpolation", []),
        ("interpolation", "magic"),
        ("background", "x"),
        ("squash", 3),
        ("orient", "x"),
        ("more", 1),
    ):

        def prepared(record: Any, _: Any, name: str = name, value: object = value) -> None:
            record["input"][name] = value

        yield Case(kind, f"input with {name}={value}", "task: ", evaluate(prepared))
    for name, value in (("rank", 10**30), ("alpha", 1e308), ("arguments", {"target_modules": "(.+)+!"})):
        adapter = {"name": "peft", "method": "LORA"} if name == "arguments" else {"name": "melo"}

        def adapted(record: Any, _: Any, node: Any = {**adapter, name: value}) -> None:  # noqa: B006
            record["config"]["adapter"] = node

        yield Case(kind, f"an adapter with {name}={value}", "", evaluate(adapted))
    for name, value, code in (
        ("solver", "tasks", 3),  # whose bank is not there
        ("solver", "magic", 3),
        ("dtype", "int4", 2),
        ("options", {"mixing": "gated"}, 2),
        ("options", {"seed": 3}, 2),
        ("options", {"model": "x"}, 2),
    ):

        def forged(record: Any, _: Any, name: str = name, value: object = value) -> None:
            record["bank"] = "0" * 64
            record["templates"][name] = value

        yield Case(kind, f"templates with {name}={value}", "", evaluate(forged), code=code)
    yield Case(kind, "an unknown entry", "does not know", evaluate(entry("more", 1)))
    yield Case(kind, "a newer format", "update recast_exp", evaluate(entry("format", 99)))
    yield Case(kind, "two classes of one name", "different names", evaluate(entry("classes", ["a", "a"])))
    yield Case(kind, "a bank elsewhere", "64 hexadecimal", evaluate(entry("bank", "../../x")))
    for text in ("", "null", "[]", "3", "NaN", "[" * 100_000, "{" * 3, "9" * 6000, '{"format": Infinity}'):
        yield Case(kind, f"a record {text[:12]!r}", "task: ", evaluate(lambda record, tensors, t=text: t))
    for name, value in (("NaN", torch.nan), ("infinity", torch.inf)):
        yield Case(
            kind,
            f"{name} in a tensor",
            "task: ",
            evaluate(lambda record, tensors, v=value: next(iter(tensors.values())).fill_(v) is None),
        )
    for dtype in (torch.int8, torch.int64, torch.bool):
        yield Case(
            kind,
            f"tensors of {dtype}",
            "task",
            evaluate(lambda record, tensors, d=dtype: tensors.update({n: t.to(d) for n, t in tensors.items()})),
        )
    yield Case(kind, "a tensor more", "task", evaluate(lambda record, tensors: tensors.update(x=torch.ones(2))))
    yield Case(kind, "a tensor less", "task", evaluate(lambda record, tensors: tensors.pop("head/head.weight") is None))
    yield Case(
        kind,
        "a tensor of another shape",
        "task",
        evaluate(lambda record, tensors: tensors.update({"head/head.weight": torch.ones(2, 2)})),
    )
    for share in range(1, 20):
        yield Case(
            kind,
            f"a bit flipped at {share} of 20",
            "task: ",
            lambda at, s=share: ["stage=evaluate", f"task={flipped(at, 'task.safetensors', s / 20)}"],
        )
    for share in range(10):
        yield Case(
            kind,
            f"cut off at {share} of 10",
            "task: ",
            lambda at, s=share: ["stage=evaluate", f"task={cut(at, 'task.safetensors', s / 10)}"],
        )
    for name, content in (
        ("text", b"not a task file"),
        ("an empty header", header(b"{}")),
        ("a header that is no JSON", header(b"{{")),
        *(
            (f"offsets {offsets}", header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":%s}}' % offsets.encode()))
            for offsets in ('[0,"x"]', "null", "[0]", "{}", "[0,4.0]")
        ),
        ("a huge header", b"\xff" * 8),
        ("a deep header", header(b"[" * 100_000)),
        ("a picture", png()),
    ):
        yield Case(
            kind, name, "task: ", lambda at, c=content: ["stage=evaluate", f"task={at.file('x.safetensors', c)}"]
        )
    yield Case(kind, "a folder", "task: ", lambda at: ["stage=evaluate", f"task={at.here}"], code=3)


def flipped(at: Materials, name: str, share: float) -> Path:
    content = bytearray((at.good / name).read_bytes())
    content[int(share * (len(content) - 1))] ^= 1
    return at.file(name, bytes(content))


def cut(at: Materials, name: str, share: float) -> Path:
    content = (at.good / name).read_bytes()
    return at.file(name, content[: int(share * len(content))])


# Banks


def with_bank(change: Any) -> Typed:
    return lambda at: ["model=vit_att", f"bank={at.bank(change)}"]


def of_banks() -> Iterator[Case]:
    kind = "banks"
    for name in ("format", "groups", "settings"):
        yield Case(kind, f"without {name}", "bank: ", with_bank(lambda record, _, n=name: record.pop(n) is None))
        for what, value in WRONG.items():
            if (name, what) != ("settings", "a mapping"):
                yield Case(
                    kind,
                    f"{name}: {what}",
                    "bank: ",
                    with_bank(lambda record, _, n=name, v=value: record.update({n: v})),
                )
    for what, value in WRONG.items():
        yield Case(
            kind, f"hash: {what}", "bank: ", with_bank(lambda record, _, v=value: record.update(hash=v, format=1))
        )
    for name, value in (("layers", "x"), ("num_templates", 0), ("num_templates", 99), ("num_blocks", 7), ("name", 3)):
        yield Case(
            kind,
            f"a group with {name}={value}",
            "bank: ",
            with_bank(lambda record, _, n=name, v=value: record["groups"][0].update({n: v})),
        )
    for number in (0, -1):
        yield Case(kind, f"format {number}", "bank: ", with_bank(lambda record, _, n=number: record.update(format=n)))
    for text in ("", "null", "[" * 100_000, "NaN", '{"format": 1e999}'):
        yield Case(kind, f"a record {text[:12]!r}", "bank: ", with_bank(lambda record, _, t=text: t))
    for name, value in (("added", True), ("mixing", "gated"), ("mixing", "x"), ("dtype", "int8"), ("dtype", 3)):
        yield Case(
            kind,
            f"{name}={value}",
            "bank: ",
            with_bank(lambda record, _, n=name, v=value: record.pop("hash") and record.update({n: v})),
        )
    for dtype in (torch.int8, torch.float16, torch.bool):
        yield Case(
            kind,
            f"tensors of {dtype}",
            "bank: ",
            with_bank(lambda record, tensors, d=dtype: tensors.update({n: t.to(d) for n, t in tensors.items()})),
        )
    for name, value in (("NaN", torch.nan), ("zeros", 0.0), ("infinity", torch.inf)):
        yield Case(
            kind,
            name,
            "bank: ",
            with_bank(lambda record, tensors, v=value: tensors.update({n: t.fill_(v) for n, t in tensors.items()})),
        )
    yield Case(kind, "a tensor less", "bank: ", with_bank(lambda record, tensors: tensors.popitem() is None))
    yield Case(kind, "a tensor more", "bank: ", with_bank(lambda record, tensors: tensors.update(x=torch.ones(2))))
    for share in range(1, 10):
        yield Case(
            kind,
            f"a bit flipped at {share} of 10",
            "bank: ",
            lambda at, s=share: ["model=vit_att", f"bank={flipped(at, 'bank.safetensors', s / 10)}"],
        )
        yield Case(
            kind,
            f"cut off at {share} of 10",
            "bank: ",
            lambda at, s=share: ["model=vit_att", f"bank={cut(at, 'bank.safetensors', s / 10)}"],
        )


# Runs that are continued


def resumed(change: Callable[[Path], object]) -> Typed:
    def prepare(at: Materials) -> Sequence[object]:
        run = at.copy("interrupted")
        change(run)
        return [f"resume={run}"]

    return prepare


def checkpoint(change: Callable[[dict[str, Any]], object]) -> Typed:
    def damage(run: Path) -> None:
        path = run / "checkpoints" / "last.ckpt"
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)

    return resumed(damage)


def of_checkpoints() -> Iterator[Case]:
    kind = "checkpoints"
    for name in (
        "epoch",
        "global_step",
        "trunk",
        "state_dict",
        "optimizer_states",
        "lr_schedulers",
        "callbacks",
        "loops",
    ):
        yield Case(kind, f"without {name}", "resume: ", checkpoint(lambda found, n=name: found.pop(n)))
        for what, value in (("null", None), ("a text", "x")):
            yield Case(
                kind, f"{name}: {what}", "resume: ", checkpoint(lambda found, n=name, v=value: found.update({n: v}))
            )
    for what, rows in (("a list", [[]]), ("text", [{"val/loss": "x"}]), ("NaN", [{"val/loss": float("nan")}])):
        yield Case(
            kind,
            f"a history of {what}",
            "resume: ",
            checkpoint(lambda found, r=rows: found["callbacks"]["History"].update(rows=r)),
        )
    for name in ("recast_exp.log", "plots", "metrics.csv", "checkpoints/last.ckpt"):
        yield Case(kind, f"{name}: a link", "a link to", resumed(lambda run, n=name: _linked(run / n)))
    for what in ("seed=7", "optimizer.lr=0.123", "stage=check"):
        yield Case(kind, f"another command in its folder: {what}", "choose a new folder", in_folder_of(what))
    yield Case(
        kind, "no list of overrides", "resume: ",
        resumed(lambda run: (run / ".hydra" / "overrides.yaml").write_text("null")),
    )  # fmt: skip
    yield Case(
        kind,
        "NaN",
        "finite",
        checkpoint(lambda found: next(iter(found["state_dict"].values())).fill_(torch.nan)),
    )
    for share in range(1, 6):
        yield Case(
            kind,
            f"cut off at {share} of 6",
            "resume: ",
            resumed(lambda run, s=share: _cut_file(run / "checkpoints" / "last.ckpt", s / 6)),
        )
    for share in range(6):
        yield Case(
            kind,
            f"a number changed at {share} of 6",
            "resume: ",
            resumed(lambda run, s=share: _change_number(run / "checkpoints" / "last.ckpt", s / 6)),
        )
    for name in ("config.yaml", "overrides.yaml"):
        for what, content in (("aliases", ALIASES), ("deep", "[" * 5000), ("no YAML", "a: ["), ("an object", "!!x 3")):
            yield Case(
                kind,
                f"{name}: {what}",
                "resume: ",
                resumed(lambda run, n=name, c=content: (run / ".hydra" / n).write_text(c)),
            )
        yield Case(
            kind, f"without {name}", "resume: ", resumed(lambda run, n=name: (run / ".hydra" / n).unlink()), code=3
        )
    for override in ("hydra.job_logging.x=y", "label=${oc.env:HOME}", "hydra/launcher=joblib", "nonsense", "x@y=z"):
        yield Case(
            kind,
            f"the override {override}",
            "resume: ",
            resumed(lambda run, o=override: (run / ".hydra" / "overrides.yaml").write_text(json.dumps([o]))),
        )


def in_folder_of(*typed: str) -> Typed:
    """A command in the folder of a finished run, which was another."""

    def prepare(at: Materials) -> Sequence[object]:
        return [*typed, f"hydra.run.dir={at.copy('run')}"]

    return prepare


def _linked(path: Path) -> None:
    """Something else in the place of a file or folder, under a link."""
    aside = path.parents[2] / "aside"
    if path.exists():
        path.rename(aside)
    else:
        aside.mkdir()
    path.symlink_to(aside)


def _cut_file(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


def _change_number(path: Path, share: float) -> None:
    """Flip a bit among the tensors of a file of `torch.save`, in the one that is so far into it."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        tensors = [member for member in file.infolist() if "/data/" in member.filename and member.file_size]
    chosen = tensors[int(share * len(tensors))]
    name, more = (int.from_bytes(content[chosen.header_offset + at :][:2], "little") for at in (26, 28))
    content[chosen.header_offset + 30 + name + more + chosen.file_size // 2] ^= 4
    path.write_bytes(content)


# Weights


def weighted(content: object, name: str = "w.pth") -> Typed:
    def prepare(at: Materials) -> Sequence[object]:
        path = at.here / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        return ["model.pretrained=true", f"model.weights={path}"]

    return prepare


def _compressed(content: object) -> bytes:
    """A file of `torch.save` with its members compressed, which torch reads, whatever they unpack to."""
    plain, packed = io.BytesIO(), io.BytesIO()
    torch.save(content, plain)
    with zipfile.ZipFile(plain) as file, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as out:
        for member in file.infolist():
            out.writestr(member.filename, file.read(member))
    return packed.getvalue()


def of_weights() -> Iterator[Case]:
    kind = "weights"
    for name in ("w.pth", "w.safetensors", "w.npz", "w.bin"):
        for what, content in (
            ("empty", b""),
            ("text", b"no weights"),
            ("bytes", bytes(range(256)) * 8),
            ("PNG", png()),
        ):
            yield Case(kind, f"{name}: {what}", "model.weights: ", weighted(content, name))
    state = timm.create_model("digits_vit", num_classes=0).state_dict()
    first = next(iter(state))
    for what, content in (
        ("a list", [1, 2]),
        ("a number", 3),
        ("nothing", {}),
        ("texts", {"a": "b"}),
        ("another model", {"x": torch.zeros(2)}),
        ("one tensor less", {name: value for name, value in state.items() if name != first}),
        ("one tensor more", state | {"blocks.77.x": torch.zeros(2)}),
        ("another shape", state | {first: torch.zeros(1)}),
        ("integers", {name: value.to(torch.int8) for name, value in state.items()}),
        ("complex numbers", {name: value.to(torch.complex64) for name, value in state.items()}),
        ("sparse tensors", state | {"blocks.0.mlp.fc1.weight": state["blocks.0.mlp.fc1.weight"].to_sparse()}),
        ("NaN", {name: torch.full_like(value, torch.nan) for name, value in state.items()}),
    ):
        yield Case(kind, what, "model", weighted(content))
    # Tuples of twice the one before: their hash would take for ever
    nested = b"".join(b"q%ch%c\x86" % (depth, depth) for depth in range(60))
    yield Case(kind, "tuples of tuples as a key", "model.weights: ", weighted(b"\x80\x02})" + nested + b"Ns."))
    yield Case(kind, "compressed numbers", "model.weights: ", weighted(_compressed(state), "w.pth"))
    arrays = {f"Transformer/{name}": value.numpy() for name, value in state.items()}
    for what, array in (
        ("integers", np.ones((4, 4), np.int64)),
        ("one number for all", np.float32(1)),
        ("NaN", np.full((4, 4), np.nan, np.float32)),
        ("complex numbers", np.ones((4, 4), np.complex64)),
    ):
        content = io.BytesIO()
        np.savez(content, **arrays | {"Transformer/encoder_norm/scale": array})
        yield Case(
            kind, f"arrays: {what}", "Transformer/encoder_norm/scale holds", weighted(content.getvalue(), "w.npz")
        )
    content = io.BytesIO()
    np.savez_compressed(content, x=np.zeros(2**24, np.float32))
    yield Case(kind, "arrays that unpack to much", "unpacks to more than", weighted(content.getvalue(), "w.npz"))
    changed = io.BytesIO()
    torch.save(state, changed)

    def damaged(at: Materials) -> Sequence[object]:
        path = at.file("w.pth", changed.getvalue())
        _change_number(path, 0.5)
        return ["model.pretrained=true", f"model.weights={path}"]

    yield Case(kind, "a number changed", "model.weights: ", damaged)
    itself: dict[str, object] = {}
    itself["model"] = itself
    yield Case(kind, "a file that holds itself", "model.weights: ", weighted(itself))
    yield Case(
        kind,
        "not there",
        "model.weights: ",
        lambda at: ["model.pretrained=true", f"model.weights={at.here / 'nowhere'}"],
        code=3,
    )
    yield Case(
        kind, "a folder", "model.weights: ", lambda at: ["model.pretrained=true", f"model.weights={at.here}"], code=3
    )


# Datasets


def of_folders() -> Iterator[Case]:
    kind = "image folders"

    def folder(change: Callable[[Path], object], says: str, name: str, code: int = 2, *more: str) -> Case:
        def prepare(at: Materials) -> Sequence[object]:
            images = at.copy("images")
            change(images)
            return ["dataset=folder", f"dataset.path={images}", "dataset.shots=null", *more]

        return Case(kind, name, says, prepare, code=code)

    def emptied(images: Path) -> None:
        for path in images.rglob("*.png"):
            path.unlink()

    def moved(images: Path, *splits: str) -> None:
        classes = list(images.iterdir())
        for split in splits:
            for each in classes:
                (images / split).mkdir(exist_ok=True)
                each.rename(images / split / each.name)

    yield folder(emptied, "no image in this class folder", "no images", 3)
    yield folder(
        lambda images: (images / "class9").mkdir(), "no image in this class folder", "a class without images", 3
    )
    yield folder(lambda images: moved(images, "train"), "but no test", "no test images", 3)
    yield folder(
        lambda images: [p.unlink() for p in images.rglob("[1-4].png")], "at least 3 images", "one image a class"
    )
    yield folder(lambda images: (images / "Train" / "x").mkdir(parents=True), "", "a split among classes", 3)
    yield Case(kind, "no path", "dataset.path", lambda at: ["dataset=folder"])
    yield Case(
        kind, "a file", "dataset.path", lambda at: ["dataset=folder", f"dataset.path={at.file('x', b'')}"], code=3
    )
    yield Case(kind, "nothing there", "dataset.path", lambda at: ["dataset=folder", "dataset.path=nowhere"], code=3)


def of_lists() -> Iterator[Case]:
    kind = "published lists"

    def cub(name: str, change: Callable[[str], str | bytes], what: str, code: int = 2) -> Case:
        def prepare(at: Materials) -> Sequence[object]:
            path = at.copy("cub") / "CUB_200_2011" / name
            content = change(path.read_text())
            path.write_bytes(content.encode() if isinstance(content, str) else content)
            return ["dataset=cub", f"data_dir={at.here / 'cub'}", "dataset.verify=false", *BACKBONE]

        return Case(kind, f"{name}: {what}", ".txt", prepare, code=code)

    for name in ("classes.txt", "images.txt", "image_class_labels.txt", "train_test_split.txt"):
        yield cub(name, lambda text: text.replace("1 ", "x ", 1), "a letter for a number")
        yield cub(name, lambda text: "9" * 6000 + " x\n" + text, "6,000 digits")
        yield cub(name, lambda text: text + text, "everything twice")
        yield cub(name, lambda text: text.replace("\n", "\n\x00", 1), "a NUL")
        yield cub(name, lambda text: b"\xff\xfe" + text.encode(), "bytes")
        yield cub(name, lambda text: "", "empty")
    yield cub("images.txt", lambda text: text.replace("001.Bird_1/", "../../", 1), "a name outside")
    yield cub("images.txt", lambda text: text.replace("001.Bird_1/", "/etc/", 1), "an absolute name")
    yield cub("images.txt", lambda text: text.replace("Bird_0000.jpg", "nowhere.jpg", 1), "a name of nothing", 3)
    yield Case(kind, "no folder", "CUB_200_2011", lambda at: ["dataset=cub", f"data_dir={at.here}", *BACKBONE], code=3)
    for name in ("imagelabels.mat", "setid.mat"):
        for what, content in (
            *(("empty", b""), ("text", b"x" * 200), ("a picture", png())),
            *(("a bomb", mat_bomb()), ("cells in cells", mat_cells())),
        ):
            yield Case(
                kind,
                f"{name}: {what}",
                "dataset flowers: ",
                lambda at, n=name, c=content: [
                    "dataset=flowers",
                    f"data_dir={_replaced(at, 'flowers', n, c)}",
                    "dataset.verify=false",
                    *BACKBONE,
                ],
            )


BACKBONE = ("model.backbone=vit_tiny_patch16_224", "model.img_size=32", "dataset.shots=null")


def _replaced(at: Materials, source: str, name: str, content: bytes) -> Path:
    folder = at.copy(source)
    next(folder.rglob(name)).write_bytes(content)
    return folder


_MAT = b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\1IM"


def _element(kind: int, content: bytes) -> bytes:
    """An element of a .mat file."""
    return struct.pack("<II", kind, len(content)) + content


def mat_bomb() -> bytes:
    """A .mat file that unpacks to a thousand times its size."""
    return _MAT + _element(15, zlib.compress(_element(14, bytes(2**27)), 9))


def mat_cells(depth: int = 1000) -> bytes:
    """A .mat file of cells in cells."""
    start = struct.pack("<4I", 6, 8, 1, 0) + struct.pack("<4I", 5, 8, 1, 1) + struct.pack("<2I", 1, 0)
    content = b""
    for _ in range(depth):
        content = _element(14, start + content)
    return _MAT + content


# Archives


def _of_negative_size(path: Path) -> None:
    info = tarfile.TarInfo("a")
    header_of = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header_of[124:136] = (2**96 - 512).to_bytes(12, "big")  # base-256, and less than zero
    header_of[148:156] = b" " * 8
    header_of[148:156] = f"{sum(header_of):06o}\0 ".encode()
    path.write_bytes(bytes(header_of) + bytes(10240))


def _sparse(path: Path) -> None:
    """What takes a map of its size into memory."""
    with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT) as file:
        info = tarfile.TarInfo("a")
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "5"}
        content = b"1\n0\n5\n".ljust(512, b"\0") + b"hello"
        info.size = len(content)
        file.addfile(info, io.BytesIO(content))


def of_archives() -> Iterator[Case]:
    kind = "archives"

    def archive(name: str, says: str, make: Callable[[Path], None], file: str) -> Case:
        def call(at: Materials) -> object:
            path = at.here / file
            make(path)
            return extract(path, at.here / "out")

        return Case(kind, name, says, call=call)

    def zipped(*members: tuple[str, bytes]) -> Callable[[Path], None]:
        def make(path: Path) -> None:
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
                for name, content in members:
                    file.writestr(name, content)

        return make

    def tarred(*members: tuple[str, bytes, bytes]) -> Callable[[Path], None]:
        def make(path: Path) -> None:
            with tarfile.open(path, "w:gz") as file:
                for name, kind_of, link in members:
                    info = tarfile.TarInfo(name)
                    info.type, info.linkname = kind_of, link.decode()
                    file.addfile(info, io.BytesIO())

        return make

    for name in ("../x", "/etc/x", "a/../../x", "..", "a/../../../../x"):
        yield archive(f"zip: {name}", "", zipped((name, b"x")), "x.zip")
        yield archive(f"tar: {name}", "", tarred((name, tarfile.REGTYPE, b"")), "x.tar.gz")
    for link in (b"/etc/passwd", b"../../x"):
        yield archive(f"a link to {link.decode()}", "", tarred(("a", tarfile.SYMTYPE, link)), "x.tar.gz")
        yield archive(f"a hard link to {link.decode()}", "", tarred(("a", tarfile.LNKTYPE, link)), "x.tar.gz")
    for device in (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE):
        yield archive(f"a device {device!r}", "", tarred(("a", device, b"")), "x.tar.gz")
    yield archive("a tar member of a negative size", "", _of_negative_size, "x.tar")
    yield archive("a sparse tar member", "", tarred(("a", tarfile.GNUTYPE_SPARSE, b"")), "x.tar.gz")
    yield archive("a sparse tar member of pax", "", _sparse, "x.tar.gz")
    yield archive("1,500 folders deep", "", zipped(("a/" * 1500 + "x", b"x")), "x.zip")
    yield archive("a bomb", "", zipped(("x", bytes(2**31 - 2**20))), "x.zip")
    for content in (b"", b"no archive", png(), b"PK\x03\x04" + b"x" * 100, b"\x1f\x8b" + b"x" * 100):
        for file in ("x.zip", "x.tar.gz"):
            yield archive(f"{file}: {content[:6]!r}", "", lambda path, c=content: path.write_bytes(c) and None, file)


# Images


def png(size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, "PNG")
    return buffer.getvalue()


def of_images() -> Iterator[Case]:
    kind = "images"
    good = png((40, 40))

    def image(name: str, content: bytes, says: str = "", suffix: str = "png") -> Case:
        def prepare(at: Materials) -> Sequence[object]:
            folder = at.copy("images")
            path = next(folder.rglob("0.png")).with_suffix(f".{suffix}")
            path.write_bytes(content)
            return [
                *(
                    "stage=check",
                    "dataset=folder",
                    f"dataset.path={folder}",
                    *BACKBONE,
                    f"hydra.run.dir={at.here / 'run'}",
                ),
            ]

        return Case(kind, name, says or "dataset folder: 1 of", prepare)

    for share in range(1, 7):  # the last bytes are not missed
        yield image(f"cut off at {share} of 8", good[: len(good) * share // 8])
    for at in (0, 6, 12, 18, 24, 30, 42, 48, 54):
        damaged = bytearray(good)
        damaged[at] ^= 0xFF
        yield image(f"a byte changed at {at}", bytes(damaged))
    yield image("empty", b"")
    yield image("text", b"no image at all")
    yield image("HTML", b"<!DOCTYPE html><html></html>", suffix="jpg")
    yield image("a pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", suffix="jpg")


# Calls of the library


def vit() -> nn.Module:
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3)
    return model


def _model() -> recast_exp.RecastModel:
    model = recast_exp.RecastModel.from_timm(
        "vit_tiny_patch16_224", pretrained=False, img_size=32, recast=recast_exp.RecastConfig(targets=["*.qkv"])
    )
    model.add_task("a", 2)
    model.set_task("a")
    return model


def _mimic_group(**changed: Any) -> object:
    (group, *_) = recast_exp.find_groups(vit(), targets=["*.qkv"])
    return recast_exp.mimic(vit(), [replace(group, **changed)])


def _load_with_input(at: Materials, name: str, value: object) -> object:
    """Load a model whose record says something else of the images."""
    path = _model().save(at.here / "model") / "model.json"
    record = json.loads(path.read_text())
    record["input"][name] = value
    path.write_text(json.dumps(record))
    return recast_exp.RecastModel.load(path.parent)


def _zipped(at: Materials, flag: int = 0, method: int = zipfile.ZIP_DEFLATED, zeros: int = 0) -> Path:
    """A zip file with a record, whose headers say that it is encrypted or compressed in another way; or of zeros."""
    path = at.here / "model.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("model.json", "{}")
        if zeros:
            file.writestr(f"{'0' * 64}.safetensors", bytes(zeros))
    content = bytearray(path.read_bytes())
    for start, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # flags, then the method, in both headers
        at_header = content.index(start) + offset
        content[at_header] |= flag
        content[at_header + 2] = method
    path.write_bytes(content)
    return path


def of_calls() -> Iterator[Case]:
    kind = "library calls"
    groups = recast_exp.find_groups

    def mimicked(**options: Any) -> Callable[[Materials], object]:
        return lambda _: recast_exp.mimic(vit(), groups(vit(), targets=["*.qkv"]), **options)

    calls: list[tuple[str, str, Callable[[Materials], object]]] = [
        ("num_groups=0", "num_groups", lambda _: groups(vit(), num_groups=0)),
        ("num_groups=1.5", "num_groups", lambda _: groups(vit(), num_groups=1.5)),  # type: ignore[arg-type]
        ("num_groups=True", "num_groups", lambda _: groups(vit(), num_groups=True)),
        ("num_groups=99", "num_groups", lambda _: groups(vit(), num_groups=99)),
        ("num_templates=0", "num_templates", lambda _: groups(vit(), num_templates=0)),
        ("num_templates=99", "num_templates", lambda _: groups(vit(), num_templates=99)),
        ("last_blocks=0", "last_blocks", lambda _: groups(vit(), last_blocks=0)),
        ("granularity", "granularity", lambda _: groups(vit(), granularity="x")),
        ("targets", "targets", lambda _: groups(vit(), targets=["nowhere"])),
        ("a model without groups", "targets", lambda _: groups(nn.Sequential(nn.ReLU()))),
        ("no groups", "groups", lambda _: recast_exp.mimic(vit(), [])),
        ("an unknown solver", "solver", mimicked(solver="magic")),
        ("an unknown option", "", mimicked(magic=3)),
        ("num_sets=0", "num_sets", mimicked(num_sets=0)),
        ("a billion sets", "num_sets", mimicked(num_sets=10**9)),
        ("pickle", "model.save(", lambda _: pickle.dumps(_model())),
        ("torch.save", "model.save(", lambda _: torch.save(_model(), io.BytesIO())),
        ("no images", "images", mimicked(solver="calibrated")),
        ("images of another shape", "images", mimicked(solver="calibrated", images=torch.zeros(3))),
        ("an unknown kind of templates", "templates", mimicked(templates="magic")),
        ("a mixing of another kind", "mixing", mimicked(mixing="gated")),
        ("an unknown dtype", "template_dtype", mimicked(template_dtype="int4")),
        ("one task to merge", "tasks", lambda at: recast_exp.merge_tasks(vit(), [at.good / "task.safetensors"])),
        ("a negative seed", "seed", mimicked(seed=-1)),
        ("inject twice", "banks", lambda _: _inject_twice()),
        ("inject elsewhere", "", lambda _: recast_exp.inject(nn.Linear(2, 2), _banks())),
        ("melo without a place", "adapter", lambda _: recast_exp.inject_adapter(nn.Linear(2, 2), recast_exp.MeLo())),
        ("rank=0", "rank", lambda _: recast_exp.MeLo(rank=0)),
        ("rank=x", "rank", lambda _: recast_exp.MeLo(rank="x")),  # type: ignore[arg-type]
        ("seed of an adapter", "seed", lambda _: recast_exp.inject_adapter(vit(), recast_exp.MeLo(), seed=2**32)),
        ("a bank that is not there", "", lambda at: Banks.load(at.here / "nowhere")),
        ("a bank that is a folder", "", lambda at: Banks.load(at.here)),
        ("a bank that is a task", "", lambda at: Banks.load(at.good / "task.safetensors")),
        ("a task that is not there", "task", lambda at: load_task(at.here / "nowhere")),
        ("a task that is a bank", "task", lambda at: load_task(at.good / "bank.safetensors")),
        ("a task that is text", "task", lambda at: load_task(at.file("x", b"text"))),
        ("NaN weights", "model", lambda _: _mimic_changed(lambda weight: weight.fill_(torch.nan))),
        ("weights on meta", "model", lambda _: recast_exp.mimic(vit().to("meta"), groups(vit(), targets=["*.qkv"]))),
        ("no timm model", "", lambda _: recast_exp.RecastModel.from_timm(nn.Linear(2, 2))),
        ("a mapping for recast", "recast: ", lambda _: recast_exp.RecastModel.wrap(vit(), recast={})),  # type: ignore[arg-type]
        ("a compiled model", "model: ", lambda _: recast_exp.RecastModel.wrap(torch.compile(vit()))),
        ("a model on meta", "model: ", lambda _: recast_exp.RecastModel.wrap(vit().to("meta"))),
        *(
            (f"width={width}", "width: ", lambda _, w=width: recast_exp.RecastModel.wrap(vit(), width=w))
            for width in (-1, 0, True, 8.0, 2**63)
        ),
        ("text for classes", "classes: ", lambda _: _model().add_task("b", "abc")),
        ("None for classes", "classes: ", lambda _: _model().add_task("b", None)),  # type: ignore[arg-type]
        ("a number for targets", "targets: ", lambda _: groups(vit(), targets=5)),  # type: ignore[arg-type]
        ("None among targets", "targets: ", lambda _: groups(vit(), targets=[None])),  # type: ignore[list-item]
        ("a group of text", "groups: ", lambda _: recast_exp.mimic(vit(), ["x"])),  # type: ignore[list-item]
        *(
            (f"a group with {changed}", "", lambda _, c=changed: _mimic_group(**c))
            for changed in (
                {"layers": ()},
                {"name": ""},
                {"name": None},
                {"num_blocks": 0},
                {"num_blocks": 7},
                {"num_templates": 0},
                {"layers": ("blocks.0.attn.qkv", "blocks.0.mlp.fc1")},
            )
        ),
        ("tasks without differences", "differences: ", mimicked(templates="tasks")),
        ("too many classes", "classes: ", lambda _: _model().add_task("b", 10**30)),
        ("true for classes", "classes: ", lambda _: _model().add_task("b", True)),
        ("a number for an image", "images: ", lambda _: _model().predict([1, 2])),
        ("an empty image", "images: ", lambda _: _model().predict(np.zeros((0, 20, 3), np.uint8))),
        ("16 bits", "images: ", lambda _: _model().predict(np.zeros((20, 20, 3), ">u2"))),
        (
            "an image on meta",
            "images: ",
            lambda _: _model().predict(torch.zeros(3, 20, 20, dtype=torch.uint8, device="meta")),
        ),
        ("half a class", "top: ", lambda _: _model().predict(np.zeros((20, 20, 3), np.uint8), top=1.5)),  # type: ignore[arg-type]
        ("a model below a file", "written", lambda at: _model().save(at.file("x", b"") / "model")),
        ("a model in place of a file", "written", lambda at: _model().save(at.file("x", b""))),
        ("an encrypted zip file", "zip file", lambda at: recast_exp.RecastModel.load(_zipped(at, flag=1))),
        ("a zip file of an unknown method", "zip file", lambda at: recast_exp.RecastModel.load(_zipped(at, method=99))),
        ("a zip bomb", "zip file", lambda at: recast_exp.RecastModel.load(_zipped(at, zeros=10_000_000))),
        *(
            (f"a model whose {name} is {value}", "model.json", lambda at, n=name, v=value: _load_with_input(at, n, v))
            for name, value in (
                ("size", 0),
                ("mean", [1]),
                ("std", [0, 0, 0]),
                ("interpolation", {}),
                ("crop_pct", "x"),
            )
        ),
    ]
    for name, says, call in calls:
        yield Case(kind, name, says, call=call)


def _banks() -> Banks:
    model = vit()
    return recast_exp.mimic(model, recast_exp.find_groups(model, targets=["*.qkv"]))


def _inject_twice() -> None:
    model = vit()
    banks = recast_exp.mimic(model, recast_exp.find_groups(model, targets=["*.qkv"]))
    recast_exp.inject(model, banks)
    recast_exp.inject(model, banks)


def _mimic_changed(change: Callable[[torch.Tensor], object]) -> None:
    model = vit()
    change(model.get_parameter("blocks.0.attn.qkv.weight").data)
    recast_exp.mimic(model, recast_exp.find_groups(model, targets=["*.qkv"]))


def all_cases() -> list[Case]:
    """The whole table."""
    makers = (
        *(of_keys, of_words, of_hydra, of_configurations, of_tasks, of_banks, of_checkpoints, of_weights, of_folders),
        *(of_lists, of_archives, of_images, of_calls),
    )
    return [case for make in makers for case in make()]
