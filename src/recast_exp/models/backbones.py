"""Backbones: stock timm models, their pretrained weights, and what input those weights expect."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import timm
import torch
from huggingface_hub import constants as hub
from omegaconf import DictConfig
from timm.data.config import resolve_model_data_config
from timm.models import load_state_dict
from torch import Tensor, nn

from recast_exp import adapters
from recast_exp.data.transforms import InputSpec
from recast_exp.errors import MissingInputError, RecastError, UserError
from recast_exp.models.digits import EMBEDDED, pretrained_weights
from recast_exp.recast import find_groups

log = logging.getLogger(__name__)

CONNECT_SECONDS = 5.0


@dataclass
class Backbone:
    """A pretrained model without a classifier, and what is known of it.

    Attributes:
        network: The timm model, created with `num_classes=0`.
        name: timm name with its tag.
        fingerprint: sha256 over all weights: two backbones with the same one are the same to the bit.
        input: Size, mean and deviation that the weights expect.
    """

    network: nn.Module
    name: str
    fingerprint: str
    input: InputSpec


def create_backbone(cfg: DictConfig, cache: Path) -> Backbone:
    """Create the backbone of a configuration and load its weights.

    Args:
        cfg: The whole configuration; `model` is used, and `trainer` where an embedded backbone is trained first.
        cache: Folder for embedded backbones.

    Raises:
        UserError: If timm knows no such model, or a weights file does not fit it.
        MissingInputError: If the weights can be had neither from a file nor from the network.
    """
    model_cfg = cfg.model
    name = model_cfg.backbone
    check_name(name)
    torch.manual_seed(0)  # what stays random without pretrained weights is the same in every run
    if model_cfg.pretrained and not model_cfg.weights and name not in EMBEDDED:
        network = _download(name, model_cfg.img_size)
    else:
        network = _create(name, model_cfg.img_size)
    if model_cfg.weights:
        _load_file(network, Path(model_cfg.weights).expanduser(), "model.weights")
    elif not model_cfg.pretrained:
        log.warning("model.pretrained=false: the backbone %s has random weights", name)
    elif name in EMBEDDED:
        _load_file(network, pretrained_weights(name, cache), "model.backbone")
    return Backbone(network, name, fingerprint(network), _input_spec(network, model_cfg))


def fingerprint(network: nn.Module) -> str:
    """sha256 over the names, types, shapes and bytes of a model's state dict."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_model(cfg: DictConfig) -> None:
    """Refuse a configuration whose backbone timm does not know, or has no layers to group, or no place for the adapter.

    Loads no weights.

    Raises:
        UserError: One line with the nearest names, or with what can be grouped.
    """
    model, recast = cfg.model, cfg.recast
    check_name(model.backbone)
    adapter = adapters.from_config(cfg.adapter)
    if model.method == "recast" or cfg.adapter.name != "none":
        try:
            network = blueprint(cfg)
        except RecastError:
            raise
        except Exception as error:  # a few models compute with their weights when they are made
            log.debug("%s cannot be made without numbers (%s); it is checked later", model.backbone, error)
            return
        adapters.check_adapter(functools.partial(blueprint, cfg), adapter)
    if model.method == "recast":
        find_groups(
            network,
            targets=recast.targets,
            num_groups=recast.num_groups,
            num_templates=recast.num_templates,
            granularity=recast.granularity,
        )


def input_spec(cfg: DictConfig) -> InputSpec:
    """What the backbone of a configuration wants to see, without loading its weights.

    Raises:
        UserError: If timm knows no such model.
    """
    check_name(cfg.model.backbone)
    try:
        network = blueprint(cfg)
    except RecastError:
        raise
    except Exception:  # a few models compute with their weights when they are made
        network = _create(cfg.model.backbone, cfg.model.img_size)
    return _input_spec(network, cfg.model)


def blueprint(cfg: DictConfig) -> nn.Module:
    """The backbone of a configuration without numbers, on the meta device: fast for a model of any size."""
    with torch.device("meta"):
        return _create(cfg.model.backbone, cfg.model.img_size)


def check_name(name: str) -> None:
    """Refuse a name, or a tag of weights, that timm does not know.

    Raises:
        UserError: One line with the nearest names.
    """
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = get_close_matches(architecture, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() names them"
        raise UserError(f"model.backbone: timm has no model {architecture!r}; {hint}")
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        near = get_close_matches(tag, tags, n=1, cutoff=0) + tags
        raise UserError(
            f"model.backbone: {architecture} has no weights tagged {tag!r}; timm has {', '.join(dict.fromkeys(near))}"
            if tags
            else f"model.backbone: timm has no pretrained weights of {architecture}, so no tag {tag!r}"
        )


def _create(name: str, img_size: int | None, **kwargs: Any) -> nn.Module:
    """Create without a classifier; models whose weights depend on the input size are told it."""
    if img_size is not None:
        entrypoint = timm.model_entrypoint(name.partition(".")[0])
        try:
            return timm.create_model(name, num_classes=0, img_size=img_size, **kwargs)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            log.debug("%s takes any input size (%s)", entrypoint.__name__, error)
        except AssertionError as error:
            raise UserError(f"model.img_size: got {img_size}, which {name} does not take ({error})") from error
    return timm.create_model(name, num_classes=0, **kwargs)


def _download(name: str, img_size: int | None) -> nn.Module:
    """Let timm fetch the pinned weights, or find them in the hub's cache."""
    known = timm.get_pretrained_cfg(name)
    if known is None or not known.has_weights:
        raise UserError(
            f"model.backbone: timm has no pretrained weights of {name}; set model.weights=FILE, or "
            "model.pretrained=false for random ones"
        )
    # The hub's client retries for most of a minute before it gives up; what its cache holds can be had at once.
    offline = hub.HF_HUB_OFFLINE or not _reachable()
    try:
        with _hub_offline() if offline else contextlib.nullcontext():
            return _create(name, img_size, pretrained=True)
    # The clients of the hub raise errors of their own kinds, some of them RuntimeError or ValueError.
    except (OSError, RuntimeError, ValueError) as error:
        reason = (
            "Hugging Face's offline mode is on and its cache lacks them"
            if os.environ.get("HF_HUB_OFFLINE")
            else "there is no network and Hugging Face's cache lacks them"
            if offline
            else _first_line(error)
        )
        raise MissingInputError(
            f"model.backbone: no pretrained weights of {name}: {reason}; connect to the network once, or set "
            "model.weights=FILE (.safetensors, .pth or .npz)"
        ) from error


@contextlib.contextmanager
def _hub_offline() -> Iterator[None]:
    """Keep the hub's client from the network; it reads its environment only once, at import."""
    before = hub.HF_HUB_OFFLINE
    hub.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = before


def _reachable() -> bool:
    """Whether the hub answers at all; assumed where a proxy stands in between."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    endpoint = urlparse(hub.ENDPOINT)
    port = endpoint.port or (443 if endpoint.scheme == "https" else 80)
    try:
        socket.create_connection((endpoint.hostname or "", port), timeout=CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def _load_file(network: nn.Module, path: Path, key: str) -> None:
    """Load a file of weights; every parameter but a classifier's must be in it, and nothing else."""
    if not path.is_file():
        raise MissingInputError(f"{key}: no file {path}")
    if path.suffix in {".npz", ".npy"}:
        loader = getattr(network, "load_pretrained", None)
        if loader is None:
            raise UserError(
                f"{key}: {type(network).__name__} cannot read {path.suffix} files; takes .safetensors or .pth"
            )
        try:
            loader(str(path))
        except Exception as error:
            raise UserError(f"{key}: {path} does not fit {type(network).__name__} ({_first_line(error)})") from error
        return
    try:
        state = load_state_dict(str(path), weights_only=True)
    except Exception as error:
        raise UserError(f"{key}: {path} is not a readable file of weights ({_first_line(error)})") from error
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{key}: {path} is not a file of weights: takes tensors by name, whole or under state_dict")
    state = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    adapt = _filter_of(network)
    try:
        state = adapt(state, network) if adapt is not None else state
    except Exception as error:
        raise UserError(f"{key}: {path} does not fit {type(network).__name__} ({_first_line(error)})") from error
    own = network.state_dict()
    classifiers = tuple(f"{name}." for name in _classifier_names(network))
    unknown = [name for name in state if name not in own and not name.startswith(classifiers)]
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    shapes = [name for name in own if name in state and state[name].shape != own[name].shape]
    if missing or unknown or shapes:
        parts = [
            f"{what} {len(names)} tensors such as {names[0]}"
            for what, names in (("lacks", missing), ("has unknown", unknown), ("has other shapes for", shapes))
            if names
        ]
        raise UserError(f"{key}: {path} does not fit {type(network).__name__}: it {', '.join(parts)}")
    network.load_state_dict({name: value for name, value in state.items() if name in own}, strict=False)


def _filter_of(network: nn.Module) -> Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]] | None:
    """Timm's own conversion for a family: older names, resampled position embeddings."""
    return getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)


def _classifier_names(network: nn.Module) -> list[str]:
    classifier = getattr(network, "pretrained_cfg", {}).get("classifier", ())
    names = [classifier] if isinstance(classifier, str) else list(classifier or ())
    return [*names, "head", "fc", "classifier"]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _input_spec(network: nn.Module, model_cfg: DictConfig) -> InputSpec:
    """The input that the weights expect, from timm's record of them, with the configuration's overrides."""
    data = resolve_model_data_config(network)  # type: ignore[no-untyped-call]
    size = model_cfg.img_size or data["input_size"][-1]
    return InputSpec(
        size=int(size),
        mean=_three(model_cfg.mean or data["mean"]),
        std=_three(model_cfg.std or data["std"]),
        crop_pct=float(data["crop_pct"]),
        interpolation=str(data["interpolation"]),
        squash=data.get("crop_mode") == "squash",
    )


def _three(values: Any) -> tuple[float, float, float]:
    numbers = [float(value) for value in values]
    first, second, third = numbers * 3 if len(numbers) == 1 else numbers
    return first, second, third
