"""The names of methods and runs."""

from __future__ import annotations

from recast_exp.config.schema import ModelConfig
from recast_exp.models.label import run_title, short_name

MODEL = ModelConfig(name="vit_att", backbone="vit_small.augreg")


def test_a_method_by_its_options() -> None:
    assert short_name(MODEL, {"name": "none"}) == "vit_att"
    assert short_name(MODEL, {"name": "melo", "rank": 4}) == "vit_att + melo"


def test_the_title_of_a_run() -> None:
    weights = ModelConfig(name="vit_att", backbone="vit_small.augreg", weights="somewhere/a · b.safetensors")
    title = run_title(weights, {"name": "melo"}, "cub", 7)
    assert title == "vit_att + melo on cub · vit_small with a · b.safetensors · seed 7"
    assert run_title(MODEL, {"name": "none"}, "cub") == "vit_att on cub · vit_small.augreg"
