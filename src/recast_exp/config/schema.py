"""The schema of the configuration: every key with its role, type, range and meaning.

OmegaConf enforces the types, as each dataclass is the schema of a node. Ranges and choices are in the fields' metadata,
from which the documentation of the keys is generated too.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from recast_exp.config.fields import Role, key


# fmt: off
@dataclass
class ModelConfig:
    """The backbone and what is done with it."""

    name: str = key(Role.MODEL, "", "name of the model, as in the results")
    label: str = key(Role.NAME, "", "name of the model in tables and plots")
    method: str = key(Role.MODEL, "recast", "what trains in addition to the head: coefficients, nothing, or every weight", choices=("recast", "frozen", "full"))
    family: str = key(Role.MODEL, "any", "architecture family; a dataset may bring a backbone for it", choices=("vit", "resnet", "any"))
    backbone: str | None = key(Role.MODEL, None, "timm model name, with its pretrained tag")
    pretrained: bool = key(Role.MODEL, True, "start from pretrained weights")
    weights: str | None = key(
        Role.TRAINING, None, "file with the backbone's weights (.safetensors, .pth, .npz)", path=True
    )
    img_size: int | None = key(Role.MODEL, None, "input size in pixels; null is the backbone's own", ge=8, le=4096)
    mean: list[float] | None = key(Role.MODEL, None, "channel means of the input; null is the backbone's own")
    std: list[float] | None = key(Role.MODEL, None, "channel standard deviations of the input; null is the backbone's own")
    arguments: dict[str, Any] = key(Role.MODEL, {}, "more arguments of the model in timm, such as reg_tokens or init_values")
    batchnorm_statistics: str = key(Role.MODEL, "frozen", "running statistics of BatchNorm; with `update` they train and count as parameters of the task", choices=("frozen", "update"))


@dataclass
class RecastConfig:
    """How the weights are grouped and rewritten."""

    targets: list[str] | None = key(Role.MODEL, None, "glob patterns over layer names (blocks.*.attn.qkv); null takes every layer that can be grouped")
    last_blocks: int | None = key(Role.MODEL, None, "take only layers of this number of blocks, from the end of the model; null takes all", ge=1)
    num_groups: int | None = key(Role.MODEL, None, "groups per stage and layer name; null makes groups of two (or three) layers", ge=1)
    templates: str = key(Role.MODEL, "layers", "where templates come from: the weights of the layers themselves, random or singular directions, or earlier tasks")
    mixing: str | None = key(Role.MODEL, None, "how coefficients and templates make a weight, where a kind of templates has several ways; null is its first", choices=("sum", "scales", "matrix", "gated"))
    num_templates: int | None = key(Role.MODEL, None, "templates per group, or directions; null is the group's size (exact), or what the kind of templates usually has", ge=1)
    template_dtype: str = key(Role.MODEL, "float32", "what templates are rounded to and kept as, in memory and in files", choices=("float32", "bfloat16", "int8"))
    tasks: list[str] = key(Role.TRAINING, [], "task files on the same backbone whose changes are the templates (templates=tasks)")
    num_coefficient_sets: int = key(Role.MODEL, 2, "sets of coefficients K, averaged", ge=1, le=1000)
    granularity: str = key(Role.MODEL, "layer", "one coefficient vector per weight, per projection (q, k, v), per head or per output row", choices=("layer", "projection", "head", "row"))


@dataclass
class MimicryConfig:
    """How templates and coefficients are found for pretrained weights."""

    name: str = key(Role.MODEL, "closed_form", "solver")
    seed: int = key(
        Role.MODEL, 42, "seed of the solver, apart from the run's seed: one bank serves all seeds", ge=0, lt=2**32
    )
    steps: int | None = key(
        Role.MODEL, None, "optimisation steps (gradient, autoencoder, calibrated); null is the solver's own number", ge=1
    )
    lr: float | None = key(
        Role.MODEL, None, "first learning rate (gradient, autoencoder, calibrated); null is the solver's own", gt=0
    )
    step_size: int | None = key(
        Role.MODEL, None, "steps between learning-rate drops by ten (gradient); null is the authors'", ge=1
    )
    noise: float | None = key(Role.MODEL, None, "standard deviation of the noise on the initial coefficients (gradient); null is the authors'", ge=0)
    hidden: int = key(Role.MODEL, 8, "width of the encoder (autoencoder)", ge=1, le=4096)
    images: int = key(Role.MODEL, 256, "training images whose outputs are kept (calibrated), without their labels", ge=1, le=100_000)
    options: dict[str, Any] = key(Role.MODEL, {}, "further options: passes, rounds, damping (calibrated), and those of solvers of other packages")


MAX_PIXELS = 178_956_970  # twice the number at which PIL warns of a file that was made to fill the memory

BACKGROUNDS = "white", "black", "gray", "drop"
"""Names for `dataset.background`; #rrggbb is another."""


def is_background(name: str) -> bool:
    """Whether a text is a value of `dataset.background`."""
    return name in BACKGROUNDS or re.fullmatch("#[0-9a-fA-F]{6}", name) is not None


@dataclass
class DatasetConfig:
    """Images, splits and batches."""

    name: str = key(Role.MODEL, "", "name of the dataset")
    reader: str | None = key(Role.MODEL, None, "module that reads it, where it is not named as the dataset is (folder, torchvision)")
    path: str | None = key(Role.PLACE, None, "folder of the images, where it is not below data_dir", path=True)
    part: str | None = key(Role.MODEL, None, "part of the classes, for datasets that have parts")
    level: str | None = key(Role.MODEL, None, "level of the labels, for datasets that have levels")
    options: dict[str, Any] = key(Role.MODEL, {}, "more arguments of the torchvision class (dataset=torchvision)")
    classes: list[str] | None = key(Role.MODEL, None, "names, or glob patterns over the names, of the classes to keep")
    split: str = key(Role.MODEL, "official", "the official split; the official test images, with new validation images drawn from all others; or all images divided at random, as the authors do", choices=("official", "redrawn", "random_80_20"))
    test_from: str = key(Role.MODEL, "test", "images to test with: the test images, or the validation images, for sets whose test labels are not published; new validation images are then set aside", choices=("test", "val"))
    val_fraction: float = key(Role.MODEL, 0.2, "share of the training images set aside where there is no validation split", gt=0, lt=1)
    split_seed: int = key(Role.MODEL, 0, "seed of every choice of images (validation, random split, shots); the same for all runs", ge=0, lt=2**32)
    views: int | None = key(Role.TRAINING, None, "altered views of each training image, which take turns; null alters it anew in every epoch", ge=1, le=10_000)
    shots: int | None = key(Role.MODEL, None, "training images of each class, chosen at random", ge=1)
    max_per_class: int | None = key(
        Role.MODEL, None, "images of each class in every split at most, for a quick look", ge=1
    )
    download: bool = key(Role.CONTROL, False, "download what is missing")
    verify: bool = key(
        Role.MODEL, True, "compare checksums and counts with the official set; false opens a cut-down copy"
    )
    bad_images: str = key(Role.MODEL, "error", "missing or damaged images stop the run, or are left out", choices=("error", "skip"))
    background: str = key(Role.MODEL, "white", "colour behind transparent parts of an image: white, black, gray or #rrggbb; drop takes the colours below them")
    orient: bool = key(Role.MODEL, True, "turn photographs as their EXIF data says")
    max_pixels: int = key(Role.CONTROL, MAX_PIXELS, "pixels of an image file at most; larger ones are refused, as they may be made to fill the memory", ge=1)
    cache: str = key(Role.CONTROL, "memmap", "where decoded images are kept: in a file shared by all runs, in this run's memory, nowhere", choices=("memmap", "ram", "off"))
    transform: str = key(
        Role.MODEL, "standard", "training augmentation", choices=("authors", "standard", "light", "shift", "none")
    )
    batch_size: int = key(Role.TRAINING, 128, "images per optimisation step, over all devices", ge=1)
    eval_batch_size: int | None = key(Role.TRAINING, None, "images per evaluation batch; null follows batch_size and the image size, up to 256, or takes what a task file was tested with", ge=1)
    num_workers: int | None = key(
        Role.CONTROL, None, "loader processes; null chooses by machine, device and dataset", ge=0, le=512
    )
    prefetch_factor: int | None = key(
        Role.CONTROL, None, "batches that each loader process prepares ahead; null chooses", ge=1, le=1024
    )
    pin_memory: bool | None = key(Role.CONTROL, None, "page-locked batches, for fast copies to a GPU; null chooses")
    backbones: dict[str, str] = key(Role.NAME, {}, "backbone that the dataset brings for each family of models")


@dataclass
class OptimizerConfig:
    """Optimiser and its parameter groups; a null learning rate or weight decay of a group is the common one."""

    name: str = key(Role.TRAINING, "adamw", "optimiser", choices=("adamw", "adam", "sgd"))
    lr: float = key(Role.TRAINING, 2e-3, "learning rate", gt=0)
    lr_scale: float = key(
        Role.TRAINING, 1.0, "factor on every learning rate but the head's, for searching them together", gt=0
    )
    weight_decay: float = key(Role.TRAINING, 1e-6, "weight decay", ge=0)
    momentum: float = key(Role.TRAINING, 0.9, "momentum (sgd)", ge=0, lt=1)
    nesterov: bool = key(Role.TRAINING, False, "Nesterov momentum (sgd)")
    coefficients_lr: float | None = key(Role.TRAINING, None, "learning rate of the coefficients", gt=0)
    coefficients_weight_decay: float | None = key(Role.TRAINING, 0.0, "weight decay of the coefficients", ge=0)
    coefficients_pull: float = key(Role.TRAINING, 0.0, "weight of the squared distance of the coefficients to their mimicked values, added to the loss", ge=0, le=1e6)
    adapter_lr: float | None = key(Role.TRAINING, None, "learning rate of the adapter", gt=0)
    adapter_weight_decay: float | None = key(Role.TRAINING, None, "weight decay of the adapter", ge=0)
    backbone_lr: float | None = key(Role.TRAINING, None, "learning rate of the backbone, where it trains", gt=0)
    backbone_weight_decay: float | None = key(
        Role.TRAINING, None, "weight decay of the backbone, where it trains", ge=0
    )
    head_weight_decay: float | None = key(Role.TRAINING, None, "weight decay of the head", ge=0)
    label_smoothing: float = key(Role.TRAINING, 0.0, "label smoothing of the cross-entropy", ge=0, lt=1)


@dataclass
class SchedulerConfig:
    """Learning rate over the epochs."""

    name: str = key(Role.TRAINING, "step", "schedule", choices=("step", "cosine", "constant"))
    step_size: int = key(Role.TRAINING, 33, "epochs between drops (step)", ge=1)
    adapter_step_size: int | None = key(Role.TRAINING, None, "the same for the adapter; null is the common one", ge=1)
    gamma: float = key(Role.TRAINING, 0.1, "factor of a drop (step)", gt=0, le=1)
    warmup_epochs: int = key(Role.TRAINING, 0, "epochs of linear warm-up", ge=0)


@dataclass
class TrainerConfig:
    """Device, precision and length of training."""

    accelerator: str = key(Role.CONTROL, "auto", "device", choices=("auto", "cpu", "gpu", "mps"))
    devices: int = key(Role.CONTROL, 1, "devices of one run", ge=1, le=1024)
    strategy: str = key(Role.CONTROL, "auto", "Lightning strategy", choices=("auto", "ddp"))
    precision: str = key(Role.MODEL, "32-true", "numerical precision", choices=("32-true", "bf16-mixed", "16-mixed"))
    max_epochs: int = key(Role.TRAINING, 100, "epochs", ge=1, le=1_000_000)
    accumulate: int = key(Role.TRAINING, 1, "batches whose gradients make one step, as one batch of so many times the images would", ge=1, le=10_000)
    gradient_clip: float = key(Role.TRAINING, 1.0, "gradient norm limit; 0 is off", ge=0)
    head_first_epochs: int = key(Role.TRAINING, 0, "epochs in which only the head trains", ge=0)
    validate_every: int = key(
        Role.TRAINING, 1, "epochs from one validation to the next; the last epoch always has one", ge=1
    )
    early_stopping: int | None = key(
        Role.TRAINING, None, "stop after this number of validations without a better loss", ge=1
    )
    compile: bool = key(Role.CONTROL, False, "compile the model with torch.compile")
    limit_batches: int | None = key(Role.MODEL, None, "batches per epoch, validation and test, for debugging", ge=1)
    activations_mb: int = key(
        Role.CONTROL, 2048, "memory for activations before the first block that trains, in MB; 0 keeps none", ge=0
    )
    num_threads: int | None = key(Role.CONTROL, None, "CPU threads; null is torch's choice", ge=1, le=512)


@dataclass
class LoggerConfig:
    """Tracker, in addition to the files in the folder of the run."""

    name: str = key(Role.CONTROL, "csv", "tracker, in addition to metrics.csv")
    project: str = key(Role.CONTROL, "recast_exp", "W&B project")
    entity: str | None = key(Role.CONTROL, None, "W&B entity")
    group: str | None = key(Role.CONTROL, None, "W&B group; null is the sweep's folder")
    mode: str = key(
        Role.CONTROL, "auto", "W&B mode; auto is online with a key, else offline", choices=("auto", "online", "offline")
    )
    options: dict[str, Any] = key(Role.CONTROL, {}, "further options, for trackers of other packages")


@dataclass
class SearchConfig:
    """Which trial of a search a job is; the search sets it (search=optuna)."""

    storage: str | None = key(Role.CONTROL, None, "file of the study that the job reports to", path=True)
    trial: int | None = key(Role.CONTROL, None, "number of the trial", ge=0)


@dataclass
class Config:
    """The whole configuration of one job."""

    label: str = key(Role.NAME, "", "name of the method in tables and plots; empty joins those of model and adapter")
    seed: int = key(Role.MODEL, 42, "seed of the run", ge=0, lt=2**32)
    data_dir: str = key(Role.PLACE, "data", "root folder of all datasets", path=True)
    cache_dir: str | None = key(Role.PLACE, None, "folder for banks, probes and embedded backbones; null is the user's cache", path=True)
    task: str | None = key(Role.TRAINING, None, "task file (stage=evaluate)", path=True)
    path: str | None = key(Role.PLACE, None, "folder of runs to report on (stage=report)", path=True)
    bank: str | None = key(Role.TRAINING, None, "template bank to use, instead of the cache", path=True)
    resume: str | None = key(Role.CONTROL, None, "run folder to continue", path=True)
    probe: bool = key(Role.CONTROL, True, "also solve a linear probe on the frozen backbone, for comparison")
    skip_unfit: bool = key(Role.CONTROL, False, "in a sweep, leave out the jobs whose adapter does not fit the model")
    select: str = key(
        Role.TRAINING, "last", "which epoch is reported: the last, or the best by validation", choices=("last", "best")
    )
    adapter: dict[str, Any] = key(Role.MODEL, {"name": "none"}, "name and options of a second method on the backbone")
    head: dict[str, Any] = key(Role.TRAINING, {"name": "linear", "calibrate": False}, "name and options of the head: trained with the rest, or solved")
    training: dict[str, Any] = key(Role.TRAINING, {"name": "joint"}, "name and options of the training objective")
    stage: dict[str, Any] = key(Role.CONTROL, {"name": "adapt"}, "name and options of the stage: adapt, evaluate, compare, …")
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    recast: RecastConfig = dataclasses.field(default_factory=RecastConfig)
    mimicry: MimicryConfig = dataclasses.field(default_factory=MimicryConfig)
    dataset: DatasetConfig = dataclasses.field(default_factory=DatasetConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = dataclasses.field(default_factory=SchedulerConfig)
    trainer: TrainerConfig = dataclasses.field(default_factory=TrainerConfig)
    logger: LoggerConfig = dataclasses.field(default_factory=LoggerConfig)
    search: SearchConfig = dataclasses.field(default_factory=SearchConfig)

# fmt: on


def fields(schema: type = Config, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[object]]]:
    """Yield every leaf key of the schema with its dotted name, in the order of the file."""
    hints = {field.name: field for field in dataclasses.fields(schema)}
    for name, field in hints.items():
        nested = field.default_factory
        if isinstance(nested, type) and dataclasses.is_dataclass(nested):
            yield from fields(nested, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def typed(cfg: DictConfig) -> Config:
    """The settings of a composed configuration as plain dataclasses, resolved; all code below `cli` takes these.

    Args:
        cfg: A composed configuration of schema `Config`.
    """
    settings = OmegaConf.to_object(cfg)
    assert isinstance(settings, Config)
    return settings


def with_values(settings: Config, values: Mapping[str, object]) -> Config:
    """A copy of settings with other values, by dotted key; an entry of a mapping (`adapter.rank`) may be a new one.

    Sections that do not change are shared with the original.
    """
    changed: object = settings
    for name, value in values.items():
        changed = _replaced(changed, name.split("."), value)
    assert isinstance(changed, Config)
    return changed


def _replaced(node: object, path: list[str], value: object) -> object:
    name, *rest = path
    if isinstance(node, dict):
        return node | {name: _replaced(node.get(name, {}), rest, value) if rest else value}
    assert dataclasses.is_dataclass(node) and not isinstance(node, type)
    return dataclasses.replace(node, **{name: _replaced(getattr(node, name), rest, value) if rest else value})
