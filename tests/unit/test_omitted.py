"""What is left out of records is counted and told: by hand, and through an evaluation."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from run_support import little_recipe, make_run, predictions  # noqa: F401

from delo_eval.cli import main
from delo_eval.harness import stage as stage_module
from delo_eval.harness.folder import Request
from delo_eval.harness.model import open_run
from delo_eval.harness.stage import evaluate_stage
from delo_eval.matrix.passport import passport
from delo_llava.data import omitted
from delo_llava.data.missing import record_presence
from delo_llava.data.omitted import (
    CutRecords,
    Omitted,
    answered_without,
    evaluated_lines,
    omitted_lines,
    trained_without,
)
from delo_llava.data.readers import read_records
from delo_llava.errors import DeloError
from delo_llava.methods.lora import Lora


def test_training_counts_records_not_views() -> None:
    cut = CutRecords()
    for _ in range(2):
        cut.add([("b", "context", "1"), ("b", "context", "2"), ("a", "context", "1")])
        cut.add({("b", "instruction", "2")})
    assert trained_without(cut.counts(), ["b/7/x", "c/9"]) == {
        "a": {"contexts_cut": 1},
        "b": {"contexts_cut": 2, "instructions_cut": 1, "records_skipped": 1},
        "c": {"records_skipped": 1},
    }
    assert trained_without({}, ()) == {}


def test_cut_records_take_eight_bytes_each_and_are_known_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """However they are shared out among ranks and launches, and whatever is packed in between."""
    monkeypatch.setattr(omitted, "PENDING", 64)
    names = [f"{number}.jpg#é" for number in range(5000)]
    whole, parts = CutRecords(), [CutRecords() for _ in range(3)]
    for epoch in range(2):
        for number, name in enumerate(names):
            cuts = [("a", "context", name)] + [("a", "instruction", name)] * (number % 10 == 0)
            whole.add(cuts)
            parts[(number + epoch) % 3].add(cuts)
    assert whole.counts() == {("a", "context"): 5000, ("a", "instruction"): 500}
    assert sum(map(len, whole._new.values())) < 2 * 64, "what waits is bounded too"
    again = CutRecords(parts[0].packed()).union(parts[1:])
    assert again.counts() == whole.counts()
    for key, numbers in again.packed().items():
        assert numbers.dtype == np.int64 and numbers.tobytes() == whole.packed()[key].tobytes()
    again.add([("a", "context", names[7]), ("b", "context", names[7])])
    assert again.counts() == whole.counts() | {("b", "context"): 1}
    assert CutRecords().counts() == {}


def test_predictions_say_what_was_left_out() -> None:
    rows: list[dict[str, Any]] = [
        {}, {"cut": ["context", "instruction"]}, {"cut": ["instruction"], "unended": ["oracle_prediction"]},
        {"unended": ["prediction", "oracle_prediction"]}, {"image_fault": "torn"},
    ]  # fmt: skip
    assert answered_without(rows, 3) == Omitted(1, 2, 0, 1, 2, 3)
    assert answered_without([{}]).counts() == {}


def test_a_line_for_each_task_that_lost_anything() -> None:
    assert omitted_lines({"a": {}, "b": {"contexts_cut": 1200, "answers_unended": 3}}, "train") == [
        "b, train: contexts cut to data.max_length: 1,200; answers ended by max_new_tokens: 3"
    ]
    results = {"split": "val", "omitted": {"1": {"run": {"a": {"records_skipped": 1}}, "image": {"a": {}}}}}
    assert evaluated_lines(results, "1") == ["a, val: records without their image, which cannot be used: 1"]
    assert evaluated_lines(results, "0") == evaluated_lines({"split": "test"}, "1") == []


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Path:
    """A run of two stages; of `words`, one test record has a long context, another a long question, which its
    context goes before, and one a long answer. One of `shapes` has a long and a short one, and both count.
    """
    root = Path(shutil.copytree(recipe.parent, tmp_path_factory.mktemp("omitted") / "data"))
    file = root / "words_test.json"
    rows = json.loads(file.read_text())
    rows[1]["context"], rows[2]["text"], rows[3]["answer"] = "mango " * 200, "what " * 200, "red " * 4
    rows[3]["answers"] = ["red"]  # which `exact_match` does not read
    file.write_text(json.dumps(rows))
    rows = json.loads((root / "shapes_test.json").read_text())
    rows[0] |= {"answer": "red " * 4, "answers": ["red " * 4, "red"]}
    (root / "shapes_test.json").write_text(json.dumps(rows))
    tasks = yaml.safe_load((root / "little.yaml").read_text())
    for task in tasks["tasks"]:
        task |= {"scorer": "anls"} if task["name"] == "shapes" else {}
    (root / "little.yaml").write_text(yaml.safe_dump(tasks))
    whole = ["--data.max_length=120", "--missing.ratio=0", "--eval.last_patterns=text"]
    return make_run(root.parent / "run", root / "little.yaml", "lora", Lora, 2, *whole)


def counts(content: dict[str, Any] | None, stage: str, pattern: str, task: str) -> dict[str, int]:
    assert content is not None
    found: dict[str, int] = content["omitted"].get(stage, {}).get(pattern, {}).get(task, {})
    return found


def without_seconds(content: dict[str, Any] | None) -> dict[str, Any]:
    assert content is not None
    return {key: value for key, value in content.items() if key != "seconds"}


def test_an_evaluation_counts_what_was_cut_in_every_cell(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same from new answers, from stored ones, and from a receipt; a limit counts what it asks."""
    content = evaluate_stage(run, 1)
    found = counts(content, "1", "run", "words")
    rows = predictions(run, 1)["words"]
    assert [row.get("cut") for row in rows[:4]] == [None, ["context"], ["context", "instruction"], None]
    assert (found["contexts_cut"], found["instructions_cut"]) == (2, 1)
    assert found.get("answers_unended", 0) == sum("unended" in row for row in rows)
    assert found["references_long"] == 1, "at most three tokens are generated"
    assert not {"contexts_cut", "references_long"} & counts(content, "1", "run", "shapes").keys()

    receipt = run / "answers" / "1.json"
    receipt.unlink()
    monkeypatch.setattr(stage_module, "answerer", lambda *_: pytest.fail("a model was loaded"))
    assert without_seconds(evaluate_stage(run, 1)) == without_seconds(content)
    assert main(["--run", str(run), "--stage", "1"]) == 0
    told = capsys.readouterr().out
    assert "nothing has changed" in told
    assert "words, test: contexts cut to data.max_length: 2; instructions cut to data.max_length: 1" in told

    monkeypatch.undo()
    few = evaluate_stage(run, 1, request=Request(limit=4))
    rows = predictions(run / "eval-test", 1)["words"]
    long = sum(row["answer"] != "red" for row in rows)
    assert counts(few, "1", "run", "words") == answered_without(rows, long).counts()


def test_questions_that_cannot_be_scored_are_refused_or_left_out_and_counted(
    run: Path, tmp_path: Path
) -> None:
    """The others keep their places in the missing pattern; the passport tells such results apart."""
    data = Path(shutil.copytree(run.parent / "data", tmp_path / "data"))
    rows = json.loads((data / "words_test.json").read_text())
    for number, row in enumerate(rows):
        row["answers"] = [] if number in (1, 4) else ["red"] * 10
    (data / "words_test.json").write_text(json.dumps(rows))
    tasks = yaml.safe_load((data / "little.yaml").read_text())
    for task in tasks["tasks"]:
        task |= {"scorer": "vizwiz"} if task["name"] == "words" else {}
    (data / "little.yaml").write_text(yaml.safe_dump(tasks))
    more = ("--missing.ratio=0.5", "--eval.last_patterns=run")
    strict = make_run(tmp_path / "strict", data / "little.yaml", "lora", Lora, 2, *more)
    with pytest.raises(DeloError, match=r"words_test\.json \(words/test\): .*2 of ") as error:
        evaluate_stage(strict, 1)
    assert error.value.given == f"{rows[1]['question_id']}, {rows[4]['question_id']}"

    skip = "--eval.on_bad_reference=skip"
    lenient = make_run(tmp_path / "lenient", data / "little.yaml", "lora", Lora, 2, *more, skip)
    content = evaluate_stage(lenient, 1)
    assert content is not None and counts(content, "1", "run", "words")["references_missing"] == 2
    assert "references_missing" not in counts(content, "1", "run", "shapes")
    (line,) = [line for line in evaluated_lines(content, "1") if line.startswith("words")]
    assert "questions left out, whose reference lacks what the scorer needs: 2" in line
    opened = open_run(lenient, Request())
    spec = next(task for task in opened.sequence.tasks if task.name == "words")
    records = list(read_records(spec, "test"))
    mask = record_presence(opened.config.missing, records).tolist()
    rows = predictions(lenient, 1)["words"]
    assert [(row["record_id"], list(row["presence"].values())) for row in rows] == [
        (record.id, shown) for number, (record, shown) in enumerate(zip(records, mask, strict=True))
        if number not in (1, 4)
    ]  # fmt: skip
    assert content["passport"]["asked"] != open_passport(strict)["asked"]


def open_passport(run: Path) -> dict[str, str]:
    opened = open_run(run, Request())
    ids = {task.name: task.scorer for task in opened.sequence.tasks}
    return passport(opened.config, opened.store.read_run(), opened.sequence.tasks, ids)


def test_a_pattern_that_hides_the_long_context_cuts_none(run: Path) -> None:
    content = evaluate_stage(run, 1, request=Request(patterns=("run", "text")))
    assert counts(content, "1", "text", "words").get("contexts_cut", 0) == 0
    assert counts(content, "1", "text", "words")["instructions_cut"] == 1
    assert counts(content, "1", "run", "words")["contexts_cut"] == 2


def test_edited_counts_are_computed_again(run: Path) -> None:
    wanted = without_seconds(evaluate_stage(run, 0))
    content = json.loads((run / "results.json").read_text())
    content["omitted"]["0"]["run"]["words"]["contexts_cut"] = 7
    (run / "results.json").write_text(json.dumps(content))
    assert without_seconds(evaluate_stage(run, 0)) == wanted


def test_a_fixed_record_is_no_longer_counted(run: Path, tmp_path: Path) -> None:
    """Results that are evaluated anew forget the old counts."""
    content = evaluate_stage(run, 0)
    assert counts(content, "0", "run", "words")["contexts_cut"] == 2
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["data"]["max_length"] = 2048
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert "contexts_cut" not in counts(evaluate_stage(folder, 0), "0", "run", "words")
