"""`stage=export`: what other programs load gives the model's logits, and nothing of the method is left in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from recast_exp.cli.check import CommandLine, check
from recast_exp.config.schema import Config
from recast_exp.errors import UserError
from recast_exp.experiment.trained import open_task
from recast_exp.export import FORMATS, card
from recast_exp.export._base import Facts, exported
from recast_exp.tasks import library
from support.helpers import assert_one_line
from support.running import run_stage

Compose = Callable[..., Config]
KINDS = {
    "att": ("model=vit_att",),
    "melo": ("model=vit_att", "adapter=melo"),
    "probe": ("model=vit_frozen",),
    "resnet": ("model=resnet", "model.batchnorm_statistics=update"),
    "adaptformer": ("model=vit_att", "adapter=adaptformer"),
}
Run = Callable[..., tuple[dict[str, Any], Path]]


@pytest.fixture(scope="module")
def trained(tiny: Compose, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The task file of a kind, trained once."""
    done: dict[str, Path] = {}

    def trained(kind: str) -> Path:
        if kind not in done:
            folder = tmp_path_factory.mktemp(kind)
            run_stage(tiny(*KINDS[kind]), folder)
            done[kind] = folder / "task.safetensors"
        return done[kind]

    return trained


@pytest.fixture
def export(trained: Callable[[str], Path], tiny: Compose, tmp_path: Path) -> Run:
    def export(kind: str, format: str, *typed: str) -> tuple[dict[str, Any], Path]:
        own = (*KINDS[kind], "stage=export", f"stage.format={format}", f"task={trained(kind)}", *typed)
        folder = tmp_path / f"{kind} {format}"
        folder.mkdir(exist_ok=True)
        return run_stage(tiny(*own), folder), folder / "export"

    return export


@pytest.fixture
def model(trained: Callable[[str], Path], tiny: Compose) -> Callable[[str], Any]:
    """The model of a task, as the program has it."""

    def model(kind: str) -> Any:
        return exported(*_parts(tiny(*KINDS[kind], "stage=export", f"task={trained(kind)}")))

    return model


def _parts(settings: Config) -> tuple[Any, Any]:
    opened = open_task(settings)
    return opened.adapted, opened.task


@pytest.mark.parametrize("kind", ["att", "melo", "probe", "resnet"])
def test_timm(kind: str, export: Run, model: Callable[[str], Any]) -> None:
    metrics, folder = export(kind, "timm")
    assert metrics["largest_difference"] <= 1e-6
    name = "digits_resnet" if kind == "resnet" else "digits_vit"
    stock = timm.create_model(name, num_classes=5).eval()
    stock.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    whole = model(kind)
    images = whole.normalised(whole.images(5))
    with torch.no_grad():
        torch.testing.assert_close(stock(images), whole.model(images), rtol=1e-6, atol=1e-6)
    with safe_open(folder / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["classes"]) == ["5", "6", "7", "8", "9"]
    facts = json.loads((folder / "model.json").read_text())
    assert facts["classes"] == ["5", "6", "7", "8", "9"] and facts["input"]["size"] == 16
    assert facts["origin"]["backbone"] == name and "divide by 255" in facts["preprocessing"]


def test_a_merged_model_with_other_logits_is_not_exported(
    trained: Callable[[str], Path], tiny: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: Any) -> Any:
        merged = merge(model)
        merged.get_classifier().bias.data += 1
        return merged

    merge = library.merge
    monkeypatch.setattr(library, "merge", wrong)
    with pytest.raises(UserError) as error:
        exported(*_parts(tiny(*KINDS["melo"], "stage=export", f"task={trained('melo')}")))
    assert_one_line(error, "task: ", "merged: expected the logits of the model to within 0.001, got")


@pytest.mark.parametrize("kind", ["att", "resnet"])
def test_huggingface(kind: str, export: Run, model: Callable[[str], Any]) -> None:
    _, folder = export(kind, "huggingface")
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    whole = model(kind)
    images = whole.normalised(whole.images(5))
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), whole.model(images), rtol=1e-6, atol=1e-6)
    config = json.loads((folder / "config.json").read_text())
    assert config["label_names"] == ["5", "6", "7", "8", "9"]
    assert config["pretrained_cfg"]["mean"] == [0.5, 0.5, 0.5]
    front = yaml.safe_load((folder / "README.md").read_text().split("---")[1])
    assert front["library_name"] == "timm" and front["datasets"] == ["digits"]


@pytest.mark.parametrize("kind", ["att", "adaptformer"])
def test_torch_export(kind: str, export: Run, model: Callable[[str], Any]) -> None:
    _, folder = export(kind, "torch_export")
    program = torch.export.load(folder / "model.pt2")
    whole = model(kind)
    for count in (1, 5):
        images = whole.normalised(whole.images(count))
        with torch.no_grad():
            torch.testing.assert_close(program.module()(images), whole.model(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "uint8"), [("att", False), ("att", True), ("resnet", False), ("adaptformer", False)])
def test_onnx(kind: str, uint8: bool, export: Run, model: Callable[[str], Any]) -> None:
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    _, folder = export(kind, "onnx", f"stage.uint8_input={'true' if uint8 else 'false'}")
    session = runtime.InferenceSession(str(folder / "model.onnx"))
    whole = model(kind)
    for count in (1, 5):
        images = whole.images(count)
        found = session.run(None, {"images": (images if uint8 else whole.normalised(images)).numpy()})[0]
        with torch.no_grad():
            expected = whole.model(whole.normalised(images))
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-4)
    graph = onnx.load(str(folder / "model.onnx"))
    assert {entry.key for entry in graph.metadata_props} >= {"classes", "input", "licence", "origin", "task"}
    # Weights are whole: no initialiser has the shape of a group's templates, and there are no coefficients
    names = [entry.name for entry in graph.graph.initializer]
    assert not any("banks" in name or "parametrizations" in name for name in names)
    shapes = [tuple(entry.dims) for entry in graph.graph.initializer]
    assert not any(len(shape) == 3 and shape[0] == 2 and shape[1] > 16 for shape in shapes)


def test_one_graph_for_all_tasks(export: Run, model: Callable[[str], Any], tiny: Compose, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    _, folder = export("att", "onnx", "stage.coefficients_input=true")
    session = runtime.InferenceSession(str(folder / "model.onnx"))
    own = load_file(folder / "task_inputs.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in own.items()} == {
        "coefficients": (48,), "weight": (5, 96), "bias": (5,)
    }  # fmt: skip
    whole = model("att")
    images = whole.normalised(whole.images(4))
    # The numbers of another task, with another number of classes, in the same graph
    generator = torch.Generator().manual_seed(3)
    other = {name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in own.items()}
    other |= {"weight": other["weight"][:3], "bias": other["bias"][:3]}
    network, start = whole.adapted.network, 0
    with torch.no_grad():
        for _, parameter in whole.adapted.parameters("coefficients"):
            parameter.copy_(other["coefficients"][start : start + parameter.numel()].view_as(parameter))
            start += parameter.numel()
        network.head = torch.nn.Linear(96, 3)
        network.head.weight.copy_(other["weight"])
        network.head.bias.copy_(other["bias"])
        expected = network.eval()(images)
    fed = {"images": images.numpy(), **{name: tensor.numpy() for name, tensor in other.items()}}
    np.testing.assert_allclose(session.run(None, fed)[0], expected.numpy(), rtol=1e-4, atol=1e-4)


def test_what_a_format_cannot_hold(export: Run) -> None:
    for format in ("timm", "huggingface"):
        with pytest.raises(UserError) as error:
            export("adaptformer", format)
        assert_one_line(error, "stage.format: expected onnx or torch_export for a task with AdaptFormer", format)
    for kind in ("melo", "probe", "resnet"):
        with pytest.raises(UserError) as error:
            export(kind, "onnx", "stage.coefficients_input=true")
        assert_one_line(error, "stage.coefficients_input: expected false for a task that does not train coefficients")


def test_wrong_options(trained: Callable[[str], Path]) -> None:
    def wrong(*typed: str) -> list[str]:
        return check(CommandLine(("stage=export", f"task={trained('att')}", *typed), inputs=False)).wrong

    assert wrong("stage.format=tflite") == [f"stage.format: expected one of {', '.join(FORMATS)}, got 'tflite'"]
    assert wrong("stage.uint8_input=true")[0].startswith("stage.uint8_input: expected false with stage.format=timm")
    both = ("stage.format=onnx", "stage.uint8_input=true", "stage.coefficients_input=true")
    assert wrong(*both) == ["stage.uint8_input: expected false with stage.coefficients_input=true, got true"]


def test_a_difference_is_an_error(model: Callable[[str], Any], tmp_path: Path) -> None:
    whole = model("att")
    with pytest.raises(UserError) as error:
        whole.compare(tmp_path, lambda images: whole.model(whole.normalised(images)) + 0.1, 1e-6)
    assert_one_line(error, tmp_path, "expected the logits of the model to within 1e-06")
    with pytest.raises(UserError):
        whole.compare(tmp_path, lambda images: torch.full((len(images), 5), torch.nan), 1e-6)


def test_a_card_means_nothing_but_text(model: Callable[[str], Any]) -> None:
    facts = model("att").facts
    odd = ("a|b", "<script>alert(1)</script>", "[x](http://y)", "line\nbreak", "---")
    own = facts.task | {"config": {"dataset": {"name": "x: y\n- z"}, "model": {"label": "*bold*"}}}
    text = card.model_card(
        Facts(facts.architecture, odd, facts.input, "apache-2.0", facts.origin, own), "import timm\n"
    )
    front = yaml.safe_load(text.split("\n---\n")[0].removeprefix("---\n"))
    assert front["datasets"] == ["x: y\n- z"] and front["license"] == "apache-2.0"
    body = text.split("\n---\n", 1)[1]
    assert "<script>" not in body and "[x](" not in body and "*bold*" not in body.replace("\\*", "")
    assert "\nbreak" not in body
