"""Methods of Hugging Face peft, by the rules that hold for all adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from recast_exp import adapters
from recast_exp.errors import UserError
from recast_exp.models.adapted import AdaptedModel
from recast_exp.recast import merge
from support import task_files
from support.adapted import BASES, Make, create, logits, train
from support.helpers import assert_one_line


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("IA3", {}), ("OFT", {}), ("BOFT", {}), ("LOHA", {}), ("LOKR", {}), ("HIRA", {}), ("DELORA", {}),
        ("GRALORA", {}),
        ("MISS", {"r": 8}), ("RANDLORA", {}), ("LORA", {"r": 2, "use_rslora": True, "target_modules": ["fc1"]}),
        ("LORA", {"use_dora": True}), ("VERA", {"r": 16}), ("PVERA", {"r": 16}), ("TINYLORA", {}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("base", BASES)
def test_methods_of_peft(make: Make, tmp_path: Path, method: str, arguments: dict[str, Any], base: str) -> None:
    def build() -> AdaptedModel:
        return make("peft", "vit", base, method=method, arguments=arguments)

    adapted = build()
    torch.testing.assert_close(logits(adapted.network), logits(make("none", "vit", base).network), rtol=1e-5, atol=1e-5)
    frozen = {key: tensor.clone() for key, tensor in adapted.network.state_dict().items()}
    task = {tensor.data_ptr() for tensor in adapted.task_tensors().values()}
    train(adapted)
    for kind in ("coefficients", "adapter"):
        assert all(parameter.grad is not None for _, parameter in adapted.parameters(kind))
    for key, tensor in adapted.network.state_dict().items():
        assert tensor.data_ptr() in task or torch.equal(tensor, frozen[key]), key
    task_files.write(tmp_path / "task.safetensors", adapted)
    other = build()
    task_files.read_into(other, tmp_path / "task.safetensors")
    expected = logits(adapted.network)
    assert torch.equal(logits(other.network), expected)
    merged = adapters.merge(merge(adapted.network))
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    create("vit", num_classes=5).load_state_dict(merged.state_dict(), strict=True)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"method": "LORAX"}, ("adapter.method: expected one of", "LORA", "got 'LORAX'")),
        ({"arguments": {"rr": 2}}, ("adapter.arguments.rr: unknown argument; LoraConfig takes", "lora_alpha")),
        ({"arguments": {"r": 0}}, ("peft's LORA refuses", "r")),
        ({"arguments": {"target_modules": ["nowhere"]}}, ("peft's LORA refuses", "nowhere")),
    ],
)
def test_what_peft_refuses_is_one_line(make: Make, options: dict[str, Any], expected: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as error:
        make("peft", "vit", "frozen", **options)
    assert_one_line(error, *expected)
