"""The report's page in a browser: it works from disk, asks the network for nothing, and fits a
phone.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from layerwise.cli import main
from tests.test_report import EVIL, runs  # noqa: F401  a fixture

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="chromium or chromedriver is not installed"
)
FLAGS = (
    *(
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
    ),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)


@pytest.fixture(scope="module")
def address(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> str:  # noqa: F811
    output = tmp_path_factory.mktemp("browser") / "report.html"
    main(["report", str(runs), "--output", str(output)])
    return output.as_uri()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


def show_at(browser: Any, width: int) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def open_page(browser: Any, address: str, width: int = 1280) -> None:
    show_at(browser, width)
    browser.get("about:blank")
    browser.get_log("performance")
    browser.get_log("browser")
    browser.get(address)
    browser.execute_script("document.documentElement.style.scrollBehavior = 'auto'")
    browser.execute_async_script(
        "requestAnimationFrame(() => requestAnimationFrame(arguments[0]))"
    )  # laid out at this width


def requests(browser: Any) -> list[str]:
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [
        m["params"]["request"]["url"]
        for m in messages
        if m["method"] == "Network.requestWillBeSent"
    ]


def column(table: Any, index: int) -> list[str]:
    return [
        row.find_elements(By.CSS_SELECTOR, "th,td")[index].text
        for row in table.find_elements(By.CSS_SELECTOR, "tbody tr")
    ]


def test_it_opens_without_errors_or_requests(browser: Any, address: str) -> None:
    open_page(browser, address)
    browser.execute_script(
        "for (const details of document.querySelectorAll('details')) details.open = true"
    )
    browser.execute_script("scrollTo(0, document.body.scrollHeight)")
    browser.implicitly_wait(5)
    assert browser.find_elements(By.CSS_SELECTOR, "#run-0 .run dl")
    assert browser.get_log("browser") == []
    assert [url for url in requests(browser) if not url.startswith("data:")] == [address]
    assert (
        browser.title == "layerwise: the paper, row by row"
    )  # no name in a folder was run as a script
    assert EVIL in browser.find_element(By.ID, "runs").text
    assert len(browser.find_elements(By.CSS_SELECTOR, "#tables table")) >= 6


def test_every_figure_is_drawn(browser: Any, address: str) -> None:
    open_page(browser, address)
    for name, mark in (
        ("figure-1-paper", "rect"),
        ("figure-1-small", ".whisker"),
        ("figure-4-small", ".band"),
        ("depth-5-resnet18-small", "rect"),
    ):
        figure = browser.find_element(By.ID, f"figure-{name}")
        assert figure.find_elements(By.CSS_SELECTOR, f".chart > div svg {mark}"), name
    assert len(figure.find_elements(By.CLASS_NAME, "chart")) == 6  # three of each column
    bars = browser.find_element(By.ID, "figure-figure-1-paper")
    assert "72.45" in bars.text
    assert "resnet18 [2,2,2,2]: layer-wise 62.32, global 72.45" in bars.find_elements(
        By.CSS_SELECTOR, "[role=img]"
    )[1].get_attribute("aria-label")


def test_claims_over_scales_fit_a_screen(browser: Any, address: str) -> None:
    open_page(browser, address)
    table = browser.find_element(By.CSS_SELECTOR, "#scales table")
    assert table.size["width"] <= 1280
    assert table.find_element(By.CSS_SELECTOR, "tbody th").size["width"] > 250


def test_tables_sort_by_click_and_by_key(browser: Any, address: str) -> None:
    open_page(browser, address)
    table = next(
        one
        for one in browser.find_elements(By.CSS_SELECTOR, "#tables table")
        if "Table V beside" in one.find_element(By.TAG_NAME, "caption").text
    )
    buttons = table.find_elements(By.CSS_SELECTOR, "thead button")
    buttons[2].send_keys(Keys.ENTER)
    values = [float(text) for text in column(table, 2)]
    assert values == sorted(values)
    buttons[5].click()
    values = [float(text.split()[0]) for text in column(table, 5)]
    assert values == sorted(values)
    buttons[5].click()
    values = [float(text.split()[0]) for text in column(table, 5)]
    assert values == sorted(values, reverse=True)
    orders = [button.find_element(By.XPATH, "..").get_attribute("aria-sort") for button in buttons]
    assert orders[5] == "descending"
    assert set(orders[:5]) == {"none"}


def test_values_are_read_by_pointer_and_by_keys(browser: Any, address: str) -> None:
    open_page(browser, address)
    chart = browser.find_element(By.CSS_SELECTOR, "#charts .chart")
    svg, tip = chart.find_element(By.TAG_NAME, "svg"), chart.find_element(By.CLASS_NAME, "tip")
    assert not tip.is_displayed()
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", svg)
    ActionChains(browser).move_to_element(svg).perform()
    assert tip.is_displayed()
    assert tip.text.startswith("epoch ")
    assert "layer-wise" in tip.text
    svg.send_keys(Keys.END)
    last = tip.text.splitlines()[0]
    svg.send_keys(Keys.ARROW_LEFT)
    assert int(tip.text.splitlines()[0].split()[1]) == int(last.split()[1]) - 1


def test_a_chart_that_is_drawn_anew_keeps_what_was_being_read(browser: Any, address: str) -> None:
    open_page(browser, address, 1280)
    chart = browser.find_element(By.CSS_SELECTOR, "#charts .chart")
    svg, tip = chart.find_element(By.TAG_NAME, "svg"), chart.find_element(By.CLASS_NAME, "tip")
    svg.send_keys(Keys.END)
    read, room = tip.text, svg.get_dom_attribute("viewBox")
    show_at(browser, 700)
    WebDriverWait(browser, 10).until(lambda _: svg.get_dom_attribute("viewBox") != room)
    assert tip.text == read
    cursor = chart.find_element(By.CLASS_NAME, "cursor")
    assert cursor.get_attribute("visibility") == "visible"
    assert float(cursor.get_attribute("x1")) < float(svg.get_dom_attribute("viewBox").split()[2])


def test_values_are_read_by_touch(browser: Any, address: str) -> None:
    open_page(browser, address, 375)
    chart = browser.find_element(By.CSS_SELECTOR, "#charts .chart")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", chart)
    place = browser.execute_script(
        "return arguments[0].getBoundingClientRect().toJSON()",
        chart.find_element(By.TAG_NAME, "svg"),
    )
    point = {"x": place["x"] + place["width"] / 2, "y": place["y"] + place["height"] / 2}
    browser.execute_cdp_cmd(
        "Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [point]}
    )
    browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    assert chart.find_element(By.CLASS_NAME, "tip").text.startswith(
        "epoch "
    )  # stays when the finger is lifted


def test_a_run_shows_where_its_features_are_separable(browser: Any, address: str) -> None:
    open_page(browser, address)
    index = browser.execute_script("return DATA.runs.findIndex((run) => run.separable)")
    details = browser.find_element(By.ID, f"run-{index}")
    browser.execute_script("arguments[0].open = true", details)
    WebDriverWait(browser, 10).until(lambda _: details.find_elements(By.TAG_NAME, "details"))
    charts = {
        chart.find_element(By.TAG_NAME, "h4").text: chart
        for chart in details.find_elements(By.CLASS_NAME, "chart")
    }
    for kind, range_of_it in (
        ("effective rank of each unit's features", "dark 2.50, bright 12.50;"),
        (
            "gain of each unit, its output's separability less its input's",
            "dark -2.0 points, bright 1.25 points;",
        ),
    ):
        assert charts[f"Over depth: {kind}"].find_elements(By.TAG_NAME, "path")
        assert range_of_it in charts[f"Over depth and epochs: {kind}"].text
    assert "-2" in charts[f"Over depth: {kind}"].text.split()  # nothing below 0 is cut off
    measured = details.find_elements(By.TAG_NAME, "details")[-1]
    browser.execute_script("arguments[0].open = true", measured)
    assert "Separability of the features after epoch 20, on held-out images" in measured.text
    row = measured.find_elements(By.CSS_SELECTOR, "tbody tr")[3].text.split()
    assert (row[0], row[1], row[-2:]) == ("stages.2.conv", "8×8", ["1.25", "yes"])


def test_a_run_shows_its_early_exits(browser: Any, address: str) -> None:
    open_page(browser, address)
    index, units = browser.execute_script(
        "const index = DATA.runs.findIndex((run) => run.exits);"
        "return [index, DATA.runs[index].exits.accuracy.length - 1]"
    )
    details = browser.find_element(By.ID, f"run-{index}")
    browser.execute_script("arguments[0].open = true", details)
    WebDriverWait(browser, 10).until(lambda _: details.find_elements(By.TAG_NAME, "details"))
    chart = next(
        chart
        for chart in details.find_elements(By.CLASS_NAME, "chart")
        if chart.find_element(By.TAG_NAME, "h4").text.startswith("Early exits")
    )
    svg, tip = chart.find_element(By.TAG_NAME, "svg"), chart.find_element(By.CLASS_NAME, "tip")
    drawn = chart.find_elements(By.CSS_SELECTOR, "div > svg path:not(.series)")
    assert len(drawn) == units + 1  # a mark each, and one of the ensemble
    svg.send_keys(Keys.END)
    assert tip.text.startswith("ensemble of all heads: 12,000,000 multiply-adds")
    svg.send_keys(Keys.HOME)
    assert "stages.0.conv: 1,000,000 multiply-adds" in tip.text


def test_a_run_opens_from_the_table_and_is_found(browser: Any, address: str) -> None:
    open_page(browser, address)
    link = browser.find_element(By.CSS_SELECTOR, "#runs tbody a[href='#run-0']")
    assert (
        browser.find_element(By.CSS_SELECTOR, "#run-0 .run").get_attribute("childElementCount")
        == "0"
    )  # drawn when opened
    browser.execute_script("arguments[0].click()", link)
    details = browser.find_element(By.ID, "run-0")
    assert details.get_attribute("open")
    assert "layerwise train" in details.find_element(By.TAG_NAME, "pre").text
    assert details.find_elements(By.CSS_SELECTOR, ".chart svg")
    browser.find_element(By.ID, "find").send_keys("resnet50 1,2,8,5 global")
    assert browser.find_element(By.ID, "found").text.startswith("2 of ")
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("width", [1280, 375])
def test_nothing_overflows_the_page(width: int, browser: Any, address: str) -> None:
    open_page(browser, address, width)
    browser.execute_script(
        "for (const details of document.querySelectorAll('details')) details.open = true"
    )
    seen = browser.execute_script(
        "return [document.documentElement.scrollWidth, document.documentElement.clientWidth, "
        "innerWidth]"
    )
    assert seen[0] <= seen[1], seen
    assert seen[2] == width
    inside = "(box) => box.getBoundingClientRect().right <= innerWidth"
    assert browser.execute_script(
        f"return [...document.querySelectorAll('.scroll, .chart')].every({inside})"
    )
