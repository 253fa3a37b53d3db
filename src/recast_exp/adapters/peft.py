"""Any method of Hugging Face `peft` for linear layers or convolutions, with the arguments of peft's own configuration.

    adapter=peft adapter.method=LORA adapter.arguments.r=8 'adapter.arguments.target_modules=[qkv,fc1]'

peft replaces each layer by its own module, which contains the frozen layer, with RECAST's templates if it has any.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from recast_exp.adapters._base import Adapter, backbone_modules, not_linear, takes_weight_alone
from recast_exp.config.fields import option
from recast_exp.errors import UnfitError, UserError
from recast_exp.recast.grouping import classifier_modules


@dataclass
class Peft(Adapter):
    """A method of Hugging Face peft (`pip install 'recast-exp[peft]'`).

    Args:
        method: The method as peft names it: "LORA", "VERA", "IA3", …
        arguments: Arguments of the method's configuration in peft. `target_modules` defaults to the fused qkv layers,
            or to the convolutions where there are none. Sets and tuples become lists, as a task file holds them.
    """

    fits = "layers that match adapter.arguments.target_modules"
    keeps_fixed = True

    method: str = option("LORA", "method, as named by peft: LORA, VERA, IA3, ...")
    arguments: dict[str, Any] = option({}, "arguments of the method's configuration; target_modules defaults to the fused qkv, or to the convolutions")  # fmt: skip # noqa: E501

    def __post_init__(self) -> None:
        super().__post_init__()
        self.arguments = {name: _plain(f"arguments.{name}", value) for name, value in self.arguments.items()}

    @property
    def label(self) -> str:
        """The name of the method in peft."""
        return f"peft {self.method}"

    def inject(self, network: nn.Module) -> dict[str, str]:
        """Let peft replace the layers that match.

        Raises:
            UserError: If peft is not installed, has no such method, or refuses its arguments or the layers.
            UnfitError: If a layer is never called, as attention takes its weight (BEiT, EVA, Swin V2).
        """
        try:
            import peft
            from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
            from peft.tuners.tuners_utils import BaseTunerLayer
        except ImportError as error:
            raise UserError("adapter: expected peft, which is not installed; pip install 'recast-exp[peft]'") from error
        methods = {kind.value: kind for kind in PEFT_TYPE_TO_TUNER_MAPPING}
        if self.method not in methods:
            raise UserError(f"adapter.method: expected one of {', '.join(sorted(methods))}, got {self.method!r}")
        config_class = PEFT_TYPE_TO_CONFIG_MAPPING[methods[self.method]]
        takes = [field.name for field in dataclasses.fields(config_class) if field.init]
        for name in self.arguments:
            if name not in takes:
                listed = ", ".join(takes)
                raise UserError(f"adapter.arguments.{name}: unknown argument; {config_class.__name__} takes {listed}")
        if reason := _NOT_FOR_A_BACKBONE.get(methods[self.method].value):
            raise UserError(
                f"adapter.method: expected one that suits a vision backbone, got {self.method}, which {reason}"
            )
        arguments = dict(self.arguments)
        _check_arguments(arguments)
        arguments.setdefault("target_modules", _targets(network))
        if arguments["target_modules"] == "all-linear":  # to peft, the classifier too
            arguments["target_modules"] = [
                path for path, layer in backbone_modules(network) if isinstance(layer, nn.Linear)
            ]
        if not arguments["target_modules"]:
            return {}
        if methods[self.method].value in ("C3A", "FOURIERFT"):  # else they start from random values, not from the model
            arguments.setdefault("init_weights", True)
        if "feedforward_modules" in takes:  # required by IA3
            arguments.setdefault("feedforward_modules", [])
        before = {id(parameter) for parameter in network.parameters()}
        heads = {id(module) for module in classifier_modules(network)}
        try:
            config = config_class(**arguments)
            peft.get_peft_model(network, config)  # in place; the wrapper that it returns is not needed
        except (
            TypeError,
            ValueError,
            LookupError,
            ArithmeticError,
            RuntimeError,
            AttributeError,
            ImportError,
            re.error,
        ) as error:
            raise UserError(
                f"adapter: peft's {self.method} refuses this model or these arguments: {' '.join(str(error).split())}"
            ) from error
        for path, module in network.named_modules():
            if not isinstance(module, BaseTunerLayer):
                continue
            if takes_weight_alone(network, path):
                raise UnfitError(
                    f"adapter.arguments.target_modules: expected layers that {type(network).__name__} calls, got "
                    f"{path}, whose weight its attention takes; name others, such as proj"
                )
            if id(module.get_base_layer()) in heads:
                raise UserError(
                    f"adapter.arguments.target_modules: expected layers of the backbone, got {path}, the classifier, "
                    "which trains anyway"
                )
        return {name: name for name, p in network.named_parameters() if id(p) not in before and p.requires_grad}

    @staticmethod
    @torch.no_grad()
    def merge(network: nn.Module) -> None:
        """Let peft merge its updates into the layers, and put the layers back into their places.

        Raises:
            UserError: If peft cannot merge the method, or a layer standardises its weight. The network is unchanged.
        """
        try:
            from peft.tuners.tuners_utils import BaseTunerLayer
        except ImportError:
            return
        found = [(path, layer) for path, layer in network.named_modules() if isinstance(layer, BaseTunerLayer)]
        inner = [(path, layer.get_base_layer()) for path, layer in found]
        path = not_linear(each for each in inner if isinstance(each[1], nn.Linear | nn.Conv2d))
        if path is not None:
            kind = type(dict(inner)[path]).__name__
            raise UserError(
                f"adapter: expected layers that peft can merge its updates into, got {path}, a {kind}, whose output is "
                "not linear in its weight; use the model as it is"
            )
        for path, layer in found:
            try:
                layer.merge()
            except NotImplementedError as error:
                raise UserError(
                    f"adapter: expected a method that peft can merge, got {type(layer).__module__.split('.')[-2]}"
                ) from error
            parent, _, name = path.rpartition(".")
            setattr(network.get_submodule(parent), name, layer.get_base_layer())


_NOT_FOR_A_BACKBONE = {
    "POLY": "needs the number of a task with each image",
    "TRAINABLE_TOKENS": "trains embeddings of words",
}

_KEEPS_THE_WEIGHTS = True, False, "gaussian", "orthogonal"
"""Values of `init_lora_weights` that leave the frozen weights as they are; pissa, olora and others change them."""


def _plain(name: str, value: object) -> object:
    """A value as a task file gives it back: text, numbers, lists and mappings.

    Raises:
        UserError: If it is anything else.
    """
    if isinstance(value, Mapping):
        return {str(key): _plain(f"{name}.{key}", each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(name, each) for each in value]
    if isinstance(value, set | frozenset):
        return sorted((_plain(name, each) for each in value), key=repr)
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name}: expected a finite number, got {value}")
    if value is None or isinstance(value, str | int | float):
        return value
    raise UserError(f"{name}: expected text, numbers, lists or mappings, which a task file can hold, got {value!r:.60}")


def _check_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse what peft would do to the backbone or to the head: that is not the adapter's.

    Raises:
        UserError: One line.
    """
    refused = (
        ("modules_to_save", "nothing; the head trains anyway, and adapter=last_block trains a part of the backbone"),
        ("bias", "none; adapter=bitfit trains the biases"),
    )
    for name, expected in refused:
        if (value := arguments.get(name)) not in (None, []) and (name, value) != ("bias", "none"):
            raise UserError(f"adapter.arguments.{name}: expected {expected}, got {value!r}")
    if arguments.get("inference_mode"):
        raise UserError("adapter.arguments.inference_mode: expected false, as nothing would train, got true")
    for name, value in arguments.items():
        for text in _texts(value):
            if _takes_long(text):
                raise UserError(
                    f"adapter.arguments.{name}: expected a pattern without repeated groups that repeat or choose, and "
                    f"with at most {_REPEATS} repetitions (others may take for ever), got {text[:60]!r}; list names"
                )
    init = arguments.get("init_lora_weights", True)
    if init not in _KEEPS_THE_WEIGHTS:
        raise UserError(
            "adapter.arguments.init_lora_weights: expected true, false, gaussian or orthogonal, which leave the frozen "
            f"weights as they are, got {init!r}"
        )


_REPEATS = 4


def _texts(value: object) -> Iterator[str]:
    """All strings in a value, which peft may read as regular expressions."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for each in (*value, *value.values()):
            yield from _texts(each)
    elif isinstance(value, list | tuple | set):
        for each in value:
            yield from _texts(each)


def _takes_long(pattern: str) -> bool:
    """Whether a regular expression may need steps that grow exponentially, or fast, with the length of a name.

    It may if what a group repeats can be divided in several ways: if the group itself repeats or chooses. Such patterns
    could come with a task file.
    """
    plain = re.sub(r"\\.|\[\^?\]?[^\]]*\]", "a", pattern)  # escaped letters and sets of letters are one letter
    groups: list[bool] = []  # for each open group, whether it repeats or chooses
    repeats = 0
    for at, letter in enumerate(plain):
        repeated = plain[at + 1 : at + 2] in ("*", "+", "{")
        if letter == "(":
            groups.append(False)
        elif letter == ")" and groups:
            inner = groups.pop()
            if inner and repeated:
                return True
            if groups:
                groups[-1] = groups[-1] or inner or repeated
        elif groups and (letter in "*+{|" or (letter == "?" and plain[at - 1] != "(")):
            groups[-1] = True
        repeats += letter in "*+{"
    return repeats > _REPEATS


def _targets(network: nn.Module) -> list[str]:
    modules = list(backbone_modules(network))
    fused = [path for path, layer in modules if isinstance(layer, nn.Linear) and path.rpartition(".")[2] == "qkv"]
    return fused or [
        path
        for path, layer in modules
        if isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1) and layer.groups == 1
    ]
