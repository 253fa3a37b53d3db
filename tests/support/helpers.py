"""What several test files say often."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from recast_exp.config.schema import DatasetConfig
from recast_exp.data import load_dataset
from recast_exp.data.types import ImageSet
from recast_exp.errors import RecastError


def load(name: str, data_dir: Path | str = "nowhere", *, verify: bool = False, **options: Any) -> ImageSet:
    return load_dataset(DatasetConfig(name=name, verify=verify, **options), data_dir)


def assert_one_line(error: pytest.ExceptionInfo[RecastError], *expected: object) -> None:
    message = str(error.value)
    assert "\n" not in message
    for text in expected:
        assert str(text) in message


@functools.cache
def rows_know_no_others() -> bool:
    """Whether a row of a matrix product has the same bits whatever rows are beside it.

    So it is on AMD EPYC; on an Intel Xeon with AMX, MKL chooses other ways for other numbers of rows.
    """
    generator = torch.Generator().manual_seed(0)
    for width in (96, 192):
        rows, weight = (torch.randn(count, width, generator=generator) for count in (64, 3 * width))
        whole = functional.linear(rows, weight)
        if not all(torch.equal(functional.linear(rows[:count], weight), whole[:count]) for count in range(1, 64)):
            return False
    return True
