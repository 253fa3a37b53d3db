"""The command line: Hydra's own, with everything that was typed checked before Hydra starts. `main` is the entry point.

Exit codes: 0 all well, 1 a bug (with its traceback), 2 a wrong request, 3 missing data, weights or files, 130
interrupted. Codes 2 and 3 come with one line for each problem on stderr.
"""

from __future__ import annotations

import argparse
import logging
import os
import string
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from recast_exp import __version__
from recast_exp.cli import launchers
from recast_exp.cli.check import CommandLine, Findings, check
from recast_exp.cli.check_job import Planned, cause
from recast_exp.config import compose as composition
from recast_exp.config import keys
from recast_exp.config.compose import Composer
from recast_exp.config.schema import WITHOUT_MODEL
from recast_exp.errors import Pruned, RecastError, UnfitError, UserError
from recast_exp.runs import adopt as saved

log = logging.getLogger("recast_exp")

_failures: list[int] = []
"""The exit codes of the jobs of this process that failed, and have said so."""


_started: list[int] = []
"""The numbers of the jobs of this process that Hydra has started."""


def main() -> NoReturn:
    """Run the command line of this process and exit."""
    try:
        sys.exit(run(sys.argv[1:]))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def run(argv: Sequence[str]) -> int:
    """Check a command line, then hand it to Hydra.

    Args:
        argv: The arguments, without the program's name.

    Returns:
        The exit code.
    """
    parser = _parser()
    try:
        args, unknown = parser.parse_known_intermixed_args(argv)
        _check_flags(args)
    except RecastError as error:
        return _report([str(error)], error.exit_code)
    if not (args.help or args.hydra_help or args.shell_completion or args.info or args.experimental_rerun):
        line = CommandLine(
            overrides=tuple(args.overrides),
            multirun=args.multirun,
            config_dir=args.config_dir,
            config_path=args.config_path,
            config_name=args.config_name or composition.CONFIG_NAME,
            inputs=not args.cfg,
        )
        findings = check(line)
        wrong = [*map(_unknown_flag, unknown), *findings.wrong]
        if wrong or findings.missing:
            return _report([*wrong, *findings.missing], UserError.exit_code if wrong else findings.exit_code)
        args.overrides = findings.overrides
        if not args.cfg:
            wrong = _unfit_models(findings.jobs)
            if wrong:
                return _report(wrong, UserError.exit_code)
            if findings.sweep_dir is not None:
                return _sweep(parser, args, argv, findings)
    elif unknown:
        return _report(map(_unknown_flag, unknown), UserError.exit_code)
    if args.help:
        print(help_text())
        return 0
    # Lightning starts the other processes of a distributed run with what stands in sys.argv.
    sys.argv[1:] = _arguments(parser, args)
    return _start()


def _sweep(parser: argparse.ArgumentParser, args: argparse.Namespace, argv: Sequence[str], findings: Findings) -> int:
    """Run a sweep, in its folder alone, and say at its end what came of it."""
    from recast_exp.runs import sweep

    assert findings.sweep_dir is not None
    again = sweep.command_again(argv, findings.sweep_dir)
    try:
        with sweep.running(findings.sweep_dir, findings.jobs if findings.is_grid else [], argv) as plan:
            sys.argv[1:] = _arguments(parser, args)
            code = _start()
    except RecastError as error:
        return _report(str(error).splitlines(), error.exit_code)
    except KeyboardInterrupt:
        print(f"interrupted; continue with: {again}", file=sys.stderr)
        return 130
    return max(code, sweep.conclude(plan))


def _report(lines: Iterable[str], exit_code: int) -> int:
    for line in lines:
        print(f"error: {' '.join(line.split())}", file=sys.stderr)
    return exit_code


def _unfit_models(planned: Sequence[Planned]) -> list[str]:
    """One line for each backbone that timm does not know, and each model that cannot be made of one.

    The last check before anything is written, and the only one that imports what is heavy: only timm knows its models.
    Where the jobs of a sweep that do not fit are to be left out, they are marked instead; that all are is refused.
    """
    planned = [each for each in planned if each.cfg.stage.name not in WITHOUT_MODEL]
    if not planned:
        return []
    from recast_exp.models.check import check_model

    failing: dict[str, list[Planned]] = {}
    verdicts: list[tuple[Any, RecastError | None]] = []
    for each in planned:
        cfg = each.cfg
        asked = (cfg.model.backbone, cfg.model.img_size, cfg.model.method, cfg.recast, cfg.adapter)
        error: Any = next((verdict for known, verdict in verdicts if known == asked), check_model)
        if error is check_model:
            try:
                check_model(cfg.model, cfg.recast, cfg.adapter)
                error = None
            except RecastError as found:
                error = found
            verdicts.append((asked, error))
        if isinstance(error, UnfitError) and cfg.skip_unfit and len(planned) > 1:
            each.unfit = str(error)
        elif error:
            failing.setdefault(str(error), []).append(each)
    all_jobs = [each.job for each in planned]
    lines = [line + cause(line, [each.job for each in those], all_jobs) for line, those in failing.items()]
    if not lines and all(each.unfit for each in planned):
        lines = list(dict.fromkeys(str(each.unfit) for each in planned))
    return lines


def _parser() -> argparse.ArgumentParser:
    """Hydra's own parser, which raises UserError instead of printing its usage."""

    def fail(message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")

    parser = get_args_parser()
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
        raise UserError(f"{' and '.join(given)}: exclude each other, takes one of them")
    if args.resolve and not (args.cfg or args.help):
        raise UserError("--resolve: got it without --cfg; takes --cfg job --resolve")


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


def help_text() -> str:
    """The text of `--help`, as conf/hydra/help has it. Hydra's own way takes seconds to list the groups."""
    composer = Composer()
    groups = {group: options for group, options in composer.groups().items() if not group.startswith("hydra")}
    listed = "\n".join(f"  {group + ':':<12}{', '.join(options)}" for group, options in groups.items())
    template = OmegaConf.load(composition.conf_dir() / "hydra" / "help" / "recast_exp.yaml").template
    return string.Template(template).substitute(APP_CONFIG_GROUPS=listed).rstrip()


def _start() -> int:
    """Let Hydra run what stands in sys.argv; the exit code."""
    composition.register()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us whole, and Hydra does not print them its own way
    decorate = hydra.main(
        version_base=composition.VERSION_BASE,
        config_path=str(composition.conf_dir()),
        config_name=composition.CONFIG_NAME,
    )
    try:
        decorate(task)()
    except RecastError as error:  # the job has said it already, maybe in another process
        return max([error.exit_code, *_failures])
    except (HydraException, OmegaConfBaseException) as error:
        if not _failures:  # Hydra refused: no job has started
            return _report([composition.describe(error)], UserError.exit_code)
    except OSError as error:
        if _started:
            raise
        return _report([f"hydra.run.dir: the folder of the run cannot be made ({error})"], UserError.exit_code)
    except Exception as error:
        if lost := launchers.lost_job(error):
            return max([_report([lost], 1), *_failures])
        if not _failures:
            raise
    return max(_failures, default=0)


def note_failure(exit_code: int) -> None:
    """Count a job into the exit code that failed in another process, or in an earlier run of a search."""
    _failures.append(exit_code)


def task(cfg: DictConfig) -> float | None:
    """Run one job, as Hydra calls it.

    Args:
        cfg: The composed configuration.

    Returns:
        The validation accuracy, where there is one: what a search maximises. None for a job of a sweep that failed, or
        that its search has given up: its folder says why, and the launcher goes on with the others.

    Raises:
        Exception: In a single run, what is not the user's mistake; its traceback has been logged.
    """
    hydra_cfg = HydraConfig.get()
    in_sweep = hydra_cfg.mode == RunMode.MULTIRUN
    _started.append(hydra_cfg.job.num if in_sweep else 0)

    folder = Path(hydra_cfg.runtime.output_dir)
    overrides = launchers.without(str(text) for text in hydra_cfg.overrides.task)
    try:
        metrics = _run(
            saved.adopt(cfg),
            folder,
            overrides=overrides,
            number=hydra_cfg.job.num if in_sweep else None,
            sweep=hydra_cfg.sweep.dir if in_sweep else None,
        )
    except RecastError as error:
        log.error("error: %s", error)
        _failures.append(error.exit_code)
        if not in_sweep:
            sys.exit(error.exit_code)
        return None
    except Pruned as pruned:
        log.info("The trial was %s", pruned)
        return None
    except Exception:
        log.exception("error: the job failed")
        _failures.append(1)
        if not in_sweep:
            raise
        return None
    return metrics.get("val/accuracy")


def _run(cfg: DictConfig, folder: Path, *, sweep: str | None, **record: Any) -> dict[str, Any]:
    """Run a job and keep a record of it; a stage that only reads leaves none, and imports nothing heavy."""
    if cfg.stage.name in WITHOUT_MODEL:
        from recast_exp import stages

        return stages.run(cfg, folder, sweep)
    from recast_exp.cli.job import run_job

    return run_job(cfg, folder, sweep=sweep, **record)
