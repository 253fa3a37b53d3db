"""The rules across keys: ranges and combinations of a whole configuration, each violation in one line."""

from __future__ import annotations

from collections.abc import Iterator

from recast_exp.config.fields import kind_problem, range_problem
from recast_exp.config.keys import FIELDS
from recast_exp.config.schema import BACKGROUNDS, Config, is_background
from recast_exp.plugins import ADAPTERS, DATASETS, HEADS, OBJECTIVES, SOLVERS, STAGES, TEMPLATES, TRACKERS, Registry

_PLUGINS = {
    "adapter.name": ADAPTERS,
    "head.name": HEADS,
    "mimicry.name": SOLVERS,
    "recast.templates": TEMPLATES,
    "training.name": OBJECTIVES,
    "logger.name": TRACKERS,
    "stage.name": STAGES,
}


def problems(settings: Config, *, multirun: bool = False) -> list[str]:
    """Check ranges, choices and combinations.

    Args:
        settings: The settings of a job.
        multirun: Whether it is one job of a sweep.

    Returns:
        One line for each violation: the key, what was expected, what was found. Empty when all is well.
    """
    found = []
    for name, field in FIELDS.items():
        problem = range_problem(name, field, value_of(settings, name))
        if problem:
            found.append(problem)
    for name, registry in _PLUGINS.items():
        found += _unknown_plugin(name, registry, str(value_of(settings, name)))
    dataset = settings.dataset
    name, reader = ("dataset.reader", dataset.reader) if dataset.reader else ("dataset.name", dataset.name)
    found += _unknown_plugin(name, DATASETS, reader)
    return found or list(_combinations(settings, multirun))  # which take each value for sound


def kind_problems(settings: Config) -> list[str]:
    """What is no list or mapping where one is expected, one line each; all other checks take it for one."""
    found = (kind_problem(name, field, value_of(settings, name)) for name, field in FIELDS.items())
    return [problem for problem in found if problem]


def value_of(settings: Config, name: str) -> object:
    """The value of a dotted key; of an entry of a mapping, too."""
    node: object = settings
    for part in name.split("."):
        node = node.get(part) if isinstance(node, dict) else getattr(node, part)
    return node


def trains_only_head(settings: Config) -> bool:
    """Whether nothing trains but the head: a frozen model without an adapter."""
    return settings.model.method == "frozen" and settings.adapter["name"] == "none"


def unfit(settings: Config) -> str | None:
    """Say in one line why a model and an adapter do not fit together, whatever the backbone; None if they may."""
    adapter = settings.adapter["name"]
    if settings.model.method == "full" and adapter != "none":
        return f"adapter: expected none with model={settings.model.name}, which trains every weight, got {adapter}"
    return None


def _unknown_plugin(key: str, registry: Registry, name: str) -> Iterator[str]:
    names = registry.names()
    if name not in names:
        yield f"{key}: expected one of {', '.join(names)}, got {name!r}"


def _combinations(settings: Config, multirun: bool) -> Iterator[str]:
    model, trainer, background = settings.model, settings.trainer, settings.dataset.background
    if not is_background(background):
        yield f"dataset.background: expected one of {', '.join(BACKGROUNDS)}, or #rrggbb, got {background!r}"
    if not model.backbone:
        yield f"model.backbone: expected the name of a timm model with model={model.name}, got nothing"
    if model.weights and not model.pretrained:
        yield "model.pretrained: expected true together with model.weights, got false; leave one of them out"
    for name, values in (("mean", model.mean), ("std", model.std)):
        low = 1e-6 if name == "std" else 0  # the bounds of `runs.task_header.InputRecord`
        if values is not None and (len(values) not in (1, 3) or not low <= min(values) <= max(values) <= 1):
            above = "above 0, up to 1" if name == "std" else "from 0 to 1"
            yield f"model.{name}: expected three numbers {above}, got {list(values)}"
    if (model.mean is None) != (model.std is None):
        yield "model.mean and model.std: expected both or neither, got one of them"
    if model.method != "recast" and settings.bank:
        yield f"bank: expected none with model={model.name}, which has no templates, got a file; leave it out"
    if settings.recast.targets is not None and not settings.recast.targets:
        yield "recast.targets: expected at least one pattern, or null for every layer, got an empty list"
    yield from _templates(settings)
    if settings.resume and multirun:
        yield "resume: expected a single run, got a sweep; leave out -m"
    if 0 < trainer.max_epochs <= trainer.head_first_epochs:
        yield (
            f"trainer.head_first_epochs: expected less than trainer.max_epochs={trainer.max_epochs}, got "
            f"{trainer.head_first_epochs}"
        )
    if trainer.validate_every < trainer.max_epochs and trainer.max_epochs % trainer.validate_every:
        yield (
            f"trainer.validate_every: expected a divisor of trainer.max_epochs={trainer.max_epochs}, got "
            f"{trainer.validate_every}"
        )
    if trainer.precision == "16-mixed" and trainer.accelerator == "cpu":
        yield "trainer.precision: expected 32-true or bf16-mixed on the CPU, got 16-mixed"
    if trainer.devices > 1 and trainer.strategy != "ddp":
        yield f"trainer.devices: expected trainer=ddp for {trainer.devices} devices, got strategy={trainer.strategy}"
    if trainer.strategy == "ddp" and multirun:
        yield (
            "trainer.strategy: expected auto in a sweep, got ddp, whose second process would start the sweep again; "
            "run the job alone"
        )
    if settings.scheduler.warmup_epochs >= trainer.max_epochs > 0:
        yield (
            f"scheduler.warmup_epochs: expected less than trainer.max_epochs={trainer.max_epochs}, got "
            f"{settings.scheduler.warmup_epochs}"
        )
    optimizer = settings.optimizer
    if optimizer.nesterov and (optimizer.name != "sgd" or optimizer.momentum == 0):
        yield "optimizer.nesterov: expected optimizer=sgd with a momentum above 0, got true without"


def _templates(settings: Config) -> Iterator[str]:
    recast = settings.recast
    if settings.model.method != "recast":
        return
    if (recast.templates == "tasks") != bool(recast.tasks):
        expected, got = ("task files", "none") if recast.templates == "tasks" else ("none", f"{len(recast.tasks)}")
        yield f"recast.tasks: expected {expected} with recast.templates={recast.templates}, got {got}"
    if recast.templates != "layers" and settings.mimicry.name != "closed_form":
        yield (
            f"mimicry: expected closed_form with recast.templates={recast.templates}, which need no mimicry, got "
            f"{settings.mimicry.name}"
        )
    if recast.templates == "tasks" and recast.num_templates not in (None, len(recast.tasks)):
        yield (
            f"recast.num_templates: expected null with recast.templates=tasks, which has one for each task file, got "
            f"{recast.num_templates}"
        )
