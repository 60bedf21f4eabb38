"""The page about several runs: leaderboard, matrices side by side, curves over each other."""

import comparison_support
import pytest
from test_report import Page

from delo_eval.compare.assemble import compare
from delo_eval.report.compare import SECTIONS, mean_course, render_comparison
from delo_llava.config import RunConfig

SCORES = {"first": (0.9, 0.6), "second": (0.4, 0.5)}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("runs")
    folders = [
        comparison_support.write_run(
            root / name, comparison_support.outcomes(shares), config=RunConfig(method=method)
        )
        for (name, shares), method in zip(SCORES.items(), ("delo", "lora"), strict=True)
    ]
    file = render_comparison(compare(folders, resamples=200), root / "page")
    assert file == root / "page" / "compare.html"
    return file.read_text(encoding="utf-8")


def test_every_part_is_there(page: str) -> None:
    found = Page(page)
    assert [s["id"] for s in found.all("section")] == [id for id, _ in SECTIONS]
    assert "Paired bootstrap" in page and "90.00" in page and "40.00" in page
    assert '<strong title="best, or within its error">' in page
    heats = [t for t in found.all("table") if t.get("class") == "heat"]
    assert len(heats) == 2
    assert page.count('class="legend"') == 3  # the mean and both tasks, two lines each


def test_nothing_is_loaded_from_anywhere(page: str) -> None:
    for tag, attributes in Page(page).tags:
        for name in ("src", "href", "action"):
            target = attributes.get(name)
            assert target is None or target.startswith(("data:", "#")), (tag, target)


def test_courses_are_averaged_where_all_have_them() -> None:
    assert mean_course([[(0, 10.0), (1, 20.0)], [(0, 30.0)]]) == [(0, 20.0)]
    assert mean_course([]) == []
