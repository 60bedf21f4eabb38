"""What is found before the first step: faults of the last tasks, and what should be known of the data."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
import training_support as support
from torch import nn

from delo_llava.adapters.unmergeable import PER_SAMPLE
from delo_llava.backbones.base import find_backbone
from delo_llava.config import TrainConfig, load_config
from delo_llava.errors import DeloError
from delo_llava.runs import room
from delo_llava.runs.job import Job, make_job
from delo_llava.runs.preflight import SHOWN, Preflight
from delo_llava.runs.sequence import run_sequence
from delo_llava.runs.store import RunStore
from delo_llava.training.fit import Kit


@pytest.fixture
def place(tmp_path: Path) -> Path:
    support.write_sequence(tmp_path, tasks=2, records=12)
    return tmp_path


def job(place: Path, *more: str) -> Job:
    model = tiny_models.session("llava")
    return make_job(load_config(None, support.words(place / "tiny.yaml", model, place / "run", *more)))


def look(place: Path, *more: str, evaluates: bool = True, after: int = 0) -> list[str]:
    """The notes of a look at the stages from number `after` on."""
    made = job(place, *more)
    backbone, path = find_backbone(made.config.model)
    return Preflight(made, Kit(backbone, backbone.load_processor(path))).run(made.plans[after:], evaluates)


def change(file: Path, row: int, **entries: Any) -> None:
    rows = json.loads(file.read_text())
    rows[row] |= entries
    file.write_text(json.dumps(rows))


def asks(text: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]


def test_nothing_is_told_of_sound_data(place: Path) -> None:
    assert look(place) == []


@pytest.mark.parametrize(
    ("split", "row", "entries", "told"),
    [
        ("train", 5, {"conversations": asks("what?", "a <image> of a sign")}, "holds the image placeholder"),
        ("train", 7, {"image": "images/nowhere.png"}, "there is no such file"),
        ("test", 1, {"context": "see <image> above"}, "holds the image placeholder"),
        ("test", 3, {"image": "images/Red.png"}, "red.png is there"),
    ],
)
def test_a_fault_of_the_last_task_is_found(
    place: Path, split: str, row: int, entries: dict[str, Any], told: str
) -> None:
    change(place / f"task1_{split}.json", row, **entries)
    with pytest.raises(DeloError, match=told) as error:
        look(place, "--missing.ratio=0", "--data.max_length=512")
    assert f"task1_{split}.json (task1/{split}, id {split}-{row})" in error.value.message


def test_such_a_fault_ends_the_run_before_its_first_step_and_leaves_the_folder_free(place: Path) -> None:
    change(place / "task1_train.json", 5, conversations=asks("what?", "a <image> of a sign"))
    with pytest.raises(DeloError, match="holds the image placeholder"):
        run_sequence(job(place), None)
    assert not any(RunStore(place / "run").adapters.iterdir())
    change(place / "task1_train.json", 5, conversations=asks("what?", "a sign"))
    run_sequence(job(place, "--train.max_steps=1"), None)
    assert (place / "run" / "complete.json").is_file()


def test_pictures_that_were_not_fetched_are_told(place: Path) -> None:
    (place / "images" / "blue.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(DeloError, match="pointer of Git LFS"):
        look(place, "--missing.ratio=0")


def test_all_faults_are_counted_and_the_first_told(place: Path) -> None:
    file = place / "task0_train.json"
    for row in range(12):
        change(file, row, image=f"images/lost{row}.png")
    with pytest.raises(DeloError, match="12 faults") as error:
        look(place, "--missing.ratio=0")
    assert error.value.message.count("lost") == SHOWN and f"{12 - SHOWN} more" in error.value.message
    assert error.value.fix is not None and "on_bad_image=skip" in error.value.fix


def test_what_is_never_shown_need_not_be_there(place: Path) -> None:
    """Pictures that the missing pattern takes away, of stages that are done, of questions that no limit
    leaves or nobody asks.
    """
    shutil.rmtree(place / "images")
    missing = ("--missing.ratio=1", "--missing.kind=image", "--eval.last_patterns=run")
    assert look(place, *missing) == []
    assert look(place, "--missing.ratio=0", after=2, evaluates=False) == []
    with pytest.raises(DeloError, match="8 faults"):
        look(place, *missing, "--eval.last_patterns=complete", "--eval.limit=100")
    with pytest.raises(DeloError, match="6 faults"):
        look(place, *missing, "--eval.last_patterns=complete", "--eval.limit=3")


def test_pictures_that_may_lack_are_counted_and_too_many_are_refused(place: Path) -> None:
    for row in (1, 4):
        change(place / "task1_train.json", row, image="images/lost.png")
    change(place / "task0_test.json", 0, image="images/lost.png")
    skip = ("--missing.ratio=0", "--data.on_bad_image=skip")
    notes = look(place, *skip)
    assert [note for note in notes if "task1: training records whose pictures cannot be used: 2;" in note]
    assert [note for note in notes if "task0/test: questions whose pictures cannot be used: 1;" in note]
    with pytest.raises(DeloError, match="task1: training records whose pictures cannot be used: 2") as error:
        look(place, *skip, "--data.max_bad_images=1")
    assert error.value.fix is not None and "data.max_bad_images" in error.value.fix


def test_a_task_without_pictures_and_turns_without_history_are_told(place: Path) -> None:
    rows = json.loads((place / "task1_train.json").read_text())
    for row in rows:
        del row["image"]
        row["conversations"] = asks("what?", "red") * 1
    rows[3]["conversations"] += asks("and its shape?", "round") + asks("say both again", "red, round")
    (place / "task1_train.json").write_text(json.dumps(rows))
    asked = [{"question_id": i, "text": "is red a colour?", "answer": "yes"} for i in range(3)]
    (place / "task0_test.json").write_text(json.dumps(asked))
    pictures, turns, questions = look(place, "--missing.ratio=0")
    assert pictures == "task1: none of the 14 training records has a picture"
    assert turns.startswith("task1: 2 of the 14 training records are later turns of a conversation")
    assert questions == "task0: none of the 3 test questions has a picture"


def test_references_that_no_answer_can_equal_are_told(place: Path) -> None:
    rows = json.loads((place / "task1_test.json").read_text())
    for row, answer in enumerate(("one " * 9, "one " * 30, "one")):
        change(
            place / "task1_test.json", row, conversations=asks(rows[row]["conversations"][0]["value"], answer)
        )
    (note,) = look(place)
    assert note.startswith(
        "task1/test: questions of which every reference answer is longer than max_new_tokens (8): 2 of 4;"
    )
    assert look(place, evaluates=False) == []
    use_scorer(place, "anls")
    change(place / "task1_test.json", 0, answers=["one " * 9, "one"])
    (note,) = look(place)
    assert ": 1 of 4;" in note, "one of the answers is short enough, and any counts"


def use_scorer(place: Path, scorer: str) -> None:
    """Judge the last task by it."""
    recipe = json.loads((place / "tiny.yaml").read_text())
    recipe["tasks"][1]["scorer"] = scorer
    (place / "tiny.yaml").write_text(json.dumps(recipe))


def test_a_reference_that_its_scorer_cannot_read_is_told_before_the_first_step(place: Path) -> None:
    use_scorer(place, "scienceqa")
    for row in range(4):
        change(place / "task1_test.json", row, conversations=asks("A. one\nB. two", "A"))
    assert look(place) == []
    change(place / "task1_test.json", 2, conversations=asks("A. one\nB. two", "both"))
    with pytest.raises(DeloError, match="must be a letter or an index") as error:
        look(place)
    assert "task1_test.json (task1/test, id test-2)" in error.value.message


def test_a_question_without_what_its_scorer_needs_is_told_or_left_out(place: Path) -> None:
    use_scorer(place, "vizwiz")
    for row in (0, 1, 3):
        change(place / "task1_test.json", row, answers=["red"] * 10)
    with pytest.raises(
        DeloError, match=r"task1_test\.json \(task1/test\): .* needs `answers`.* 1 of 4"
    ) as error:
        look(place)
    assert "test-2" in error.value.message and "--eval.on_bad_reference=skip" in str(error.value.fix)
    assert look(place, "--eval.on_bad_reference=skip") == [
        "task1/test: questions left out, whose reference lacks what the scorer needs: 1 of 4"
    ]
    for row in (0, 1, 3):
        change(place / "task1_test.json", row, answers=[])
    with pytest.raises(DeloError, match="No question of task1 can be scored"):
        look(place, "--eval.on_bad_reference=skip")


def test_what_is_cut_is_told_before_the_first_step(place: Path) -> None:
    """Also where another record of the batch is refused."""
    for row in (2, 5):
        change(place / "task1_train.json", row, context="and so on " * 300)
    change(place / "task0_test.json", 1, conversations=asks("why " * 300, "red"), context=None)
    notes = look(place, "--missing.ratio=0", "--data.max_length=128")
    assert notes == [
        "task1/train: contexts cut to data.max_length: 2 of 12",
        "task0/test: instructions cut to data.max_length: 1 of 4",
    ]
    change(place / "task1_train.json", 3, conversations=asks("what?", "a <image> of a sign"))
    made = job(place, "--missing.ratio=0", "--data.max_length=128")
    backbone, path = find_backbone(made.config.model)
    looked = Preflight(made, Kit(backbone, backbone.load_processor(path)))
    with pytest.raises(DeloError, match="holds the image placeholder"):
        looked.run(made.plans, False)
    assert looked.notes == notes[:1]


def without_context(place: Path, task: int) -> None:
    file = place / f"task{task}_train.json"
    rows = json.loads(file.read_text())
    file.write_text(json.dumps([{k: v for k, v in row.items() if k != "context"} for row in rows]))


def test_delo_trains_without_complete_records_and_says_what_its_map_is(place: Path) -> None:
    """The default method on ordinary data: pictures and questions, no further text."""
    small = ("--method=delo", "--delo.pool_size=4", "--delo.rank=2", "--delo.latent=8", "--missing.ratio=0")
    for task in (0, 1):
        without_context(place, task)
    run_sequence(job(place, *small, "--train.max_steps=1"), lambda run, stage: None)
    record = RunStore(place / "run").read_run()
    [note] = record["notes"]
    assert (record["method"], record["unmerged"]) == ("delo", list(PER_SAMPLE))
    assert "cross_modal=ridge: task0, task1" in note and "stays the identity" in note
    support.write_sequence(place, tasks=2, records=12)
    without_context(place, 0)
    [note] = look(place, *small)
    assert "cross_modal=ridge: task0:" in note, "the second task has complete records"
    assert look(place, *small, "--delo.cross_modal=identity") == []


def test_a_missing_pattern_that_takes_nothing_away_is_told(place: Path) -> None:
    without_context(place, 1)
    kinds = {kind: look(place, f"--missing.kind={kind}") for kind in ("image", "text", "both")}
    assert kinds["image"] == []
    for kind in ("text", "both"):
        [note] = kinds[kind]
        assert note == (
            f"task1: none of the 12 training records has a context, so --missing.kind {kind} takes none away"
        )


class TwoOfThree(nn.Module):
    """Twelve parameters, eight of them trained."""

    def __init__(self) -> None:
        super().__init__()
        self.trained, self.frozen = nn.Parameter(torch.zeros(8)), nn.Parameter(torch.zeros(4), False)


@pytest.mark.parametrize(
    ("train", "steps", "saved", "checkpoints"),
    [({"save_every": 0}, 100, 0, 0), ({"save_every": 50, "keep": 2}, 100, 0, 2),
     ({"save_every": 10, "keep": 2}, 100, 0, 3), ({"save_every": 10, "keep": 2}, 100, 2, 1)],
)  # fmt: skip
def test_what_a_run_writes_at_least(train: dict[str, int], steps: int, saved: int, checkpoints: int) -> None:
    state = {"sums": torch.zeros(5, dtype=torch.float64)}
    needed = room.room_needed(TwoOfThree(), state, TrainConfig(**train), 3, steps, saved)
    assert needed == 3 * 4 * 8 + checkpoints * (12 * 8 + 5 * 8)


def test_a_disk_that_is_too_small_ends_the_run_before_its_first_step(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(DeloError, match="too little room") as error:
        run_sequence(job(place), None)
    assert str(place / "run") in str(error.value.given) and error.value.fix is not None
    assert not (place / "run" / "logs" / "metrics.jsonl").is_file()
