"""How many parameters each adapter trains."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

from recast_exp.adapters import from_config, inject_adapter
from recast_exp.models.count import count
from support.adapted import Make


@pytest.mark.parametrize(
    ("network", "name", "options", "expected"),
    [
        ("vit_small_patch16_224", "melo", {"rank": 1}, 18_432),
        ("vit_small_patch16_224", "melo", {"rank": 4}, 4 * 18_432),
        ("vit_base_patch16_224", "melo", {}, 147_456),
        ("vit_small_patch16_224", "adaptformer", {}, 595_200),
        ("vit_base_patch16_224", "adaptformer", {}, 1_189_632),
        ("vit_small_patch16_224", "adaptformer", {"width": 2, "scale": 2.0}, 23_064),
        ("resnet34", "clr", {"train_norm": False}, 68_544),
        ("resnet34", "clr", {"train_norm": False, "downsample": True}, 76_608),
        ("resnet34", "clr", {}, 68_544 + 17_024),
        ("resnet34", "piggyback", {}, 21_267_648),
        ("vit_small_patch16_224", "bitfit", {}, 51_456),
        ("vit_small_patch16_224", "layernorm", {}, 19_200),
        ("resnet34", "layernorm", {}, 17_024),
        ("vit_small_patch16_224", "film", {}, 19_200),
        # Scales and shifts of 8,448 outputs in a block, of the patches' projection and of the last normalisation
        ("vit_small_patch16_224", "ssf", {}, 12 * 8_448 + 2 * 768),
        ("vit_small_patch16_224", "hydra_lora", {}, 12 * 2 * (4 * 384 + 1536 + 3 * 384)),
        ("vit_small_patch16_224", "transformed", {}, 12 * (2 * (16**2 + 24**2) + 2 * 384 + 1152 + 1536)),
        ("vit_small_patch16_224", "tera", {}, 12 * (32 + 36 + 40 + 2 * (32 + 48 + 40))),
        ("vit_small_patch16_224", "compander", {}, 2 * (12 * 4 + 1)),
        # Three gates, and for each new block's four layers a coefficient for each of twelve blocks
        ("vit_small_patch16_224", "growth", {}, 3 * (1 + 4 * 12)),
        ("vit_small_patch16_224", "last_block", {}, 1_774_464 + 768),
    ],
)
def test_numbers_that_train(network: str, name: str, options: dict[str, Any], expected: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(network, num_classes=0)
        found = inject_adapter(model, from_config({"name": name, **options}))
    assert sum(model.get_parameter(path).numel() for path in found.values()) == expected


def test_the_count_tells_norms_and_bits_apart(make: Make) -> None:
    counts = count(make("clr", "cnn", "recast"), 0)
    norms = count(make("layernorm", "cnn", "recast"), 0)["adapter"]
    assert counts["adapter_norm"] == norms
    assert counts["adapter"] == norms + count(make("clr", "cnn", "recast", train_norm=False), 0)["adapter"]
    counts = count(make("piggyback", "cnn", "frozen"), 0)
    assert counts["task_bits"] == counts["adapter"] == counts["task_specific"]
