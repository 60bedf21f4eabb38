"""Evaluations that were killed, damaged, stopped, changed or repeated: what is answered again, what not."""

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import yaml
from answer_support import CPU, STAGE, batches_asked, counts, evaluated, model_refused, outcome, own_copy  # noqa: F401
from PIL import Image
from run_support import TASKS, Alone, little_recipe, predictions  # noqa: F401

import delo_eval
import delo_llava
import delo_recipes
from delo_eval.answers import code
from delo_eval.answers.hashes import FileHashes
from delo_eval.answers.keys import AnswerKeys
from delo_eval.answers.question import Answer, Question
from delo_eval.answers.store import CellAnswers, PartWriter
from delo_eval.harness.folder import Request
from delo_eval.harness.generate import Answerer
from delo_eval.harness.stage import evaluate_stage
from delo_eval.harness.unchanged import unchanged_stage
from delo_llava.data.recipe import load_sequence
from delo_llava.engines import signals
from delo_llava.errors import DeloError
from delo_llava.registry import KINDS
from delo_llava.runs.identity import data_hashes
from delo_llava.runs.store import RunStore
from delo_llava.tasks import Record


def killed_after(batches: int, monkeypatch: pytest.MonkeyPatch, evaluate: Callable[[], object]) -> None:
    """Run an evaluation that dies, without any clearing up, when it has decoded so many batches."""
    plain, left = Answerer.answer, [batches]

    def mortal(self: Answerer, questions: Any, tokens: int) -> list[Answer]:
        if left[0] == 0:
            raise MemoryError("killed")
        left[0] -= 1
        return plain(self, questions, tokens)

    with monkeypatch.context() as patch:
        patch.setattr(Answerer, "answer", mortal)
        with pytest.raises(MemoryError):
            evaluate()


def test_killed_evaluations_end_in_the_same_bytes_with_any_number_of_ranks(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[int]
) -> None:
    request = Request(output=tmp_path)

    def rank(number: int, world: int) -> Callable[[], object]:
        return lambda: evaluate_stage(original, STAGE, request=request, ranks=Alone(number, world, CPU))

    killed_after(2, monkeypatch, rank(0, 1))
    killed_after(1, monkeypatch, rank(1, 3))
    killed_after(2, monkeypatch, rank(0, 2))
    part = next((tmp_path / "answers").rglob(".*part-*"))
    with part.open("ab") as handle:
        handle.write(b'{"key": "torn')  # as a kill in the middle of a write leaves it
    rank(1, 2)()
    rank(0, 2)()
    assert sum(asked) == 27  # no question twice
    assert outcome(tmp_path) == outcome(original)
    assert not list((tmp_path / "answers").rglob(".*part*"))


def test_an_unchanged_stage_needs_no_model_and_stands(run: Path, no_model: None) -> None:
    before = outcome(run)
    assert evaluate_stage(run, STAGE) is not None
    assert outcome(run) == before and counts(run) == {"stored": 27, "new": 0}


def test_an_unchanged_stage_needs_no_torch(run: Path) -> None:
    code = (
        "import sys; from delo_eval.harness.run import main; "
        f"code = main(['--run', {str(run)!r}, '--stage', '1']); "
        "sys.exit(code or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "nothing has changed" in done.stdout and "2. words: 27 / 0" in done.stdout


def test_without_the_receipt_the_stored_answers_serve(run: Path, no_model: None) -> None:
    before = outcome(run)
    (run / "answers" / "1.json").unlink()
    evaluate_stage(run, STAGE)
    assert outcome(run) == before and counts(run) == {"stored": 27, "new": 0}


@pytest.mark.parametrize("batch_size", [1, 7])
def test_the_batch_size_is_no_reason_to_ask_again(run: Path, no_model: None, batch_size: int) -> None:
    (run / "answers" / "1.json").unlink()
    evaluate_stage(run, STAGE, request=Request(batch_size=batch_size))
    assert counts(run)["new"] == 0


def test_a_changed_scorer_only_scores_again(
    run: Path, no_model: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from delo_eval.harness import unchanged

    monkeypatch.setattr(unchanged, "package_hash", lambda names: "other code")
    monkeypatch.setattr("delo_eval.scorers.exact_match.SCORER.function.__code__", (lambda p, r: 1.0).__code__)
    content = evaluate_stage(run, STAGE)
    assert content is not None and content["matrix"]["matched"][STAGE] == [100.0] * 3


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of this project's source, which keys and receipts are made of meanwhile."""
    for package in (delo_llava, delo_eval, delo_recipes):
        shutil.copytree(
            Path(str(package.__file__)).parent,
            tmp_path / "source" / package.__name__,
            ignore=shutil.ignore_patterns("__pycache__", "assets"),
        )
    plain = code.find_spec

    def found(name: str) -> ModuleSpec | None:
        file = tmp_path / "source" / name / "__init__.py"
        place = [str(file.parent)]
        there = spec_from_file_location(name, file, submodule_search_locations=place)
        return there if file.is_file() else plain(name)

    monkeypatch.setattr(code, "find_spec", found)
    forget_code()
    yield tmp_path / "source"
    forget_code()


def forget_code() -> None:
    code.package_hash.cache_clear()
    code.source_hash.cache_clear()


def test_further_plug_ins_are_no_reason_to_ask_again(
    run: Path, source: Path, no_model: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = outcome(run)
    (source / "mine" / "methods").mkdir(parents=True)
    monkeypatch.setenv("DELO_LLAVA_PLUGINS", str(source / "mine"))
    for kind in KINDS.values():  # so that what is added to them goes with this test
        package = importlib.import_module(kind.package)
        monkeypatch.setattr(package, "__path__", list(package.__path__))
    for folder in ("delo_llava/methods", "delo_llava/backbones", "delo_eval/scorers", "mine/methods"):
        (source / folder / "further.py").write_text("NEW = 1")
    evaluate_stage(run, STAGE)
    assert outcome(run) == before and counts(run) == {"stored": 27, "new": 0}


def test_code_that_decides_an_answer_is(run: Path, source: Path, asked: list[int]) -> None:
    with (source / "delo_llava" / "methods" / "_lora.py").open("a") as file:
        file.write("NEW = 1")
    evaluate_stage(run, STAGE)
    assert sum(asked) == 27


def test_no_cache_asks_everything_again(run: Path, asked: list[int]) -> None:
    before = outcome(run)
    evaluate_stage(run, STAGE, request=Request(cache=False))
    assert sum(asked) == 27 and outcome(run) == before and counts(run) == {"stored": 0, "new": 27}


def test_a_limit_asks_nothing_new_and_forgets_nothing(run: Path, no_model: None) -> None:
    shutil.copytree(run / "answers", run / "eval-test" / "answers")
    evaluate_stage(run, STAGE, request=Request(limit=4))
    kept = CellAnswers(run / "eval-test", STAGE, "run", "words").read()
    assert len(kept) == 9 and len(predictions(run / "eval-test", 1)["words"]) == 4


@pytest.mark.parametrize(
    ("change", "again"),
    [({"missing": {"image": "dummy"}}, 27), ({"data": {"max_length": 500}}, 27), ({"seed": 5}, 0)],
)
def test_changed_settings(run: Path, asked: list[int], change: dict[str, Any], again: int) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    for key, value in change.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "results.json").unlink()
    evaluate_stage(run, STAGE)
    assert sum(asked) == again


@pytest.fixture
def own_recipe(run: Path) -> Path:
    """The recipe of `run`, in a folder of data of its own; the second task has a file beside its records."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    data = Path(shutil.copytree(config["data"]["root"], run / "data"))
    file = data / "little.yaml"
    content = yaml.safe_load(file.read_text())
    side = {"name": "hints", "file": "hints.json", "shape": "map", "extra": {"hint": "hint"}}
    content["tasks"][1] |= {"sides": [side], "scorer": "exact_match"}
    file.write_text(yaml.safe_dump(content))
    (data / "hints.json").write_text(json.dumps({f"words{i}": {"hint": "one"} for i in range(9)}))
    config["task_seq"], config["data"]["root"] = str(file), str(data)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    store = RunStore(run)
    store.update_run(data_hashes=data_hashes(store, load_sequence(str(file), data)))
    return file


@pytest.mark.parametrize(
    "change",
    [
        lambda file: file.write_text(file.read_text().replace("exact_match", "contains", 1)),
        lambda file: file.write_text(file.read_text().replace("max_new_tokens: 3", "max_new_tokens: 5", 1)),
        lambda file: (file.parent / "hints.json").write_text('{"words1": {"hint": "another"}}'),
        lambda file: (file.parent / "words_test.json").write_text("[]"),
    ],
)
def test_what_the_records_and_scores_come_from_is_looked_at(
    run: Path, own_recipe: Path, no_model: None, change: Callable[[Path], object]
) -> None:
    def data() -> list[str]:
        return [file.read_text() for file in sorted(own_recipe.parent.glob("*.[yj]*"))]

    evaluate_stage(run, STAGE)
    before = data()
    assert unchanged_stage(run, STAGE) is not None
    change(own_recipe)
    assert data() != before and unchanged_stage(run, STAGE) is None


def test_results_that_were_edited_are_computed_again(run: Path, no_model: None) -> None:
    before = outcome(run)
    content = json.loads((run / "results.json").read_text())
    content["matrix"]["matched"][1][0] = 99.0
    (run / "results.json").write_text(json.dumps(content))
    evaluate_stage(run, STAGE)
    assert outcome(run) == before


@pytest.fixture
def unsignalled() -> Iterator[None]:
    yield
    signals.clear()


def test_a_signal_stops_after_the_batch_and_the_next_evaluation_goes_on(
    original: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: list[int],
    unsignalled: None,
) -> None:
    request = Request(output=tmp_path)

    def signalled(cell: str, done: int, total: int) -> None:
        if done == 8:
            signals._received.append("SIGTERM")

    with pytest.raises(signals.Preempted) as left:
        evaluate_stage(original, STAGE, request=request, progress=signalled)
    assert left.value.code == 75 and asked == [4, 4]
    assert not (tmp_path / "results.json").exists()
    signals.clear()
    evaluate_stage(original, STAGE, request=request)
    assert sum(asked) == 27 and outcome(tmp_path) == outcome(original)


def test_a_folder_that_cannot_be_written_is_told_before_a_model_is_loaded(
    original: Path, tmp_path: Path, no_model: None
) -> None:
    (tmp_path / "answers").mkdir()
    (tmp_path / "answers" / "1").write_text("in the way")
    with pytest.raises(DeloError, match=r"cannot be written(.|\n)*MiB free(.|\n)*--output"):
        evaluate_stage(original, STAGE, request=Request(output=tmp_path))


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left"), Path("/dev/full").open("wb") as full:  # noqa: SIM117
        with pytest.raises(DeloError, match="No space left"):
            PartWriter(full, tmp_path).append([("key", "id", Answer("x", None))])


def test_what_another_process_is_writing_is_read_and_left_alone(tmp_path: Path) -> None:
    cell, other = CellAnswers(tmp_path, 0, "run", "t"), CellAnswers(tmp_path, 0, "run", "t")
    mine, theirs = ("c-1", "a", Answer("x", None)), ("c-2", "b", Answer("y", None))
    with other.writer(0) as busy:
        busy.append([theirs])
        with cell.writer(0) as part:
            part.append([mine])
        known = cell.read()
        assert known == {"c-1": mine, "c-2": theirs}
        cell.join("c-", ["c-1"], known)
        busy.append([("c-3", "c", Answer("z", None))])
    assert set(other.read()) == {"c-1", "c-2", "c-3"}
    cell.join("c-", ["c-1"], cell.read())
    assert [file.name for file in cell.file.parent.iterdir()] == ["t.jsonl"]
    cell.join("d-", [], cell.read())  # of another model: nothing of before is kept
    assert cell.read() == {}


def test_a_key_holds_what_is_shown_and_nothing_else(tmp_path: Path) -> None:
    picture = tmp_path / "p.png"
    Image.new("RGB", (4, 4)).save(picture)

    def key(record: Record, image: bool = True, text: bool = True, tokens: int = 3, **facts: Any) -> str:
        return AnswerKeys(facts, FileHashes(tmp_path)).of(Question(record, (image, text)), tokens)

    def record(**changes: Any) -> Record:
        given: dict[str, Any] = {
            "id": "r", "task": "t", "split": "test", "image": picture, "context": "c", "instruction": "i",
            "answer": "a",
        }  # fmt: skip
        return Record(**{**given, **changes})

    base = key(record())
    assert base == key(record(answer="b")) == key(record(split="val")) == key(record(extra={"x": 1}))
    hidden = key(record(), image=False)
    others = [
        key(record(id="s")), key(record(task="u")), key(record(context="d")), key(record(instruction="j")),
        key(record(), text=False), key(record(), tokens=4), key(record(), beams=2), hidden,
    ]  # fmt: skip
    assert len({base, *others}) == len(others) + 1
    assert key(record(context="d"), text=False) == key(record(), text=False)
    Image.new("RGB", (5, 5)).save(picture)
    changed = key(record())
    assert changed != base and key(record(), image=False) == hidden
    picture.unlink()
    assert key(record()) not in (base, changed)


def test_images_that_cannot_be_used(original: Path, run: Path, asked: list[int]) -> None:
    picture = original.parents[1]
    config = yaml.safe_load((run / "config.yaml").read_text())
    data = Path(shutil.copytree(config["data"]["root"], run / "data"))
    (data / "picture.png").write_bytes(b"no picture")
    file = data / "little.yaml"
    config["task_seq"], config["data"]["root"] = str(file), str(data)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(DeloError, match="image of record"):
        evaluate_stage(run, STAGE)
    config["data"]["on_bad_image"] = "skip"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    content = evaluate_stage(run, STAGE)
    assert content is not None and picture.exists()
    shown = [row for row in predictions(run, 1)["words"] if row["presence"]["image"]]
    assert content["bad_images"]["1"]["run"]["words"] == [row["record_id"] for row in shown]
    assert all(row["score"] == 0 and row["prediction"] == "" for row in shown)
    assert all("cannot be used" in row["image_fault"] for row in shown)
    before = len(asked)
    evaluate_stage(run, STAGE)
    assert len(asked) == before  # known to be unusable
    config["data"]["on_bad_image"] = "error"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(DeloError, match="image of record"):
        evaluate_stage(run, STAGE)
    assert set(TASKS) == set(predictions(run, 1))
