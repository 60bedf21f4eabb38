"""Stages that are no tasks: one stage of all tasks, none at all, two tasks in a stage; trained, evaluated,
reported and compared beside a method with a stage per task.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import training_support as support

from delo_eval.cli import main as evaluate
from delo_eval.compare.assemble import compare
from delo_eval.compare.leaderboard import legend, sheets
from delo_eval.harness.questions import cells_of
from delo_eval.matrix.accuracy import ZERO_SHOT, AccuracyMatrix
from delo_eval.matrix.derived import summarise
from delo_eval.matrix.plan import Plan
from delo_eval.metrics.base import metrics
from delo_eval.report.content import read_content
from delo_eval.report.matrices import forgetting
from delo_eval.report.summary import metric_rows, progress
from delo_llava.cli import main, main_train
from delo_llava.data.recipe import load_sequence
from delo_llava.tasks import StagePlan

PLUGINS = Path(__file__).parents[1] / "plugins"
TASKS = ("a", "b", "c", "d")
PAIRS = Plan(TASKS, (StagePlan("first", ("b", "a")), StagePlan("second", ("c", "d"))))
JOINT = Plan(TASKS, (StagePlan("all", TASKS),))
NONE = Plan(TASKS, ())
#: Metrics that read nothing but the result.
OF_RESULT = {"ap", "last"}


def scored(plan: Plan, stages: int, base: bool = False) -> AccuracyMatrix:
    """Stage i scores 10·i + j on task j, the base 50 + j."""
    matrix = AccuracyMatrix(plan)
    for stage in [*([ZERO_SHOT] if base else []), *range(stages)]:
        for task in plan.judged(stage):
            score = 50 if stage == ZERO_SHOT else 10 * stage
            matrix.set("matched", stage, task, score + TASKS.index(task), count=3)
    return matrix


def test_what_is_seen_after_a_stage() -> None:
    each = Plan.one_each(TASKS)
    assert [each.seen(i) for i in (-1, 0, 3)] == [(), ("a",), TASKS]
    assert [PAIRS.seen(i) for i in (-1, 0, 1)] == [(), ("a", "b"), TASKS]
    assert (JOINT.seen(0), NONE.seen(-1)) == (TASKS, ())
    assert [plan.judged(-1) for plan in (each, PAIRS, JOINT, NONE)] == [TASKS] * 4
    assert [plan.last for plan in (each, PAIRS, JOINT, NONE)] == [3, 1, 0, ZERO_SHOT]
    assert [PAIRS.own(task) for task in TASKS] == [0, 0, 1, 1] and NONE.own("a") is None
    assert [plan.one_task_each for plan in (each, PAIRS, JOINT, NONE)] == [True, False, False, False]
    assert not each.about and all("not defined" in plan.about for plan in (PAIRS, JOINT, NONE))
    assert Plan(("a",), (StagePlan("x", ("a",)),)).one_task_each  # one task alone is a stage per task


def test_a_plan_is_read_from_results_and_made_up_for_older_ones() -> None:
    for plan in (PAIRS, JOINT, NONE):
        content = json.loads(json.dumps(scored(plan, len(plan.stages), base=True).to_json()))
        assert Plan.read(content) == plan
        again = AccuracyMatrix.from_json(content)
        assert again == scored(plan, len(plan.stages), base=True)
        assert len(content["matrix"]["matched"]) == len(plan.stages)
    assert Plan.read({"tasks": list(TASKS)}) == Plan.one_each(TASKS)


@pytest.mark.parametrize(("plan", "ap"), [(PAIRS, 11.5), (JOINT, 1.5), (NONE, 51.5)])
def test_only_metrics_of_the_result_are_defined(plan: Plan, ap: float) -> None:
    found = summarise(scored(plan, len(plan.stages), base=True))
    assert found["complete"] and found["stages"]["matched"] == len(plan.stages)
    assert {name for name, value in found["matched"].items() if value is not None} == OF_RESULT
    assert found["matched"]["ap"] == pytest.approx(ap)
    assert set(found["oracle"].values()) == {None}


def test_a_stage_per_task_defines_them_all() -> None:
    matrix = scored(Plan.one_each(TASKS), 4, base=True)
    for stage, task in ((0, "b"), (1, "c"), (2, "d"), (0, "c"), (0, "d"), (1, "d")):
        matrix.set("matched", stage, task, 1.0, count=3)
    found = summarise(matrix)["matched"]
    assert None not in found.values() and set(found) == set(metrics())


@pytest.mark.parametrize("plan", [PAIRS, JOINT, NONE])
def test_nothing_evaluated_is_no_result(plan: Plan) -> None:
    matrix = AccuracyMatrix(plan)
    if plan.stages:  # the base is the result only where nothing is trained
        matrix = scored(plan, 0, base=True)
    else:
        matrix.set("matched", ZERO_SHOT, "a", 1.0, count=3)  # three tasks are lacking
    found = summarise(matrix)
    assert not found["complete"] and set(found["matched"].values()) == {None}


def test_two_tasks_in_a_stage_are_judged_as_far_as_they_are() -> None:
    found = summarise(scored(PAIRS, 1))
    assert found["stages"]["matched"] == 1 and not found["complete"]
    assert found["matched"]["ap"] == pytest.approx(0.5)


def test_what_a_stage_is_asked(tmp_path: Path) -> None:
    sequence = load_sequence(str(support.write_sequence(tmp_path, tasks=4, records=2)), tmp_path)
    names = tuple(sequence.names)
    pairs = Plan(names, (StagePlan("first", names[:2]), StagePlan("second", names[2:])))

    def asked(plan: Plan, stage: int, needs_task: bool = False) -> list[str]:
        cells = cells_of(sequence, plan, stage, ["run", "image"], needs_task=needs_task)
        return [f"{cell.task.name[-1]}{cell.pattern[0]}" for cell in cells]

    assert asked(pairs, 0) == ["0r", "1r", "0i", "1i", "2r", "3r"]
    assert asked(pairs, 0, needs_task=True) == ["0r", "1r", "0i", "1i"]
    assert asked(Plan.one_each(names), 1) == ["0r", "1r", "0i", "1i", "2r"]
    assert len(asked(pairs, 1)) == len(asked(Plan(names, ()), ZERO_SHOT)) == 8


# ---- from training to the leaderboard
METHODS = {"joint_small": 1, "zero_small": 0, "lora": 2}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """A finished run of each method."""
    place = tmp_path_factory.mktemp("plans")
    recipe = support.write_sequence(place / "data", records=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELO_LLAVA_PLUGINS", str(PLUGINS))
        for name in METHODS:
            words = support.words(recipe, tiny_models.session("llava"), place / name)
            own = [] if name == "zero_small" else [f"--{name}.rank=2"]
            words = [word for word in words if not word.startswith("--lora.")]
            options = ["--missing.ratio=0", f"--method={name}", *own, "--eval.last_patterns=text"]
            assert main_train([*words, *options]) == 0
        yield {name: place / name for name in METHODS}


def results(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "results.json").read_text())
    return found


@pytest.mark.slow
def test_one_stage_of_all_tasks(runs: dict[str, Path]) -> None:
    found = results(runs["joint_small"])
    assert found["plan"] == [{"name": "all", "tasks": ["task0", "task1"]}]
    (row,) = found["matrix"]["matched"]
    assert None not in row and found["metrics"]["complete"]
    assert found["metrics"]["matched"]["ap"] == pytest.approx(sum(row) / 2)
    assert {n for n, v in found["metrics"]["matched"].items() if v is not None} == OF_RESULT
    assert None not in found["patterns"]["text"]["matched"][0]
    assert set(found["missing"]["effective_train"]) == {"task0", "task1"}
    assert list(found["trainable_parameters_per_task"]) == ["all"]
    assert len(found["seconds"]["train"]) == len(found["seconds"]["eval"]) == 1
    assert (runs["joint_small"] / "adapters" / "all" / "manifest.json").is_file()
    assert (runs["joint_small"] / "predictions" / "0" / "run" / "task1.jsonl").is_file()
    assert {entry["task"] for entry in support.metrics(runs["joint_small"])} == {"all"}


@pytest.mark.slow
def test_no_stage_at_all(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    run = runs["zero_small"]
    found = results(run)
    assert found["plan"] == [] and found["matrix"] == {"matched": [], "oracle": []}
    assert found["modes"] == ["matched"] and found["metrics"]["complete"]
    row = found["zero_shot"]["run"]
    assert found["metrics"]["matched"]["ap"] == pytest.approx(sum(row) / 2)
    assert None not in found["zero_shot"]["text"]  # the base is the last stage
    assert (run / "complete.json").is_file() and not list((run / "adapters").iterdir())
    before = (run / "results.json").read_bytes()
    assert evaluate(["--run", str(run)]) == 0
    assert "nothing has changed" in capsys.readouterr().out
    assert evaluate(["--run", str(run), "--stage", "all", "--no-cache"]) == 0
    assert {**json.loads(before), "seconds": None} == {**results(run), "seconds": None}
    with pytest.raises(SystemExit):
        main(["eval", "--run", str(run), "--stage", "task0"])


@pytest.mark.slow
def test_they_stop_where_they_are_finished_and_are_evaluated_again(runs: dict[str, Path]) -> None:
    run = runs["joint_small"]
    before = results(run)
    for stage in ("last", "all", "0"):
        assert evaluate(["--run", str(run), "--no-cache"] + ["--stage", stage]) == 0
    assert {**before, "seconds": None} == {**results(run), "seconds": None}


@pytest.mark.slow
def test_their_reports_say_what_is_not_defined(runs: dict[str, Path]) -> None:
    for name, stages in METHODS.items():
        content = read_content(runs[name])
        assert progress(content) == (max(1, stages), max(1, stages))
        shown = {row[0]: row[1] for row in metric_rows(content)}
        assert (shown["forgetting"] == "–") == (shown["bwt_T"] == "–") == (name != "lora")
        assert math.isfinite(float(shown["ap"]))
        assert bool(forgetting(content)) == (name == "lora")
        assert evaluate(["report", "--run", str(runs[name])]) == 0
        page = (runs[name] / "report.html").read_text()
        assert ("not defined" in page.replace("not run or not defined", "")) == (name != "lora")
        assert ">base<" in page or name != "zero_small"


@pytest.mark.slow
def test_they_stand_beside_a_stage_per_task(runs: dict[str, Path], tmp_path: Path) -> None:
    found = compare([runs[name] for name in ("lora", "joint_small", "zero_small")], resamples=200)
    assert not found.differences and found.tasks == ("task0", "task1")
    rows = {row.name: row for row in found.rows}
    assert set(rows["lora"].metrics) > OF_RESULT
    for name in ("joint_small", "zero_small"):
        assert set(rows[name].metrics) == OF_RESULT and set(rows[name].scores) == {"task0", "task1"}
        assert set(rows[name].patterns) == {"text"}
        assert any(line.startswith(f"{name}: ") and "not defined" in line for line in legend(found))
    assert all(pair.ap is not None and not pair.reason for pair in found.paired)
    (board,) = [sheet for sheet in sheets(found) if "forgetting" in sheet.heads]
    column = list(board.heads).index("forgetting")
    shown = {row[0]: row[column] for row in board.rows}
    assert shown["joint_small"] == shown["zero_small"] == "–" != shown["lora"]
    words = [str(runs[name]) for name in METHODS]
    assert main(["compare", *words, "--output", str(tmp_path)]) == 0
    assert "joint_small" in (tmp_path / "compare.html").read_text()
    assert main(["diff", *words[:2]]) == 1
    for name in METHODS:
        assert evaluate(["errors", "--run", str(runs[name]), "--output", str(tmp_path / "e.json")]) == 0
