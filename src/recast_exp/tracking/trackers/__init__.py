"""Trackers: one module each, named as the option of `logger=`, with a preset under `conf/logger/`.

A module has one function, `start(logger: LoggerConfig, run: RunFacts, run_dir: Path) -> Tracker | None`. It is called
before a job opens its data, in every process of a distributed job, and raises `UserError` if it refuses its settings:
one line that begins with the key (`logger.options.host: expected …, got …`). Options that no other tracker has are in
`logger.options`. The module is cheap to import: it imports the library that it needs inside `start`.

It may have another, `check(logger: LoggerConfig) -> None`, which raises such errors before a folder is made for a job.

`recast_exp.tracking.base` has `Tracker` and `RunFacts`. Another distribution adds a tracker by an entry point of the
group `recast_exp.trackers`.
"""
