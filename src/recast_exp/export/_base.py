"""What all formats share: the model without a trace of its method, and the facts about it."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from recast_exp import adapters
from recast_exp.data.preprocessing import InputSpec
from recast_exp.errors import UserError
from recast_exp.models.adapted import AdaptedModel
from recast_exp.models.loading import Task
from recast_exp.tasks import library

MERGED = 1e-3
"""How much the logits of a merged model may differ from the task's, relative to the largest: by rounding alone."""


@dataclass(frozen=True)
class Facts:
    """What an export says of itself.

    Attributes:
        architecture: timm name of the backbone.
        classes: Names of the classes, in the order of the logits.
        input: The preprocessing: size in pixels, mean and standard deviation of pixels from 0 to 1, and so on.
        licence: Licence of the pretrained weights, as timm records it; None where it records none.
        origin: The pretrained weights: timm name, fingerprint, and the page or repository that timm records.
        task: What the task file says of the method, its templates, and what was measured.
    """

    architecture: str
    classes: tuple[str, ...]
    input: InputSpec
    licence: str | None
    origin: dict[str, str]
    task: dict[str, Any]

    def texts(self) -> dict[str, str]:
        """The facts as strings by name, as the metadata of files holds them."""
        found = {
            "architecture": self.architecture,
            "classes": json.dumps(self.classes, ensure_ascii=False),
            "input": json.dumps(dataclasses.asdict(self.input)),
            "licence": self.licence or "unknown",
            "origin": json.dumps(self.origin),
            "task": json.dumps(self.task, ensure_ascii=False),
        }
        # Names of folders may hold what is no text; as \udcNN, JSON reads it again
        return {name: text.encode(errors="backslashreplace").decode() for name, text in found.items()}

    def preprocessing(self) -> str:
        """The preprocessing in one sentence."""
        spec = self.input
        side = math.floor(spec.size / spec.crop_pct)
        resize = f"both sides to {side}" if spec.squash else f"the short side to {side}"
        mean, std = (" ".join(f"{value:g}" for value in values) for values in (spec.mean, spec.std))
        return (
            f"Resize {resize} pixels ({spec.interpolation}, antialiased), crop {spec.size} × {spec.size} from the "
            f"centre, divide by 255, subtract {mean}, divide by {std}."
        )


@dataclass(frozen=True)
class Exported:
    """A model to be written.

    Attributes:
        model: The model: merged, where its adapter can be; images [N, 3, S, S], normalised → logits [N, C].
        adapted: The same with templates and adapter as they are.
        facts: The facts about it.
        stays: Label of the adapter whose modules stay in the model; None for a stock timm model.
    """

    model: nn.Module
    adapted: AdaptedModel
    facts: Facts
    stays: str | None

    def images(self, count: int) -> Tensor:
        """Random uint8 images [count, 3, S, S] for comparisons, always the same."""
        size = self.facts.input.size
        return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(0)).byte()

    def normalised(self, images: Tensor) -> Tensor:
        """uint8 [N, 3, S, S] → the inputs of the model."""
        mean, std = self.facts.input.constants()
        return (images.float() / 255 - mean) / std

    def check_stock(self, format: str) -> None:
        """Refuse a format that holds stock timm models for one that is not.

        Raises:
            UserError: If the modules of its adapter stay in it.
        """
        if self.stays:
            raise UserError(
                f"stage.format: expected onnx or torch_export for a task with {self.stays}, whose modules cannot "
                f"become part of the weights, got {format}"
            )

    def compare(self, what: Path | str, logits: Callable[[Tensor], Tensor], tolerance: float) -> float:
        """The largest difference of a written model's logits, relative to the largest logit, for two sizes of batch.

        Args:
            what: The file, for messages.
            logits: uint8 images [N, 3, S, S] → logits [N, C] of the written model.
            tolerance: What is allowed.

        Raises:
            UserError: If the difference is larger: the file must not be used.
        """
        found: list[float] = []
        with torch.inference_mode():
            for count in (1, 3):
                images = self.images(count)
                expected = self.model(self.normalised(images)).double()
                difference = (logits(images).double() - expected).abs().max() / expected.abs().max().clamp(min=1)
                found.append(float(difference))
        if wrong := [each for each in found if not each <= tolerance]:  # NaN is
            raise UserError(f"{what}: expected the logits of the model to within {tolerance:g}, got {wrong[0]:.2g}")
        return max(found)

    def compare_network(self, what: Path | str, network: nn.Module, tolerance: float) -> float:
        """The same for a network that takes normalised images, such as one of timm that has loaded the file.

        Raises:
            UserError: If the difference is larger.
        """
        network.eval()
        return self.compare(what, lambda images: network(self.normalised(images)), tolerance)


def exported(adapted: AdaptedModel, task: Task, *, own_weights: bool = False) -> Exported:
    """Merge a copy of a model, and gather the facts about it.

    Args:
        adapted: The model on the CPU.
        task: Its task.
        own_weights: Whether its backbone has the weights of a file, not those that timm names.

    Raises:
        UserError: If the adapter cannot be merged, or the merged model has other logits.
    """
    network = copy.deepcopy(adapted.network).eval().requires_grad_(False)
    facts = facts_of(task, own_weights=own_weights)
    library.merge(network)
    staying = adapters.injected(network)
    merged = Exported(network, adapted, facts, staying[0].adapter.label if staying else None)
    merged.compare_network(f"task: {task.path}, merged", adapted.network, MERGED)
    return merged


def facts_of(task: Task, *, own_weights: bool = False) -> Facts:
    """What a task file and timm say of a task.

    Args:
        task: The task.
        own_weights: Whether its backbone has the weights of a file, of which timm's record does not tell.
    """
    known = None if own_weights else timm.get_pretrained_cfg(task.backbone, allow_unregistered=True)
    config: dict[str, Any] = known.to_dict() if known else {}  # type: ignore[no-untyped-call]
    origin = {"backbone": task.backbone, "fingerprint": task.fingerprint}
    origin |= {name: str(config[name]) for name in ("url", "hf_hub_id", "origin_url") if config.get(name)}
    return Facts(
        architecture=task.backbone,
        classes=task.classes,
        input=task.input,
        licence=config.get("license"),
        origin=origin,
        task={"config": task.record["config"], "bank": task.bank, "metrics": task.metrics},
    )
