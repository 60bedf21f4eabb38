"""Which text of a row is scored, files of other tools, ids that repeat or lack, letters in two forms."""

import json
import unicodedata
from pathlib import Path
from typing import Any, cast

import datasets
import pytest
import yaml
from score_support import ASK, Bench, lines, said

from delo_eval.answers.columns import Columns, columns_of
from delo_eval.answers.references import read_references
from delo_eval.cli import main
from delo_eval.scorers.base import Reference, Scorer
from delo_llava.data.readers import read_records
from delo_llava.data.recipe import load_task
from delo_llava.errors import DeloError
from delo_llava.registry import load_plugin, plugin_names


@pytest.fixture
def bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Bench:
    return Bench(tmp_path, capsys)


# ---- which text is the answer

SCIENCE = {"question_id": "1", "parsed_ans": "A", "ground_truth": "B", "question": "Q", "pred": "x"}
ROWS: list[tuple[dict[str, Any], tuple[str, str]]] = [
    ({"question_id": 1, "prompt": "Q", "text": "x", "answer_id": "a"}, ("question_id", "text")),
    ({"record_id": "1", "answer": "ref", "prediction": "x", "task": "t"}, ("record_id", "prediction")),
    ({"questionId": "1", "prediction": "x"}, ("questionId", "prediction")),
    ({"question_id": 1, "answer": "x"}, ("question_id", "answer")),
    ({"image_id": 3, "caption": "x"}, ("image_id", "caption")),
    ({"id": None, "image": "a.png", "text": "x", "question": "Q"}, ("image", "text")),
    ({"id": 1, "question": "Q", "response": "x", "note": "n"}, ("id", "response")),
    (SCIENCE, ("question_id", "pred")),
]  # fmt: skip


@pytest.mark.parametrize(("row", "keys"), ROWS)
def test_the_answer_of_known_rows(row: dict[str, Any], keys: tuple[str, str]) -> None:
    assert columns_of(row, "row 1") == Columns(*keys)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"id": 1, "answer": "ref", "response": "x"}, "response, answer"),
        ({"id": 1, "answer": "ref", "model_output": "x"}, "model_output, answer"),
        ({"id": 1, "text": "Q", "answer": "ref", "prediction": "x"}, "prediction, text, answer"),
        ({"id": 1, "prompt": "Q", "text": "x", "answer": "ref"}, "text, answer"),
        ({"id": 1, "answer": "ref", "reply": "x"}, "answer, reply"),
        ({"record_id": 1, "prediction": "x", "response": "y"}, "prediction, response"),
    ],
)
def test_rows_that_may_be_read_in_two_ways_are_refused(row: dict[str, Any], told: str) -> None:
    with pytest.raises(DeloError, match="several texts that may be the answer") as caught:
        columns_of(row, "row 1")
    assert f"given:   {told}" in str(caught.value) and "--key NAME" in str(caught.value)
    assert columns_of(row, "row 1", key="answer" if "answer" in row else "response").text in row


def test_the_key_may_be_named_and_is_always_told(bench: Bench) -> None:
    rows = [
        {"question_id": i, "answer": w, "reply": "red"}
        for i, w in enumerate(["red", "blue", "green", "2", "no"])
    ]
    bench.answers(rows)
    assert "answer, reply" in bench.refused("exact_match")
    found = bench.score("exact_match", "--key", "reply")
    assert found["scores"]["native"]["score"] == 20.0
    assert found["keys"] == [{"id": "question_id", "answer": "reply"}] and found["notes"] == []
    assert "read: `reply` by `question_id`" in bench.capsys.readouterr().out
    assert "has no `rely`" in bench.refused("exact_match", "--key", "rely")
    bench.answers([*rows[:3], *({"question_id": i, "pred": "x"} for i in (3, 4))])
    assert "row 4 has no `reply`" in bench.refused("exact_match", "--key", "reply")
    bench.answers([*said({0: "x", 1: "y"}), {"question_id": 2, "prediction": "z"}])
    assert "row 3 has its answer under other keys" in bench.refused("exact_match")


def test_answers_that_all_equal_their_references_are_told(bench: Bench) -> None:
    bench.answers(said(dict(enumerate(["red", "blue", "green", "two", "yes"]))))
    (note,) = bench.score("exact_match")["notes"]
    assert "every answer equals its reference" in note
    assert "note: every answer equals" in bench.capsys.readouterr().out
    bench.answers(said(dict(enumerate(["red", "blue", "green", "two", "Yes"]))))
    assert bench.score("exact_match")["notes"] == []


# ---- ids that repeat, are numbers, or are lacking


def test_further_answers_to_a_question_have_a_policy(bench: Bench) -> None:
    bench.answers([*said(dict(enumerate(["no", "blue", "green", "two", "yes"]))), *said({0: "red"})])
    told = bench.refused("gqa")
    assert "--repeated last" in told and "--repeated each" in told
    last, each = (bench.score("gqa", "--repeated", policy) for policy in ("last", "each"))
    assert [found["scores"]["native"]["score"] for found in (last, each)] == [100.0, pytest.approx(500 / 6)]
    assert [found["questions"] for found in (last, each)] == [5, 6]
    assert last["repeated"] == each["repeated"] == 1
    out = bench.capsys.readouterr().out
    assert "that have one: the last counts" in out and "that have one: each counts" in out


def test_each_answer_to_a_repeated_question_keeps_its_own_record(bench: Bench) -> None:
    bench.answers([*said(dict(enumerate(["no", "blue", "green", "two", "yes"]))), *said({0: "red"})])
    bench.score("exact_match", "--repeated", "each", "--records", str(bench.root / "r.jsonl"))
    rows = [json.loads(line) for line in (bench.root / "r.jsonl").read_text().splitlines()]
    assert [(row["question_id"], row["native"]) for row in rows[:3]] == [("0", 0.0), ("0~2", 1.0), ("1", 1.0)]


def test_by_line_pairs_whatever_the_ids(bench: Bench) -> None:
    words = ["red", "blue", "grey", "two", "yes"]
    bench.answers([{"question_id": f"flickr_{i}", "text": word} for i, word in enumerate(words)])
    assert "--by-line" in bench.refused("exact_match")
    assert bench.score("exact_match", "--by-line")["scores"]["native"]["score"] == 80.0
    bench.answers([{"text": word} for word in words])
    assert "--by-line" in bench.refused("exact_match")
    found = bench.score("exact_match", "--by-line")
    assert found["scores"]["native"]["score"] == 80.0 and found["keys"] == [{"id": None, "answer": "text"}]
    bench.answers([{"text": word} for word in words[:3]])
    assert "3 answers cannot be paired by line with 5" in bench.refused("exact_match", "--by-line")
    assert bench.score("exact_match", "--by-line", "--allow-missing")["missing"]["ids"] == ["3", "4"]
    bench.answers([{"text": word} for word in [*words, "more"]])
    assert "6 answers cannot be" in bench.refused("exact_match", "--by-line", "--allow-missing")


def test_a_file_with_both_sides_and_no_ids_is_scored_against_itself(bench: Bench) -> None:
    both = bench.root / "ans_gt.json"
    both.write_text(json.dumps([{"pred": "Red", "ground_truth": "red"}, {"pred": "x", "ground_truth": "y"}]))
    words = ["score", str(both), "--scorer", "ucit_exact", "--references", str(both)]
    with pytest.raises(SystemExit):
        main(words)
    assert "--by-line" in bench.capsys.readouterr().err
    assert main([*words, "--by-line", "--output", str(bench.root / "s.json")]) == 0
    assert json.loads((bench.root / "s.json").read_text())["scores"]["compat"]["score"] == 50.0


def test_captions_of_a_file_numbered_by_line(bench: Bench) -> None:
    pytest.importorskip("pycocoevalcap")
    texts = ["a man rides a brown horse", "two boats on a lake"]
    bench.references({"annotations": [{"image_id": i, "caption": text} for i, text in enumerate(texts, 1)]})
    bench.answers([{"question_id": f"f{i}", "prompt": "Q", "text": text} for i, text in enumerate(texts)])
    assert "2 answers to unknown questions" in bench.refused("caption_plain")
    assert bench.score("caption_plain", "--by-line")["scores"]["native"]["score"] == pytest.approx(1000)


def test_an_empty_file_of_answers_and_a_folder_of_references_are_called_so(bench: Bench) -> None:
    bench.answers([])
    assert "There are no answers: the file is empty" in bench.refused("exact_match", "--allow-missing")
    answers = bench.answers(said({0: "red"}))
    with pytest.raises(SystemExit):
        main(["score", str(answers), "--scorer", "gqa", "--references", str(bench.root)])
    told = bench.capsys.readouterr().err
    assert "This is a folder" in told and "test.json" in told and "room" not in told


def test_suffixes_may_be_written_in_capitals(bench: Bench) -> None:
    (bench.root / "R.JSONL").write_text(lines([{"question_id": 1, "text": "Q", "answer": "a"}]))
    assert read_references(bench.root / "R.JSONL") == [Reference("1", "a", "Q")]
    (bench.root / "2_0.JSONL").write_text(lines(said({0: "red", 1: "blue"})))
    (bench.root / "2_1.JSONL").write_text(lines(said({2: "green", 3: "two", 4: "yes"})))
    words = ["score", str(bench.root), "--scorer", "gqa", "--references", str(bench.root / "test.json")]
    assert main(words) == 0


# ---- official readings


def test_unbalanced_questions_of_gqa_do_not_count(bench: Bench) -> None:
    asked = {str(i): {"question": "Q", "answer": "yes", "isBalanced": i != 2} for i in range(3)}
    bench.references(asked)
    bench.answers([{"questionId": "0", "prediction": "yes"}, {"questionId": "1", "prediction": "no"}])
    for found in bench.score("gqa")["scores"].values():
        assert (found["score"], found["records"]) == (50.0, 2)
    bench.answers([{"questionId": str(i), "prediction": "no" if i < 2 else "yes"} for i in range(3)])
    found = bench.score("gqa")
    assert [(one["score"], one["records"]) for one in found["scores"].values()] == [(0.0, 2), (0.0, 2)]
    assert any("1 questions do not count" in note for note in found["notes"])


def test_scienceqa_counts_the_test_problems_and_finds_no_numbers(bench: Bench) -> None:
    splits = {"train": ["4"], "test": ["9", "2"]}
    problems = {
        name: {"question": "Q", "choices": ["x", "y"], "answer": 1, "split": split}
        for split, names in splits.items() for name in names
    }  # fmt: skip
    bench.references(problems)
    bench.answers([{"question_id": "2", "text": "B"}, {"question_id": 9, "text": "B"}])
    for beside in (False, True):  # the problems say their split; the splits' file gives the order too
        if beside:
            (bench.root / "pid_splits.json").write_text(json.dumps(splits))
        found = bench.score("scienceqa")
        native, compat = found["scores"]["native"], found["scores"]["compat"]
        assert (native["score"], native["records"]) == (100.0, 2)
        assert (compat["score"], compat["records"]) == (50.0, 2)
        assert any("1 answers have a number as id" in note for note in found["notes"])
    order = [reference.id for reference in read_references(bench.root / "test.json")]
    assert order == ["9", "2"]
    assert [each.id for each in read_references(bench.root / "test.json", split="train")] == ["4"]
    with pytest.raises(DeloError, match="No val entries"):
        read_references(bench.root / "test.json", split="val")


def test_mapqas_question_is_read_from_the_answers_prompt_officially(bench: Bench) -> None:
    listing = "Which states are high?"
    bench.references([{"question_id": 0, "image": "MapQA_1.png", "text": "Q", "answer": "Ohio,Texas"}])
    bench.answers([{"question_id": 0, "prompt": listing, "text": "Ohio"}])
    found = bench.score("mllm_dcl_sci")["scores"]
    assert (found["native"]["score"], found["compat"]["score"]) == (0.0, 50.0)
    bench.answers([{"question_id": 0, "prompt": "Q", "text": "Ohio"}])
    assert bench.score("mllm_dcl_sci")["scores"]["compat"]["score"] == 0.0


def test_blanks_of_references_reach_the_rules(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", bench.root / "cache")
    asked = [{"question_id": i, "text": ASK, "answer": f" {word}"} for i, word in enumerate(("red", "blue"))]
    bench.references(asked)
    answers = bench.answers(said({0: " red", 1: "blue"}))
    assert bench.score("ucit_exact")["scores"]["compat"]["score"] == 50.0
    task = {"name": "one", "kind": "k", "scorer": "ucit_exact"}
    files = {"train": "train.json", "test": "test.json"}
    recipe = bench.root / "mine.yaml"
    recipe.write_text(yaml.safe_dump({"name": "mine", "tasks": [{**task, "files": files}]}))
    output = bench.root / "s.json"
    assert main(["score", str(answers), "--task", f"{recipe}/one", "--root", str(bench.root),
                 "--output", str(output)]) == 0  # fmt: skip
    assert json.loads(output.read_text())["scores"]["compat"]["score"] == 50.0
    records = read_records(load_task(str(recipe), "one", "test", bench.root), "test")
    assert [record.answer for record in records] == ["red", "blue"]
    assert [Reference.of(record).answer for record in records] == [" red", " blue"]


def test_reading_by_kind_and_counting_are_told_beside_the_score(bench: Bench) -> None:
    kinds = ["Handwriting Recognition", "Digit String Recognition", "Doc-oriented VQA"]
    bench.references(
        [
            {"question_id": i, "text": "Q", "answer": ["stop"], "answer_type": kind}
            for i, kind in enumerate(kinds)
        ]
    )
    bench.answers(said({0: "Stop", 1: "go", 2: "stop sign"}))
    native = bench.score("mllm_acl_ocr")["scores"]["native"]
    assert native["score"] == pytest.approx(200 / 3)
    assert native["details"] == {"Doc-oriented VQA": 100.0, "Text Recognition": 50.0}
    bench.references([{"question_id": i, "text": "Q", "answer": a, "task": t} for i, (a, t) in
                      enumerate([("3", "Count"), ("B", "Relation")])])  # fmt: skip
    bench.answers(said({0: "4", 1: "(B)"}))
    for found in bench.score("mllm_acl_vp")["scores"].values():
        assert (found["score"], found["details"]) == (50.0, {"Count": 0.0})
    bench.references([{"question_id": i, "text": "Q", "answer": "x"} for i in range(2)])
    assert "needs `answer_type`" in bench.refused("mllm_acl_ocr")


# ---- a task of a recipe


def test_a_task_needs_its_own_files_of_its_split_alone(tmp_path: Path) -> None:
    folder = tmp_path / "UCIT" / "Flickr30k"
    folder.mkdir(parents=True)
    rows = [{"question_id": i, "image": f"datasets/{i}.jpg", "text": "Q", "answer": "a"} for i in (1, 2)]
    (folder / "test.json").write_text(json.dumps(rows))
    with pytest.raises(DeloError, match="val_coco_type") as told:
        load_task("ucit", "flickr30k_caption", "test", tmp_path)
    assert "train" not in told.value.message and "iconqa" not in told.value.message
    captions = [{"image_id": i, "caption": f"c{i}"} for i in (1, 2)]
    (folder / "val_coco_type.json").write_text(json.dumps({"annotations": captions}))
    task = load_task("ucit", "flickr30k_caption", "test", tmp_path)
    assert [record.extra["captions"] for record in read_records(task, "test")] == [["c1"], ["c2"]]
    with pytest.raises(DeloError, match="no such task"):
        load_task("ucit", "flickr", "test", tmp_path)
    with pytest.raises(DeloError, match="no val file"):
        load_task("ucit", "iconqa", "val", tmp_path)


# ---- letters in two forms

#: Rules over numbers or letters of the alphabet alone.
WITHOUT_WORDS = {"grounding", "grounding_words", "scienceqa", "caption", "caption_plain", "mif"}


@pytest.mark.parametrize("name", sorted(set(plugin_names("scorer")) - WITHOUT_WORDS))
def test_composed_and_decomposed_letters_are_the_same_natively(name: str) -> None:
    scorer = cast(Scorer, load_plugin("scorer", name))
    for word in ("Ångström", "Ñandú", "Nguyễn"):
        composed, parted = (unicodedata.normalize(form, word) for form in ("NFC", "NFD"))
        assert composed != parted
        for said_, wanted in ((composed, parted), (parted, composed)):
            extra = {"answers": [wanted] * 10, "answer_type": "Handwriting Recognition"}
            assert scorer.total([said_], [Reference("q", wanted, extra=extra)]) == 1.0


def test_letters_in_two_forms_stay_two_officially() -> None:
    scorer = cast(Scorer, load_plugin("scorer", "ucit_exact")).in_mode("compat")
    assert scorer("caf\u00e9", Reference("q", "cafe\u0301")) == 0.0
    assert scorer("caf\u00e9", Reference("q", "caf\u00e9")) == 1.0


def test_choices_and_captions_in_two_forms() -> None:
    choices = {"choices": ["th\u00e9", "eau"]}
    science = cast(Scorer, load_plugin("scorer", "scienceqa"))
    assert science("the\u0301", Reference("q", "A", extra=choices)) == 1.0
    pytest.importorskip("pycocoevalcap")
    plain = cast(Scorer, load_plugin("scorer", "caption_plain"))
    asked = [
        Reference("1", "", extra={"captions": ["un caf\u00e9 noir"]}),
        Reference("2", "", extra={"captions": ["x"]}),
    ]
    assert plain.total(["un cafe\u0301 noir", "x"], asked) == plain.total(["un caf\u00e9 noir", "x"], asked)
