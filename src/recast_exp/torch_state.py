"""State that a block changes and that is put back: torch's generators and threads, and the modules of a network."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the generators of torch, NumPy and Python in the block, and put them back as they were after it.

    Args:
        seed: From 0 to 2³² - 1.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - libraries draw from it
    with torch.random.fork_rng(devices=devices):
        try:
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            torch.manual_seed(seed)
            yield
        finally:
            random.setstate(state)
            np.random.set_state(numpy_state)  # noqa: NPY002


def drawn_from(device: torch.device) -> tuple[object, ...]:
    """What is another value once a number is drawn: the state of the generators of torch, NumPy and Python.

    Args:
        device: The one whose generator of torch it is about, beside that of the CPU.
    """
    own = torch.get_device_module(device).get_rng_state() if device.type != "cpu" else torch.empty(0)
    _, keys, *place = np.random.get_state()  # noqa: NPY002 - libraries draw from it
    states = (torch.get_rng_state().numpy(), own.numpy(), np.asarray(keys))
    return *(state.tobytes() for state in states), *place, random.getstate()


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch compute on `count` threads in the block, and on as many as before after it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch, and the linear algebra of NumPy, SciPy and scikit-learn, compute on one thread in the block.

    For small problems that alternate between them: the threads of one library wait actively for work, and take the
    cores from the other.
    """
    from threadpoolctl import threadpool_limits  # imports nothing heavy, but is not needed by most commands

    with threads(1), threadpool_limits(1):
        yield


@contextlib.contextmanager
def undone_on_failure(network: nn.Module) -> Iterator[None]:
    """Give a network back the modules, parameters, hooks and attributes that it had, if the block fails.

    The values of parameters are not kept.
    """
    saved = []
    for module in network.modules():
        attributes = dict(vars(module))
        # Changed in place: the handles of hooks know their dictionaries
        inner = [(each, each.copy()) for each in attributes.values() if isinstance(each, dict | set)]
        saved.append((module, type(module), attributes, inner))
    flags = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    try:
        yield
    except BaseException:
        for module, kind, attributes, inner in saved:
            module.__class__ = kind  # a parametrised layer has a class of its own
            for container, content in inner:
                container.clear()
                container.update(content)
            vars(module).clear()
            vars(module).update(attributes)
        for parameter, trains in flags:
            parameter.requires_grad_(trains)
        raise
