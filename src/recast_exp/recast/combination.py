"""The modules that make weights in a model: the templates of a group, and the parametrisation of a layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import NoneType

import torch
from torch import Tensor, nn

from recast_exp.errors import UserError, check_type
from recast_exp.recast.formulas import combine, combine_factors, project, unrounded


class TemplateBank(nn.Module):
    """The frozen templates that the layers of one group share.

    Args:
        templates: [n, rows, ...], or factors [r, L · rows + columns]; float32, bfloat16 or int8.
        mixing: How coefficients and templates make a weight, one of the `MIXINGS` of their kind.
        scales: Of templates that are integers.

    Raises:
        UserError: If one of them is no tensor.
    """

    def __init__(self, templates: Tensor, mixing: str = "sum", scales: Tensor | None = None) -> None:
        super().__init__()
        check_type("templates", templates, Tensor, "a tensor [n, rows, ...]")
        check_type("scales", scales, (Tensor, NoneType), "a tensor or None")
        self.templates = nn.Parameter(templates, requires_grad=False)
        self.mixing = mixing
        self.scales: Tensor | None
        self.register_buffer("scales", scales)

    def values(self) -> Tensor:
        """The templates as they are computed with: float32, or of the dtype of the model."""
        return unrounded(self.templates, self.scales)

    def combine(self, coefficients: Tensor, index: int, shape: Sequence[int]) -> Tensor:
        """What coefficients [K, B, n] make of the templates: a weight, or its change, of the templates' dtype.

        Args:
            coefficients: Those of one layer.
            index: Its place in the group.
            shape: Shape of its weight.
        """
        if self.mixing == "sum":
            return combine(coefficients, self.values())
        return combine_factors(coefficients, self.values(), index, shape, self.mixing)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TemplateBank:
        """Templates of convolutions are converted as weights [rows, ...] are: channels_last takes four dimensions."""

        def convert(tensor: Tensor) -> Tensor:
            if tensor.dim() != 5:
                return fn(tensor)
            return fn(tensor.flatten(0, 1)).reshape(tensor.shape).contiguous()

        super()._apply(convert, recurse)  # type: ignore[no-untyped-call]
        return self


class TemplateCombination(nn.Module):
    """Parametrisation of a weight by its coefficients: `original` *is* the coefficients [K, B, n].

    The reference to the bank is not registered here: the bank is registered once, at the model, and appears once in
    the state dict however many layers share it.

    Args:
        bank: The templates.
        start: Coefficients [K, B, n] with which the weight is the pretrained one.
        index: Place of the layer in the group.
        weight: The pretrained weight [rows, ...].
        added: Whether the templates are added to it. It is a frozen parameter, `base`, then.
    """

    def __init__(self, bank: TemplateBank, start: Tensor, index: int, weight: Tensor, added: bool) -> None:
        super().__init__()
        self._bank = (bank,)
        own = start.to(weight.device, torch.float32)
        self._start: Tensor | None = own.clone(memory_format=torch.contiguous_format)
        self.index = index
        self.num_sets, self.num_blocks, self.num_coefficients = start.shape
        self.shape = tuple(weight.shape)
        # Follows the model: `model.half()` changes it, as it changes the templates
        self.dtype = weight.dtype
        self.base = nn.Parameter(weight.detach(), requires_grad=False) if added else None

    @property
    def bank(self) -> TemplateBank:
        """The templates."""
        return self._bank[0]

    def forward(self, coefficients: Tensor) -> Tensor:
        """Rebuild the weight [rows, ...] from coefficients [K, B, n]."""
        if self.base is None:
            return self.bank.combine(coefficients, self.index, self.shape).to(self.dtype)
        with torch.autocast(self.base.device.type, enabled=False):  # a change is small: all its digits count
            change = self.bank.combine(coefficients, self.index, self.shape)
            return (self.base.to(change.dtype) + change).to(self.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The coefficients [K, B, n] whose weight is nearest to an assigned one [rows, ...], by least squares.

        On registration, it is those with which the layer starts.

        Raises:
            UserError: If the templates are of rank one, which can make few weights.
        """
        if self._start is not None:
            start, self._start = self._start, None
            return start
        if self.bank.mixing != "sum":
            raise UserError(
                f"weight: a layer with mixing={self.bank.mixing} takes none of another model; merge the model first"
            )
        templates = self.bank.values()
        target = weight.to(templates.dtype)
        if self.base is not None:
            target = target - self.base.to(templates.dtype)
        return project(target, templates, self.num_sets, self.num_blocks)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TemplateCombination:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self
