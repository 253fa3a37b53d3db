"""From the shell to the answer: `python -m recast_exp --help`, and a command with three mistakes.

Target: at most 1.0 s each. `python -c pass` and `import torch` stand beside them: what can be had, and what is avoided.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable

from measuring import Figure, Report, arguments, interleaved, use_threads, write

TARGET = 1.0
NOTHING = "python -c pass"
COMMANDS = {  # name → arguments of Python, expected exit code, whether it has the target
    NOTHING: (["-c", "pass"], 0, False),
    "import torch": (["-c", "import torch"], 0, False),
    "--help": (["-m", "recast_exp", "--help"], 0, True),
    "three mistakes": (["-m", "recast_exp", "model=vit_at", "optimizer.lr=-1", "trainer.max_epoch=3"], 2, True),
}


def command(arguments: list[str], expected: int, folder: str) -> Callable[[], None]:
    def run() -> None:
        done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode != expected:
            raise SystemExit(f"{arguments}: exit code {done.returncode}, not {expected}\n{done.stderr[-2000:]}")

    return run


def main() -> None:
    args = arguments(__doc__, rounds=9).parse_args()
    use_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: command(arguments, expected, folder) for name, (arguments, expected, _) in COMMANDS.items()}
        times = interleaved(runs, rounds=args.rounds)
    figures = []
    for name, (_, _, targeted) in COMMANDS.items():
        if targeted:
            figures += [
                Figure(f"start-up: {name}", times.spread(name), "s", at_most=TARGET),
                Figure(f"start-up: {name} / import torch", times.ratio(name, "import torch")),
            ]
    write(args.json, "startup", Report("start-up", times, NOTHING, figures, children=True).show())


if __name__ == "__main__":
    main()
