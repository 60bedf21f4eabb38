"""What blind answers score, beside scores in results, terminal, report, comparison and `delo-eval score`."""

from pathlib import Path
from typing import Any, cast

import pytest
from comparison_support import outcomes, write_run
from rich.console import Console
from score_support import Bench, said

from delo_eval.compare.assemble import compare
from delo_eval.compare.leaderboard import markdown, sheets
from delo_eval.matrix.accuracy import AccuracyMatrix
from delo_eval.matrix.floors import Floor, floor_of, options_of
from delo_eval.matrix.plan import Plan
from delo_eval.matrix.results import Results, floor_rows, read_results
from delo_eval.matrix.table import final_table, stage_table
from delo_eval.report.content import read_content
from delo_eval.report.matrices import heat_table
from delo_eval.scorers.base import Reference, Scorer
from delo_eval.scorers.exact_match import SCORER
from delo_llava.data.recipe import read_recipe
from delo_llava.registry import load_plugin


def asked(*answers: str, **extra: Any) -> list[Reference]:
    return [Reference(str(i), answer, extra=extra) for i, answer in enumerate(answers)]


def scorer(name: str) -> Scorer:
    return cast(Scorer, load_plugin("scorer", name))


def test_the_most_frequent_answer_by_the_tasks_own_rule() -> None:
    found = floor_of(SCORER, asked("red", "Blue", "blue", "red.", "red"))
    assert found == Floor("exact_match.v2", 5, "red", 60.0, None)
    assert floor_of(scorer("contains"), asked("a red car", "red", "red")) == Floor(
        "contains.v2", 3, "red", pytest.approx(200 / 3), None
    )
    assert floor_of(SCORER, []) is None


def test_chance_draws_from_what_is_declared_or_said() -> None:
    three = floor_of(SCORER, asked("A", "B", "A", "a"), ["A", "B", "C"])
    assert three is not None and three.chance == pytest.approx(100 / 3) and three.majority == 75.0
    mixed = [*asked("B", choices=["x", "y"]), *asked("1", choices=["x", "y", "z", "w"])]
    found = floor_of(scorer("scienceqa"), mixed)
    assert found is not None and found.chance == pytest.approx(100 * (1 / 2 + 1 / 4) / 2)
    assert (found.answer, found.majority) == ("B", 100.0)  # an index is said as its letter
    classes = floor_of(
        scorer("class_exact"), asked("apple_pie", "tacos", classes=["apple_pie", "tacos", "nachos"])
    )
    assert classes is not None and classes.chance == pytest.approx(100 / 3)
    assert floor_of(SCORER, [*asked("x", choices=["x", "y"]), Reference("9", "x")]).chance is None  # type: ignore[union-attr]


def test_options_are_letters_or_the_choices_themselves() -> None:
    (letter,), (text,), (none,) = asked("C", choices=["x", "y"]), asked("y", choices=["x", "y"]), asked("x")
    assert [options_of(each) for each in (letter, text, none)] == [["A", "B"], ["x", "y"], []]


def test_rules_over_the_whole_task_have_a_constant_and_no_chance_and_slow_ones_neither() -> None:
    found = floor_of(scorer("multilabel_f1"), asked("drama", "drama", "war", classes=["drama", "war"]))
    # drama: 2 right of 3 said, 2 true, F1 .8; war: 0
    assert found is not None and found.majority == pytest.approx(40) and found.chance is None
    assert floor_of(scorer("caption"), asked("a man", captions=["a man"])) is None


def test_questions_that_do_not_count_make_no_floor() -> None:
    balanced = [*asked("yes", "no", "no", isBalanced=False), *asked("yes")]
    found = floor_of(scorer("gqa"), balanced)
    assert found is not None and (found.records, found.answer, found.majority) == (1, "yes", 100.0)


def test_results_keep_a_floor_until_rule_or_questions_change() -> None:
    results = Results(AccuracyMatrix(Plan.one_each(("ocr",))))
    results.note_floor("ocr", SCORER, asked("a", "b", "b"), ())
    first = results.floors["ocr"]
    assert first["majority"] == pytest.approx(200 / 3)
    results.note_floor("ocr", SCORER, asked("a", "a", "a"), ())
    assert results.floors["ocr"] is first
    results.note_floor("ocr", SCORER, asked("a", "a"), ())
    assert results.floors["ocr"]["majority"] == 100.0
    results.note_floor("ocr", scorer("caption"), asked("a", "a"), ())
    assert results.floors == {}


FLOORS = {"science": {"majority": 36.0, "chance": 100 / 3}, "ocr": {"majority": 2.5, "chance": None}}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", outcomes((0.5, 0.75)), floors=FLOORS)


def test_floors_stand_under_scores_in_the_terminal(run: Path) -> None:
    content = read_results(run)
    assert content is not None
    told_best = {**content["matrix"], "oracle": [[80.0, None], [80.0, 90.0]]}
    both = final_table({**content, "matrix": told_best})
    for table, rows in ((stage_table(content, 1), 1), (final_table(content), 1), (both, 2)):
        console = Console(width=200, record=True)
        console.print(table)
        told = [line.split("│")[1:-1] for line in console.export_text().splitlines()]
        cells = [[cell.strip() for cell in line] for line in told]
        constant = [line for line in cells if line and line[0] == "most frequent answer"]
        chance = [line for line in cells if line and line[0] == "chance"]
        assert len(constant) == len(chance) == rows
        assert constant[0][1:3] == ["36.00", "2.50"] and chance[0][1:3] == ["33.33", "-"]
    old = dict(content)
    del old["floors"]
    assert floor_rows(old) == []


def test_floors_stand_under_scores_in_report_and_comparison(run: Path, tmp_path: Path) -> None:
    table = heat_table(read_content(run), "run", "matched")
    assert table is not None
    rows = {name: [cell.text for cell in cells] for name, cells in table.rows}
    assert rows["most frequent answer"][:2] == ["36.0", "2.5"] and rows["chance"][:2] == ["33.3", "–"]
    other = write_run(tmp_path / "other", outcomes((0.6, 0.8), seed=3))
    comparison = compare([run, other], resamples=100)
    assert comparison.floors["chance"] == {"science": 100 / 3}
    (scores,) = (sheet for sheet in sheets(comparison) if sheet.title == "Scores after the last stage")
    assert [list(row) for row in scores.rows[2:]] == [
        ["most frequent answer", "36.00", "2.50"], ["chance", "33.33", "–"],
    ]  # fmt: skip
    assert not {row for row, _ in scores.best} & {2, 3}
    assert "| most frequent answer | 36.00 | 2.50 |" in markdown(comparison)
    assert comparison.to_json()["floors"]["most frequent answer"]["ocr"] == 2.5


def test_score_tells_them_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = Bench(tmp_path, capsys)
    bench.references([{"question_id": i, "text": "Q", "answer": word} for i, word in enumerate("ABBB")])
    bench.answers(said(dict(enumerate("ABCD"))))
    floor = bench.score("exact_match")["scores"]["native"]["floor"]
    assert floor == {
        "scorer": "exact_match.v2", "records": 4, "answer": "B", "majority": 75.0, "chance": None,
    }  # fmt: skip
    assert "blind (exact_match.v2): always 'B' 75.00\n" in capsys.readouterr().out
    bench.score("exact_match", "--task", "mini6/science")
    assert "always 'B' 75.00, chance 33.33\n" in capsys.readouterr().out


def test_mini_recipes_declare_their_closed_sets() -> None:
    for name in ("mini6", "mini8"):
        declared = {task.name: task.answers for task in read_recipe(name).tasks if task.answers}
        assert declared == {"science": ["A", "B", "C"], "yesno": ["yes", "no"]}
