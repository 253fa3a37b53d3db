"""From a backbone to a model for one task: new head, templates, adapter, and the one rule of what trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from recast_exp.adapters import Adapter, NoAdapter, fixed_of, inject_adapter, named_tensors
from recast_exp.config.schema import ModelConfig
from recast_exp.errors import UserError
from recast_exp.models.timm_model import timm_model
from recast_exp.recast import Banks, inject
from recast_exp.torch_state import seeded

CHANGE = "coefficients/change"  # the name of the measure, over all groups; one group's is below it
KINDS = ("coefficients", "adapter", "backbone", "head")  # the kinds of trained parameters, as in every file and plot


class Packer(Protocol):
    """A module that packs its parameter for a task file.

    Attributes:
        bits: Bits of one entry of the packed parameter.
    """

    bits: int

    def pack(self) -> Tensor:
        """The packed parameter."""

    def unpack(self, packed: Tensor) -> None:
        """Load a packed parameter."""


@dataclass
class AdaptedModel:
    """A timm model changed in place for one task, and the names of all that belongs to the task.

    Attributes:
        network: The model: images [N, 3, H, W] → logits [N, classes].
        trainable: Kind → public name → parameter name. The public name of coefficients is their layer; most others
            are the parameter's own name. The task file and the counts use public names.
        buffers: Public name → buffer name, for running statistics that change with the task.
        banks: The template banks; None for a model without templates.
        adapter: The adapter; `NoAdapter()` for none.
        backbone: Fingerprint of the backbone's pretrained weights.
        fixed: Public name → name, of parameters and buffers that the adapter has brought and that do not train, such as
            VeRA's random projections. Of tensors that are one, the first is named.
    """

    network: nn.Module
    trainable: dict[str, dict[str, str]]
    buffers: dict[str, str] = field(default_factory=dict)
    banks: Banks | None = None
    adapter: Adapter = field(default_factory=NoAdapter)
    backbone: str = ""
    fixed: dict[str, str] = field(default_factory=dict)

    @property
    def updates_trunk(self) -> bool:
        """Whether running statistics of the trunk change with the task, and not only those of its head."""
        heads = self._modules_of_head
        return any(path.rpartition(".")[0] not in heads for path in self.buffers.values())

    @property
    def _modules_of_head(self) -> set[str]:
        return {path.rpartition(".")[0] for path in self.trainable.get("head", {}).values()}

    def hold_statistics(self, *, head_only: bool = False) -> None:
        """Put normalisations into evaluation mode, in which they take no statistics of a batch, unless these train.

        Args:
            head_only: Whether only the head trains now.
        """
        training = {path.rpartition(".")[0] for path in self.buffers.values()}
        if head_only:
            training &= self._modules_of_head
        for name, module in normalisations_with_statistics(self.network):
            if name not in training:
                module.eval()

    @property
    def trunk(self) -> dict[str, str]:
        """The pretrained weights and the template bank, by content: the task's parameters mean nothing without them."""
        return {"backbone": self.backbone, "bank": self.banks.hash if self.banks else ""}

    def parameters(self, kind: str) -> Iterator[tuple[str, nn.Parameter]]:
        """Public names and trained parameters of one kind."""
        for name, path in self.trainable.get(kind, {}).items():
            yield name, self.network.get_parameter(path)

    def task_tensors(self) -> dict[str, Tensor]:
        """`kind/public name` → tensor of the model itself, for all parameters and buffers of the task."""
        tensors: dict[str, Tensor] = {}
        for kind in KINDS:
            tensors |= {f"{kind}/{name}": parameter.data for name, parameter in self.parameters(kind)}
        tensors |= {f"buffers/{name}": self.network.get_buffer(path) for name, path in self.buffers.items()}
        return tensors

    def packers(self) -> dict[str, Packer]:
        """`kind/public name` → the module that packs this parameter for a task file, in less than a byte per entry."""
        owners = {
            f"adapter/{name}": self.network.get_submodule(path.rpartition(".")[0])
            for name, path in self.trainable.get("adapter", {}).items()
        }
        return {name: owner for name, owner in owners.items() if _packs(owner)}

    def fixed_tensors(self) -> dict[str, Tensor]:
        """`fixed/public name` → tensor of the model itself, for what the adapter keeps fixed."""
        if not self.fixed:
            return {}
        tensors = dict(named_tensors(self.network))
        return {f"fixed/{name}": tensors[path].data for name, path in self.fixed.items()}

    def file_tensors(self) -> dict[str, Tensor]:
        """`task_tensors`, some of them packed, and `fixed_tensors`."""
        packed = {name: owner.pack() for name, owner in self.packers().items()}
        return self.task_tensors() | packed | self.fixed_tensors()

    def start_coefficients(self) -> dict[str, Tensor]:
        """Layer → mimicked coefficients [K, B, n], from which training starts."""
        return dict(self.banks.coefficients) if self.banks else {}

    def coefficient_changes(self) -> dict[str, float]:
        """The mean absolute difference of the coefficients to the mimicked ones.

        Returns:
            `coefficients/change` over all coefficients, and `coefficients/change/GROUP` for each group of layers.
        """
        start = self.start_coefficients()
        moved = {
            layer: (parameter.detach().cpu() - start[layer]).abs().flatten()
            for layer, parameter in self.parameters("coefficients")
        }
        if self.banks is None or not moved:
            return {}
        parts = {"": list(moved)} | {f"/{group.name}": group.layers for group in self.banks.groups}
        return {
            f"{CHANGE}{part}": torch.cat([moved[layer] for layer in layers]).mean().item()
            for part, layers in parts.items()
        }

    def finish_adapter(self) -> None:
        """Let the adapter do what comes after training."""
        for name in self.adapter.finish(self.network):
            del self.trainable["adapter"][name]

    def set_trainable(self, *kinds: str) -> None:
        """Let these kinds of parameters train, and freeze all others."""
        self.network.requires_grad_(False)
        for kind in kinds:
            for _, parameter in self.parameters(kind):
                parameter.requires_grad_(True)


def _packs(module: nn.Module) -> TypeGuard[Packer]:
    return hasattr(module, "pack")


def assemble(
    network: nn.Module, model: ModelConfig, adapter: Adapter, banks: Banks | None, num_classes: int, seed: int
) -> AdaptedModel:
    """Build a model on a backbone, in place.

    Args:
        network: A pretrained timm model without a classifier.
        model: Its method decides which parameters train; it also says whether BatchNorm's running statistics change.
        adapter: The adapter, or `NoAdapter()`; full fine-tuning has none.
        banks: Template banks for `model.method=recast`.
        num_classes: Classes of the task.
        seed: Seed of the first weights of the new head and the adapter. The generators of torch, NumPy and Python stay
            as they are.

    Raises:
        UserError: If the backbone has no classifier to train, or the banks do not fit it.
    """
    update = model.batchnorm_statistics == "update"
    with seeded(seed):
        if model.method == "full":
            return assemble_full(network, num_classes, update)
        head = _new_head(network, num_classes)
        trainable = {"head": head}
        if banks is not None:
            trainable["coefficients"] = inject(network, banks)
        owned = {
            kind: {name: network.get_parameter(path) for name, path in paths.items()}
            for kind, paths in trainable.items()
        }
        # From the generators as the head leaves them
        trainable["adapter"] = inject_adapter(network, adapter, seed=None)
    # An adapter that replaces layers by its own modules (peft) gives the layers' parameters other names
    path_of = {id(parameter): path for path, parameter in network.named_parameters()}
    for kind, parameters in owned.items():
        trainable[kind] = {name: path_of[id(parameter)] for name, parameter in parameters.items()}
    buffers = running_statistics(network) if update else _of_head(network, head)
    adapted = AdaptedModel(network, trainable, buffers, banks, adapter, fixed=fixed_of(network))
    adapted.set_trainable(*KINDS)
    return adapted


def assemble_full(network: nn.Module, num_classes: int, update_batchnorm: bool) -> AdaptedModel:
    """Full fine-tuning: a new head, initialised from torch's generator, and every parameter trains."""
    head = _new_head(network, num_classes)
    backbone = {name: name for name, _ in network.named_parameters() if name not in head.values()}
    buffers = running_statistics(network) if update_batchnorm else _of_head(network, head)
    adapted = AdaptedModel(network, {"head": head, "backbone": backbone}, buffers)
    adapted.set_trainable(*KINDS)
    return adapted


def normalisations_with_statistics(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and modules of the layers that keep running statistics of their inputs, such as BatchNorm."""
    return [
        (name, module)
        for name, module in network.named_modules()
        if isinstance(module, _NormBase) and module.track_running_stats
    ]


def running_statistics(network: nn.Module) -> dict[str, str]:
    """The names of a model's running means and variances, each with itself as its public name."""
    names = [
        f"{name}.{which}"
        for name, _ in normalisations_with_statistics(network)
        for which in ("running_mean", "running_var")
    ]
    return {name: name for name in names}


def _of_head(network: nn.Module, head: Mapping[str, str]) -> dict[str, str]:
    """The running statistics of a new head: they belong to its weights, and are learnt with them (LeViT has some)."""
    layers = {path.rpartition(".")[0] for path in head.values()}
    return {name: path for name, path in running_statistics(network).items() if path.rpartition(".")[0] in layers}


def _new_head(network: nn.Module, num_classes: int) -> dict[str, str]:
    timm_model(network).reset_classifier(num_classes)
    names = head_parameters(network)
    if not names:
        raise UserError(
            f"model.backbone: expected a model with a classifier to train, got {type(network).__name__}, which has none"
        )
    return names


def other_heads(network: nn.Module) -> list[str]:
    """The weights of heads that a timm model without a classifier gets next to its classifier (VOLO: `aux_head`)."""
    before = {name for name, _ in network.named_parameters()}
    with seeded(0):
        timm_model(network).reset_classifier(1)
        known = before | set(head_parameters(network))
        found = [name for name, weight in network.named_parameters() if name not in known and weight.dim() > 1]
        timm_model(network).reset_classifier(0)
    return found


def head_parameters(network: nn.Module) -> dict[str, str]:
    """The names of the parameters of a timm model's classifier, each with itself as its public name."""
    classifier = timm_model(network).get_classifier()
    modules = classifier if isinstance(classifier, tuple | list) else [classifier]
    of_head = {id(parameter) for module in modules if module is not None for parameter in module.parameters()}
    return {name: name for name, parameter in network.named_parameters() if id(parameter) in of_head}
