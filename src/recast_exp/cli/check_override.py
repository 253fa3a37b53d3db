"""What is wrong with one override of a command line, before the job that it belongs to is composed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from hydra.core.override_parser.types import Override

from recast_exp.cli import launchers
from recast_exp.config import compose, grammar, keys
from recast_exp.config.compose import Composer
from recast_exp.config.fields import accepted
from recast_exp.plugins import ADAPTERS, DATASETS, HEADS, STAGES

_REGISTRIES = ADAPTERS, DATASETS, HEADS, STAGES


class OverrideChecker:
    """Checks overrides against the keys and the options that there are.

    Args:
        composer: Composes the defaults.
        groups: Group → its options. A seed that is met is added to them.
        inputs: Whether to look for what a launcher needs on this machine.
    """

    def __init__(self, composer: Composer, groups: Mapping[str, list[str]], *, inputs: bool) -> None:
        self._composer = composer
        self._groups = groups
        self._inputs = inputs

    def problems(self, override: Override, *, multirun: bool) -> list[str]:
        """What is wrong with an override, a line each.

        Raises:
            RecastError: If the defaults cannot be composed.
        """
        return list(self._problems(override, multirun))

    def _problems(self, override: Override, multirun: bool) -> Iterator[str]:
        text, key, value = override.input_line or "", override.key_or_group, override.value()
        options, field = self._groups.get(key), keys.field_of(key)
        if key in ("hydra.sweep.dir", "hydra.run.dir") and (text.endswith("=") or value == ""):
            yield f"{key}: expected a folder, got nothing"
        elif key == "hydra.sweep.subdir":
            yield f"{text}: the jobs of a sweep are in folders named by their numbers; leave it out"
        elif launchers.is_override(override) and override.is_sweep_override():
            yield f"launcher: expected one option, which starts all jobs of a sweep, got {text.partition('=')[2]}"
        elif key in ("hydra", "hydra.sweeper.params"):
            got = text.partition("=")[2] or text
            yield f"{key}: expected its keys to be set one by one ({key}.NAME=...), got {got}"
        elif override.is_hydra_override():
            if options and isinstance(value, str) and value not in options:
                yield keys.unknown_option(key, value, options)
        elif options is None and field is None and key not in keys.SECTIONS:
            homes = [] if "." in key or key == "name" else list(self._homes(key))
            meant = f"did you mean {' or '.join(homes)}?"
            yield (
                f"{key}: unknown key; {meant}"
                if homes
                else keys.unknown(key, (group for group in self._groups if "/" not in group))
            )
        elif override.is_delete():
            yield f"~{key}: every key is needed and none can be deleted; set another value: {key}=..."
        elif text.endswith("=") or (value == "" and key in grammar.PATH_KEYS):
            takes = accepted(field) if field else f"one of {', '.join(options or ())}"
            takes = takes if key in keys.FIELDS or options else "a value"  # an entry of a mapping
            yield f"{key}: expected {takes}, got nothing"
        elif options is not None and not isinstance(value, dict):
            yield from self._option_problems(override, options, multirun)
        elif (override.is_add() or override.is_force_add()) and not keys.is_open(key):
            yield f"{override.get_key_element()}: the key is there already; write {key}=... without the +"
        else:
            yield from keys.value_problems(key, value)

    def _homes(self, name: str) -> Iterator[str]:
        """The groups of plug-ins that have an option of this name, as the user would type it: `stage.tasks`."""
        for group in (registry.kind for registry in _REGISTRIES):
            for option in self._groups.get(group, []):
                content = self._composer.option_content(group, option)
                takes = content.get(group)
                if f"{group}.{name}" in content or (isinstance(takes, dict) and name in takes):
                    yield f"{group}.{name}"
                    break

    def _option_problems(self, override: Override, options: list[str], multirun: bool) -> Iterator[str]:
        group, value = override.key_or_group, override.value()
        if group == "seed" and isinstance(value, str) and compose.store_seed(value, options):
            options.append(value)
        if override.is_force_add() or (override.is_add() and group in self._composer.compose().choices):
            yield f"{override.get_key_element()}: the group is there already; write {group}=... without the +"
        elif isinstance(value, list):
            names = ",".join(map(str, value))
            yield f"{group}: expected one option, got the list [{names}]; for a sweep write -m {group}={names}"
        elif value not in options and value in _installed(group):
            yield (
                f"{group}: {value} is installed, but {group}/{value}.yaml, its preset, is not there; pass the folder "
                "that holds it with --config-dir"
            )
        elif value not in options:
            yield keys.unknown_option(group, "null" if value is None else str(value), options)
        elif launchers.is_override(override):
            found = launchers.problem(str(value), multirun=multirun, here=self._inputs)
            if found:
                yield found


def _installed(group: str) -> list[str]:
    """The plug-ins of a group of options, those of other packages included; none where options are no plug-ins."""
    return next((registry.names() for registry in _REGISTRIES if registry.kind == group), [])
