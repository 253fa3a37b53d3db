"""`python -m recast_exp doctor`: the machine, the libraries and a self-test, as text for a report of a problem."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import logging
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from recast_exp import __version__
from recast_exp.cli.launchers import PLUGINS
from recast_exp.errors import RecastError, first_line, printable
from recast_exp.files import cache_folder, locked, user_path
from recast_exp.system import shared_memory, usable_cores

LIBRARIES = ("torch", "torchvision", "lightning", "timm", "hydra-core", "omegaconf", "torchmetrics", "numpy")
EXTRAS = {
    "peft": "peft",
    "search": "optuna",
    "export": "onnx",
    "dashboard": "wandb_workspaces",
    **{name: f"hydra_plugins.{plugin}" for name, plugin in PLUGINS.items()},
}
"""Extra of the package → a module that it brings."""
VARIABLES = (
    *("RECAST_EXP_CACHE", "RECAST_EXP_DATA", "HF_HOME", "HF_HUB_OFFLINE"),
    *("WANDB_MODE", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"),
)


Command = Callable[[Sequence[str]], int]
"""Runs a command line of this program; the exit code."""


def doctor(arguments: Sequence[str], command: Command) -> int:
    """Print what is there and what works.

    Args:
        arguments: `--no-test` leaves the self-test out.
        command: The program, for the self-test.

    Returns:
        The exit code: 1 if a part of the self-test fails, 2 for another argument.
    """
    if unknown := [text for text in arguments if text != "--no-test"]:
        print(f"error: doctor: expected nothing or --no-test, got {unknown[0]}", file=sys.stderr)
        return 2
    for name, value in facts():
        print(f"{name + ':':<15}{printable(value)}")
    if "--no-test" in arguments:
        return 0
    works = True
    try:
        made = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    except OSError as error:
        print(f"{'self-test:':<15}FAILED ({first_line(error)})")
        return 1
    with made as folder:
        for name, test in TESTS.items():
            started = time.monotonic()
            try:
                said = test(Path(folder), command)
            except Exception as error:  # whatever it is, it is what the report is about
                works = False
                said = f"FAILED ({type(error).__name__}: {first_line(error)})"
            print(f"{name + ':':<15}{said}, {time.monotonic() - started:.1f} s")
    return 0 if works else 1


def facts() -> Iterator[tuple[str, str]]:
    """Name and value of what a reader of a report wants to know, none of it secret."""
    yield "recast_exp", f"{__version__}, {Path(__file__).parents[1]}"
    yield "Python", f"{platform.python_version()} on {platform.platform()}"
    yield "libraries", ", ".join(f"{name} {_version(name)}" for name in LIBRARIES)
    yield "extras", ", ".join(f"{name} {'yes' if _has(module) else 'no'}" for name, module in EXTRAS.items())
    yield "processor", f"{usable_cores()} of {os.cpu_count()} cores, {_memory()}"
    shared = shared_memory()
    yield "shared memory", "no bound" if shared is None else f"{shared / 1e6:,.0f} MB free"
    yield "devices", ", ".join(_devices())
    try:
        folder = cache_folder(None)
        yield "cache", f"{folder}, {shutil.disk_usage(folder).free / 1e9:,.1f} GB free"
    except RecastError as error:
        yield "cache", str(error)
    data = user_path(os.environ.get("RECAST_EXP_DATA", "data"))
    yield "data_dir", f"{data.absolute()}, {'there' if data.is_dir() else 'not there'}"
    yield "terminal", f"{sys.stdout.encoding}, {'interactive' if sys.stdout.isatty() else 'not interactive'}"
    set_here = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    yield "environment", ", ".join(set_here) or "nothing set"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "is not installed"


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:,.1f} GB of memory"
    except (AttributeError, ValueError, OSError):  # on Windows
        return "memory not known"


def _devices() -> Iterator[str]:
    import torch

    yield f"cpu ({torch.get_num_threads()} threads)"
    for number in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(number)
        yield f"{found.name} ({found.total_memory / 1e9:,.0f} GB, CUDA {torch.version.cuda})"
    if torch.backends.mps.is_available():
        yield "mps"


def _exact(folder: Path, command: Command) -> str:
    import timm
    import torch

    from recast_exp.recast import find_groups, inject, merge, mimic

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=4).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(images)
        inject(model, mimic(model, find_groups(model)))
        error = float((model(images) - before).abs().max() / before.abs().max())
        merge(model)
    if error > 1e-3:
        raise ArithmeticError(f"the logits of a rebuilt model differ by {error:.1e}")
    return f"works (logits within {error:.0e})"


def _locks(folder: Path, command: Command) -> str:
    log = logging.getLogger("recast_exp.files")
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(handler)
    try:
        with locked(cache_folder(None) / "doctor.lock", "the doctor", wait=False):
            pass
    finally:
        log.removeHandler(handler)
    return said[0] if said else "work in the cache"


def _run(folder: Path, command: Command) -> str:
    base = ["logger=none", "probe=false", "model.pretrained=false", f"cache_dir={folder / 'cache'}"]
    adapted = folder / "adapted"
    commands = (
        [*base, "trainer.max_epochs=1", "dataset.shots=5", f"hydra.run.dir={adapted}"],
        ["stage=evaluate", f"task={adapted / 'task.safetensors'}", *base[-1:], f"hydra.run.dir={folder / 'evaluated'}"],
    )
    level = logging.root.manager.disable
    for words in commands:
        said = io.StringIO()
        try:
            logging.disable(logging.CRITICAL)
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                code = command(words)
        except SystemExit as ended:
            code = int(ended.code or 0) if isinstance(ended.code, int | None) else 1
        finally:
            logging.disable(level)
        if code:
            lines = [line for line in said.getvalue().splitlines() if line.startswith("error: ")]
            raise RuntimeError(lines[0] if lines else f"exit code {code} of {' '.join(words)}")
    return "works (trained, written, read, evaluated)"


TESTS: dict[str, Callable[[Path, Command], str]] = {"templates": _exact, "locks": _locks, "a run": _run}
"""The parts of the self-test; each says how it went, or raises."""
