"""Stock timm models by name, with weights or without values, and the input that their weights expect."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import timm
import torch
from timm.data.config import resolve_model_data_config
from timm.models import get_deprecated_models, parse_model_name
from torch import nn

from recast_exp.config.schema import ModelConfig
from recast_exp.data.preprocessing import InputSpec
from recast_exp.errors import RecastError, UserError, first_line
from recast_exp.models import digits as digits  # registers the embedded backbones with timm
from recast_exp.models import elsewhere
from recast_exp.models.arguments import check_arguments

log = logging.getLogger(__name__)


def current_name(name: str) -> str:
    """The name by which timm knows a model today: without `timm/`, and instead of an old name."""
    if not isinstance(name, str):
        return name  # which is refused, with a reason
    plain = name.removeprefix("hf-hub:").removeprefix("hf_hub:")
    if plain.startswith("timm/") and timm.is_model(plain.removeprefix("timm/").partition(".")[0]):
        name = plain.removeprefix("timm/")
    return str(get_deprecated_models().get(name) or name)


def check_name(name: str) -> None:
    """Refuse a name, or a tag of weights, that timm does not know.

    Raises:
        UserError: One line with the nearest names.
        MissingInputError: If a repository or a folder holds no model.
    """
    if not isinstance(name, str):
        raise UserError(f"model.backbone: expected the name of a timm model, got a {type(name).__name__}")
    try:
        source, _ = parse_model_name(name)
    except (AssertionError, ValueError) as error:
        raise UserError(
            f"model.backbone: expected a timm model, hf-hub:OWNER/NAME or local-dir:FOLDER, got {name!r}"
        ) from error
    if source:
        elsewhere.architecture(name)
        return
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = get_close_matches(architecture, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() lists them"
        raise UserError(f"model.backbone: expected a timm model, got {architecture!r}; {hint}")
    tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        near = get_close_matches(tag, tags, n=1, cutoff=0) + tags
        expected = f"one of the tags {', '.join(dict.fromkeys(near))}" if tags else "no tag, as timm has no weights"
        raise UserError(f"model.backbone: expected {expected} for {architecture}, got {tag!r}")


def backbone_name(model: ModelConfig) -> str:
    """The timm name of a model's backbone, after a check that timm knows it.

    Raises:
        UserError: If the model has none, or timm does not know it.
    """
    if not model.backbone:
        raise UserError("model.backbone: expected the name of a timm model, got nothing")
    name = current_name(model.backbone)
    check_name(name)
    return name


def create_network(
    name: str, img_size: int | None, pretrained: bool = False, arguments: Mapping[str, object] | None = None
) -> nn.Module:
    """Create a timm model without a classifier.

    A model whose weights depend on the input size is created for that size.

    Args:
        name: timm name, with or without a tag.
        img_size: Input size in pixels; None is the model's own.
        pretrained: Whether to load the weights that timm has pinned.
        arguments: More arguments of the model in timm.

    Raises:
        UserError: If the model does not take this input size, or one of the arguments.
    """
    more: dict[str, Any] = dict(arguments or {})
    if own := [key for key in _OURS if key in more]:
        raise UserError(f"model.arguments.{own[0]}: expected an argument without a key of its own; {_OURS[own[0]]}")
    check_arguments(more, "model.arguments.")
    known = elsewhere.timm_name(name)
    if img_size is not None:
        try:
            return timm.create_model(known, num_classes=0, img_size=img_size, pretrained=pretrained, **more)
        except TypeError as error:
            if "img_size" not in str(error):
                raise _refused(name, more, error) from error
            log.debug("%s accepts any input size (%s)", name, error)
        except AssertionError as error:
            if (more and _can_be_made(name)) or (elsewhere.is_elsewhere(name) and not _can_be_made(name)):
                raise _refused(name, more, error) from error
            raise UserError(f"model.img_size: expected a size that {name} takes, got {img_size} ({error})") from error
        except Exception as error:
            raise _refused(name, more, error) from error
    try:
        return timm.create_model(known, num_classes=0, pretrained=pretrained, **more)
    except Exception as error:
        raise _refused(name, more, error) from error


_OURS = {
    "img_size": "set model.img_size",
    "num_classes": "the dataset decides",
    "pretrained": "set model.pretrained",
    "checkpoint_path": "set model.weights",
    "pretrained_cfg": "set model.weights, model.mean and model.std",
}


def _can_be_made(name: str) -> bool:
    """Whether timm makes a model without arguments of one's own."""
    try:
        timm.create_model(elsewhere.timm_name(name), num_classes=0)
    except Exception:
        return False
    return True


def _refused(name: str, arguments: Mapping[str, object], error: Exception) -> Exception:
    """An argument that is unknown, with those that are near, or that the model does not take; else the error itself.

    A file of others may have arguments, too.
    """
    if elsewhere.is_elsewhere(name) and not _can_be_made(name) and _can_be_made(elsewhere.architecture(name)):
        path = elsewhere.config_file(name)
        return UserError(
            f"model.backbone: expected the {elsewhere.CONFIG} of a timm model, got {path}, with which timm cannot make "
            f"a {elsewhere.architecture(name)} ({first_line(error)})"
        )
    if not (found := re.search(r"unexpected keyword argument '(\w+)'", str(error))) or found[1] not in arguments:
        if not arguments or isinstance(error, RecastError) or not _can_be_made(name):
            return error
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        return UserError(
            f"model.arguments: expected arguments that {name} takes, got {given[:200]} ({first_line(error)})"
        )
    with torch.device("meta"):
        takes = inspect.signature(type(timm.create_model(elsewhere.timm_name(name), num_classes=0)).__init__).parameters
    near = get_close_matches(found[1], takes, n=3, cutoff=0.4) or [key for key in takes if key not in ("self", *_OURS)]
    return UserError(f"model.arguments.{found[1]}: unknown argument of {name}; it takes {', '.join(near)}")


def numbers_of(name: str, img_size: int | None, arguments: Mapping[str, object] | None = None) -> int | None:
    """How many numbers the weights of a model are, without making them; None where its constructor computes with them.

    Raises:
        UserError: As `create_network`.
    """
    try:
        with torch.device("meta"):
            network = create_network(name, img_size, arguments=arguments)
    except RecastError:
        raise
    except Exception:
        return None
    return sum(int(tensor.numel()) for tensor in network.state_dict().values())


def blueprint(model: ModelConfig, device: str = "meta") -> nn.Module:
    """The backbone of a model without values, on the meta device: fast for a model of any size.

    Args:
        model: The model.
        device: Another device, for random values.

    Raises:
        UserError: If timm knows no such model, or the model does not take the input size.
    """
    name = backbone_name(model)
    with torch.device(device):
        return create_network(name, model.img_size, arguments=model.arguments)


def input_spec(model: ModelConfig) -> InputSpec:
    """The input that the backbone of a model expects, without loading its weights.

    Raises:
        UserError: If timm knows no such model, or the model does not take the input size.
    """
    try:
        network = blueprint(model)
    except RecastError:
        raise
    except Exception:  # the constructors of a few models compute with their weights
        network = create_network(backbone_name(model), model.img_size, arguments=model.arguments)
    return input_of(network, model)


def input_of(network: nn.Module, model: ModelConfig) -> InputSpec:
    """The input that the weights of a network expect: timm's record of them, overridden by the model's settings."""
    data = resolve_model_data_config(network)  # type: ignore[no-untyped-call]
    size = model.img_size or data["input_size"][-1]
    return InputSpec(
        size=int(size),
        mean=_three(model.mean or data["mean"]),
        std=_three(model.std or data["std"]),
        crop_pct=float(data["crop_pct"]),
        interpolation=str(data["interpolation"]),
        squash=data.get("crop_mode") == "squash",
        background="white",
        orient=True,
    )


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    numbers = [float(value) for value in values]
    first, second, third = numbers * 3 if len(numbers) == 1 else numbers
    return first, second, third
