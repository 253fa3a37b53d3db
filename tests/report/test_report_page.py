"""The page of a report in a real browser, opened from disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select, WebDriverWait

from recast_exp.report import exports
from recast_exp.report.build import write_report
from recast_exp.report.reading import read_jobs
from recast_exp.report.table import tabulate
from support.fake_sweep import METHODS, write_sweep

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
)

pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason="needs chromium and chromedriver")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_sweep(tmp_path_factory.mktemp("page") / "a sweep")
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def browser(sweep: Path) -> Iterator[webdriver.Chrome]:
    """The page as a phone shows it, with all charts drawn."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    try:
        screen = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        driver.get((sweep / "report" / "report.html").as_uri())
        WebDriverWait(driver, 60).until(lambda it: it.execute_script("return document.documentElement.dataset.ready"))
        yield driver
    finally:
        driver.quit()


def texts(browser: webdriver.Chrome, selector: str) -> list[list[str]]:
    """The texts of a table's rows, spaces and breaks as one space."""
    script = """return [...document.querySelectorAll(arguments[0])].map(
        (row) => [...row.cells].map((cell) => cell.textContent.trim().replace(/\\s+/g, " ")))"""
    found: list[list[str]] = browser.execute_script(script, selector)
    return found


def test_nothing_goes_wrong_and_nothing_is_fetched(browser: webdriver.Chrome, sweep: Path) -> None:
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"]
    assert (sweep / "report" / "report.html").as_uri() in sent
    assert {urlsplit(url).scheme for url in sent} <= {"file", "data", "blob"}
    assert sum(url.startswith("file:") for url in sent) == 1


def test_the_table_has_the_right_cells(browser: webdriver.Chrome, sweep: Path) -> None:
    head, *cells = exports.table(tabulate(read_jobs(sweep).jobs))
    [shown] = texts(browser, "#results thead tr")
    names = list(map(str, head))
    assert sorted(shown) == sorted(names)
    order = [names.index(name) for name in shown]  # the page begins with the average, for small screens
    cells = [[row[at] for at in order] for row in cells]
    assert texts(browser, "#results tbody tr") == [list(map(str, row)) for row in cells]
    marked = browser.execute_script("return [...document.querySelectorAll('#results td')].map(e => e.className)")
    expected = [bool(cell.note) for row in cells for cell in row[1:]]
    assert ["partial" in name for name in marked] == expected


def test_a_phone_shows_all_of_it(browser: webdriver.Chrome) -> None:
    width, shown = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert width == shown == 390
    inner, outer = browser.execute_script(
        "const box = document.querySelector('#results .scroll'); return [box.scrollWidth, box.clientWidth]"
    )
    assert inner > outer  # the table scrolls in its own box


def test_a_click_sorts(browser: webdriver.Chrome) -> None:
    browser.find_element(By.XPATH, "//section[@id='results']//button[.='average']").click()
    averages = [row[1] for row in texts(browser, "#results tbody tr")]
    assert averages[-2:] == ["– (5 of 6 datasets)"] * 2
    values = [float(cell.split()[0]) for cell in averages[:-2]]
    assert values == sorted(values, reverse=True)
    browser.find_element(By.XPATH, "//section[@id='results']//button[.='method']").click()
    names = [row[0] for row in texts(browser, "#results tbody tr")]
    assert sorted(names) == sorted(METHODS)
    assert names.index("AdaptFormer") < names.index("BitFit") < names.index("MeLo")


def test_any_two_methods_are_compared(browser: webdriver.Chrome) -> None:
    first, second = (Select(browser.find_element(By.NAME, name)) for name in ("first", "second"))
    first.select_by_value("linear probe")
    second.select_by_value("RECAST-Att")
    told = browser.find_element(By.ID, "pair-result").text
    assert told.startswith("linear probe − RECAST-Att: −1.1 points (−1.3 to −0.8). p")
    assert "over 18 pairs (at least 7.6e-06)" in told
    assert "over 6 datasets (at least 0.031)" in told
    first.select_by_value("RECAST-Att")
    second.select_by_value("linear probe")
    told = browser.find_element(By.ID, "pair-result").text
    assert told.startswith("RECAST-Att − linear probe: +1.1 points (0.8 to 1.3). p")
    first.select_by_value("linear probe")
    assert browser.find_element(By.ID, "pair-result").text == "Choose two methods."


def test_the_charts_are_drawn_and_answer(browser: webdriver.Chrome) -> None:
    count = (
        "return [...document.querySelectorAll('section.chart')].map(s => [s.id, s.querySelector('.plot').data?.length])"
    )
    assert browser.execute_script(count) == [["accuracy", 10], ["curves", 12], ["coefficients", 6]]
    drawn = "return document.querySelectorAll('#accuracy .plot .scatterlayer .trace').length"
    assert browser.execute_script(drawn) == 10
    browser.execute_script("document.querySelector('#accuracy .legend button').click()")
    assert browser.execute_script(drawn) == 9
    Select(browser.find_element(By.CSS_SELECTOR, "#accuracy select")).select_by_value("flowers")
    assert browser.execute_script("return document.querySelector('#accuracy .plot').data.length") == 12
    assert browser.execute_script(drawn) == 11  # what was hidden stays hidden
    assert browser.get_log("browser") == []


def test_the_theme_follows_the_system(browser: webdriver.Chrome) -> None:
    seen: set[str] = set()
    script = """return [getComputedStyle(document.body).backgroundColor,
        document.querySelector('#curves .plot').layout.font.color]"""
    for theme in ("light", "dark"):
        media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        # The page and the plots in it change one after the other
        WebDriverWait(browser, 10).until(lambda it: seen.isdisjoint(it.execute_script(script)))
        colors = browser.execute_script(script)
        assert (colors[0] == "rgb(255, 255, 255)") is (theme == "light")
        seen.update(colors)
