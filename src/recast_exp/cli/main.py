"""The command line: Hydra's own, with everything that was typed checked before Hydra starts. `main` is the entry point.

Exit codes: 0 all well, 1 a bug (with its traceback), 2 a wrong request, 3 missing data, weights or files, 130
interrupted. Codes 2 and 3 come with one line for each problem on stderr.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import string
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import hydra
from omegaconf import OmegaConf

from recast_exp import __version__, stages
from recast_exp.cli.check import CommandLine, Findings, check
from recast_exp.cli.job import JobRunner, alone
from recast_exp.cli.outcome import guarded, out_of_reach, report_errors, unreadable_variable
from recast_exp.config import compose, hydra_api, keys
from recast_exp.config.compose import Composer
from recast_exp.config.variants import Variants
from recast_exp.errors import MissingInputError, RecastError, UnfitError, UserError
from recast_exp.files import user_path
from recast_exp.runs import record
from recast_exp.runs.plan import Planned, cause, recipe_sources
from recast_exp.system import lost_output, steady_output


def main() -> NoReturn:
    """Run the command line of this process and exit."""
    steady_output()
    os.environ["MPLBACKEND"] = "agg"  # plots are files; what is set for other programs may be nothing that there is
    try:
        code: str | int | None = run(sys.argv[1:])
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    if not code and (lost := lost_output()):
        line = f"the output of this command cannot be written ({lost.strerror}); print it to another place"
        code = report_errors([line], UserError.exit_code)
    sys.exit(code)


def run(argv: Sequence[str]) -> int:
    """Check a command line, then hand it to Hydra.

    Args:
        argv: The arguments, without the program's name.

    Returns:
        The exit code.
    """
    try:
        return _run(argv)
    except OSError as error:
        if (line := out_of_reach(error)) is None:
            raise
        return report_errors([line], UserError.exit_code)
    except Exception as error:
        if (line := unreadable_variable(error)) is None:
            raise
        return report_errors([line], UserError.exit_code)


_RANKS = "RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "JSM_NAMESPACE_RANK"
"""Environment variables that Lightning and torchmetrics read when they are imported."""


_INTERPOLATED = "${"
"""Hydra reads the paths of folders as values of a configuration, in which this begins a reference to another."""


def _run(argv: Sequence[str]) -> int:
    if odd := [name for name in _RANKS if not re.fullmatch(r"\s*\d+\s*", os.environ.get(name, "0"))]:
        problem = f"{odd[0]}: expected an integer, got {os.environ[odd[0]]!r}; unset this environment variable"
        return report_errors([problem], UserError.exit_code)
    try:
        here = Path.cwd()
    except OSError:  # another process has removed it
        gone = "the current folder does not exist any more; change to another"
        return report_errors([gone], MissingInputError.exit_code)
    if _INTERPOLATED in str(here):
        within = f"the current folder: expected a path without {_INTERPOLATED}, got {here}; change to another"
        return report_errors([within], UserError.exit_code)
    if argv[:1] == ["doctor"]:
        from recast_exp.cli.doctor import doctor

        return doctor(argv[1:], run)
    parser = _parser()
    try:
        args, unknown = parser.parse_known_intermixed_args(argv)
        _check_flags(args)
    except RecastError as error:
        return report_errors([str(error)], error.exit_code)
    if args.experimental_rerun:  # it runs whatever code is in a pickle
        instead = "--experimental-rerun: expected resume=FOLDER instead, which continues a run"
        return report_errors([instead], UserError.exit_code)
    if not (args.help or args.hydra_help or args.shell_completion):
        line = CommandLine(
            overrides=tuple(args.overrides),
            multirun=args.multirun,
            config_dir=args.config_dir,
            config_path=args.config_path,
            config_name=args.config_name or compose.CONFIG_NAME,
            inputs=not (args.cfg or args.info),
        )
        findings = check(line)
        wrong = [*map(_unknown_flag, unknown), *findings.wrong]
        if wrong or findings.missing:
            return report_errors([*wrong, *findings.missing], UserError.exit_code if wrong else findings.exit_code)
        args.overrides = findings.overrides
        if not (args.cfg or args.info):
            failed = _preflight(findings)
            if failed:
                return report_errors(map(str, failed), min(error.exit_code for error in failed))
            # Lightning starts the other processes of a distributed run with what stands in sys.argv
            sys.argv[1:] = _arguments(parser, args)
            if findings.sweep_dir is None:
                return _single(findings)
            from recast_exp.cli.sweep import run_sweep  # heavy, as the jobs are

            return run_sweep(argv, findings)
    elif unknown:
        return report_errors(map(_unknown_flag, unknown), UserError.exit_code)
    if args.help:
        try:
            print(help_text(args.config_dir))
        except RecastError as error:
            return report_errors([str(error)], error.exit_code)
        return 0
    sys.argv[1:] = _arguments(parser, args)
    return _show()


def _single(findings: Findings) -> int:
    """Run the job of a command; the exit code."""
    assert findings.composer is not None
    [planned] = findings.jobs
    try:
        cfg = findings.composer.whole(findings.overrides)
    except RecastError as error:
        return report_errors([str(error)], error.exit_code)
    hydra_api.put(cfg, planned.content)
    runner = JobRunner({tuple(map(str, cfg.hydra.overrides.task)): recipe_sources(planned.sources)})
    loader = findings.composer.loader

    def start() -> object:
        """Hold the folder before Hydra writes into it: of two commands, the second must not touch the first one's."""
        folder = user_path(str(cfg.hydra.run.dir))  # `~` of a file
        if _INTERPOLATED in str(folder):
            raise UserError(f"hydra.run.dir: expected a path without {_INTERPOLATED}, got {folder}; choose another")
        cfg.hydra.run.dir = str(folder)
        if not stages.load(planned.settings.stage["name"]).needs_model:
            return hydra_api.run(loader, cfg, runner)
        with alone(folder, planned.settings):
            record.check_own(folder, "hydra.run.dir")
            record.check_same(folder, record.read(folder), planned.settings, "hydra.run.dir")
            runner.held = Path(os.path.abspath(folder))  # noqa: PTH100  (as Hydra names it: pathlib's keeps `..`)
            return hydra_api.run(loader, cfg, runner)

    return guarded(start, runner)


def _preflight(findings: Findings) -> list[RecastError]:
    """What is wrong with models, weights, templates, images or devices. One error for each.

    The last check before anything is written, and the only one that imports what is heavy: only timm knows its models.
    Where the jobs of a sweep that do not fit are to be left out, they are marked instead; that all are is refused.
    """
    planned = [job for job in findings.jobs if stages.load(job.settings.stage["name"]).needs_model]
    if not planned:
        return []
    from recast_exp.experiment.check import Inputs, check_experiment
    from recast_exp.experiment.effects import no_effect

    assert findings.composer is not None
    inputs, composer = Inputs(), findings.composer
    failing: dict[tuple[type[RecastError], str], list[Planned]] = {}
    verdicts: dict[str, RecastError | None] = {}
    for job in planned:
        settings = job.settings
        asked = (
            settings.model,
            settings.recast,
            settings.mimicry,
            settings.adapter,
            settings.head,
            settings.training,
            settings.trainer,
            settings.probe,
            settings.stage,
            settings.dataset,
            settings.data_dir,
            settings.bank,
            settings.cache_dir,
        )
        if (known := str(asked)) not in verdicts:
            try:
                check_experiment(settings)
                overrides = list(job.asked.overrides)
                stages.from_config(settings.stage).preflight(
                    settings, inputs, functools.partial(Variants, composer, overrides)
                )
                verdicts[known] = None
            except RecastError as found:
                verdicts[known] = found
        error = verdicts[known]
        if isinstance(error, UnfitError) and settings.skip_unfit and len(planned) > 1:
            job.unfit = str(error)
        elif error:
            failing.setdefault((type(error), str(error)), []).append(job)
    all_jobs = [job.asked for job in planned]
    wrong: list[RecastError] = [
        kind(line + cause(line, [job.asked for job in those], all_jobs)) for (kind, line), those in failing.items()
    ]
    for key in findings.searched:
        reasons = [no_effect(key, job.settings) for job in planned]
        if reasons[0] and all(reasons):
            wrong.append(UserError(f"{key}: expected a key with an effect in a search, got one without: {reasons[0]}"))
    if not wrong and all(job.unfit for job in planned):
        wrong = [UserError(line) for line in dict.fromkeys(str(job.unfit) for job in planned)]
    return wrong


def _parser() -> argparse.ArgumentParser:
    """Hydra's own parser, which raises UserError instead of printing its usage."""

    def fail(message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")

    parser = hydra_api.parser()
    parser.error = fail  # type: ignore[method-assign]
    for action in parser._actions:
        if action.dest == "version":
            action.version = f"recast_exp {__version__}, {action.version}"  # type: ignore[attr-defined]
    return parser


def _check_flags(args: argparse.Namespace) -> None:
    """Refuse the combinations of flags that Hydra would answer with a traceback.

    Raises:
        UserError: If two of them exclude each other.
    """
    args.overrides = args.overrides or []
    modes = {
        "--run": args.run,
        "--multirun": args.multirun,
        "--cfg": args.cfg,
        "--info": args.info,
        "--shell-completion": args.shell_completion,
    }
    given = [flag for flag, value in modes.items() if value]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} are mutually exclusive")
    if args.resolve and not (args.cfg or args.help):
        raise UserError("--resolve: expected together with --cfg (--cfg job --resolve), got it alone")


def _unknown_flag(flag: str) -> str:
    name, _, value = flag.lstrip("-").partition("=")
    meant = keys.nearest(name, [*keys.FIELDS, *keys.SECTIONS]) if len(name) > 1 else []
    if name in keys.FIELDS or name in keys.SECTIONS:
        meant = [name]
    hint = f"; keys have no dashes: {meant[0]}={value or '...'}" if meant else "; see --help"
    return f"{flag}: unknown flag{hint}"


def _arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[str]:
    """Write parsed arguments out again, flags first."""
    flags = []
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        if action.option_strings and value not in (None, False):
            flags += [action.option_strings[0]] if value is True else [action.option_strings[0], str(value)]
    return [*flags, *args.overrides]


def help_text(config_dir: str | None = None) -> str:
    """The text of `--help`, as conf/hydra/help has it. Hydra's own way takes seconds to list the groups.

    Args:
        config_dir: The folder of `--config-dir`, whose options are listed too.
    """
    composer = Composer(config_dir=config_dir)
    groups = {group: options for group, options in composer.groups().items() if not group.startswith("hydra")}
    listed = "\n".join(f"  {group + ':':<12}{', '.join(options)}" for group, options in groups.items())
    template = OmegaConf.load(compose.conf_dir() / "hydra" / "help" / "recast_exp.yaml").template
    return string.Template(template).substitute(APP_CONFIG_GROUPS=listed).rstrip()


def _show() -> int:
    """Let Hydra print what --cfg, --info or --shell-completion ask for; the exit code."""
    compose.register()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us whole, and Hydra does not print them its own way
    decorate = hydra.main(
        version_base=hydra_api.VERSION_BASE, config_path=str(compose.conf_dir()), config_name=compose.CONFIG_NAME
    )
    runner = JobRunner()
    return guarded(lambda: decorate(runner)(), runner)
