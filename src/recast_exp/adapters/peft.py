"""Any method of Hugging Face `peft` for linear layers or convolutions, with the arguments of peft's own configuration.

    adapter=peft adapter.method=LORA adapter.arguments.r=8 'adapter.arguments.target_modules=[qkv,fc1]'

peft replaces each layer by its own module, which contains the frozen layer, with RECAST's templates if it has any.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from recast_exp.adapters._base import Adapter, backbone_modules
from recast_exp.config.fields import option
from recast_exp.errors import UserError


@dataclass
class Peft(Adapter):
    """A method of Hugging Face peft (`pip install 'recast-exp[peft]'`).

    Args:
        method: The method as peft names it: "LORA", "VERA", "IA3", …
        arguments: Arguments of the method's configuration in peft. `target_modules` defaults to the fused qkv layers,
            or to the convolutions where there are none.
    """

    fits = "layers that match adapter.arguments.target_modules"
    keeps_fixed = True

    method: str = option("LORA", "method, as named by peft: LORA, VERA, IA3, ...")
    arguments: dict[str, Any] = option({}, "arguments of the method's configuration; target_modules defaults to the fused qkv, or to the convolutions")  # fmt: skip # noqa: E501

    @property
    def label(self) -> str:
        """The name of the method in peft."""
        return f"peft {self.method}"

    def inject(self, network: nn.Module) -> dict[str, str]:
        """Let peft replace the layers that match.

        Raises:
            UserError: If peft is not installed, has no such method, or refuses its arguments or the layers.
        """
        try:
            import peft
            from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
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
        arguments = dict(self.arguments)
        arguments.setdefault("target_modules", _targets(network))
        if not arguments["target_modules"]:
            return {}
        if "feedforward_modules" in takes:  # required by IA3
            arguments.setdefault("feedforward_modules", [])
        before = {id(parameter) for parameter in network.parameters()}
        try:
            config = config_class(**arguments)
            peft.get_peft_model(network, config)  # in place; the wrapper that it returns is not needed
        except (TypeError, ValueError, KeyError, NotImplementedError, AttributeError) as error:
            raise UserError(
                f"adapter: peft's {self.method} refuses this model or these arguments: {' '.join(str(error).split())}"
            ) from error
        return {name: name for name, p in network.named_parameters() if id(p) not in before and p.requires_grad}

    @staticmethod
    @torch.no_grad()
    def merge(network: nn.Module) -> None:
        """Let peft merge its updates into the layers, and put the layers back into their places."""
        try:
            from peft.tuners.tuners_utils import BaseTunerLayer
        except ImportError:
            return
        for path, layer in list(network.named_modules()):
            if isinstance(layer, BaseTunerLayer):
                layer.merge()
                parent, _, name = path.rpartition(".")
                setattr(network.get_submodule(parent), name, layer.get_base_layer())


def _targets(network: nn.Module) -> list[str]:
    modules = list(backbone_modules(network))
    fused = [path for path, layer in modules if isinstance(layer, nn.Linear) and path.rpartition(".")[2] == "qkv"]
    return fused or [
        path
        for path, layer in modules
        if isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1) and layer.groups == 1
    ]
