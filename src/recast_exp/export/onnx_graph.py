"""An ONNX graph: any number of images, normalised or as they are; for one task, or with the coefficients as inputs."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from recast_exp.errors import UserError
from recast_exp.export._base import Exported
from recast_exp.files import replacing

TOLERANCE = 1e-4
BATCH = "batch"


class Prepared(nn.Module):
    """A model with its normalisation: uint8 images [N, 3, S, S] → logits [N, C]."""

    scale: Tensor
    shift: Tensor

    def __init__(self, model: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("scale", 1 / (255 * std))
        self.register_buffer("shift", mean / std)

    def forward(self, images: Tensor) -> Tensor:
        """Normalise, then classify."""
        found: Tensor = self.model(images.float() * self.scale - self.shift)
        return found


class ForAnyTask(nn.Module):
    """A model whose coefficients and head are inputs: one graph for all tasks of a backbone."""

    def __init__(self, exported: Exported) -> None:
        super().__init__()
        self.network = exported.adapted.network
        trainable = exported.adapted.trainable
        self.paths = list(trainable["coefficients"].values())
        self.shapes = [tuple(self.network.get_parameter(path).shape) for path in self.paths]
        self.heads = sorted(trainable["head"].values())  # bias, weight

    def forward(self, images: Tensor, coefficients: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Normalised images [N, 3, S, S], coefficients [M], head [C, D] and [C] → logits [N, C]."""
        parts = torch.split(coefficients, [int(np.prod(shape)) for shape in self.shapes])
        given = {path: part.view(shape) for path, part, shape in zip(self.paths, parts, self.shapes, strict=True)}
        given |= dict(zip(self.heads, (bias, weight), strict=True))
        found: Tensor = torch.func.functional_call(self.network, given, (images,))
        return found


def write(
    exported: Exported, folder: Path, *, uint8_input: bool = False, coefficients_input: bool = False
) -> tuple[list[Path], float]:
    """Write `model.onnx`, and compare its logits by onnxruntime.

    Args:
        exported: The model.
        folder: The folder.
        uint8_input: Whether the graph takes uint8 images and normalises them.
        coefficients_input: Whether the coefficients and the head are inputs of the graph. Those of this task are
            written to `task_inputs.safetensors`.

    Returns:
        The files, and the largest difference.

    Raises:
        UserError: If onnx or onnxruntime are not installed, coefficients are to be inputs of a model that trains
            others, or the logits differ.
    """
    onnx, runtime = _packages()
    path = folder / "model.onnx"
    images = exported.images(2)
    model: nn.Module = exported.model
    given: dict[str, Tensor] = {}
    if coefficients_input:
        given = _inputs(exported)
        model = ForAnyTask(exported).eval()
    mean, std = exported.facts.input.constants()
    if uint8_input:
        if coefficients_input:
            raise UserError("stage.uint8_input: expected false with stage.coefficients_input=true, got true")
        model = Prepared(model, mean, std).eval()
    first = images if uint8_input else exported.normalised(images)
    shapes: list[dict[int, str] | None] = [{0: BATCH}]
    shapes += [None if name == "coefficients" else {0: "classes"} for name in given]
    with _quietly(), torch.no_grad():
        program = torch.onnx.export(
            model,
            (first, *given.values()),
            dynamo=True,
            input_names=["images", *given],
            output_names=["logits"],
            dynamic_shapes=tuple(shapes),
            verbose=False,
        )
    assert program is not None
    for name, text in exported.facts.texts().items():
        program.model.metadata_props[name] = text
    with replacing(path) as temporary:
        program.save(str(temporary), external_data=False)
    onnx.checker.check_model(str(path))
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    files = [path]
    if given:
        files.append(folder / "task_inputs.safetensors")
        with replacing(files[-1]) as temporary:
            save_file(given, temporary, exported.facts.texts())

    def logits(images: Tensor) -> Tensor:
        values = images if uint8_input else exported.normalised(images)
        fed = {name: tensor.numpy() for name, tensor in {"images": values, **given}.items()}
        return torch.from_numpy(session.run(None, fed)[0])

    return files, exported.compare(path, logits, TOLERANCE)


def _inputs(exported: Exported) -> dict[str, Tensor]:
    """The coefficients and the head of a task, as the graph takes them."""
    adapted = exported.adapted
    if adapted.banks is None or adapted.trainable.get("adapter") or adapted.buffers or exported.stays:
        raise UserError(
            "stage.coefficients_input: expected false for a task that does not train coefficients and a head alone, "
            "got true"
        )
    parameters = {path: adapted.network.get_parameter(path).detach() for path in adapted.trainable["head"].values()}
    bias, weight = (parameters[path].contiguous() for path in sorted(parameters))
    coefficients = torch.cat([parameter.detach().flatten() for _, parameter in adapted.parameters("coefficients")])
    return {"coefficients": coefficients, "weight": weight, "bias": bias}


def _packages() -> tuple[ModuleType, ModuleType]:
    try:
        import onnx
        import onnxruntime  # type: ignore[import-untyped, unused-ignore]
        import onnxscript  # noqa: F401 - torch's exporter needs it
    except ImportError as error:
        raise UserError(
            f"stage.format: expected onnx, onnxruntime and onnxscript for onnx, got {error}; pip install "
            "'recast-exp[export]'"
        ) from error
    return onnx, onnxruntime


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what the exporter prints of its progress and of operators that it does not need."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [each.level for each in loggers]
    try:
        for each in loggers:
            each.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)
