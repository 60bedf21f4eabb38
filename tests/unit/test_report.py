"""The report of a run: what it holds, that it needs nothing from outside, that hostile texts stay texts."""

import json
import math
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import report_support as support
import tiny_models
import torch
from training_support import words, write_sequence

from delo_eval.answers.routing_use import merge_use_parts, read_use, use_file, write_use_part
from delo_eval.cli import main
from delo_eval.harness.stage import evaluate_stage
from delo_eval.report import render as render_module
from delo_eval.report.charts import Chart, Line, drawn, number_text, ticks
from delo_eval.report.colour import STEPS, contrast, hex_of, palette, palette_css, step_of, text_on
from delo_eval.report.content import read_content
from delo_eval.report.matrices import heat_table, without_choice
from delo_eval.report.render import FAILED, SECTIONS, try_report, write_report
from delo_eval.report.routing import entropy, pool_use
from delo_eval.report.samples import gallery, samples
from delo_eval.report.summary import omitted, progress, warnings
from delo_llava.cli import resolve
from delo_llava.errors import DeloError
from delo_llava.methods.delo.router import Selection
from delo_llava.methods.delo.use import RoutingUse

STYLE = Path(render_module.__file__).parent / "templates" / "style.css"


class Page(HTMLParser):
    """The elements of a page, as a browser without scripts would see them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return support.hostile_run(tmp_path_factory.mktemp("hostile"))


@pytest.fixture(scope="module")
def page(hostile: Path) -> str:
    return write_report(hostile).read_text(encoding="utf-8")


# ---- a page that needs nothing and runs nothing foreign


def test_every_section_is_there_and_linked(page: str) -> None:
    found = Page(page)
    assert [s["id"] for s in found.all("section")] == [id for id, _ in SECTIONS]
    assert {f"#{id}" for id, _ in SECTIONS} <= {a["href"] for a in found.all("a")}


def test_nothing_is_loaded_from_anywhere(page: str) -> None:
    for tag, attributes in Page(page).tags:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            target = attributes.get(name)
            assert target is None or target.startswith(("data:", "#")), (tag, target)
    assert not re.search(r"url\(|@import|https?://", page)


def test_hostile_texts_stay_texts(page: str) -> None:
    found = Page(page)
    assert len(found.all("script")) == 1
    assert not [a for _, attributes in found.tags for a in attributes if a.startswith("on")]
    assert all((image["src"] or "").startswith("data:image/") for image in found.all("img"))
    assert "&lt;script&gt;document.title" in page
    policy = next(m["content"] for m in found.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and "default-src 'none'" in policy and "script-src 'sha256-" in policy


def test_without_scripts_nothing_is_hidden(page: str) -> None:
    assert not [tag for tag, attributes in Page(page).tags if "hidden" in attributes]


def test_tables_have_headers_and_scroll_in_their_own_box(page: str) -> None:
    found = Page(page)
    assert found.all("table") and len(found.all("caption")) == len(found.all("table"))
    assert {th.get("scope") for th in found.all("th")} == {"row", "col"}
    boxes = [d for d in found.all("div") if d.get("class") == "scroll"]
    assert len(boxes) == len(found.all("table")) and all(b.get("tabindex") == "0" for b in boxes)
    assert all(image.get("alt") for image in found.all("img"))
    assert all(svg.get("aria-labelledby") or svg.get("aria-hidden") for svg in found.all("svg"))


def test_an_unfinished_run_says_so(hostile: Path, page: str) -> None:
    content = read_content(hostile)
    assert progress(content) == (2, 3)
    assert "2 of 3 stages evaluated" in page
    assert support.SCRIPT in warnings(content)
    assert any("not finished" in line for line in warnings(content))


def test_samples_show_every_verdict_and_say_why_an_image_is_absent(hostile: Path) -> None:
    found = samples(read_content(hostile))
    assert {s.verdict for s in found} == {"right", "wrong", "partly"}
    plain = [s for s in found if s.row["task"] == "plain"]
    assert len(plain) == support.COUNT and all(s.record is not None and s.prompt for s in plain)
    pictured = [s for s in plain if s.image]
    assert len(pictured) == 3 and all(s.image.startswith("data:image/webp;base64,") for s in pictured)
    assert all("there is no such file" in s.fault for s in plain if not s.image)
    assert all("not where the run found it" in s.fault for s in found if s.record is None)


def test_the_data_may_be_gone(hostile: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(hostile, run)
    config = (run / "config.yaml").read_text().replace(str(hostile / "data"), str(tmp_path / "nowhere"))
    (run / "config.yaml").write_text(config)
    found = samples(read_content(run))
    assert found and all(s.record is None and "not where the run found it" in s.fault for s in found)
    write_report(run)


def test_chosen_samples_are_the_same_every_time_and_mixed() -> None:
    seen = [{"image": i % 3 > 0, "text": True} for i in range(60)]
    rows = [{"task": "t", "record_id": str(i), "score": i % 2, "presence": p} for i, p in enumerate(seen)]
    picked = gallery(rows)
    assert picked == gallery(rows[::-1]) and len(picked) == 6
    assert len({(row["score"], row["presence"]["image"]) for row in picked}) == 4


def test_records_without_a_choice_are_counted_in_words() -> None:
    told = {"fallback": {"ocr": 2}, "void_without_instruction": {"science": 1}}
    assert without_choice(told) == [
        "ocr: 2 records showed nothing to choose by in all views and were answered as the first task",
        "science: 1 records got no choice without the instruction and count as wrong",
    ]


def test_standard_errors_stand_in_their_cells(hostile: Path) -> None:
    content = read_content(hostile)
    rows: list[list[float | None]] = [[2.34, None, None], [3.46, 4.56, None], [None] * 3]
    known = {"run": {"matched": rows, "oracle": rows, "zero_shot": [None] * 3}}
    content = replace(content, results={**content.results, "standard_errors": known})
    table = heat_table(content, "run", "matched")
    assert table is not None
    assert [[cell.note for cell in cells[:3]] for _, cells in table.rows] == [
        ["± 2.3", "", ""],
        ["± 3.5", "± 4.6", ""],
        ["", "", ""],
    ]
    assert [cell.text for cell in table.rows[2][1]] == ["+0.0", "–", "–", "+0.0"]


def test_what_was_left_out_is_one_table_where_there_is_anything(hostile: Path, tmp_path: Path) -> None:
    assert omitted(read_content(hostile)) == []
    assert "Left out" not in write_report(hostile).read_text(encoding="utf-8")
    run = Path(shutil.copytree(hostile, tmp_path / "run"))
    trained = {"plain": {"omitted": {"plain": {"contexts_cut": 1200, "records_skipped": 1}}}}
    (run / "run.json").write_text(json.dumps({"stages": trained}))
    results = json.loads((run / "results.json").read_text())
    results["omitted"] = {
        "1": {"run": {"plain": {"answers_unended": 4}}, "text": {support.TASK: {"instructions_cut": 2}}},
        "zero_shot": {"run": {"plain": {"answers_unended": 6}}},
    }
    (run / "results.json").write_text(json.dumps(results))
    assert omitted(read_content(run)) == [
        ["plain", "plain", "train", "1,200", "–", "–", "1", "–", "–", "–"],
        ["zero-shot", "plain", "test", "–", "–", "–", "–", "6", "–", "–"],
        [support.TASK, "plain", "test", "–", "–", "–", "–", "4", "–", "–"],
        [support.TASK, support.TASK, "test (text)", "–", "2", "–", "–", "–", "–", "–"],
    ]
    text = write_report(run).read_text(encoding="utf-8")
    assert text.count("Left out, in records") == 2
    assert "answers ended by max_new_tokens" in text.replace("<wbr>", "")


def test_nothing_is_dark_on_a_dark_screen_and_light_on_a_light_one() -> None:
    light, dark = palette_css().split("@media screen and (prefers-color-scheme:dark)")
    first, last = (f"background:{hex_of(colour)}" for colour in (palette()[0], palette()[-1]))
    assert f".q0{{{first}" in light and f".q20{{{last}" in light
    assert f".q0{{{last}" in dark and f".q20{{{first}" in dark


# ---- a fault of the page is told, and loses nothing


def test_a_failing_report_is_recorded_and_a_later_one_clears_it(
    hostile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(hostile, run)
    log = run / "logs" / "metrics.jsonl"
    whole = log.read_text()
    log.write_text("{damaged\n" + whole)
    before = (run / "results.json").read_bytes()
    assert try_report(run, run) is None
    assert "Line 1 of the log is damaged" in (run / FAILED).read_text()
    assert "delo-eval report --run" in capsys.readouterr().err
    assert (run / "results.json").read_bytes() == before
    log.write_text(whole + '{"stage": 1, "ta')  # cut off by a kill: no fault
    assert try_report(run, run) == run / "report.html"
    assert not (run / FAILED).exists()


def test_nothing_to_report_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DeloError, match="no results"):
        write_report(tmp_path)
    with pytest.raises(SystemExit) as left:
        main(["report", "--run", str(tmp_path)])
    assert left.value.code == 2
    assert "evaluate a stage first" in capsys.readouterr().err


def test_the_command_makes_the_page_again(hostile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (hostile / "report.html").unlink(missing_ok=True)
    assert main(["report", "--run", str(hostile)]) == 0
    assert "report.html" in capsys.readouterr().out
    assert (hostile / "report.html").stat().st_size < 2_000_000


# ---- colours and charts


def test_text_on_the_palette_is_readable() -> None:
    colours = palette()
    assert len(colours) == STEPS
    for colour in colours:
        ink = (0, 0, 0) if text_on(colour) == "#000" else (255, 255, 255)
        assert contrast(colour, ink) >= 4.5
    lightness = [contrast(colour, (0, 0, 0)) for colour in colours]
    assert lightness == sorted(lightness, reverse=True)
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
    assert [step_of(v) for v in (-5, 0, 50, 100, 120)] == [0, 0, 10, 20, 20]


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_both_themes_have_contrast(theme: int) -> None:
    block = re.findall(r":root\{([^}]*)\}", STYLE.read_text())[theme]
    found = {n: tuple(bytes.fromhex(h if len(h) == 6 else "".join(c * 2 for c in h)))
             for n, h in re.findall(r"--(\w+):#([0-9a-f]{3,6})", block)}  # fmt: skip
    for ground in ("page", "card"):
        assert contrast(found["ink"], found[ground]) >= 7
        assert all(contrast(found[n], found[ground]) >= 4.5 for n in ("soft", "link", "good", "bad"))
        assert all(contrast(found[f"s{i}"], found[ground]) >= 3 for i in range(8))
    assert contrast(found["warnink"], found["warn"]) >= 4.5


def test_ticks_are_round_and_cover_the_data() -> None:
    assert ticks(0, 100) == [0, 25, 50, 75, 100]
    assert ticks(3, 3)[0] < 3 < ticks(3, 3)[-1]
    assert ticks(0, 0.0021)[-1] >= 0.0021
    assert [number_text(v) for v in (0.0005, 45, 67.5, 0, 1234)] == ["0.0005", "45", "67.5", "0", "1.23e+03"]


def test_a_chart_of_one_point_and_of_none() -> None:
    assert drawn(Chart("empty", [Line("a", [])])) is None
    figure = drawn(Chart("one", [Line("a", [(2, 50.0)])], y_range=(0, 100)))
    assert figure is not None and figure.lines[0]["spots"] and not figure.lines[0]["path"]


# ---- routing


def test_routing_is_counted_per_pool() -> None:
    index = torch.tensor([[[0, 1], [2, 3]], [[0, 2], [2, 3]], [[1, 3], [0, 3]]])  # B 3, S 2, r 2
    blank = torch.zeros(3, 1)
    chosen = Selection(index, index, index[:, :1], index[:, :1], None, None, blank, blank, blank, blank)
    use = RoutingUse()
    presence = torch.tensor([[True, True], [False, True], [True, True]])
    use.add(chosen, ["a", "a", "b"], presence, 4)
    use.add(chosen, ["a", "a", "b"], presence, 4)
    pools = {(p["task"], p["modality"], p["present"], p["part"]): p for p in use.take()}
    assert pools["a", "image", True, "A"] == {
        "task": "a", "modality": "image", "present": True, "part": "A", "rows": 2,
        "counts": [[2, 2, 0, 0], [0, 0, 2, 2]],
    }  # fmt: skip
    assert pools["a", "image", False, "B"]["counts"] == [[2, 0, 2, 0], [0, 0, 2, 2]]
    assert pools["a", "text", True, "A"]["rows"] == 4
    assert pools["b", "text", True, "A"]["counts"] == [[0, 2, 0, 2]]
    assert use.take() == []


def test_figures_of_a_pool_by_hand() -> None:
    assert entropy([4, 4, 0, 0]) == pytest.approx(0.5) and entropy([0, 8]) == 0 and entropy([3, 3]) == 1
    found = {True: {"rows": 4, "counts": [[4, 4, 0, 0], [2, 2, 2, 2]]},
             False: {"rows": 4, "counts": [[4, 0, 4, 0], [2, 2, 2, 2]]}}  # fmt: skip
    use = pool_use("t", "image", "A", found)
    assert (use.rows, use.shown, use.linears, use.factors) == (8, 50, 2, 4)
    first = -(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25)) / math.log(4)
    assert use.entropy == pytest.approx(100 * (first + 1) / 2)
    assert use.dead == pytest.approx(100 / 8) and use.fixed == pytest.approx(100 / 8)
    assert use.top == pytest.approx(100 * (0.5 + 0.25) / 2)
    assert use.shift == pytest.approx(100 * (0.5 + 0) / 2)
    assert use.map.startswith("data:image/png;base64,")


def test_ranks_add_up_and_fewer_samples_do_not_replace_more(tmp_path: Path) -> None:
    file = use_file(tmp_path, 0, "run", "plain")
    use = support._use("plain")
    for rank in (0, 1):
        write_use_part(file, rank, use)
    merge_use_parts(file)
    assert {pool["rows"] for pool in read_use(file)["pools"]} == {8}
    assert read_use(file)["pools"][0]["counts"][0] == [8, 8, 0, 0]
    write_use_part(file, 0, use)
    merge_use_parts(file)
    assert {pool["rows"] for pool in read_use(file)["pools"]} == {8}
    assert [f.name for f in file.parent.iterdir()] == ["plain.json"]
    write_use_part(file, 0, None)
    merge_use_parts(file)
    file.write_text(json.dumps({"schema": "other"}))
    with pytest.raises(DeloError, match="another schema"):
        read_use(file)


# ---- the whole way


@pytest.mark.slow
def test_training_leaves_a_report_after_each_stage(tmp_path: Path) -> None:
    from delo_llava.runs.job import make_job
    from delo_llava.runs.sequence import run_sequence

    recipe = write_sequence(tmp_path / "data")
    given = words(recipe, tiny_models.session("llava"), tmp_path / "run", "--method=delo")
    given = [word for word in given if not word.startswith("--lora")] + ["--eval.num_beams=2"]
    small = ("pool_size=4", "rank=2", "latent=4", "ridge_samples=8")
    made: list[str] = []

    def evaluate(run: Path, stage: int) -> None:
        evaluate_stage(run, stage)
        made.append((run / "report.html").read_text(encoding="utf-8"))

    run_sequence(make_job(resolve([*given, *(f"--delo.{option}" for option in small)])), evaluate)
    assert [f"{k} of 2 stages evaluated" in text for k, text in enumerate(made)] == [True] * 3
    last = read_content(tmp_path / "run")
    for task in last.tasks:
        for pattern in ("run", "complete", "image", "text"):
            use = read_use(use_file(tmp_path / "run", 1, pattern, task))
            _check_use(use, last.results["records"][pattern][task])
    assert "Use of the expert pools" in made[-1] and "learning-1" in made[-1]
    for section in ("choice", "routing"):  # the base has neither
        assert [f'id="{section}"' in text for text in (made[0], made[-1])] == [False, True]
        assert [f'href="#{section}"' in text for text in (made[0], made[-1])] == [False, True]


def _check_use(use: dict[str, Any], records: int) -> None:
    """Every sample chose r factors in every linear, once for its answer, again where the choice was wrong."""
    rows: dict[tuple[str, str], int] = {}
    for pool in use["pools"]:
        rows[pool["modality"], pool["part"]] = rows.get((pool["modality"], pool["part"]), 0) + pool["rows"]
        assert {sum(line) for line in pool["counts"]} == {2 * pool["rows"]}
        assert len(pool["counts"]) == len(use["layers"][pool["modality"]])
    assert all(records <= count <= 2 * records for count in rows.values()) and len(rows) == 4
