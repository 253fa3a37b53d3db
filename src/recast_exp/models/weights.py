"""The weights of a backbone: from a file, from the Hugging Face Hub or its cache; and their fingerprint."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import socket
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import safetensors.torch
import timm
import torch
from huggingface_hub import constants as hub
from timm.models import load_state_dict_from_hf, parse_model_name
from torch import Tensor, nn

from recast_exp.config.schema import ModelConfig
from recast_exp.errors import MissingInputError, UserError, first_line
from recast_exp.files import user_path
from recast_exp.models import torch_file
from recast_exp.models.create import backbone_name, create_network, numbers_of
from recast_exp.models.elsewhere import is_elsewhere, local_folder

log = logging.getLogger(__name__)

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


def download(name: str, img_size: int | None, arguments: Mapping[str, object] | None = None) -> nn.Module:
    """Create a timm model with the pretrained weights that timm has pinned, from the hub or its cache.

    Raises:
        UserError: If timm has no pretrained weights of it.
        MissingInputError: If neither the hub nor its cache can provide them.
    """
    config = None if is_elsewhere(name) else timm.get_pretrained_cfg(name)
    if not is_elsewhere(name) and (config is None or not config.has_weights):
        raise UserError(
            f"model.backbone: expected a model with pretrained weights, got {name}, for which timm has none; set "
            "model.weights=FILE, or model.pretrained=false for random ones"
        )
    # The hub's client retries for most of a minute before it gives up; cached weights are available at once
    offline = hub.HF_HUB_OFFLINE or not _reachable()
    try:
        with _hub_offline() if offline else contextlib.nullcontext():
            if not is_elsewhere(name):
                return create_network(name, img_size, True, arguments)
            # timm itself would leave parameters random that the repository lacks
            state = load_state_dict_from_hf(parse_model_name(name)[1])
            # Some models have tensors under two names
            held = 2 * sum(value.numel() for value in state.values() if isinstance(value, Tensor))
            network = create_held(name, img_size, arguments, held, name)
            load_state(network, state, "model.backbone", name)
            return network
    except UserError:
        raise
    except Exception as error:  # those of the Hub's client, and of the one for HTTP below it
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


def file_of(model: ModelConfig) -> tuple[Path, str] | None:
    """The file with the weights of a model, and the key that names it; None where timm or nobody provides them.

    Raises:
        MissingInputError: If the folder of the model has none.
    """
    if model.weights:
        return user_path(model.weights), "model.weights"
    folder = local_folder(model.backbone or "") if model.pretrained else None
    if folder is None:
        return None
    # timm itself would leave parameters random that the file lacks
    for name in _LOCAL_WEIGHTS:
        if (folder / name).is_file():
            return folder / name, "model.backbone"
    raise MissingInputError(f"model.backbone: expected {' or '.join(_LOCAL_WEIGHTS)} in {folder}, got neither")


def create(model: ModelConfig) -> nn.Module:
    """The network of a model, with the weights of its file or with random ones.

    Raises:
        UserError: If timm knows no such model, or the file does not fit it.
        MissingInputError: If a file is not there.
    """
    name, file = backbone_name(model), file_of(model)
    if file is None:
        return create_held(name, model.img_size, model.arguments, _LARGEST, "no file")
    path, key = file
    # A byte for each number at least
    held = path.stat().st_size * (_UNPACKED if path.suffix == ".npz" else 1) if path.is_file() else _LARGEST
    network = create_held(name, model.img_size, model.arguments, held, path)
    load_file(network, path, key)
    return network


def create_held(
    name: str, img_size: int | None, arguments: Mapping[str, object] | None, held: int, where: Path | str
) -> nn.Module:
    """As `create_network`, of no more numbers than their file holds: a model of others may be larger than the memory.

    Args:
        name: timm name.
        img_size: Input size in pixels.
        arguments: More arguments of the model in timm.
        held: The numbers that there are.
        where: Their file, for the message.

    Raises:
        UserError: As `create_network`, or if the model has far more.
    """
    if is_elsewhere(name) and (size := numbers_of(name, img_size, arguments) or 0) > held:
        raise UserError(
            f"model.backbone: expected a model of the size of its weights, got {name} with {size:,} numbers, of which "
            f"{where} holds {held:,} at most"
        )
    return create_network(name, img_size, arguments=arguments)


_LARGEST = 10**10
"""Numbers of a model with random weights, if a file of others describes it. The largest that timm knows has 7e9."""

_LOCAL_WEIGHTS = "model.safetensors", "pytorch_model.bin"


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
            _check_arrays(path)
            loader(str(path))
        except Exception as error:
            raise UserError(
                f"{key}: expected the weights of {type(network).__name__}, got {path} ({first_line(error)})"
            ) from error
        return
    load_state(network, _read(path, key), key, path)


def load_state(network: nn.Module, content: Mapping[str, object], key: str, path: Path | str) -> None:
    """Load what a file of weights holds. It must have every parameter but those of a classifier, and no others.

    Args:
        network: The timm model, changed in place.
        content: Tensors by name, perhaps within the mappings of a checkpoint.
        key: The configuration key that messages name.
        path: Where they come from, for messages.

    Raises:
        UserError: If they do not fit the network.
    """
    state = _unwrapped(content)
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(
            f"{key}: expected a mapping of names to tensors, by itself or under state_dict, got another file: {path}"
        )
    if repeated := [name for name, value in state.items() if isinstance(value, Tensor) and not is_whole(value)]:
        raise UserError(f"{key}: expected tensors with all their numbers, got {repeated[0]} without in {path}")
    state, ignored = _fitted(network, state, key, path)
    expected = network.state_dict()
    classifiers = tuple(f"{name}." for name in _classifier_names(network))
    unknown = [name for name in state if name not in expected and not name.startswith((*classifiers, *_OTHER_PARTS))]
    missing = [name for name in expected if name not in state and not name.endswith("num_batches_tracked")]
    shapes = [name for name in expected if name in state and state[name].shape != expected[name].shape]
    if missing or unknown or shapes:
        parts = [
            f"{before} {len(names)} {after}, such as {names[0]}"
            for before, names, after in (
                ("lacks", missing, "tensors"),
                ("has", unknown, "unknown tensors"),
                ("has", shapes, "tensors of other shapes"),
            )
            if names
        ]
        raise UserError(
            f"{key}: expected the weights of {type(network).__name__}, got {path}, which {', '.join(parts)}"
        )
    for name in expected.keys() & state.keys():
        value = state[name]
        dense = value.layout == torch.strided and not value.is_quantized and not value.is_meta
        if not dense or value.is_floating_point() != expected[name].is_floating_point() or value.is_complex():
            raise UserError(
                f"{key}: expected dense tensors of floating-point numbers, got {name} as {value.dtype} "
                f"({value.layout}) in {path}"
            )
        if not value.isfinite().all():
            raise UserError(f"{key}: expected finite numbers, got NaN or infinity in {name} of {path}; get it again")
    ignored += [name for name in state if name.startswith(_OTHER_PARTS) and name not in expected]
    if ignored:
        log.info("%s: %d tensors of %s are not used, such as %s", key, len(ignored), path, ignored[0])
    network.load_state_dict({name: value for name, value in state.items() if name in expected}, strict=False)


def _check_arrays(path: Path) -> None:
    """Refuse arrays that timm would copy without a look: what is not finite, no weight, or one number for all.

    Raises:
        ValueError: One line.
    """
    with zipfile.ZipFile(path) as archive:
        if sum(member.file_size for member in archive.infolist()) > _UNPACKED * path.stat().st_size:
            raise ValueError(f"it unpacks to more than {_UNPACKED} times its size")
    with np.load(path, allow_pickle=False) as arrays:
        for name in arrays.files:
            array = arrays[name]
            if not np.issubdtype(array.dtype, np.floating) or array.size < 2:
                raise ValueError(f"{name} holds no weights: {array.dtype} {list(array.shape)}")
            if not np.isfinite(array).all():
                raise ValueError(f"{name} holds NaN or infinity")


_UNPACKED = 10
"""Times the size of an .npz file that its arrays may have: weights hardly shrink."""

_WRAPPERS = (
    *("state_dict_ema", "model_ema", "ema", "ema_state_dict", "teacher", "state_dict", "model_state_dict", "model"),
    *("student", "backbone", "encoder", "module", "net", "network"),
)
"""What checkpoints call the mapping of the weights, and the part of a model that is its backbone; the best first."""

_OTHER_PARTS = ("decoder", "projector", "projection", "predictor", "mask_token", "dino_head", "ibot_head", "momentum")
"""How names of what a pretraining adds to a backbone begin."""


def is_whole(tensor: Tensor) -> bool:
    """Whether a tensor has memory for each of its numbers: one that repeats a few may stand for any number of them."""
    return tensor.layout != torch.strided or tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()


def _read(path: Path, key: str) -> Mapping[str, object]:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content = torch_file.load(path)
    except Exception as error:
        if named := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise UserError(
                f"{key}: expected tensors alone, got {path}, which refers to {named[1]} too: opening it could run a "
                "program. If you trust it, save its weights by themselves: "
                'torch.save(torch.load(FILE, weights_only=False)["model"], NEW)'
            ) from error
        # What torch says of other bytes is a number, or the advice to open them without a check
        why = f" ({error.strerror})" if isinstance(error, OSError) and error.strerror else ""
        raise UserError(
            f"{key}: expected a file of weights, a .safetensors file or one of torch.save, got {path}, which is "
            f"damaged or something else{why}"
        ) from error
    return content if isinstance(content, Mapping) else {}


def _unwrapped(content: Mapping[str, object]) -> dict[str, Tensor]:
    """The mapping of names to tensors within a checkpoint."""
    seen: set[int] = set()  # a checkpoint may hold itself
    while not all(isinstance(value, Tensor) for value in content.values()):
        seen.add(id(content))
        inner = next((content[name] for name in _WRAPPERS if isinstance(content.get(name), Mapping)), None)
        if not isinstance(inner, Mapping) or id(inner) in seen:
            return {}
        content = inner
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def _fitted(
    network: nn.Module, state: dict[str, Tensor], key: str, path: Path | str
) -> tuple[dict[str, Tensor], list[str]]:
    """The weights under the names of a network, without the prefix that a wrapper has given them; and what is left out.

    Of all prefixes, the one with which most of the network's parameters are found.
    """
    adapt = _filter_of(network)
    expected = set(network.state_dict())
    best: tuple[int, dict[str, Tensor], list[str]] | None = None
    failed: Exception | None = None
    for prefix in _prefixes(state):
        part = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        part = {
            name: value.float() if value.is_floating_point() and value.layout == torch.strided else value
            for name, value in part.items()
        }
        try:
            part = adapt(part, network) if adapt is not None else part
        except Exception as error:
            failed = failed or error
            continue
        count = len(expected & set(part))
        if best is None or count > best[0]:
            best = count, part, [name for name in state if not name.startswith(prefix)]
    if best is None:
        raise UserError(
            f"{key}: expected the weights of {type(network).__name__}, got {path} ({first_line(failed)})"
        ) from failed
    return best[1], best[2]


def _prefixes(state: Mapping[str, Tensor]) -> list[str]:
    """The prefixes of names that are wrappers, the shortest first: `` ``, `module.`, `module.backbone.`."""
    found = {""}
    for name in state:
        prefix = ""
        for part in name.split(".")[:-1]:
            if part not in _WRAPPERS:
                break
            prefix += f"{part}."
            found.add(prefix)
    return sorted(found, key=len)


def _filter_of(network: nn.Module) -> Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]] | None:
    """The conversion of a family's weights in timm: older names, resampled position embeddings."""
    return getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)


def _classifier_names(network: nn.Module) -> list[str]:
    classifier = getattr(network, "pretrained_cfg", {}).get("classifier", ())
    names = [classifier] if isinstance(classifier, str) else list(classifier or ())
    return [*names, "head", "fc", "classifier"]
