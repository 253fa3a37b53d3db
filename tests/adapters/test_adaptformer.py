"""AdaptFormer against its formula."""

from __future__ import annotations

import pickle
from typing import Any

import timm
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from recast_exp.adapters import inject_adapter
from recast_exp.adapters.adaptformer import AdaptFormer, Bottleneck
from support.adapted import Make, logits


def test_blocks_of_images_have_their_channels_first() -> None:
    """A block of PoolFormer, computed by the formula."""
    torch.manual_seed(0)
    network = timm.create_model("poolformer_s12", num_classes=0).eval()
    inject_adapter(network, AdaptFormer(width=3, scale=0.7))
    block: Any = network.get_submodule("stages.0.blocks.0")
    adapter: Bottleneck = block.adaptformer
    nn.init.normal_(adapter.up.weight)
    x = torch.randn(2, 64, 8, 8)
    with torch.no_grad():
        found = block(x)
        x = x + block.layer_scale1(block.token_mixer(block.norm1(x)))
        low = torch.einsum("nchw,kc->nkhw", x, adapter.down.weight).relu()
        bottleneck = torch.einsum("nkhw,ck->nchw", low, adapter.up.weight)
        normed = F.group_norm(x, 1, block.norm2.weight, block.norm2.bias, 1e-5)
        mlp = block.layer_scale2.scale.view(-1, 1, 1) * block.mlp(normed)
    torch.testing.assert_close(found, x + mlp + 0.7 * bottleneck)


def test_adaptformer_adds_to_the_residual_before_the_norm(make: Make) -> None:
    """One block, computed by the formula."""
    adapted = make("adaptformer", "vit", "frozen", width=3, scale=0.7)
    block: Any = adapted.network.get_submodule("blocks.1").eval()
    adapter: Bottleneck = block.adaptformer
    nn.init.normal_(adapter.up.weight)
    nn.init.normal_(adapter.down.bias)
    x = torch.randn(2, 5, 24)
    found = block(x)
    x = x + block.attn(block.norm1(x))
    bottleneck = torch.relu(x @ adapter.down.weight.T + adapter.down.bias) @ adapter.up.weight.T + adapter.up.bias
    mlp = block.mlp.fc2(
        block.mlp.act(block.mlp.fc1(F.layer_norm(x, (24,), block.norm2.weight, block.norm2.bias, 1e-6)))
    )
    torch.testing.assert_close(found, x + mlp + 0.7 * bottleneck)


def test_a_network_with_it_can_be_pickled(make: Make) -> None:
    network = make("adaptformer", "vit", "frozen").network
    assert torch.equal(logits(pickle.loads(pickle.dumps(network))), logits(network))
