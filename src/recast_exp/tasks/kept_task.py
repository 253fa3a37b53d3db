"""A task on a trunk: how it is kept in memory, and how it goes to a task file and comes from one."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

from torch import Tensor, nn

from recast_exp.adapters import Adapter, NoAdapter, fixed_of, inject_adapter, injected
from recast_exp.config.schema import ModelConfig
from recast_exp.data.preprocessing import InputSpec
from recast_exp.errors import UserError
from recast_exp.models import loading, task_file
from recast_exp.models.adapted import AdaptedModel, running_statistics
from recast_exp.recast import Banks
from recast_exp.runs.task_header import FROZEN, UNGROUPED
from recast_exp.tasks.trunk import Trunk
from recast_exp.torch_state import seeded


@dataclass(frozen=True)
class TaskInfo:
    """What is known of a task of a `RecastModel`.

    Attributes:
        classes: Names of the classes, in the order of the logits.
        adapter: A copy of its adapter; `NoAdapter()` for none.
        parameters: Number of its parameters without the head: coefficients and adapter.
        head: Number of parameters of its head.
        bytes: Size of all of them.
        fingerprint: sha256 of the pretrained weights that they belong to.
        metrics: What was measured of it, by name (`test/accuracy`), for a task that was loaded from a file of a run.
    """

    classes: tuple[str, ...]
    adapter: Adapter
    parameters: int
    head: int
    bytes: int
    fingerprint: str
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(eq=False)
class KeptTask:
    """A task as it is kept.

    Attributes:
        trunk: The backbone that it shares with others.
        coefficients: [M], those of all layers one after the other; None where the task has a network of its own.
        own: That network, whose frozen tensors are the trunk's.
        adapter_paths: Public name → parameter name of what the adapter trains, in that network.
        buffers: Public name → buffer name of running statistics of its own.
        fixed: Public name → name of what its adapter keeps fixed.
        metrics: What was measured of it.
        input: The images that it expects; None for those of the trunk.
        settings: What the file that it comes from says of the model; None without one.
    """

    trunk: Trunk
    classes: tuple[str, ...]
    head: nn.Linear
    adapter: Adapter = field(default_factory=NoAdapter)
    coefficients: Tensor | None = None
    own: nn.Module | None = None
    adapter_paths: dict[str, str] = field(default_factory=dict)
    buffers: dict[str, str] = field(default_factory=dict)
    fixed: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    input: InputSpec | None = None
    settings: ModelConfig | None = None

    @classmethod
    def new(cls, trunk: Trunk, classes: tuple[str, ...], adapter: Adapter, update: bool, seed: int) -> KeptTask:
        """A task that computes as the pretrained backbone does, with a random head.

        Args:
            trunk: The backbone.
            classes: Names of the classes.
            adapter: The adapter; `NoAdapter()` for none.
            update: Whether the task has running statistics of its own.
            seed: Seed of the first weights of head and adapter.

        Raises:
            UnfitError: If the adapter finds no layer to change.
        """
        reference = next(trunk.network.parameters())
        with seeded(seed):
            head = nn.Linear(trunk.width, len(classes)).to(reference.device, reference.dtype)
        if isinstance(adapter, NoAdapter) and not update:
            return cls(trunk, classes, head, adapter, coefficients=trunk.start.clone())
        own = trunk.copy(own_statistics=update)
        paths = inject_adapter(own, adapter, seed=seed)
        if not isinstance(adapter, NoAdapter):
            adapter = injected(own)[0].adapter  # the task's own copy
        trunk.separate(own, list(paths.values()))
        for parameter in trunk.coefficients_of(own):
            parameter.requires_grad_(True)
        buffers = running_statistics(own) if update else {}
        return cls(trunk, classes, head, adapter, own=own, adapter_paths=paths, buffers=buffers, fixed=fixed_of(own))

    @classmethod
    def of_file(cls, trunk: Trunk, loaded: loading.Task) -> KeptTask:
        """The task of a task file.

        Its coefficients, if the trunk's layers are to hold them, pass through these layers, which then hold others than
        before.

        Raises:
            UserError: If it holds values that are not finite, or belongs to other weights, other templates or another
                kind of model. The layers are unchanged then.
        """
        where = f"task: {loaded.path}"
        if loaded.settings.method == "full":
            raise UserError(f"{where} has trained the whole backbone, so it shares none with other tasks")
        banks = None
        if loaded.bank is not None:
            _check_templates(where, loaded, trunk.banks)
            banks = trunk.banks
        elif loaded.fingerprint.startswith((FROZEN, UNGROUPED)) and not loaded.fingerprint.endswith(trunk.weights):
            raise UserError(
                f"{where} has no templates, and belongs to other weights than this model, or does not tell all of its "
                "own, as it has trained some of them or their running statistics; give it a timm model of its own "
                "(apply_task)"
            )
        if banks is None and not _is_exact(trunk.banks):
            raise UserError(
                f"{where} has no templates, and those of this model do not make the pretrained weights exactly; give "
                "it a timm model of its own (apply_task), or this model float32 templates, as many as layers"
            )
        update = loaded.settings.batchnorm_statistics == "update"
        task = cls.new(trunk, loaded.classes, loaded.adapter, update, loaded.seed)
        task.metrics, task.input, task.settings = dict(loaded.metrics), loaded.input, loaded.settings
        loading.check_weights(loaded, task._fingerprint_as(loaded))
        loading.check_computation(loaded, trunk.network)
        # A task without a bank is an adapter or a head on the pretrained backbone
        tensors = task_file.for_banks(loaded.tensors, loaded.record, banks)
        task_file.copy_into(task.adapted(coefficients=banks is not None), tensors)
        if task.own is None and banks is not None:
            task.coefficients = trunk.take()
        return task

    @property
    def network(self) -> nn.Module:
        """What gives its features: its own network, or the trunk's with its coefficients in the layers."""
        return self.trunk.network if self.own is None else self.own

    @property
    def info(self) -> TaskInfo:
        """What is known of it."""
        adapter = [self.network.get_parameter(path) for path in self.adapter_paths.values()]
        own, head = [self.trunk.start, *adapter], list(self.head.parameters())
        return TaskInfo(
            classes=self.classes,
            adapter=copy.deepcopy(self.adapter),
            parameters=sum(tensor.numel() for tensor in own),
            head=sum(tensor.numel() for tensor in head),
            bytes=sum(tensor.numel() * tensor.element_size() for tensor in (*own, *head)),
            fingerprint=self.trunk.weights,
            metrics=dict(self.metrics),
        )

    def adapted(self, coefficients: bool = True) -> AdaptedModel:
        """The task as `task_file` takes it. Without a network of its own, its coefficients are those in the layers.

        Args:
            coefficients: Whether they belong to the task.
        """
        whole = nn.ModuleDict({"network": self.network, "head": self.head})
        path_of = {id(parameter): path for path, parameter in whole.named_parameters()}
        found = zip(self.trunk.layers, self.trunk.coefficients_of(self.network), strict=True) if coefficients else ()
        prefix = _classifier_name(self.network)
        trainable = {
            "head": {f"{prefix}.{name}": f"head.{name}" for name, _ in self.head.named_parameters()},
            "coefficients": {layer: path_of[id(parameter)] for layer, parameter in found},
            "adapter": {public: f"network.{path}" for public, path in self.adapter_paths.items()},
        }
        buffers = {public: f"network.{path}" for public, path in self.buffers.items()}
        banks = self.trunk.banks if coefficients else None
        fixed = {public: f"network.{path}" for public, path in self.fixed.items()}
        return AdaptedModel(whole, trainable, buffers, banks, self.adapter, self.trunk.weights, fixed)

    def _fingerprint_as(self, loaded: loading.Task) -> str:
        """The fingerprint of the trunk, taken as that of a task file was."""
        kind, colon, _ = loaded.fingerprint.rpartition(":")
        if not colon:
            return self.trunk.weights
        if loaded.bank is None:
            return f"{kind}:{self.trunk.weights}"
        paths = {id(parameter): path for path, parameter in self.network.named_parameters()}
        found = zip(self.trunk.layers, self.trunk.coefficients_of(self.network), strict=True)
        coefficients = {layer: paths[id(parameter)] for layer, parameter in found}
        trained = {"coefficients": coefficients, "adapter": self.adapter_paths}
        own = AdaptedModel(self.network, trained, self.buffers, fixed=self.fixed)
        digest = loading.frozen_fingerprint if f"{kind}:" == FROZEN else loading.ungrouped_fingerprint
        return f"{kind}:{digest(own)}"


def _classifier_name(network: nn.Module) -> str:
    """The name that the classifier of a timm model has, and so its parameters in a task file; "head" for others."""
    found = network.get_classifier() if hasattr(network, "get_classifier") else None  # type: ignore[operator]
    return next((name for name, module in network.named_modules() if module is found), "head")


def _is_exact(banks: Banks) -> bool:
    """Whether the mimicked coefficients make the pretrained weights to within rounding, as far as is known."""
    if banks.added or banks.origin is None:
        return True
    few = any(group.num_templates < len(group.layers) for group in banks.groups)
    return banks.dtype == "float32" and banks.origin.solver == "closed_form" and not few


def _check_templates(where: str, loaded: loading.Task, banks: Banks) -> None:
    """Refuse the coefficients of a task for templates that are not its own and do not rebuild the same weights."""
    if loaded.bank == banks.hash:
        return
    if loaded.origin is None or banks.origin is None or not (loaded.origin.repeatable and banks.origin.repeatable):
        raise UserError(
            f"{where} has coefficients for the templates {str(loaded.bank)[:16]}…, this model has {banks.hash[:16]}…; "
            "coefficients mean nothing without their own templates"
        )
    own, given = banks.origin, loaded.origin
    if banks.has_own_kind or given.form != own.form or not given.dtype == own.dtype == "float32":
        # Coefficients without a relative form, or for templates that make the pretrained weights but roughly: to within
        # the last bits, the templates have to be the same
        made, expected = ((each.solver, each.seed, each.options, each.dtype) for each in (given, own))
        if made != expected:
            raise UserError(
                f"{where} has coefficients for templates made by {made}, this model has those of {expected}"
            )
    if loaded.groups != banks.groups:
        raise UserError(
            f"{where} has coefficients for {len(loaded.groups)} groups of layers such as {loaded.groups[0]}, this "
            f"model has {len(banks.groups)} others such as {banks.groups[0]}; make the model with the same RecastConfig"
        )
    if loaded.origin.weights != banks.origin.weights:
        raise UserError(
            f"{where} was trained on other weights ({loaded.origin.weights[:16]}…) than this model's "
            f"({banks.origin.weights[:16]}…)"
        )
