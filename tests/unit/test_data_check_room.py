"""The data check on room: what would be cut of a prompt, and which answers have no place after it."""

from data_support import Sequence, checked_data  # noqa: F401

from delo_llava import cli


def test_cut_records_are_counted_and_noted(data: Sequence) -> None:
    data.train[0]["context"] = "red " * 300
    data.write()
    assert cli.main(data.words("--data.max_length", "64")) == 0
    summary, *notes = data.report()
    assert summary["parts"][0]["cut"] == {"context": 1, "instruction": 0, "answer": 0}
    assert [note["record"] for note in notes if note["code"] == "text_cut"] == ["a0"]
    data.train[9]["conversations"][1]["value"] = "so " * 100
    data.write()
    assert cli.main(data.words("--data.max_length", "64")) == 0
    summary, *notes = data.report()
    assert summary["parts"][0]["cut"] == {"context": 1, "instruction": 0, "answer": 1}
    told = {note["code"]: (note["kind"], note["record"], note["message"]) for note in notes}
    assert told["text_cut"] == ("note", "a0", "cut to data.max_length=64: 1 contexts, 1 answers")
    long = "1 of 15 answers are longer than max_new_tokens=8"
    assert told["answer_long"] == ("note", "m9#0", long)


def test_a_cut_question_and_a_reference_that_no_answer_can_equal_are_noted(data: Sequence) -> None:
    """A reference of as many words as may be generated is none of them."""
    data.test[2]["text"] = "what " * 90
    data.test[3]["answer"], data.test[4]["answer"] = "one two " * 4, "one two " * 4 + "three"
    data.write()
    assert cli.main(data.words("--data.max_length", "64")) == 0
    notes = [line for line in data.report() if line["kind"] == "note" and line["split"] == "test"]
    assert [(note["code"], note["record"]) for note in notes] == [("text_cut", "q14"), ("answer_long", "q16")]
    assert notes[1]["message"].endswith("are longer than max_new_tokens=8, in every form that counts")


def test_pictures_that_leave_no_room_for_an_answer_are_told(data: Sequence) -> None:
    """The task's answers may have eight tokens, its pictures have sixteen."""
    assert cli.main(data.words("--data.max_length", "32")) == 1
    faults = [line for line in data.report() if line["kind"] == "fault"]
    assert {fault["code"] for fault in faults} == {"too_long"}
    assert len(faults) == 8, "those with a context, of which at least one token would stay"
    assert "the answer may have 8" in faults[0]["message"]
