"""The library: its names, its steps from a timm model to a task file and back, and what it leaves alone."""

from __future__ import annotations

import ast
import copy
import doctest
import functools
import importlib
import inspect
import json
import logging
import pkgutil
import random
import re
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import recast_exp
from recast_exp import adapters
from recast_exp.adapters import Adapter, fitting
from recast_exp.cli.check import CommandLine, check
from recast_exp.config.schema import ModelConfig
from recast_exp.models import task_file
from recast_exp.models.adapted import AdaptedModel, assemble
from recast_exp.models.backbones import create_backbone
from recast_exp.plugins import SOLVERS
from support.adapted import NETWORKS, create, create_without_weights, images, logits, train
from support.helpers import assert_one_line

ROOT = Path(__file__).parents[1]
FUNCTIONS = [name for name in recast_exp.__all__ if inspect.isfunction(getattr(recast_exp, name))]
PAIRS = [(name, kind) for kind in NETWORKS for name in fitting(functools.partial(create_without_weights, kind))]
CLASSES = ["ant", "bee", "cat", "dog"]


# Names


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = ("torch", "timm", "hydra", "omegaconf", "lightning", "numpy")
    assert python(f"import recast_exp, sys; dir(recast_exp); print([n for n in {heavy} if n in sys.modules])") == "[]"
    code = "from recast_exp import RecastError; import sys; print('torch' in sys.modules)"
    assert python(code) == "False"


def test_a_program_imports_neither_lightning_nor_before_task_files_hydra() -> None:
    """The reader of task files uses the grammar of overrides, which is Hydra's."""
    names = [name for name in recast_exp.__all__ if name != "__version__"]
    of_files = ("recast_exp.tasks.library", "recast_exp.models.loading")
    own = [name for name in names if getattr(recast_exp, name).__module__ not in of_files]
    assert {"find_groups", "mimic", "inject", "inject_adapter", "MeLo"} <= set(own)
    for some, unwanted in ((own, ("hydra", "lightning")), (names, ("lightning",))):
        code = f"from recast_exp import {', '.join(some)}; import sys"
        assert python(f"{code}; print([name for name in {unwanted} if name in sys.modules])") == "[]"


@pytest.mark.parametrize("name", recast_exp.__all__)
def test_a_public_name_is_there_and_says_what_it_is(name: str) -> None:
    value = getattr(recast_exp, name)
    assert name in dir(recast_exp)
    if name == "__version__":
        return
    assert value.__name__ == name
    documentation = inspect.getdoc(value) or ""
    assert documentation[0].isupper()
    if inspect.isfunction(value):
        assert "Args:" in documentation and "Example:" in documentation
        for parameter in inspect.signature(value).parameters:
            assert f"\n    {parameter}: " in documentation or f"\n    **{parameter}: " in documentation, parameter


def test_every_adapter_of_this_package_is_a_public_name() -> None:
    own = {adapters.load(name) for name in adapters.names()}
    public = {value for name in recast_exp.__all__ if isinstance(value := getattr(recast_exp, name), type)}
    assert {kind for kind in own if kind.__module__.startswith("recast_exp.")} <= public
    assert all(issubclass(kind, Adapter) for kind in own)


def test_type_checkers_see_the_names_that_are_imported_when_used() -> None:
    """They read the imports below TYPE_CHECKING; `__getattr__`, beside them, would make a misspelt name `Any`."""
    tree = ast.parse(Path(recast_exp.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    assert "__getattr__" in {node.name for node in block.orelse if isinstance(node, ast.FunctionDef)}
    assert "__getattr__" not in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    seen = {
        alias.name: node.module for node in ast.walk(block) if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert seen == {name: f"recast_exp.{module}" for name, module in recast_exp._MODULE_OF.items()}
    assert sorted({*seen, "__version__"}) == sorted(recast_exp.__all__)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"^module 'recast_exp' has no attribute 'injekt'$"):
        _ = recast_exp.injekt
    with pytest.raises(ImportError):
        exec("from recast_exp import injekt")


def test_no_submodule_hides_a_public_name() -> None:
    assert not {module.name for module in pkgutil.iter_modules(recast_exp.__path__)} & set(recast_exp.__all__)


@pytest.mark.parametrize("name", ["recast_exp", "recast_exp.recast", "recast_exp.adapters", *FUNCTIONS, "RecastModel"])
def test_examples_in_docstrings_work(name: str) -> None:
    value = importlib.import_module(name) if name.startswith("recast_exp") else getattr(recast_exp, name)
    tests = doctest.DocTestFinder(recurse=False).find(value, name, globs={})
    assert sum(len(test.examples) for test in tests) > 1
    for test in tests:
        assert doctest.DocTestRunner(verbose=False).run(test).failed == 0


def test_the_examples_of_the_docs_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small model in the place of the pretrained one, and a few random images."""
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) >= 3
    stock = create("vit", num_classes=5)

    def create_model(name: str, pretrained: bool = False, num_classes: int = 1000, **options: Any) -> nn.Module:
        # The examples take pretrained weights; saving compares with a model without
        assert timm.is_model(name.partition(".")[0]) and (pretrained or options)
        model = copy.deepcopy(stock)
        model.reset_classifier(num_classes)
        model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 32, 32)}
        return model

    monkeypatch.setattr(timm, "create_model", create_model)
    monkeypatch.chdir(tmp_path)
    batches = [(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])) for _ in range(2)]
    pixels = np.zeros((2, 40, 30, 3), dtype=np.uint8)
    namespace: dict[str, Any] = {"batches": batches, "images": images(), "pixels": pixels}
    for block in blocks:
        exec(block, namespace)
    assert namespace["names"] == [namespace["classes"][label] for label in namespace["labels"]]
    assert sorted(namespace["plain"].state_dict()) == sorted(stock.state_dict())


# From a model to a task file and back


def adapted_model(kind: str, adapter: Adapter, stock: nn.Module, **mimicry: Any) -> tuple[nn.Module, recast_exp.Banks]:
    """A copy of a model with templates and an adapter, trained for two steps."""
    model = copy.deepcopy(stock).requires_grad_(False)
    model.get_classifier().requires_grad_(True)
    banks = recast_exp.mimic(model, recast_exp.find_groups(model, targets=NETWORKS[kind][2]), **mimicry)
    recast_exp.inject(model, banks)
    recast_exp.inject_adapter(model, adapter)
    train(AdaptedModel(model, {}))
    return model, banks


@pytest.fixture(scope="module")
def stock(enliven: Callable[..., nn.Module]) -> dict[str, nn.Module]:
    return {kind: enliven(create(kind, num_classes=4)) for kind in NETWORKS}


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_a_task_is_saved_and_loaded_into_a_fresh_model(
    name: str, kind: str, stock: dict[str, nn.Module], tmp_path: Path
) -> None:
    model, banks = adapted_model(kind, adapters.load(name)(), stock[kind])
    path = recast_exp.save_task(model, tmp_path / "task.safetensors", banks=banks, classes=CLASSES)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]  # the templates are made again
    task = recast_exp.load_task(path)
    assert (task.classes, task.bank, task.adapter) == (tuple(CLASSES), banks.hash, adapters.load(name)())
    assert task.backbone.startswith(NETWORKS[kind][0])
    if kind == "vit":
        assert task.input.size == 32
    fresh = copy.deepcopy(stock[kind])
    fresh.reset_classifier(7)  # its head is replaced
    assert recast_exp.apply_task(fresh.train(), task) is fresh
    assert not fresh.training
    assert torch.equal(logits(fresh), logits(model))
    trained = {path for path, parameter in fresh.named_parameters() if parameter.requires_grad}
    assert trained == {path for path, parameter in model.named_parameters() if parameter.requires_grad}
    [refused] = check(CommandLine(("stage=evaluate", f"task={path}"))).wrong
    assert refused.startswith("dataset: expected one with stage=evaluate")
    # What was loaded is saved alike
    again = recast_exp.save_task(fresh, tmp_path / "again.safetensors", banks=banks, classes=CLASSES)
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_merge_leaves_a_plain_model_or_says_why_not(
    name: str, kind: str, stock: dict[str, nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = adapted_model(kind, adapters.load(name)(), stock[kind])
    expected = logits(model)
    assert recast_exp.merge(model) is model
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    if sorted(model.state_dict()) == sorted(stock[kind].state_dict()):
        assert caplog.messages == []
        plain = create(kind, num_classes=4)
        plain.load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(logits(plain), logits(model))
    else:
        label = adapters.load(name)().label
        assert caplog.messages == [f"merge: {label} cannot become part of the weights; its modules stay in the model"]
        assert adapters.load(name).merge is Adapter.merge, "its own merge leaves modules in the model"


def test_merging_a_plain_model_changes_nothing(stock: dict[str, nn.Module]) -> None:
    model = copy.deepcopy(stock["vit"])
    attributes = set(vars(model))
    recast_exp.merge(model)
    assert set(vars(model)) == attributes
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in stock["vit"].state_dict().items())


def test_a_task_without_templates(stock: dict[str, nn.Module], tmp_path: Path) -> None:
    model = copy.deepcopy(stock["cnn"]).requires_grad_(False)
    recast_exp.inject_adapter(model, recast_exp.LayerNormTuning())
    model.train()(images())  # running statistics move
    train(AdaptedModel(model, {}))
    recast_exp.save_task(model, tmp_path / "task.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["task.safetensors"]
    task = recast_exp.load_task(str(tmp_path / "task.safetensors"))
    assert (task.bank, task.classes) == (None, ("0", "1", "2", "3"))
    assert torch.equal(logits(recast_exp.apply_task(copy.deepcopy(stock["cnn"]), task)), logits(model))


def test_the_bank_is_given_or_found(
    stock: dict[str, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, banks = adapted_model("vit", recast_exp.NoAdapter(), stock["vit"], solver="gradient", steps=2)
    task = recast_exp.load_task(recast_exp.save_task(model, tmp_path / "task.safetensors", banks=banks))
    beside, elsewhere = tmp_path / f"{banks.hash}.safetensors", tmp_path / "elsewhere.safetensors"
    beside.rename(elsewhere)
    monkeypatch.setenv("RECAST_EXP_CACHE", str(tmp_path / "cache"))
    with pytest.raises(recast_exp.MissingInputError) as error:
        recast_exp.apply_task(copy.deepcopy(stock["vit"]), task)
    assert_one_line(error, "bank: expected", banks.hash[:16], task.path, beside)
    for given in (banks, elsewhere, str(elsewhere)):
        assert torch.equal(logits(recast_exp.apply_task(copy.deepcopy(stock["vit"]), task, banks=given)), logits(model))
    other = recast_exp.mimic(stock["vit"], banks.groups, seed=1)
    with pytest.raises(recast_exp.UserError) as error:
        recast_exp.apply_task(copy.deepcopy(stock["vit"]), task, banks=other)
    assert_one_line(error, "banks: expected", banks.hash[:16], other.hash[:16])
    cached = tmp_path / "cache" / "banks" / beside.name
    cached.parent.mkdir(parents=True)
    elsewhere.rename(cached)
    assert torch.equal(logits(recast_exp.apply_task(copy.deepcopy(stock["vit"]), task)), logits(model))


@pytest.mark.parametrize("name", ["digits_vit", "digits_resnet", "resnet18.a1_in1k"])
def test_a_task_names_a_backbone_that_timm_creates(name: str, tmp_path: Path) -> None:
    model = timm.create_model(name, num_classes=3).requires_grad_(False)
    task = recast_exp.load_task(recast_exp.save_task(model, tmp_path / "task.safetensors"))
    assert task.backbone == name
    recast_exp.apply_task(copy.deepcopy(model), task)


@pytest.mark.parametrize("adapter", ["none", "melo", "peft"])
@pytest.mark.parametrize("model", ["vit_att", "vit_frozen", "vit_full"])
def test_a_task_file_of_the_command_line_is_loaded(
    model: str, adapter: str, build: Callable[..., Any], tmp_path: Path
) -> None:
    if model == "vit_full" and adapter != "none":
        return
    run = build(f"model={model}", f"adapter={adapter}")
    adapted = run.adapted
    stock = timm.create_model("digits_vit", num_classes=0)
    settings = run.settings.model
    stock.load_state_dict(create_backbone(settings).network.state_dict())
    with torch.no_grad():
        for tensor in adapted.task_tensors().values():
            tensor.add_(0.1 * torch.randn(tensor.shape))
    path = tmp_path / "task.safetensors"
    task_file.write_task(path, adapted, run.experiment.record(adapted, {}))
    task = recast_exp.load_task(path)
    assert (task.backbone, task.classes) == ("digits_vit", ("5", "6", "7", "8", "9"))
    assert task.input == run.experiment.backbone.input
    with torch.no_grad():
        batch = torch.randn(2, 3, 16, 16)
        loaded = recast_exp.apply_task(copy.deepcopy(stock), task)
        assert torch.equal(loaded(batch), adapted.network.eval()(batch))
        stock.blocks[0].norm1.bias.add_(1)
    with pytest.raises(recast_exp.UserError) as error:
        recast_exp.apply_task(stock, task)
    assert_one_line(error, "model: expected digits_vit with the weights", path, "got other weights")


@pytest.mark.parametrize("name", ["vit_att", "melo", "piggyback", "resnet", "vit_att_mlp"])
def test_task_files_of_an_earlier_version_are_read(name: str) -> None:
    task = recast_exp.load_task(ROOT / "tests" / "regression" / "files" / name / "task.safetensors")
    assert task.backbone == ("digits_resnet" if name == "resnet" else "digits_vit")
    assert task.adapter.name == (name if name in ("melo", "piggyback") else "none")
    assert {key.partition("/")[0] for key in task.tensors} >= {"coefficients", "head"}


def test_what_cannot_be_saved_is_refused_in_one_line(stock: dict[str, nn.Module], tmp_path: Path) -> None:
    model, banks = adapted_model("vit", recast_exp.MeLo(), stock["vit"])
    save = functools.partial(recast_exp.save_task, path=tmp_path / "task.safetensors")
    other = recast_exp.mimic(stock["vit"], recast_exp.find_groups(stock["vit"], targets=["*.fc1"]))
    with pytest.raises(recast_exp.UserError) as error:
        save(model)
    assert_one_line(error, "banks: expected the Banks that were injected", "blocks.0.attn.qkv, got None")
    for wrong in (other, recast_exp.mimic(stock["vit"], banks.groups, seed=1)):
        with pytest.raises(recast_exp.UserError) as error:
            save(model, banks=wrong)
        assert_one_line(error, "banks: expected the Banks that were injected", "blocks.0.attn.qkv, got others")
    with pytest.raises(recast_exp.UserError) as error:
        save(copy.deepcopy(stock["vit"]).requires_grad_(False), banks=banks)
    assert_one_line(error, "banks: expected", "blocks.0.attn.qkv")
    with pytest.raises(recast_exp.UserError) as error:
        save(model, banks=banks, classes=["ant"])
    assert_one_line(error, "classes: expected 4 names, one for each logit, got 1")
    with pytest.raises(recast_exp.UserError) as error:
        save(stock["vit"].requires_grad_(True))
    assert_one_line(error, "model: expected only coefficients, adapter and head to train, got cls_token")
    with pytest.raises(recast_exp.UserError) as error:  # a task file holds one adapter
        recast_exp.inject_adapter(model, recast_exp.FiLM())
    assert_one_line(error, "adapter: expected a network without melo, got one that has it")
    with pytest.raises(recast_exp.UserError) as error:
        save(nn.Linear(2, 2))
    assert_one_line(error, "model: expected a timm model, got Linear")
    with pytest.raises(recast_exp.UserError) as error:
        save(create_without_weights("vit"))
    assert_one_line(error, "model: expected weights with values, got a model on the meta device")
    assert list(tmp_path.iterdir()) == []


def test_a_task_needs_the_model_that_it_was_trained_on(stock: dict[str, nn.Module], tmp_path: Path) -> None:
    model, banks = adapted_model("vit", recast_exp.MeLo(), stock["vit"])
    path = recast_exp.save_task(model, tmp_path / "task.safetensors", banks=banks)
    task = recast_exp.load_task(path)
    other = copy.deepcopy(stock["vit"])
    with torch.no_grad():
        other.blocks[0].norm1.bias.add_(1)
    for wrong, message in (
        (other, "model: expected vit_tiny_patch16_224"),
        (copy.deepcopy(stock["cnn"]), "layer: expected a Linear or Conv2d of ResNet"),
        (model, "model: expected a plain timm model, got one with templates or an adapter"),
        (nn.Linear(2, 2), "model: expected a timm model, got Linear"),
        (create_without_weights("vit"), "model: expected weights with values, got a model on the meta device"),
    ):
        with pytest.raises(recast_exp.UserError) as error:
            recast_exp.apply_task(wrong, task)
        assert_one_line(error, message)
    with pytest.raises(recast_exp.MissingInputError):
        recast_exp.load_task(tmp_path / "nowhere")
    save_file(task.tensors, path, {"recast_exp": json.dumps({"format": 1, "config": {}, "bank": None})})
    with pytest.raises(recast_exp.UserError) as error:
        recast_exp.load_task(path)
    assert_one_line(error, "task: expected the task.safetensors of a run", path, "the entry `backbone` is missing")


def test_banks_and_tasks_are_shown_in_a_few_lines_and_compared_as_objects(
    stock: dict[str, nn.Module], tmp_path: Path
) -> None:
    model, banks = adapted_model("vit", recast_exp.MeLo(), stock["vit"])
    path = recast_exp.save_task(model, tmp_path / "task.safetensors", banks=banks)
    task, again = recast_exp.load_task(path), recast_exp.load_task(path)
    assert task == task and task != again
    assert "tensor(" not in repr(task) + repr(banks)
    file = tmp_path / "banks.safetensors"
    banks.save(str(file))
    assert recast_exp.Banks.load(str(file)).hash == banks.hash
    assert banks != recast_exp.Banks.load(file)


class Blocks(nn.Module):
    """A model of another library than timm."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(4)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.blocks(x)
        return y


def test_a_model_of_another_library_is_injected_and_merged() -> None:
    model, x = Blocks().requires_grad_(False), torch.randn(2, 8)
    expected, names = model(x), list(model.state_dict())
    recast_exp.inject(model, recast_exp.mimic(model, recast_exp.find_groups(model, targets="blocks.?.0")))
    assert recast_exp.inject_adapter(model, recast_exp.BitFit())
    torch.testing.assert_close(model(x), expected)
    assert sorted(recast_exp.merge(model).state_dict()) == sorted(names)
    torch.testing.assert_close(model(x), expected)


def test_an_adapter_that_cannot_be_injected(stock: dict[str, nn.Module]) -> None:
    model = copy.deepcopy(stock["cnn"])
    with pytest.raises(recast_exp.UnfitError) as error:
        recast_exp.inject_adapter(model, recast_exp.MeLo())
    assert_one_line(error, "adapter: melo does not fit ResNet; it needs attention")
    for seed in (-1, 2**32, 1.5):
        with pytest.raises(recast_exp.UserError) as error:
            recast_exp.inject_adapter(model, recast_exp.BitFit(), seed=seed)  # type: ignore[arg-type]
        assert_one_line(error, f"seed: expected an integer ≥ 0 and < 4294967296, got {seed}")
    for wrong in ("melo", recast_exp.MeLo):
        with pytest.raises(recast_exp.UserError) as error:
            recast_exp.inject_adapter(model, wrong)  # type: ignore[arg-type]
        assert_one_line(error, "adapter: expected an adapter, such as MeLo(rank=4), got ")


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (3, "model.img_size: expected a multiple of 16, the patch size of vit_tiny_patch16_224, got 3; 16 is one"),
        (0, "img_size: expected an integer ≥ 1 and < 2147483648, got 0"),
        ("32", "img_size: expected an integer ≥ 1 and < 2147483648, got '32'"),
    ],
)
def test_an_image_size_that_a_backbone_does_not_take(size: Any, expected: str) -> None:
    with pytest.raises(recast_exp.UserError) as error:
        recast_exp.RecastModel.from_timm("vit_tiny_patch16_224", pretrained=False, img_size=size)
    assert str(error.value) == expected


# What belongs to the whole process


def shared_state() -> dict[str, Any]:
    """What a library function must not change."""
    loggers = ("", "recast_exp", "lightning", "lightning.pytorch", "timm", "peft")
    bits, *rest = np.random.get_state()[1:]  # noqa: NPY002
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": (bits.tolist(), *rest),
        "python": random.getstate(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "gradients": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "determinism": (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark),
        "precision": torch.get_float32_matmul_precision(),
        "warnings": list(warnings.filters),
        "logging": [(name, logging.getLogger(name).level, list(logging.getLogger(name).handlers)) for name in loggers],
    }


@pytest.fixture
def unchanged() -> Any:
    """Fails the test if it changes what belongs to the whole process."""
    importlib.import_module("peft")  # what the import of another library changes is not ours
    before = shared_state()
    yield
    after = shared_state()
    assert {name for name in before if before[name] != after[name]} == set()


@pytest.mark.parametrize("solver", SOLVERS.names())
def test_mimicry_leaves_the_process_alone(solver: str, stock: dict[str, nn.Module], unchanged: None) -> None:
    options: dict[str, Any] = {"closed_form": {}, "calibrated": {"images": torch.zeros(2, 3, 32, 32)}}.get(
        solver, {"steps": 2}
    )
    recast_exp.mimic(stock["cnn"], recast_exp.find_groups(stock["cnn"]), solver=solver, **options)


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_the_steps_leave_the_process_alone(
    name: str, kind: str, stock: dict[str, nn.Module], tmp_path: Path, unchanged: None
) -> None:
    model = copy.deepcopy(stock[kind]).requires_grad_(False)
    banks = recast_exp.mimic(model, recast_exp.find_groups(model, targets=NETWORKS[kind][2]))
    recast_exp.inject(model, banks)
    recast_exp.inject_adapter(model, adapters.load(name)())
    task = recast_exp.load_task(recast_exp.save_task(model, tmp_path / "task.safetensors", banks=banks))
    recast_exp.apply_task(copy.deepcopy(stock[kind]), task)
    recast_exp.merge(model)


@pytest.mark.parametrize("method", ["recast", "frozen", "full"])
def test_creating_and_assembling_leave_the_process_alone(method: str, unchanged: None) -> None:
    settings = ModelConfig(backbone="digits_vit", pretrained=False, method=method)
    network = create_backbone(settings).network
    banks = recast_exp.mimic(network, recast_exp.find_groups(network)) if method == "recast" else None
    adapter = recast_exp.NoAdapter() if method == "full" else recast_exp.MeLo()
    assemble(network, settings, adapter, banks, num_classes=3, seed=5)


def test_the_seed_decides_the_first_values_of_an_adapter(stock: dict[str, nn.Module]) -> None:
    def first_values(**options: Any) -> torch.Tensor:
        model = copy.deepcopy(stock["vit"])
        names = recast_exp.inject_adapter(model, recast_exp.MeLo(), **options)
        return model.get_parameter(names["blocks.0.attn.qkv.melo.a"])

    assert torch.equal(first_values(), first_values(seed=42))
    assert not torch.equal(first_values(seed=1), first_values(seed=2))
    torch.manual_seed(3)
    assert not torch.equal(first_values(seed=None), first_values(seed=None))


def test_injecting_an_adapter_lets_it_train_and_leaves_the_rest(stock: dict[str, nn.Module]) -> None:
    for name, kind in PAIRS:
        model = copy.deepcopy(stock[kind]).requires_grad_(False)
        model.get_classifier().requires_grad_(True)
        trained = recast_exp.inject_adapter(model, adapters.load(name)())
        head = {path for path, _ in model.named_parameters() if path.startswith(("head.", "fc."))}
        found = {path for path, parameter in model.named_parameters() if parameter.requires_grad}
        assert found == set(trained.values()) | head, name


# The distribution


def test_the_distributions_hold_the_mark_of_types_and_nothing_of_one_machine() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]
    wheel, sdist = build["targets"]["wheel"], build["targets"]["sdist"]
    assert (ROOT / "src" / "recast_exp" / "py.typed").read_bytes() == b""
    assert wheel["only-include"] == ["src/recast_exp", "src/hydra_plugins", "conf"]
    assert wheel["sources"] == {"src": "", "conf": "recast_exp/conf"}
    assert "src" in sdist["include"]
    assert build["exclude"] == ["conf/local.yaml"]
    assert "force-include" not in wheel  # would take what git ignores
