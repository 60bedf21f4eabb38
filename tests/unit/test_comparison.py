"""Runs side by side: refusals, marks, rows over seeds, outputs, published rows, and the difference of two."""

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
from comparison_support import FACTS, outcomes, write_run

from delo_eval.compare import leaderboard
from delo_eval.compare.assemble import compare
from delo_eval.compare.comparison import Value
from delo_eval.compare.diff import diff_runs
from delo_eval.compare.leaderboard import latex, legend, markdown, sheets
from delo_eval.compare.runs import load_runs
from delo_eval.scorers.multilabel_f1 import SCORER as MACRO_F1
from delo_llava.cli import main
from delo_llava.config import RunConfig
from delo_llava.errors import DeloError

LOW, HIGH = outcomes((0.5, 0.25), seed=1), outcomes((0.75, 0.5), seed=2)


def config(method: str = "lora", seed: int = 0, **sections: Any) -> RunConfig:
    return RunConfig.model_validate({"method": method, "seed": seed, **sections})


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two methods of two seeds each."""
    return [
        write_run(tmp_path / f"{method}-s{seed}", outcomes(right, seed), config=config(method, seed))
        for method, right in (("lora", (0.5, 0.25)), ("delo", (0.75, 0.5)))
        for seed in (0, 1)
    ]


def test_seeds_of_a_method_are_one_row_and_the_best_stands_first(runs: list[Path]) -> None:
    write_run(runs[1], outcomes((0.6, 0.35), 1), config=config("lora", 1))
    found = compare(runs, resamples=200)
    assert [(row.name, row.seeds) for row in found.rows] == [("delo", (0, 1)), ("lora", (0, 1))]
    assert found.reference == "lora" and not found.forced and found.differences == ()
    ap = found.row("lora").metrics["ap"]
    assert ap.values == pytest.approx((37.5, 47.5)) and ap.mean == pytest.approx(42.5)
    assert ap.std == pytest.approx(statistics.stdev(ap.values))
    assert found.row("delo").metrics["bwt_T"].mean == pytest.approx((75 - 100) / 2)
    assert found.row("delo").scores["ocr"].error == pytest.approx(100 * (0.25 / 39) ** 0.5)


def test_what_errors_do_not_tell_from_the_best_is_marked_with_it() -> None:
    """Over seeds the error is std/√n, of one run that of its records; without any, only equals are alike."""
    columns = {
        "ap": (
            Value(70.0, 2.0, None, (68.0, 72.0)),
            Value(66.5, 2.0, None, (64.5, 68.5)),
            Value(60.0, None, 1.0),
        ),
        "forgetting": (Value(3.0), Value(3.0), Value(2.0)),
    }
    assert leaderboard._best(columns, {"ap": True, "forgetting": False}, 1) == {(0, 1), (1, 1), (2, 2)}
    columns["ap"] = (Value(70.0, None, 1.0), Value(66.5, None, 1.0), None)  # 3.5 > 1.96 · √2
    assert leaderboard._best(columns, {"ap": True}, 1) == {(0, 1)}


def test_paired_bootstrap_is_over_tasks_seeds_and_ap(runs: list[Path]) -> None:
    (pair,) = compare(runs, resamples=400).paired
    assert (pair.first, pair.second) == ("lora", "delo") and not pair.reason
    assert pair.ap is not None and pair.ap.difference == pytest.approx(25)
    assert pair.ap.low < 25 < pair.ap.high and pair.ap.p_value < 0.05 and pair.ap.records == 80
    assert [task.difference for task in pair.tasks.values() if task] == pytest.approx([25, 25])
    assert compare(runs, resamples=400).paired == (pair,)


CHANGES: dict[str, dict[str, Any]] = {
    "metric_ids.ap": {"metric_ids": {"ap": "ap.v2"}},
    "scorer_ids.ocr": {"facts": {"scorer_ids": {"science": "exact_match.v1", "ocr": "gqa.v1"}}},
    "scoring": {"scoring": "compat"},
    "start_weights": {"facts": {"start_weights": {"name": "mini-llava", "sha256": "f" * 64}}},
    "data_hashes.ocr.test": {
        "facts": {"data_hashes": {**FACTS["data_hashes"], "ocr": {"train": "b" * 64, "test": "d" * 64}}}
    },
    "split": {"split": "val"},
    "limit": {"limit": 10},
    "missing.ratio": {"config": config("delo", missing={"ratio": 0.7})},
    "tasks_seen": {"stages": 1},
}


@pytest.mark.parametrize("field", CHANGES)
def test_rows_made_or_judged_differently_are_refused_or_marked_everywhere(
    tmp_path: Path, field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first = write_run(tmp_path / "a", LOW, config=config())
    second = write_run(tmp_path / "b", HIGH, **{"config": config("delo"), **CHANGES[field]})
    with pytest.raises(DeloError, match=re.escape(field)) as refused:
        compare([first, second])
    assert "--force" in str(refused.value.fix)
    found = compare([first, second], force=True, resamples=100)
    assert found.forced and field in [d.field for d in found.differences]
    assert found.row("lora").marks == () and found.row("delo").marks
    mark = f"[{found.row('delo').marks[0]}]"
    assert any("NOT COMPARABLE" in line for line in legend(found))
    assert all("NOT COMPARABLE" in sheet.title and not sheet.best for sheet in sheets(found))
    assert "NOT COMPARABLE" in markdown(found) and f"delo {mark}".replace("[", "\\[")[:-1] in markdown(found)
    assert "NOT COMPARABLE" in latex(found) and "delo {[}" in latex(found)
    assert found.to_json()["forced"] and found.to_json()["differences"]
    with pytest.raises(SystemExit) as stopped:
        main(["compare", str(first), str(second)])
    assert stopped.value.code and field in capsys.readouterr().err


def test_another_missing_seed_is_another_pattern_of_missing_records(tmp_path: Path) -> None:
    missing = {"ratio": 0.7, "kind": "both"}
    first = write_run(tmp_path / "a", LOW, config=config(missing={**missing, "seed": 0}))
    second = write_run(tmp_path / "b", HIGH, config=config("delo", missing={**missing, "seed": 1}))
    with pytest.raises(DeloError, match=r"missing\.seed"):
        compare([first, second])
    # Nobody's modality is hidden at ratio 0, whatever the kind.
    write_run(first, LOW, config=config(missing={"ratio": 0, "kind": "image"}))
    write_run(second, HIGH, config=config("delo", missing={"ratio": 0, "kind": "text", "seed": 1}))
    assert not compare([first, second], resamples=100).differences


def test_other_settings_of_a_method_are_rows_of_their_own(tmp_path: Path) -> None:
    folders = [
        write_run(
            tmp_path / f"r{rank}", right, config=config("delo", methods={"delo": {"rank": rank}})
        )
        for rank, right in ((4, LOW), (8, HIGH))
    ]  # fmt: skip
    assert [row.name for row in compare(folders, resamples=100).rows] == ["delo (rank=8)", "delo (rank=4)"]


def test_the_same_seed_twice_is_no_second_seed(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, LOW, config=config()) for name in "ab"]
    found = compare(folders, resamples=100)
    assert [row.seeds for row in found.rows] == [(0,), (0,)]
    assert {row.name for row in found.rows} == {"lora (a)", "lora (b)"}
    with pytest.raises(DeloError, match="twice"):
        compare([folders[0], tmp_path / "b" / ".." / "a"])


def test_predictions_that_are_not_those_scored_give_no_contrast_and_say_so(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", LOW, config=config())
    second = write_run(tmp_path / "b", HIGH, config=config("delo"))
    file = second / "predictions" / "1" / "run" / "ocr.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[1:]) + "\n")
    (pair,) = compare([first, second], resamples=100).paired
    assert pair.ap is None and pair.tasks["ocr"] is None and pair.tasks["science"] is not None
    assert pair.reason.startswith("ocr: ") and "same records" in pair.reason
    file.unlink()
    assert "missing" in compare([first, second], resamples=100).paired[0].reason


def test_a_rule_over_all_records_is_applied_anew_to_every_resample(tmp_path: Path) -> None:
    """Macro-F1 of one class at recall r is 2r/(1+r), which is no mean over records."""
    first = write_run(tmp_path / "a", LOW, config=config(), scorer=MACRO_F1)
    second = write_run(tmp_path / "b", HIGH, config=config("delo"), scorer=MACRO_F1)
    found = compare([first, second], resamples=300)
    assert found.row("delo").scores["science"].mean == pytest.approx(100 * 1.5 / 1.75)
    (pair,) = found.paired
    task = pair.tasks["science"]
    assert task is not None and pair.ap is not None and not pair.reason
    assert task.difference == pytest.approx(100 * (1.5 / 1.75 - 1 / 1.5)) and task.resamples == 300
    assert task.low < task.difference < task.high and task.p_value < 0.05


@pytest.mark.parametrize(
    ("identifier", "reason"),
    [("exact_match.v2", "not the mean"), ("caption_plain.v2", "captions"), ("caption.v2", "too slow"),
     ("multilabel_f1.v2", "other scores than were stored"), ("gone.v9", "gone.v9 is not known here")],
)  # fmt: skip
def test_scores_that_do_not_follow_from_predictions_are_not_contrasted(
    tmp_path: Path, identifier: str, reason: str
) -> None:
    facts = {"scorer_ids": {"science": "exact_match.v1", "ocr": identifier}}
    first = write_run(tmp_path / "a", LOW, config=config(), facts=facts)
    cells = [[100.0, None], [75.0, 12.3]]
    second = write_run(
        tmp_path / "b", HIGH, config=config("delo"), facts=facts, matrix={"matched": cells, "oracle": cells}
    )
    (pair,) = compare([first, second], resamples=100).paired
    assert pair.tasks["ocr"] is None and pair.ap is None and reason in pair.reason


def test_gap_between_told_and_chosen_tasks(tmp_path: Path) -> None:
    choice = {"0": {"run": {"accuracy": 50.0}}}
    told = outcomes((1.0, 0.75), seed=5)
    run = write_run(
        tmp_path / "a", HIGH, config=config("delo"), oracle=told,
        oracle_gap={"science": 25.0, "ocr": 25.0}, task_choice=choice,
    )  # fmt: skip
    found = compare([run])
    assert found.row("delo").oracle_gap["science"].mean == 25
    assert any("oracle − matched" in sheet.title for sheet in sheets(found))
    assert load_runs([run])[0].results["metrics"]["oracle"]["ap"] == pytest.approx(87.5)


def test_names_from_data_cannot_break_a_table(tmp_path: Path) -> None:
    evil = "a|b & 50% $x_{1}$ [l](h)\n# <b> \\end{table}"
    run = write_run(tmp_path / "a", LOW, config=config(), method=evil)
    found = compare([run])
    text = markdown(found)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    bars = [len(re.findall(r"(?<!\\)\|", line)) for line in rows]
    assert len(rows) == 3 * len(sheets(found)) and bars[::3] == bars[1::3] == bars[2::3]
    assert "\\[l\\](h) # \\<b>" in text and not re.search(r"(?<!\\)[<\[]", text)
    source = latex(found)
    assert r"a\textbar{}b \& 50\% \$x\_\{1\}\$ {[}l{]}(h) \# $<$b$>$ \textbackslash{}end\{table\}" in source
    assert source.count("\\end{table}") == source.count("\\begin{table}") == len(sheets(found))
    for line in source.splitlines():
        if line.endswith("\\\\"):
            assert not line.startswith("[")


def test_command_writes_every_format(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "board"
    assert main(["compare", *map(str, runs), "--output", str(out), "--resamples", "200"]) == 0
    shown = capsys.readouterr().out
    assert "Leaderboard" in shown and "62.50 ± 0.00" in shown and "Paired bootstrap" in shown
    assert sorted(f.name for f in out.iterdir()) == [
        "compare.html", "compare.json", "leaderboard.md", "leaderboard.tex",
    ]  # fmt: skip
    content = json.loads((out / "compare.json").read_text())
    assert content["schema"] == "delo-llava/compare/1" and content["rows"][0]["seeds"] == [0, 1]
    assert content["paired"][0]["ap"]["difference"] == pytest.approx(25)
    assert "**62.50 ± 0.00**" in (out / "leaderboard.md").read_text()
    assert "\\textbf{62.50 $\\pm$ 0.00}" in (out / "leaderboard.tex").read_text()
    only = tmp_path / "only"
    assert main(["compare", str(runs[0]), "--output", str(only), "--format", "markdown"]) == 0
    assert [f.name for f in only.iterdir()] == ["leaderboard.md"]


@pytest.mark.parametrize("wrong", [["--format", "pdf"], ["--resamples", "1"]])
def test_wrong_options_are_refused(
    runs: list[Path], wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["compare", str(runs[0]), str(runs[2]), *wrong])
    assert stopped.value.code and "error" in capsys.readouterr().err


def test_folder_without_results_is_named(tmp_path: Path) -> None:
    with pytest.raises(DeloError, match=r"results\.json") as refused:
        compare([tmp_path])
    assert refused.value.given == tmp_path


def test_published_rows_stand_beside_runs_only_by_force_where_the_protocol_differs(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", LOW, config=config())
    with pytest.raises(DeloError, match="start_weights"):
        compare([run], published=["coin_a"])
    found = compare([run], published=["coin_a"], force=True)
    published = [row for row in found.rows if row.published]
    assert len(published) == 2 and all(row.marks and not row.folders for row in published)
    assert all("[C] recalled" in str(row.published) for row in published)
    assert any("recalled" in line for line in legend(found))


def test_diff_names_settings_conditions_and_scores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = write_run(tmp_path / "a", LOW, config=config(missing={"ratio": 0.7}))
    second = write_run(tmp_path / "b", HIGH, config=config(), facts={"versions": {"torch": "2.7"}})
    found = diff_runs(first, second)
    assert not found.same and found.matrices["matched"][1] == pytest.approx([25, 25])
    assert "missing.ratio" in [d.field for d in found.sections["config"]]
    assert [d.field for d in found.sections["versions"]] == ["torch"]
    assert main(["diff", str(first), str(second), "--output", str(tmp_path / "d.json")]) == 1
    assert "missing.ratio" in capsys.readouterr().out
    assert json.loads((tmp_path / "d.json").read_text())["schema"] == "delo-llava/diff/1"
    copy = write_run(tmp_path / "c", LOW, config=config(missing={"ratio": 0.7}))
    assert diff_runs(first, copy).same and main(["diff", str(first), str(copy)]) == 0
