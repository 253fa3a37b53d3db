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
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from recast_exp.adapters import Adapter, NoAdapter
from recast_exp.config.schema import ModelConfig, RecastConfig
from recast_exp.data.pixels import normalize
from recast_exp.data.preprocessing import InputSpec
from recast_exp.errors import UnknownNameError, UserError, check_integer, section
from recast_exp.files import user_path
from recast_exp.models import loading
from recast_exp.models.adapted import normalisations_with_statistics
from recast_exp.models.backbones import Backbone
from recast_exp.models.check import check_images
from recast_exp.models.features import classified, classifier
from recast_exp.models.timm_model import timm_model
from recast_exp.recast import Banks
from recast_exp.recast.mixed import per_task
from recast_exp.tasks import construction, library, model_file
from recast_exp.tasks.construction import Parts
from recast_exp.tasks.kept_task import KeptTask, TaskInfo
from recast_exp.tasks.prediction import Picture, Predicted, pictures_of, prepared, top_of
from recast_exp.tasks.trunk import Trunk
from recast_exp.torch_state import undone_on_failure

MAX_CLASSES = 10_000_000


class _Turn:
    """A lock that copies of a model do not share."""

    def __init__(self) -> None:
        self.lock = threading.RLock()

    def __deepcopy__(self, memo: dict[int, object]) -> _Turn:
        return _Turn()


class RecastModel(nn.Module):
    """A backbone in RECAST's form, and any number of tasks on it.

    `model(images)` gives the logits [N, classes] of the active task for images [N, 3, H, W], or the features [N, D] of
    the pretrained backbone where no task is active. `model.parameters()` are those of the backbone, frozen, and of the
    active task, which train: use an optimizer of its own for each task, made after `set_task`. `state_dict` holds what
    `parameters` gives, and so the active task alone; `save` keeps all tasks.

    Switching changes the model, so two threads must not do it at once. `with model.task(name):`,
    `model(images, tasks=[…])` and `predict` let other threads wait until they are done. `set_task` and `model(images)`
    do not.

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

    _recast_exp_many_tasks: ClassVar[bool] = True

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self._turn = _Turn()
        self.network = parts.network
        self.head: nn.Module = nn.Identity()
        self.backbone = parts.backbone
        self.input = parts.input
        self._arguments = dict(parts.arguments)
        self._tasks: dict[str, KeptTask] = {}
        self._active: str | None = None
        self._trunk = Trunk(parts.network, parts.banks, parts.width, parts.weights)
        self.eval()

    def __deepcopy__(self, memo: dict[int, object]) -> RecastModel:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    def __getstate__(self) -> NoReturn:
        raise UserError(
            "RecastModel: expected model.save(FOLDER) and RecastModel.load(FOLDER), got pickle (torch.save, or another "
            "process), which cannot hold weights that are computed"
        )

    @classmethod
    def on(cls, backbone: Backbone, banks: Banks) -> RecastModel:
        """A backbone and its templates, which are injected in place.

        Raises:
            UserError: If a head for each task cannot compute what the backbone's own would.
        """
        return cls(construction.of_backbone(backbone, banks))

    @classmethod
    @torch.inference_mode(False)
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
            UserError: If timm knows no such model, it takes no images of this size, the weights do not fit it, it has
                heads next to its classifier, or its layers cannot be grouped so.
            MissingInputError: If the weights cannot be had.
        """
        return cls(construction.of_timm(name, recast, weights, pretrained, img_size, seed))

    @classmethod
    @torch.inference_mode(False)
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
                heads next to it, or templates already, or its layers cannot be grouped so. The model is unchanged then.
        """
        construction.check_own(model, width)
        with undone_on_failure(model):
            return cls(construction.of_own(model, recast, width, seed))

    # Tasks

    @property
    def tasks(self) -> Mapping[str, TaskInfo]:
        """Name → what is known of each task, in the order in which they were added."""
        return _Infos(self)

    @property
    def active(self) -> str | None:
        """The name of the active task; None for the pretrained backbone."""
        return self._active

    @torch.inference_mode(False)
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
        self._check_new(name)
        if adapter is not None and not isinstance(adapter, Adapter):
            raise UserError(f"adapter: expected an Adapter such as MeLo(rank=4), or None, got {adapter!r:.60}")
        if isinstance(classes, int):
            check_integer("classes", classes, 1, MAX_CLASSES)
            classes = [str(number) for number in range(classes)]
        names = tuple(library.class_names(classes))
        if not names:
            raise UserError("classes: expected at least one, got none")
        check_integer("seed", seed, 0, 2**32)
        if batchnorm_statistics not in ("frozen", "update"):
            raise UserError(f"batchnorm_statistics: expected frozen or update, got {batchnorm_statistics!r}")
        update = batchnorm_statistics == "update"
        self._tasks[name] = KeptTask.new(self._trunk, names, adapter or NoAdapter(), update, seed)

    @torch.inference_mode(False)
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

    @torch.inference_mode(False)
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

    @torch.inference_mode(False)
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
                it belongs to other weights, other templates, a model that computes otherwise with these weights, or
                another kind of model. The model is unchanged then.
        """
        loaded = loading.load_task(path)
        name = loaded.path.stem if name is None else name
        self._check_new(name)
        if self.input is not None and loaded.input.size != self.input.size:
            with section(f"task: {loaded.path}: "):
                check_images(ModelConfig(backbone=self.backbone, img_size=self.input.size), loaded.input.size)
        with self._turn.lock:
            self._keep()
            try:
                self._trunk.show(self._trunk.start)
                self._tasks[name] = KeptTask.of_file(self._trunk, loaded)
            finally:
                self._show_active()
        self._arguments = self._arguments or dict(loaded.settings.arguments)  # as this model was found to compute
        return name

    def save_task(self, name: str, path: str | Path) -> Path:
        """Save a task to a task file; `load_task` here and `recast_exp.apply_task` read it.

        It does not need the templates: they are made again from the pretrained weights.

        Args:
            name: The task.
            path: The file; an old one is replaced.

        Returns:
            `path`.

        Raises:
            UnknownNameError: If there is no such task.
            UserError: If the backbone is not a timm model, whose name and preprocessing a task file needs.
        """
        task, path = self._find(name), user_path(path)
        if self.input is None:
            raise UserError(f"model: expected a timm model, which a task file can name, got {self.backbone}")
        # A task of a file keeps what the file says: its images may be others than those of this model
        settings = task.settings or ModelConfig(img_size=self.input.size)
        settings = dataclasses.replace(
            settings, backbone=self.backbone, arguments=settings.arguments or dict(self._arguments)
        )
        spec = task.input or self.input
        more = library.computation_of(self._trunk.network, settings)
        if task.metrics:
            more["metrics"] = task.metrics
        with self.task(name):
            library.write(path, task.adapted(), settings, task.classes, spec, self._trunk.weights, more)
        return path

    def save(self, path: str | Path) -> Path:
        """Save the model with all its tasks: backbone, templates and a task file for each task; `load` reads it.

        Args:
            path: A folder; or a file, if it ends with `.zip`. Saving again into a folder writes only what is new.

        Returns:
            `path`.

        Raises:
            UserError: If the backbone is not a timm model, or was made with arguments that its name does not tell.
                Its tasks can be saved then (`save_task`).

        Example:
            >>> import tempfile
            >>> from recast_exp import RecastConfig, RecastModel
            >>> config = RecastConfig(targets=["*.attn.qkv"])
            >>> model = RecastModel.from_timm("vit_tiny_patch16_224", pretrained=False, recast=config)
            >>> model.add_task("pets", ["cat", "dog"])
            >>> list(RecastModel.load(model.save(tempfile.mkdtemp())).tasks)
            ['pets']
        """
        path = user_path(path)
        model_file.save(self, path)
        return path

    @classmethod
    @torch.inference_mode(False)
    def load(cls, path: str | Path, *, backbone: str | None = None) -> RecastModel:
        """Load a model of `save`, to the bit. No task is active, and nothing of timm's own is downloaded.

        Args:
            path: The folder, or the zip file.
            backbone: Its backbone, to be named only where it is `hf-hub:OWNER/NAME` or `local-dir:FOLDER`: what timm
                loads from there a file must not choose.

        Raises:
            MissingInputError: If there is none at the path.
            UserError: If it is damaged, or has another backbone than the one named.
        """
        return model_file.load(cls, user_path(path), backbone)

    @torch.inference_mode(False)
    def merge(self, name: str) -> nn.Module:
        """A plain timm model with the weights of a task, in evaluation mode; this model is unchanged.

        Raises:
            UnknownNameError: If there is no such task.
            UserError: If the backbone is not a timm model with one head.
        """
        task = self._find(name)
        if not hasattr(task.network, "reset_classifier"):
            raise UserError(f"model: expected a timm model to merge a task into, got {self.backbone}")
        with self.task(name), torch.no_grad():
            merged = library.merge(copy.deepcopy(task.network))
            construction.check_one_head(merged, self.backbone)
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

        With `tasks`, all tasks without an adapter share one forward pass, in which each rewritten layer has the weights
        of one task after the other, or takes products with its templates instead, whichever costs less. The images of a
        task with an adapter, or with running statistics of its own, have a pass of their own. So have all tasks where a
        layer computes in a way of its own, the model takes its weight without calling it (BEiT, EVA, Swin V2), or the
        first dimension of its input is not that of the images. The first such batch shows which of them it is.

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
            return classified(self.head, self.network(images))
        if isinstance(tasks, str) or not isinstance(tasks, Sequence):
            raise UserError(f"tasks: expected a list with the name of each image's task, got {tasks!r:.60}")
        if len(tasks) != len(images):
            raise UserError(f"tasks: expected {len(images)} names, one for each image, got {len(tasks)}")
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(tasks):
            self._find(name)
            rows.setdefault(name, []).append(row)
        with self._turn.lock:
            return self._mixed(images, rows)

    def predict(
        self, images: Picture | Sequence[Picture], tasks: str | Sequence[str] | None = None, top: int = 5
    ) -> list[Predicted]:
        """The most probable classes of images, which are prepared as the evaluation of each task prepares them.

        All images are in memory at once; `stage=predict` takes any number.

        Args:
            images: Files, images of PIL, or uint8 arrays or tensors [H, W, 3] or [3, H, W]; one, several, or a batch.
            tasks: A task for all, or the name of each image's task; None for the active one.
            top: Number of classes for an image.

        Returns:
            A prediction for each image, in their order.

        Raises:
            UnknownNameError: If there is no such task.
            UserError: If there is no active task and none is given, the number of names is not that of the images, an
                image cannot be read, or nothing says how images are prepared: the backbone is not a timm model.
        """
        pictures = pictures_of(images)
        check_integer("top", top, 1)
        names = self._names_for(len(pictures), tasks)
        if not pictures:
            return []
        reference = next(self.network.parameters())
        specs = [self._input_of(name) for name in names]
        ready = [
            normalize(prepared(picture, spec)[None], *spec.constants())[0]
            for picture, spec in zip(pictures, specs, strict=True)
        ]
        logits: dict[int, Tensor] = {}
        with self._turn.lock, self._evaluating(), torch.inference_mode():
            for size in {spec.size for spec in specs}:  # a batch has one
                rows = [row for row, spec in enumerate(specs) if spec.size == size]
                batch = torch.stack([ready[row] for row in rows]).to(reference.device, reference.dtype)
                logits.update(zip(rows, self(batch, tasks=[names[row] for row in rows]), strict=True))
        return [top_of(logits[row], self._find(name).classes, name, top) for row, name in enumerate(names)]

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        modes = [(module, module.training) for whole in (self, self._trunk.network) for module in whole.modules()]
        try:
            self.eval()
            yield
        finally:
            for module, training in modes:
                module.training = training

    def _names_for(self, count: int, tasks: str | Sequence[str] | None) -> list[str]:
        given = self._active if tasks is None else tasks
        if given is None:
            raise UserError("tasks: expected a task, as none is active, got None")
        if not isinstance(given, Sequence):
            raise UserError(f"tasks: expected a task, or a list with that of each image, got {given!r:.60}")
        names = [given] * count if isinstance(given, str) else list(given)
        if len(names) != count:
            raise UserError(f"tasks: expected {count} names, one for each image, got {len(names)}")
        return names

    def _input_of(self, name: str) -> InputSpec:
        spec = self._find(name).input or self.input
        if spec is None:
            raise UserError(f"model: expected one of timm, which says how images are prepared, got {self.backbone}")
        return spec

    def _mixed(self, images: Tensor, rows: Mapping[str, list[int]]) -> Tensor | list[Tensor]:
        # Tasks with the same number of images follow one another: `per_task` multiplies them together
        together = sorted((name for name in rows if self._tasks[name].own is None), key=lambda name: len(rows[name]))
        features: dict[str, Tensor] = {}
        if len(together) > 1 and self._trunk.serves_many(images):
            counts = [len(rows[name]) for name in together]
            found = self._shared_pass(images[[row for name in together for row in rows[name]]], together, counts)
            if found is not None:
                features = dict(zip(together, torch.split(found, counts), strict=True))
        for name, places in rows.items():
            if name not in features:
                with self.task(name):
                    features[name] = self.network(images[places])
        logits: list[Tensor] = [images] * len(images)
        for name, places in rows.items():
            for row, line in zip(places, classified(self._tasks[name].head, features[name]), strict=True):
                logits[row] = line
        return torch.stack(logits) if len({len(line) for line in logits}) == 1 else logits

    def _shared_pass(self, images: Tensor, names: Sequence[str], counts: Sequence[int]) -> Tensor | None:
        """Features of the images of several tasks without adapters, task after task, if `Trunk.serves_many`.

        None if a layer was not called, or not with all images: in training, some models leave out layers or images.
        """
        self._keep()
        vectors: list[Tensor] = []
        for name in names:
            vector = self._tasks[name].coefficients
            assert vector is not None
            vectors.append(vector)
        with (
            contextlib.suppress(UserError),
            per_task(self._trunk.network, self._trunk.per_layer(torch.stack(vectors)), counts) as called,
        ):
            features: Tensor = self._trunk.network(images)
            return features if len(called) == len(self._trunk.layers) else None
        return None

    def train(self, mode: bool = True) -> RecastModel:
        """As of any module, but running statistics that tasks share do not change."""
        super().train(mode)
        trunk = self._trunk.network
        if self.network is not trunk:  # mixed batches go through it whatever the active task
            trunk.train(mode)
            for _, module in normalisations_with_statistics(trunk):
                module.eval()
        if self._active is None or not self._tasks[self._active].buffers:
            for _, module in normalisations_with_statistics(self.network):
                module.eval()
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As of any module, but values are copied even if `assign`: tasks share the tensors that hold them."""
        return super().load_state_dict(state_dict, strict=strict)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RecastModel:
        """Move or convert all tasks, not the active one alone."""
        before = self._trunk.start.dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._trunk.start = fn(self._trunk.start)
        modules = [self._trunk.network]
        for task in self._tasks.values():
            modules += [task.head, *([task.own] if task.own is not None else [])]
            if task.coefficients is not None:
                task.coefficients = fn(task.coefficients)
        for module in modules:
            if module is not self.network and module is not self.head:
                module._apply(fn)  # type: ignore[no-untyped-call]
        if self._trunk.start.dtype != before:
            self._trunk.renew_templates()
            if self._active is None or self._tasks[self._active].coefficients is None:
                self._trunk.show(self._trunk.start)
        return self

    # How tasks are kept

    def _check_new(self, name: str) -> None:
        if not isinstance(name, str) or not name:
            raise UserError(f"name: expected a string, got {name!r}")
        if name in self._tasks:
            raise UserError(f"name: expected one that no task has, got {name!r}; remove_task({name!r}) removes it")
        plain = unicodedata.normalize("NFC", name)
        if same := [each for each in self._tasks if unicodedata.normalize("NFC", each) == plain]:
            raise UserError(f"name: expected one that no task has, got {name!r}, other characters for {same[0]!r}")

    def _find(self, name: str) -> KeptTask:
        if not isinstance(name, str) or name not in self._tasks:
            near = difflib.get_close_matches(str(name), self._tasks, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            listed = ", ".join(map(repr, list(self._tasks)[:10])) or "no task yet; add_task adds one"
            raise UnknownNameError(f"task: expected one of {listed}, got {name!r}{hint}")
        return self._tasks[name]

    def _keep(self) -> None:
        """Take the coefficients of the active task out of the layers, where training has changed them."""
        active = self._tasks[self._active] if self._active is not None else None
        if active is not None and active.own is None:
            active.coefficients = self._trunk.take(active.coefficients)

    def _show_active(self) -> None:
        active = self._tasks[self._active] if self._active is not None else None
        # The layers of a task with a model of its own are others
        vector = None if active is None else active.coefficients
        self._trunk.show(self._trunk.start if vector is None else vector)

    def _activate(self, name: str | None, task: KeptTask | None) -> None:
        training = self.training
        self.network = self._trunk.network if task is None else task.network
        self.head = nn.Identity() if task is None else task.head
        self._active = name
        self._show_active()
        for parameter in self._trunk.live:
            parameter.grad = None
            parameter.requires_grad_(task is not None and task.own is None)
        if self.network.training != training or self.head.training != training or training:
            self.train(training)


class _Infos(Mapping[str, TaskInfo]):
    """What is known of each task, found out when it is asked for."""

    def __init__(self, model: RecastModel) -> None:
        self._model = model

    def __getitem__(self, name: str) -> TaskInfo:
        return self._model._find(name).info

    def __iter__(self) -> Iterator[str]:
        return iter(self._model._tasks)

    def __len__(self) -> int:
        return len(self._model._tasks)

    def __repr__(self) -> str:
        return repr(dict(self))
