"""What each record lost or gained: causes, sums, refusals, the command, and the report's section."""

import json
import re
from pathlib import Path
from typing import Any

import comparison_support as fake
import pytest

from delo_eval.answers.flips import CAUSES, forgotten, task_flips
from delo_eval.answers.predictions import prediction_file
from delo_eval.cli import main
from delo_eval.matrix.plan import Plan
from delo_eval.report.content import read_content
from delo_eval.report.flips import forgetting_causes
from delo_eval.report.render import write_report
from delo_llava.config import RunConfig
from delo_llava.errors import DeloError

TASKS = fake.TASKS


def row(name: str, answer: str, said: str, score: float, told: float | None = None) -> dict[str, Any]:
    return {
        "record_id": name, "task": TASKS[0], "answer": answer, "prediction": said, "score": score,
        "oracle_prediction": None if told is None else answer, "oracle_score": told,
        "presence": {"image": True, "text": name != "b"},
    }  # fmt: skip


def one(before: dict[str, Any], after: dict[str, Any], others: tuple[str, ...] = ()) -> Any:
    """The change of the middle one of three records, with two that stay."""
    rows = [row("a", "red", "red", 1), before, row("c", "blue", "grey", 0)]
    found = task_flips("t", rows, [rows[0], after, rows[2]], others=others)
    assert len(found.flips) == 1 and found.records == 3
    return found


@pytest.mark.parametrize(
    ("said", "told", "others", "cause"),
    [
        ("Green.", 0.0, ("green",), "format"),
        ("it is green", None, (), "format"),
        ("asia", 1.0, ("asia",), "routing"),  # told its task, it is still right
        ("asia", 0.0, ("asia",), "style"),
        ("asia", None, ("asia",), "style"),
        ("red", 0.0, ("red",), "knowledge"),  # an answer of this task, too
        ("asia", None, ("africa",), "knowledge"),
        ("", None, ("africa",), "knowledge"),
    ],
)
def test_a_loss_has_one_cause(said: str, told: float | None, others: tuple[str, ...], cause: str) -> None:
    found = one(row("b", "green", "green", 1), row("b", "green", said, 0, told), others)
    assert found.flips[0].cause == cause
    assert (found.flips[0].before, found.flips[0].after) == ("green", said)
    assert found.flips[0].presence == {"image": True, "text": False}
    assert found.lost == pytest.approx({name: 100 / 3 * (name == cause) for name in CAUSES})
    assert (found.gained, found.change) == pytest.approx((0, -100 / 3))


def test_parts_of_points_and_gains_add_up_to_the_change() -> None:
    before = [row("a", "x", "x", 1), row("b", "y", "z", 0.3), row("c", "v", "w", 0)]
    after = [row("a", "x", "w", 0.4), row("b", "y", "y", 1), row("c", "v", "w", 0)]
    found = task_flips("t", before, after)
    assert sum(found.lost.values()) == pytest.approx(20)
    assert found.gained == pytest.approx(100 * 0.7 / 3)
    assert found.change == pytest.approx(100 * (1.4 - 1.3) / 3)
    assert [flip.record_id for flip in found.flips] == ["a", "b"] and not found.flips[1].cause


def test_a_part_that_is_left_is_no_routing() -> None:
    """A method that chooses no task has the same score with it told."""
    before, after = row("b", "y", "y", 1, 1.0), row("b", "y", "z", 0.6, 0.6)
    assert one(before, after).flips[0].cause == "knowledge"
    assert one(before, after | {"oracle_score": 0.9}).flips[0].cause == "routing"


def test_each_side_is_judged_in_its_own_mode() -> None:
    told = row("a", "x", "w", 0, 1.0)
    assert not task_flips("t", [told], [row("a", "x", "x", 1)], mode_before="oracle").flips
    with pytest.raises(DeloError, match="not answered in both"):
        task_flips("t", [row("a", "x", "w", 0)], [told], "oracle")


def test_other_records_are_refused() -> None:
    with pytest.raises(DeloError, match="not asked the same records"):
        task_flips("t", [row("a", "x", "x", 1)], [row("b", "x", "x", 1)])


def test_records_of_which_other_modalities_were_shown_are_refused() -> None:
    """Two missing seeds drop other modalities of the same record: what changed is not the model alone."""
    other = row("a", "x", "w", 0) | {"presence": {"image": False, "text": True}}
    with pytest.raises(DeloError, match="not shown the same of every record") as refused:
        task_flips("t", [row("a", "x", "x", 1)], [other])
    assert "--pattern complete" in str(refused.value)


@pytest.fixture()
def run(tmp_path: Path) -> Path:
    """Two stages; of the first task's records half are lost, one of them in the second task's words."""
    return written(tmp_path / "run", "lora", 0.5, 1.0)


def written(folder: Path, method: str, *right: float) -> Path:
    run = fake.write_run(folder, fake.outcomes(right), config=RunConfig(method=method))
    for file in (run / "predictions").rglob("*.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        known = {"presence": {"image": True, "text": True}, "task_used": None, "oracle_prediction": None}
        file.write_text("".join(json.dumps(known | row) + "\n" for row in rows))
    return run


def change(run: Path, stage: int, task: str, number: int, **values: Any) -> None:
    file = prediction_file(run, stage, "run", task)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[number] |= values
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_forgetting_is_taken_apart_from_a_tasks_own_stage_on(run: Path) -> None:
    (found,) = forgotten(run, Plan.one_each(TASKS), 1, "matched")
    assert found.task == TASKS[0] and found.change == pytest.approx(-50)
    assert len(found.flips) == found.records / 2
    style = next(flip.record_id for flip in found.flips)
    place = [json.loads(x)["record_id"] for x in prediction_file(run, 1, "run", TASKS[0]).open()].index(style)
    change(run, 1, TASKS[1], 0, answer="zebra")
    change(run, 1, TASKS[0], place, prediction="Zebra")
    (found,) = forgotten(run, Plan.one_each(TASKS), 1, "matched")
    assert found.lost["style"] == pytest.approx(100 / found.records)


def test_the_command_shows_and_writes_them(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(run, 1, TASKS[0], 0, prediction="[bold]x[/bold]")
    assert main(["flips", "--run", str(run), "-n", "100"]) == 0
    told = capsys.readouterr().out
    assert re.search(rf"{TASKS[0]} *│ *40 │ *50\.0", told)
    assert not re.search(rf"{TASKS[1]} *│", told) and "(lost by knowledge)" in told
    found = json.loads((run / "flips.json").read_text())
    assert found["causes"].keys() == CAUSES.keys() and len(found["tasks"][0]["flips"]) == 20
    change(run, 1, TASKS[0], 3, prediction="a zebra", score=0.0)
    change(run, 1, TASKS[1], 0, answer="zebra")
    words = ["flips", "--run", str(run), "--before", TASKS[0], "-n", "0", "--output", str(tmp_path / "g")]
    assert main(words) == 0  # between any two stages, style is known, too
    assert json.loads((tmp_path / "g").read_text())["tasks"][0]["lost"]["style"] > 0
    capsys.readouterr()
    other = written(tmp_path / "other", "ewc", 0.25, 0.5)
    assert (
        main(
            ["flips", "--run", str(run), "--against", str(other), "-n", "0", "--output", str(tmp_path / "f")]
        )
        == 0
    )
    told = capsys.readouterr().out
    assert "from other, 2." in told and "+25.0" in told and "+50.0" in told
    with pytest.raises(SystemExit):
        main(["flips", "--run", str(run), "--before", "scienze"])
    assert f"did you mean {TASKS[0]}?" in capsys.readouterr().err


def test_the_report_has_the_causes_and_lost_records(run: Path) -> None:
    found = forgetting_causes(read_content(run))
    assert found is not None and [bar.task for bar in found.bars] == [TASKS[0]]
    assert found.bars[0].total == pytest.approx(50) and found.bars[0].parts[-1][3] == pytest.approx(100)
    assert 1 <= len(found.ledger) <= 3
    page = write_report(run).read_text()
    assert "What was forgotten, and why" in page and "lost by knowledge" in page


def test_a_report_without_earlier_predictions_has_no_such_section(run: Path) -> None:
    prediction_file(run, 0, "run", TASKS[0]).unlink()
    assert forgetting_causes(read_content(run)) is None
    assert "What was forgotten" not in write_report(run).read_text()


def test_damaged_predictions_are_told_and_not_passed_over(run: Path) -> None:
    prediction_file(run, 0, "run", TASKS[0]).write_text("{")
    with pytest.raises(DeloError, match="damaged"):
        forgetting_causes(read_content(run))
