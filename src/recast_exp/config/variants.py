"""The command of a running job with other options, presets of the user among them, composed as Hydra composes them."""

from __future__ import annotations

import copy

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from recast_exp.config import grammar, keys
from recast_exp.config.compose import Composer
from recast_exp.config.schema import Config, typed
from recast_exp.errors import UserError

_OF_A_METHOD = "model", "recast", "adapter"
"""Sections in which an option decides, not what was typed with another one: they make a method what it is."""


class Variants:
    """Composes a command with other options.

    Args:
        composer: What composes it.
        overrides: Overrides of the command, one value each.
    """

    def __init__(self, composer: Composer, overrides: list[str]) -> None:
        self._composer = composer
        self._groups = composer.groups()
        choices = {grammar.key(text) for text in overrides} & set(self._groups)
        self._options = [text for text in overrides if grammar.key(text) in choices - {"seed"}]
        self._values = [text for text in overrides if text not in self._options]

    @classmethod
    def of_this_job(cls) -> Variants:
        """That of the job that Hydra is running in this process."""
        hydra_cfg = HydraConfig.get()
        paths = {source.provider: source.path for source in hydra_cfg.runtime.config_sources}
        composer = Composer(str(hydra_cfg.job.config_name), paths.get("main"), paths.get("command-line"))
        return cls(composer, [str(text) for text in hydra_cfg.overrides.task])

    def options(self, group: str) -> list[str]:
        """The options of a group, those of the user's `--config-dir` among them."""
        return self._groups.get(group, [])

    def typed(self, group: str) -> str | None:
        """The option of a group as it was typed (`method=vit_melo`); None if it was not."""
        return next((text for text in self._options if grammar.key(text) == group), None)

    def compose(self, *overrides: str) -> Config:
        """The settings of the command with other options and values (`adapter=melo`, `recast.num_groups=12`).

        Values that were typed stay as they are, except where they belong to an option that is replaced, or are replaced
        themselves.

        Raises:
            UserError: If it cannot be composed.
        """
        choices = [text for text in overrides if grammar.key(text) in self._groups and not _is_seed(text)]
        values = [text for text in overrides if text not in choices]
        replaced = {grammar.key(text) for text in choices}
        if replaced & {"model", "adapter"}:
            replaced.add("method")  # which sets both
        options = [text for text in self._options if grammar.key(text) not in replaced]
        fixed: set[str] = set()
        for text in choices:
            if text in self._options:  # as it was typed, with its values
                continue
            group, _, option = text.partition("=")
            content = self._composer.option_content(group, option)
            fixed |= {key for key in content if key.partition(".")[0] in _OF_A_METHOD}
            fixed |= {"adapter"} if group == "adapter" else set()
        composed = self._composer.compose([*options, *choices])
        cfg = copy.deepcopy(composed.cfg)
        for text in values:
            override = grammar.parse(text)
            known = override is not None and keys.field_of(grammar.key(text)) is not None
            if override is None or not known or override.is_delete() or override.is_sweep_override():
                raise UserError(f"{text}: expected an option of a group, or key=value of a key that there is")
            if problems := list(keys.value_problems(grammar.key(text), override.value())):
                raise UserError(*problems)
        own = [(text, {grammar.key(text), keys.mapping_of(grammar.key(text))}) for text in self._values]
        for text in (*(text for text, names in own if not names & fixed), *values):
            override = grammar.parse(text)
            if override is None:
                continue
            key = grammar.key(text)
            OmegaConf.update(cfg, override.key_or_group, override.value(), merge=True, force_add=keys.is_open(key))
        return typed(cfg)


def _is_seed(text: str) -> bool:
    """Whether an override is `seed=` with a number, which no option is needed for."""
    name, _, value = text.partition("=")
    return name == "seed" and value.isdecimal()
