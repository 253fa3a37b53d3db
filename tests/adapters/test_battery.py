"""Every adapter of the registry by the same rules, on RECAST models and on plain frozen ones.

A new adapter needs no edit here: the registry says which of the networks it fits.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torch.nn import functional as F  # noqa: N812

from recast_exp import adapters
from recast_exp.adapters import NORMS, Adapter, check_adapter, fitting, inject_adapter, names
from recast_exp.adapters.melo import MeLo
from recast_exp.errors import UnfitError, UserError
from recast_exp.models.adapted import CHANGE
from recast_exp.models.count import count
from recast_exp.models.task_file import copy_into
from recast_exp.recast import merge
from support import task_files
from support.adapted import BASES, NETWORKS, Make, create, create_without_weights, images, logits, train
from support.helpers import assert_one_line

ROOT = Path(__file__).parents[2]
FITTING = {kind: fitting(functools.partial(create_without_weights, kind)) for kind in NETWORKS}
PAIRS = [(name, kind) for kind, those in FITTING.items() for name in those]
ONCE = list({name: (name, kind) for name, kind in reversed(PAIRS)}.values())
"""Each adapter with the first network that it fits, for what takes long."""


def becomes_weights(name: str, kind: str) -> bool:
    """Whether `merge` promises the stock model: the adapter merges, or it only trains what the model has."""
    adapter = adapters.load(name)
    stock = set(create_without_weights(kind).state_dict())
    trained = adapter().inject(create_without_weights(kind)).values()
    return adapter.merge is not Adapter.merge or stock.issuperset(trained)


# The registry


def test_each_adapter_has_a_preset_with_its_own_defaults() -> None:
    presets = {path.stem: OmegaConf.load(path) for path in (ROOT / "conf" / "adapter").glob("*.yaml")}
    assert set(presets) == set(names())
    for name, preset in presets.items():
        node = OmegaConf.to_container(preset)
        assert isinstance(node, dict)
        options = dict(node.get("adapter", node))
        assert options.pop("name") == name
        assert options == dataclasses.asdict(adapters.load(name)())


@pytest.mark.parametrize("name", names())
def test_an_adapter_describes_itself(name: str) -> None:
    adapter = adapters.load(name)()
    assert adapter.name == name
    assert adapter.fits
    assert all(field.metadata["help"] for field in dataclasses.fields(adapter))
    assert bool(adapter.label) == (name != "none")
    others = [adapters.load(other)().label for other in names() if other != name]
    assert adapter.label not in others  # rows of a table are told apart by it


@pytest.mark.parametrize("name", names())
def test_an_adapter_fits_a_network_of_the_battery(name: str) -> None:
    assert any(name in those for those in FITTING.values()), "add a network that it fits to support.adapted.NETWORKS"


def test_adapters_that_need_attention_or_convolutions_fit_nothing_else() -> None:
    everywhere = {"bitfit", "film", "last_block", "layernorm", "none", "peft", "piggyback"}
    assert set(FITTING["vit"]) >= everywhere | {"adaptformer", "melo"}
    assert set(FITTING["cnn"]) >= everywhere | {"clr"}
    assert "clr" not in FITTING["vit"]
    assert {"adaptformer", "melo"}.isdisjoint(FITTING["cnn"])


@pytest.mark.parametrize("kind", NETWORKS)
def test_an_adapter_that_does_not_fit_is_refused_with_those_that_do(kind: str) -> None:
    def network(device: str) -> nn.Module:
        with torch.device(device):
            return create(kind)

    for name in names():
        adapter = adapters.load(name)()
        if name in FITTING[kind]:
            check_adapter(network, adapter)
        else:
            with pytest.raises(UnfitError) as error:
                check_adapter(network, adapter)
            assert str(error.value).rpartition("choose one of ")[2].split(", ") == FITTING[kind]
            assert_one_line(error, f"adapter: {name} does not fit", f"it needs {adapter.fits}")


# The same rules for all


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_it_changes_nothing_at_first(make: Make, name: str, kind: str, base: str) -> None:
    assert torch.equal(logits(make(name, kind, base).network), logits(make("none", kind, base).network))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_what_is_declared_trains_and_nothing_else(make: Make, name: str, kind: str, base: str) -> None:
    adapted = make(name, kind, base)
    task = {tensor.data_ptr() for tensor in adapted.task_tensors().values()}
    before = {key: tensor.clone() for key, tensor in adapted.network.state_dict().items()}
    train(adapted)
    for key, tensor in adapted.network.state_dict().items():
        moved = not torch.equal(tensor, before[key])
        assert moved == (tensor.data_ptr() in task), key
    assert bool(adapted.trainable.get("coefficients")) == (base == "recast")
    for kind_of in ("coefficients", "adapter", "head"):
        for path in adapted.trainable.get(kind_of, {}).values():
            assert adapted.network.get_parameter(path).grad is not None


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_a_task_file_brings_the_same_logits(make: Make, tmp_path: Path, name: str, kind: str, base: str) -> None:
    adapted = make(name, kind, base)
    train(adapted)
    task_files.write(tmp_path / "task.safetensors", adapted)
    other = make(name, kind, base)
    start = {key: tensor.clone() for key, tensor in other.task_tensors().items()}
    untrained = logits(other.network)
    task_files.read_into(other, tmp_path / "task.safetensors")
    assert torch.equal(logits(other.network), logits(adapted.network))
    copy_into(other, start)  # and back, as a checkpoint would
    assert torch.equal(logits(other.network), untrained)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_merging_leaves_the_logits(make: Make, name: str, kind: str, base: str) -> None:
    adapted = make(name, kind, base)
    train(adapted)
    expected = logits(adapted.network)
    network = adapters.merge(merge(adapted.network))
    torch.testing.assert_close(logits(network), expected, rtol=1e-5, atol=1e-5)
    if becomes_weights(name, kind):
        plain = create(kind, num_classes=5)
        plain.load_state_dict(network.state_dict(), strict=True)
        torch.testing.assert_close(logits(plain), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", NETWORKS)
def test_merging_leaves_a_stock_model_as_it_is(make: Make, kind: str) -> None:
    network = make("none", kind, "frozen").network
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    for name in names():
        adapters.load(name).merge(network)
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_a_deep_copy_stands_alone(make: Make, name: str, kind: str, base: str) -> None:
    adapted = make(name, kind, base)
    twin = dataclasses.replace(adapted, network=copy.deepcopy(adapted.network))
    before = logits(adapted.network)
    train(twin)
    trained = logits(twin.network)
    assert torch.equal(logits(adapted.network), before)
    assert not torch.equal(trained, before)
    adapters.merge(merge(adapted.network))
    assert torch.equal(logits(twin.network), trained)


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_bfloat16(make: Make, name: str, kind: str) -> None:
    adapted = make(name, kind, "recast")
    train(adapted)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rough = adapted.network(images())
    exact = logits(adapted.network)
    assert (rough.float() - exact).norm() < 0.05 * exact.norm()
    with torch.autocast("cpu", torch.bfloat16):
        F.cross_entropy(adapted.network(images()), torch.tensor([0, 1, 2, 3])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapted.network.parameters() if p.requires_grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_a_model_of_another_dtype(make: Make, name: str, kind: str, base: str, dtype: torch.dtype) -> None:
    network = make("none", kind, base).network.to(dtype).eval()
    batch = images().to(dtype)
    with torch.no_grad():
        expected = network(batch)
    trained = inject_adapter(network, adapters.load(name)())
    found = network(batch)
    assert found.dtype == dtype
    assert torch.equal(found, expected)
    found.float().square().sum().backward()
    assert all(network.get_parameter(path).grad is not None for path in trained.values())
    with torch.no_grad():
        torch.testing.assert_close(adapters.merge(merge(network))(batch), expected)


@pytest.mark.parametrize(("name", "kind"), [pair for pair in ONCE if pair[0] != "none"])
def test_a_second_one_of_the_same_kind_is_refused_until_the_first_is_merged(make: Make, name: str, kind: str) -> None:
    """Its parameters would hide those of the first, which would still count in the output."""
    adapted = make(name, kind, "recast")
    train(adapted)
    network = adapted.network
    before = logits(network)
    with pytest.raises(UserError) as error:
        inject_adapter(network, adapters.load(name)())
    assert_one_line(error, f"adapter: expected a network without {name}, got one that has it; merge it, or take a new")
    assert torch.equal(logits(network), before)
    adapters.merge(merge(network))
    if becomes_weights(name, kind):
        assert inject_adapter(network, adapters.load(name)())


@pytest.mark.parametrize("second", ["tera", "piggyback", "hydra_lora", "peft"])
@pytest.mark.parametrize("first", ["melo", "ssf", "film"])
def test_a_second_one_of_another_kind_is_refused(make: Make, first: str, second: str) -> None:
    network = make(first, "vit", "frozen").network
    with pytest.raises(UserError) as error:
        inject_adapter(network, adapters.load(second)())
    assert_one_line(error, f"adapter: expected a network without {first}, got one that has it")
    assert inject_adapter(network, adapters.load("none")()) == {}


def test_the_network_keeps_the_options_that_its_adapter_was_injected_with() -> None:
    adapter = MeLo(rank=2, alpha=4.0)
    first, second = create("vit"), create("vit")
    for network in (first, second):
        inject_adapter(network, adapter)
    adapter.alpha = 16.0
    MeLo(rank=2).truncate(first, 1)
    kept = [record.adapter for network in (first, second) for record in adapters.injected(network)]
    assert kept == [MeLo(rank=2, ranks=[1, 1]), MeLo(rank=2)]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", ["melo", "ssf", "piggyback", "growth", "bitfit", "peft"])
def test_an_adapter_that_fails_leaves_the_network_as_it_was(
    make: Make, monkeypatch: pytest.MonkeyPatch, name: str, base: str
) -> None:
    network, adapter = make("none", "vit", base).network, adapters.load(name)
    calls: list[str] = []
    handle = network.get_submodule("blocks.0.attn.qkv").register_forward_hook(lambda *_: calls.append("hook"))
    expected = logits(network)
    before = [(path, type(module), set(vars(module))) for path, module in network.named_modules()]
    flags = {path: (id(parameter), parameter.requires_grad) for path, parameter in network.named_parameters()}

    def fails(self: Adapter, network: nn.Module) -> dict[str, str]:
        injects(self, network)
        raise UnfitError("adapter: no")

    injects = adapter.inject
    monkeypatch.setattr(adapter, "inject", fails)
    with pytest.raises(UnfitError, match="adapter: no"):
        inject_adapter(network, adapter())
    assert before == [(path, type(module), set(vars(module))) for path, module in network.named_modules()]
    assert flags == {path: (id(parameter), parameter.requires_grad) for path, parameter in network.named_parameters()}
    calls.clear()
    assert torch.equal(logits(network), expected)
    handle.remove()
    logits(network)
    assert calls == ["hook"]  # as before, once
    monkeypatch.undo()
    assert inject_adapter(network, adapter())


@pytest.mark.parametrize(("name", "kind"), ONCE)
def test_what_was_injected_in_inference_mode_can_train(make: Make, name: str, kind: str) -> None:
    network = make("none", kind, "recast").network.eval()
    with torch.inference_mode():
        trained = inject_adapter(network, adapters.load(name)())
    network(images()).square().sum().backward()
    assert all(network.get_parameter(path).grad is not None for path in trained.values())
    with torch.inference_mode():
        adapters.merge(merge(network))
    network.requires_grad_(True)(images()).square().sum().backward()


@pytest.mark.parametrize(("name", "kind"), [("adaptformer", "vit"), ("growth", "vit"), ("growth", "cnn")])
def test_threads_that_share_a_network_do_not_meet(make: Make, name: str, kind: str) -> None:
    adapted = make(name, kind, "frozen")
    train(adapted)
    network = adapted.network.eval()
    batches = [images() + number for number in range(4)]
    with torch.no_grad():
        expected = [network(batch) for batch in batches]

    def run(number: int) -> bool:
        with torch.no_grad():
            return all(torch.equal(network(batches[number]), expected[number]) for _ in range(10))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(run, range(4)))
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize(("name", "kind"), ONCE)
def test_it_compiles_as_a_whole(make: Make, name: str, kind: str) -> None:
    adapted = make(name, kind, "recast")
    train(adapted)
    network = adapted.network.eval()
    torch.compiler.reset()
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    expected, found = network(images()), compiled(images())
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad)


@pytest.mark.parametrize(("name", "kind"), ONCE)
def test_it_is_exported_merged_or_as_modules(make: Make, name: str, kind: str) -> None:
    adapted = make(name, kind, "recast")
    train(adapted)
    expected = logits(adapted.network)
    merged = adapters.merge(merge(adapted.network)).eval()
    program = torch.export.export(merged, (images(),))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_measures_have_names_of_their_own_and_remarks_are_one_line(make: Make, name: str, kind: str) -> None:
    adapter = adapters.load(name)()
    measured = adapter.measure(make(name, kind, "frozen").network)
    assert all(key.startswith("adapter/") and math.isfinite(value) for key, value in measured.items())
    assert CHANGE not in measured
    for remark in (adapter.remark(measured, measured), adapter.remark({}, {})):
        assert "\n" not in remark


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_what_trains_is_counted(make: Make, name: str, kind: str, base: str) -> None:
    adapted = make(name, kind, base)
    counts = count(adapted, 0)
    trained = sum(parameter.numel() for parameter in adapted.network.parameters() if parameter.requires_grad)
    assert counts["task_specific"] + counts["head"] == trained
    assert sum(sum(kinds.values()) for kinds in counts["layers"].values()) == trained
    norms = [module for module in adapted.network.modules() if isinstance(module, NORMS)]
    assert counts["adapter_norm"] == sum(
        p.numel() for module in norms for p in module.parameters(recurse=False) if p.requires_grad
    )


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_the_same_parameters_train_on_the_meta_device(make: Make, name: str, kind: str) -> None:
    """Models are checked, and their parameters counted, without weights."""
    found = inject_adapter(create_without_weights(kind), adapters.load(name)())
    assert found == make(name, kind, "frozen").trainable["adapter"]
