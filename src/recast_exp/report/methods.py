"""The method of each job: jobs with one label that differ only in seed, draw and dataset are runs of one method."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence

from recast_exp.config.keys import decides
from recast_exp.report.reading import DRAW, Job
from recast_exp.report.tested import chooses_test_images

SHOWN = 3  # at most so many keys in a name

Variant = tuple[str | tuple[str, str | None], ...]
"""Of a job that has run, keys and their values; of another, its overrides."""

_SHARED = frozenset({"seed", DRAW, "task", "dataset.eval_batch_size"})
"""Keys on which results depend but that are not part of a method: seed, draw of the training images, task file, batch
size of the evaluation."""


def method_names(jobs: Sequence[Job]) -> list[str]:
    """Name the method of each job: its label, followed by the differing settings if one label has several.

    Two jobs with one label belong to one method unless, on the same dataset, their configurations differ. (Between
    datasets they may differ, as a dataset also sets learning rates and the like.) Jobs that never started have no
    configuration; they belong to the method with the same overrides.
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


def _variants(jobs: Sequence[Job]) -> list[Variant]:
    """The settings that distinguish each job from others of its label; equal for all jobs of one method."""
    settings = [_settings(job.config) if job.config else None for job in jobs]
    keys = _differing(jobs, settings)
    variant_of = {
        _overrides(job): tuple((key, setting.get(key)) for key in keys)
        for job, setting in zip(jobs, settings, strict=True)
        if setting is not None
    }
    return [
        tuple((key, setting.get(key)) for key in keys)
        if setting is not None
        else variant_of.get(_overrides(job), _overrides(job))
        for job, setting in zip(jobs, settings, strict=True)
    ]


def _differing(jobs: Sequence[Job], settings: Sequence[Mapping[str, str] | None]) -> list[str]:
    """The keys that have several values on one dataset, in the order of the configuration.

    Columns from one source (all classes, some of them) are one dataset here, but for what makes them several.
    """
    differing: dict[str, None] = {}
    by_column: dict[str, list[Mapping[str, str]]] = defaultdict(list)
    by_source: dict[tuple[str, str | None], list[Mapping[str, str]]] = defaultdict(list)
    for job, setting in zip(jobs, settings, strict=True):
        if setting is not None:
            by_column[job.dataset].append(setting)
            by_source[job.source].append({key: value for key, value in setting.items() if not chooses_test_images(key)})
    for group in (*by_source.values(), *by_column.values()):
        for key in dict.fromkeys(key for setting in group for key in setting):
            if len({setting.get(key) for setting in group}) > 1:
                differing[key] = None
    return list(differing)


def _suffixes(jobs: Sequence[Job], variants: Sequence[Variant]) -> dict[Variant, str]:
    """A short name of each variant: the overrides that not all jobs share, or else the keys that differ."""
    typed: dict[Variant, set[tuple[str, ...]]] = defaultdict(set)
    for job, variant in zip(jobs, variants, strict=True):
        typed[variant].add(_overrides(job))
    shared = set.intersection(*(set(overrides) for choices in typed.values() for overrides in choices))
    names = {
        variant: " ".join(override for override in min(choices) if override not in shared)
        for variant, choices in typed.items()
        if len(choices) == 1
    }
    if len(names) == len(typed) == len(set(names.values())):
        return names
    names = {}
    for variant in typed:
        parts = [part if isinstance(part, str) else f"{part[0]}={part[1]}" for part in variant]
        name = " ".join([*parts[:SHOWN], *(["…"] if len(parts) > SHOWN else [])])
        names[variant] = f"{name} #{len(names) + 1}" if name in names.values() else name
    return names


def _overrides(job: Job) -> tuple[str, ...]:
    """A job's overrides, except for seed, draw and dataset."""
    texts = (text.lstrip("+").replace('"', "").partition("=") for text in job.overrides)
    # Hydra records False for a typed false, and the plan of a sweep has the typed form
    words = {"True": "true", "False": "false", "None": "null"}
    others = ("seed", DRAW, "dataset")
    return tuple(f"{key}={words.get(value, value)}" for key, _, value in texts if key not in others)


def _settings(config: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """The dotted keys on which results depend, with their values as strings."""
    settings: dict[str, str] = {}
    for name, value in config.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            settings |= _settings(value, f"{key}.")
        elif decides(key) and key not in _SHARED:
            settings[key] = value if isinstance(value, str) else json.dumps(value, default=str)
    return settings
