"""The steps of a program after training: merge a model into plain weights, or save its task to a file.

`recast_exp` offers them under its own name. A task file holds what a task has trained (coefficients, adapter, head) and
the running statistics of BatchNorm layers, so it belongs to one backbone and one template bank. A bank of the closed
form is made again from the pretrained weights; one of another solver lies next to the file, once for all tasks that
share it.
"""

from __future__ import annotations

import dataclasses
import logging
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import TypedDict

import torch
from torch import nn

from recast_exp import adapters
from recast_exp.adapters import Adapter, NoAdapter
from recast_exp.config.schema import ModelConfig
from recast_exp.data.preprocessing import InputSpec
from recast_exp.errors import UserError, check_type
from recast_exp.files import user_path, writing
from recast_exp.models import task_file
from recast_exp.models.adapted import AdaptedModel, head_parameters, running_statistics
from recast_exp.models.computation import differences, stock
from recast_exp.models.create import input_of
from recast_exp.models.loading import check_timm, ungrouped_fingerprint
from recast_exp.models.timm_model import timm_model
from recast_exp.models.weights import content_hash
from recast_exp.recast import Banks, TemplateCombination
from recast_exp.recast import merge as merge_templates
from recast_exp.runs.task_header import UNGROUPED

log = logging.getLogger(__name__)


def merge(model: nn.Module) -> nn.Module:
    """Make RECAST's combinations, then the adapters, part of the weights, in place.

    The result is a stock timm model: its state dict loads strictly into one of `timm.create_model`. The modules of
    AdaptFormer, CLR, FiLM and Growth cannot become weights, nor can those of SSF where a layer applies an activation to
    its output or standardises its weight (EfficientNet, ResNetV2). They stay in the model, which computes the same; a
    warning names them.

    Args:
        model: A model that `inject`, `inject_adapter`, both or neither have changed.

    Returns:
        The same model; its logits differ only by rounding.

    Raises:
        UserError: If it is no model, is a `RecastModel`, whose own `merge` takes the name of a task, or has an adapter
            of peft that cannot be merged.

    Example:
        >>> import timm
        >>> from recast_exp import MeLo, find_groups, inject, inject_adapter, merge, mimic
        >>> model = timm.create_model("vit_tiny_patch16_224")
        >>> names = set(model.state_dict())
        >>> _ = inject(model, mimic(model, find_groups(model, targets=["*.attn.qkv"])))
        >>> _ = inject_adapter(model, MeLo(rank=4))
        >>> set(merge(model).state_dict()) == names
        True
    """
    adapters.merge(merge_templates(model))
    for injected in adapters.injected(model):
        log.warning(
            "merge: %s cannot become part of the weights; its modules stay in the model", injected.adapter.label
        )
    return model


def save_task(
    model: nn.Module, path: str | Path, *, banks: Banks | None = None, classes: Sequence[str] | None = None
) -> Path:
    """Save what a task has trained in a timm model: coefficients, adapter, head, and BatchNorm's running statistics.

    Args:
        model: The model after training, not merged.
        path: The task file, a safetensors file; an old one is replaced.
        banks: The banks that were injected. Those that cannot be made again from the weights, as they are not of the
            closed form, are saved next to the task file as `HASH.safetensors`, unless that file exists.
        classes: Names of the classes, in the order of the logits; None numbers them.

    Returns:
        `path`.

    Raises:
        UserError: If the banks are not those in the model, the model was converted to another dtype after `inject`, the
            classes do not fit its head, or parameters train that belong to neither coefficients, adapter nor head.

    Example:
        >>> import tempfile, timm
        >>> from recast_exp import find_groups, inject, load_task, mimic, save_task
        >>> model = timm.create_model("vit_tiny_patch16_224", num_classes=2).requires_grad_(False)
        >>> banks = mimic(model, find_groups(model, targets=["*.attn.qkv"]))
        >>> _ = inject(model, banks)
        >>> folder = tempfile.mkdtemp()
        >>> load_task(save_task(model, f"{folder}/pets.safetensors", banks=banks, classes=["cat", "dog"])).classes
        ('cat', 'dog')
    """
    path = user_path(path)
    adapted = _task_of(model, banks)
    num_classes = timm_model(model).num_classes
    names = class_names(range(num_classes) if classes is None else classes)
    if len(names) != num_classes:
        raise UserError(f"classes: expected {num_classes} names, one for each logit, got {len(names)}")
    settings = described(model)
    brought = [path for kind in ("head", "adapter") for path in adapted.trainable[kind].values()]
    brought += adapted.fixed.values()
    fingerprint = _pretrained(adapted, settings, brought) or f"{UNGROUPED}{ungrouped_fingerprint(adapted)}"
    more = computation_of(model, settings, brought)
    write(path, adapted, settings, names, input_of(model, settings), fingerprint, more)
    return path


def _pretrained(adapted: AdaptedModel, settings: ModelConfig, brought: Collection[str]) -> str | None:
    """The fingerprint of the pretrained weights, by which any model knows them; None where they are not all there.

    Templates, running statistics and adapters that train weights of the backbone take their place.
    """
    plain = stock(settings)
    if adapted.banks is not None or adapted.buffers or plain is None:
        return None
    left = {_plain_name(name): value for name, value in adapted.network.state_dict().items() if name not in brought}
    return content_hash(left) if left.keys() == plain.state_dict().keys() else None


def _plain_name(name: str) -> str:
    """The name of a weight of the backbone, where an adapter has put a module around its layer, or computes it."""
    return name.replace(".parametrizations.weight.original", ".weight").replace(".base_layer.", ".")


def class_names(classes: object) -> list[str]:
    """Names of classes, from strings or numbers.

    Raises:
        UserError: If they are something else, have no order, or two are one name.
    """
    if isinstance(classes, str | bytes | set | frozenset) or not isinstance(classes, Iterable):
        raise UserError(f"classes: expected a list of their names, got {type(classes).__name__}: {classes!r:.60}")
    names = list(classes)
    if wrong := [name for name in names if isinstance(name, bool) or not isinstance(name, str | int)]:
        raise UserError(f"classes: expected strings, got {wrong[0]!r:.60}")
    names = [str(name) for name in names]
    check_classes(names)
    return names


def check_classes(names: Sequence[str]) -> None:
    """Refuse two classes of one name, however it is written, and what is no text.

    Raises:
        UserError: One line.
    """
    seen: dict[str, str] = {}
    for name in names:
        if not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name):
            raise UserError(f"classes: expected text, got {name!r}")
        if (other := seen.get(plain := unicodedata.normalize("NFC", name))) is not None:
            ways = "" if other == name else ", written in two ways"
            raise UserError(f"classes: expected different names, got {name!r} twice{ways}")
        seen[plain] = name


def write(
    path: Path,
    adapted: AdaptedModel,
    settings: ModelConfig,
    classes: Sequence[str],
    spec: InputSpec,
    weights: str,
    more: Mapping[str, object] = MappingProxyType({}),
) -> None:
    """Write the task file of a model, and its banks next to it as `HASH.safetensors` where they cannot be made again.

    Args:
        path: The task file; an old one is replaced.
        adapted: The model.
        settings: Name, input and arguments of the backbone.
        classes: Names of the classes, in the order of the logits.
        spec: The images that the model expects.
        weights: The fingerprint of the weights that the task was trained on.
        more: Further entries of the record, such as `computation_of`.

    Raises:
        UserError: If two classes have one name.
    """
    check_classes(classes)
    banks = adapted.banks
    model = {
        **{name: getattr(settings, name) for name in ("backbone", "img_size", "mean", "std", "arguments")},
        "method": "frozen" if banks is None else "recast",
        "batchnorm_statistics": "update" if adapted.updates_trunk else "frozen",
    }
    usual = ModelConfig()
    record = task_file.make_record(
        adapted,
        {
            "model": {name: value for name, value in model.items() if value != getattr(usual, name)},
            "adapter": {"name": adapted.adapter.name, **dataclasses.asdict(adapted.adapter)},
        },
        backbone={"name": settings.backbone, "fingerprint": weights},
        classes=list(classes),
        input=task_file.input_record(spec),
        eval_batch_size=256,  # in which the command line would repeat a test
        **more,
    )
    with writing(path):
        if banks is not None and not (banks.origin and banks.origin.repeatable):
            bank_file = path.parent / f"{banks.hash}.safetensors"
            if not has_bank(bank_file, banks):
                banks.save(bank_file)
        task_file.write_task(path, adapted, record)


def computation_of(network: nn.Module, settings: ModelConfig, brought: Collection[str] = ()) -> dict[str, object]:
    """The entry of a record that says what a network computes otherwise than timm's of the same name.

    Args:
        network: The network.
        settings: Name, input size and arguments of the backbone.
        brought: Names of the parameters of its classifier and its adapter.
    """
    plain = stock(settings)
    return {} if plain is None else {"computation": differences(plain, network, brought)}


def has_bank(path: Path, banks: Banks) -> bool:
    """Whether a file holds these banks, undamaged."""
    try:
        return path.is_file() and Banks.load(path, banks.hash).hash == banks.hash
    except UserError:
        return False


def _task_of(model: nn.Module, banks: Banks | None) -> AdaptedModel:
    """What belongs to the task in a model, found in the model itself."""
    check_timm(model)
    check_type("banks", banks, (Banks, NoneType), "those that were injected, or None")
    injected = adapters.injected(model)
    adapter: Adapter = injected[0].adapter if injected else NoAdapter()
    trainable = {
        "head": head_parameters(model),
        "coefficients": _coefficients(model, banks),
        "adapter": dict(injected[0].trained) if injected else {},
    }
    fixed = adapters.fixed_of(model)
    adapted = AdaptedModel(model, trainable, running_statistics(model), banks, adapter, fixed=fixed)
    of_task = {id(parameter) for kind in trainable for _, parameter in adapted.parameters(kind)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in of_task:
            raise UserError(
                f"model: expected only coefficients, adapter and head to train, got {name}, which trains too; a task "
                "file does not hold it. Call model.requires_grad_(False) before inject and train again"
            )
    return adapted


def _coefficients(model: nn.Module, banks: Banks | None) -> dict[str, str]:
    """Layer → name of its coefficients.

    Raises:
        UserError: If these banks are not all that was injected.
    """
    coefficients: dict[str, str] = {}
    layers = list(banks.coefficients) if banks else []
    templates = (
        {layer: banks.templates[group.name] for group in banks.groups for layer in group.layers} if banks else {}
    )
    for path, module in model.named_modules():
        if isinstance(module, TemplateCombination):
            weight = path.rpartition(".")[0]  # LAYER.parametrizations.weight, and peft may have moved the layer
            layer = next((layer for layer in layers if weight.startswith(f"{layer}.")), "")
            if (own := model.get_parameter(f"{weight}.original")).dtype != torch.float32:
                raise UserError(
                    f"model: expected float32 coefficients, as inject makes them, got {own.dtype}: the weights that "
                    "the task belongs to were converted after inject. Convert a model before mimic; one that is "
                    "float64 now can be saved after model.float()"
                )
            if not (banks and layer) or not torch.equal(module.bank.values().detach().cpu().float(), templates[layer]):
                # A model that was converted to half precision and back has rounded ones
                got = "others; convert a model before mimic, not after inject" if banks else "None"
                raise UserError(
                    "banks: expected the Banks that were injected into the model, with the templates of "
                    f"{weight.partition('.parametrizations')[0]}, got {got}"
                )
            coefficients[layer] = f"{weight}.original"
    if missing := [layer for layer in layers if layer not in coefficients]:
        raise UserError(f"banks: expected banks that were injected into the model, got others: {missing[0]} has none")
    return {layer: coefficients[layer] for layer in layers}


class _Described(TypedDict, total=False):
    """What is used of timm's record of a model."""

    architecture: str
    tag: str


def described(model: nn.Module) -> ModelConfig:
    """What a task file says of the backbone: its timm name, and the input size where it is not the weights' own."""
    config: _Described = getattr(model, "pretrained_cfg", None) or _Described()
    name, tag = config.get("architecture") or type(model).__name__, config.get("tag")
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    height = size[0] if isinstance(size, tuple) else size
    return ModelConfig(backbone=f"{name}.{tag}" if tag else name, img_size=height)
