"""scikit-learn's handwritten digits: 1797 real 8x8 scans of 0-9, embedded, so that nothing is downloaded.

The classes are divided into a source part (0-4), on which the embedded backbone is pretrained, and a target part
(5-9), to which it is adapted.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from recast_exp.data.layout import refuse
from recast_exp.data.types import SPLITS, Official, Samples
from recast_exp.errors import UserError

if TYPE_CHECKING:
    from recast_exp.config.schema import DatasetConfig

_PARTS = {"target": range(5, 10), "source": range(5), "all": range(10)}
_FRACTIONS = (0.4, 0.2, 0.4)


def check(cfg: DatasetConfig, data_dir: Path) -> None:
    """Check the options; the data itself comes with scikit-learn.

    Raises:
        UserError: If `cfg.part` is unknown, or an option is set that the digits do not accept.
    """
    refuse(cfg, "part")
    if cfg.part is not None and cfg.part not in _PARTS:
        raise UserError(f"dataset.part: expected one of {', '.join(_PARTS)} for dataset=digits, got {cfg.part!r}")


def read(cfg: DatasetConfig, data_dir: Path) -> Official:
    """Read one part, split by class into 40 % train, 20 % validation and 40 % test.

    Returns:
        Images of 8x8 pixels with three equal channels.
    """
    import numpy as np
    from sklearn.datasets import load_digits

    from recast_exp.data.protocol import split_by_class

    digits = _PARTS[cfg.part or "target"]
    data = load_digits()
    selected = np.isin(data.target, digits)
    gray = np.round(data.images[selected] * (255 / 16)).astype(np.uint8)  # the scans have 17 levels of gray
    samples = Samples(
        np.repeat(gray[..., None], 3, axis=3),
        (data.target[selected] - digits[0]).astype(np.int64),
    )
    classes = tuple(str(digit) for digit in digits)
    parts = split_by_class(samples.labels, _FRACTIONS, cfg.split_seed, classes)
    return Official(classes, {split: samples.select(part) for split, part in zip(SPLITS, parts, strict=True)})
