"""Layouts that people have are read alike; what is not understood is refused with the keys that are read."""

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from data_support import Sequence
from PIL import Image

from delo_llava import cli
from delo_llava.data.readers import open_reading, read_records
from delo_llava.errors import DeloError
from delo_llava.tasks import Record, TaskSpec


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELO_LLAVA_CACHE", str(tmp_path / "cache"))


def spec(folder: Path, *entries: Any) -> TaskSpec:
    """A task with these training entries."""
    file = folder / "train.json"
    file.write_text(json.dumps(entries))
    return TaskSpec("t", "k", {"train": file}, folder / "images")


def read(folder: Path, *entries: Any) -> list[Record]:
    return list(read_records(spec(folder, *entries), "train"))


Q, A = "<image>\nWhich bird sits there?", "a wren"
PARTS = [{"type": "image", "text": None}, {"type": "text", "text": "Which bird sits there?"}]

#: Entries that all ask `Which bird sits there?` of b.png and answer `a wren`.
SAME: dict[str, dict[str, Any]] = {
    "LLaVA": {
        "image": "b.png",
        "conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": A}],
    },
    "ShareGPT with roles": {
        "image": "b.png",
        "conversations": [{"from": "user", "value": Q}, {"from": "assistant", "value": A}],
    },
    "turns of role and content": {
        "image": "b.png",
        "conversations": [{"role": "user", "content": Q}, {"role": "assistant", "content": A}],
    },
    "LLaMA-Factory's messages": {
        "images": ["b.png"],
        "messages": [{"role": "user", "content": Q}, {"role": "assistant", "content": A}],
    },
    "messages of parts": {
        "images": ["b.png"],
        "messages": [
            {"role": "user", "content": PARTS},
            {"role": "assistant", "content": [{"type": "text", "text": A}]},
        ],
    },
    "ms-swift": {"query": Q, "response": A, "images": ["b.png"], "history": []},
    "Alpaca": {"instruction": Q, "input": "", "output": A, "image": ["b.png"]},
    "Alpaca with input": {
        "instruction": "<image>Which bird",
        "input": "sits there?",
        "output": A,
        "image": "b.png",
    },
    "a question of VQA": {
        "question_id": 7,
        "question": "Which bird sits there?",
        "answer": A,
        "image": "b.png",
    },
    "a test of CoIN": {"question_id": 7, "text": Q, "answer": A, "image": "b.png"},
    "the same said twice": {
        "image": "b.png",
        "images": ["b.png"],
        "text": Q,
        "question": Q,
        "answer": A,
        "response": A,
    },
    "turns and their answer": {
        "image": "b.png",
        "conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": A}],
        "answer": A,
        "question": "Which bird sits there?",
    },
    "empty neighbours": {
        "text": Q,
        "answer": A,
        "image": "b.png",
        "images": [],
        "messages": None,
        "system": "",
        "img": "",
    },
    "a row of parquet": {
        "text": Q,
        "answer": A,
        "image": {"bytes": None, "path": "b.png"},
        "conversations": None,
    },
}


@pytest.mark.parametrize("name", SAME)
def test_layouts_are_read_alike(tmp_path: Path, name: str) -> None:
    [record] = read(tmp_path, SAME[name])
    asked = record.instruction.replace("\n", " ")
    assert (asked, record.answer, record.context) == ("Which bird sits there?", A, None)
    assert record.image == tmp_path / "images" / "b.png"
    assert dict(record.extra) == ({"img": ""} if "img" in SAME[name] else {})


def test_earlier_turns_are_records_of_their_own(tmp_path: Path) -> None:
    entry = {
        "id": "x",
        "query": "And now?",
        "response": "two",
        "history": [["How many?", "one"]],
        "image": "b.png",
    }
    first, second = read(tmp_path, entry)
    assert [(r.id, r.instruction, r.answer) for r in (first, second)] == [
        ("x#0", "How many?", "one"),
        ("x#1", "And now?", "two"),
    ]


TALK = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]

#: Entries that are refused: (entry, code, what the message names).
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "no known question": (
        {"prompt": "q", "completion": "a"},
        "instruction_empty",
        "instruction.*prompt, completion",
    ),
    "no known answer": (
        {"question": "q", "label": "a"},
        "answer_empty",
        "answer, response, output.*question, label",
    ),
    "two answers": ({"text": "q", "answer": "a", "response": "b"}, "keys_compete", "`response`.*`text`"),
    "two questions": ({"text": "caption", "question": "q", "answer": "a"}, "keys_compete", "`question`"),
    "two talks": (
        {"conversations": TALK, "messages": TALK[:1] + [{"from": "gpt", "value": "c"}]},
        "keys_compete",
        "`messages`",
    ),
    "history beside turns": ({"conversations": TALK, "history": [["x", "y"]]}, "keys_compete", "`history`"),
    "two pictures": (
        {"text": "q", "answer": "a", "images": ["1.png", "2.png"]},
        "entry_malformed",
        "`images` must be one",
    ),
    "two keys of pictures": (
        {"text": "q", "answer": "a", "image": "1.png", "images": ["2.png"]},
        "keys_compete",
        "`images`",
    ),
    "image_path": ({"text": "q", "answer": "a", "image_path": "1.png"}, "image_key", "image_path"),
    "Image": ({"text": "q", "answer": "a", "Image": "1.png"}, "image_key", "Image"),
    "pictures": (
        {"text": "<image>q", "answer": "a", "pictures": [{"path": "1.png"}]},
        "image_key",
        "pictures",
    ),
    "a picture's path": ({"text": "q", "answer": "a", "file": "scans/1.JPEG"}, "image_key", "`file`"),
    "paths of pictures": ({"text": "q", "answer": "a", "views": ["1.tif"]}, "image_key", "`views`"),
    "videos": ({"text": "q", "answer": "a", "videos": ["1.mp4"]}, "image_key", "videos"),
    "an image by its address alone": (
        {"text": "q", "answer": "a", "image": {"url": "x"}},
        "entry_malformed",
        "one path",
    ),
    "an address": ({"text": "q", "answer": "a", "image": "https://host/1.png"}, "entry_malformed", "address"),
    "a data URL": (
        {"text": "q", "answer": "a", "image": "data:image/png;base64,AAAA"},
        "entry_malformed",
        "holds its data",
    ),
    "the picture itself": (
        {"text": "q", "answer": "a", "image": "iVBORw0/" * 900},
        "entry_malformed",
        "too long",
    ),
    "a system prompt": (
        {"text": "q", "answer": "a", "system": "be brief"},
        "entry_malformed",
        "`system` is not read",
    ),
    "a system turn": (
        {"conversations": [{"from": "system", "value": "s"}, *TALK]},
        "entry_malformed",
        "system turn",
    ),
    "the model begins": ({"conversations": [TALK[1], *TALK]}, "entry_malformed", "alternate"),
    "a turn too many": ({"messages": [*TALK, TALK[0]]}, "entry_malformed", "alternate"),
    "a tool": ({"messages": [TALK[0], {"role": "tool", "content": "x"}]}, "entry_malformed", "alternate"),
    "a part with a picture of its own": (
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "1.png"}]}, TALK[1]]},
        "entry_malformed",
        "part of `content`",
    ),
    "a history that is text": (
        {"query": "q", "response": "a", "history": "x"},
        "entry_malformed",
        "`history`",
    ),
    "an input that is a list": (
        {"instruction": "q", "output": "a", "input": ["x"]},
        "entry_malformed",
        "`input`",
    ),
    "more placeholders than pictures": (
        {"text": "<image> or <image>?", "answer": "a", "image": "1.png"},
        "placeholder_surplus",
        "2 times",
    ),
    "an answer that is true": ({"text": "q", "answer": True}, "answer_empty", "text or a number"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_refused_once_and_alike(tmp_path: Path, name: str) -> None:
    """Training stops with the words that the check collects."""
    entry, code, told = REFUSED[name]
    task = spec(tmp_path, {"text": "fine", "answer": "a"}, {"id": "z", **entry})
    with pytest.raises(DeloError, match=f"(?s){told}") as caught:
        read_records(task, "train")
    assert str(caught.value).startswith(f"{tmp_path / 'train.json'}, entry 1 (id z): ")
    assert len(str(caught.value)) < 500 + len(str(tmp_path))
    good, bad = open_reading(task, "train", lambda error: pytest.fail(str(error)))
    assert (len(good.rows), good.faults) == (1, [])
    [fault] = bad.faults
    assert fault.code == code
    assert fault.message in caught.value.message


def test_a_placeholder_in_every_turn_is_the_one_picture_each_time(tmp_path: Path) -> None:
    turns = [
        {"role": role, "content": text}
        for text in ("<image>one?", "<image>two?")
        for role in ("user", "assistant")
    ]
    first, second = read(tmp_path, {"messages": turns, "image": "b.png"})
    assert first.image == second.image == tmp_path / "images" / "b.png"
    assert (first.instruction, second.instruction) == ("one?", "two?")


def test_pictures_in_columns_of_parquet(tmp_path: Path) -> None:
    """As `datasets` and TRL write them: a list with one picture, or its bytes alone."""
    file, out = tmp_path / "train.PARQUET", BytesIO()
    Image.new("RGB", (5, 3), "red").save(out, "PNG")
    said = [{"role": "user", "content": "<image>Which colour?"}, {"role": "assistant", "content": "red"}]
    rows = [
        {"messages": said, "images": [{"bytes": out.getvalue(), "path": None}], "raw": None},
        {"messages": said, "images": [], "raw": None},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[:1]), file)
    [record] = read_records(TaskSpec("t", "k", {"train": file}, tmp_path), "train")
    with Image.open(record.image) as found:  # type: ignore[arg-type]
        assert found.size == (5, 3)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    with pytest.raises(DeloError, match="entry 1.*names no image"):
        read_records(TaskSpec("t", "k", {"train": file}, tmp_path), "train")
    table = pyarrow.table({"text": ["q"], "answer": ["a"], "image": [out.getvalue()]})
    pyarrow.parquet.write_table(table, file)
    [bare] = read_records(TaskSpec("t", "k", {"train": file}, tmp_path), "train")
    assert bare.image == record.image


def test_the_check_says_which_keys_no_model_sees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = Sequence(tmp_path)
    data.train[0]["caption"] = "a blue square"
    data.test[0]["difficulty"] = 3
    data.write()
    assert cli.main(data.words("--no-tokens")) == 0
    assert "never shown to a model: caption, difficulty" in capsys.readouterr().out
    assert [part["extra"] for part in data.report()[0]["parts"]] == [["caption"], ["difficulty"]]
