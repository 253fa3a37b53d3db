"""Last block: train the last block and the normalisation layers after it, the classical partial fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from recast_exp.adapters._base import NORMS, Adapter, backbone_modules


@dataclass
class LastBlock(Adapter):
    """Trains the last block and the normalisation layers after it; it has no options."""

    fits = "blocks in a list, as in timm's ViTs, ResNets and ConvNeXts"
    label = "last block"

    def inject(self, network: nn.Module) -> dict[str, str]:
        """Name the parameters of the last block and of the normalisation layers after it.

        Weights that are combinations of templates are left out.
        """
        modules = dict(backbone_modules(network))
        blocks = [path for path in modules if path.rpartition(".")[2].isdigit() and not _is_inside_block(path, modules)]
        if not blocks:
            return {}
        last, behind = blocks[-1], list(modules)[list(modules).index(blocks[-1]) :]
        chosen = [path for path in behind if path.startswith(f"{last}.") or path == last]
        chosen += [path for path in behind if path not in chosen and isinstance(modules[path], NORMS)]
        names = [f"{path}.{name}" for path in chosen for name, _ in modules[path].named_parameters(recurse=False)]
        return {name: name for name in names}


def _is_inside_block(path: str, modules: dict[str, nn.Module]) -> bool:
    """Whether a parent of a numbered module is a block itself: numbered, with other than numbered children."""
    parents = path.split(".")
    for length in range(1, len(parents)):
        parent = ".".join(parents[:length])
        if parent.rpartition(".")[2].isdigit() and not all(
            name.isdigit() or name in ("blocks", "downsample") for name, _ in modules[parent].named_children()
        ):
            return True
    return False
