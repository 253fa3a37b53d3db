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

from recast_exp.recast.grouping import numbered_blocks

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
    with _evaluating(network):
        return _find(network, images, size)


def _find(network: nn.Module, images: Tensor, size: int) -> Resumable | None:
    order = _order(network, images)
    trained = [_first(network, name, order) for name, each in network.named_parameters() if each.requires_grad]
    random = [order[name] for name, module in network.named_modules() if name in order and _is_random(module)]
    limit = min([*trained, *random], default=len(order))
    blocks = [name for name in numbered_blocks(network) if name in order and order[name] <= limit]
    later = sorted(blocks, key=order.__getitem__)[1:]  # before the first one there is next to nothing to save
    for block in reversed(later):
        found = Resumable(network, block)
        if _is_exact(found, images, size):
            return found
    return None


def _order(network: nn.Module, images: Tensor) -> dict[str, int]:
    """Name of a module → when it first runs."""
    order: dict[str, int] = {}
    names = {module: name for name, module in network.named_modules()}

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        order.setdefault(names[module], len(order))

    with contextlib.ExitStack() as stack:
        for module in names:
            stack.enter_context(_hooked(module, note))
        network(images)
    return order


def _first(network: nn.Module, parameter: str, order: dict[str, int]) -> int:
    """When the innermost module that holds a parameter, and runs at all, first runs."""
    owner = parameter.rpartition(".")[0]
    while owner not in order:
        owner = owner.rpartition(".")[0]
    return order[owner]


def _is_random(module: nn.Module) -> bool:
    """Whether a module draws numbers in training: any kind of dropout, by the names that torch and timm use."""
    chances = (getattr(module, name, 0) for name in ("p", "drop_prob", "prob"))
    return any(isinstance(chance, float) and chance > 0 for chance in chances)


def _is_exact(found: Resumable, images: Tensor, size: int) -> bool:
    """Whether the block's input is all that the rest of the model takes from the images."""
    expected = found.network(images)
    try:
        logits = found.after(found.before(images), size)
    except (RuntimeError, IndexError, TypeError, AttributeError):  # a block with an input of another form
        return False
    if not isinstance(expected, Tensor) or logits.shape != expected.shape:
        return False
    limit = TOLERANCE * max(1.0, float(expected.abs().max()))
    return bool((logits - expected).abs().max() <= limit)


@contextlib.contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode in the block, and the mode that each module had after it."""
    mode = [(module, module.training) for module in network.modules()]
    network.eval()
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
