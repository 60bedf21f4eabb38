"""The data check names every planted defect by file and record, is silent on clean data, and can go on."""

import json
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from data_support import Sequence, bomb, checked_data, picture, talk  # noqa: F401
from PIL import Image
from transformers import PreTrainedTokenizerBase

from delo_llava import cli
from delo_llava.data_tools import decode, forms
from delo_llava.data_tools.faults import FAULTS, NOTES
from delo_llava.data_tools.memory import Memory

#: What is found in the training file as it is.
APART = {"turns_apart": 1}


def found(data: Sequence, kind: str) -> list[dict[str, Any]]:
    """The faults or notes of the last report."""
    return [line for line in data.report() if line["kind"] == kind]


Plant = Callable[[Sequence], None]


def train(place: int, **changes: Any) -> Plant:
    """Change fields of a training entry."""
    return lambda data: data.train[place].update(changes)


def test(place: int, **changes: Any) -> Plant:
    """Change fields of a test entry."""
    return lambda data: data.test[place].update(changes)


test.__test__ = False  # type: ignore[attr-defined]


def said(turn: int, value: Any) -> Plant:
    """Change what is said in a turn of a training entry with two questions."""
    return lambda data: data.train[8]["conversations"][turn].update(value=value)


def no_turn(data: Sequence) -> None:
    data.train[8]["conversations"].pop()


def no_object(data: Sequence) -> None:
    data.train[3] = "a3"  # type: ignore[call-overload]


def gone(data: Sequence) -> None:
    (data.images / "2.png").unlink()


def a_folder(data: Sequence) -> None:
    gone(data)
    (data.images / "2.png").mkdir()


def cut_off(data: Sequence) -> None:
    file = data.images / "2.png"
    file.write_bytes(file.read_bytes()[:-25])


def pointer(data: Sequence) -> None:
    (data.images / "2.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def no_picture(data: Sequence) -> None:
    (data.images / "2.png").write_text("<html>404</html>")


def same_bytes(data: Sequence) -> None:
    (data.images / "14.png").write_bytes((data.images / "5.png").read_bytes())


def copied(data: Sequence) -> None:
    data.train.append({**data.train[4], "id": "again"})


#: What is planted -> (how, code, split, entry, record). The docs list these rows.
DEFECTS: dict[str, tuple[Plant, str, str, int, str]] = {
    "entry that is no object": (no_object, "entry_malformed", "train", 3, "3"),
    "conversations that is no list": (train(3, conversations="?"), "entry_malformed", "train", 3, "a3"),
    "turn without its answer": (no_turn, "entry_malformed", "train", 8, "m8"),
    "context that is no text": (train(3, context=["a"]), "entry_malformed", "train", 3, "a3"),
    "id that is a list": (train(3, id=["a"]), "entry_malformed", "train", 3, "['a']"),
    "two images": (train(3, image=["3.png", "4.png"]), "entry_malformed", "train", 3, "a3"),
    "empty question": (said(0, "<image>\n "), "instruction_empty", "train", 8, "m8"),
    "question that is no text": (test(1, text=None), "instruction_empty", "test", 1, "q13"),
    "empty answer in the second turn": (said(3, "  "), "answer_empty", "train", 8, "m8"),
    "absent answer": (test(1, answer=None), "answer_empty", "test", 1, "q13"),
    "placeholder without an image": (train(3, image=""), "placeholder_without_image", "train", 3, "a3"),
    "two placeholders": (said(0, "<image>\n<image>\nq"), "placeholder_surplus", "train", 8, "m8"),
    "answer beside the turns that is another": (train(3, answer="no"), "keys_compete", "train", 3, "a3"),
    "picture under another key": (train(11, img="1.png"), "image_key", "train", 11, "text"),
    "path that climbs out": (train(3, image="../x.png"), "image_outside", "train", 3, "a3"),
    "path of the image folder itself": (train(3, image="."), "image_outside", "train", 3, "a3"),
    "absolute path": (test(1, image="/etc/passwd"), "image_outside", "test", 1, "q13"),
    "image that is not there": (gone, "image_missing", "train", 2, "a2"),
    "image that is a folder": (a_folder, "image_missing", "train", 2, "a2"),
    "image cut off at its end": (cut_off, "image_undecodable", "train", 2, "a2"),
    "pointer of Git LFS": (pointer, "image_undecodable", "train", 2, "a2"),
    "web page instead of an image": (no_picture, "image_undecodable", "train", 2, "a2"),
    "decompression bomb": (lambda d: bomb(d.images / "2.png"), "image_too_large", "train", 2, "a2"),
    "repeated id": (train(5, id="a4"), "id_repeated", "train", 5, "a4"),
    "repeated record": (copied, "record_repeated", "train", 12, "again"),
    "test image that is trained on": (test(2, image="5.png"), "overlap_path", "test", 2, "q14"),
    "trained image under another name": (same_bytes, "overlap_content", "test", 2, "q14"),
    "image placeholder in a context": (train(3, context="<image>"), "placeholder_in_text", "train", 3, "a3"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_is_named_by_file_and_record(data: Sequence, name: str) -> None:
    plant, code, split, entry, record = DEFECTS[name]
    plant(data)
    data.write()
    assert cli.main(data.words()) == 1
    faults = found(data, "fault")
    [fault] = faults
    assert (fault["code"], fault["split"], fault["entry"], fault["record"]) == (code, split, entry, record)
    assert fault["file"] == str(data.folder / f"{split}.json")


def test_an_answer_of_which_nothing_would_be_trained_is_named(
    data: Sequence, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a tokenizer that knows none of its letters."""
    plain = PreTrainedTokenizerBase.decode

    def deaf(self: Any, ids: list[int], **options: Any) -> str:
        return plain(self, ids, **options).replace("zzz", "")

    monkeypatch.setattr(PreTrainedTokenizerBase, "decode", deaf)
    said(1, "zzz")(data)
    data.write()
    assert cli.main(data.words()) == 1
    [fault] = found(data, "fault")
    assert (fault["code"], fault["split"], fault["record"]) == ("label_empty", "train", "m8#0")


def test_control_tokens_in_an_answer_are_words(data: Sequence) -> None:
    said(1, "</s>")(data)
    data.write()
    assert cli.main(data.words()) == 0


def test_entries_that_lost_a_part_are_not_called_repeated(data: Sequence) -> None:
    """Their pictures differ; without them all say the same."""
    for place in (8, 9, 10):
        data.train[place]["images"] = ["11.png"]
    data.write()
    assert cli.main(data.words("--no-tokens")) == 1
    assert [fault["code"] for fault in found(data, "fault")] == ["keys_compete"] * 3


def test_clean_data_yields_nothing_but_how_many_turns_stand_apart(
    data: Sequence, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(data.words()) == 0
    summary, note = data.report()
    assert (note["kind"], note["code"], note["record"]) == ("note", "turns_apart", "m8#1")
    assert note["message"] == "3 records are later turns, each shown without the turns before it"
    assert (summary["faults"], summary["images_decoded"], summary["tokenizer"]) == (0, 17, "mini-llava")
    trained, tested = summary["parts"]
    counts = [trained[key] for key in ("entries", "records", "turns", "images", "without_image")]
    assert counts == [12, 15, 2, 11, 1]
    assert (trained["without_context"], trained["found"], tested["records"]) == (7, APART, 6)
    assert trained["extra"] == tested["extra"] == []
    assert trained["trained"] > 15
    assert "0 faults" in capsys.readouterr().out


def test_all_defects_together_are_all_told(data: Sequence, capsys: pytest.CaptureFixture[str]) -> None:
    for plant in (gone, copied, train(3, context=[]), test(1, answer=""), train(6, id="a5"), said(3, "")):
        plant(data)
    data.train[0]["image"] = "/x.png"
    data.train[0]["context"] = 5
    data.write()
    assert cli.main(data.words("--show", "3")) == 1
    faults = found(data, "fault")
    assert sorted(fault["code"] for fault in faults) == sorted(
        ["image_missing", "record_repeated", "entry_malformed", "answer_empty", "id_repeated", "answer_empty"]
        + ["image_outside", "entry_malformed"]
    )
    text = capsys.readouterr().out
    assert f"… and 5 more faults: all of them are in {data.folder / 'state.jsonl'}" in text
    assert "8 faults; report: " in text


def test_every_code_is_planted_or_tested_by_name() -> None:
    elsewhere = {
        "file_unreadable", "answer_form", "extra_missing", "prompt_refused", "label_form", "label_empty",
        "too_long",
    }  # fmt: skip
    assert {code for _, code, *_ in DEFECTS.values()} | elsewhere == set(FAULTS)
    assert not set(FAULTS) & set(NOTES)


def test_accepted_faults_are_notes_that_still_name_their_record(data: Sequence) -> None:
    copied(data)
    gone(data)
    data.write()
    assert cli.main(data.words("--allow", "record_repeated", "--allow=image_missing")) == 0
    notes = [(note["code"], note["record"]) for note in found(data, "note")]
    assert notes == [("accepted", "a2"), ("turns_apart", "m8#1"), ("accepted", "again")]
    assert found(data, "note")[2]["message"].startswith("record_repeated: says the same as entry 4")


def test_a_conversation_that_repeats_itself_is_a_note(data: Sequence) -> None:
    for place in (8, 9):
        data.train[place]["conversations"] += data.train[place]["conversations"][2:]
    data.write()
    assert cli.main(data.words("--no-tokens")) == 0
    _, note = found(data, "note")
    assert (note["code"], note["record"], note["message"][:2]) == ("turn_repeated", "m8#2", "2 ")


def test_a_second_check_decodes_only_what_changed(data: Sequence) -> None:
    assert cli.main(data.words()) == 0
    picture(data.images / "3.png", 999)
    os.utime(data.images / "3.png", ns=(1, 1))
    data.test[0]["answer"] = "green"
    data.write()
    assert cli.main(data.words()) == 0
    summary, *notes = data.report()
    assert (summary["images_decoded"], summary["images_known"]) == (1, 16)
    assert [note["code"] for note in notes] == ["annotations_changed", "turns_apart"]
    assert notes[0]["file"].endswith("test.json")


def test_a_bad_image_stays_bad_without_being_decoded_again(data: Sequence) -> None:
    no_picture(data)
    assert cli.main(data.words()) == 1
    assert cli.main(data.words()) == 1
    summary, fault, _ = data.report()
    assert (summary["images_decoded"], fault["code"]) == (0, "image_undecodable")


def test_a_killed_check_goes_on(data: Sequence, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of four, saved at once; the process dies in the third."""
    from delo_llava.data_tools import check

    monkeypatch.setattr(decode, "CHUNK", 4)
    monkeypatch.setattr(check, "SAVE_EVERY", 0.0)
    if (child := os.fork()) == 0:
        calls: list[str] = []
        judge = decode.judge

        def deadly(path: str) -> decode.Verdict:
            calls.append(path)
            return os._exit(9) if len(calls) == 10 else judge(path)

        decode.judge = deadly
        cli.main(data.words("--no-tokens", "--workers", "1"))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert cli.main(data.words("--no-tokens")) == 0
    summary = data.report()[0]
    assert (summary["images_decoded"], summary["images_known"]) == (9, 8)


def test_workers_say_the_same_as_one_process(data: Sequence, monkeypatch: pytest.MonkeyPatch) -> None:
    gone(data)
    cut_off_file = data.images / "3.png"
    cut_off_file.write_bytes(cut_off_file.read_bytes()[:-25])
    paths = [str(data.images / f"{number}.png") for number in range(18)]
    [*alone] = (verdict for chunk in decode.judge_all(paths, 1) for verdict in chunk)
    monkeypatch.setattr(decode, "CHUNK", 3)
    monkeypatch.setattr(decode, "WORTH_WORKERS", 0)
    together = [verdict for chunk in decode.judge_all(paths, 2) for verdict in chunk]
    assert sorted(together, key=lambda v: v.path) == sorted(alone, key=lambda v: v.path)


def test_files_too_large_are_refused_unread(data: Sequence, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "MAX_BYTES", 10)
    verdict = decode.judge(str(data.images / "1.png"))
    assert (verdict.code, verdict.sha256) == ("image_too_large", "")


def test_an_image_that_the_model_refuses_is_told(data: Sequence) -> None:
    """Qwen2-VL takes no image two hundred times as high as wide."""
    Image.new("RGB", (2, 600), "red").save(data.images / "2.png")
    model = str(tiny_models.session("qwen2_vl"))
    assert cli.main(data.words("--model", model)) == 1
    [fault] = found(data, "fault")
    assert (fault["code"], fault["record"], fault["entry"]) == ("prompt_refused", "a2", 2)
    assert "2x600" in fault["message"]


def test_test_references_are_looked_at_by_their_scorer(
    data: Sequence, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(forms.FORMS, "exact_match", forms.FORMS["grounding"])
    for entry in data.test:
        entry["answer"] = "[0.1, 0.1, 0.5, 0.5]"
    data.test[4]["answer"] = "[0.1, 0.1]"
    data.write()
    assert cli.main(data.words("--no-tokens")) == 1
    [fault] = found(data, "fault")
    assert (fault["code"], fault["split"], fault["record"]) == ("answer_form", "test", "q16")


def test_the_root_has_the_name_that_training_gives_it(data: Sequence) -> None:
    words = ["--data.root" if word == "--root" else word for word in data.words("--no-tokens")]
    assert cli.main(words) == 0


@pytest.mark.parametrize("word", ["0", "-1", "many"])
def test_workers_are_a_number_from_one(data: Sequence, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(data.words(f"--workers={word}"))
    assert f"--workers: {word!r} is no whole number from 1 on" in capsys.readouterr().err


def test_another_check_at_the_same_time_is_refused(data: Sequence) -> None:
    with Memory(data.folder / "state.sqlite"), pytest.raises(SystemExit, match="2"):
        cli.main(data.words())
    (data.folder / "state.sqlite").write_text("no database, but long enough to look like one" * 10)
    with pytest.raises(SystemExit, match="2"):
        cli.main(data.words())


def test_a_full_disk_is_told_with_a_remedy(data: Sequence, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(Memory, "refer", full)
    with pytest.raises(SystemExit, match="2"):
        cli.main(data.words())


def test_images_shared_across_tasks_are_a_note(data: Sequence) -> None:
    recipe = json.loads(data.recipe.read_text())
    other = {**recipe["tasks"][0], "name": "two", "files": {"train": "two.json", "test": "two_test.json"}}
    picture(data.images / "30.png", 300)
    (data.folder / "two.json").write_text(json.dumps([talk("z", "13.png", "what?", "red")]))
    question = {"question_id": "y", "image": "30.png", "text": "what?", "answer": "red"}
    (data.folder / "two_test.json").write_text(json.dumps([question]))
    data.recipe.write_text(json.dumps({**recipe, "tasks": [recipe["tasks"][0], other]}))
    assert cli.main(data.words("--no-tokens")) == 0
    note, _ = found(data, "note")
    assert (note["code"], note["task"]) == ("shared_across_tasks", "one")
    assert note["message"] == "1 images of this test are also trained on in two"


def test_the_docs_list_every_code_and_every_planted_defect() -> None:
    text = (Path(__file__).parents[2] / "docs" / "data_tools.md").read_text(encoding="utf-8")
    for code, meaning in {**FAULTS, **NOTES}.items():
        assert f"| `{code}` | {meaning} |" in text
    for name, (_, code, *_) in DEFECTS.items():
        [row] = [line for line in text.splitlines() if line.startswith(f"| `{code}` ")]
        assert name in row
