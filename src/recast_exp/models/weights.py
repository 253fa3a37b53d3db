"""The weights of a backbone: from a file, from the Hugging Face Hub or its cache; and their fingerprint."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from urllib.parse import urlparse

import timm
import torch
from huggingface_hub import constants as hub
from timm.models import load_state_dict
from torch import Tensor, nn

from recast_exp.errors import MissingInputError, UserError, first_line
from recast_exp.models.create import create_network

CONNECT_SECONDS = 5.0


def fingerprint(network: nn.Module) -> str:
    """`content_hash` of a model's state dict."""
    return content_hash(network.state_dict())


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over the names, types, shapes and bytes of tensors, whatever their order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def download(name: str, img_size: int | None) -> nn.Module:
    """Create a timm model with the pretrained weights that timm has pinned, from the hub or its cache.

    Raises:
        UserError: If timm has no pretrained weights of it.
        MissingInputError: If neither the hub nor its cache can provide them.
    """
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise UserError(
            f"model.backbone: expected a model with pretrained weights, got {name}, for which timm has none; set "
            "model.weights=FILE, or model.pretrained=false for random ones"
        )
    # The hub's client retries for most of a minute before it gives up; cached weights are available at once
    offline = hub.HF_HUB_OFFLINE or not _reachable()
    try:
        with _hub_offline() if offline else contextlib.nullcontext():
            return create_network(name, img_size, pretrained=True)
    # The clients of the hub raise errors of their own classes, some of them RuntimeError or ValueError
    except (OSError, RuntimeError, ValueError) as error:
        reason = (
            "Hugging Face's offline mode is on and its cache lacks them"
            if os.environ.get("HF_HUB_OFFLINE")
            else "there is no network and Hugging Face's cache lacks them"
            if offline
            else first_line(error)
        )
        raise MissingInputError(
            f"model.backbone: expected the pretrained weights of {name}, got none: {reason}; connect to the network "
            "once, or set model.weights=FILE (.safetensors, .pth or .npz)"
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
    """Whether the hub answers at all; assumed if there is a proxy."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    endpoint = urlparse(hub.ENDPOINT)
    port = endpoint.port or (443 if endpoint.scheme == "https" else 80)
    try:
        socket.create_connection((endpoint.hostname or "", port), timeout=CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def load_file(network: nn.Module, path: Path, key: str) -> None:
    """Load a file of weights. It must hold every parameter but those of a classifier, and no others.

    Args:
        network: The timm model, changed in place.
        path: The file.
        key: The configuration key that messages name.

    Raises:
        MissingInputError: If there is no such file.
        UserError: If it cannot be read, or does not fit the network.
    """
    if not path.is_file():
        raise MissingInputError(f"{key}: expected a file of weights, got {path}, which does not exist")
    if path.suffix in {".npz", ".npy"}:
        loader = getattr(network, "load_pretrained", None)
        if loader is None:
            raise UserError(f"{key}: expected a .safetensors or .pth file for {type(network).__name__}, got {path}")
        try:
            loader(str(path))
        except Exception as error:
            raise UserError(
                f"{key}: expected the weights of {type(network).__name__}, got {path} ({first_line(error)})"
            ) from error
        return
    try:
        state = load_state_dict(str(path), weights_only=True)
    except Exception as error:
        raise UserError(
            f"{key}: expected a file of weights, got {path}, which cannot be read ({first_line(error)})"
        ) from error
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(
            f"{key}: expected a mapping of names to tensors, by itself or under state_dict, got another file: {path}"
        )
    state = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    adapt = _filter_of(network)
    try:
        state = adapt(state, network) if adapt is not None else state
    except Exception as error:
        raise UserError(
            f"{key}: expected the weights of {type(network).__name__}, got {path} ({first_line(error)})"
        ) from error
    expected = network.state_dict()
    classifiers = tuple(f"{name}." for name in _classifier_names(network))
    unknown = [name for name in state if name not in expected and not name.startswith(classifiers)]
    missing = [name for name in expected if name not in state and not name.endswith("num_batches_tracked")]
    shapes = [name for name in expected if name in state and state[name].shape != expected[name].shape]
    if missing or unknown or shapes:
        parts = [
            f"{what} {len(names)} tensors, such as {names[0]}"
            for what, names in (("lacks", missing), ("has unknown", unknown), ("has other shapes for", shapes))
            if names
        ]
        raise UserError(
            f"{key}: expected the weights of {type(network).__name__}, got {path}, which {', '.join(parts)}"
        )
    network.load_state_dict({name: value for name, value in state.items() if name in expected}, strict=False)


def _filter_of(network: nn.Module) -> Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]] | None:
    """The conversion of a family's weights in timm: older names, resampled position embeddings."""
    return getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)


def _classifier_names(network: nn.Module) -> list[str]:
    classifier = getattr(network, "pretrained_cfg", {}).get("classifier", ())
    names = [classifier] if isinstance(classifier, str) else list(classifier or ())
    return [*names, "head", "fc", "classifier"]
