"""Adapters: a second method on the backbone, next to RECAST or instead of it.

Each adapter is one module with one dataclass that derives from `Adapter`: its fields are its options. The module's name
is the option of the config group `adapter`, with a preset under `conf/adapter/`; other packages add theirs through an
entry point (see `recast_exp.plugins`). Nothing is registered anywhere else.

Example:
    >>> import timm
    >>> from recast_exp.adapters import inject_adapter
    >>> from recast_exp.adapters.melo import MeLo
    >>> network = timm.create_model("vit_tiny_patch16_224").requires_grad_(False)
    >>> trained = inject_adapter(network, MeLo(rank=2))  # public name → name of a parameter that trains
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from recast_exp import errors
from recast_exp.adapters._base import (
    INJECTED,
    NORMS,
    Adapter,
    attach,
    backbone_modules,
    detach,
    own_parameters,
    parametrize_weight,
)
from recast_exp.adapters._classes import hooks_of, take_back, tell_apart
from recast_exp.adapters.none import NoAdapter
from recast_exp.errors import RecastError, UnfitError, UserError, check_integer, check_type, one_line
from recast_exp.plugins import ADAPTERS
from recast_exp.recast.inject import check_one_task
from recast_exp.torch_state import seeded, undone_on_failure

__all__ = [
    "NORMS",
    "Adapter",
    "Injected",
    "NoAdapter",
    "attach",
    "backbone_modules",
    "check_adapter",
    "detach",
    "fitting",
    "fixed_of",
    "from_config",
    "inject_adapter",
    "injected",
    "load",
    "merge",
    "named_tensors",
    "names",
    "own_parameters",
    "parametrize_weight",
]

log = logging.getLogger(__name__)

_OTHER_SEED = 2**31 - 1  # to find out what of an adapter is random; no seed that anyone would choose


@dataclasses.dataclass(frozen=True)
class Injected:
    """An adapter that `inject_adapter` has put into a network.

    Attributes:
        adapter: The adapter with its options: a copy, which belongs to this network alone.
        trained: Public name → parameter name, as `inject_adapter` returned it.
        added: Names of those among these parameters that are not the network's own.
        fixed: Names of the tensors that it has brought, that do not train and that a task file has to hold.
    """

    adapter: Adapter
    trained: dict[str, str]
    added: frozenset[str]
    fixed: tuple[str, ...] = ()


def names() -> list[str]:
    """The names of all adapters, sorted."""
    return ADAPTERS.names()


def load(name: str) -> type[Adapter]:
    """The class of an adapter.

    Raises:
        UnknownNameError: If there is no adapter of that name.
        UserError: If the module of an entry point cannot be imported, or a module does not hold exactly one adapter.
    """
    module = ADAPTERS.load(name)
    classes = {
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Adapter) and value.__module__ == module.__name__
    }
    if len(classes) != 1:
        listed = ", ".join(sorted(found.__name__ for found in classes)) or "none"
        raise UserError(f"name: expected one class that derives from Adapter in {module.__name__}, got {listed}")
    (adapter_class,) = classes
    if "__dataclass_fields__" not in vars(adapter_class):
        raise UserError(f"name: expected {module.__name__}.{adapter_class.__name__} to be a dataclass; add @dataclass")
    for field in dataclasses.fields(adapter_class):
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(
                f"name: expected a default for each option of {module.__name__}.{adapter_class.__name__}, got none for "
                f"{field.name}"
            )
    return adapter_class


def from_config(node: Mapping[str, object]) -> Adapter:
    """The adapter of a configuration.

    Args:
        node: The `adapter` node: `name`, and the options that differ from their defaults.

    Raises:
        UserError: If there is no such adapter, or an option is unknown, of a wrong type or out of range. One line that
            begins with the key (`adapter.rank: …`).
    """
    options = {str(option): value for option, value in node.items()}
    name = str(options.pop("name", ""))
    with errors.section("adapter."):
        adapter_class = load(name)
        accepted = [field.name for field in dataclasses.fields(adapter_class)]
        for option in options:
            if option not in accepted:
                raise UserError(f"{option}: unknown option; adapter={name} takes {', '.join(accepted) or 'no options'}")
        return adapter_class(**options)


@torch.inference_mode(False)  # whatever the caller's mode, so that the adapter can train
def inject_adapter(network: nn.Module, adapter: Adapter, *, seed: int | None = 42) -> dict[str, str]:
    """Add an adapter to a network, in place; its output stays the same until the adapter is trained.

    The adapter's parameters train afterwards; every other parameter keeps its `requires_grad`. A network takes one
    adapter.

    Args:
        network: A timm model, with RECAST's templates or without.
        adapter: The adapter with its options: `MeLo(rank=4)`. The network keeps a copy (`injected`), which later
            changes of this one leave alone.
        seed: Seed of the adapter's first values, from 0 to 2³² - 1. The generators of torch, NumPy and Python stay as
            they are. None takes the values from these generators instead, and advances them.

    Returns:
        Public name → parameter name, of the parameters that train.

    Raises:
        UnfitError: If the adapter finds no layer to change in the network.
        UserError: If the network has an adapter already or is a `RecastModel`, the seed is out of range, or the library
            of the adapter is not installed or refuses the network. The network is unchanged then.

    Example:
        >>> import timm
        >>> from recast_exp import MeLo, inject_adapter
        >>> model = timm.create_model("vit_tiny_patch16_224").requires_grad_(False)
        >>> trained = inject_adapter(model, MeLo(rank=4))
        >>> trained["blocks.0.attn.qkv.melo.a"]
        'blocks.0.attn.qkv.melo.a'
    """
    check_type("network", network, nn.Module, "a timm model")
    if not isinstance(adapter, Adapter):
        raise UserError(f"adapter: expected an adapter, such as MeLo(rank=4), got {adapter!r}")
    check_one_task("network", network)
    if seed is not None:
        check_integer("seed", seed, 0, 2**32)
    if not isinstance(adapter, NoAdapter) and (there := injected(network)):
        # Two of a kind would hide each other's parameters; two kinds would be merged in another order than they compute
        name = there[0].adapter.name
        raise UserError(
            f"adapter: expected a network without {name}, got one that has it; merge it, or take a new network"
        )
    before = dict(network.named_parameters())
    known = {id(tensor) for _, tensor in named_tensors(network)}
    plain = copy.deepcopy(network) if adapter.keeps_fixed else None
    flags = {name: parameter.requires_grad for name, parameter in before.items()}
    hooks = hooks_of(network)
    with undone_on_failure(network):
        with contextlib.nullcontext() if seed is None else seeded(seed):
            trained = adapter.inject(network)
        if not trained and not isinstance(adapter, NoAdapter):
            raise UnfitError(f"adapter: {adapter.name} does not fit {type(network).__name__}; it needs {adapter.fits}")
    for name, parameter in before.items():  # peft freezes all but its own
        parameter.requires_grad_(flags[name])
    for path in trained.values():
        network.get_parameter(path).requires_grad_(True)
    if trained:
        fixed = () if plain is None else _fixed(network, plain, adapter, known)
        record = Injected(copy.deepcopy(adapter), dict(trained), frozenset(trained.values()) - before.keys(), fixed)
        tell_apart(network, hooks, repr(adapter))
        vars(network)[INJECTED] = [*injected(network), record]
    return trained


def _fixed(network: nn.Module, plain: nn.Module, adapter: Adapter, known: set[int]) -> tuple[str, ...]:
    """What an adapter has brought that does not train but differs from one injection to another.

    Left out is what is the same for other random numbers and other weights, such as indices.

    Args:
        network: The network with the adapter.
        plain: A copy without, whose weights this function overwrites.
        adapter: The adapter.
        known: `id` of each parameter and buffer that the network had before.
    """
    brought = {
        name: tensor
        for name, tensor in named_tensors(network)
        if id(tensor) not in known and not tensor.requires_grad and tensor.numel()
    }
    if not brought or any(tensor.is_meta for tensor in brought.values()):
        return tuple(brought)
    with seeded(_OTHER_SEED), torch.no_grad():
        for parameter in plain.parameters():
            parameter.normal_()
        adapter.inject(plain)
    others = dict(named_tensors(plain))
    return tuple(name for name, tensor in brought.items() if not torch.equal(tensor, others[name]))


def named_tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names of the parameters and buffers of a network with what they name, each once."""
    yield from network.named_parameters()
    yield from network.named_buffers()


def fixed_of(network: nn.Module) -> dict[str, str]:
    """Public name → name, of what the adapters in a network keep fixed and a task file has to hold."""
    return {name: name for record in injected(network) for name in record.fixed}


def injected(network: nn.Module) -> list[Injected]:
    """The adapters that `inject_adapter` has put into a network, one at most; after `merge`, those that stay."""
    return list(vars(network).get(INJECTED, ()))


def check_adapter(create: Callable[[str], nn.Module], adapter: Adapter) -> None:
    """Check that an adapter fits a network, and adds no more parameters than it has.

    Args:
        create: Creates the network on the device of this name, with a classifier.
        adapter: The adapter.

    Raises:
        UnfitError: If it does not fit; one line that names the adapters that do.
        UserError: If it adds too many.
    """
    if isinstance(adapter, NoAdapter):
        return
    network = create("meta")
    size = sum(parameter.numel() for parameter in network.parameters())
    endless = False
    try:
        try:
            with torch.device("meta"):  # what an adapter adds takes no memory either
                inject_adapter(network, adapter)
        except Exception as error:  # a few of peft's methods compute with the weights
            endless = "overflow" in str(error)  # torch's word for a size of more than 64 bits
            if not endless:
                log.debug("%s cannot be injected on the meta device (%s); values are needed", adapter.name, error)
                network = create("cpu")
                inject_adapter(network, adapter)
    except RecastError as error:
        if not str(error).startswith("adapter"):  # an option: another adapter is no way out
            raise UnfitError(*(f"adapter.{line}" for line in error.lines)) from None
        raise UnfitError(f"{error}; choose one of {', '.join(fitting(lambda: create('meta')))}") from None
    added = sum(parameter.numel() for parameter in network.parameters()) - size
    if endless or added > size:
        raise UserError(
            f"adapter: expected at most the {size:,} parameters of the backbone, got "
            f"{'more than any machine holds' if endless else f'{added:,}'} with "
            f"{', '.join(f'{name}={value}' for name, value in vars(adapter).items())}"
        )


def fitting(create: Callable[[], nn.Module]) -> list[str]:
    """The names of the adapters that fit a network with their default options; "none" is always one of them.

    Args:
        create: Creates the network, with a classifier or without; on the meta device, this is cheap.
    """

    def fits(name: str) -> bool:
        try:
            adapter = load(name)()
            return isinstance(adapter, NoAdapter) or bool(adapter.inject(create()))
        except RecastError:  # the adapter needs a library that is not installed
            return False
        except Exception as error:  # of somebody else's code
            log.warning("adapter: %s is left out: it raises %s: %s", name, type(error).__name__, one_line(error))
            return False

    return [name for name in names() if fits(name)]


@torch.no_grad()
def merge(network: nn.Module) -> nn.Module:
    """Make adapters a part of the weights where possible, in place.

    RECAST's own `merge` comes first; `recast_exp.merge` calls both.

    Returns:
        The same network. Adapters without weights that could take their place stay in it as modules: `injected` lists
        them afterwards.

    Raises:
        UserError: If there is an adapter of peft that cannot be merged, or the network is a `RecastModel`.
    """
    check_one_task("network", network)
    for name in names():
        try:
            adapter = load(name)
        except RecastError:  # one that cannot be imported is not in the network either
            continue
        adapter.merge(network)
    left = {name for name, _ in network.named_parameters()}
    staying = [
        found
        for found in injected(network)
        if found.added and (type(found.adapter).merge is Adapter.merge or not left.isdisjoint(found.added))
    ]
    if staying:
        vars(network)[INJECTED] = staying
    else:
        vars(network).pop(INJECTED, None)
    take_back(network)
    return network
