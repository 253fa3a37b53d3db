"""Which settings differ between two runs, perhaps of two versions."""

from __future__ import annotations

from recast_exp.config import keys, presets


def test_an_option_that_an_earlier_version_did_not_have_is_no_difference() -> None:
    before = {"adapter": {"name": "melo", "rank": 4, "alpha": 4.0}}
    now = {"adapter": dict(presets.options_of("adapter", "melo"))}
    assert now["adapter"]["init"] == "random"
    assert not keys.differences(before, now)
    assert keys.differences(before, {"adapter": {**now["adapter"], "init": "eva"}}).keys() == {"adapter"}
    assert keys.differences({"adapter": {"name": "melo", "rank": 2}}, now).keys() == {"adapter"}
    foreign = {"adapter": {"name": "../../nowhere", "x": 1}}
    assert keys.differences(foreign, {"adapter": {"name": "../../nowhere"}}).keys() == {"adapter"}
