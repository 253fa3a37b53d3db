"""Start a model in the middle: at the first block that trains, from activations that were computed before.

What lies before that block is frozen, so that its output for an image never changes. It is found in the model as it
runs, and nothing is assumed of its code: the modules that run before the block are run for a single blank image, whose
activations are then replaced by those of the batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recast_exp.models.adapted import normalisations_with_statistics
from recast_exp.recast.grouping import numbered_blocks
from recast_exp.torch_state import drawn_from, seeded

TOLERANCE = 1e-4  # of logits, relative to the largest: the sums of a convolution depend on the size of a batch


class _Captured(Exception):  # noqa: N818 - no error: it ends a forward pass
    pass


@dataclass(frozen=True)
class Resumable:
    """A model, and the block at which it can start.

    Attributes:
        network: The model.
        block: Name of the block.
    """

    network: nn.Module
    block: str

    @torch.no_grad()
    def before(self, images: Tensor) -> Tensor:
        """Normalised images [N, 3, H, W] → what goes into the block, [N, ...]; the rest of the model is not run."""
        found: list[Tensor] = []

        def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found.append(inputs[0])
            raise _Captured

        with _hooked(self.network.get_submodule(self.block), note), contextlib.suppress(_Captured):
            self.network(images)
        return found[0]

    def after(self, activations: Tensor, size: int) -> Tensor:
        """What `before` has given, [N, ...] → logits [N, classes], with gradients.

        Args:
            activations: On the model's device.
            size: Height and width of an image.
        """

        def replace(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return activations, *inputs[1:]

        blank = torch.zeros(1, 3, size, size, device=activations.device)
        with _hooked(self.network.get_submodule(self.block), replace):
            logits: Tensor = self.network(blank)
        return logits


@torch.no_grad()
def find(network: nn.Module, size: int) -> Resumable | None:
    """The last block before which nothing trains and nothing is random; None if there is none, or it is the first.

    Args:
        network: A model with numbered blocks, such as timm's. Its parameters that train have `requires_grad`.
        size: Height and width of an image.
    """
    device = next(network.parameters()).device
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    with _modes_kept(network), seeded(0):
        return _find(network, images, size)


def _find(network: nn.Module, images: Tensor, size: int) -> Resumable | None:
    order, fixed = _order(network, images)
    trained = [_first(name, order) for name, each in network.named_parameters() if each.requires_grad]
    limit = min(trained, default=len(order))
    blocks = [name for name in numbered_blocks(network) if name in fixed and order[name] <= limit]
    later = sorted(blocks, key=order.__getitem__)[1:]  # before the first one there is next to nothing to save
    for block in reversed(later):
        found = Resumable(network, block)
        if _is_exact(found, images, size):
            return found
    return None


def _order(network: nn.Module, images: Tensor) -> tuple[dict[str, int], set[str]]:
    """Name of a module → when it first runs in training; and those before which no random number is drawn by then.

    The generators are asked, not the modules: dropout may be a number that a module hands to a function.
    """
    order: dict[str, int] = {}
    fixed: set[str] = set()
    names = {module: name for name, module in network.named_modules()}
    start = drawn_from(images.device)

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if (name := names[module]) in order:
            return
        order[name] = len(order)
        if drawn_from(images.device) == start:
            fixed.add(name)

    _train(network)
    with contextlib.ExitStack() as stack:
        for module in names:
            stack.enter_context(_hooked(module, note))
        network(images)
    return order, fixed


def _first(parameter: str, order: dict[str, int]) -> int:
    """When the innermost module that holds a parameter, and runs at all, first runs."""
    owner = parameter.rpartition(".")[0]
    while owner not in order:
        owner = owner.rpartition(".")[0]
    return order[owner]


def _is_exact(found: Resumable, images: Tensor, size: int) -> bool:
    """Whether the block's input is all that the rest takes from the images, and is in training what it is without."""
    expected = found.network.eval()(images)
    try:
        _train(found.network)
        activations = found.before(images)
        found.network.eval()
        logits = found.after(activations, size)
    except (RuntimeError, IndexError, TypeError, AttributeError):  # a block with an input of another form
        return False
    if not isinstance(expected, Tensor) or logits.shape != expected.shape:
        return False
    limit = TOLERANCE * max(1.0, float(expected.abs().max()))
    return bool((logits - expected).abs().max() <= limit)


def _train(network: nn.Module) -> None:
    """Training mode, in which running statistics stay as they are."""
    network.train()
    for _, module in normalisations_with_statistics(network):
        module.eval()


@contextlib.contextmanager
def _modes_kept(network: nn.Module) -> Iterator[None]:
    """Give each module the mode back, after the block, that it had before it."""
    mode = [(module, module.training) for module in network.modules()]
    try:
        yield
    finally:
        for module, training in mode:
            module.training = training


@contextlib.contextmanager
def _hooked(module: nn.Module, hook: object) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()
