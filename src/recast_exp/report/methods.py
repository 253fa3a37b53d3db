"""Which jobs are runs of one method: those with one label that differ in nothing but seed and dataset."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from recast_exp.config.keys import decides
from recast_exp.report.reading import Job

SHOWN = 3  # keys that a name holds at most

_SHARED = frozenset({"seed", "task", "dataset.eval_batch_size"})
"""Keys that results depend on, but that are none of the method: its repetitions, its file, and how it is tested."""


def method_names(jobs: Sequence[Job]) -> list[str]:
    """Name the method of each job: its label, and what differs where one label stands for several settings.

    Two jobs of one label are of one method unless, on the same dataset, their configurations differ. (Between datasets
    they may: a dataset brings what its size needs.) Jobs that never started have no configuration; they belong to the
    method that has the same overrides.
    """
    names = [job.label for job in jobs]
    by_label: dict[str, list[int]] = defaultdict(list)
    for at, job in enumerate(jobs):
        by_label[job.label].append(at)
    for label, places in by_label.items():
        variants = _variants([jobs[at] for at in places])
        if len(set(variants)) > 1:
            suffixes = _suffixes([jobs[at] for at in places], variants)
            for at, variant in zip(places, variants, strict=True):
                names[at] = f"{label} · {suffixes[variant]}" if suffixes[variant] else label
    return names


def _variants(jobs: Sequence[Job]) -> list[tuple[Any, ...]]:
    """What tells each job from the others of its label; the same for all jobs of one method."""
    settings = [_settings(job.config) if job.config else None for job in jobs]
    keys = _differing(jobs, settings)
    known = {
        _own(job): tuple((key, setting.get(key)) for key in keys)
        for job, setting in zip(jobs, settings, strict=True)
        if setting is not None
    }
    return [
        tuple((key, setting.get(key)) for key in keys) if setting is not None else known.get(_own(job), _own(job))
        for job, setting in zip(jobs, settings, strict=True)
    ]


def _differing(jobs: Sequence[Job], settings: Sequence[Mapping[str, str] | None]) -> list[str]:
    """The keys that have several values on one dataset, in the order of the configuration."""
    found: dict[str, None] = {}
    by_dataset: dict[str, list[Mapping[str, str]]] = defaultdict(list)
    for job, setting in zip(jobs, settings, strict=True):
        if setting is not None:
            by_dataset[job.dataset].append(setting)
    for those in by_dataset.values():
        for key in dict.fromkeys(key for setting in those for key in setting):
            if len({setting.get(key) for setting in those}) > 1:
                found[key] = None
    return list(found)


def _suffixes(jobs: Sequence[Job], variants: Sequence[tuple[Any, ...]]) -> dict[tuple[Any, ...], str]:
    """A short name of each variant: the overrides that not all have, or else the keys that differ."""
    typed: dict[tuple[Any, ...], set[tuple[str, ...]]] = defaultdict(set)
    for job, variant in zip(jobs, variants, strict=True):
        typed[variant].add(_own(job))
    shared = set.intersection(*(set(each) for those in typed.values() for each in those))
    names = {
        variant: " ".join(text for text in min(those) if text not in shared)
        for variant, those in typed.items()
        if len(those) == 1
    }
    if len(names) == len(typed) == len(set(names.values())):
        return names
    names = {}
    for variant in typed:
        parts = [part if isinstance(part, str) else f"{part[0]}={part[1]}" for part in variant]
        name = " ".join([*parts[:SHOWN], *(["…"] if len(parts) > SHOWN else [])])
        names[variant] = f"{name} #{len(names) + 1}" if name in names.values() else name
    return names


def _own(job: Job) -> tuple[str, ...]:
    """A job's overrides but for its seed and its dataset."""
    texts = (text.lstrip("+").replace('"', "").partition("=") for text in job.overrides)
    # Hydra records False where false was typed, and the plan of a sweep has what was typed
    words = {"True": "true", "False": "false", "None": "null"}
    return tuple(f"{key}={words.get(value, value)}" for key, _, value in texts if key not in ("seed", "dataset"))


def _settings(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """The dotted keys that results depend on, with their values as text."""
    found: dict[str, str] = {}
    for name, value in config.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            found |= _settings(value, f"{key}.")
        elif decides(key) and key not in _SHARED:
            found[key] = value if isinstance(value, str) else json.dumps(value, default=str)
    return found
