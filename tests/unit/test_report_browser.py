"""The report in a real browser without network: it fits, nothing is logged, nothing foreign runs."""

import json
from collections.abc import Iterator
from pathlib import Path

import browser
import pytest
import report_support as support

from delo_eval.report.render import write_report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(browser.missing()), reason=browser.missing() or "nothing is missing"),
]

WIDTHS = (375, 768, 1280)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(support.hostile_run(tmp_path_factory.mktemp("hostile")))


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    with browser.Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def test_the_browser_would_tell_a_fault(chromium: browser.Browser, tmp_path: Path) -> None:
    """Without this, a page full of faults would pass the tests below as well."""
    bad = tmp_path / "bad.html"
    bad.write_text("<div style='width:2000px'>.</div><script>document.title='owned';nothing()</script>"
                   "<img src='https://example.com/x.png'>")  # fmt: skip
    chromium.open(bad, 375)
    told = "\n".join(chromium.console())
    assert "nothing is not defined" in told and "example.com" in told
    assert chromium.run("return document.title") == "owned"
    assert chromium.run("return document.documentElement.scrollWidth") > 375


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_fits_and_nothing_is_logged(chromium: browser.Browser, page: Path, width: int) -> None:
    chromium.console()
    chromium.open(page, width)
    assert chromium.run("return innerWidth") == width
    assert chromium.run("return document.documentElement.scrollWidth") <= width
    outside = f"e => !e.closest('.scroll, svg') && e.getBoundingClientRect().right > {width + 1}"
    every = "[...document.querySelectorAll('main *')]"
    wide = f"return {every}.filter({outside}).map(e => e.outerHTML.slice(0, 80))"
    assert chromium.run(wide) == []
    assert chromium.console() == []


def test_no_hostile_text_ran_and_nothing_was_asked_for(chromium: browser.Browser, page: Path) -> None:
    chromium.open(page)
    assert "owned" not in chromium.run("return document.title")
    assert chromium.run("return document.scripts.length") == 1
    assert chromium.run("return document.querySelectorAll('[onerror], [onload], svg svg').length") == 0
    broken = "return [...document.images].filter(i => !(i.complete && i.naturalWidth)).length"
    assert chromium.run("return document.images.length") > 10 and chromium.run(broken) == 0
    asked = chromium.run("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in asked if not name.startswith("data:")] == []


def test_tabs_sorting_and_filters_work(chromium: browser.Browser, page: Path) -> None:
    chromium.open(page)
    metrics = "[...document.querySelectorAll('#metrics table')][0]"
    column = f"return [...{metrics}.tBodies[0].rows].map(r => r.cells[0].textContent)"
    before = chromium.run(column)
    chromium.run(f"{metrics}.tHead.rows[0].cells[0].querySelector('button').click()")
    assert chromium.run(column) == sorted(before) != before
    assert chromium.run(f"return {metrics}.tHead.rows[0].cells[0].getAttribute('aria-sort')") == "ascending"
    chromium.run("""const s = document.querySelectorAll('#samples select')[1];
        s.value = 'right'; s.dispatchEvent(new Event('change'))""")
    shown = chromium.run("""return [...document.querySelectorAll('.sample')].filter(e => e.offsetParent)
        .map(e => e.dataset.verdict)""")
    assert shown and set(shown) == {"right"}


def test_tabs_show_one_panel_and_print_all(chromium: browser.Browser, page: Path, tmp_path: Path) -> None:
    """A second missing pattern is written into the results, so that there is something to choose."""
    file = page.parent / "results.json"
    results = json.loads(file.read_text())
    results["patterns"] = {"image": results["matrix"]}
    results["records"]["image"] = results["records"]["run"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "results.json").write_text(json.dumps(results))
    chromium.open(write_report(page.parent, other))
    shown = "return ['pattern-1', 'pattern-2'].map(id => document.getElementById(id).offsetParent !== null)"
    assert chromium.run(shown) == [True, False]
    chromium.run("document.getElementById('pattern-2-tab').click()")
    assert chromium.run(shown) == [False, True]
    chromium.cdp("Emulation.setEmulatedMedia", media="print")
    assert chromium.run(shown) == [True, True]
    chromium.cdp("Emulation.setEmulatedMedia", media="")
    chromium.pdf(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")


def test_dark_is_dark_and_print_is_light(chromium: browser.Browser, page: Path) -> None:
    ground = "return getComputedStyle(document.body).backgroundColor"
    chromium.open(page, prefers_color_scheme="light")
    assert chromium.run(ground) == "rgb(255, 255, 255)"
    chromium.open(page, prefers_color_scheme="dark")
    assert chromium.run(ground) == "rgb(17, 23, 29)"
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    chromium.cdp("Emulation.setEmulatedMedia", media="print", features=dark)
    assert chromium.run(ground) == "rgb(255, 255, 255)"
    chromium.cdp("Emulation.setEmulatedMedia", media="")
