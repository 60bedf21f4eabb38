"""`delo-eval score`: layouts of answers and references, shards, faults, missing answers, what is written."""

import json
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import yaml
from score_support import ASK, WORDS, Bench, entries, lines, said

from delo_eval.answers.files import answer_files, read_answers
from delo_eval.cli import main
from delo_eval.commands.score import GROUPS, SCHEMA
from delo_eval.scorers import _captions
from delo_llava.errors import DeloError


@pytest.fixture
def bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Bench:
    return Bench(tmp_path, capsys)


def test_native_and_official_scores_side_by_side(bench: Bench) -> None:
    bench.answers(said({0: "Red.", 1: "blue", 2: "grey", 3: "two ", 4: "yes!"}))
    found = bench.score("gqa", "--records", str(bench.root / "records.jsonl"))
    assert found["schema"] == SCHEMA and found["questions"] == 5 and found["missing"]["count"] == 0
    native, compat = found["scores"]["native"], found["scores"]["compat"]
    assert (native["scorer"], native["score"], native["records"]) == ("gqa.v2", 60.0, 5)
    assert (compat["scorer"], compat["score"], compat["records"]) == ("gqa.coin.v2", 40.0, 5)
    assert native["standard_error"] == pytest.approx(100 * (0.3 / 5) ** 0.5)  # variance 1.2 / 4
    assert found["instruction_following"] == {"scorer": "mif.v2", "score": 100.0, "records": 5}
    rows = [json.loads(line) for line in (bench.root / "records.jsonl").read_text().splitlines()]
    assert rows[3] == {
        "question_id": "3",
        "prediction": "two ",
        "answer": "two",
        "native": 1.0,
        "compat": 0.0,
    }
    assert [row["compat"] for row in rows] == [1, 1, 0, 0, 0]
    printed = bench.capsys.readouterr().out
    assert "gqa: 5 answers to 5 questions" in printed
    assert "native  gqa.v2       60.00   24.49" in printed and "compat  gqa.coin.v2  40.00" in printed


def test_one_mode_only(bench: Bench) -> None:
    bench.answers(said(dict(enumerate(WORDS))))
    assert set(bench.score("gqa", "--scoring", "compat")["scores"]) == {"compat"}
    assert set(bench.score("gqa", "--scoring", "native")["scores"]) == {"native"}
    assert set(bench.score("class_exact")["scores"]) == {"native"}
    assert "no official script" in bench.refused("class_exact", "--scoring", "compat")


LAYOUTS: dict[str, str] = {
    "ours": lines(
        [{"record_id": str(i), "answer": "reference", "prediction": w} for i, w in enumerate(WORDS)]
    ),
    "array": json.dumps([{"questionId": str(i), "prediction": w} for i, w in enumerate(WORDS)]),
    "one_line_array": json.dumps([{"question_id": i, "answer": w} for i, w in enumerate(WORDS)]),
    "indented": json.dumps([{"question_id": i, "text": w} for i, w in enumerate(WORDS)], indent=2),
    "bom": "\ufeff" + lines([{"question_id": i, "text": w} for i, w in enumerate(WORDS)]),
    "blank_lines": lines([{"question_id": i, "text": w} for i, w in enumerate(WORDS)]).replace("\n", "\n\n"),
    "science_output": json.dumps(
        {
            "correct": [{"question_id": str(i), "pred": w, "question": ASK} for i, w in enumerate(WORDS[:3])],
            "incorrect": [{"question_id": str(i), "pred": WORDS[i], "question": ASK} for i in (3, 4)],
        },
        indent=2,
    ),
    "science_result": json.dumps(
        {"acc": 1.0, "results": {}, "outputs": {str(i): w for i, w in enumerate(WORDS)}}
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_answer_files_of_all_layouts(bench: Bench, layout: str) -> None:
    (bench.root / "answers.jsonl").write_text(LAYOUTS[layout])
    assert bench.score("exact_match")["scores"]["native"]["score"] == 100.0


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"question_id": 1}\n', "has no text"),
        ('{"text": "red"}\n', "has no id"),
        ('{"question_id": 1, "text": null}\n', "an answer must be text"),
        ('{"question_id": 1, "text": "red"}\n{"question_id": 2\n', "line 2 is not JSON"),
        ("red\nblue\n", "neither JSON lines nor JSON"),
        ('{"a": 1\n}', "holds no answers"),
        ("[1, 2]", "is not an object"),
        ("", "the file is empty"),
    ],
)
def test_faulty_answer_files(bench: Bench, text: str, told: str) -> None:
    (bench.root / "answers.jsonl").write_text(text)
    assert told in bench.refused("exact_match")


def test_an_answer_file_that_is_not_utf8_is_named(bench: Bench) -> None:
    (bench.root / "answers.jsonl").write_bytes('{"question_id": 1, "text": "café"}\n'.encode("latin-1"))
    told = bench.refused("exact_match")
    assert "is not UTF-8" in told and "answers.jsonl" in told


def test_shards_are_joined_in_the_order_of_their_index(tmp_path: Path) -> None:
    for index in range(11):
        (tmp_path / f"11_{index}.jsonl").write_text(lines(said({index: str(index)})) if index != 10 else "")
    (tmp_path / "merge.jsonl").write_text("not read when there are shards")
    expected = [str(index) for index in range(10)]
    backwards = sorted((str(file) for file in tmp_path.glob("11_*")), reverse=True)
    for given in ([str(tmp_path)], [str(tmp_path / "11_*.jsonl")], backwards):
        assert read_answers(answer_files(given)).ids == expected


def test_whole_files_keep_the_order_they_are_named_in(tmp_path: Path) -> None:
    for name, row in (("b.jsonl", 1), ("a.jsonl", 2)):
        (tmp_path / name).write_text(lines(said({row: "x"})))
    assert read_answers(answer_files([str(tmp_path / "b.jsonl"), str(tmp_path / "a.jsonl")])).ids == [
        "1",
        "2",
    ]
    (tmp_path / "merge.jsonl").write_text(lines(said({3: "x"})))
    assert read_answers(answer_files([str(tmp_path)])).ids == ["3"]


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["3_0.jsonl", "3_2.jsonl"], "Of 3 shards 1 are missing: 1."),
        (["2_0.jsonl", "3_1.jsonl"], "of several runs"),
        (["2_0.jsonl", "2_00.jsonl"], "of several runs"),
        (["2_0.jsonl", "2_1.jsonl", "2_2.jsonl"], "Of 2 shards"),
        (["other.txt"], "no answers in this folder"),
    ],
)
def test_incomplete_or_mixed_shards_are_errors(tmp_path: Path, names: list[str], told: str) -> None:
    for name in names:
        (tmp_path / name).write_text("")
    with pytest.raises(DeloError, match=told):
        answer_files([str(tmp_path)])


def test_shards_beside_whole_files_and_absent_files_are_errors(tmp_path: Path) -> None:
    for name in ("2_0.jsonl", "2_1.jsonl", "more.jsonl"):
        (tmp_path / name).write_text("")
    with pytest.raises(DeloError, match="mixed"):
        answer_files([str(tmp_path / "*.jsonl")])
    for word in ("none.jsonl", "none_*.jsonl"):
        with pytest.raises(DeloError, match="no such answer file"):
            answer_files([str(tmp_path / word)])


def test_missing_repeated_and_unknown_ids_are_told_together(bench: Bench) -> None:
    bench.answers([*said({0: "red", 1: "blue", 7: "x", 9: "y"}), *said({1: "green"})])
    told = bench.refused("exact_match")
    assert "5 answers do not fit 5 questions" in told
    assert "2 answers to unknown questions: 7, 9" in told
    assert "1 answers to questions that have one: 1" in told
    assert "3 questions without answer: 2, 3, 4" in told
    told = bench.refused("exact_match", "--allow-missing")
    assert "unknown questions: 7, 9" in told and "that have one: 1" in told and "without answer" not in told


def test_missing_answers_are_counted_wrong_and_said_so(bench: Bench) -> None:
    bench.answers(said({0: "red", 1: "blue", 2: "green"}))
    assert "2 questions without answer: 3, 4" in (told := bench.refused("gqa")) and "--allow-missing" in told
    found = bench.score("gqa", "--allow-missing", "--records", str(bench.root / "r.jsonl"))
    assert found["missing"] == {"count": 2, "ids": ["3", "4"]}
    assert (found["scores"]["native"]["score"], found["scores"]["native"]["records"]) == (60.0, 5)
    compat = found["scores"]["compat"]
    assert (compat["score"], compat["records"], compat["unanswered"]) == (100.0, 3, "skipped")
    assert found["instruction_following"]["score"] == 60.0
    out = bench.capsys.readouterr().out
    assert "2 questions have no answer: counted wrong (native) and left out (compat)" in out
    last = json.loads((bench.root / "r.jsonl").read_text().splitlines()[-1])
    assert (last["prediction"], last["native"], last["compat"]) == (None, 0.0, None)


def test_scienceqa_counts_missing_answers_wrong_officially_too(bench: Bench) -> None:
    bench.references(entries("ABCD"))
    bench.answers([{**row, "question_id": str(row["question_id"])} for row in said({0: "A", 1: "B"})])
    found = bench.score("scienceqa", "--allow-missing")["scores"]
    assert (found["compat"]["score"], found["compat"]["records"]) == (50.0, 4)


def test_imagenet_is_paired_by_position_officially_and_by_id_natively(bench: Bench) -> None:
    bench.references(entries(["cat", "dog", "bird", "fish"]))
    bench.answers(said({3: "fish", 2: "bird", 1: "dog", 0: "cat"}))
    found = bench.score("imagenet")["scores"]
    assert (found["native"]["score"], found["compat"]["score"]) == (100.0, 0.0)
    bench.answers(said({0: "cat", 2: "bird", 3: "fish"}))  # one line lost: everything after it shifts
    found = bench.score("imagenet", "--allow-missing")["scores"]
    assert found["native"]["score"] == 75.0
    assert (found["compat"]["score"], found["compat"]["records"]) == (pytest.approx(100 / 3), 3)
    bench.answers(said({0: "", 1: "", 2: "", 3: ""}))
    found = bench.score("imagenet")["scores"]
    assert (found["native"]["score"], found["compat"]["score"]) == (0.0, 100.0)


def test_captions_are_paired_by_line_officially_and_a_missing_one_stops_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain tokens and no METEOR stand in for the Java programs: the pairing is what is tested."""
    monkeypatch.setattr(_captions.shutil, "which", lambda name: "/usr/bin/java")
    monkeypatch.setattr(_captions, "_ptb", _captions._plain)
    monkeypatch.setattr(_captions, "_meteor", lambda wanted, said: 0.0)
    _captions.metrics.cache_clear()
    texts = ["a man rides a brown horse", "two boats on a lake"]
    bench.references([{"question_id": i, "text": ASK, "captions": [text]} for i, text in enumerate(texts)])
    bench.answers(said({1: texts[1], 0: texts[0]}))
    found = bench.score("caption")["scores"]
    assert found["native"]["score"] == pytest.approx(1000)
    assert found["compat"]["score"] < 100
    bench.answers(said({0: texts[0]}))
    found = bench.score("caption", "--allow-missing")
    assert "native" in found["scores"] and "fails on missing answers" in found["not_scored"]
    assert "fails on missing" in bench.refused("caption", "--allow-missing", "--scoring", "compat")
    _captions.metrics.cache_clear()


def test_an_official_rule_that_does_not_fit_the_data_is_told(bench: Bench) -> None:
    bench.references([{"question_id": 0, "text": ASK, "answers": ["red"] * 5}])
    bench.answers(said({0: "red"}))
    found = bench.score("textvqa")
    assert found["scores"]["native"]["score"] == 100.0 and "compat" not in found["scores"]
    assert "exactly 10 answers" in found["not_scored"]
    assert "not scored: textvqa.m4c.v1" in bench.capsys.readouterr().out
    assert "exactly 10 answers" in bench.refused("textvqa", "--scoring", "compat")


def test_details_of_rules_over_the_corpus(bench: Bench) -> None:
    bench.references([{"question_id": 0, "text": ASK, "answer": "drama, war", "labels": ["drama", "war"]}])
    bench.answers(said({0: "drama"}))
    native = bench.score("multilabel_f1")["scores"]["native"]
    assert (native["score"], native["standard_error"]) == (50.0, None)
    assert native["details"] == pytest.approx({"sample F1": 200 / 3, "F1 drama": 100.0, "F1 war": 0.0})
    assert "  F1 drama: 100.00" in bench.capsys.readouterr().out


def test_answers_to_repeated_ids_go_in_order(bench: Bench) -> None:
    bench.references([{"question_id": 1, "text": ASK, "answer": word} for word in ("red", "blue")])
    bench.answers([*said({1: "red"}), *said({1: "blue"})])
    assert bench.score("exact_match")["scores"]["native"]["score"] == 100.0


def test_a_task_of_a_recipe_brings_its_scorer_and_questions(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", bench.root / "cache")
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    (bench.root / "train.json").write_text(json.dumps([{"id": "a", "conversations": turns}]))
    task = {
        "name": "one",
        "kind": "k",
        "scorer": "gqa",
        "files": {"train": "train.json", "test": "test.json"},
    }
    (bench.root / "mine.yaml").write_text(yaml.safe_dump({"name": "mine", "tasks": [task]}))
    answers = bench.answers(said(dict(enumerate(["red", "Blue", "green", "2", "yes"]))))
    output, asked = bench.root / "s.json", ["--task", f"{bench.root / 'mine.yaml'}/one"]
    words = ["score", str(answers), *asked, "--root", str(bench.root), "--output", str(output)]
    assert main(words) == 0
    assert json.loads(output.read_text())["scores"]["native"]["score"] == 80.0
    assert main([*words, "--scorer", "class_exact"]) == 0
    assert json.loads(output.read_text())["scores"]["native"]["scorer"] == "class_exact.v2"
    (bench.root / "train.json").unlink()
    assert main(words) == 0  # scoring needs the questions alone
    (bench.root / "test.json").rename(bench.root / "questions.json")
    with pytest.raises(SystemExit):
        main(words)
    assert "--references FILE" in bench.capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["score", str(answers), "--task", f"{bench.root / 'mine.yaml'}/oen"])
    assert "did you mean one?" in bench.capsys.readouterr().err


def test_coin_means_the_recipe_that_has_the_task(bench: Bench) -> None:
    bench.answers(said(dict(enumerate(WORDS))))
    words = ["score", str(bench.root / "answers.jsonl"), "--references", str(bench.root / "test.json")]
    for task, recipe in (("coin/gqa", GROUPS["coin"]), ("coin6/gqa", ["coin6"])):
        assert main([*words, "--task", task]) == 0
        told = bench.capsys.readouterr().out
        assert any(told.startswith(f"{name}/gqa: 5 answers to 5 questions") for name in recipe)


def test_the_tasks_name_reaches_rules_that_differ_by_task(bench: Bench) -> None:
    bench.answers(said(dict(enumerate(f"it is {word}" for word in WORDS))))
    assert bench.score("contains", "--task", "gqa")["scores"]["compat"]["score"] == 100.0
    assert bench.score("contains", "--task", "iconqa")["scores"]["compat"]["score"] == 0.0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "What to score is not said"),
        (["--task", "gqa"], "What to score is not said"),
        (["--scorer", "gqa"], "--references FILE"),
        (["--scorer", "gqqa", "--references", "x"], "did you mean gqa?"),
        (["--task", "coin5/gqa"], "coin5"),
    ],
)
def test_mistakes_in_the_words(bench: Bench, words: list[str], told: str) -> None:
    answers = bench.answers(said({0: "red"}))
    with pytest.raises(SystemExit) as caught:
        main(["score", str(answers), *words])
    assert caught.value.code == 2
    assert told in bench.capsys.readouterr().err


def test_scoring_imports_nothing_heavy(bench: Bench) -> None:
    bench.answers(said(dict(enumerate(WORDS))))
    code = (
        "import sys; from delo_eval.cli import main; main(sys.argv[1:]); print(*sys.modules, file=sys.stderr)"
    )
    asked = [
        str(bench.root / "answers.jsonl"),
        "--scorer",
        "gqa",
        "--references",
        str(bench.root / "test.json"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, "score", *asked], capture_output=True, text=True, check=True
    )
    assert "gqa.coin.v2" in done.stdout
    heavy = {"torch", "transformers", "datasets", "numpy", "pydantic", "matplotlib", "pycocoevalcap"}
    assert not heavy & set(done.stderr.split())
