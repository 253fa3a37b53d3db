"""Many tasks on one frozen backbone: add them, switch between them, train, mix and merge them.

A task that trains coefficients and a head alone is a short vector and a Linear. The vector of the active task is in the
layers of the model; to switch is to copy it. A task with an adapter, or with running statistics of its own, has a model
of its own whose frozen tensors are those of the first: they are in memory once.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from recast_exp.adapters import Adapter, NoAdapter, inject_adapter
from recast_exp.config.schema import ModelConfig, RecastConfig
from recast_exp.data.transforms import InputSpec
from recast_exp.errors import UnknownNameError, UserError
from recast_exp.models import library, task_file
from recast_exp.models.adapted import AdaptedModel, normalisations_with_statistics, running_statistics
from recast_exp.models.backbones import create_backbone
from recast_exp.models.create import input_of
from recast_exp.models.features import classifier
from recast_exp.models.timm_model import timm_model
from recast_exp.models.trunk import Trunk
from recast_exp.models.weights import fingerprint
from recast_exp.recast import Banks, find_groups, mimic
from recast_exp.recast.mixed import per_image
from recast_exp.runs.task_header import FROZEN
from recast_exp.torch_state import seeded

PER_TASK = 8  # images of one task from which a forward pass of its own costs less than products with every template


@dataclass(frozen=True)
class TaskInfo:
    """What is known of a task of a `RecastModel`.

    Attributes:
        classes: Names of the classes, in the order of the logits.
        adapter: Its adapter; `NoAdapter()` for none.
        parameters: Number of its parameters without the head: coefficients and adapter.
        head: Number of parameters of its head.
        bytes: Size of all of them.
        fingerprint: sha256 of the pretrained weights that they belong to.
    """

    classes: tuple[str, ...]
    adapter: Adapter
    parameters: int
    head: int
    bytes: int
    fingerprint: str


@dataclass(eq=False)
class _Task:
    """A task as it is kept.

    Attributes:
        coefficients: [M], those of all layers one after the other; None where the model of the task holds them.
        network: The model of its own; None where it has none.
        adapter_paths: Public name → parameter name of what the adapter trains, in that model.
        buffers: Public name → buffer name of running statistics of its own.
    """

    classes: tuple[str, ...]
    head: nn.Linear
    adapter: Adapter = field(default_factory=NoAdapter)
    coefficients: Tensor | None = None
    network: nn.Module | None = None
    adapter_paths: dict[str, str] = field(default_factory=dict)
    buffers: dict[str, str] = field(default_factory=dict)


class _Turn:
    """A lock that copies of a model do not share, and that can be pickled."""

    def __init__(self) -> None:
        self.lock = threading.RLock()

    def __deepcopy__(self, memo: dict[int, object]) -> _Turn:
        return _Turn()

    def __reduce__(self) -> tuple[type[_Turn], tuple[()]]:
        return _Turn, ()


class RecastModel(nn.Module):
    """A backbone in RECAST's form, and any number of tasks on it.

    `model(images)` gives the logits [N, classes] of the active task for images [N, 3, H, W], or the features [N, D] of
    the pretrained backbone where no task is active. `model.parameters()` are those of the backbone, frozen, and of the
    active task, which train: use an optimizer of its own for each task, made after `set_task`.

    Switching changes the model, so two threads must not do it at once. `with model.task(name):` and
    `model(images, tasks=[…])` let other threads wait until they are done. `set_task` and `model(images)` do not.

    Make one with `from_timm` or `wrap`.

    Example:
        >>> import torch
        >>> from recast_exp import MeLo, RecastConfig, RecastModel
        >>> model = RecastModel.from_timm(
        ...     "vit_tiny_patch16_224", pretrained=False, recast=RecastConfig(targets=["*.attn.qkv"])
        ... )
        >>> model.add_task("pets", ["cat", "dog"])
        >>> model.add_task("signs", ["stop", "yield", "other"], adapter=MeLo(rank=4))
        >>> model.tasks["pets"].parameters
        48
        >>> images = torch.zeros(2, 3, 224, 224)
        >>> with model.task("pets"):
        ...     model(images).shape
        torch.Size([2, 2])
        >>> [len(logits) for logits in model(images, tasks=["signs", "pets"])]
        [3, 2]
    """

    def __init__(
        self, network: nn.Module, banks: Banks, *, width: int, backbone: str, weights: str, input: InputSpec | None
    ) -> None:
        super().__init__()
        self._turn = _Turn()
        self.network = network
        self.head: nn.Module = nn.Identity()
        self.banks = banks
        self.width = width
        self.backbone = backbone
        self.input = input
        self._weights = weights
        self._tasks: dict[str, _Task] = {}
        self._active: str | None = None
        self._trunk = Trunk(network, banks)
        self.eval()

    @classmethod
    def from_timm(
        cls,
        name: str,
        *,
        recast: RecastConfig | None = None,
        weights: str | Path | None = None,
        pretrained: bool = True,
        img_size: int | None = None,
        seed: int = 42,
    ) -> RecastModel:
        """A timm backbone with its pretrained weights, in RECAST's form.

        Args:
            name: timm name, with or without a tag.
            recast: Which layers share templates, and how finely; None takes all that can, in groups of two.
            weights: A file of weights instead of timm's.
            pretrained: False for random weights.
            img_size: Input size in pixels; None is the backbone's own.
            seed: Seed of the templates, from 0 to 2³² - 1.

        Raises:
            UserError: If timm knows no such model, the weights do not fit it, or its layers cannot be grouped so.
            MissingInputError: If the weights cannot be had.
        """
        settings = ModelConfig(
            backbone=name,
            img_size=img_size,
            pretrained=pretrained,
            weights=None if weights is None else str(weights),
        )
        made = create_backbone(settings)
        return cls._wrapped(made.network, recast, _width(made.network), made.name, made.fingerprint, made.input, seed)

    @classmethod
    def wrap(
        cls, model: nn.Module, *, recast: RecastConfig | None = None, width: int | None = None, seed: int = 42
    ) -> RecastModel:
        """A model of one's own in RECAST's form. It is changed in place.

        Args:
            model: A timm model, whose classifier is removed, or a model that gives features [N, D] for images.
            recast: Which layers share templates, and how finely; None takes all that can, in groups of two.
            width: Number D of features; None for a timm model.
            seed: Seed of the templates, from 0 to 2³² - 1.

        Raises:
            UserError: If the model is not one of timm and `width` is missing, its classifier is not a Linear, it has
                templates already, or its layers cannot be grouped so.
        """
        spec: InputSpec | None = None
        name: str = type(model).__name__
        if hasattr(model, "reset_classifier"):
            classifier(model)
            settings = library.described(model)
            spec, name = input_of(model, settings), settings.backbone or name
            timm_model(model).reset_classifier(0)
            width = _width(model) if width is None else width
        if width is None:
            raise UserError(f"width: expected the number of features that {name} gives for an image, got None")
        return cls._wrapped(model, recast, width, name, fingerprint(model), spec, seed)

    @classmethod
    def _wrapped(
        cls,
        network: nn.Module,
        recast: RecastConfig | None,
        width: int,
        backbone: str,
        weights: str,
        spec: InputSpec | None,
        seed: int,
    ) -> RecastModel:
        chosen = recast or RecastConfig()
        groups = find_groups(
            network,
            targets=chosen.targets,
            num_groups=chosen.num_groups,
            num_templates=chosen.num_templates,
            granularity=chosen.granularity,
            last_blocks=chosen.last_blocks,
        )
        banks = mimic(network, groups, num_sets=chosen.num_coefficient_sets, seed=seed)
        return cls(network, banks, width=width, backbone=backbone, weights=weights, input=spec)

    # Tasks

    @property
    def tasks(self) -> Mapping[str, TaskInfo]:
        """Name → what is known of each task, in the order in which they were added."""
        return {name: self._info(task) for name, task in self._tasks.items()}

    @property
    def active(self) -> str | None:
        """The name of the active task; None for the pretrained backbone."""
        return self._active

    def add_task(
        self,
        name: str,
        classes: Sequence[str] | int,
        adapter: Adapter | None = None,
        *,
        batchnorm_statistics: str = "frozen",
        seed: int = 42,
    ) -> None:
        """Add a task; the active one stays active. Its features are those of the pretrained backbone at first.

        Args:
            name: Its name.
            classes: Names of the classes in the order of the logits, or their number.
            adapter: An adapter next to the coefficients, such as `MeLo(rank=4)`.
            batchnorm_statistics: "frozen", or "update" for running statistics of its own, which change in training.
            seed: Seed of the first weights of head and adapter, from 0 to 2³² - 1. Torch's generators stay as they are.

        Raises:
            UserError: If there is a task of this name, or no class.
            UnfitError: If the adapter finds no layer to change. The model is unchanged then.
        """
        if name in self._tasks:
            raise UserError(f"name: expected one that no task has, got {name!r}; remove_task({name!r}) removes it")
        names = tuple(map(str, range(classes))) if isinstance(classes, int) else tuple(map(str, classes))
        if not names:
            raise UserError("classes: expected at least one, got none")
        if batchnorm_statistics not in ("frozen", "update"):
            raise UserError(f"batchnorm_statistics: expected frozen or update, got {batchnorm_statistics!r}")
        self._tasks[name] = self._make(names, adapter or NoAdapter(), batchnorm_statistics == "update", seed)

    def set_task(self, name: str | None) -> None:
        """Make a task the active one; None is the pretrained backbone.

        Gradients of the coefficients are dropped: they belong to the task that was active.

        Raises:
            UnknownNameError: If there is no such task; the active one stays active.
        """
        task = None if name is None else self._find(name)
        with self._turn.lock:
            if name == self._active:
                return
            self._keep()
            self._activate(name, task)

    @contextlib.contextmanager
    def task(self, name: str | None) -> Iterator[RecastModel]:
        """Within the block, a task is the active one; the one before is active again afterwards.

        Raises:
            UnknownNameError: If there is no such task.
        """
        with self._turn.lock:
            before = self._active
            self.set_task(name)
            try:
                yield self
            finally:
                self.set_task(before if before is None or before in self._tasks else None)

    def disable(self) -> contextlib.AbstractContextManager[RecastModel]:
        """Within the block, the model is the pretrained backbone and gives its features [N, D]."""
        return self.task(None)

    def remove_task(self, name: str) -> None:
        """Remove a task. If it is the active one, none is active afterwards.

        Raises:
            UnknownNameError: If there is no such task.
        """
        self._find(name)
        with self._turn.lock:
            if name == self._active:
                self.set_task(None)
            del self._tasks[name]

    # Files

    def load_task(self, path: str | Path, name: str | None = None) -> str:
        """Add the task of a task file: of `save_task`, or of a run of the command line.

        Args:
            path: The file.
            name: Its name; None is that of the file, without its ending.

        Returns:
            The name.

        Raises:
            MissingInputError: If there is no such file.
            UserError: If there is a task of this name; if the file is damaged or holds values that are not finite; if
                it belongs to other weights, other templates or another kind of model. The model is unchanged then.
        """
        loaded = library.load_task(path)
        name = loaded.path.stem if name is None else name
        if name in self._tasks:
            raise UserError(f"name: expected one that no task has, got {name!r}; remove_task({name!r}) removes it")
        where = f"task: {loaded.path}"
        if loaded.settings.method == "full":
            raise UserError(f"{where} has trained the whole backbone, so it shares none with other tasks")
        if loaded.bank is not None and loaded.bank != self.banks.hash:
            raise UserError(
                f"{where} has coefficients for the templates {loaded.bank[:16]}…, this model has "
                f"{self.banks.hash[:16]}…; coefficients mean nothing without their own templates"
            )
        for key, tensor in loaded.tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise UserError(f"{where} holds values in {key} that are not finite")
        task = self._make(loaded.classes, loaded.adapter, loaded.settings.batchnorm_statistics == "update", 0)
        # A task without a bank is an adapter or a head on the pretrained backbone
        adapted = self._adapted(task, coefficients=loaded.bank is not None)
        library.check_weights(loaded, self._fingerprint_for(loaded, task))
        if task.network is None:
            with self._turn.lock:  # the coefficients of such a task are checked and copied in the layers
                self._keep()
                try:
                    self._trunk.show(self._trunk.start)
                    task_file.copy_into(adapted, loaded.tensors)
                    task.coefficients = self._trunk.take()
                finally:
                    self._show_active()
        else:
            task_file.copy_into(adapted, loaded.tensors)
        self._tasks[name] = task
        return name

    def save_task(self, name: str, path: str | Path) -> Path:
        """Save a task to a task file; `load_task` here and `recast_exp.apply_task` read it.

        The template bank is saved next to it as `HASH.safetensors`, unless that file exists.

        Args:
            name: The task.
            path: The file; an old one is replaced.

        Returns:
            `path`.

        Raises:
            UnknownNameError: If there is no such task.
            UserError: If the backbone is not a timm model, whose name and preprocessing a task file needs.
        """
        task, path = self._find(name), Path(path).expanduser()
        if self.input is None:
            raise UserError(f"model: expected a timm model, which a task file can name, got {self.backbone}")
        with self.task(name):
            adapted = self._adapted(task)
            record = task_file.make_record(
                adapted,
                {
                    "model": {
                        "backbone": self.backbone,
                        "img_size": self.input.size,
                        "method": "recast",
                        "batchnorm_statistics": "update" if task.buffers else "frozen",
                    },
                    "adapter": {"name": task.adapter.name, **dataclasses.asdict(task.adapter)},
                },
                backbone={"name": self.backbone, "fingerprint": self._weights},
                classes=list(task.classes),
                input=task_file.input_record(self.input),
                eval_batch_size=256,
            )
            bank_file = path.parent / f"{self.banks.hash}.safetensors"
            if not bank_file.is_file():
                self.banks.save(bank_file)
            task_file.write_task(path, adapted.file_tensors(), record)
        return path

    def merge(self, name: str) -> nn.Module:
        """A plain timm model with the weights of a task, in evaluation mode; this model is unchanged.

        Raises:
            UnknownNameError: If there is no such task.
            UserError: If the backbone is not a timm model.
        """
        task = self._find(name)
        if not hasattr(self._network_of(task), "reset_classifier"):
            raise UserError(f"model: expected a timm model to merge a task into, got {self.backbone}")
        with self.task(name), torch.no_grad():
            merged = library.merge(copy.deepcopy(self._network_of(task)))
            timm_model(merged).reset_classifier(len(task.classes))
            linear = classifier(merged)
            assert isinstance(linear, nn.Linear)
            linear.to(task.head.weight)
            linear.weight.copy_(task.head.weight)
            linear.bias.copy_(task.head.bias)
        return merged.eval().requires_grad_(False)

    # Computing

    def forward(self, images: Tensor, tasks: Sequence[str] | None = None) -> Tensor | list[Tensor]:
        """Logits of the active task, or of a task for each image.

        With `tasks`, tasks without an adapter share one forward pass: n products with the n templates of a group serve
        them all. Where eight or more images have the same task, or it has an adapter, they have a pass of their own.

        Args:
            images: [N, 3, H, W], preprocessed.
            tasks: The name of each image's task; None for the active one.

        Returns:
            [N, classes]; a list of N tensors [classes] if the tasks have different numbers of classes; [N, D] features
            if there is no active task.

        Raises:
            UnknownNameError: If there is no such task.
            UserError: If the number of names is not that of the images.
        """
        if tasks is None:
            logits: Tensor = self.head(self.network(images))
            return logits
        if len(tasks) != len(images):
            raise UserError(f"tasks: expected {len(images)} names, one for each image, got {len(tasks)}")
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(tasks):
            self._find(name)
            rows.setdefault(name, []).append(row)
        with self._turn.lock:
            return self._mixed(images, rows)

    def _mixed(self, images: Tensor, rows: Mapping[str, list[int]]) -> Tensor | list[Tensor]:
        together = [
            name
            for name, places in rows.items()
            if self._tasks[name].network is None and (len(places) < PER_TASK and len(rows) > 1)
        ]
        features: dict[str, Tensor] = {}
        if together:
            places = [row for name in together for row in rows[name]]
            found = self._products(images[places], [name for name in together for _ in rows[name]])
            features = dict(zip(together, torch.split(found, [len(rows[name]) for name in together]), strict=True))
        for name, places in rows.items():
            if name not in features:
                with self.task(name):
                    features[name] = self.network(images[places])
        logits: list[Tensor] = [images] * len(images)
        for name, places in rows.items():
            for row, line in zip(places, self._tasks[name].head(features[name]), strict=True):
                logits[row] = line
        return torch.stack(logits) if len({len(line) for line in logits}) == 1 else logits

    def _products(self, images: Tensor, names: Sequence[str]) -> Tensor:
        """Features of images, each with the coefficients of its own task."""
        active = self._tasks[self._active] if self._active is not None else None
        if active is not None and active.network is None:
            active.coefficients = self._trunk.take(active.coefficients)
        index = {name: number for number, name in enumerate(dict.fromkeys(names))}
        vectors: list[Tensor] = []
        for name in index:
            vector = self._tasks[name].coefficients
            assert vector is not None
            vectors.append(vector)
        chosen = torch.stack(vectors)[[index[name] for name in names]]
        with per_image(self._trunk.network, self._trunk.per_layer(chosen)):
            features: Tensor = self._trunk.network(images)
        return features

    def train(self, mode: bool = True) -> RecastModel:
        """As of any module, but running statistics that tasks share do not change."""
        super().train(mode)
        if self._active is None or not self._tasks[self._active].buffers:
            for _, module in normalisations_with_statistics(self.network):
                module.eval()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RecastModel:
        """Move or convert all tasks, not the active one alone."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._trunk.start = fn(self._trunk.start)
        modules = [self._trunk.network]
        for task in self._tasks.values():
            modules += [task.head, *([task.network] if task.network is not None else [])]
            if task.coefficients is not None:
                task.coefficients = fn(task.coefficients)
        for module in modules:
            if module is not self.network and module is not self.head:
                module._apply(fn)  # type: ignore[no-untyped-call]
        return self

    # How tasks are kept

    def _find(self, name: str) -> _Task:
        if name not in self._tasks:
            near = difflib.get_close_matches(name, self._tasks, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            listed = ", ".join(map(repr, list(self._tasks)[:10])) or "no task yet; add_task adds one"
            raise UnknownNameError(f"task: expected one of {listed}, got {name!r}{hint}")
        return self._tasks[name]

    def _info(self, task: _Task) -> TaskInfo:
        network = self._network_of(task)
        adapter = [network.get_parameter(path) for path in task.adapter_paths.values()]
        own, head = [self._trunk.start, *adapter], list(task.head.parameters())
        return TaskInfo(
            classes=task.classes,
            adapter=task.adapter,
            parameters=sum(tensor.numel() for tensor in own),
            head=sum(tensor.numel() for tensor in head),
            bytes=sum(tensor.numel() * tensor.element_size() for tensor in (*own, *head)),
            fingerprint=self._weights,
        )

    def _network_of(self, task: _Task) -> nn.Module:
        return self._trunk.network if task.network is None else task.network

    def _make(self, classes: tuple[str, ...], adapter: Adapter, update: bool, seed: int) -> _Task:
        reference = next(self._trunk.network.parameters())
        with seeded(seed):
            head = nn.Linear(self.width, len(classes)).to(reference.device, reference.dtype)
        task = _Task(classes, head, adapter)
        if isinstance(adapter, NoAdapter) and not update:
            task.coefficients = self._trunk.start.clone()
            return task
        with self._turn.lock, self.disable():
            task.network = self._trunk.copy(own_statistics=update)
        task.adapter_paths = inject_adapter(task.network, adapter, seed=seed)
        self._trunk.separate(task.network, list(task.adapter_paths.values()))
        task.buffers = running_statistics(task.network) if update else {}
        for parameter in self._trunk.coefficients_of(task.network):
            parameter.requires_grad_(True)
        return task

    def _adapted(self, task: _Task, coefficients: bool = True) -> AdaptedModel:
        """A task as `task_file` takes it. If it has no model of its own, its coefficients are those in the layers."""
        network = self._network_of(task)
        whole = nn.ModuleDict({"network": network, "head": task.head})
        path_of = {id(parameter): path for path, parameter in whole.named_parameters()}
        layers = zip(self._trunk.layers, self._trunk.coefficients_of(network), strict=True) if coefficients else ()
        prefix = str(getattr(network, "pretrained_cfg", {}).get("classifier") or "head")
        trainable = {
            "head": {f"{prefix}.{name}": f"head.{name}" for name, _ in task.head.named_parameters()},
            "coefficients": {layer: path_of[id(parameter)] for layer, parameter in layers},
            "adapter": {public: f"network.{path}" for public, path in task.adapter_paths.items()},
        }
        buffers = {public: f"network.{path}" for public, path in task.buffers.items()}
        banks = self.banks if coefficients else None
        return AdaptedModel(whole, trainable, buffers, banks, task.adapter, self._weights)

    def _fingerprint_for(self, loaded: library.Task, task: _Task) -> str:
        """The fingerprint of this backbone, taken as that of a task file was."""
        if not loaded.fingerprint.startswith(FROZEN):
            return self._weights
        if loaded.bank is None:
            return f"{FROZEN}{self._weights}"
        network = self._network_of(task)
        paths = {id(parameter): path for path, parameter in network.named_parameters()}
        coefficients = self._trunk.coefficients_of(network)
        trained = {
            "coefficients": {str(place): paths[id(parameter)] for place, parameter in enumerate(coefficients)},
            "adapter": task.adapter_paths,
        }
        return library.frozen_fingerprint(AdaptedModel(network, trained, task.buffers))

    def _keep(self) -> None:
        """Take the coefficients of the active task out of the layers, where training has changed them."""
        active = self._tasks[self._active] if self._active is not None else None
        if active is not None and active.network is None:
            active.coefficients = self._trunk.take(active.coefficients)

    def _show_active(self) -> None:
        active = self._tasks[self._active] if self._active is not None else None
        # The layers of a task with a model of its own are others
        vector = None if active is None else active.coefficients
        self._trunk.show(self._trunk.start if vector is None else vector)

    def _activate(self, name: str | None, task: _Task | None) -> None:
        training = self.training
        self.network = self._trunk.network if task is None else self._network_of(task)
        self.head = nn.Identity() if task is None else task.head
        self._active = name
        self._show_active()
        for parameter in self._trunk.live:
            parameter.grad = None
            parameter.requires_grad_(task is not None and task.network is None)
        if self.network.training != training or self.head.training != training or training:
            self.train(training)


def _width(network: nn.Module) -> int:
    """The number of features that a timm model without a classifier gives."""
    for name in ("head_hidden_size", "num_features"):
        if isinstance(width := getattr(network, name, None), int):
            return width
    raise UserError(f"width: expected the number of features of {type(network).__name__}, got None; pass it to wrap")
