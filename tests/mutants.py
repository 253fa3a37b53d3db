"""What `make mutants` found: a table by module, and the survivors that docs/mutants.md does not judge yet.

    python tests/mutants.py    # after `mutmut run`, in the same folder; exits with 1 if a survivor is not judged

A survivor is judged if the page has the lines that it takes away and adds.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

PAGE = Path(__file__).parents[1] / "docs/mutants.md"
OPEN = "## Not judged yet"
KILLED, TYPES, SURVIVED = "killed", "caught by type check", "survived"
COLUMNS = (KILLED, TYPES, SURVIVED, "no tests", "other")


def mutmut(*words: str) -> str:
    return subprocess.run(
        [sys.executable, "-m", "mutmut", *words], check=True, capture_output=True, encoding="utf-8"
    ).stdout


def states() -> dict[str, str]:
    """Mutant → what became of it; those that were not tried are left out."""
    found = {}
    for line in mutmut("results", "--all", "true").splitlines():
        name, separator, state = line.strip().rpartition(": ")
        if separator and state != "not checked":
            found[name] = state
    return found


def change(name: str) -> str:
    """The lines that a mutant takes away and adds, as in the page."""
    lines = mutmut("show", name).splitlines()
    return "\n".join(
        f"{line[0]} {line[1:].strip()}" for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---")
    )


def place(name: str) -> str:
    """`recast_exp.recast.mixed.x__at_once__mutmut_5` is in `recast/mixed.py`."""
    return name.removeprefix("recast_exp.").rpartition(".")[0].replace(".", "/") + ".py"


def main() -> int:
    table = Table(box=None)
    for column in ("module", *COLUMNS):
        table.add_column(column, no_wrap=column == "module")
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    found = states()
    for name, state in found.items():
        counts[place(name)][state if state in COLUMNS else "other"] += 1
    for module in sorted(counts):
        table.add_row(module, *(str(counts[module][column]) for column in COLUMNS))
    table.add_section()
    table.add_row("all", *(str(sum(each[column] for each in counts.values())) for column in COLUMNS))
    Console().print(table)

    judged = PAGE.read_text(encoding="utf-8").partition(OPEN)[0]
    survivors = {name: change(name) for name, state in found.items() if state == SURVIVED}
    open_ones = {name: lines for name, lines in survivors.items() if lines not in judged}
    print(f"{len(survivors)} survived; docs/mutants.md does not judge {len(open_ones)} of them")
    for name, lines in open_ones.items():
        print(f"\n{name}\n{lines}")
    return int(bool(open_ones))


if __name__ == "__main__":
    sys.exit(main())
