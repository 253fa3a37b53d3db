"""The base class of adapters, and the functions with which they find layers of a timm model and attach to them.

An adapter either attaches a small module to a layer, registered below the layer's name, whose methods are forward hooks
of the layer; or it parametrises the layer's weight. The layer keeps its own name and weights. A deep copy has its own
adapter (bound methods are copied with their objects), and removing the adapter leaves the stock model.
"""

from __future__ import annotations

import copy
import importlib.metadata
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrize

from recast_exp.config import converted
from recast_exp.plugins import ADAPTERS
from recast_exp.recast.grouping import classifier_modules
from recast_exp.recast.inject import BANKS

NORMS = (nn.LayerNorm, nn.GroupNorm, _NormBase)
"""Classes of normalisation layers; those of timm derive from these."""

INJECTED = "_recast_exp_adapters"
"""The attribute of a network that remembers its adapters; it is not in the state dict."""


@dataclass
class Adapter(ABC):
    """The base class of adapters: methods that change a frozen network in place.

    A dataclass derives from it, whose fields are the options, each declared with
    `recast_exp.config.fields.option(default, help, bounds)`. Types and bounds are checked on construction, which raises
    a `UserError` that names the option. A class with its own `__post_init__` calls `super().__post_init__()` first.

    Attributes:
        fits: The layers that the adapter needs in a network, in words: "attention with a fused layer qkv".
        keeps_fixed: Whether it brings tensors that do not train and depend on random numbers or on the weights, such as
            random projections. A task file holds these too.
    """

    fits: ClassVar[str]
    keeps_fixed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        converted.check(self)

    @property
    def name(self) -> str:
        """The adapter's name in the configuration: that of its module, or of the entry point that leads to it."""
        module = type(self).__module__
        if not module.startswith(f"{ADAPTERS.package}."):
            for point in importlib.metadata.entry_points(group=ADAPTERS.group):
                if point.module == module:
                    return point.name
        return module.rpartition(".")[2]

    @property
    def label(self) -> str:
        """The adapter's name in tables and plots: by default the name of its class."""
        return type(self).__name__

    @abstractmethod
    def inject(self, network: nn.Module) -> dict[str, str]:
        """Change a network in place, without changing its output.

        Args:
            network: A timm model, with RECAST's templates or without.

        Returns:
            Public name → parameter name, of the parameters that train. Empty if the adapter finds no layer to change:
            it does not fit.
        """

    @property
    def needs_images(self) -> bool:
        """Whether `initialise` looks at training images."""
        return False

    def initialise(self, network: nn.Module, run: Callable[[], None]) -> None:
        """Choose the first values of the parameters in another way than `inject`, for what needs images.

        Parameters may be replaced by others of the same names. What decides their shapes goes into an option, which a
        task file records with the rest (`found`).

        Args:
            network: The network that `inject` has changed.
            run: Passes training images through the network, in evaluation mode and without gradients.
        """
        return

    def before_step(self, network: nn.Module) -> None:
        """Called before each training step, with torch's generator seeded by the epoch; does nothing by default."""
        return

    def after_step(self, network: nn.Module, lr: float) -> None:
        """Called after each step of the optimiser; does nothing by default.

        Args:
            network: The network.
            lr: The adapter's learning rate in this step.
        """
        return

    def finish(self, network: nn.Module) -> list[str]:
        """Called once after training, when the parameters are those of the reported epoch; does nothing by default.

        The network has to compute the same afterwards.

        Returns:
            Public names of parameters that are there no more.
        """
        return []

    def found(self) -> dict[str, object]:
        """Options that training has found: option → value. A task file records them instead of the chosen ones."""
        return {}

    def set_found(self, network: nn.Module, **options: object) -> None:
        """Set options to what training has found, here and in the copy of this adapter that the network keeps.

        Args:
            network: The network that has this adapter.
            options: Option → value.
        """
        records = (record for module in network.modules() for record in vars(module).get(INJECTED, ()))
        for adapter in (self, *(record.adapter for record in records if type(record.adapter) is type(self))):
            for option, value in options.items():
                setattr(adapter, option, copy.copy(value))

    def measure(self, network: nn.Module) -> dict[str, float]:
        """Values to record after each epoch, by name (`adapter/…`); none by default."""
        return {}

    def remark(self, reported: Mapping[str, float], last: Mapping[str, float]) -> str:
        """A warning about a finished run, in one line; empty for none, which is the default.

        Args:
            reported: The measures of the reported epoch.
            last: The measures of the last epoch.
        """
        return ""

    @staticmethod
    def merge(network: nn.Module) -> None:
        """Make the adapter a part of the weights and remove its modules, if possible; does nothing by default.

        Called for every adapter, on networks with and without it. The network has to compute the same afterwards: where
        a layer's output is not linear in its weights (`not_linear`), the modules stay, all of them.
        """
        return


class PerThread(threading.local):
    """What a module keeps from one hook of a forward pass to the next: a value for each thread that runs it.

    It is neither copied nor saved with the module.
    """

    value: Any = None

    def __reduce__(self) -> tuple[type[PerThread], tuple[()]]:
        return PerThread, ()


def backbone_modules(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield names and modules of a model, except for a timm classifier, template banks and parametrisations."""
    classifier = classifier_modules(network)
    for name, module in network.named_modules():
        if module not in classifier and name.partition(".")[0] != BANKS and ".parametrizations" not in name:
            yield name, module


def own_parameters(network: nn.Module, *, names: tuple[str, ...], kinds: tuple[type, ...] = ()) -> dict[str, str]:
    """Find parameters of the backbone by their names within their layers.

    Args:
        network: A timm model.
        names: Names within a layer: "weight", "bias".
        kinds: Classes of layers to search; empty for all layers.

    Returns:
        Parameter name → the same name, as `Adapter.inject` returns it, without weights that are combinations of
        templates: their coefficients train instead.
    """
    paths = []
    for path, module in backbone_modules(network):
        if not kinds or isinstance(module, kinds):
            parameters = {name for name, _ in module.named_parameters(recurse=False)}
            paths += [f"{path}.{name}" for name in names if name in parameters]
    return {path: path for path in paths}


def attach(layer: nn.Module, name: str, adapter: nn.Module) -> None:
    """Register the module of an adapter at a layer, with the device, dtype and mode that the layer computes with."""
    # Not a parameter of a parametrisation: RECAST's coefficients are float32 in a bfloat16 model
    plain = (parameter for path, parameter in layer.named_parameters() if "parametrizations." not in path)
    weight = next(plain, None)
    layer.add_module(name, adapter.to(weight_of(layer) if weight is None else weight).train(layer.training))


def parametrize_weight(layer: nn.Module, adapter: nn.Module) -> str:
    """Let the module of an adapter compute a layer's weight from its present weight.

    The present weight is the layer's own, or a combination of templates. The adapter is moved to the weight's device;
    its result must have the weight's dtype.

    Returns:
        The name of the module below the layer.
    """
    depth = len(parametrizations(layer)) if parametrize.is_parametrized(layer, "weight") else 0
    parametrize.register_parametrization(layer, "weight", adapter.to(weight_of(layer).device), unsafe=True)
    return f"parametrizations.weight.{depth}"


def merge_parametrized(network: nn.Module, kind: type[nn.Module]) -> None:
    """Replace weights whose last parametrisation is an adapter's module by what it computes; a `merge` is no more.

    RECAST's own `merge`, which makes combinations of templates plain weights, comes first.

    Args:
        network: The network, changed in place.
        kind: The class of the adapter's modules.
    """
    for _, layer in list(backbone_modules(network)):
        if parametrize.is_parametrized(layer, "weight") and isinstance(parametrizations(layer)[-1], kind):
            parametrized = type(layer)  # shared with deep copies, which stay parametrised
            layer.__class__ = type(parametrized.__name__, parametrized.__bases__, dict(parametrized.__dict__))
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
            layer.weight.requires_grad_(False)


def computes_itself(network: nn.Module, path: str) -> bool:
    """Whether a layer is called in the forward pass, as far as one can tell.

    Attention with a q_bias uses the weight of its layer qkv without calling it (BEiT, Swin v2).
    """
    parent, _, place = path.rpartition(".")
    return place != "qkv" or not hasattr(network.get_submodule(parent), "q_bias")


def takes_weight_alone(network: nn.Module, path: str) -> bool:
    """Whether attention uses the weight of its layer qkv and never calls the layer: with a q_bias that it adds itself.

    Narrower than `not computes_itself`, by which the parameters of adapters are chosen, and so the names in task files.
    """
    parent, _, place = path.rpartition(".")
    attention = network.get_submodule(parent)
    return (
        place == "qkv"
        and getattr(attention, "q_bias", None) is not None
        and not getattr(attention, "qkv_bias_separate", False)
    )


def linear_layers(network: nn.Module, places: Sequence[str]) -> list[tuple[str, nn.Linear]]:
    """Names and modules of the linear layers of a backbone whose names end with one of some places (`mlp.fc2`)."""
    return [
        (path, layer)
        for path, layer in backbone_modules(network)
        if isinstance(layer, nn.Linear)
        and any(f".{path}".endswith(f".{place}") for place in places)
        and computes_itself(network, path)
    ]


def channels_dim(layer: nn.Module) -> int:
    """The dimension of the channels in a layer's input and output: the second one of layers for images, else the last.

    Most kinds of LayerNorm are not for images; timm's that are have 2d in their name.
    """
    of_images = isinstance(layer, nn.Conv2d | nn.GroupNorm | _NormBase) or "2d" in type(layer).__name__
    return 1 if of_images else -1


def not_linear(layers: Iterable[tuple[str, nn.Module]]) -> str | None:
    """The first layer whose output is not linear in its weight and bias; None if all are.

    A change of such a layer's output cannot become part of its weights: it standardises them (timm's StdConv2d), or
    applies an activation to its output (timm's BatchNormAct2d). It is found by trying, once for layers that are alike.

    Args:
        layers: Names and modules of linear layers, convolutions and normalisation layers.
    """
    alike: dict[tuple[object, str], bool] = {}
    for path, layer in layers:
        key = type(layer).forward, repr(layer)
        if key not in alike:
            alike[key] = _is_linear(layer)
        if not alike[key]:
            return path
    return None


@torch.no_grad()
def _is_linear(layer: nn.Module) -> bool:
    """Whether f(a·u + b·v) = a·f(u) + b·f(v) for random weights and biases u and v; not if the layer does not run."""
    generator = torch.Generator().manual_seed(0)
    twin = copy.deepcopy(layer).eval()
    twin._forward_hooks.clear()
    twin._forward_pre_hooks.clear()
    twin = (twin.to_empty(device="cpu") if weight_of(layer).is_meta else twin.cpu()).double()
    for tensor in (*twin.parameters(), *twin.buffers()):
        if tensor.is_floating_point():  # positive, as a variance has to be
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    inputs = torch.randn(_input_shape(twin), generator=generator).double()
    own = [parameter for name in ("weight", "bias") if (parameter := getattr(twin, name, None)) is not None]
    u, v = ([torch.randn(each.shape, generator=generator).double() for each in own] for _ in range(2))

    def output(a: float, b: float) -> Tensor:
        for parameter, first, second in zip(own, u, v, strict=True):
            parameter.copy_(a * first + b * second)
        result: Tensor = twin(inputs)
        return result

    try:
        expected, found = -2 * output(1, 0) + 0.5 * output(0, 1), output(-2, 0.5)
    except (RuntimeError, ValueError, TypeError):
        return False
    # A few layers of timm compute in float32 whatever their dtype
    return bool((found - expected).abs().max() <= 1e-4 * expected.abs().max())


def _input_shape(layer: nn.Module) -> list[int]:
    """A small shape of inputs that a layer takes."""
    if isinstance(layer, nn.Linear):
        return [2, layer.in_features]
    if isinstance(layer, nn.Conv2d):
        sizes = zip(layer.kernel_size, layer.dilation, strict=True)
        return [1, layer.in_channels, *(2 + dilation * (kernel - 1) for kernel, dilation in sizes)]
    if channels_dim(layer) == -1:
        return [2, *weight_of(layer).shape]
    return [2, len(weight_of(layer)), *([] if isinstance(layer, nn.BatchNorm1d) else [3, 3])]


def weight_of(layer: nn.Module) -> Tensor:
    """The weight that a layer computes with: its own, or the result of its parametrisations."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def parametrizations(layer: nn.Module) -> nn.ModuleList:
    """The parametrisations of a layer's weight, in the order in which they are computed."""
    modules = layer.get_submodule("parametrizations.weight")
    assert isinstance(modules, nn.ModuleList)
    return modules


def detach(layer: nn.Module, name: str) -> None:
    """Remove the module of an adapter from its layer, with the hooks that are its methods."""
    adapter = layer.get_submodule(name)
    for hooks in (layer._forward_hooks, layer._forward_pre_hooks):
        for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is adapter]:
            del hooks[key]
    delattr(layer, name)
