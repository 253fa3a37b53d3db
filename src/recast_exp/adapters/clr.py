"""CLR, channel-wise lightweight reprogramming: a depthwise convolution after each convolution.

Ge et al., ICCV 2023, arXiv 2307.11386.

    y = conv(x)  →  K * y,   one 3x3 kernel K per channel, which starts as the identity

It follows every convolution larger than 1x1. The original also trains the scale and shift of BatchNorm. A ResNet-34 has
68,544 parameters of the kernels and 17,024 of BatchNorm.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from recast_exp.adapters._base import Adapter, attach, backbone_modules, own_parameters
from recast_exp.config.fields import option
from recast_exp.errors import UserError

NAME = "clr"


@dataclass
class CLR(Adapter):
    """A depthwise convolution after each convolution (Ge et al., arXiv 2307.11386).

    Args:
        kernel_size: Height and width of the kernels; odd.
        downsample: Whether to reprogram 1x1 convolutions too.
        train_norm: Whether to train the scale and shift of BatchNorm too.
    """

    fits = "convolutions larger than 1x1 within the network, as in CNNs"

    kernel_size: int = option(3, "height and width of the kernels, odd", ge=1)
    downsample: bool = option(False, "reprogram 1x1 convolutions too, as RECAST's authors do")
    train_norm: bool = option(True, "train BatchNorm's scale and shift too, as the original does")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel_size % 2 == 0:
            raise UserError(f"kernel_size: expected an odd integer, got {self.kernel_size}")

    def inject(self, network: nn.Module) -> dict[str, str]:
        """Add the kernels after every convolution larger than 1x1, or after every convolution (`downsample`)."""
        names: dict[str, str] = {}
        for path, layer in _layers(network, self.downsample):
            adapter = Reprogramming(layer.out_channels, self.kernel_size)
            attach(layer, NAME, adapter)
            layer.register_forward_hook(adapter.forward)
            names[f"{path}.{NAME}"] = f"{path}.{NAME}.conv.weight"
        if names and self.train_norm:
            names |= own_parameters(network, names=("weight", "bias"), kinds=(_NormBase,))
        return names


class Reprogramming(nn.Module):
    """One kernel for each channel of a layer's output.

    Args:
        channels: Number of channels.
        kernel_size: Height and width of a kernel; odd.
    """

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, bias=False)
        nn.init.dirac_(self.conv.weight, groups=channels)

    def forward(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        """Reprogram the output [N, C, H, W] of the layer; a forward hook."""
        result: Tensor = self.conv(output)
        return result


def _layers(network: nn.Module, pointwise: bool) -> list[tuple[str, nn.Conv2d]]:
    """The convolutions of a CNN, larger than 1x1 or all of them; none if they only divide an image into patches."""
    convolutions = [(path, layer) for path, layer in backbone_modules(network) if isinstance(layer, nn.Conv2d)]
    larger = [(path, layer) for path, layer in convolutions if layer.kernel_size != (1, 1)]
    if all(layer.kernel_size == layer.stride for _, layer in larger):
        return []
    return convolutions if pointwise else larger
