"""What several test files say often."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

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
