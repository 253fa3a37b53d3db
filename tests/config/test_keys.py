"""Which settings differ between two runs, perhaps of two versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from recast_exp.config import keys, presets
from recast_exp.runs import adopt


def test_an_option_that_an_earlier_version_did_not_have_is_no_difference() -> None:
    before = {"adapter": {"name": "melo", "rank": 4, "alpha": 4.0}}
    now = {"adapter": dict(presets.options_of("adapter", "melo"))}
    assert now["adapter"]["init"] == "random"
    assert not keys.differences(before, now)
    assert keys.differences(before, {"adapter": {**now["adapter"], "init": "eva"}}).keys() == {"adapter"}
    assert keys.differences({"adapter": {"name": "melo", "rank": 2}}, now).keys() == {"adapter"}
    foreign = {"adapter": {"name": "../../nowhere", "x": 1}}
    assert keys.differences(foreign, {"adapter": {"name": "../../nowhere"}}).keys() == {"adapter"}


def test_an_old_task_file_and_the_preset_of_today_agree(tmp_path: Path) -> None:
    record = {"config": {"adapter": {"name": "melo", "rank": 4, "alpha": 4.0}}}
    asked = {"adapter": dict(presets.options_of("adapter", "melo"))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adopt, "recorded", lambda *_, **__: record["config"])
        chosen = {"adapter": ("melo", asked)}
        assert not list(adopt.contradictions(asked, tmp_path, (), chosen))
        other = {"adapter": asked["adapter"] | {"rank": 2}}
        assert list(adopt.contradictions(other, tmp_path, ("adapter.rank",), {"adapter": ("melo", other)}))
