"""The page of results shows what its records hold."""

from __future__ import annotations

import csv
import re
import runpy
import statistics
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from scipy import stats

ROOT = Path(__file__).parents[2]
SWEEP = ROOT / "tests/regression/files/sweep"


@pytest.fixture(scope="module")
def script() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(ROOT / "docs/results/make_page.py")))


def test_the_tables_are_those_of_the_records(script: SimpleNamespace) -> None:
    page = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    assert script.with_tables(page) == page


def test_the_differences_are_those_of_the_paired_t_test(script: SimpleNamespace) -> None:
    """An independent calculation from the file, against the text of the page."""
    page = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    found: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    with script.RECORDS.open(encoding="utf-8") as file:
        for each in csv.DictReader(file):
            found[each["dataset"], each["method"]][int(each["draw"])] = 100 * float(each["test"])
    compared = 0
    for (dataset, method), values in found.items():
        probe = found[dataset, "linear probe"]
        if method == "linear probe" or len(values) < len(probe):
            continue
        low, high = stats.ttest_rel(list(values.values()), [probe[draw] for draw in values]).confidence_interval(0.95)
        section = page.split(f"<!-- records: {dataset} -->")[1].split("<!-- end -->")[0]
        (row,) = re.findall(rf"^\| {re.escape(method)} \|.*$", section, re.MULTILINE)
        mean = statistics.fmean(values[draw] - probe[draw] for draw in values)
        cells = [cell.strip().replace("−", "-") for cell in row.split("|")]
        assert float(cells[4].split(" ± ")[0]) == pytest.approx(mean, abs=0.051)
        assert [float(text) for text in cells[5].split(" to ")] == pytest.approx([low, high], abs=0.051)
        compared += 1
    assert compared >= 2


def test_records_are_taken_from_a_folder_once(
    script: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(script.add.__globals__, "RECORDS", tmp_path / "records.csv")
        before = len(script.read())
        script.add(SWEEP)
        added = len(script.read()) - before
        assert added > 0
        script.add(SWEEP)
        assert len(script.read()) - before == added
    assert f"{before + added} in all" in capsys.readouterr().out
