"""Composition without Hydra's copies makes what Hydra makes: for every option, and for pairs of the paper's grid."""

from __future__ import annotations

from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from recast_exp.config import grammar
from recast_exp.config.compose import Composer, conf_dir
from recast_exp.errors import UserError

COMPOSER = Composer()
OPTIONS = {
    group: [option for option in options if option not in ("null", "ray")]  # whose launcher has its own environment
    for group, options in COMPOSER.groups().items()
    if not group.startswith("hydra")
}


def mixtures() -> list[tuple[str, ...]]:
    """Choices in which each option of each group comes up."""
    number = max(map(len, OPTIONS.values()))
    chosen = ([f"{group}={options[at % len(options)]}" for group, options in OPTIONS.items()] for at in range(number))
    return [tuple(grammar.rewrite(texts, multirun=False)) for texts in chosen]


def plain(cfg: DictConfig) -> dict[str, Any]:
    content = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(content, dict)
    return {str(name): value for name, value in content.items() if name != "hydra"}


def paper() -> list[tuple[str, ...]]:
    params = OmegaConf.load(conf_dir() / "experiment" / "paper.yaml").hydra.sweeper.params
    methods, datasets = ([text.strip() for text in params[key].split(",")] for key in ("method", "dataset"))
    pairs = [(method, dataset) for method in methods for dataset in datasets]
    return [("experiment=paper", f"method={method}", f"dataset={dataset}") for method, dataset in pairs[::9]]


def as_hydra(*choices: str) -> None:
    composed, whole = COMPOSER.compose(choices), COMPOSER.whole(choices)
    assert plain(composed.cfg) == plain(whole)
    assert composed.choices == dict(whole.hydra.runtime.choices)


@pytest.mark.parametrize("choices", mixtures(), ids=str)
def test_every_option_is_composed_as_by_hydra(choices: tuple[str, ...]) -> None:
    as_hydra(*choices)


def test_pairs_of_the_papers_grid_are_composed_as_by_hydra() -> None:
    pairs = paper()
    assert len(pairs) >= 12
    for choices in pairs:
        as_hydra(*choices)


def test_what_cannot_be_composed_is_explained_by_hydra() -> None:
    with pytest.raises(UserError, match="nope"):
        COMPOSER.compose(("model=nope",))


def test_what_is_loaded_once_is_not_changed_by_a_composition() -> None:
    before = plain(COMPOSER.compose(("model=vit_att", "dataset=cub")).cfg)
    other = COMPOSER.compose(("model=resnet", "dataset=cub", "adapter=melo")).cfg
    other.dataset.path = "changed"
    assert plain(Composer().compose(("model=vit_att", "dataset=cub")).cfg) == before
    assert plain(COMPOSER.whole(("model=vit_att", "dataset=cub"))) == before
