"""The method: `formulas` is the mathematics, `grouping` chooses layers, `mimicry` makes banks, `inject` puts them in.

Example:
    >>> import timm
    >>> from recast_exp.recast import find_groups, inject, merge, mimic
    >>> model = timm.create_model("vit_tiny_patch16_224")
    >>> banks = mimic(model, find_groups(model, targets=["*.attn.qkv"]))
    >>> _ = model.requires_grad_(False)
    >>> coefficients = inject(model, banks)  # layer → parameter name; train these and a head
    >>> model = merge(model)  # a plain timm model again
"""

from recast_exp.recast.bank import Banks, Origin
from recast_exp.recast.combination import TemplateBank, TemplateCombination
from recast_exp.recast.grouping import Group, find_groups
from recast_exp.recast.inject import inject, merge
from recast_exp.recast.mimicry import mimic, remake

__all__ = [
    "Banks",
    "Group",
    "Origin",
    "TemplateBank",
    "TemplateCombination",
    "find_groups",
    "inject",
    "merge",
    "mimic",
    "remake",
]
