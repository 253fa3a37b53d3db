"""The schema of the configuration: every key, its type, its range and what it means, and the rules across keys.

This module imports nothing heavy: a wrong key is reported before torch is loaded. Types are enforced by OmegaConf
(each dataclass is the schema of a node), ranges and choices come from the field's metadata, and `problems` gathers
every violation at once. The documentation of the keys is generated from the same metadata.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

WITHOUT_MODEL = frozenset({"report"})
"""Stages that need no backbone and no dataset; nothing heavy is imported for them."""


def key(
    default: Any,
    help: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: tuple[str, ...] | None = None,
    path: bool = False,
) -> Any:
    """Declare a configuration key: default, help text, bounds (inclusive `ge`/`le`, exclusive `gt`/`lt`) or choices.

    `path=True` marks a file or folder: such values are taken literally on the command line (spaces, `=`, any letter).
    """
    metadata = {
        name: value
        for name, value in {
            "help": help, "ge": ge, "gt": gt, "le": le, "lt": lt, "choices": choices, "path": path or None
        }.items()
        if value is not None
    }  # fmt: skip
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class ModelConfig:
    """The backbone and what is done with it."""

    name: str = key("", "name of the model, as in the results")
    label: str = key("", "what tables and plots call it")
    method: str = key("recast", "what trains beside the head", choices=("recast", "frozen", "full"))
    family: str = key("any", "architecture family; a dataset may bring a backbone for it", choices=("vit", "resnet", "any"))  # fmt: skip # noqa: E501
    backbone: str | None = key(None, "timm model name, with its pretrained tag")
    pretrained: bool = key(True, "start from pretrained weights")
    weights: str | None = key(None, "file with the backbone's weights (.safetensors, .pth, .npz)", path=True)
    img_size: int | None = key(None, "input size in pixels; null is the backbone's own", ge=8, le=4096)
    mean: list[float] | None = key(None, "channel means of the input; null is the backbone's own")
    std: list[float] | None = key(None, "channel deviations of the input; null is the backbone's own")
    batchnorm_statistics: str = key("frozen", "running statistics of BatchNorm; `update` counts them as task numbers", choices=("frozen", "update"))  # fmt: skip # noqa: E501


@dataclass
class RecastConfig:
    """How the weights are grouped and rewritten."""

    targets: list[str] | None = key(None, "glob patterns over layer names (blocks.*.attn.qkv); null takes every layer that can be grouped")  # fmt: skip # noqa: E501
    num_groups: int | None = key(None, "groups per stage and layer name; null makes groups of two (or three) layers", ge=1)  # fmt: skip # noqa: E501
    num_templates: int | None = key(None, "templates per group; null is the group's size (exact)", ge=1)
    num_coefficient_sets: int = key(2, "sets of coefficients K, averaged", ge=1)
    granularity: str = key("layer", "one coefficient vector per weight, per projection (q, k, v) or per head", choices=("layer", "projection", "head"))  # fmt: skip # noqa: E501


@dataclass
class MimicryConfig:
    """How templates and coefficients are found for pretrained weights."""

    name: str = key("closed_form", "solver")
    seed: int = key(42, "seed of the solver, apart from the run's seed: one bank serves all seeds", ge=0, lt=2**32)
    steps: int | None = key(None, "optimisation steps (gradient, autoencoder); null is the authors' number", ge=1)
    lr: float | None = key(None, "learning rate of RMSprop (gradient, autoencoder); null is the authors'", gt=0)
    step_size: int | None = key(None, "steps between learning-rate drops by ten (gradient); null is the authors'", ge=1)
    noise: float | None = key(None, "deviation of the noise on the first coefficients (gradient); null is the authors'", ge=0)  # fmt: skip # noqa: E501
    hidden: int = key(8, "width of the encoder (autoencoder)", ge=1)
    options: dict[str, Any] = key({}, "further options, for solvers of other packages")


@dataclass
class DatasetConfig:
    """Images, splits and batches."""

    name: str = key("", "dataset")
    reader: str | None = key(None, "what reads it, where that is not its name (folder, torchvision)")
    path: str | None = key(None, "folder of the images, where it is not below data_dir", path=True)
    part: str | None = key(None, "part of the classes, for datasets that have parts")
    level: str | None = key(None, "level of the labels, for datasets that have levels")
    options: dict[str, Any] = key({}, "more arguments of the torchvision class (dataset=torchvision)")
    classes: list[str] | None = key(None, "names, or glob patterns over the names, of the classes to keep")
    split: str = key("official", "the official split; or all images divided at random, as the authors do", choices=("official", "random_80_20"))  # fmt: skip # noqa: E501
    val_fraction: float = key(0.2, "share of the training images set aside where there is no validation split", gt=0, lt=1)  # fmt: skip # noqa: E501
    split_seed: int = key(0, "seed of every choice of images (validation, random split, shots); the same for all runs", ge=0, lt=2**32)  # fmt: skip # noqa: E501
    shots: int | None = key(None, "training images of each class, chosen at random", ge=1)
    max_per_class: int | None = key(None, "images of each class in every split at most, for a quick look", ge=1)
    download: bool = key(False, "download what is missing")
    verify: bool = key(True, "compare checksums and counts with the official set; false opens a cut-down copy")
    bad_images: str = key("error", "what to do about missing or damaged images", choices=("error", "skip"))
    cache: str = key("memmap", "where decoded images are kept: in a file shared by all runs, in this run's memory, nowhere", choices=("memmap", "ram", "off"))  # fmt: skip # noqa: E501
    transform: str = key("standard", "training augmentation", choices=("authors", "standard", "light", "shift", "none"))
    batch_size: int = key(128, "images per optimisation step, over all devices", ge=1)
    eval_batch_size: int | None = key(None, "images per evaluation batch; null is 256, or what a task file was tested with", ge=1)  # fmt: skip # noqa: E501
    num_workers: int | None = key(None, "loader processes; null chooses by machine, device and dataset", ge=0)
    prefetch_factor: int | None = key(None, "batches that each loader process prepares ahead; null chooses", ge=1)
    pin_memory: bool | None = key(None, "page-locked batches, for fast copies to a GPU; null chooses")
    backbones: dict[str, str] = key({}, "backbone that the dataset brings for each family of models")


@dataclass
class OptimizerConfig:
    """Optimiser and its parameter groups; a null learning rate or weight decay of a group is the common one."""

    name: str = key("adamw", "optimiser", choices=("adamw", "adam", "sgd"))
    lr: float = key(2e-3, "learning rate", gt=0)
    lr_scale: float = key(1.0, "factor on every learning rate but the head's, for searching them together", gt=0)
    weight_decay: float = key(1e-6, "weight decay", ge=0)
    momentum: float = key(0.9, "momentum (sgd)", ge=0, lt=1)
    nesterov: bool = key(False, "Nesterov momentum (sgd)")
    coefficients_lr: float | None = key(None, "learning rate of the coefficients", gt=0)
    coefficients_weight_decay: float | None = key(0.0, "weight decay of the coefficients", ge=0)
    coefficients_pull: float = key(0.0, "weight of the squared distance of the coefficients to their mimicked values, added to the loss", ge=0)  # fmt: skip # noqa: E501
    adapter_lr: float | None = key(None, "learning rate of the adapter", gt=0)
    adapter_weight_decay: float | None = key(None, "weight decay of the adapter", ge=0)
    backbone_lr: float | None = key(None, "learning rate of the backbone, where it trains", gt=0)
    backbone_weight_decay: float | None = key(None, "weight decay of the backbone, where it trains", ge=0)
    head_weight_decay: float | None = key(None, "weight decay of the head", ge=0)
    label_smoothing: float = key(0.0, "label smoothing of the cross-entropy", ge=0, lt=1)


@dataclass
class SchedulerConfig:
    """Learning rate over the epochs."""

    name: str = key("step", "schedule", choices=("step", "cosine", "constant"))
    step_size: int = key(33, "epochs between drops (step)", ge=1)
    adapter_step_size: int | None = key(None, "the same for the adapter; null is the common one", ge=1)
    gamma: float = key(0.1, "factor of a drop (step)", gt=0, le=1)
    warmup_epochs: int = key(0, "epochs of linear warm-up", ge=0)


@dataclass
class TrainerConfig:
    """Device, precision and length of training."""

    accelerator: str = key("auto", "device", choices=("auto", "cpu", "gpu", "mps"))
    devices: int = key(1, "number of devices of one run", ge=1)
    strategy: str = key("auto", "Lightning strategy", choices=("auto", "ddp"))
    precision: str = key("32-true", "numerical precision", choices=("32-true", "bf16-mixed", "16-mixed"))
    max_epochs: int = key(100, "epochs", ge=1)
    gradient_clip: float = key(1.0, "gradient norm limit; 0 is off", ge=0)
    head_first_epochs: int = key(0, "epochs in which only the head trains", ge=0)
    early_stopping: int | None = key(None, "stop after so many epochs without a better validation loss", ge=1)
    compile: bool = key(False, "compile the model with torch.compile")
    limit_batches: int | None = key(None, "batches per epoch, for debugging", ge=1)
    num_threads: int | None = key(None, "CPU threads; null is torch's choice", ge=1)


@dataclass
class LoggerConfig:
    """Tracker beside the files of the run folder."""

    name: str = key("csv", "tracker alongside metrics.csv")
    project: str = key("recast_exp", "W&B project")
    entity: str | None = key(None, "W&B entity")
    group: str | None = key(None, "W&B group; null is the sweep's folder")
    mode: str = key("auto", "W&B mode; auto is online with a key, else offline", choices=("auto", "online", "offline"))
    options: dict[str, Any] = key({}, "further options, for trackers of other packages")


@dataclass
class StageConfig:
    """What to do."""

    name: str = key("adapt", "stage")
    seeds: list[int] = key([42, 1998, 3142592], "seeds (stage=compare)")
    methods: list[str] | None = key(None, "methods by name or glob pattern (stage=compare); null takes all that fit")
    tune: list[str] = key([], "values to try before, key by key (optimizer.lr_scale=0.3,1,3); validation chooses for each method (stage=compare)")  # fmt: skip # noqa: E501
    tune_by: str = key("accuracy", "what is compared on the validation images; of few images, the loss tells more", choices=("accuracy", "loss"))  # fmt: skip # noqa: E501
    tune_seeds: int = key(1, "with how many of stage.seeds each value is tried; their mean is compared", ge=1)


@dataclass
class SearchConfig:
    """Which trial of a search a job is; the search sets it (search=optuna)."""

    storage: str | None = key(None, "file of the study that the job reports to", path=True)
    trial: int | None = key(None, "number of the trial", ge=0)


@dataclass
class Config:
    """The whole configuration of one job."""

    label: str = key("", "what tables and plots call the method; empty is the model's and the adapter's")
    seed: int = key(42, "seed of the run", ge=0, lt=2**32)
    data_dir: str = key("data", "root folder of all datasets", path=True)
    cache_dir: str | None = key(None, "folder for banks, probes and embedded backbones; null is the user's cache", path=True)  # fmt: skip # noqa: E501
    task: str | None = key(None, "task file (stage=evaluate)", path=True)
    path: str | None = key(None, "folder of runs to report on (stage=report)", path=True)
    bank: str | None = key(None, "template bank to use, instead of the cache", path=True)
    resume: str | None = key(None, "run folder to continue", path=True)
    probe: bool = key(True, "set the linear probe beside the result")
    skip_unfit: bool = key(False, "in a sweep, leave out the jobs whose adapter does not fit the model")
    select: str = key("last", "which epoch is reported: the last, or the best by validation", choices=("last", "best"))
    adapter: dict[str, Any] = key({"name": "none"}, "name and options of a second method on the backbone")
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    recast: RecastConfig = dataclasses.field(default_factory=RecastConfig)
    mimicry: MimicryConfig = dataclasses.field(default_factory=MimicryConfig)
    dataset: DatasetConfig = dataclasses.field(default_factory=DatasetConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = dataclasses.field(default_factory=SchedulerConfig)
    trainer: TrainerConfig = dataclasses.field(default_factory=TrainerConfig)
    logger: LoggerConfig = dataclasses.field(default_factory=LoggerConfig)
    stage: StageConfig = dataclasses.field(default_factory=StageConfig)
    search: SearchConfig = dataclasses.field(default_factory=SearchConfig)


def fields(schema: type = Config, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Yield every leaf key of the schema with its dotted name, in the order of the file."""
    hints = {field.name: field for field in dataclasses.fields(schema)}
    for name, field in hints.items():
        nested = field.default_factory
        if isinstance(nested, type) and dataclasses.is_dataclass(nested):
            yield from fields(nested, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def type_name(field: dataclasses.Field[Any]) -> str:
    """Say a key's type as a user would: `int | None` becomes `a whole number or null`."""
    words = {
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "str": "text",
        "list[str]": "a list of texts",
        "list[float]": "a list of numbers",
        "list[int]": "a list of whole numbers",
        "dict[str, str]": "a mapping of texts",
        "dict[str, Any]": "a mapping",
        "None": "null",
    }
    return " or ".join(words.get(part.strip(), part.strip()) for part in str(field.type).split("|"))


def accepted(field: dataclasses.Field[Any]) -> str:
    """Say what a key takes: its choices, or its type and range."""
    metadata = field.metadata
    if "choices" in metadata:
        return "one of " + ", ".join(metadata["choices"])
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    bounds = " and ".join(f"{sign} {metadata[name]}" for name, sign in signs.items() if name in metadata)
    kind = type_name(field)
    if "path" in metadata:
        kind = kind.replace("text", "a path")
    kind, null, _ = kind.partition(" or null")
    return f"{kind} {bounds}".strip() + null


def range_problem(name: str, field: dataclasses.Field[Any], value: Any) -> str | None:
    """Say in one line what is wrong with the range of a value; None when it is in range, or null."""
    if value is None:
        return None
    metadata = field.metadata
    wrong = "choices" in metadata and value not in metadata["choices"]
    if isinstance(value, int | float) and not isinstance(value, bool):
        wrong = wrong or (
            not math.isfinite(value)
            or ("ge" in metadata and value < metadata["ge"])
            or ("gt" in metadata and value <= metadata["gt"])
            or ("le" in metadata and value > metadata["le"])
            or ("lt" in metadata and value >= metadata["lt"])
        )
    return f"{name}: got {value!r}, takes {accepted(field)}" if wrong else None


def problems(cfg: DictConfig, *, multirun: bool = False) -> list[str]:
    """Check ranges, choices and combinations of a composed configuration.

    Args:
        cfg: A composed configuration of schema `Config`.
        multirun: Whether it is one job of a sweep.

    Returns:
        One line for each violation, each naming the key, what it got and what it takes; empty when all is well.
    """
    found = []
    for name, field in fields():
        problem = range_problem(name, field, OmegaConf.select(cfg, name))
        if problem:
            found.append(problem)
    return found + list(_combinations(cfg, multirun))


def unfit(cfg: DictConfig) -> str | None:
    """Say in one line why a model and an adapter do not go together, whatever the backbone; None if they may."""
    if cfg.model.method == "full" and cfg.adapter.name != "none":
        return f"adapter: got {cfg.adapter.name} with model={cfg.model.name}, which trains every weight; takes none"
    return None


def _combinations(cfg: DictConfig, multirun: bool) -> Iterator[str]:
    model, trainer = cfg.model, cfg.trainer
    if not model.backbone:
        yield f"model.backbone: got nothing, model={model.name} takes the name of a timm model (model.backbone=NAME)"
    if model.weights and not model.pretrained:
        yield "model.pretrained: got false together with model.weights; leave one of them out"
    for name in ("mean", "std"):
        value = model[name]
        if value is not None and (len(value) not in (1, 3) or (name == "std" and min(value) <= 0)):
            above = " above 0" if name == "std" else ""
            yield f"model.{name}: got {list(value)}, takes three numbers{above}"
    if (model.mean is None) != (model.std is None):
        yield "model.mean and model.std: got one of them, takes both or neither"
    if model.method != "recast":
        if cfg.stage.name == "reconstruct":
            yield f"stage: got reconstruct with model={model.name}, which has no templates; takes a RECAST model"
        if cfg.bank:
            yield f"bank: got a file with model={model.name}, which has no templates; leave it out"
    if cfg.recast.targets is not None and not cfg.recast.targets:
        yield "recast.targets: got an empty list, takes at least one pattern, or null for every layer"
    if cfg.stage.name == "evaluate" and not cfg.task:
        yield "task: got nothing, stage=evaluate takes a task file (task=outputs/…/task.safetensors)"
    if cfg.task and cfg.stage.name != "evaluate":
        yield f"task: got a file with stage={cfg.stage.name}, which takes none; did you mean stage=evaluate?"
    if cfg.stage.name == "report" and not cfg.path:
        yield "path: got nothing, stage=report takes a folder of runs (path=multirun/…)"
    if cfg.path and cfg.stage.name != "report":
        yield f"path: got a folder with stage={cfg.stage.name}, which takes none; did you mean stage=report?"
    if cfg.resume and cfg.stage.name != "adapt":
        yield f"resume: got a folder with stage={cfg.stage.name}; only stage=adapt can be continued"
    if cfg.stage.name == "compare" and not cfg.stage.seeds:
        yield "stage.seeds: got an empty list, takes at least one seed"
    elif cfg.stage.name == "compare" and cfg.stage.tune_seeds > len(cfg.stage.seeds):
        yield f"stage.tune_seeds: got {cfg.stage.tune_seeds}, takes at most the {len(cfg.stage.seeds)} of stage.seeds"
    elif cfg.stage.tune_seeds > 1 and not cfg.stage.tune:
        yield f"stage.tune_seeds: got {cfg.stage.tune_seeds} without stage.tune, so nothing is tried; takes 1"
    if cfg.stage.name != "compare" and cfg.stage.tune:
        yield f"stage.tune: got recipes with stage={cfg.stage.name}, which tries none; takes stage=compare"
    if cfg.stage.name == "report" and multirun:
        yield "stage: got report in a sweep; a report is made by itself, without -m"
    if cfg.resume and multirun:
        yield "resume: got a folder in a sweep; a single run is continued without -m"
    if 0 < trainer.max_epochs <= trainer.head_first_epochs:
        yield (
            f"trainer.head_first_epochs: got {trainer.head_first_epochs}, takes less than trainer.max_epochs="
            f"{trainer.max_epochs}"
        )
    if trainer.precision == "16-mixed" and trainer.accelerator == "cpu":
        yield "trainer.precision: got 16-mixed on the CPU, which takes 32-true or bf16-mixed"
    if trainer.devices > 1 and trainer.strategy != "ddp":
        yield f"trainer.devices: got {trainer.devices} with strategy={trainer.strategy}; takes trainer=ddp"
    if trainer.strategy == "ddp" and multirun:
        yield "trainer.strategy: got ddp in a sweep, where its second process would start the sweep again; run it alone"
    if cfg.scheduler.warmup_epochs >= trainer.max_epochs > 0:
        yield (
            f"scheduler.warmup_epochs: got {cfg.scheduler.warmup_epochs}, takes less than trainer.max_epochs="
            f"{trainer.max_epochs}"
        )
    if cfg.optimizer.nesterov and (cfg.optimizer.name != "sgd" or cfg.optimizer.momentum == 0):
        yield "optimizer.nesterov: got true, takes optimizer=sgd with a momentum above 0"


def typed(cfg: DictConfig) -> Config:
    """The settings of a composed configuration as plain dataclasses, resolved: what all code below `cli` takes.

    Args:
        cfg: A composed configuration of schema `Config`.
    """
    settings = OmegaConf.to_object(cfg)
    assert isinstance(settings, Config)
    return settings
