"""CLR against its formula."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from support.adapted import Make


def test_clr_convolves_each_channel_by_itself(make: Make) -> None:
    adapted = make("clr", "cnn", "frozen")
    layer: Any = adapted.network.get_submodule("layer1.0.conv2")
    kernel = nn.init.normal_(layer.clr.conv.weight)
    x = torch.randn(2, 8, 6, 6)
    plain = F.conv2d(x, layer.weight, padding=1)
    expected = torch.cat([F.conv2d(plain[:, i : i + 1], kernel[i : i + 1], padding=1) for i in range(8)], 1)
    torch.testing.assert_close(layer(x), expected)
